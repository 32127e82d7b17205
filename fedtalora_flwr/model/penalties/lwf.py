"""Learning without forgetting: what the model says of old classes stays as it was (arXiv 1606.09282).

On the client's own new examples x, with the broadcast model as the teacher and the old classes' rows V,

    weight * T^2 * KL( softmax(V f_0(x) / T) || softmax(V f(x) / T) )

The rows V are those that were broadcast: the head's old rows are not trained, so what the term holds in place is the
features, as far as the old classes look at them. T^2 keeps its gradients at the size of the cross-entropy's (Hinton et
al., arXiv 1503.02531). The teacher sees the examples without augmentation.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from fedtalora_flwr.model.heads import logits
from fedtalora_flwr.model.penalties.base import Penalty, Start, Term


@dataclass(frozen=True)
class LearningWithoutForgetting(Penalty):
    """Distil the old classes' logits of the broadcast model.

    Parameters
    ----------
    weight
        Of the term, beside a cross-entropy of weight 1.
    temperature
        T, above 0.
    """

    weight: float = 1.0
    temperature: float = 2.0
    uses_old_rows: bool = True

    def begin(self, start: Start) -> Term | None:
        """Let the teacher speak once, before the first step."""
        if len(start.old_classes) < 2:  # one class has probability 1 whatever its logit
            return None
        rows, old, T = start.rows, start.old_classes, self.temperature
        taught = F.log_softmax(logits(rows, start.features(), old) / T, 1)  # (N, n)

        def term(batch: Tensor, features: Tensor) -> Tensor:
            said = F.log_softmax(logits(rows, features, old) / T, 1)  # (b, n)
            divergence = F.kl_div(said, taught[batch], reduction="batchmean", log_target=True)
            return self.weight * T**2 * divergence

        return term


def create(*, penalty_weight: float = 1.0) -> LearningWithoutForgetting:
    """Build the penalty from the setting ``penalty-weight``."""
    return LearningWithoutForgetting(weight=penalty_weight)
