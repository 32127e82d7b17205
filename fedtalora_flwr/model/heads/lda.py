"""A federated analytic head: linear discriminant analysis of the features, exact for any partition.

Classes are taken for Gaussians of one covariance S. From the sums over all clients' examples, n_c of class c,

    mu_c = M_c / n_c,   mu = mean_c mu_c,   S = (G - sum_c M_c M_c^T / n_c) / n + lambda mean(diag S) I,
    w_c = S^-1 (mu_c - mu),   l_c = ((mu_c - mu)^T w_c)^(1/2),   logits_c(f) = mean(l) w_c^T (f - mu) / l_c.

Where all lengths l_c are equal, that is the discriminant. They are not: a class whose sums have followed features that
moved (`FeatureSums.followed`) lies nearer to the middle than it should, since a map shows less than there was, and the
discriminant's ``- l_c^2 / 2`` would let it win where it must not. So a class is told by its direction.

LoRA is trained with the linear head's loss; clients send the sums of `heads.ridge`, under the aggregated model, after
a task's last round. Unlike in the ridge solution, the rows of a class do not depend on how many other classes there are
or how many examples they have, so that a class seen early or seldom is not put at a disadvantage.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtalora_flwr.model.heads.base import Classifier, FeatureSums, Head


@dataclass(frozen=True)
class LdaHead(Head):
    """Classify by the direction of the class mean in the metric of the covariance within classes.

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
        known = counts > 0
        middle = means[known].mean(0) if known.any() else means[0]
        away = torch.where(known[:, None], means - middle, 0)  # (C, d)
        weight = torch.linalg.solve(within, away.T).T
        length = (weight * away).sum(1).clamp(min=0).sqrt()
        alike = length[known].mean() if known.any() else length.sum()
        weight = weight * (alike / length.clamp(min=1e-12))[:, None]
        bias = -weight @ middle
        return Classifier({"weight": weight.float().contiguous(), "bias": bias.float()})


def create(*, lda_shrinkage: float) -> LdaHead:
    """Build the head from the setting ``lda-shrinkage``."""
    return LdaHead(lda_shrinkage)
