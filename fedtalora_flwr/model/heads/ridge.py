"""A federated analytic head: ridge regression of one-hot labels on features, exact for any partition.

LoRA is trained with the linear head's loss. After a task's last round every client sums its features under the
aggregated model, the server adds the sums up and solves

    W = M (G + lambda D)^-1,   G = sum f f^T,   M = sum onehot(y) f^T

where D is the identity but for a 0 at the bias. It is the solution on the pooled data, whoever holds what. Sums
of earlier tasks were taken under earlier models and age as LoRA moves; ``later-learning-rate`` slows that. The
lambda that suits few examples is a thousand times that for many; the sums are enough to choose it (`chosen_lambda`).

With ``ridge-features`` the backbone's features are first projected at random and rectified (RanPAC, arXiv
2307.02251), which lets a linear solution separate more. The projection is seeded, so nothing of it travels.

Second moments of features say more about the data than a gradient step does: only sums leave a client, but
sums over very few examples can be telling.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fedtalora_flwr.model.heads.base import Classifier, FeatureSums, Head

_LAMBDAS = torch.logspace(-3, 2, 21, dtype=torch.float64)  # tried by `chosen_lambda`


@dataclass(frozen=True)
class RidgeHead(Head):
    """Classify with the ridge solution of all sums so far.

    Parameters
    ----------
    ridge_lambda
        Regularisation relative to the mean eigenvalue of the features' part of G, so that it does not depend on
        the number of examples or the scale of the features. 0: `chosen_lambda` of the sums.
    num_random
        Random features to solve on; 0: the backbone's own.
    seed
        Of the projection, the same on every node.
    """

    ridge_lambda: float
    num_random: int = 0
    seed: int = 0
    collects_sums: bool = True

    def classifier(self, trained: Mapping[str, Tensor], sums: FeatureSums) -> Classifier:
        """Solve for the rows, in float64."""
        squares = sums.gram.diagonal()[:-1]  # the last is the number of examples, free of the features' scale
        strength = ((self.ridge_lambda or chosen_lambda(sums)) * squares.mean()).expand_as(squares)
        regularised = sums.gram + torch.nn.functional.pad(strength, (0, 1)).diag()
        rows = torch.linalg.solve(regularised, sums.moment.T).T.float()  # (C, m + 1)
        ours = {"weight": rows[:, :-1].contiguous(), "bias": rows[:, -1].contiguous()}
        return Classifier(ours, self.lift, self.probabilities)

    def lift(self, features: Tensor) -> Tensor:
        """Project (N, d) at random and rectify: (N, num_random)."""
        projection = self.projection(features.shape[1])
        return features if projection is None else (features @ projection.to(features.device)).relu()

    def projection(self, feature_dim: int) -> Tensor | None:
        """Draw the (d, num_random) projection of `lift`, the same for a seed; None: the features as they are."""
        return _projection(feature_dim, self.num_random, self.seed) if self.num_random else None

    def probabilities(self, logits: Tensor) -> Tensor:
        """Clip at 0 and rescale: regression on one-hot labels estimates probabilities itself, and its rows sum to 1."""
        clipped = logits.clamp(min=0)
        return clipped / clipped.sum(dim=1, keepdim=True)

    def usual_norm(self, feature_dim: int) -> float:
        """As of all heads; a random projection of a feature is as often below zero as above, and half of it is left."""
        return math.sqrt(self.num_random / 2 + 1) if self.num_random else super().usual_norm(feature_dim)

    def norm_slack(self) -> float:
        """As of all heads; of N random features six standard deviations: the sum of their squares varies by 5 / N."""
        return 3 * math.sqrt(5 / self.num_random) if self.num_random else super().norm_slack()

    def lifted_dim(self, feature_dim: int) -> int:
        """Give the number of features that are solved on."""
        return self.num_random or feature_dim


def chosen_lambda(sums: FeatureSums) -> float:
    """Choose the lambda of the smallest error of generalised cross-validation (Golub, Heath and Wahba 1979).

    Over n examples, with the residual sum of squares and the degrees of freedom of the solution for lambda,

        GCV(lambda) = n RSS(lambda) / (n - df(lambda))^2

    needs nothing but the sums. With the mean taken off, ``G - n mu mu^T = V diag(e) V^T``, ``P = (M - counts mu^T) V``,

        RSS = sum counts - sum counts^2 / n - sum_i |P_i|^2 (2 / (e_i + lambda) - e_i / (e_i + lambda)^2),
        df  = 1 + sum_i e_i / (e_i + lambda).

    Parameters
    ----------
    sums
        Over at least one example; an eigendecomposition of their G, in float64, is what the choice costs.

    Returns
    -------
    One of `_LAMBDAS`, relative to the mean eigenvalue as `RidgeHead` takes it.
    """
    n, mean = sums.gram[-1, -1], sums.gram[-1, :-1] / sums.gram[-1, -1]
    counts = sums.moment[:, -1]
    e, V = torch.linalg.eigh(sums.gram[:-1, :-1] - n * torch.outer(mean, mean))
    e = e.clamp(min=0)
    squares = ((sums.moment[:, :-1] - torch.outer(counts, mean)) @ V).square().sum(0)  # (m,), |P_i|^2
    strengths = _LAMBDAS[:, None] * sums.gram.diagonal()[:-1].mean()  # (L, 1)
    shrunk = e + strengths  # (L, m)
    rss = counts.sum() - counts.square().sum() / n - (squares * (2 / shrunk - e / shrunk.square())).sum(1)
    left = n - 1 - (e / shrunk).sum(1)  # (L,)
    errors = (n * rss / left.square()).nan_to_num(nan=torch.inf)  # one example leaves 0 / 0
    return float(_LAMBDAS[errors.argmin()])


@lru_cache(maxsize=1)
def _projection(feature_dim: int, num_random: int, seed: int) -> Tensor:
    """Draw a (d, num_random) projection that keeps the features' scale."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(feature_dim, num_random, generator=generator) / math.sqrt(feature_dim)


def create(*, ridge_lambda: float, ridge_features: int = 0, seed: int = 0) -> RidgeHead:
    """Build the head."""
    return RidgeHead(ridge_lambda=ridge_lambda, num_random=ridge_features, seed=seed)
