"""Pairs of factors to and from the parts of a record: those that train, and those that stay as they started."""

import hashlib
from collections.abc import Mapping

from torch import Tensor

from fedtalora_flwr.aggregation import FACTORS, LoraFactors


def pack_factors(adapters: Mapping[str, LoraFactors], factors: frozenset[str] = FACTORS) -> dict[str, Tensor]:
    """Give the factors of all pairs by key, ``<factor>/<module>``."""
    return {f"{factor}/{name}": getattr(pair, factor) for name, pair in adapters.items() for factor in sorted(factors)}


def read_factors(parts: Mapping[str, Mapping[str, Tensor]], *, scaling: float) -> dict[str, LoraFactors]:
    """Give the pairs that the parts of a record hold.

    Raises
    ------
    ValueError
        If a module has only one of the factors.
    """
    lora_A, lora_B = parts.get("lora_A", {}), parts.get("lora_B", {})
    if lora_A.keys() != lora_B.keys():
        raise ValueError("lora_A and lora_B are for different modules")
    return {name: LoraFactors(lora_A[name], lora_B[name], scaling) for name in lora_A}


def frozen_factors(adapters: Mapping[str, LoraFactors], trainable: frozenset[str]) -> dict[str, dict[str, Tensor]]:
    """Give the factors that no client sends, as parts of a record."""
    return {factor: {name: getattr(pair, factor) for name, pair in adapters.items()} for factor in FACTORS - trainable}


def frozen_digest(adapters: Mapping[str, LoraFactors], trainable: frozenset[str]) -> str:
    """Name the factors that never change by their SHA-256; empty where all change."""
    frozen = pack_factors(adapters, FACTORS - trainable)
    digest = hashlib.sha256()
    for key in sorted(frozen):
        digest.update(key.encode() + frozen[key].contiguous().numpy().tobytes())
    return digest.hexdigest() if frozen else ""
