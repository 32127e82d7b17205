"""Full fine-tuning with FedAvg: the adapted Linear weights themselves are trained and averaged (arXiv 1602.05629).

A full update is a pair of rank d_in whose lora_A is the identity and whose scaling is 1: then ``W = W_0 + lora_B``, a
step on lora_B is that step on W, and ``sum_k p_k B_k`` is FedAvg of the weights, exactly. The identity never travels.

What LoRA does not adapt stays frozen here too (biases, norms, embeddings), so that methods differ in the rank alone;
``lora-blocks`` and ``lora-targets`` say which layers, ``rank`` and ``alpha`` say nothing.
"""

from dataclasses import dataclass

from fedtalora_flwr.aggregation.methods.fedtalora import FedTaLoRA


@dataclass(frozen=True)
class FullFineTuning(FedTaLoRA):
    """Plain averages of dense updates."""

    dense: bool = True


def create() -> FullFineTuning:
    """Build the method."""
    return FullFineTuning(residual="off", trainable=frozenset({"lora_B"}))
