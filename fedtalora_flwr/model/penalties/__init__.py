"""What local training adds to the cross-entropy against forgetting. A file here with ``create`` is a penalty."""

from collections.abc import Mapping
from typing import Any

from fedtalora_flwr.config import registry
from fedtalora_flwr.model.penalties.base import Memory, Penalty, Start

__all__ = ["Memory", "Penalty", "Start", "available", "resolve"]


def available() -> tuple[str, ...]:
    """List the penalties there are."""
    return registry.available(__name__)


def resolve(name: str, settings: Mapping[str, Any]) -> Penalty:
    """Build the penalty `name` from the settings that its ``create`` names.

    Raises
    ------
    ValueError
        If there is no such penalty, or a setting of it cannot be.
    """
    penalty: Penalty = registry.build(__name__, name, settings)
    return penalty
