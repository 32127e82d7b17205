"""Every partition a random, equally large share of a task."""

from dataclasses import dataclass

import numpy as np

from fedtalora_flwr.data.partitions import Partitioner
from fedtalora_flwr.data.source import Ints


@dataclass(frozen=True)
class Iid:
    """Cut a permutation evenly."""

    def split(self, labels: Ints, *, num_partitions: int, rng: np.random.Generator) -> list[Ints]:
        """Split as `Partitioner.split` says; sizes differ by at most one."""
        order = rng.permutation(len(labels))  # (n,)
        return [np.sort(part) for part in np.array_split(order, num_partitions)]


def create() -> Partitioner:
    """Make the scheme; it has no settings."""
    return Iid()
