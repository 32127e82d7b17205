"""PILoRA's prototypes: a class is told by the nearest mean of its features (arXiv 2401.02094).

After a task's last round every holder k of class c sends the sum of its features under the aggregated model, whose
mean is mu_kc. The server weighs the means of a class by how near each is to the others, whoever has how many examples:

    v_k = 1 / sum_j |mu_kc - mu_jc|,   u_k = (v_k - min v) / (max v - min v),
    mu_c = sum_k mu_kc exp(u_k / T) / sum_j exp(u_j / T),   T = 0.2,

and an example is of the class whose prototype mu_c is nearest. Where all holders are equally far from the others, as
two always are, they count the same. Prototypes of finished tasks stay as they are: no second moment travels by which
they could follow features that move.

In the paper a prototype is a parameter, trained by the cross-entropy of a softmax over distances, beside an
orthogonality penalty on the pairs of successive tasks; its weight is by its distance to the class means of all holders'
features. Here these means are the prototypes, and LoRA is trained with the linear head's loss, so that heads differ in
what they classify by alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtalora_flwr.model.heads.base import Classifier, FeatureSums, Head, init_rows, rows_at_means

_TEMPERATURE = 0.2


@dataclass(frozen=True)
class PrototypeHead(Head):
    """Classify by the nearest prototype."""

    collects_sums: bool = True
    second_moments: bool = False

    def classifier(self, trained: Mapping[str, Tensor], sums: FeatureSums) -> Classifier:
        """Put the rows at the prototypes; those of a class without an example are zero."""
        moment, counts = sums.moment[:, :-1], sums.moment[:, -1]
        means = moment / counts.clamp(min=1).unsqueeze(1)  # (C, d)
        rows, known = init_rows(num_classes=len(means), feature_dim=means.shape[1]), counts > 0
        if known.any() and (means[known] != means[known][0]).any():  # or nothing tells them apart
            for name, value in rows_at_means(means[known]).items():
                rows[name][known] = value
        return Classifier(rows)

    def joined(self, moments: Sequence[Tensor]) -> Tensor:
        """Weigh each class's means by how near they are to each other (see the module's equation)."""
        counts = torch.stack([moment[:, -1] for moment in moments])  # (K, C)
        total = torch.zeros_like(moments[0])
        for c in counts.any(0).nonzero().flatten().tolist():
            held = counts[:, c].nonzero().flatten()
            means = torch.stack([moments[k][c, :-1] for k in held]) / counts[held, c, None]  # (n, d)
            total[c, :-1] = counts[held, c].sum() * (_nearness_weights(means) @ means)
            total[c, -1] = counts[held, c].sum()
        return total


def _nearness_weights(means: Tensor) -> Tensor:
    """Weigh points (n, d) by their nearness to each other, (n,), summing to 1."""
    near = 1 / torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist").sum(1)
    spread = near.max() - near.min()
    if not 0 < spread < torch.inf:  # all are equally far, or in one place
        return torch.full_like(near, 1 / len(near))
    return torch.softmax((near - near.min()) / spread / _TEMPERATURE, 0)


def create() -> PrototypeHead:
    """Build the head; it has no settings."""
    return PrototypeHead()
