"""HetLoRA: pairs padded with zeros to the largest rank, and averaged by how much each says (arXiv 2401.06432).

    w_k  =  n_k ||s B_k A_k|| / sum_j n_j ||s B_j A_j||,   B = sum_k w_k [B_k, 0],   A = sum_k w_k [A_k; 0]

for each layer, by the Frobenius norm of the client's product: one whose rank is more than its data need says little by
it. A client of rank r_k is sent the first r_k rows.

What differs from the paper, which weighs by the norms alone: examples count too, as in every method here;
``aggregation-weights = equal`` leaves them out. Where nobody has learned anything yet they are all that counts. Rank
self-pruning is left out: it needs a term in the local loss that presses a client's last rows to nothing, and a rank
that changes with the client, which keeps no state here; its rank is the one that was agreed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fedtalora_flwr.aggregation.class_rows import average_class_rows
from fedtalora_flwr.aggregation.factors import FACTORS, LoraFactors, Step
from fedtalora_flwr.aggregation.types import Aggregator, ClientUpdate, GlobalState, example_weights, in_summation_order


@dataclass(frozen=True)
class HetLoRA(Aggregator):
    """Average zero-padded factors by the norms of the products."""

    trainable: frozenset[str] = FACTORS
    exact: bool = False
    truncates: bool = True

    def aggregate(self, state: GlobalState, updates: Sequence[ClientUpdate]) -> GlobalState:
        """Fold the updates, of any ranks up to the state's, into a new state (see the module's equation).

        Raises
        ------
        ValueError
            If there is no update, or the updates hold no example.
        """
        updates = in_summation_order(updates)
        examples = example_weights(updates)
        adapters = {
            name: _padded_mean([update.adapters[name] for update in updates], examples, like=broadcast)
            for name, broadcast in state.adapters.items()
        }
        return GlobalState(adapters, head=average_class_rows(state.head, updates), version=state.version + 1)


def sparsity_weights(factors: Sequence[LoraFactors], examples: Sequence[float]) -> list[float]:
    """Give w_k from the pairs of one layer and p_k, in their order; p_k where all products are zero."""
    norms = [max(0.0, Step(pair.scaling * pair.lora_B.double(), pair.lora_A).energy()) ** 0.5 for pair in factors]
    said = [p_k * norm for p_k, norm in zip(examples, norms, strict=True)]
    total = sum(said)
    return [one / total for one in said] if total > 0 else list(examples)


def _padded_mean(factors: Sequence[LoraFactors], examples: Sequence[float], *, like: LoraFactors) -> LoraFactors:
    lora_A = torch.zeros_like(like.lora_A, dtype=torch.float64)
    lora_B = torch.zeros_like(like.lora_B, dtype=torch.float64)
    for weight, pair in zip(sparsity_weights(factors, examples), factors, strict=True):
        missing = like.rank - pair.rank
        lora_A += weight * F.pad(pair.lora_A.double(), (0, 0, 0, missing))
        lora_B += weight * pair.scaling / like.scaling * F.pad(pair.lora_B.double(), (0, missing))
    return LoraFactors(lora_A.float(), lora_B.float(), like.scaling)


def create() -> HetLoRA:
    """Build the method; it has no settings."""
    return HetLoRA()
