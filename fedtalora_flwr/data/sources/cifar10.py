"""CIFAR-10: 32x32 images of 10 classes, from the data root or else the hub.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from fedtalora_flwr.data.hf_known import known_source
from fedtalora_flwr.data.source import Source


def create(*, data_root: str) -> Source:
    """Read it from ``<data-root>/cifar10`` or as ``uoft-cs/cifar10``, as `known_source` does."""
    return known_source("cifar10", hub="uoft-cs/cifar10", data_root=data_root)
