"""Average the classifier per class row: the rule every method shares.

A plain mean drags the row of a class towards its broadcast value for every client that never saw the class.
So row c is averaged with the weights n_{k,c} / sum_k n_{k,c}; a row that nobody trained stays as it was.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedtalora_flwr.aggregation.base import ClientUpdate


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
    counts = torch.stack([u.class_counts for u in updates]).double()  # (K, C)
    totals = counts.sum(0)  # (C,)
    clients, classes = counts.nonzero(as_tuple=True)  # (n,) each: who trained which class, client by client
    weights = counts[clients, classes] / totals[classes]  # (n,)
    averaged = {}
    for name, broadcast in head.items():
        rows = torch.cat([u.head[name][u.class_counts > 0] for u in updates]).double()  # (n, ...)
        rows *= weights.view(-1, *[1] * (rows.dim() - 1))
        mean = torch.zeros_like(broadcast, dtype=torch.float64).index_add_(0, classes, rows)
        untrained = (totals == 0).view(-1, *[1] * (broadcast.dim() - 1))
        averaged[name] = torch.where(untrained, broadcast.double(), mean).to(broadcast.dtype)
    return averaged
