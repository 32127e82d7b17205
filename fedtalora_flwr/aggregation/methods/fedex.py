"""FedEx-LoRA: plain averages, and what they lose added to the frozen weight (arXiv 2410.09432).

    W_0 <- W_0 + s * (sum_k p_k B_k A_k - Bbar Abar)

Added up over the rounds this is Fed-TaLoRA's residual R_t, so the weights are the same, bit for bit. What differs is
the way down: FedEx-LoRA sends the correction dense, d_out d_in numbers a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedtalora_flwr.aggregation.methods.fedtalora import FedTaLoRA
from fedtalora_flwr.aggregation.types import ClientUpdate, GlobalState


@dataclass(frozen=True)
class FedEx(FedTaLoRA):
    """Fed-TaLoRA whose residual travels dense."""

    def aggregate(self, state: GlobalState, updates: Sequence[ClientUpdate]) -> GlobalState:
        """Fold the updates into a new state, and leave out the factors of the step (see `FedTaLoRA.aggregate`)."""
        return replace(super().aggregate(state, updates), step={})


def create() -> FedEx:
    """Build the method."""
    return FedEx()
