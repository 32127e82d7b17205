"""Weights of clients: rules from inner products of their changes, with which every method still averages exactly."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_updates import BOTH, SETTINGS, build, draw, make_state, make_update

from fedtalora_flwr.aggregation import ClientUpdate, GlobalState, Weighing, exactness_error
from fedtalora_flwr.aggregation.weights import RULES, capped, in_proportion, inner_products, row_change
from fedtalora_flwr.config import run_config

ROBUST = ["geometric-median", "multi-krum", "trimmed"]


Round = tuple[GlobalState, list[ClientUpdate]]


def made(num: int, *, dense: bool = False, spread: float = 0.1, trainable: frozenset[str] = BOTH) -> Round:
    state = make_state(draw(0), dense=dense)
    return state, [make_update(state, k, generator=draw(k + 1), spread=spread, trainable=trainable) for k in range(num)]


def changes(state: GlobalState, updates: list[ClientUpdate]) -> torch.Tensor:
    """The changes themselves, flat (K, all numbers of all layers)."""
    return torch.stack(
        [
            torch.cat(
                [(u.adapters[name].delta() - pair.delta()).double().flatten() for name, pair in state.adapters.items()]
            )
            for u in updates
        ]
    )


def flipped(state: GlobalState, update: ClientUpdate, factor: float) -> ClientUpdate:
    """The change times `-factor`, which lora_B alone can say where lora_A is as it was sent."""
    adapters = {
        name: replace(pair, lora_A=ours.lora_A, lora_B=ours.lora_B - factor * (pair.lora_B - ours.lora_B))
        for (name, pair), ours in zip(update.adapters.items(), state.adapters.values(), strict=True)
    }
    return replace(update, adapters=adapters)


def alike(num: int) -> Round:
    """Clients that agree but for a tenth of their change."""
    state = make_state(draw(0))
    common = make_update(state, 0, generator=draw(1), spread=1.0)

    def near(k: int) -> ClientUpdate:
        own = make_update(state, k, generator=draw(k + 2), spread=0.1, class_counts=[4, 0, 2, 1])
        adapters = {
            name: replace(
                pair,
                lora_A=state.adapters[name].lora_A,
                lora_B=common.adapters[name].lora_B + pair.lora_B - state.adapters[name].lora_B,
            )
            for name, pair in own.adapters.items()
        }
        return replace(own, adapters=adapters)

    return state, [near(k) for k in range(num)]


def test_settings_and_rules_have_the_same_names():
    _, allowed = run_config._fields()["aggregation-weights"]
    assert allowed and all(allowed.holds(rule) for rule in RULES) and not allowed.holds("median")
    assert SETTINGS["aggregation_weights"] == "examples"


@pytest.mark.parametrize("dense", [False, True])
def test_inner_products_are_those_of_the_dense_changes(dense):
    state, updates = made(5, dense=dense)
    flat = changes(state, updates)
    torch.testing.assert_close(inner_products(state, updates), flat @ flat.T, rtol=1e-5, atol=1e-5)


def test_inner_products_take_clients_of_any_rank():
    state, updates = made(3)
    other = make_update(make_state(draw(7), rank=3, scaling=0.5), 3, generator=draw(8))
    flat = changes(state, [*updates, other])
    torch.testing.assert_close(inner_products(state, [*updates, other]), flat @ flat.T, rtol=1e-5, atol=1e-5)


def test_weights_by_examples_leave_the_updates_as_they_are():
    state, updates = made(4)
    found = Weighing(max_weight=4.0, max_change=100.0)(state, updates[::-1])
    assert len(found) == 4 and all(a is b for a, b in zip(found, updates, strict=True))


def test_examples_beyond_max_weight_let_nobody_go_further():
    state, updates = made(3)
    updates = [*updates, make_update(state, 3, generator=draw(4), spread=3.0)]  # some thirty times as far
    counts = torch.tensor([[5, 0], [5, 0], [5, 0], [5000, 0]])
    updates = [replace(u, num_examples=int(c.sum()), class_counts=c) for u, c in zip(updates, counts, strict=True)]
    found = Weighing(max_weight=2.0, max_change=3.0)(state, updates)
    # It counts as 15 examples, may go 15 / 5 as far, and so counts at most 15 * 9 / 30 of them.
    assert [update.num_examples for update in found[:3]] == [5, 5, 5]
    assert 0.1 < found[3].num_examples < 7


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", ["fedtalora", "fedex", "flora", "full", "rolora", "fedsvd", "fed-sb"])
def test_every_method_is_exact_with_the_weights_of_every_rule(rule, method):
    method = build(method)
    state, updates = made(7, dense=method.dense, trainable=method.trains(0))
    weighed = Weighing(rule, max_weight=1.5, max_change=1.0)(state, updates)
    assert [u.num_examples for u in weighed] != [u.num_examples for u in updates]
    assert exactness_error(state, weighed, method.aggregate(state, weighed)) < 1e-5
    for update in weighed:
        assert float(update.class_counts.sum()) <= update.num_examples * (1 + 1e-9)  # less, of a long change of rows


@pytest.mark.parametrize("rule", RULES)
def test_order_of_replies_does_not_change_a_bit_of_the_weights(rule):
    state, updates = made(6)
    one, other = (Weighing(rule, max_change=2.0)(state, order) for order in (updates, updates[::-1]))
    assert [(u.partition_id, u.num_examples) for u in one] == [(u.partition_id, u.num_examples) for u in other]


@pytest.mark.parametrize("rule", ROBUST)
@pytest.mark.parametrize("factor", [1.0, 10.0, 1e4])
def test_robust_rules_hardly_hear_two_of_ten_that_turn_their_change_around(rule, factor):
    state, updates = alike(10)
    hostile = [flipped(state, update, factor) if update.partition_id < 2 else update for update in updates]
    weighed = Weighing(rule)(state, hostile)
    total = sum(u.num_examples for u in weighed)
    mean = sum(u.num_examples / total * change for u, change in zip(weighed, changes(state, weighed), strict=True))
    honest = changes(state, updates).mean(0)
    assert float((mean - honest).norm() / honest.norm()) < (0.25 if rule == "geometric-median" else 0.1)


def test_geometric_median_is_the_point_of_least_summed_distance():
    state, updates = made(6)
    weighed = Weighing("geometric-median")(state, updates)
    flat, examples = changes(state, updates), torch.tensor([float(u.num_examples) for u in updates])
    total = sum(u.num_examples for u in weighed)
    median = sum(u.num_examples / total * change for u, change in zip(weighed, flat, strict=True))

    def cost(point: torch.Tensor) -> float:
        return float((examples * (flat - point).norm(dim=1)).sum())

    generator = draw(3)
    for _ in range(20):
        step = torch.randn(median.shape, generator=generator, dtype=torch.float64)
        assert cost(median) <= cost(median + 0.01 * median.norm() * step / step.norm()) + 1e-6


def test_longer_changes_count_as_if_they_were_of_the_bound():
    state, updates = alike(9)
    loud = [flipped(state, update, -50.0) if update.partition_id == 4 else update for update in updates]
    weighed = Weighing(max_change=3.0)(state, loud)
    lengths = changes(state, weighed).norm(dim=1)
    of = {u.partition_id: (u.num_examples / 7, float(length)) for u, length in zip(weighed, lengths, strict=True)}
    weight, length = of.pop(4)
    assert weight * length == pytest.approx(3 * float(lengths.median()), rel=1e-6)
    assert {weight for weight, _ in of.values()} == {1.0}


def test_longer_changes_of_class_rows_count_as_if_they_were_of_the_bound_among_those_who_hold_the_class():
    state, updates = alike(9)
    loud = {name: value - 50 * (updates[4].head[name] - value) for name, value in state.head.items()}
    weighed = Weighing(max_change=3.0)(state, [*updates[:4], replace(updates[4], head=loud), *updates[5:]])
    assert [u.num_examples for u in weighed] == [u.num_examples for u in updates]
    lengths = torch.tensor([row_change(state, u) for u in weighed])
    shares = torch.tensor([float(u.class_counts.sum()) / u.num_examples for u in weighed])
    assert float(shares[4] * lengths[4]) == pytest.approx(3 * float(lengths.median()), rel=1e-6)
    assert {*shares.tolist()} == {1.0, float(shares[4])}
    assert all(
        torch.equal(after.class_counts, before.class_counts)
        for after, before in zip(weighed[:4], updates[:4], strict=True)
    )


def test_slots_from_states_of_their_own_count_as_if_their_changes_were_of_the_bound():
    state, updates = alike(5)
    other = make_state(draw(77))
    moved = make_update(other, 5, generator=draw(3), spread=0.1, class_counts=[4, 0, 2, 1])
    changes = {k: (state, flipped(state, u, -50.0) if k == 2 else u) for k, u in enumerate(updates)}
    weighed = in_proportion(changes | {5: (other, moved)}, max_change=3.0)
    alone = Weighing(max_change=3.0)(state, [update for _, update in changes.values()])
    assert [k for k, u in weighed.items() if u.num_examples != 7] == [2]
    assert 0.5 < weighed[2].num_examples / alone[2].num_examples < 2  # the median is over one more
    assert weighed[5] is moved
    assert in_proportion(changes, max_change=0.0) == {k: update for k, (_, update) in changes.items()}


def test_where_most_change_nothing_the_one_that_does_counts_in_full():
    state, updates = made(3, spread=0.0)
    updates[1] = make_update(state, 1, generator=draw(2), spread=0.1)
    assert [u.num_examples for u in Weighing(max_change=3.0)(state, updates)] == [u.num_examples for u in updates]


@given(
    weights=st.lists(st.floats(0.0, 1e9), min_size=1, max_size=12).filter(lambda w: sum(w) > 0),
    max_weight=st.floats(1.0, 20.0),
)
@settings(max_examples=200, deadline=None)
def test_no_client_counts_more_than_the_bound_and_the_others_keep_their_ratios(weights, max_weight):
    before = torch.tensor(weights, dtype=torch.float64)
    after = capped(before, max_weight)
    share = after / after.sum()
    equal = 1 / int((before > 0).sum())
    assert float(share.max()) <= max_weight * equal * (1 + 1e-9)
    if float(before.max()) <= max_weight * equal * float(before.sum()):
        torch.testing.assert_close(share, before / before.sum())
    assert np.all(np.diff(after[before.argsort()].numpy()) >= -1e-9 * float(after.max()))


@pytest.mark.parametrize("num", [1, 2, 3])
@pytest.mark.parametrize("rule", RULES)
def test_few_clients_always_leave_somebody_to_average(rule, num):
    state, updates = made(num)
    assert Weighing(rule, suspects=0.49, max_weight=1.0, max_change=0.5)(state, updates)


@pytest.mark.parametrize("rule", RULES)
def test_clients_that_change_nothing_are_weighed_too(rule):
    state, updates = made(4, spread=0.0)
    weighed = Weighing(rule, max_change=3.0)(state, updates)
    assert weighed and all(np.isfinite(u.num_examples) for u in weighed)
