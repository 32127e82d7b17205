"""A federated analytic head: ridge regression of one-hot labels on features, exact for any partition.

LoRA is trained with the linear head's loss. After a task's last round every client sums its features under the
aggregated model, the server adds the sums up and solves

    W = M (G + lambda D)^-1,   G = sum f f^T,   M = sum onehot(y) f^T

where D is the identity but for a 0 at the bias. It is the solution on the pooled data, whoever holds what. Sums
of earlier tasks were taken under earlier models and age as LoRA moves; ``later-learning-rate`` slows that.

Second moments of features say more about the data than a gradient step does: only sums leave a client, but
sums over very few examples can be telling.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtalora_flwr.heads.base import FeatureSums, Head


@dataclass(frozen=True)
class RidgeHead(Head):
    """Classify with the ridge solution of all sums so far.

    Parameters
    ----------
    ridge_lambda
        Regularisation relative to the mean eigenvalue of the features' part of G, so that it does not depend on
        the number of examples or the scale of the features.
    """

    ridge_lambda: float
    collects_sums: bool = True

    def classifier(self, trained: Mapping[str, Tensor], sums: FeatureSums) -> dict[str, Tensor]:
        """Solve for the rows, in float64."""
        squares = sums.gram.diagonal()[:-1]  # the last is the number of examples, free of the features' scale
        strength = (self.ridge_lambda * squares.mean()).expand_as(squares)
        regularised = sums.gram + torch.nn.functional.pad(strength, (0, 1)).diag()
        rows = torch.linalg.solve(regularised, sums.moment.T).T.float()  # (C, d + 1)
        return {"weight": rows[:, :-1].contiguous(), "bias": rows[:, -1].contiguous()}


def create(*, ridge_lambda: float) -> RidgeHead:
    """Build the head."""
    return RidgeHead(ridge_lambda=ridge_lambda)
