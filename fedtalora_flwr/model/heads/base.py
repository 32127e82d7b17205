"""What every head shares: the trained class rows, their logits, and sums over features.

Shape names: C classes, d features, N examples.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor

from fedtalora_flwr.aggregation.class_rows import moved_rows

_DENSE = 2048  # up to which all eigenvalues are found
_MARGIN = 6.0  # see `rows_at_means`
_DRIFT_LAMBDA = 0.1  # relative to the mean square of a feature; see docs/BENCHMARK.md


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
        """Tell whether examples with such sums can exist.

        They can if ``[[G, M^T], [M, diag(n)]]`` is positive semi-definite, n_c the examples of class c, which M holds
        under the constant: no class has more in G than G has, ``G - sum_c M_c^T M_c / n_c >= 0``, and a class without
        an example has no row. And the rows add up to G's own.
        """
        if not torch.isfinite(self.gram).all():
            return False
        largest = self.gram.diagonal().clamp(min=0).sqrt() * (1 + tolerance)
        gap = (self.moment.sum(0) - self.gram[-1]).abs()
        if not (gap <= tolerance * largest * largest[-1]).all():
            return False
        counts = self.moment[:, -1]
        if (counts < 0).any() or self.moment[counts == 0].any():
            return False
        rows = self.moment[counts > 0] / counts[counts > 0].sqrt()[:, None]
        return _smallest_eigenvalue(self.gram, less=rows) >= -tolerance * float(self.gram.trace())

    def times(self, factor: float) -> "FeatureSums":
        """Let every example count so many times."""
        return self if factor == 1 else FeatureSums(factor * self.gram, factor * self.moment)

    def feature_norm(self) -> float:
        """Give the root of the mean square norm of the summed features, their trailing 1 included."""
        return float((self.gram.trace() / self.gram[-1, -1]).sqrt())

    def followed(self, drift: Tensor, *, shrinkage: float = _DRIFT_LAMBDA) -> "FeatureSums":
        """Carry the sums over to features that have moved since.

        With features f of newer examples and f' of the same examples before, a trailing 1 in either, the linear map
        from old to new that fits them best, drawn to the identity where they say little, is

            T = I + (sum (f - f') f'^T) (sum f' f'^T + lambda I)^-1,

        and the old examples' sums become ``T G T^T`` and ``M T^T``: what they would be if theirs had moved alike. Where
        the move is linear and the newer examples span the features, that is exact as lambda goes to 0.

        Parameters
        ----------
        drift
            sum z z^T over the newer examples, z = (f', f, 1): (2 d + 1, 2 d + 1) float64.
        shrinkage
            lambda, relative to the mean square of a feature; above 0.
        """
        m = self.gram.shape[0] - 1
        before = torch.tensor([*range(m), 2 * m])  # f' and the constant
        after = torch.arange(m, 2 * m + 1)  # f and the constant
        old = drift[before][:, before]
        moved = drift[after][:, before] - old  # sum (f - f') f'^T
        strength = shrinkage * old.diagonal()[:-1].mean()
        T = torch.linalg.solve(old + strength * torch.eye(m + 1, dtype=old.dtype), moved.T).T
        T += torch.eye(m + 1, dtype=old.dtype)
        return FeatureSums(T @ self.gram @ T.T, self.moment @ T.T)

    def __add__(self, other: "FeatureSums") -> "FeatureSums":
        return FeatureSums(self.gram + other.gram, self.moment + other.moment)


def _smallest_eigenvalue(gram: Tensor, *, less: Tensor) -> float:
    """Give the smallest eigenvalue of ``gram - less^T less``: by Lanczos where the matrix (m, m) is large."""
    if len(gram) <= _DENSE:
        try:
            return float(torch.linalg.eigvalsh(gram - less.T @ less)[0])
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # the numbers are beyond any that features have
            return -math.inf
    ours, theirs = gram.numpy(), less.numpy()
    operator = LinearOperator(ours.shape, matvec=lambda x: ours @ x - theirs.T @ (theirs @ x), dtype=ours.dtype)
    start = np.random.default_rng(0).standard_normal(len(ours))
    try:
        return float(eigsh(operator, k=1, which="SA", v0=start, tol=1e-3, return_eigenvectors=False)[0])
    except ArpackError:
        return float(np.linalg.eigvalsh(ours - theirs.T @ theirs)[0])


@dataclass(frozen=True)
class FeatureRoot:
    """What one client says of its features: `FeatureSums` whose gram is ``root^T root``.

    N examples of m features have a gram matrix of rank N at most, so that the root is the smaller of the two, never
    the larger; and a matrix that has a root is one that examples can have.

    Parameters
    ----------
    root
        (k, d + 1) float64, zero below its diagonal, k at most the smaller of N and d + 1.
    moment
        As of `FeatureSums`.
    """

    root: Tensor  # (k, d + 1)
    moment: Tensor  # (C, d + 1)

    @classmethod
    def zero(cls, *, num_classes: int, feature_dim: int) -> "FeatureRoot":
        """Give the root over no example."""
        sums = FeatureSums.zero(num_classes=num_classes, feature_dim=feature_dim)
        return cls(sums.gram[:0], sums.moment)

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, *, num_classes: int) -> "FeatureRoot":
        """Take in a batch, as `FeatureSums.of`."""
        f = F.pad(features.double(), (0, 1), value=1.0)  # (N, d + 1)
        moment = f.new_zeros(num_classes, f.shape[1]).index_add_(0, labels, f)
        return cls(triangular(f), moment)

    def sums(self) -> FeatureSums:
        """Form the sums."""
        return FeatureSums(self.root.T @ self.root, self.moment)

    def __add__(self, other: "FeatureRoot") -> "FeatureRoot":
        return FeatureRoot(triangular(torch.cat([self.root, other.root])), self.moment + other.moment)


def triangular(rows: Tensor) -> Tensor:
    """Turn rows (n, m) so that those below the diagonal vanish (QR): (min(n, m), m) with the same gram matrix."""
    triangular: Tensor = torch.linalg.qr(rows, mode="r").R
    return triangular


def unlifted(features: Tensor) -> Tensor:
    """Give the features (N, d) as they are."""
    return features


def softmax(logits: Tensor) -> Tensor:
    """Turn logits (N, n) into probabilities, as the cross-entropy takes them."""
    return logits.softmax(dim=1)


@dataclass(frozen=True)
class Classifier:
    """What turns features into logits.

    Parameters
    ----------
    rows
        ``weight`` (C, m) and ``bias`` (C,).
    lift
        Features (N, d) -> the (N, m) that the rows act on.
    probabilities
        Logits (N, n) -> probabilities.
    """

    rows: Mapping[str, Tensor]
    lift: Callable[[Tensor], Tensor] = unlifted
    probabilities: Callable[[Tensor], Tensor] = softmax

    def logits(self, features: Tensor, classes: Tensor) -> Tensor:
        """Score features (N, d) against the rows of `classes` (n,) only: (N, n)."""
        return logits(self.rows, self.lift(features), classes)

    def to(self, device: torch.device) -> "Classifier":
        """Move the rows."""
        return replace(self, rows={name: value.to(device) for name, value in self.rows.items()})


class Head(ABC):
    """How a classifier comes from what clients train and sum.

    Attributes
    ----------
    collects_sums
        Whether one more exchange after a task's last round collects every client's `FeatureSums`.
    second_moments
        Whether these are asked for whole; otherwise the features' sums by class alone, `FeatureSums.moment`.
    """

    collects_sums: bool
    second_moments: bool = True

    @abstractmethod
    def classifier(self, trained: Mapping[str, Tensor], sums: FeatureSums) -> Classifier:
        """Give the classifier for inference, float32."""

    def joined(self, moments: Sequence[Tensor]) -> Tensor:
        """Make one of the clients' sums by class, where there are no second moments: (C, d + 1) each and together."""
        return added_up(moments)

    def lift(self, features: Tensor) -> Tensor:
        """Turn features (N, d) into those that are summed, (N, m)."""
        return features

    def usual_norm(self, feature_dim: int) -> float:
        """Give the norm of what is summed of an example, the constant included, if features have a mean square of 1."""
        return math.sqrt(feature_dim + 1)

    def norm_slack(self) -> float:
        """Give the share by which the norm of what is summed may be above `usual_norm`: all are of one length."""
        return 0.01

    def projection(self, feature_dim: int) -> Tensor | None:
        """Give P (d, m) where `lift` is ``relu(features @ P)``, so that it can be written down; None: no lift."""
        return None

    def probabilities(self, logits: Tensor) -> Tensor:
        """Turn logits (N, n) over the classes seen so far into probabilities."""
        return softmax(logits)

    def lifted_dim(self, feature_dim: int) -> int:
        """Give m for features of size d."""
        return feature_dim

    def row_dim(self, feature_dim: int) -> int:
        """Give the size of a trained class row for features of size d."""
        return feature_dim


def added_up(moments: Sequence[Tensor]) -> Tensor:
    """Add up sums by class, (C, d + 1) each, in their order."""
    total = torch.zeros_like(moments[0])
    for moment in moments:
        total = total + moment
    return total


def init_rows(*, num_classes: int, feature_dim: int) -> dict[str, Tensor]:
    """Give the class rows that clients train, all zero: no class is preferred before it has been seen."""
    return {"weight": torch.zeros(num_classes, feature_dim), "bias": torch.zeros(num_classes)}


def with_classes(rows: Mapping[str, Tensor], num_classes: int) -> dict[str, Tensor]:
    """Give class rows with the start of `init_rows` for classes that are new; the others stay as they are."""
    return {name: _with_zero_rows(value, num_classes) for name, value in rows.items()}


def rows_at_means(means: Tensor) -> dict[str, Tensor]:
    """Give class rows that score an example by how near it is to each class's mean.

        logits_c(f) = -tau |f - mu_c|^2 / 2 + what all classes share,   tau = 6 / mean_c |mu_c - mu|^2

    so that a mean scores about 6 against the middle of all, mu: a softmax is then sure, and not too sure to learn.

    Parameters
    ----------
    means
        (C, d), at least two that differ.
    """
    middle = means.mean(0)
    away = means - middle  # (C, d)
    tau = _MARGIN / away.square().sum(1).mean()
    bias = -tau * (away.square().sum(1) / 2 + away @ middle)
    return {"weight": (tau * away).float(), "bias": bias.float()}


def trained_classes(rows: Mapping[str, Tensor]) -> list[int]:
    """List the classes whose row is no longer as `init_rows` made it."""
    moved: list[int] = moved_rows(rows).nonzero().flatten().tolist()
    return moved


def _with_zero_rows(value: Tensor, num_rows: int) -> Tensor:
    return torch.cat([value, value.new_zeros(num_rows - len(value), *value.shape[1:])])


def logits(rows: Mapping[str, Tensor], features: Tensor, classes: Tensor) -> Tensor:
    """Score features (N, d) against the rows of `classes` (n,) only: (N, n)."""
    return F.linear(features, rows["weight"][classes], rows["bias"][classes])
