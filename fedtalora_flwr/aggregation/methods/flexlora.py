"""FlexLoRA: the mean of the products, decomposed and cut to each client's rank (arXiv 2402.11505).

    sum_k p_k s B_k A_k  =  U S V^T,   s B A = U_r S_r V_r^T

(B, A) is the best pair of its rank (Eckart and Young); what it leaves out is dropped. Its rows are ordered by strength,
so the first r_k of them are what a client of rank r_k is sent.

The paper forms the dense mean; here it is decomposed from the factors. What it leaves open and what is done here: each
singular value is shared out evenly over B and A; all clients scale by the same s, whatever their rank; rows that the
mean does not fill, as in a run's first round, keep the lora_A that was broadcast, for a pair of zeros never trains.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedtalora_flwr.aggregation.averaging import best_of_rank
from fedtalora_flwr.aggregation.class_rows import average_class_rows
from fedtalora_flwr.aggregation.factors import FACTORS
from fedtalora_flwr.aggregation.types import Aggregator, ClientUpdate, GlobalState, example_weights, in_summation_order


@dataclass(frozen=True)
class FlexLoRA(Aggregator):
    """Broadcast the truncated SVD of the mean of the products."""

    trainable: frozenset[str] = FACTORS
    exact: bool = False
    truncates: bool = True
    keeps_pair: bool = False  # an SVD turns the rows of a pair as it likes

    def aggregate(self, state: GlobalState, updates: Sequence[ClientUpdate]) -> GlobalState:
        """Fold the updates, of any ranks, into a new state (see the module's equation).

        Raises
        ------
        ValueError
            If there is no update, or the updates hold no example.
        """
        updates = in_summation_order(updates)
        weights = example_weights(updates)
        adapters = {
            name: best_of_rank([update.adapters[name] for update in updates], weights, like=broadcast)[0]
            for name, broadcast in state.adapters.items()
        }
        return GlobalState(adapters, head=average_class_rows(state.head, updates), version=state.version + 1)


def create() -> FlexLoRA:
    """Build the method; it has no settings."""
    return FlexLoRA()
