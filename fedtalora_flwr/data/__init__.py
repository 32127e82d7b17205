"""Data: sources by name, the stream of tasks over partitions, images as tensors."""

from collections.abc import Mapping
from typing import Any

from fedtalora_flwr.config import registry
from fedtalora_flwr.data.classes import MOST_CLASSES, ClassList, HeldClass, TooFewClasses, as_read
from fedtalora_flwr.data.images import load_images, stack_images, stored_side
from fedtalora_flwr.data.own import OwnData, OwnReader
from fedtalora_flwr.data.source import DataError, Source, Split, take, tidy
from fedtalora_flwr.data.stream import PARTITIONS, TASK_ORDERS, Share, TaskStream, build_stream

SOURCES = registry.PACKAGES["dataset"]

__all__ = [
    "MOST_CLASSES",
    "PARTITIONS",
    "SOURCES",
    "TASK_ORDERS",
    "ClassList",
    "DataError",
    "HeldClass",
    "OwnData",
    "OwnReader",
    "Share",
    "Source",
    "Split",
    "TaskStream",
    "TooFewClasses",
    "as_read",
    "build_stream",
    "load_images",
    "load_source",
    "open_data",
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
        Settings by snake_case name, e.g. ``config.settings``; ``test_fraction``, ``max_per_class``
        and ``seed`` are required, the rest as the source's ``create`` names them.

    Raises
    ------
    DataError
        If the data cannot be found, read or used.
    ValueError
        If there is no such source, or a setting is out of range.
    """
    found = open_data(dataset, settings)
    if isinstance(found, OwnReader):
        raise DataError(f"dataset {dataset}: the data are on the nodes, there is nothing to read here")
    return found


def open_data(dataset: str, settings: Mapping[str, Any]) -> Source | OwnReader:
    """Read a data set as `load_source` does, or give what reads a node's own where nodes bring theirs."""
    _refuse_paths_not_read(dataset, settings)
    found: Source | OwnReader = registry.build(SOURCES, dataset, settings)
    if isinstance(found, OwnReader):
        return found
    return tidy(
        found,
        test_fraction=settings["test_fraction"],
        max_per_class=settings["max_per_class"],
        max_test_per_class=settings.get("max_test_per_class", 0),
        seed=settings["seed"],
    )


def _refuse_paths_not_read(dataset: str, settings: Mapping[str, Any]) -> None:
    """Refuse a path beside a data set that has its own place: the run would be on other data than its user thinks."""
    for key in ("data_path", "test_path"):
        if settings.get(key) and key not in registry.parameters(SOURCES, dataset):
            readers = [name for name in registry.available(SOURCES) if key in registry.parameters(SOURCES, name)]
            raise DataError(
                f"dataset {dataset} reads no {key.replace('_', '-')}, got {settings[key]!r}; leave it out, or set "
                f"dataset to one that does: {', '.join(readers)}"
            )
