"""How much each client counts in a round: by its examples, or by how its change lies among those of the others.

A robust rule usually replaces the mean. Here it chooses the weights of one: from the K x K inner products of what the
clients change,

    <D_k, D_j>,   D_k = s_k B_k A_k - s B A   over all adapted layers,

which the factors give without a dense matrix, it makes a weight for each client, and the exact average is then taken
with these weights, by any method. So robustness costs no exactness, and ``verify`` checks the mean that was meant.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from fedtalora_flwr.aggregation.types import ClientUpdate, GlobalState, in_summation_order

Key = TypeVar("Key", bound=Hashable)

_ITERATIONS, _SMALLEST = 100, 1e-6  # of the geometric median; relative to the largest distance


@dataclass(frozen=True)
class Weighing:
    """How clients are weighed.

    Parameters
    ----------
    rule
        One of `RULES`.
    suspects
        The share of clients that ``multi-krum`` and ``trimmed`` leave out, below 1/2.
    max_weight
        The most that a client counts, as a multiple of an equal share; 0: no bound.
    max_change
        The longest change that counts in full, as a multiple of the round's median (see `further`); a longer one
        counts less, as if it had that length. So too a longer change of the class rows, among those who hold the
        class. 0: no bound.
    """

    rule: str = "examples"
    suspects: float = 0.2
    max_weight: float = 0.0
    max_change: float = 0.0

    def __call__(self, state: GlobalState, updates: Sequence[ClientUpdate]) -> list[ClientUpdate]:
        """Give the updates with weights in place of their examples, in summation order; those of weight 0 are left out.

        Where every client weighs as many as it has examples, the updates are the same, bit for bit.

        Parameters
        ----------
        state, updates
            As for `Aggregator.aggregate`.
        """
        updates = in_summation_order(updates)
        examples = torch.tensor([float(update.num_examples) for update in updates], dtype=torch.float64)
        inner = inner_products(state, updates) if self.rule not in ("examples", "equal") or self.max_change else None
        weights = capped(RULES[self.rule](examples, inner, self.suspects), self.max_weight)
        less_rows = torch.ones_like(examples)
        if inner is not None and self.max_change:
            most = self.max_change * further(capped(examples, self.max_weight))
            weights = weights * _shortened(inner.diagonal().clamp(min=0).sqrt(), most)
            moved = torch.tensor([row_change(state, update) for update in updates], dtype=torch.float64)
            less_rows = _shortened(moved, most)
        weights = capped(weights, self.max_weight)
        return [
            update
            if weight == update.num_examples and less == 1
            else _of_weight(update, weight / update.num_examples, less_rows=less)
            for update, weight, less in zip(updates, weights.tolist(), less_rows.tolist(), strict=True)
            if weight > 0
        ]


def in_proportion(
    changes: Mapping[Key, tuple[GlobalState, ClientUpdate]], *, max_change: float
) -> dict[Key, ClientUpdate]:
    """Let updates count less that change far more than is usual, as `Weighing` does, each from a state of its own.

    Parameters
    ----------
    changes
        What was sent, and what came back, from each slot of a round.
    max_change
        As of `Weighing`.
    """
    if not max_change or not changes:
        return {key: update for key, (_, update) in changes.items()}
    most = max_change * further(torch.tensor([float(update.num_examples) for _, update in changes.values()]).double())
    lengths = torch.stack(
        [inner_products(state, [update])[0, 0].clamp(min=0).sqrt() for state, update in changes.values()]
    )
    moved = torch.tensor([row_change(state, update) for state, update in changes.values()], dtype=torch.float64)
    less, less_rows = _shortened(lengths, most).tolist(), _shortened(moved, most).tolist()
    return {
        key: update if a == b == 1 else _of_weight(update, a, less_rows=b)
        for (key, (_, update)), a, b in zip(changes.items(), less, less_rows, strict=True)
    }


def inner_products(state: GlobalState, updates: Sequence[ClientUpdate]) -> Tensor:
    """Give ``sum over layers <D_k, D_j>``, (K, K) float64, from the factors (see the module's first lines)."""
    num = len(updates)
    total = torch.zeros(num, num, dtype=torch.float64)
    for name, broadcast in state.adapters.items():
        pairs = [broadcast, *(update.adapters[name] for update in updates)]
        if all(pair.is_dense for pair in pairs):
            flat = torch.stack([(pair.delta() - broadcast.delta()).flatten() for pair in pairs[1:]]).double()
            total += flat @ flat.T
            continue
        left = torch.cat([pair.scaling * pair.lora_B.double() for pair in pairs], 1)  # (d_out, sum of ranks)
        right = torch.cat([pair.lora_A.double() for pair in pairs])  # (sum of ranks, d_in)
        owner = torch.repeat_interleave(torch.arange(num + 1), torch.tensor([pair.rank for pair in pairs]))
        blocks = torch.nn.functional.one_hot(owner, num + 1).double()  # (sum of ranks, K + 1)
        products = blocks.T @ ((left.T @ left) * (right @ right.T)) @ blocks  # (K + 1, K + 1)
        less = torch.cat([-torch.ones(num, 1, dtype=torch.float64), torch.eye(num, dtype=torch.float64)], 1)
        total += less @ products @ less.T
    return total


def row_change(state: GlobalState, update: ClientUpdate) -> float:
    """Give how far an update moves a class row that it holds: the root mean square over its rows."""
    held = update.class_counts.nonzero().flatten()
    moved = sum(
        float((update.head[name][held] - value[held]).double().square().sum()) for name, value in state.head.items()
    )
    return math.sqrt(moved / max(1, len(held)))


def _shortened(lengths: Tensor, most: Tensor) -> Tensor:
    """Give the share for which each length (K,) counts, so that none is over its multiple `most` of their median."""
    bound = most * lengths.median()
    return torch.where((lengths > bound) & (bound > 0), bound / lengths, 1.0)


def further(examples: Tensor) -> Tensor:
    """Say how much further than the median each client may go (K,): one with more examples takes more steps."""
    return (examples / examples.median()).clamp(min=1)


def capped(weights: Tensor, max_weight: float) -> Tensor:
    """Bound weights (K,) to `max_weight` equal shares, of those above 0, of what they then sum to; 0 leaves them.

    With n weights above 0, those at the bound c have ``c = max_weight / n sum w``: with m of them at it and the others'
    sum s, ``c = max_weight s / (n - max_weight m)``, and m is the smallest number for which no other is above.
    """
    num = int((weights > 0).sum())
    if not max_weight or max_weight >= num:
        return weights
    ordered = weights.sort(descending=True).values
    for above in range(num):
        rest, room = float(ordered[above:].sum()), num - max_weight * above
        if room > 0 and (bound := max_weight * rest / room) >= float(ordered[above]):
            return weights.clamp(max=bound) if above else weights
    return (weights > 0).to(weights.dtype)  # max_weight is 1


def _by_examples(examples: Tensor, inner: Tensor | None, suspects: float) -> Tensor:
    return examples


def _equal(examples: Tensor, inner: Tensor | None, suspects: float) -> Tensor:
    return torch.full_like(examples, float(examples.mean()))


def _geometric_median(examples: Tensor, inner: Tensor | None, suspects: float) -> Tensor:
    """Weigh so that the mean is the point whose summed distance to the changes, by examples, is least (Weiszfeld)."""
    assert inner is not None
    weights = examples
    for _ in range(_ITERATIONS):
        distances = _distances_to_mean(inner, weights)
        before, weights = weights, examples / distances.clamp(min=_SMALLEST * float(distances.max()) or 1.0)
        weights = weights * (examples.sum() / weights.sum())
        if (weights - before).abs().max() <= 1e-6 * before.max():
            break
    return weights


def _multi_krum(examples: Tensor, inner: Tensor | None, suspects: float) -> Tensor:
    """Leave out those whose nearest neighbours are furthest away (Blanchard et al. 2017)."""
    assert inner is not None
    num, out = len(examples), _num_suspects(len(examples), suspects)
    squares = inner.diagonal()
    between = (squares[:, None] + squares[None, :] - 2 * inner).clamp(min=0).fill_diagonal_(math.inf)
    scores = between.sort(1).values[:, : max(1, num - out - 2)].sum(1)
    return _without(examples, scores, out)


def _trimmed(examples: Tensor, inner: Tensor | None, suspects: float) -> Tensor:
    """Leave out those that are furthest from the geometric median."""
    assert inner is not None
    median = _geometric_median(examples, inner, suspects)
    return _without(examples, _distances_to_mean(inner, median), _num_suspects(len(examples), suspects))


RULES: Mapping[str, Callable[[Tensor, Tensor | None, float], Tensor]] = {
    "examples": _by_examples,
    "equal": _equal,
    "geometric-median": _geometric_median,
    "multi-krum": _multi_krum,
    "trimmed": _trimmed,
}


def _num_suspects(num: int, share: float) -> int:
    return min(math.ceil(round(share * num, 6)), (num - 1) // 2)


def _without(examples: Tensor, scores: Tensor, out: int) -> Tensor:
    """Give weight 0 to the `out` highest scores; of equal ones to the later."""
    weights = examples.clone()
    weights[scores.argsort(stable=True)[len(scores) - out :]] = 0
    return weights


def _distances_to_mean(inner: Tensor, weights: Tensor) -> Tensor:
    """Give the distance of each change from their weighted mean, (K,)."""
    p = weights / weights.sum()
    to_mean = inner @ p
    return (inner.diagonal() - 2 * to_mean + p @ to_mean).clamp(min=0).sqrt()


def _of_weight(update: ClientUpdate, factor: float, *, less_rows: float) -> ClientUpdate:
    return replace(
        update,
        num_examples=factor * update.num_examples,
        class_counts=less_rows * factor * update.class_counts.double(),
    )
