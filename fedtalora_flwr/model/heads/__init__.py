"""Heads: from features to logits over the classes seen so far. A file here with ``create`` is a head."""

from collections.abc import Mapping
from typing import Any

from fedtalora_flwr.config import registry
from fedtalora_flwr.model.heads.base import (
    Classifier,
    FeatureRoot,
    FeatureSums,
    Head,
    added_up,
    init_rows,
    logits,
    rows_at_means,
    trained_classes,
    with_classes,
)

__all__ = [
    "Classifier",
    "FeatureRoot",
    "FeatureSums",
    "Head",
    "added_up",
    "init_rows",
    "logits",
    "resolve",
    "rows_at_means",
    "trained_classes",
    "with_classes",
]


def resolve(name: str, settings: Mapping[str, Any]) -> Head:
    """Build the head `name` with the settings it takes.

    Raises
    ------
    ValueError
        If there is no such head.
    """
    head: Head = registry.build(__name__, name, settings)
    return head
