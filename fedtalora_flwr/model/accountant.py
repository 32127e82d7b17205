"""What private steps cost, as opacus counts it, and the noise that a budget asks for.

A step draws each example with probability q, bounds what one changes of a sum by C, and adds Gaussian noise of
standard deviation sigma C (see `private`). Many steps are composed by the distribution of their privacy loss, PRV
(Gopi et al., arXiv 2106.02848), whose epsilon is an upper bound, by .01 or so above the best.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from opacus.accountants import PRVAccountant
from scipy.optimize import brentq

_CLOSE, _STRIDE = 1e-3, 1.0  # in the logarithm of a noise multiplier that is looked for


@dataclass(frozen=True)
class Spending:
    """So many steps.

    Parameters
    ----------
    noise_multiplier
        sigma, above 0.
    sample_rate
        q, in (0, 1].
    num_steps
        From 1.
    """

    noise_multiplier: float
    sample_rate: float
    num_steps: int


def epsilon_of(spendings: Iterable[Spending], *, delta: float) -> float:
    """Give the epsilon that all these steps have cost together, at `delta`; 0 where there are none.

    Two data sets differ here by one example, which the other has not (see docs/PRIVACY.md).
    """
    steps: Counter[tuple[float, float]] = Counter()  # of one kind together, however they were taken
    for each in spendings:
        steps[each.noise_multiplier, each.sample_rate] += each.num_steps
    return _epsilon(tuple(sorted((*kind, num_steps) for kind, num_steps in steps.items())), delta)


@lru_cache
def noise_multiplier(
    *, epsilon: float, delta: float, sample_rate: float, num_steps: int, beside: tuple[Spending, ...] = ()
) -> float:
    """Find the least noise (nearly) with which so many steps cost `epsilon` at most.

    Parameters
    ----------
    epsilon, delta
        The budget.
    sample_rate, num_steps
        As of `Spending`.
    beside
        What is spent of the same budget on other things; below `epsilon`.
    """

    def excess(log_sigma: float) -> float:
        steps = Spending(math.exp(log_sigma), sample_rate, num_steps)
        return math.log(epsilon_of([*beside, steps], delta=delta) / epsilon)

    low = high = 0.0
    while excess(low) < 0:
        low -= _STRIDE
    while excess(high) > 0:
        high += _STRIDE
    log_sigma = float(brentq(excess, low, high, xtol=_CLOSE)) if low < high else 0.0
    while excess(log_sigma) > 0:
        log_sigma += _CLOSE
    return math.exp(log_sigma)


@lru_cache
def _epsilon(history: tuple[tuple[float, float, int], ...], delta: float) -> float:
    if not history:
        return 0.0
    accountant = PRVAccountant()
    accountant.history = list(history)
    return float(accountant.get_epsilon(delta))
