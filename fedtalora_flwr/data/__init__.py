"""Data: sources by name, the stream of tasks over partitions, images as tensors."""

from collections.abc import Mapping
from typing import Any

from fedtalora_flwr import registry
from fedtalora_flwr.data.images import load_images, stack_images, stored_side
from fedtalora_flwr.data.source import DataError, Source, Split, take, tidy
from fedtalora_flwr.data.stream import PARTITIONS, TASK_ORDERS, TaskStream, build_stream

SOURCES = "fedtalora_flwr.data.sources"

__all__ = [
    "PARTITIONS",
    "SOURCES",
    "TASK_ORDERS",
    "DataError",
    "Source",
    "Split",
    "TaskStream",
    "build_stream",
    "load_images",
    "load_source",
    "stack_images",
    "stored_side",
    "take",
]


def load_source(dataset: str, settings: Mapping[str, Any]) -> Source:
    """Read a data set and `tidy` it.

    Parameters
    ----------
    dataset
        Name of a file in `sources`, with an argument after a colon where it takes one (``hub:owner/name``).
    settings
        Settings by snake_case name, e.g. ``dataclasses.asdict(config)``; ``test_fraction``, ``max_per_class``
        and ``seed`` are required, the rest as the source's ``create`` names them.

    Raises
    ------
    DataError
        If the data cannot be found, read or used.
    ValueError
        If there is no such source, or a setting is out of range.
    """
    source: Source = registry.build(SOURCES, dataset, settings)
    return tidy(
        source,
        test_fraction=settings["test_fraction"],
        max_per_class=settings["max_per_class"],
        seed=settings["seed"],
    )
