"""Skew by size: a task's examples, whatever their class, are spread over partitions by one draw from Dir(beta).

FL-TAC's scheme for tasks that are data sets (arXiv 2404.15384): how much of each a client holds differs, and not which
of its classes. Of a task with two classes the draw for each class leaves many clients with one alone.
"""

import numpy as np

from fedtalora_flwr.data.partitions import Partitioner, dirichlet
from fedtalora_flwr.data.source import Ints


class DirichletSizes:
    """Split a task as one class.

    Parameters
    ----------
    of_one_class
        How the examples of a class are split.
    """

    def __init__(self, of_one_class: Partitioner) -> None:
        self._of_one_class = of_one_class

    def split(self, labels: Ints, *, num_partitions: int, rng: np.random.Generator) -> list[Ints]:
        """Split as `Partitioner.split` says; empty partitions are results, not failures."""
        return self._of_one_class.split(np.zeros_like(labels), num_partitions=num_partitions, rng=rng)


def create(*, dirichlet_beta: float) -> Partitioner:
    """Make the scheme; `dirichlet_beta` and what is refused are as of ``dirichlet``."""
    return DirichletSizes(dirichlet.create(dirichlet_beta=dirichlet_beta))
