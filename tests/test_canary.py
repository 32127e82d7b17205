"""Who attacks private training from outside: whether one example was there is told no better than epsilon allows.

The attacker knows all the other examples, the canary, the start, the settings and every line of the code, and sees what
a client sends. It is trained on half of many runs with the canary and without, the direction in which their means part,
and tried on the other half. From its rates of hits and of false alarms follows an epsilon that training has at least,
with 99 % confidence (Jagielski et al., arXiv 2006.07709).
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from local_grid import defaults
from scipy.stats import beta
from torch import Tensor, nn

from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.model.accountant import noise_multiplier
from fedtalora_flwr.model.backbones import Backbone
from fedtalora_flwr.model.backbones.base import Placement
from fedtalora_flwr.model.heads import init_rows
from fedtalora_flwr.model.lora import AdaptedModel
from fedtalora_flwr.model.private import Privacy, fit_privately, sample_rate, steps_of_round
from fedtalora_flwr.model.train import Examples

EPSILON, DELTA, WIDTH, RUNS = 1.0, 1e-5, 6, 400
CONFIDENCE = 0.99


class Toy(Backbone):
    """One layer on vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.modality, self.feature_dim = nn.Module(), "image", WIDTH
        self.model.block = nn.Module()
        self.model.block.fc1 = nn.Linear(WIDTH, WIDTH)
        self.placement = Placement(("block",), {"fc1": ("fc1",)})

    def pool(self, batch: Tensor, *, augment: str, generator: torch.Generator | None) -> Tensor:
        return self.model.block.fc1(batch)

    def encode(self, split, rows, *, source):
        raise NotImplementedError

    def save(self, folder, *, class_names=(), rows=None):
        raise NotImplementedError

    def preparation(self):
        raise NotImplementedError


def epsilon_at_least(with_it: np.ndarray, without: np.ndarray) -> float:
    """The largest epsilon that any threshold on the attacker's scores shows, of half as many each way as given."""
    best = 0.0
    half = len(with_it) // 2
    direction = with_it[:half].mean(0) - without[:half].mean(0)
    hits, alarms = with_it[half:] @ direction, without[half:] @ direction
    tried = len(hits)
    for threshold in np.quantile(np.concatenate([hits, alarms]), np.linspace(0.05, 0.95, 19)):
        for there, absent in ((hits >= threshold, alarms >= threshold), (alarms < threshold, hits < threshold)):
            low = beta.ppf((1 - CONFIDENCE) / 2, there.sum(), tried - there.sum() + 1)
            high = beta.ppf((1 + CONFIDENCE) / 2, absent.sum() + 1, tried - absent.sum())
            if low > DELTA and high < 1:
                best = max(best, float(np.log((low - DELTA) / high)))
    return best


@pytest.fixture(scope="module")
def played():
    """What clients have sent, with the canary and without, at a share of the noise that the budget asks for."""
    settings = {"device": "cpu", "precision": "fp32", "head": "linear", "optimizer": "sgd", "clip-norm": 0.0}
    config = RunConfig.parse(defaults() | settings | {"lr-schedule": "constant", "warmup": 0.0, "batch-size": 2})
    config = replace(config, local_epochs=2, learning_rate=0.5, head_learning_rate=0.5, momentum=0.0)
    torch.manual_seed(0)
    model = AdaptedModel(Toy(), rank=2, alpha=4, blocks="all", targets="fc1")
    start = model.initial_factors(seed=0)
    others = torch.full((5, WIDTH), torch.nan)  # nothing hides the canary but the noise: the hardest case
    head = init_rows(num_classes=2, feature_dim=WIDTH)
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    rate, num_steps = sample_rate(config, 6), steps_of_round(config, 6)
    sigma = noise_multiplier(epsilon=EPSILON, delta=DELTA, sample_rate=rate, num_steps=num_steps)

    def play(canary: Tensor, share: float) -> np.ndarray:
        examples = Examples(torch.cat([others, canary[None]]), labels)
        sent = []
        for _ in range(RUNS):
            model.load(start, {})
            result = fit_privately(
                model,
                head,
                examples,
                classes=[0, 1],
                trainable=frozenset({"lora_A", "lora_B"}),
                config=config,
                task_id=0,
                round_in_task=0,
                privacy=Privacy(share * sigma, 1.0),
            )
            pairs = [factor.flatten() for pair in result.adapters.values() for factor in (pair.lora_A, pair.lora_B)]
            sent.append(torch.cat([*pairs, *(row.flatten() for row in result.head.values())]))
        return torch.stack(sent).double().numpy()

    def both(share: float) -> tuple[np.ndarray, np.ndarray]:
        # Blanked out: an example whose gradient is no number is left out of every sum.
        return play(3 * torch.ones(WIDTH), share), play(torch.full((WIDTH,), torch.nan), share)

    return both


@pytest.mark.full
def test_an_attacker_finds_out_no_more_than_epsilon_allows(played):
    assert epsilon_at_least(*played(1.0)) <= EPSILON


@pytest.mark.full
def test_the_same_attacker_finds_out_more_where_the_noise_is_a_tenth(played):
    assert epsilon_at_least(*played(0.1)) > EPSILON
