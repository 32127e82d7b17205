"""Average the classifier per class row: the rule every method shares.

A plain mean drags the row of a class towards its broadcast value for every client that never saw the class.
So row c is averaged with the weights n_{k,c} / sum_k n_{k,c}; a row that nobody trained stays as it was.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedtalora_flwr.aggregation.types import ClientUpdate


def moved_rows(head: Mapping[str, Tensor]) -> Tensor:
    """Tell which rows, (C, ...) each, are no longer zero, as they start: (C,) bool."""
    moved = [rows.flatten(1).any(1) if rows.dim() > 1 else rows != 0 for rows in head.values()]
    return torch.stack(moved).any(0)


def average_class_rows(head: Mapping[str, Tensor], updates: Sequence[ClientUpdate]) -> dict[str, Tensor]:
    """Average each class row over the clients that trained it.

    Parameters
    ----------
    head
        The broadcast parameters, (C, ...) each.
    updates
        In summation order.

    Returns
    -------
    New parameters with the shapes and dtypes of `head`.
    """
    totals = sum((u.class_counts for u in updates), torch.zeros_like(updates[0].class_counts)).double()  # (C,)
    averaged = {name: torch.zeros_like(broadcast, dtype=torch.float64) for name, broadcast in head.items()}
    for update in updates:
        held = update.class_counts.nonzero().flatten()  # (n,)
        weights = update.class_counts[held] / totals[held]  # (n,) float64
        for name, mean in averaged.items():
            rows = update.head[name][held]  # (n, ...)
            mean.index_add_(0, held, weights.view(-1, *[1] * (rows.dim() - 1)) * rows)
    untrained = totals == 0
    for name, mean in averaged.items():
        mean[untrained] = head[name][untrained].double()
    return {name: mean.to(head[name].dtype) for name, mean in averaged.items()}
