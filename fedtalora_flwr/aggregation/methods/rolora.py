"""RoLoRA: lora_B and lora_A are trained and averaged in turns (arXiv 2409.02346; 2502.01755).

In one round all clients share A and train B, in the next they share B and train A. Either way the mean of the products
is the product of the means,

    sum_k p_k s B_k A  =  s Bbar A,        sum_k p_k s B A_k  =  s B Abar

so averaging is exact, leaves no residual, and both factors learn. Up goes the factor that was trained, and it alone.

Decided here. B goes first: it starts at zero, where A has no gradient. The turn is one round, as in the paper, and is
counted in aggregations over the whole run, across tasks. Down go both factors: the paper's server sends the one that
was averaged last, which does for clients that take part in every round and keep the other; ours keep nothing.
"""

from dataclasses import dataclass

from fedtalora_flwr.aggregation.methods.fedtalora import FedTaLoRA


@dataclass(frozen=True)
class RoLoRA(FedTaLoRA):
    """Plain averages of the factor whose turn it is."""

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Exact, for the mean is linear in the one factor that is trained."""
        return True

    def trains(self, version: int) -> frozenset[str]:
        """Give lora_B from an even version, lora_A from an odd one."""
        return frozenset({"lora_A" if version % 2 else "lora_B"})


def create() -> RoLoRA:
    """Build the method."""
    return RoLoRA(residual="off")
