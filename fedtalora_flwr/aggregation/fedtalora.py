"""Fed-TaLoRA's aggregation with the residual weight update (arXiv 2505.12318, ResWU), made exact.

The mean of products is not the product of means. With p_k = n_k / sum n and one scaling s, the server
broadcasts the means Bbar, Abar and adds what they lose to a residual that accumulates over the rounds:

    R_{t+1} = R_t + s * sum_k p_k (B_k - Bbar)(A_k - Abar)

so that ``W_0 + R_{t+1} + s Bbar Abar`` equals the weighted mean of the clients' effective weights
``W_0 + R_t + s B_k A_k``, for any subset of clients and any weights. The centred sum equals the paper's
``sum_k p_k B_k A_k - Bbar Abar`` and stays accurate where that difference of near-equal products cancels.

Clients of different rank are accepted: then the broadcast pair is the best approximation of the exact mean
at the server's rank (truncated SVD), and the residual takes all that it leaves out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fedtalora_flwr.aggregation.base import (
    Aggregator,
    ClientUpdate,
    GlobalState,
    LoraFactors,
    example_weights,
    in_summation_order,
)
from fedtalora_flwr.aggregation.head import average_class_rows

Residual = Literal["accumulate", "replace", "off"]


@dataclass(frozen=True)
class FedTaLoRA(Aggregator):
    """Average the factors by examples and carry what that loses in the residual.

    Parameters
    ----------
    residual
        ``accumulate``: exact in every round. ``replace``: the residual of the last round only, the literal
        reading of the paper. ``off``: none, plain FedAvg of the factors. The last two are ablations.
    """

    residual: Residual = "accumulate"
    trainable: frozenset[str] = frozenset({"lora_A", "lora_B"})

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Whether the aggregate equals FedAvg of the effective weights."""
        return self.residual == "accumulate"

    def aggregate(self, state: GlobalState, updates: Sequence[ClientUpdate]) -> GlobalState:
        """Fold the updates into a new state (see the module's equation).

        Parameters
        ----------
        state
            What the clients started from.
        updates
            Replies of any subset of clients, in any order.

        Raises
        ------
        ValueError
            If there is no update, or the updates hold no example.
        """
        updates = in_summation_order(updates)
        weights = example_weights(updates)
        adapters, residual = {}, {}
        for name, broadcast in state.adapters.items():
            factors = [update.adapters[name] for update in updates]
            adapters[name], lost = average_factors(factors, weights, like=broadcast)
            if self.residual == "accumulate" and name in state.residual:
                residual[name] = state.residual[name] + lost
            elif self.residual != "off":
                residual[name] = lost
        return GlobalState(
            adapters=adapters,
            residual=residual,
            head=average_class_rows(state.head, updates),
            version=state.version + 1,
        )


def average_factors(
    factors: Sequence[LoraFactors], weights: Sequence[float], *, like: LoraFactors
) -> tuple[LoraFactors, Tensor]:
    """Average one layer's factors.

    Parameters
    ----------
    factors
        The clients' pairs, K of them, in summation order.
    weights
        p_k, summing to 1.
    like
        The broadcast pair, whose rank and scaling the average has.

    Returns
    -------
    The averaged pair, and what it loses against the mean of the products: a (d_out, d_in) float32 tensor with
    ``sum_k p_k delta_k = average.delta() + lost``.
    """
    if all(f.rank == like.rank and f.scaling == like.scaling for f in factors):
        return _centred(factors, weights, like=like)
    return _truncated(factors, weights, like=like)


def _centred(
    factors: Sequence[LoraFactors], weights: Sequence[float], *, like: LoraFactors
) -> tuple[LoraFactors, Tensor]:
    p = torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1)  # (K, 1, 1)
    lora_A = torch.stack([f.lora_A for f in factors]).double()  # (K, rank, d_in)
    lora_B = torch.stack([f.lora_B for f in factors]).double()  # (K, d_out, rank)
    mean = LoraFactors((p * lora_A).sum(0).float(), (p * lora_B).sum(0).float(), like.scaling)
    spread_A = (lora_A - mean.lora_A).flatten(0, 1)  # (K rank, d_in)
    spread_B = (p * (lora_B - mean.lora_B)).transpose(0, 1).flatten(1)  # (d_out, K rank)
    # The spreads are differences taken in float64, so one float32 product keeps their accuracy.
    return mean, like.scaling * (spread_B.float() @ spread_A.float())


def _truncated(
    factors: Sequence[LoraFactors], weights: Sequence[float], *, like: LoraFactors
) -> tuple[LoraFactors, Tensor]:
    # The exact mean is left @ right with inner size sum_k rank_k; its SVD needs only the small core.
    left = torch.cat([p * f.scaling * f.lora_B.double() for p, f in zip(weights, factors, strict=True)], 1)
    right = torch.cat([f.lora_A.double() for f in factors], 0)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, singular, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    kept = min(like.rank, int((singular > 1e-12 * singular[0]).sum()))
    root = (singular[:kept] / like.scaling).sqrt()
    lora_A = like.lora_A.double()  # (rank, d_in); rows that the mean does not fill stay, for a zero pair never trains
    lora_A = torch.cat([root.unsqueeze(1) * (vh @ q_right.T)[:kept], lora_A[kept:]])
    lora_B = torch.nn.functional.pad((q_left @ u)[:, :kept] * root, (0, like.rank - kept))  # (d_out, rank)
    pair = LoraFactors(lora_A.float(), lora_B.float(), like.scaling)
    return pair, (left @ right - like.scaling * (pair.lora_B.double() @ pair.lora_A.double())).float()


def create(*, residual: str = "accumulate") -> FedTaLoRA:
    """Build the method from the setting ``residual``.

    Raises
    ------
    ValueError
        If `residual` is none of accumulate, replace, off.
    """
    if residual not in get_args(Residual):
        raise ValueError(f"residual must be one of {', '.join(get_args(Residual))}, got {residual!r}")
    return FedTaLoRA(residual=residual)  # type: ignore[arg-type]
