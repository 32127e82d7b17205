"""The algebra: pure tensors in, pure tensors out. Every file of `methods` is a method."""

from collections.abc import Mapping
from typing import Any

from fedtalora_flwr.aggregation.factors import FACTORS, LoraFactors, Step, kept_energy
from fedtalora_flwr.aggregation.intake import BadUpdate, check_update, far_off, outliers, update_norm
from fedtalora_flwr.aggregation.ranks import completed, first_rows, held, truncated
from fedtalora_flwr.aggregation.slots import (
    ClusteredState,
    Place,
    Slot,
    SlotAggregator,
    place_name,
    slots_exactness_error,
    with_shared,
)
from fedtalora_flwr.aggregation.types import Aggregator, ClientUpdate, GlobalState, Method
from fedtalora_flwr.aggregation.verify import exactness_error
from fedtalora_flwr.aggregation.weights import Weighing, capped, in_proportion
from fedtalora_flwr.config import registry

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
    "completed",
    "exactness_error",
    "far_off",
    "first_rows",
    "held",
    "in_proportion",
    "kept_energy",
    "outliers",
    "place_name",
    "resolve",
    "slots_exactness_error",
    "truncated",
    "update_norm",
    "with_shared",
]


def available() -> tuple[str, ...]:
    """List the methods there are."""
    return registry.available(registry.PACKAGES["method"])


def resolve(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """Build the method `name`, e.g. ``resolve("fedtalora", {"residual": "replace"})``.

    It is an `Aggregator` or a `SlotAggregator`.

    Raises
    ------
    ValueError
        If there is no such method, or a setting of it cannot be.
    """
    method: Method = registry.build(registry.PACKAGES["method"], name, settings or {})
    return method
