"""The stream of tasks: classes ordered once and cut into tasks, each task split over the partitions."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedtalora_flwr.config import registry
from fedtalora_flwr.data.partitions import Partitioner
from fedtalora_flwr.data.source import Ints, Source

PARTITIONS = registry.PACKAGES["partition"]
TASK_ORDERS = ("seeded", "given", "domain")

_CLASS_ORDER = 1_000_003  # purpose of a seed; tasks use [seed, task_id]
_SLOT_ORDER = 1_000_033  # of a client's numbering of its tasks, with its partition id


@dataclass(frozen=True)
class Share:
    """What a partition holds of a data set that all processes read.

    Parameters
    ----------
    partition_hash
        SHA-256 over the row numbers and labels, all tasks.
    class_counts
        (C,) int64, training examples of each class.
    """

    partition_hash: str
    class_counts: Ints  # (C,)


@dataclass(frozen=True)
class TaskStream:
    """Which classes each task brings and who holds which of its training examples.

    Parameters
    ----------
    class_order
        All class ids in the order in which tasks bring them.
    tasks
        `class_order`, cut: class ids by task id.
    partitions
        Sorted row numbers of the training split, by task id and partition id.
    """

    class_order: tuple[int, ...]
    tasks: tuple[tuple[int, ...], ...]
    partitions: tuple[tuple[Ints, ...], ...]

    @property
    def num_partitions(self) -> int:
        """Number of partitions."""
        return len(self.partitions[0])

    def class_counts(self, labels: Ints) -> Ints:
        """Count what each partition holds over the whole stream.

        Parameters
        ----------
        labels
            (N,) labels of the training split.

        Returns
        -------
        class_counts
            (num_partitions, num_classes).
        """
        return np.stack(
            [
                np.bincount(labels[self._rows_of(partition_id)], minlength=len(self.class_order))
                for partition_id in range(self.num_partitions)
            ]
        ).astype(np.int64)

    def partition_hash(self, labels: Ints, partition_id: int) -> str:
        """Fingerprint what a partition holds: each task's id, row numbers and their labels.

        Parameters
        ----------
        labels
            (N,) labels of the training split.
        partition_id
            Which partition.

        Returns
        -------
        digest
            SHA-256 in hexadecimal, the same on every machine.
        """
        digest = hashlib.sha256()
        for task_id, parts in enumerate(self.partitions):
            rows = parts[partition_id]
            for numbers in ([task_id, len(rows)], rows, labels[rows]):
                digest.update(np.asarray(numbers, dtype="<i8").tobytes())
        return digest.hexdigest()

    def shares(self, labels: Ints) -> list["Share"]:
        """Say what each partition holds, in order of partition id; `labels` (N,) are those of the training split."""
        counts = self.class_counts(labels)
        return [
            Share(self.partition_hash(labels, partition), counts[partition]) for partition in range(self.num_partitions)
        ]

    def test_rows(self, labels: Ints, task_id: int) -> Ints:
        """List the rows of a task's classes.

        Parameters
        ----------
        labels
            (N,) labels of the test split.
        task_id
            Which task.

        Returns
        -------
        rows
            Sorted row numbers in that split.
        """
        return np.flatnonzero(np.isin(labels, self.tasks[task_id]))

    def slots_of(self, partition_id: int, *, num_tasks: int, min_share: float, seed: int) -> tuple[int, ...]:
        """List a partition's local tasks, in an order that says nothing: the place is the number of its slot.

        Parameters
        ----------
        partition_id
            Which partition.
        num_tasks
            Tasks of the stream that are played, from the first on.
        min_share
            A partition with less than this share of a task's examples has no slot for it.
        seed
            Of the order.

        Returns
        -------
        tasks
            Task ids by slot number.
        """
        sizes = [(len(parts[partition_id]), sum(map(len, parts))) for parts in self.partitions[:num_tasks]]
        held = [task_id for task_id, (own, total) in enumerate(sizes) if own and own >= min_share * total]
        rng = np.random.default_rng([seed, _SLOT_ORDER, partition_id])
        return tuple(int(task_id) for task_id in rng.permutation(held))

    def _rows_of(self, partition_id: int) -> Ints:
        return np.concatenate([parts[partition_id] for parts in self.partitions])


def build_stream(
    source: Source,
    *,
    num_tasks: int,
    task_order: str,
    partition: str,
    num_partitions: int,
    seed: int,
    settings: Mapping[str, Any],
) -> TaskStream:
    """Order the classes, cut them into tasks and split each task over the partitions.

    Parameters
    ----------
    source
        The data.
    num_tasks
        Tasks to cut the classes into; sizes differ by at most one class (by one group in order ``domain``).
    task_order
        ``seeded`` permutes the classes, ``given`` keeps them as they are numbered, ``domain`` permutes the
        source's groups and keeps each in one task.
    partition
        Name of a file in `partitions`.
    num_partitions
        Number of clients to split over.
    seed
        Decides the order and, with the task id, each split.
    settings
        The partition scheme's settings by snake_case name.

    Raises
    ------
    ValueError
        If the numbers do not fit the data, or a name is unknown.
    """
    if num_partitions < 1:
        raise ValueError(f"num-clients must be at least 1, got {num_partitions}")
    tasks = _cut_classes(source, num_tasks=num_tasks, task_order=task_order, seed=seed)
    scheme: Partitioner = registry.build(PARTITIONS, partition, settings)
    partitions = []
    for task_id, classes in enumerate(tasks):
        rows = np.flatnonzero(np.isin(source.train.labels, classes))
        parts = scheme.split(
            source.train.labels[rows],
            num_partitions=num_partitions,
            rng=np.random.default_rng([seed, task_id]),
        )
        partitions.append(tuple(rows[positions] for positions in parts))
    return TaskStream(
        class_order=tuple(class_id for classes in tasks for class_id in classes),
        tasks=tasks,
        partitions=tuple(partitions),
    )


def _cut_classes(source: Source, *, num_tasks: int, task_order: str, seed: int) -> tuple[tuple[int, ...], ...]:
    if task_order not in TASK_ORDERS:
        raise ValueError(f"task-order must be one of {', '.join(TASK_ORDERS)}, got {task_order!r}")
    if task_order == "domain":
        units: Sequence[tuple[int, ...]] = _groups(source)
        noun = "groups of classes"
    else:
        units = [(class_id,) for class_id in range(source.num_classes)]
        noun = "classes"
    if not 1 <= num_tasks <= len(units):
        raise ValueError(
            f"num-tasks must be in [1, {len(units)}], the {noun} of {source.name}, got {num_tasks}; correct num-tasks"
        )
    return cut(units, num_tasks=num_tasks, seed=None if task_order == "given" else seed)


def cut(units: Sequence[tuple[int, ...]], *, num_tasks: int, seed: int | None) -> tuple[tuple[int, ...], ...]:
    """Cut classes, in units that stay together, into tasks whose sizes differ by at most one unit.

    Parameters
    ----------
    units
        Class ids.
    num_tasks
        Number of tasks, in [1, len(units)].
    seed
        Of the order; None keeps the units as they are.
    """
    order = np.arange(len(units))
    if seed is not None:
        order = np.random.default_rng([seed, _CLASS_ORDER]).permutation(len(units))
    return tuple(
        tuple(class_id for unit in chosen for class_id in units[unit]) for chosen in np.array_split(order, num_tasks)
    )


def _groups(source: Source) -> Sequence[tuple[int, ...]]:
    if not source.groups:
        raise ValueError(
            f"task-order domain needs a source with groups of classes, and {source.name} has none; "
            "set task-order to seeded or given"
        )
    if sorted(class_id for group in source.groups for class_id in group) != list(range(source.num_classes)):
        raise ValueError(
            f"task-order domain needs groups of {source.name} that hold each of its {source.num_classes} "
            "classes once; correct its groups or set task-order to seeded or given"
        )
    return source.groups
