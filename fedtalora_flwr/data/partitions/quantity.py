"""Skew by label quantity: every partition holds exactly alpha of a task's classes (`classes_per_client`)."""

from dataclasses import dataclass

import numpy as np

from fedtalora_flwr.data.partitions import Partitioner
from fedtalora_flwr.data.source import Ints


@dataclass(frozen=True)
class Quantity:
    """Deal classes to partitions, then cut each class evenly among its holders.

    Parameters
    ----------
    classes_per_client
        The paper's alpha: classes of a task that each partition holds.
    """

    classes_per_client: int

    def split(self, labels: Ints, *, num_partitions: int, rng: np.random.Generator) -> list[Ints]:
        """Split as `Partitioner.split` says; numbers of holders of any two classes differ by at most one.

        Raises
        ------
        ValueError
            If the task has fewer classes than alpha, or too few partitions hold alpha for all its classes.
        """
        classes = np.unique(labels)
        if not 1 <= self.classes_per_client <= max(len(classes), 1):
            raise ValueError(
                f"classes-per-client must be in [1, {len(classes)}], the classes of the task, got "
                f"{self.classes_per_client}; lower classes-per-client or num-tasks"
            )
        if num_partitions * self.classes_per_client < len(classes):
            raise ValueError(
                f"{num_partitions} clients with {self.classes_per_client} classes each cannot hold the "
                f"{len(classes)} classes of the task; raise classes-per-client, num-clients or num-tasks"
            )
        is_held = self._deal(len(classes), num_partitions, rng)  # (num_partitions, classes)
        parts: list[list[Ints]] = [[] for _ in range(num_partitions)]
        for column, class_id in enumerate(classes):
            holders = rng.permutation(np.flatnonzero(is_held[:, column]))
            rows = rng.permutation(np.flatnonzero(labels == class_id))
            for holder, share in zip(holders, np.array_split(rows, len(holders)), strict=True):
                parts[holder].append(share)
        nothing = np.empty(0, dtype=np.int64)
        return [np.sort(np.concatenate([nothing, *shares])) for shares in parts]

    def _deal(self, num_classes: int, num_partitions: int, rng: np.random.Generator) -> np.ndarray:
        """Give each partition the alpha classes held least so far; ties fall at random."""
        is_held = np.zeros((num_partitions, num_classes), dtype=bool)
        for hand in is_held:
            least_held = np.lexsort((rng.random(num_classes), is_held.sum(axis=0)))
            hand[least_held[: self.classes_per_client]] = True
        return is_held


def create(*, classes_per_client: int) -> Partitioner:
    """Make the scheme.

    Parameters
    ----------
    classes_per_client
        The paper's alpha.
    """
    return Quantity(classes_per_client)
