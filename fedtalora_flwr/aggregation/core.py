"""A square core between two fixed factors of a layer, ``W = W_0 + s B_0 R A_0``, with R of rank x rank numbers.

The pair of such a layer is the core alone, in the coordinates that the fixed factors give: lora_A is the identity,
lora_B is R. All that methods and checks do with pairs they do with the core; with orthonormal columns of B_0 and rows
of A_0 a norm of the core is the norm of what it adds to the weight.

B_0 and A_0 belong to the base, as W_0 does. They stand in the mapping of the residual, under keys of their own, so that
a base with other fixed factors has another name, and a client is sent them once.
"""

from collections.abc import Mapping

from torch import Tensor

from fedtalora_flwr.aggregation.factors import LoraFactors


def outer_keys(name: str) -> tuple[str, str]:
    """Give the keys of a layer's fixed factors, A_0 (rank, d_in) and B_0 (d_out, rank)."""
    return f"outer_A/{name}", f"outer_B/{name}"


def on_layer(name: str, pair: LoraFactors, base: Mapping[str, Tensor]) -> LoraFactors:
    """Give what a pair adds to its layer as a pair of the layer's sizes: a core goes between its fixed factors."""
    key_A, key_B = outer_keys(name)
    if key_A not in base:
        return pair
    return LoraFactors(pair.lora_A @ base[key_A], base[key_B] @ pair.lora_B, pair.scaling)
