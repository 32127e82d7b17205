"""Metrics of a stream of tasks: pure functions of a matrix of counts. A file here with ``create`` is one more."""

from typing import Any

from fedtalora_flwr.config import registry
from fedtalora_flwr.metrics.matrix import TaskMatrix

__all__ = ["TaskMatrix", "available", "measured"]


def available() -> tuple[str, ...]:
    """List the metrics beside those of `TaskMatrix.summary`."""
    return registry.available(__name__)


def measured(matrix: TaskMatrix) -> dict[str, Any]:
    """Give every metric of a matrix by its key in ``metrics.json``."""
    more = {name.replace("-", "_"): registry.build(__name__, name, {})(matrix) for name in available()}
    return {**matrix.summary(), **more}
