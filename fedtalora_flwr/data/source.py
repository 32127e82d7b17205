"""A data set as the library sees it: labels at hand, inputs read on demand, and what is done to every one.

A file in `sources` only reads; `tidy` then gives each data set a test split, classes numbered without gaps
and at most so many examples a class.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Modality = Literal["image", "text", "instruction"]

# Purposes of a seed, far above any task or partition id. NumPy pads a seed with zeros, so the test rows of class 0 are
# drawn from the stream of the class order (stream._CLASS_ORDER): harmless, for one is of rows, the other of classes.
_HOLD_OUT, _SUBSET, _TEST_SUBSET = 1_000_001, 1_000_002, 1_000_003


class DataError(ValueError):
    """Data that cannot be used: the message says what, got what, where, and the next step."""


@dataclass(frozen=True)
class Split:
    """Examples in a fixed order.

    Parameters
    ----------
    labels
        (N,) class ids in [0, num_classes).
    read
        Maps (n,) row numbers to their raw inputs, in that order: PIL images in RGB or greyscale, strings, pairs of
        strings, or `Instruction`.
    """

    labels: Ints  # (N,)
    read: Callable[[Ints], Sequence[Any]]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Source:
    """A data set of examples in classes.

    Parameters
    ----------
    name
        What to call it in messages.
    modality
        What `Split.read` gives.
    class_names
        Name of each class, by class id.
    train, test
        The two splits; a source that has no test split of its own gives `NO_ROWS`.
    groups
        Class ids by domain, e.g. the ten domains of CLINC150; empty where the classes have none.
    image_side
        Side in pixels at which images are stored, if the model takes that much; None: that of the first one.
    num_texts
        How many texts an input may be made of: 1, 2 where it is a pair, or both in a joined set. Not of images.
    remarks
        What is odd about the data but no error, a line each.

    Raises
    ------
    DataError
        If a label lies outside the classes, or there is nothing to train on.
    """

    name: str
    modality: Modality
    class_names: tuple[str, ...]
    train: Split
    test: Split
    groups: tuple[tuple[int, ...], ...] = ()
    image_side: float | None = None
    num_texts: tuple[int, ...] = (1,)
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.train) == 0:
            raise DataError(f"{self.name} has no training examples; check that the data is complete")
        for split_name, split in (("training", self.train), ("test", self.test)):
            wrong = np.flatnonzero((split.labels < 0) | (split.labels >= self.num_classes))
            if len(wrong):
                raise DataError(
                    f"{split_name} labels of {self.name} must be in [0, {self.num_classes - 1}], "
                    f"got {split.labels[wrong[0]]} in row {wrong[0]} ({len(wrong)} such rows); "
                    "correct or remove these rows"
                )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def _read_nothing(rows: Ints) -> Sequence[Any]:
    assert len(rows) == 0
    return []


NO_ROWS = Split(labels=np.empty(0, dtype=np.int64), read=_read_nothing)


def take(split: Split, rows: npt.ArrayLike) -> Split:
    """Keep the rows of a split whose numbers are given, in the order given; nothing is read.

    Parameters
    ----------
    split
        Where to take from.
    rows
        (n,) row numbers in `split`.
    """
    kept = np.asarray(rows, dtype=np.int64)  # (n,)
    return Split(labels=split.labels[kept], read=lambda wanted: split.read(kept[np.asarray(wanted, dtype=np.int64)]))


def join_classes(train_names: Sequence[str], test: Split, test_names: Sequence[str]) -> tuple[tuple[str, ...], Split]:
    """Give the classes of a test split the numbers that the training split has for the same names.

    Parameters
    ----------
    train_names
        Class names by the training split's ids.
    test
        Test split with ids of its own.
    test_names
        Class names by the test split's ids.

    Returns
    -------
    class_names, test
        Names of the training classes, then of those only the test split has; the renumbered test split.
    """
    class_names = tuple(dict.fromkeys([*train_names, *test_names]))
    id_of = {name: class_id for class_id, name in enumerate(class_names)}
    renumber = np.array([id_of[name] for name in test_names], dtype=np.int64)
    return class_names, Split(labels=renumber[test.labels], read=test.read)


def tidy(source: Source, *, test_fraction: float, max_per_class: int, seed: int, max_test_per_class: int = 0) -> Source:
    """Complete what a source read: a test split, classes that can be learnt, at most so many examples.

    Parameters
    ----------
    source
        As a file in `sources` gives it.
    test_fraction
        Share of each class in [0, 1) that is held out where the source has no test split; 0 leaves it empty.
    max_per_class
        Training examples to keep of each class; 0 keeps all.
    seed
        Decides which examples are held out and which are kept.
    max_test_per_class
        Test examples to keep of each class; 0 keeps all.

    Raises
    ------
    DataError
        If the test split shares no class with the training split.
    ValueError
        If `test_fraction` or `max_per_class` is out of range.
    """
    if not 0 <= test_fraction < 1:
        raise ValueError(f"test-fraction must be in [0, 1), got {test_fraction}")
    if max_per_class < 0:
        raise ValueError(f"max-per-class must be 0 (all) or positive, got {max_per_class}")
    if len(source.test) == 0 and test_fraction > 0:
        source = _hold_out(source, test_fraction, seed)
    source = _keep_trained_classes(source)
    if max_per_class:
        source = replace(source, train=_limited(source.train, max_per_class, seed, _SUBSET))
    if max_test_per_class:
        source = replace(source, test=_limited(source.test, max_test_per_class, seed, _TEST_SUBSET))
    return source


def _shuffled_rows_by_class(labels: Ints, seed: int, purpose: int) -> list[Ints]:
    """Shuffle each class's rows with a stream of its own, so that one class does not sway another."""
    return [
        np.random.default_rng([seed, purpose, class_id]).permutation(np.flatnonzero(labels == class_id))
        for class_id in np.unique(labels)
    ]


