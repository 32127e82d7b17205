"""FlexLoRA, HetLoRA and LoRA-FAIR, each by what its equation says of the mean of the clients' products."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_updates import LAYERS, draw, make_state, make_updates

from fedtalora_flwr.aggregation import ClientUpdate, GlobalState, LoraFactors, resolve
from fedtalora_flwr.aggregation.methods.hetlora import sparsity_weights

RANK, LAYER = 2, "blocks.0.attn.qkv"
SEEDS = st.integers(0, 2**31)


def product(pair: LoraFactors) -> torch.Tensor:
    return pair.scaling * pair.lora_B.double() @ pair.lora_A.double()


def mean_product(updates: list[ClientUpdate], name: str) -> torch.Tensor:
    total = sum(update.num_examples for update in updates)
    return sum(update.num_examples / total * product(update.adapters[name]) for update in updates)


def of_ranks(updates: list[ClientUpdate], ranks: list[int]) -> list[ClientUpdate]:
    """The updates with the first rows of their pairs alone."""
    return [
        replace(update, adapters={name: pair.parted(rank)[0] for name, pair in update.adapters.items()})
        for update, rank in zip(updates, ranks, strict=True)
    ]


def drawn(seed: int, *, rank: int = RANK, num_clients: int = 3) -> tuple[GlobalState, list[ClientUpdate]]:
    generator = draw(seed)
    state = make_state(generator, rank=rank)
    return state, make_updates(state, range(num_clients), generator=generator)


@given(seed=SEEDS, ranks=st.lists(st.integers(1, RANK), min_size=1, max_size=5))
def test_flexlora_broadcasts_the_best_pair_of_its_rank_for_the_mean_product_strongest_row_first(seed, ranks):
    state, updates = drawn(seed, num_clients=len(ranks))
    updates = of_ranks(updates, ranks)
    new = resolve("flexlora").aggregate(state, updates)
    assert new.residual == {}
    for name in LAYERS:
        wanted, pair = mean_product(updates, name), new.adapters[name]
        singular = torch.linalg.svdvals(wanted)
        for rank in range(RANK + 1):
            error = (wanted - product(pair.parted(rank)[0])).norm()
            least = singular[rank:].square().sum().sqrt()  # Eckart and Young: no pair of this rank is nearer
            torch.testing.assert_close(error, least, rtol=1e-4, atol=1e-5 * float(singular[0]))


def test_flexlora_keeps_the_broadcast_lora_A_where_nothing_was_learned_so_that_training_can_begin():
    state, updates = drawn(0)
    still = {name: replace(pair, lora_B=torch.zeros_like(pair.lora_B)) for name, pair in state.adapters.items()}
    new = resolve("flexlora").aggregate(state, [replace(update, adapters=still) for update in updates])
    for name, pair in new.adapters.items():
        assert torch.equal(pair.lora_A, state.adapters[name].lora_A) and not pair.lora_B.any()


@given(seed=SEEDS, scaling=st.sampled_from([0.25, 2.0]), rank=st.integers(1, 3))
def test_lora_fair_is_where_the_gradient_of_its_objective_is_zero_and_nearer_to_the_mean_than_fedit(
    seed, scaling, rank
):
    generator = draw(seed)
    state = make_state(generator, rank=rank, scaling=scaling)
    updates = make_updates(state, range(3), generator=generator)
    fair, plain = (resolve(name).aggregate(state, updates) for name in ("lora-fair", "fedit"))
    for name in LAYERS:
        wanted, mean, pair = mean_product(updates, name), plain.adapters[name], fair.adapters[name]
        assert torch.equal(pair.lora_A, mean.lora_A)
        lora_A = mean.lora_A.double()
        change = pair.lora_B.double() - mean.lora_B.double()
        penalty = 0.01 * lora_A.square().sum() / rank
        left = (wanted - product(pair)) / scaling
        gradient = penalty * change - left @ lora_A.T
        assert gradient.norm() < 1e-4 * (wanted.norm() / scaling * lora_A.norm())
        assert (wanted - product(pair)).norm() < (wanted - product(mean)).norm()


def test_lora_fair_leaves_the_mean_alone_where_averaging_loses_nothing():
    state, (update, *_) = drawn(1)
    fair, plain = (resolve(name).aggregate(state, [update]) for name in ("lora-fair", "fedit"))
    for name in LAYERS:
        torch.testing.assert_close(fair.adapters[name].lora_B, plain.adapters[name].lora_B)


def test_hetlora_weighs_by_examples_times_the_norm_of_the_product_and_pads_with_zeros():
    one, two = torch.tensor([[3.0], [4.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    small = LoraFactors(torch.tensor([[2.0, 0.0, 0.0]]), one, 0.5)  # a product of norm 0.5 * 5 * 2
    large = LoraFactors(torch.tensor([[0.0, 6.0, 0.0], [0.0, 0.0, 4.0]]), two, 0.5)  # 0.5 * (6^2 + 8^2)^0.5
    assert sparsity_weights([small, large], [0.25, 0.75]) == pytest.approx([0.25, 0.75])
    assert sparsity_weights([small, replace(large, scaling=1.0)], [0.5, 0.5]) == pytest.approx([1 / 3, 2 / 3])
    state = GlobalState({LAYER: LoraFactors(torch.zeros(2, 3), torch.zeros(2, 2), 0.5)})
    updates = [
        ClientUpdate(k, n, {LAYER: pair}, {}, torch.tensor([n]), 0)
        for k, (n, pair) in enumerate([(1, small), (3, large)])
    ]
    pair = resolve("hetlora").aggregate(state, updates).adapters[LAYER]
    assert pair.lora_A.tolist() == [[0.5, 4.5, 0.0], [0.0, 0.0, 3.0]]
    assert pair.lora_B.tolist() == [[1.5, 0.0], [1.0, 1.5]]


@given(seed=SEEDS, ranks=st.lists(st.integers(1, RANK), min_size=1, max_size=5))
def test_hetloras_weights_sum_to_one_and_do_not_depend_on_how_a_product_is_shared_out_over_its_factors(seed, ranks):
    _, updates = drawn(seed, num_clients=len(ranks))
    pairs = [update.adapters[LAYER] for update in of_ranks(updates, ranks)]
    examples = [1 / len(pairs)] * len(pairs)
    weights = sparsity_weights(pairs, examples)
    assert sum(weights) == pytest.approx(1)
    other = [LoraFactors(4 * pair.lora_A, pair.lora_B / 4, pair.scaling) for pair in pairs]
    assert sparsity_weights(other, examples) == pytest.approx(weights)


def test_hetlora_weighs_by_examples_where_nobody_has_learned_anything():
    _, updates = drawn(2)
    still = [replace(update.adapters[LAYER], lora_B=torch.zeros(7, RANK)) for update in updates]
    assert sparsity_weights(still, [0.5, 0.3, 0.2]) == [0.5, 0.3, 0.2]
