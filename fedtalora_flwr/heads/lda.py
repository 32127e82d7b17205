"""A federated analytic head: linear discriminant analysis of the features, exact for any partition.

Classes are taken for Gaussians of one covariance S. From the sums over all clients' examples, n_c of class c,

    mu_c = M_c / n_c,   S = (G - sum_c M_c M_c^T / n_c) / n,
    logits_c(f) = mu_c^T S_lambda^-1 f - mu_c^T S_lambda^-1 mu_c / 2,   S_lambda = S + lambda mean(diag S) I.

LoRA is trained with the linear head's loss; clients send the sums of `heads.ridge`, under the aggregated model, after
a task's last round. Unlike in the ridge solution, the rows of a class do not depend on how many other classes there are
or how many examples they have, so that a class seen early or seldom is not put at a disadvantage.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtalora_flwr.heads.base import Classifier, FeatureSums, Head


@dataclass(frozen=True)
class LdaHead(Head):
    """Classify by the nearest class mean in the metric of the covariance within classes.

    Parameters
    ----------
    shrinkage
        lambda, above 0: how far S is drawn to a multiple of the identity.
    """

    shrinkage: float
    collects_sums: bool = True

    def classifier(self, trained: Mapping[str, Tensor], sums: FeatureSums) -> Classifier:
        """Solve for the rows, in float64; those of a class without an example are zero."""
        moment, counts = sums.moment[:, :-1], sums.moment[:, -1]
        means = moment / counts.clamp(min=1).unsqueeze(1)  # (C, d)
        within = (sums.gram[:-1, :-1] - moment.T @ means) / counts.sum().clamp(min=1)
        squares = within.diagonal()
        within = within + (self.shrinkage * squares.mean()).expand_as(squares).diag()
        weight = torch.linalg.solve(within, means.T).T  # (C, d)
        bias = -0.5 * (weight * means).sum(1)
        return Classifier({"weight": weight.float().contiguous(), "bias": bias.float()})


def create(*, lda_shrinkage: float) -> LdaHead:
    """Build the head from the setting ``lda-shrinkage``."""
    return LdaHead(lda_shrinkage)
