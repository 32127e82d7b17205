"""Data sets joined to one whose tasks they are: ``join:cifar10+cifar100``, ``join:text=path/a.csv+text=path/b.csv``."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fedtalora_flwr.config import registry
from fedtalora_flwr.config.joined import JOIN, Part, joined, parts_of
from fedtalora_flwr.data import SOURCES, load_source
from fedtalora_flwr.data.images import joint_side
from fedtalora_flwr.data.source import DataError, Ints, Source, Split

_PATH = "data_path"


def create(*, argument: str, **settings: Any) -> Source:
    """Read every part as if it were the only one, and put them side by side.

    Each part is completed by the settings on its own (a test split, at most so many examples a class), and is a group
    of the whole. Classes are called ``part/class``. Images are stored at the largest side that a part has.

    Parameters
    ----------
    argument
        The parts, as of `parts_of`.
    settings
        All settings: a part takes those that it names.

    Raises
    ------
    DataError
        If a part is there twice, lacks its path or has one that it does not read, if the parts hold inputs of different
        kinds, or one of them cannot be read.
    ValueError
        If there is no such part; the message lists what there is.
    """
    parts = parts_of(JOIN + argument)
    names = _names_of(parts)
    sources = [load_source(part.dataset, {**settings, _PATH: _path_of(part)}) for part in parts]
    kinds = {source.modality: name for name, source in zip(names, sources, strict=True)}
    if len(kinds) > 1:
        held = ", ".join(f"{name} holds {kind}s" for kind, name in kinds.items())
        raise DataError(f"join: a run trains on one kind of inputs, and {held}; leave one of them out")
    bounds = np.cumsum([0, *(source.num_classes for source in sources)]).tolist()  # of each part's classes
    named = zip(names, sources, strict=True)
    return Source(
        name=joined(map(Part, names)),
        modality=sources[0].modality,
        class_names=tuple(f"{name}/{class_name}" for name, source in named for class_name in source.class_names),
        train=_side_by_side([source.train for source in sources], first_classes=bounds[:-1]),
        test=_side_by_side([source.test for source in sources], first_classes=bounds[:-1]),
        groups=tuple(tuple(range(*pair)) for pair in pairwise(bounds)),
        image_side=joint_side(sources),
        num_texts=tuple(sorted({number for source in sources for number in source.num_texts})),
        remarks=tuple(remark for source in sources for remark in source.remarks),
    )


def _names_of(parts: Sequence[Part]) -> list[str]:
    """Name each part: as it is written, or by the file or folder that it reads."""
    names: list[str] = []
    for part in parts:
        kind, argument = registry.parted(part.dataset)
        if registry.resolve(SOURCES, part.dataset).__name__ == __name__:
            raise DataError(f"join: a part cannot be joined itself, got {part}; write its own parts in its place")
        folder = part.path or (argument if Path(argument).is_absolute() else "")
        written = argument if kind == "hub" else "/".join(filter(None, (kind.replace("_", "-"), argument)))
        name = Path(folder).stem if folder else written
        if name in names:
            raise DataError(
                f"join: two parts are called {name}; leave one out, or give files or folders of different names"
            )
        names.append(name)
    return names


def _path_of(part: Part) -> str:
    """Give the path of a part that reads one."""
    if not part.path and _PATH in registry.parameters(SOURCES, part.dataset):
        raise DataError(f"join: {part} has no path; write {part}=path/to/its/data")
    return part.path


def _side_by_side(splits: Sequence[Split], *, first_classes: Sequence[int]) -> Split:
    """Put the rows of splits one behind the other; each split's classes begin at the number given."""
    starts = np.cumsum([0, *map(len, splits)])[:-1]

    def read(rows: Ints) -> Sequence[Any]:
        wanted = np.asarray(rows, dtype=np.int64)
        owner = np.searchsorted(starts, wanted, side="right") - 1  # the last that begins there: others have no rows
        found: dict[int, Any] = {}
        for number in np.unique(owner):
            places = np.flatnonzero(owner == number)
            found |= zip(places.tolist(), splits[number].read(wanted[places] - starts[number]), strict=True)
        return [found[place] for place in range(len(wanted))]

    labels = [split.labels + first for split, first in zip(splits, first_classes, strict=True)]
    return Split(labels=np.concatenate(labels), read=read)
