"""FLoRA: stack the clients' pairs, merge the stack into the base, and begin with a new pair (arXiv 2409.05976).

Stacked side by side, the pairs multiply to the mean of their products, whatever their ranks:

    [p_1 s_1 B_1, ..., p_K s_K B_K] [A_1; ...; A_K]  =  sum_k p_k s_k B_k A_k

All of it goes into the residual, and the next round starts from a pair that adds nothing: lora_A drawn anew, lora_B
zero. Averaging is exact; what is lost is the warm start of the pair. The stack, of inner size sum_k r_k, is what
travels where it holds fewer numbers than the dense matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedtalora_flwr.aggregation.averaging import stacked
from fedtalora_flwr.aggregation.class_rows import average_class_rows
from fedtalora_flwr.aggregation.factors import FACTORS, LoraFactors, on_grid, pays
from fedtalora_flwr.aggregation.types import Aggregator, ClientUpdate, GlobalState, example_weights, in_summation_order


@dataclass(frozen=True)
class FLoRA(Aggregator):
    """Merge the mean of the products into the residual and draw the pair anew.

    Parameters
    ----------
    seed
        Of the new pairs; the state's version joins it, so that every round has its own.
    """

    seed: int = 0
    trainable: frozenset[str] = FACTORS
    exact: bool = True
    truncates: bool = True  # of a pair that adds nothing yet, nothing is left out
    keeps_pair: bool = False

    def aggregate(self, state: GlobalState, updates: Sequence[ClientUpdate]) -> GlobalState:
        """Fold the updates, of any ranks, into a new state (see the module's equation).

        Raises
        ------
        ValueError
            If there is no update, or the updates hold no example.
        """
        updates = in_summation_order(updates)
        weights = example_weights(updates)
        version = state.version + 1
        generator = torch.Generator()
        generator.manual_seed(int(np.random.default_rng([self.seed, version]).integers(2**63)))
        adapters, residual, steps = {}, {}, {}
        for name, pair in state.adapters.items():
            stack = on_grid(*stacked([update.adapters[name] for update in updates], weights))
            residual[name] = stack.added_to(state.residual.get(name))
            if pays(stack.left.shape[1], stack.shape):
                steps[name] = stack
            d_out, d_in = stack.shape
            adapters[name] = LoraFactors.initial(
                rank=pair.rank, d_in=d_in, d_out=d_out, scaling=pair.scaling, generator=generator
            )
        head = average_class_rows(state.head, updates)
        return GlobalState(adapters=adapters, residual=residual, head=head, version=version, step=steps)


def create(*, seed: int = 0) -> FLoRA:
    """Build the method from the setting ``seed``."""
    return FLoRA(seed=seed)
