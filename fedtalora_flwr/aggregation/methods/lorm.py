"""LoRM: the factors train in turns, and are merged so that the model answers as its clients do (arXiv 2410.17961).

With X_k the inputs that a layer has on client k's data, and A common to all, the merged B is the least-squares solution
of ``B A X_k = B_k A X_k`` for all k together; with B common the merged A is that of ``A X_k = A_k X_k``:

    B  =  B_0 + (sum_k (B_k - B_0) C_k) (sum_k C_k)^+,      C_k = A G_k A^T
    A  =  A_0 + (sum_k (A_k - A_0) G_k) (sum_k G_k)^+,      G_k = X_k X_k^T

It is not the mean of the weights, and ``verify`` says how far from it it is; where all clients have the same Gram
matrix the two are one. The price is the way up: beside the factor whose turn it is, half of C_k, r (r + 1) / 2 numbers
a layer, or half of G_k, d_in (d_in + 1) / 2. G_k holds the second moments of a layer's inputs: it tells far more of a
client's data than factors do, and of a client with few examples nearly these themselves.

Decided here:

- Turns are those of RoLoRA, lora_B first.
- G_k is taken after training, under the client's own model, over its examples as they are, all tokens counted. It
  travels as the mean over examples and counts with the client's weight, so that every rule of weights goes for it.
- The equations are written for the change since the broadcast, with the pseudo-inverse. Where the sum of the Gram
  matrices can be inverted that is the source's solution; where it cannot, what no client's inputs touch stays as it
  was.
- An update without a Gram matrix, as the server's own in the mean over tasks, has that of all others together.
- The source begins a new pair with each task and at the end takes the mean of the tasks' products; here one pair goes
  on, and ``task-average`` is the mean over tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedtalora_flwr.aggregation.factors import LoraFactors
from fedtalora_flwr.aggregation.methods.rolora import RoLoRA
from fedtalora_flwr.aggregation.types import ClientUpdate, GlobalState, example_weights, in_summation_order

_ROUNDING = 1e-6  # of the largest singular value: what float32 leaves of a zero


@dataclass(frozen=True)
class LoRM(RoLoRA):
    """Least squares over the clients' responses, in the factor whose turn it is."""

    sends_grams: bool = True

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Not in the weights: it is the responses that are merged."""
        return False

    def aggregate(self, state: GlobalState, updates: Sequence[ClientUpdate]) -> GlobalState:
        """Fold the updates into a new state (see the module's equation, and `FedTaLoRA.aggregate`)."""
        updates = in_summation_order(updates)
        weights = example_weights(updates)
        (factor,) = self.trains(state.version)
        merged: dict[str, LoraFactors] = {}
        for name, pair in state.adapters.items():
            before = getattr(pair, factor)
            changes = [getattr(update.adapters[name], factor).double() - before for update in updates]
            change = _merged(changes, [update.grams.get(name) for update in updates], weights)
            merged[name] = replace(pair, **{factor: (before + change).float()})
        return replace(super().aggregate(state, updates), adapters=merged)


def _merged(changes: Sequence[Tensor], grams: Sequence[Tensor | None], weights: Sequence[float]) -> Tensor:
    """Merge changes (n, m) by Gram matrices (m, m), in float64; without any of these it is their mean."""
    told = [(p, gram.double()) for p, gram in zip(weights, grams, strict=True) if gram is not None]
    size = changes[0].shape[1]
    shared = sum((p * gram for p, gram in told), torch.zeros(size, size, dtype=torch.float64))
    shared = shared / sum(p for p, _ in told) if told else torch.eye(size, dtype=torch.float64)
    total, response = torch.zeros_like(shared), torch.zeros_like(changes[0])
    for change, gram, p in zip(changes, grams, weights, strict=True):
        weighed = p * (shared if gram is None else gram.double())
        total += weighed
        response += change @ weighed
    inverse: Tensor = torch.linalg.pinv(total, rtol=_ROUNDING, hermitian=True)
    return response @ inverse


def create() -> LoRM:
    """Build the method."""
    return LoRM(residual="off")
