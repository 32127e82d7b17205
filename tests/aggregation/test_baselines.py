"""The methods that others published, each by what its paper says of it."""

from dataclasses import replace

import pytest
import torch
from made_updates import (
    BOTH,
    LAYERS,
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
from torch.utils.flop_counter import FlopCounterMode

from fedtalora_flwr.aggregation import BadUpdate, GlobalState, LoraFactors, check_update, resolve


def start(**settings):
    generator = draw(0)
    state = make_state(generator, **settings)
    return state, make_updates(state, [0, 3, 1], generator=generator)


@pytest.mark.parametrize("name", ["fedtalora", "fedit", "fedex", "flora"])
def test_methods_that_train_both_factors_say_so(name):
    assert resolve(name).trainable == BOTH


def test_what_averaging_loses_is_not_worked_out_where_nobody_uses_it():
    size, num_clients = 64, 5
    method, state = resolve("full"), GlobalState({"fc": LoraFactors.dense(d_in=size, d_out=size)})
    updates = make_updates(state, range(num_clients), generator=draw(0), trainable=method.trainable)
    with FlopCounterMode(display=False) as counter:
        method.aggregate(state, updates)
    assert 0 < counter.get_total_flops() < num_clients * size**3  # one product of the pairs is more


def test_fedit_is_fedtalora_without_its_residual():
    state, updates = start()
    fedit, off = resolve("fedit"), resolve("fedtalora", {"residual": "off"})
    got, wanted = tensors_of(fedit.aggregate(state, updates)), tensors_of(off.aggregate(state, updates))
    assert got.keys() == wanted.keys() and not fedit.exact
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_fedit_stays_plain_whatever_the_setting_of_the_residual():
    state, updates = start()
    assert resolve("fedit", {"residual": "accumulate"}).aggregate(state, updates).residual == {}


def test_ffa_lora_keeps_lora_a_to_the_bit_over_rounds_and_leaves_no_residual():
    generator, method = draw(1), resolve("ffa-lora")
    state = first = make_state(generator)
    for _ in range(20):
        updates = make_updates(state, range(7), generator=generator, trainable=method.trainable)
        state = method.aggregate(state, updates)
    assert state.residual == state.step == {}
    for name, pair in first.adapters.items():
        assert torch.equal(state.adapters[name].lora_A, pair.lora_A)
        assert not torch.equal(state.adapters[name].lora_B, pair.lora_B)


def test_ffa_lora_refuses_a_client_that_trained_the_frozen_factor():
    state, (update, *_) = start()
    check_update(state, update)
    with pytest.raises(BadUpdate, match=r"blocks.0.attn.qkv.lora_A has changed, but the method keeps it frozen"):
        check_update(state, update, trainable=resolve("ffa-lora").trainable)


@pytest.mark.parametrize("method", ["ffa-lora", "full"])
def test_another_scaling_is_refused_where_a_factor_is_frozen(method):
    trainable = resolve(method).trainable
    state = make_state(draw(0))
    update = make_update(state, 0, generator=draw(1), trainable=trainable)
    check_update(state, update, trainable=trainable)
    scaled = {name: replace(pair, scaling=2 * pair.scaling) for name, pair in update.adapters.items()}
    with pytest.raises(BadUpdate, match=r"blocks.0.attn.qkv: scaling 4.0, the server's is 2.0, and a factor is frozen"):
        check_update(state, replace(update, adapters=scaled), trainable=trainable)
    check_update(state, replace(update, adapters=scaled))


def test_fedex_has_fedtaloras_weights_to_the_bit_and_nothing_but_the_dense_residual_to_send():
    generator, fedex, fedtalora = draw(2), resolve("fedex"), resolve("fedtalora")
    ours = theirs = make_state(generator)
    for _ in range(3):
        updates = make_updates(ours, [0, 1], generator=generator)
        ours, theirs = fedtalora.aggregate(ours, updates), fedex.aggregate(theirs, updates)
    got, wanted = tensors_of(theirs), tensors_of(ours)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    assert ours.step and not theirs.step


def test_flora_takes_all_that_was_learned_into_the_residual_and_starts_a_pair_that_adds_nothing():
    state, updates = start()
    new = resolve("flora").aggregate(state, updates)
    pristine = pristine_weights(draw(9))
    merged = {name: pristine[name].double() + new.residual[name].double() for name in LAYERS}
    assert relative_error(merged, mean_of_clients(pristine, state, updates)) < 1e-6
    for pair in new.adapters.values():
        assert torch.count_nonzero(pair.lora_B) == 0 and pair.lora_A.norm() > 0.1


def test_flora_draws_another_pair_for_every_round_and_seed_and_the_same_for_the_same():
    state, updates = start()
    later = replace(state, version=1)
    drawn = {
        (seed, given.version): resolve("flora", {"seed": seed}).aggregate(given, updates).adapters["blocks.0.attn.qkv"]
        for seed in (0, 1)
        for given in (state, later)
    }
    again = resolve("flora", {"seed": 1}).aggregate(later, updates).adapters["blocks.0.attn.qkv"]
    assert torch.equal(again.lora_A, drawn[1, 1].lora_A)
    starts = [pair.lora_A for pair in drawn.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(starts) for b in starts[:i])


def with_rank(update, rank, *, generator):
    def pair(d_out, d_in):
        lora_A = torch.randn(rank, d_in, generator=generator)
        return LoraFactors(lora_A, torch.randn(d_out, rank, generator=generator), 8 / rank)

    return replace(update, adapters={name: pair(*shape) for name, shape in LAYERS.items()})


def test_flora_is_exact_for_clients_of_different_rank():
    state, updates = start(rank=2)
    generator = draw(4)
    updates = [with_rank(update, rank, generator=generator) for update, rank in zip(updates, (1, 4, 3), strict=True)]
    new, pristine = resolve("flora").aggregate(state, updates), pristine_weights(generator)
    wanted = mean_of_clients(pristine, state, updates)
    assert relative_error(effective(pristine, new.residual, new.adapters), wanted) < 1e-6
    assert {pair.rank for pair in new.adapters.values()} == {2}


def test_flora_sends_the_stack_where_it_is_smaller_than_the_dense_matrix():
    generator = draw(5)
    state = make_state(generator, rank=1)
    one, many = (resolve("flora").aggregate(state, make_updates(state, range(k), generator=generator)) for k in (1, 9))
    assert one.step.keys() == LAYERS.keys() and not many.step
    for name, step in one.step.items():
        assert torch.equal(step.added_to(None), one.residual[name])
