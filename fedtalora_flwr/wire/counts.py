"""Classes by their row and the examples of each, as lists of whole numbers."""

from collections.abc import Mapping

import torch
from torch import Tensor

COUNTS = frozenset({"counts/class", "counts/examples"})
MOST_EXAMPLES = torch.iinfo(torch.int32).max  # that a client can count; sums over clients then stay within int64


def pack_counts(class_counts: Tensor) -> dict[str, Tensor]:
    """Give the classes held, and the examples of each, from the examples of all classes, (C,)."""
    held = class_counts.nonzero().flatten()
    return {"counts/class": held.int(), "counts/examples": class_counts[held].int()}


def read_counts(counted: Mapping[str, Tensor], num_classes: int) -> Tensor:
    """Read the examples of each class held, (C,) int64."""
    held, examples = class_numbers(counted["class"], num_classes), whole_numbers(counted["examples"])
    if examples.shape != held.shape:
        raise ValueError(f"{len(held)} classes have examples of shape {tuple(examples.shape)}")
    return torch.zeros(num_classes, dtype=torch.int64).index_copy_(0, held, examples)


def class_numbers(sent: Tensor, num_classes: int) -> Tensor:
    """Check a list of classes: rising, each in [0, num_classes)."""
    classes = whole_numbers(sent)
    if len(classes) and (classes[0] < 0 or classes[-1] >= num_classes or (classes.diff() <= 0).any()):
        raise ValueError(f"classes must rise within 0-{num_classes - 1}")
    return classes


def whole_numbers(sent: Tensor) -> Tensor:
    """Check a list of whole numbers, (n,), and give it as int64."""
    if sent.dtype not in (torch.int32, torch.int64) or sent.dim() != 1:
        raise ValueError(f"a list of whole numbers was expected, got {sent.dtype} {tuple(sent.shape)}")
    return sent.long()
