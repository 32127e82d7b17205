"""Every method that says it is exact: its aggregate is the FedAvg of the clients' effective weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_updates import (
    build,
    draw,
    effective,
    make_state,
    make_updates,
    mean_of_clients,
    pristine_weights,
    relative_error,
    tensors_of,
)

from fedtalora_flwr import aggregation
from fedtalora_flwr.aggregation import Aggregator, exactness_error

METHODS = [name for name in aggregation.available() if isinstance(build(name), Aggregator)]
EXACT = [name for name in METHODS if build(name).exact]


@pytest.mark.parametrize("name", EXACT)
@given(
    seed=st.integers(0, 2**31),
    num_clients=st.integers(1, 7),
    rank=st.integers(1, 3),
    scaling=st.sampled_from([0.25, 1.0, 2.0]),
    num_rounds=st.integers(1, 5),
)
def test_aggregate_equals_the_weighted_mean_of_client_weights_over_rounds_of_random_clients(
    name, seed, num_clients, rank, scaling, num_rounds
):
    generator, method = draw(seed), build(name)
    pristine = pristine_weights(generator)
    state = make_state(generator, rank=rank, scaling=scaling, dense=method.dense)
    for _ in range(num_rounds):
        present = torch.randperm(10, generator=generator)[:num_clients].tolist()
        updates = make_updates(state, present, generator=generator, spread=0.5, trainable=method.trains(state.version))
        wanted = mean_of_clients(pristine, state, updates)
        state = method.aggregate(state, updates)
        assert relative_error(effective(pristine, state.residual, state.adapters), wanted) < 1e-6


@pytest.mark.parametrize("name", EXACT)
@given(seed=st.integers(0, 2**31))
def test_exactness_error_agrees_that_an_exact_method_is_exact(name, seed):
    generator, method = draw(seed), build(name)
    state = make_state(generator, dense=method.dense)
    for _ in range(3):
        updates = make_updates(state, [0, 4, 2], generator=generator, trainable=method.trains(state.version))
        new_state = method.aggregate(state, updates)
        assert exactness_error(state, updates, new_state) < 1e-6
        state = new_state


@pytest.mark.parametrize("name", METHODS)
def test_order_of_replies_does_not_change_a_bit_of_the_aggregate(name):
    generator, method = draw(3), build(name)
    state = make_state(generator, rank=3, dense=method.dense)
    updates = make_updates(state, range(9), generator=generator, trainable=method.trains(state.version))
    wanted = tensors_of(method.aggregate(state, updates))
    for _ in range(10):
        shuffled = [updates[i] for i in torch.randperm(9, generator=generator)]
        got = tensors_of(method.aggregate(state, shuffled))
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", METHODS)
def test_aggregate_changes_neither_the_state_nor_the_updates(name):
    generator, method = draw(4), build(name)
    state = make_state(generator, dense=method.dense)
    state = method.aggregate(
        state, make_updates(state, [0, 1], generator=generator, trainable=method.trains(state.version))
    )
    updates = make_updates(state, [5, 1, 3], generator=generator, trainable=method.trains(state.version))
    given = [tensors_of(state), *(tensors_of(update) | {"counts": update.class_counts} for update in updates)]
    before = [{key: value.clone() for key, value in tensors.items()} for tensors in given]
    order = [update.partition_id for update in updates]
    method.aggregate(state, updates)
    assert [update.partition_id for update in updates] == order
    for tensors, copies in zip(given, before, strict=True):
        assert all(torch.equal(tensors[key], copies[key]) for key in copies)


@pytest.mark.parametrize("name", METHODS)
def test_each_aggregation_is_one_version_on(name):
    generator, method = draw(5), build(name)
    state = make_state(generator, dense=method.dense, version=6)
    updates = make_updates(state, [0], generator=generator, trainable=method.trains(state.version))
    assert method.aggregate(state, updates).version == 7


@pytest.mark.parametrize("name", METHODS)
def test_no_update_is_an_error_and_not_an_empty_state(name):
    with pytest.raises(ValueError, match="nothing to average"):
        build(name).aggregate(make_state(draw(0)), [])
