"""LoRA-FAIR: plain means, and lora_B corrected towards the mean of the products (arXiv 2411.14961).

With the means Bbar, Abar of the factors, and L what their product loses against the mean of the products,

    L  =  sum_k p_k (B_k - Bbar)(A_k - Abar),
    D  =  argmin ||L - D Abar||^2 + mu ||D||^2  =  L Abar^T (Abar Abar^T + mu I)^-1,

the server broadcasts ``(Bbar + D, Abar)``: the next round starts from the corrected pair, and nothing else travels.
What no lora_B can make up for, the part of L beyond the rows of Abar, is dropped.

The paper finds D by gradient steps on the server; here both terms are squared norms, which has a closed form, ridge
regression. mu is relative to the mean eigenvalue of Abar Abar^T, so that it is as strong for a pair of any scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtalora_flwr.aggregation.averaging import average_factors
from fedtalora_flwr.aggregation.class_rows import average_class_rows
from fedtalora_flwr.aggregation.factors import FACTORS, LoraFactors, Step
from fedtalora_flwr.aggregation.types import Aggregator, ClientUpdate, GlobalState, example_weights, in_summation_order

_PENALTY = 0.01  # mu, relative


@dataclass(frozen=True)
class LoraFair(Aggregator):
    """Average the factors and correct lora_B by ridge regression."""

    trainable: frozenset[str] = FACTORS
    exact: bool = False

    def aggregate(self, state: GlobalState, updates: Sequence[ClientUpdate]) -> GlobalState:
        """Fold the updates into a new state (see the module's equation).

        Raises
        ------
        ValueError
            If there is no update, or the updates hold no example.
        """
        updates = in_summation_order(updates)
        weights = example_weights(updates)
        adapters = {
            name: corrected(*average_factors([update.adapters[name] for update in updates], weights, like=broadcast))
            for name, broadcast in state.adapters.items()
        }
        return GlobalState(adapters, head=average_class_rows(state.head, updates), version=state.version + 1)


def corrected(mean: LoraFactors, lost: Step | Tensor) -> LoraFactors:
    """Correct the lora_B of a mean pair by D, where averaging lost ``scaling * L``."""
    lora_A = mean.lora_A.double()  # (rank, d_in)
    seen = _times(lost, lora_A.T)  # (d_out, rank)
    gram = lora_A @ lora_A.T
    mu = (_PENALTY * gram.diagonal().mean()).clamp(min=torch.finfo(gram.dtype).tiny)
    correction = torch.linalg.solve(gram + mu * torch.eye(len(gram), dtype=gram.dtype), seen.T / mean.scaling).T
    return LoraFactors(mean.lora_A, (mean.lora_B.double() + correction).float(), mean.scaling)


def _times(lost: Step | Tensor, columns: Tensor) -> Tensor:
    if isinstance(lost, Step):
        return lost.left.double() @ (lost.right.double() @ columns)
    return lost.double() @ columns


def create() -> LoraFair:
    """Build the method; it has no settings."""
    return LoraFair()
