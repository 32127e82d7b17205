"""Metrics of a stream of tasks: pure functions of a matrix of counts."""

from fedtalora_flwr.metrics.matrix import TaskMatrix

__all__ = ["TaskMatrix"]
