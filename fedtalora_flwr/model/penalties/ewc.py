"""Elastic weight consolidation: numbers that earlier tasks depend on are held where they were (arXiv 1612.00796).

For the trained factors theta, with theta* as they stood at the last task's end and F as what earlier tasks depended on,

    weight / 2 * sum_i F_i (theta_i - theta*_i)^2,        F = sum over finished tasks t of F_t
    F_t = 1 / n_t * sum over the task's examples x of (d log p(y | x) / d theta)^2,   y drawn from p(. | x)

F_t is a mean over examples, so the clients' sums give the pooled data's F_t whatever the partition. They are gathered
in one more exchange after a task's last round, under the aggregated model. theta* and F live on the server, and travel
down with every order to train from the second task on, twice the size of the trained factors: a client keeps nothing.
One anchor stands for all finished tasks, as in online EWC (Huszar, arXiv 1712.03847), but no task's F is forgotten.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedtalora_flwr.model.penalties.base import Penalty, Start, Term


@dataclass(frozen=True)
class ElasticWeightConsolidation(Penalty):
    """Hold the trained factors near the anchor, each number by its Fisher information.

    Parameters
    ----------
    weight
        lambda of the paper, beside a cross-entropy of weight 1. The Fisher of a factor is small, so useful weights are
        far above 1.
    """

    weight: float = 1.0
    uses_old_rows: bool = False
    remembers: bool = True

    def begin(self, start: Start) -> Term | None:
        """Give the term, or none before a task is finished."""
        factors, anchor, fisher = start.factors, start.memory.anchor, start.memory.fisher
        if not fisher:
            return None

        held = sorted(fisher.keys() & factors.keys())  # a factor that rests this round stays where it is

        def term(batch: Tensor, features: Tensor) -> Tensor:
            parts = [(fisher[key] * (factors[key] - anchor[key]).square()).sum() for key in held]
            return self.weight / 2 * torch.stack(parts).sum()

        return term


def create(*, penalty_weight: float = 1.0) -> ElasticWeightConsolidation:
    """Build the penalty from the setting ``penalty-weight``."""
    return ElasticWeightConsolidation(weight=penalty_weight)
