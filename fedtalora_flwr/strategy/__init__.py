"""Exact LoRA aggregation for anybody's Flower app around a PEFT model: `FedTaLoRA` in the place of ``FedAvg``."""

from fedtalora_flwr.strategy.fedtalora import FedTaLoRA
from fedtalora_flwr.strategy.model import NotExact, get_arrays, set_arrays

__all__ = ["FedTaLoRA", "NotExact", "get_arrays", "set_arrays"]
