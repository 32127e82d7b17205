"""Every method over slots: what the server may rely on, whatever the method makes of the slots."""

from dataclasses import replace

import pytest
import torch
from made_updates import build, draw, make_state, make_update, tensors_of

from fedtalora_flwr import aggregation
from fedtalora_flwr.aggregation import (
    FACTORS,
    ClientUpdate,
    ClusteredState,
    GlobalState,
    LoraFactors,
    Slot,
    SlotAggregator,
    slots_exactness_error,
)

METHODS = [name for name in aggregation.available() if isinstance(build(name), SlotAggregator)]
TASKS = {
    Slot(client, number): (client + number) % 2 for client in range(5) for number in range(3)
}  # two of a task each


def train(state, slots, *, method, generator):
    """Each slot's update: its task's own pair with noise, where the method trains it."""

    def near_its_task(before: GlobalState, slot: Slot) -> ClientUpdate:
        goal = make_state(draw(100 + TASKS[slot]))
        update = make_update(before, slot.partition_id, generator=generator, spread=0.2, trainable=method.trainable)
        factors = {}
        for name, pair in update.adapters.items():
            parts = {part: getattr(pair, part) for part in FACTORS}
            for part in method.trainable:
                parts[part] = parts[part] - getattr(before.adapters[name], part) + getattr(goal.adapters[name], part)
            factors[name] = LoraFactors(**parts, scaling=pair.scaling)
        return replace(update, adapters=factors)

    return {slot: near_its_task(state.of(slot), slot) for slot in slots}


def played(name, *, seed, absent=()):
    """A round of all slots but those absent, and the updates of another one of all."""
    generator, method = draw(seed), build(name)
    state = ClusteredState(make_state(generator), version=4)
    present = [slot for slot in TASKS if slot not in absent]
    state = method.aggregate(state, train(state, present, method=method, generator=generator))
    return method, state, train(state, TASKS, method=method, generator=generator)


def all_tensors(state: ClusteredState) -> dict[str, torch.Tensor]:
    states = {"start": state.start} | {str(place): one for place, one in state.states().items()}
    return {f"{place}/{key}": value for place, one in states.items() for key, value in tensors_of(one).items()}


@pytest.mark.parametrize("name", METHODS)
def test_order_of_replies_does_not_change_a_bit_of_any_state(name):
    method, state, updates = played(name, seed=3)
    wanted = method.aggregate(state, updates)
    for seed in range(4):
        order = torch.randperm(len(updates), generator=draw(seed)).tolist()
        got = method.aggregate(state, {slot: updates[slot] for slot in (list(updates)[i] for i in order)})
        assert (got.assigned, got.own.keys(), got.clusters.keys()) == (
            *(wanted.assigned, wanted.own.keys(), wanted.clusters.keys()),
        )
        values = all_tensors(wanted)
        assert all(torch.equal(value, values[key]) for key, value in all_tensors(got).items())


@pytest.mark.parametrize("name", METHODS)
def test_aggregate_changes_neither_the_states_nor_the_updates(name):
    method, state, updates = played(name, seed=4)
    given = [all_tensors(state), *(tensors_of(update) | {"counts": update.class_counts} for update in updates.values())]
    before = [{key: value.clone() for key, value in tensors.items()} for tensors in given]
    places, slots = (dict(state.assigned), list(state.clusters), list(state.own)), list(updates)
    method.aggregate(state, updates)
    assert (state.assigned, list(state.clusters), list(state.own)) == places and list(updates) == slots
    for tensors, copies in zip(given, before, strict=True):
        assert all(torch.equal(tensors[key], copies[key]) for key in copies)


@pytest.mark.parametrize("name", METHODS)
def test_each_aggregation_is_one_version_on(name):
    method, state, updates = played(name, seed=5)
    assert state.version == 5 and method.aggregate(state, updates).version == 6


@pytest.mark.parametrize("name", METHODS)
def test_a_slot_heard_of_keeps_a_state_and_every_cluster_has_a_slot(name):
    away = [Slot(0, 0), Slot(4, 1)]
    method, state, updates = played(name, seed=6, absent=away)
    assert set(state.slots()) == TASKS.keys() - set(away)
    assert all(state.of(slot) is state.start for slot in away)
    for slot in away:
        updates.pop(Slot(slot.partition_id, 2))  # and others are absent now
    new = method.aggregate(state, updates)
    assert set(new.slots()) == TASKS.keys() and new.start is state.start
    assert set(new.assigned.values()) == set(new.clusters) and not set(new.assigned) & set(new.own)
    assert all(new.of(slot) is not new.start for slot in TASKS)


@pytest.mark.parametrize("name", [name for name in METHODS if build(name).exact])
def test_an_exact_method_gives_every_group_the_mean_of_its_slots_weights_over_rounds_of_some_slots(name):
    method, state, _ = played(name, seed=7)
    generator = draw(8)
    for _ in range(4):
        some = [slot for slot in TASKS if torch.rand((), generator=generator) < 0.6] or [Slot(0, 0)]
        updates = train(state, some, method=method, generator=generator)
        new = method.aggregate(state, updates)
        assert slots_exactness_error(state, updates, new) < 1e-6
        state = new


@pytest.mark.parametrize("name", METHODS)
def test_no_update_is_an_error_and_not_an_empty_state(name):
    with pytest.raises(ValueError, match="no slot sent an update"):
        build(name).aggregate(ClusteredState(make_state(draw(0))), {})
