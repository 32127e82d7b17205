"""A client of a lower rank: what it starts from, what comes back, and that the mean is of what was trained."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_updates import (
    LAYERS,
    build,
    draw,
    effective,
    make_state,
    make_update,
    make_updates,
    mean_of_clients,
    pristine_weights,
    relative_error,
    tensors_of,
)

from fedtalora_flwr import aggregation
from fedtalora_flwr.aggregation import Aggregator, completed, exactness_error, held, truncated

RANK = 3
METHODS = [build(name) for name in aggregation.available()]
EXACT = [
    method
    for method in METHODS
    if isinstance(method, Aggregator) and method.exact and not (method.dense or method.core)
]
SEEDS = st.integers(0, 2**31)


def in_midst_of_a_run(generator):
    state = make_state(generator, rank=RANK)
    return replace(state, residual=pristine_weights(generator))


@given(seed=SEEDS, rank=st.integers(1, RANK))
def test_client_of_a_lower_rank_begins_with_the_servers_model_where_the_other_rows_are_held(seed, rank):
    generator = draw(seed)
    state, pristine = in_midst_of_a_run(generator), pristine_weights(generator)
    begun = held(state, rank)
    assert {pair.rank for pair in begun.adapters.values()} == {rank}
    wanted = effective(pristine, state.residual, state.adapters)
    assert relative_error(effective(pristine, begun.residual, begun.adapters), wanted) < 1e-6


def test_other_rows_go_into_a_residual_that_is_not_there_yet():
    state = make_state(draw(0), rank=RANK)
    begun = held(state, 1)
    for name, pair in state.adapters.items():
        torch.testing.assert_close(begun.residual[name], pair.delta() - begun.adapters[name].delta())
    assert held(state, RANK).residual == {} and state.residual == {}


def test_client_that_trains_all_rows_gets_the_state_as_it_is():
    state = in_midst_of_a_run(draw(1))
    assert held(state, None) is truncated(state, None) is state
    assert all(torch.equal(value, tensors_of(state)[key]) for key, value in tensors_of(held(state, RANK)).items())


@pytest.mark.parametrize("method", EXACT, ids=lambda method: f"{type(method).__name__}-{sorted(method.trainable)}")
@given(seed=SEEDS, ranks=st.lists(st.integers(1, RANK), min_size=1, max_size=5))
def test_exact_methods_are_exact_over_rounds_with_respect_to_the_models_that_clients_of_mixed_ranks_trained(
    method, seed, ranks
):
    generator = draw(seed)
    state, pristine = make_state(generator, rank=RANK), pristine_weights(generator)
    for _ in range(3):
        updates, models = [], []
        for k, rank in enumerate(ranks):
            begun = truncated(state, rank) if method.truncates else held(state, rank)
            update = make_update(begun, k, generator=generator, spread=0.5, trainable=method.trains(state.version))
            models.append((update.num_examples, effective(pristine, begun.residual, update.adapters)))
            if not method.truncates:
                whole = {name: completed(pair, state.adapters[name]) for name, pair in update.adapters.items()}
                update = replace(update, adapters=whole)
            updates.append(update)
        total = sum(n for n, _ in models)
        wanted = {name: sum(n / total * model[name] for n, model in models) for name in LAYERS}
        assert relative_error(mean_of_clients(pristine, state, updates), wanted) < 1e-6  # what verify compares with
        new = method.aggregate(state, updates)
        assert relative_error(effective(pristine, new.residual, new.adapters), wanted) < 1e-6
        assert exactness_error(state, updates, new) < 1e-5  # float32, relative to what was learned
        state = new


def test_row_that_was_not_trained_comes_back_as_it_was_sent_whatever_the_clients_scaling():
    state = make_state(draw(2), rank=RANK)
    (update,) = make_updates(truncated(state, 1), [0], generator=draw(3))
    for name, sent in state.adapters.items():
        pair = replace(update.adapters[name], scaling=8.0)
        whole = completed(pair, sent)
        rest = sent.parted(1)[1].delta()
        torch.testing.assert_close(whole.delta(), pair.delta() + rest, rtol=1e-4, atol=1e-5)
        assert completed(sent, sent) is sent
