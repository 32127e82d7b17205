"""Skew by distribution: a class's examples are spread over partitions by a draw from Dir(beta).

Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
2019, with shares drawn per class, p_k ~ Dir(beta, ..., beta).
"""

from dataclasses import dataclass

import numpy as np

from fedtalora_flwr.data.partitions import Partitioner
from fedtalora_flwr.data.source import Ints


@dataclass(frozen=True)
class Dirichlet:
    """Cut each class's shuffled examples at the rounded cumulative shares.

    Parameters
    ----------
    dirichlet_beta
        The paper's beta, positive: smaller is more skewed.
    """

    dirichlet_beta: float

    def split(self, labels: Ints, *, num_partitions: int, rng: np.random.Generator) -> list[Ints]:
        """Split as `Partitioner.split` says; empty partitions are results, not failures."""
        holder = np.empty(len(labels), dtype=np.int64)  # (n,)
        for class_id in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == class_id))
            shares = rng.dirichlet(np.full(num_partitions, self.dirichlet_beta))  # (num_partitions,)
            # Rounding the running total, not the shares, uses every example.
            ends = np.rint(np.cumsum(shares) * len(rows)).astype(np.int64)
            ends[-1] = len(rows)
            holder[rows] = np.repeat(np.arange(num_partitions), np.diff(ends, prepend=0))
        by_holder = np.argsort(holder, kind="stable")  # stable: positions stay sorted within a partition
        ends = np.cumsum(np.bincount(holder, minlength=num_partitions))
        return np.split(by_holder, ends[:-1])


def create(*, dirichlet_beta: float) -> Partitioner:
    """Make the scheme.

    Parameters
    ----------
    dirichlet_beta
        The paper's beta.

    Raises
    ------
    ValueError
        If it is not positive and finite.
    """
    if not 0 < dirichlet_beta < float("inf"):
        raise ValueError(f"dirichlet-beta must be positive and finite, got {dirichlet_beta}")
    return Dirichlet(dirichlet_beta)
