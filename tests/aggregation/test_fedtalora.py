from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_updates import (
    LAYERS,
    draw,
    effective,
    make_state,
    make_update,
    make_updates,
    mean_of_clients,
    pristine_weights,
    relative_error,
)

from fedtalora_flwr.aggregation import ClientUpdate, GlobalState, LoraFactors, exactness_error, resolve

NO_COUNTS = torch.zeros(0, dtype=torch.int64)


def client(partition_id: int, num_examples: int, lora_A: list, lora_B: list, *, scaling: float = 1.0) -> ClientUpdate:
    pair = LoraFactors(torch.tensor(lora_A), torch.tensor(lora_B), scaling)
    return ClientUpdate(partition_id, num_examples, {"fc": pair}, {}, NO_COUNTS, 0)


def start(*, d_out: int, d_in: int, scaling: float = 1.0) -> GlobalState:
    return GlobalState({"fc": LoraFactors(torch.zeros(1, d_in), torch.zeros(d_out, 1), scaling)})


def with_rank(update: ClientUpdate, rank: int, *, scaling: float, generator: torch.Generator) -> ClientUpdate:
    pairs = {
        name: LoraFactors(
            torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator), scaling
        )
        for name, (d_out, d_in) in LAYERS.items()
    }
    return replace(update, adapters=pairs)


def test_delta_is_scaling_times_b_times_a():
    pair = LoraFactors(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0], [1.0]]), 0.5)
    assert pair.rank == 1
    assert pair.delta().tolist() == [[5.0, 10.0, 15.0], [0.5, 1.0, 1.5]]


def test_clients_weigh_by_their_number_of_examples():
    updates = [client(0, 30, [[1.0, 0.0, 0.0]], [[4.0], [0.0]]), client(1, 10, [[0.0, 2.0, 0.0]], [[0.0], [8.0]])]
    new = resolve("fedtalora").aggregate(start(d_out=2, d_in=3), updates)
    assert new.adapters["fc"].lora_A.tolist() == [[0.75, 0.5, 0.0]]
    assert new.adapters["fc"].lora_B.tolist() == [[3.0], [2.0]]


def test_residual_is_the_mean_of_products_less_the_product_of_means_and_not_its_transpose():
    updates = [client(0, 30, [[1.0, 0.0, 0.0]], [[4.0], [0.0]]), client(1, 10, [[0.0, 2.0, 0.0]], [[0.0], [8.0]])]
    residual = resolve("fedtalora").aggregate(start(d_out=2, d_in=3), updates).residual["fc"]
    # mean of products [[3, 0, 0], [0, 4, 0]], product of means [[2.25, 1.5, 0], [1.5, 1, 0]]
    assert residual.tolist() == [pytest.approx([0.75, -1.5, 0.0]), pytest.approx([-1.5, 3.0, 0.0])]


def test_residual_of_a_square_layer_is_not_transposed():
    updates = [client(0, 1, [[2.0, 0.0]], [[2.0], [0.0]]), client(1, 1, [[0.0, 6.0]], [[2.0], [2.0]])]
    residual = resolve("fedtalora").aggregate(start(d_out=2, d_in=2), updates).residual["fc"]
    # mean of products [[2, 6], [0, 6]], product of means [[2, 6], [1, 3]]
    assert residual.tolist() == [[0.0, 0.0], [-1.0, 3.0]]


def test_residual_carries_the_scaling():
    updates = [
        client(0, 30, [[1.0, 0.0, 0.0]], [[4.0], [0.0]], scaling=8.0),
        client(1, 10, [[0.0, 2.0, 0.0]], [[0.0], [8.0]], scaling=8.0),
    ]
    residual = resolve("fedtalora").aggregate(start(d_out=2, d_in=3, scaling=8.0), updates).residual["fc"]
    assert residual.tolist() == [pytest.approx([6.0, -12.0, 0.0]), pytest.approx([-12.0, 24.0, 0.0])]


def test_residual_accumulates_over_rounds_and_does_not_replace():
    generator, method = draw(0), resolve("fedtalora")
    state = make_state(generator)
    first = method.aggregate(state, make_updates(state, [0, 1], generator=generator))
    updates = make_updates(first, [0, 1, 2], generator=generator)
    alone = method.aggregate(replace(first, residual={}), updates)
    both = method.aggregate(first, updates)
    for name in LAYERS:
        assert first.residual[name].norm() > 0.1
        torch.testing.assert_close(both.residual[name], first.residual[name] + alone.residual[name])


def test_replace_errs_by_exactly_what_had_accumulated():
    generator, method = draw(1), resolve("fedtalora", {"residual": "replace"})
    assert not method.exact
    pristine, state = pristine_weights(generator), make_state(generator)
    first = method.aggregate(state, make_updates(state, [0, 1, 2], generator=generator))
    updates = make_updates(first, [1, 3], generator=generator)
    wanted = mean_of_clients(pristine, first, updates)
    second = method.aggregate(first, updates)
    got = effective(pristine, second.residual, second.adapters)
    assert relative_error(got, wanted) > 0.01
    for name in LAYERS:
        torch.testing.assert_close(wanted[name] - got[name], first.residual[name].double(), rtol=1e-4, atol=1e-5)


