"""FedSVD: clients train lora_B alone, and the server rewrites the mean product by its SVD (arXiv 2505.12805).

With one A for all, averaging B is exact, as in FFA-LoRA. The server then sets

    Bbar A  =  U S V^T,        A <- V^T,   B <- U S

which leaves the model as it is. The rows of A are orthonormal, so a step on B is no longer or shorter than what it does
to the weight, and they are the directions in which the clients' mean moves the layer, the strongest first. As A has
changed, both factors go down; up goes B.

The rows of V^T are combinations of the rows of A: the space that they span is that of the first A, for good, as in
FFA-LoRA. What changes is the basis in which B is trained, which SGD does not feel; Adam, which scales each number by
itself, does.

Decided here. The SVD is taken after every round (the source has a period and a warm-up for it). The first A is made
orthonormal too: B is zero then, and its SVD says nothing more. Where the product has less than full rank, the other
rows of A stay an orthonormal basis of the rest, so that no direction is lost.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fedtalora_flwr.aggregation.factors import FACTORS, LoraFactors, core_svd
from fedtalora_flwr.aggregation.methods.fedtalora import FedTaLoRA
from fedtalora_flwr.aggregation.types import ClientUpdate, GlobalState


@dataclass(frozen=True)
class FedSVD(FedTaLoRA):
    """Plain averages of lora_B, in a basis that the server chooses anew in each round."""

    keeps_pair: bool = False

    @property
    def changing(self) -> frozenset[str]:
        """Both factors: clients train the one, the server rewrites the other."""
        return FACTORS

    def start(self, state: GlobalState, weights: Mapping[str, Tensor]) -> GlobalState:
        """Begin with orthonormal rows of lora_A."""
        return _rewritten(state)

    def aggregate(self, state: GlobalState, updates: Sequence[ClientUpdate]) -> GlobalState:
        """Average lora_B, and rewrite the pair (see the module's equation, and `FedTaLoRA.aggregate`)."""
        return _rewritten(super().aggregate(state, updates))


def _rewritten(state: GlobalState) -> GlobalState:
    return replace(state, adapters={name: _by_svd(pair) for name, pair in state.adapters.items()})


def _by_svd(pair: LoraFactors) -> LoraFactors:
    q_left, u, singular, vh, q_right = core_svd(pair.lora_B.double(), pair.lora_A.double())
    lora_A, lora_B = vh @ q_right, (q_left @ u) * singular  # (rank, d_in), (d_out, rank)
    return LoraFactors(lora_A.float(), lora_B.float(), pair.scaling)


def create() -> FedSVD:
    """Build the method."""
    return FedSVD(residual="off", trainable=frozenset({"lora_B"}))