def _hold_out(source: Source, fraction: float, seed: int) -> Source:
    """Move a share of each class to the test split; a class of one example stays in training."""
    held: list[Ints] = []
    kept: list[Ints] = []
    for rows in _shuffled_rows_by_class(source.train.labels, seed, _HOLD_OUT):
        num_test = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
        held.append(rows[:num_test])
        kept.append(rows[num_test:])
    return replace(
        source,
        train=take(source.train, np.sort(np.concatenate(kept))),
        test=take(source.train, np.sort(np.concatenate(held))),
    )


def _keep_trained_classes(source: Source) -> Source:
    """Drop the classes with no training example and number the rest without gaps, in the same order."""
    trained = np.unique(source.train.labels)
    if len(trained) == source.num_classes:
        return source
    renumber = np.full(source.num_classes, -1, dtype=np.int64)
    renumber[trained] = np.arange(len(trained))
    test = take(source.test, np.flatnonzero(renumber[source.test.labels] >= 0))
    if len(test) == 0 < len(source.test):
        names = {
            kind: [source.class_names[class_id] for class_id in np.unique(split.labels)[:3]]
            for kind, split in (("test", source.test), ("training", source.train))
        }
        raise DataError(
            f"no test row of {source.name} is of a training class: test has e.g. {names['test']}, "
            f"training e.g. {names['training']}; use the same labels in both"
        )
    groups = (tuple(int(renumber[c]) for c in group if renumber[c] >= 0) for group in source.groups)
    return replace(
        source,
        class_names=tuple(source.class_names[class_id] for class_id in trained),
        train=Split(labels=renumber[source.train.labels], read=source.train.read),
        test=Split(labels=renumber[test.labels], read=test.read),
        groups=tuple(group for group in groups if group),
    )


def _limited(split: Split, per_class: int, seed: int, purpose: int) -> Split:
    by_class = _shuffled_rows_by_class(split.labels, seed, purpose)
    return take(split, np.sort(np.concatenate([rows[:per_class] for rows in by_class])))
