"""Backward transfer: how the tasks before the last changed since they were learnt (Lopez-Paz and Ranzato, 1706.08840).

    BWT = mean over j < T of (a_Tj - a_jj)

Negative where tasks were forgotten. Unlike forgetting it starts from the task's own training and not from its best.
"""

from collections.abc import Callable

import numpy as np

from fedtalora_flwr.metrics.matrix import TaskMatrix


def backward_transfer(matrix: TaskMatrix) -> float | None:
    """Give BWT in accuracy, or None where no earlier task was measured at both times."""
    last = matrix.last_task()
    if not last:
        return None
    accuracy = matrix.accuracy()
    change = accuracy[last, :last] - accuracy.diagonal()[:last]
    return None if np.isnan(change).all() else float(np.nanmean(change))


def create() -> Callable[[TaskMatrix], float | None]:
    """Give the metric."""
    return backward_transfer
