"""What private steps cost: opacus' own numbers, and the noise that a budget asks for."""

import math

import pytest
from opacus.accountants import RDPAccountant
from opacus.accountants.utils import get_noise_multiplier
from scipy.stats import norm

from fedtalora_flwr.model.accountant import Spending, epsilon_of, noise_multiplier

DELTA = 1e-5


@pytest.mark.parametrize(
    ("epsilon", "sample_rate", "num_steps"), [(1.0, 16 / 58, 8), (8.0, 1.0, 10), (4.0, 0.01, 3000)]
)
def test_noise_is_what_opacus_finds_and_keeps_the_budget(epsilon, sample_rate, num_steps):
    sigma = noise_multiplier(epsilon=epsilon, delta=DELTA, sample_rate=sample_rate, num_steps=num_steps)
    theirs = get_noise_multiplier(
        target_epsilon=epsilon, target_delta=DELTA, sample_rate=sample_rate, steps=num_steps, accountant="prv"
    )
    assert sigma == pytest.approx(theirs, rel=0.02)
    spent = epsilon_of([Spending(sigma, sample_rate, num_steps)], delta=DELTA)
    assert 0.99 * epsilon < spent <= epsilon
    older = RDPAccountant()  # a looser bound, by other means
    older.history = [(sigma, sample_rate, num_steps)]
    assert spent < older.get_epsilon(DELTA) < 1.3 * spent


def test_steps_that_use_every_example_cost_what_the_gaussian_mechanism_does():
    """Balle and Wang, arXiv 1805.06530, theorem 8, with a sensitivity of 1 and sigma / sqrt(steps)."""
    sigma, num_steps = 2.0, 10
    epsilon, mu = epsilon_of([Spending(sigma, 1.0, num_steps)], delta=DELTA), math.sqrt(num_steps) / sigma

    def delta_at(epsilon: float) -> float:
        return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)

    assert delta_at(epsilon) <= DELTA < delta_at(epsilon - 0.03)


def test_rounds_add_up_to_what_all_their_steps_cost_at_once():
    rounds = [Spending(1.5, 0.25, 4)] * 3
    assert epsilon_of(rounds, delta=DELTA) == epsilon_of([Spending(1.5, 0.25, 12)], delta=DELTA)
    assert epsilon_of([*rounds, Spending(1.0, 0.5, 1)], delta=DELTA) > epsilon_of(rounds, delta=DELTA)
    assert epsilon_of([], delta=DELTA) == 0
