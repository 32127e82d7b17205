"""What every head shares: the trained class rows, their logits, and sums over features.

Shape names: C classes, d features, N examples.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class FeatureSums:
    """Sums over examples that determine the ridge solution; those of several clients add up.

    A feature vector f carries a trailing 1, so that the last row and column belong to the bias.

    Parameters
    ----------
    gram
        sum f f^T, (d + 1, d + 1) float64.
    moment
        sum onehot(y) f^T, (C, d + 1) float64.
    """

    gram: Tensor  # (d + 1, d + 1)
    moment: Tensor  # (C, d + 1)

    @classmethod
    def zero(cls, *, num_classes: int, feature_dim: int) -> "FeatureSums":
        """Give the sums over no example."""
        size = feature_dim + 1
        return cls(torch.zeros(size, size, dtype=torch.float64), torch.zeros(num_classes, size, dtype=torch.float64))

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, *, num_classes: int) -> "FeatureSums":
        """Sum over a batch.

        Parameters
        ----------
        features
            (N, d).
        labels
            (N,) int64 in [0, C).
        num_classes
            C.
        """
        f = F.pad(features.double(), (0, 1), value=1.0)  # (N, d + 1)
        moment = f.new_zeros(num_classes, f.shape[1]).index_add_(0, labels, f)
        return cls(f.T @ f, moment)

    def with_classes(self, num_classes: int) -> "FeatureSums":
        """Give the sums with room for more classes, of which no example has been seen."""
        return FeatureSums(self.gram, _with_zero_rows(self.moment, num_classes))

    def possible(self, *, tolerance: float = 1e-6) -> bool:
        """Tell whether examples with such sums can exist: Cauchy-Schwarz holds, and the moment adds up."""
        largest = self.gram.diagonal().clamp(min=0).sqrt() * (1 + tolerance)
        bounded = (self.gram.abs() <= torch.outer(largest, largest)).all()
        gap = (self.moment.sum(0) - self.gram[-1]).abs()
        return bool(bounded and (gap <= tolerance * largest * largest[-1]).all())

    def feature_norm(self) -> float:
        """Give the root of the mean square norm of the summed features, their trailing 1 included."""
        return float((self.gram.trace() / self.gram[-1, -1]).sqrt())

    def __add__(self, other: "FeatureSums") -> "FeatureSums":
        return FeatureSums(self.gram + other.gram, self.moment + other.moment)


def unlifted(features: Tensor) -> Tensor:
    """Give the features (N, d) as they are."""
    return features


@dataclass(frozen=True)
class Classifier:
    """What turns features into logits.

    Parameters
    ----------
    rows
        ``weight`` (C, m) and ``bias`` (C,).
    lift
        Features (N, d) -> the (N, m) that the rows act on.
    """

    rows: Mapping[str, Tensor]
    lift: Callable[[Tensor], Tensor] = unlifted

    def logits(self, features: Tensor, classes: Tensor) -> Tensor:
        """Score features (N, d) against the rows of `classes` (n,) only: (N, n)."""
        return logits(self.rows, self.lift(features), classes)

    def to(self, device: torch.device) -> "Classifier":
        """Move the rows."""
        return Classifier({name: value.to(device) for name, value in self.rows.items()}, self.lift)


class Head(ABC):
    """How a classifier comes from what clients train and sum.

    Attributes
    ----------
    collects_sums
        Whether one more exchange after a task's last round collects every client's `FeatureSums`.
    """

    collects_sums: bool

    @abstractmethod
    def classifier(self, trained: Mapping[str, Tensor], sums: FeatureSums) -> Classifier:
        """Give the classifier for inference, float32."""

    def lift(self, features: Tensor) -> Tensor:
        """Turn features (N, d) into those that are summed, (N, m)."""
        return features

    def projection(self, feature_dim: int) -> Tensor | None:
        """Give P (d, m) where `lift` is ``relu(features @ P)``, so that it can be written down; None: no lift."""
        return None

    def probabilities(self, logits: Tensor) -> Tensor:
        """Turn logits (N, n) over the classes seen so far into probabilities."""
        return logits.softmax(dim=1)

    def lifted_dim(self, feature_dim: int) -> int:
        """Give m for features of size d."""
        return feature_dim


def init_rows(*, num_classes: int, feature_dim: int) -> dict[str, Tensor]:
    """Give the class rows that clients train, all zero: no class is preferred before it has been seen."""
    return {"weight": torch.zeros(num_classes, feature_dim), "bias": torch.zeros(num_classes)}


def with_classes(rows: Mapping[str, Tensor], num_classes: int) -> dict[str, Tensor]:
    """Give class rows with the start of `init_rows` for classes that are new; the others stay as they are."""
    return {name: _with_zero_rows(value, num_classes) for name, value in rows.items()}


def trained_classes(rows: Mapping[str, Tensor]) -> list[int]:
    """List the classes whose row is no longer as `init_rows` made it."""
    moved = [value.flatten(1).any(1) if value.dim() > 1 else value != 0 for value in rows.values()]
    return torch.stack(moved).any(0).nonzero().flatten().tolist()


def _with_zero_rows(value: Tensor, num_rows: int) -> Tensor:
    return torch.cat([value, value.new_zeros(num_rows - len(value), *value.shape[1:])])


def logits(rows: Mapping[str, Tensor], features: Tensor, classes: Tensor) -> Tensor:
    """Score features (N, d) against the rows of `classes` (n,) only: (N, n)."""
    return F.linear(features, rows["weight"][classes], rows["bias"][classes])
