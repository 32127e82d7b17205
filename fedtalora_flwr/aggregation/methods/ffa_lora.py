"""FFA-LoRA: lora_A stays frozen where it started, lora_B alone is trained and averaged (arXiv 2403.12313).

With one A for all, the mean of products is the product of means, ``sum_k p_k s B_k A = s Bbar A``: averaging is exact
and leaves no residual. The price is that A never learns.
"""

from fedtalora_flwr.aggregation.methods.fedtalora import FedTaLoRA


def create() -> FedTaLoRA:
    """Build the method: plain averages of the one factor that clients train."""
    return FedTaLoRA(residual="off", trainable=frozenset({"lora_B"}))
