"""Methods: pure tensors in, pure tensors out. A file here with ``create`` is a method."""

from typing import Any

from fedtalora_flwr import registry
from fedtalora_flwr.aggregation.base import FACTORS, Aggregator, ClientUpdate, GlobalState, LoraFactors, Method
from fedtalora_flwr.aggregation.intake import BadUpdate, check_update, far_off, outliers, update_norm
from fedtalora_flwr.aggregation.slots import (
    ClusteredState,
    Place,
    Slot,
    SlotAggregator,
    place_name,
    slots_exactness_error,
)
from fedtalora_flwr.aggregation.step import Step, kept_energy
from fedtalora_flwr.aggregation.verify import exactness_error
from fedtalora_flwr.aggregation.weights import Weighing, capped

__all__ = [
    "FACTORS",
    "Aggregator",
    "BadUpdate",
    "ClientUpdate",
    "ClusteredState",
    "GlobalState",
    "LoraFactors",
    "Method",
    "Place",
    "Slot",
    "SlotAggregator",
    "Step",
    "Weighing",
    "available",
    "capped",
    "check_update",
    "exactness_error",
    "far_off",
    "kept_energy",
    "outliers",
    "place_name",
    "resolve",
    "slots_exactness_error",
    "update_norm",
]


def available() -> tuple[str, ...]:
    """List the methods there are."""
    return registry.available(__name__)


def resolve(name: str, **settings: Any) -> Method:
    """Build the method `name`, an `Aggregator` or `SlotAggregator`, e.g. ``resolve("fedtalora", residual="replace")``.

    Raises
    ------
    ValueError
        If there is no such method, or a setting of it cannot be.
    """
    method: Method = registry.build(__name__, name, settings)
    return method
