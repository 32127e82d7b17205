from dataclasses import replace

import pytest
from made_updates import draw, make_state, make_updates

from fedtalora_flwr.aggregation import exactness_error, resolve


@pytest.fixture
def rounds():
    """State, updates and new state of the second round of an exact method."""
    generator, method = draw(0), resolve("fedtalora")
    state = make_state(generator)
    state = method.aggregate(state, make_updates(state, [0, 1, 2], generator=generator))
    updates = make_updates(state, [2, 0, 5], generator=generator)
    return state, updates, method.aggregate(state, updates)


def test_exactness_error_of_an_exact_aggregate_is_rounding(rounds):
    assert exactness_error(*rounds) < 1e-6


def test_exactness_error_sees_a_residual_that_is_a_thousandth_off(rounds):
    state, updates, new_state = rounds
    wounded = {name: 1.001 * value for name, value in new_state.residual.items()}
    assert exactness_error(state, updates, replace(new_state, residual=wounded)) > 1e-5


def test_exactness_error_sees_one_wounded_layer_among_sound_ones(rounds):
    state, updates, new_state = rounds
    wounded = {**new_state.residual, "blocks.1.mlp.fc2": -new_state.residual["blocks.1.mlp.fc2"]}
    assert exactness_error(state, updates, replace(new_state, residual=wounded)) > 1e-2


def test_exactness_error_sees_a_residual_that_was_lost(rounds):
    state, updates, new_state = rounds
    assert exactness_error(state, updates, replace(new_state, residual={})) > 1e-2


def test_exactness_error_sees_clients_that_were_weighed_alike(rounds):
    state, updates, new_state = rounds
    assert exactness_error(state, [replace(u, num_examples=1) for u in updates], new_state) > 1e-2


def test_exactness_error_of_layers_that_nobody_moved_is_zero():
    state = make_state(draw(1))
    pairs = {name: replace(pair, lora_B=0 * pair.lora_B) for name, pair in state.adapters.items()}
    state = replace(state, adapters=pairs)
    updates = make_updates(state, [0, 1], generator=draw(2), spread=0.0)
    assert exactness_error(state, updates, resolve("fedtalora").aggregate(state, updates)) == 0.0