def test_off_sends_no_residual_and_errs_in_the_first_round():
    generator, method = draw(2), resolve("fedtalora", {"residual": "off"})
    assert not method.exact
    pristine, state = pristine_weights(generator), make_state(generator)
    updates = make_updates(state, [0, 1, 2], generator=generator)
    new = method.aggregate(state, updates)
    assert new.residual == {}
    wanted = mean_of_clients(pristine, state, updates)
    assert relative_error(effective(pristine, new.residual, new.adapters), wanted) > 0.01


@pytest.mark.parametrize("residual", ["replace", "off"])
def test_ablations_are_not_exact_over_several_rounds(residual):
    generator, method = draw(3), resolve("fedtalora", {"residual": residual})
    state = make_state(generator)
    for _ in range(4):
        updates = make_updates(state, [0, 1, 2], generator=generator, spread=0.5)
        new_state = method.aggregate(state, updates)
        error = exactness_error(state, updates, new_state)
        state = new_state
    assert error > 1e-3


@given(seed=st.integers(0, 2**31), spread=st.sampled_from([1e-3, 1.0]))
def test_one_client_alone_leaves_no_residual(seed, spread):
    generator, method = draw(seed), resolve("fedtalora")
    state = make_state(generator)
    new = method.aggregate(state, [make_update(state, 3, generator=generator, spread=spread)])
    assert all(torch.count_nonzero(value) == 0 for value in new.residual.values())


@given(seed=st.integers(0, 2**31), num_clients=st.integers(2, 8))
def test_residual_of_clients_a_ten_thousandth_apart_is_good_to_five_digits(seed, num_clients):
    generator = draw(seed)
    state = make_state(generator)
    updates = make_updates(state, range(num_clients), generator=generator, spread=1e-4)
    new = resolve("fedtalora").aggregate(state, updates)
    weights = [u.num_examples / sum(u.num_examples for u in updates) for u in updates]
    for name, pair in state.adapters.items():
        pairs = [u.adapters[name] for u in updates]
        mean_A = sum(p * f.lora_A.double() for p, f in zip(weights, pairs, strict=True))
        mean_B = sum(p * f.lora_B.double() for p, f in zip(weights, pairs, strict=True))
        products = [p * (f.lora_B.double() @ f.lora_A.double()) for p, f in zip(weights, pairs, strict=True)]
        wanted = pair.scaling * (sum(products) - mean_B @ mean_A)
        assert (new.residual[name] - wanted).norm() < 1e-5 * wanted.norm()


@given(
    seed=st.integers(0, 2**31),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    server_rank=st.integers(1, 3),
    num_rounds=st.integers(1, 3),
)
def test_aggregate_is_exact_for_clients_of_different_rank_and_scaling(seed, ranks, server_rank, num_rounds):
    generator, method = draw(seed), resolve("fedtalora")
    pristine, state = pristine_weights(generator), make_state(generator, rank=server_rank)
    for _ in range(num_rounds):
        updates = [
            with_rank(u, rank, scaling=8.0 / rank, generator=generator)
            for u, rank in zip(make_updates(state, range(len(ranks)), generator=generator), ranks, strict=True)
        ]
        wanted = mean_of_clients(pristine, state, updates)
        state = method.aggregate(state, updates)
        assert {pair.rank for pair in state.adapters.values()} == {server_rank}
        assert relative_error(effective(pristine, state.residual, state.adapters), wanted) < 1e-6


def test_direction_that_no_client_of_lower_rank_uses_can_still_be_trained():
    generator = draw(6)
    state = make_state(generator, rank=3)
    update = with_rank(make_update(state, 0, generator=generator), 1, scaling=1.0, generator=generator)
    pair = resolve("fedtalora").aggregate(state, [update]).adapters["blocks.0.attn.qkv"]
    # B and A both zero would be a saddle: neither would ever get a gradient
    assert (pair.lora_A.norm(dim=1) + pair.lora_B.norm(dim=0)).min() > 1e-3


def test_clients_of_another_rank_that_learned_nothing_leave_a_pair_that_can_be_trained():
    generator = draw(7)
    state = make_state(generator, rank=3)
    update = with_rank(make_update(state, 0, generator=generator), 1, scaling=1.0, generator=generator)
    idle = {name: replace(pair, lora_B=0 * pair.lora_B) for name, pair in update.adapters.items()}
    new = resolve("fedtalora").aggregate(state, [replace(update, adapters=idle)])
    for name, pair in new.adapters.items():
        assert torch.equal(pair.lora_A, state.adapters[name].lora_A)
        assert torch.count_nonzero(pair.lora_B) == torch.count_nonzero(new.residual[name]) == 0


def test_unknown_residual_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="accumulate, replace, off, got 'keep'"):
        resolve("fedtalora", {"residual": "keep"})


def test_updates_without_an_example_are_refused():
    state = make_state(draw(0))
    update = replace(make_update(state, 0, generator=draw(1)), num_examples=0)
    with pytest.raises(ValueError, match="1 updates hold 0 examples"):
        resolve("fedtalora").aggregate(state, [update])
