"""Recompute FedAvg of the full weights beside a method, the slow and obvious way (``verify = true``)."""

from collections.abc import Sequence

import torch

from fedtalora_flwr.aggregation.factors import LoraFactors
from fedtalora_flwr.aggregation.types import ClientUpdate, GlobalState


def exactness_error(state: GlobalState, updates: Sequence[ClientUpdate], new_state: GlobalState) -> float:
    """Measure how far a new state is from the weighted mean of the clients' effective weights.

    The frozen W_0 is the same on both sides and left out, so the error is relative to what was learned, which
    is stricter than relative to the weights: ``max over layers |learned - mean| / |mean|`` in float64 with
    ``mean = sum_k p_k (R_t + s_k B_k A_k)`` and ``learned = R_{t+1} + s B A``.

    Parameters
    ----------
    state, updates
        What `Aggregator.aggregate` was given.
    new_state
        What it returned.

    Returns
    -------
    The largest relative Frobenius error over the layers; 0 for a layer where both sides are zero.
    """
    total = sum(update.num_examples for update in updates)
    worst = 0.0
    for name, broadcast in state.adapters.items():
        base = state.residual.get(name, torch.zeros(())).double()
        mean = torch.zeros(broadcast.lora_B.shape[0], broadcast.lora_A.shape[1], dtype=torch.float64)
        for update in updates:
            mean += update.num_examples / total * (base + _double(update.adapters[name]).delta())
        learned = new_state.residual.get(name, torch.zeros(())).double() + _double(new_state.adapters[name]).delta()
        error = (learned - mean).norm().item()
        worst = max(worst, error / max(mean.norm().item(), torch.finfo(torch.float64).tiny))
    return worst


def _double(factors: LoraFactors) -> LoraFactors:
    return LoraFactors(factors.lora_A.double(), factors.lora_B.double(), factors.scaling)
