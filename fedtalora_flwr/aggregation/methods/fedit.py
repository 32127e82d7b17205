"""FedIT: plain FedAvg of the LoRA factors (arXiv 2305.05644).

The server broadcasts the means ``Bbar = sum_k p_k B_k`` and ``Abar = sum_k p_k A_k``. The product of means is not
the mean of products: what averaging loses, ``s * sum_k p_k (B_k - Bbar)(A_k - Abar)``, is dropped.
"""

from fedtalora_flwr.aggregation.methods.fedtalora import FedTaLoRA


def create() -> FedTaLoRA:
    """Build the method: Fed-TaLoRA without its residual."""
    return FedTaLoRA(residual="off")
