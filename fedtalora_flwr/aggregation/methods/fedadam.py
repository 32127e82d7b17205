"""FedAdam on the factors, with what their mean loses still carried exactly (arXiv 2003.00295, algorithm 2).

Fed-TaLoRA's aggregation gives the mean factors and the residual. The server then takes what the mean changed for a
gradient, and moves each factor x by Adam instead of all the way:

    D = xbar - x,   m <- b1 m + (1 - b1) D,   v <- b2 v + (1 - b2) D^2,   x <- x + eta m / (sqrt(v) + tau)

m and v are the method's own state (`GlobalState.extra`): they never travel, and are in every checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedtalora_flwr.aggregation.factors import FACTORS, LoraFactors
from fedtalora_flwr.aggregation.methods.fedtalora import FedTaLoRA
from fedtalora_flwr.aggregation.types import ClientUpdate, GlobalState

_B1, _B2, _TAU = 0.9, 0.99, 1e-3  # as in the paper's experiments


@dataclass(frozen=True)
class FedAdam(FedTaLoRA):
    """Fed-TaLoRA whose factors move by Adam.

    Parameters
    ----------
    server_learning_rate
        eta, above 0.
    """

    server_learning_rate: float = 0.01

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Not: the model is where Adam takes it, and not the mean of the clients' models."""
        return False

    def aggregate(self, state: GlobalState, updates: Sequence[ClientUpdate]) -> GlobalState:
        """Fold the updates into a new state (see the module's equation, and `FedTaLoRA.aggregate`)."""
        mean = super().aggregate(state, updates)
        adapters: dict[str, LoraFactors] = {}
        extra: dict[str, Tensor] = {}
        for name, pair in state.adapters.items():
            moved: dict[str, Tensor] = {}
            for factor in sorted(FACTORS):
                key, start = f"{factor}/{name}", getattr(pair, factor)
                zero = torch.zeros_like(start)
                change = getattr(mean.adapters[name], factor) - start
                first = _B1 * state.extra.get(f"m/{key}", zero) + (1 - _B1) * change
                second = _B2 * state.extra.get(f"v/{key}", zero) + (1 - _B2) * change.square()
                extra |= {f"m/{key}": first, f"v/{key}": second}
                moved[factor] = self._moved(start, first, second)
            adapters[name] = LoraFactors(moved["lora_A"], moved["lora_B"], pair.scaling)
        return replace(mean, adapters=adapters, extra=extra)

    def _moved(self, start: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return start + self.server_learning_rate * first / (second.sqrt() + _TAU)


def create(*, server_learning_rate: float = 0.01) -> FedAdam:
    """Build the method from the setting ``server-learning-rate``."""
    return FedAdam(server_learning_rate=server_learning_rate)
