"""Ways to split a task's examples over partitions: each file has ``create(...) -> Partitioner``.

flwr-datasets' partitioners are not used: its Dirichlet partitioner redraws until every partition has a
minimum size, which fails at beta 0.05, and an index must fall to exactly one partition without retries.
"""

from typing import Protocol

import numpy as np

from fedtalora_flwr.data.source import Ints


class Partitioner(Protocol):
    """A scheme with its settings."""

    def split(self, labels: Ints, *, num_partitions: int, rng: np.random.Generator) -> list[Ints]:
        """Give each position to exactly one partition; a partition may stay empty.

        Parameters
        ----------
        labels
            (n,) class ids of one task's examples.
        num_partitions
            Number of partitions, at least 1.
        rng
            Source of all randomness.

        Returns
        -------
        positions
            Per partition, sorted positions in `labels`.
        """
        ...
