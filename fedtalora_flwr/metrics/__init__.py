"""Metrics of a run, made of counts: a stream's matrix of hits, and what was said of each class.

A file here with ``create`` is one more pure function of the matrix.
"""

from typing import Any

from fedtalora_flwr.config import registry
from fedtalora_flwr.metrics.judged import Judged
from fedtalora_flwr.metrics.matrix import TaskMatrix

__all__ = ["Judged", "TaskMatrix", "available", "measured"]


def available() -> tuple[str, ...]:
    """List the metrics beside those of `TaskMatrix.summary`."""
    return registry.available(__name__)


def measured(matrix: TaskMatrix) -> dict[str, Any]:
    """Give every metric of a matrix by its key in ``metrics.json``."""
    more = {name.replace("-", "_"): registry.build(__name__, name, {})(matrix) for name in available()}
    return {**matrix.summary(), **more}
