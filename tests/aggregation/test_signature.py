"""Inner products of adapters from their factors, against the dense products they stand for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_updates import LAYERS, draw

from fedtalora_flwr.aggregation import LoraFactors
from fedtalora_flwr.aggregation.clustering import directions, in_matched_group, kmeans
from fedtalora_flwr.aggregation.signature import (
    SIGNATURES,
    changes_of_factors,
    lora_B_gram,
    moments_gram,
    product_gram,
    raw_gram,
)


def make_adapters(ranks, *, generator, scaling=2.0):
    def pair(rank, d_out, d_in):
        lora_A = torch.randn(rank, d_in, generator=generator)
        return LoraFactors(lora_A, torch.randn(d_out, rank, generator=generator), scaling)

    return [{name: pair(rank, *shape) for name, shape in LAYERS.items()} for rank in ranks]


def in_another_gauge(adapters, *, generator):
    def turned(pair):
        M = torch.eye(pair.rank) + 0.3 * torch.randn(pair.rank, pair.rank, generator=generator)
        return LoraFactors(torch.linalg.inv(M) @ pair.lora_A, pair.lora_B @ M, pair.scaling)

    return {name: turned(pair) for name, pair in adapters.items()}


@given(seed=st.integers(0, 2**31), ranks=st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_product_gram_is_that_of_the_dense_products_whatever_the_ranks(seed, ranks):
    adapters = make_adapters(ranks, generator=draw(seed))
    dense = torch.stack([torch.cat([pair.delta().double().flatten() for pair in one.values()]) for one in adapters])
    torch.testing.assert_close(product_gram(adapters), dense @ dense.T, rtol=1e-5, atol=1e-4)


@given(seed=st.integers(0, 2**31), rank=st.integers(1, 3))
def test_product_gram_does_not_see_the_gauge_and_the_raw_one_does(seed, rank):
    generator = draw(seed)
    adapters = make_adapters([rank] * 4, generator=generator)
    turned = [in_another_gauge(one, generator=generator) for one in adapters]
    same = product_gram(adapters)
    close = {"rtol": 1e-3, "atol": 1e-3 * float(same.diagonal().max())}
    torch.testing.assert_close(product_gram(turned), same, **close)
    assert not torch.allclose(raw_gram(turned), raw_gram(adapters), rtol=1e-3, atol=1e-3)


def test_grams_of_hand_made_pairs():
    first = {"fc": LoraFactors(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.0], [1.0]]), 2.0)}
    second = {"fc": LoraFactors(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0], [5.0], [0.0]]), 2.0)}
    # B A = [[3, 6], [0, 0], [1, 2]] and [[0, 1], [0, 5], [0, 0]], twice
    assert product_gram([first, second]).tolist() == [[200.0, 24.0], [24.0, 104.0]]
    assert lora_B_gram([first, second]).tolist() == [[10.0, 3.0], [3.0, 26.0]]
    assert raw_gram([first, second]).tolist() == [[15.0, 5.0], [5.0, 27.0]]


@pytest.mark.parametrize("name", ["lora_B", "raw"])
def test_flattened_factors_of_different_ranks_are_refused(name):
    with pytest.raises(ValueError, match=r"blocks.0.attn.qkv: adapters of ranks \[1, 3\] compare by their product"):
        SIGNATURES[name](make_adapters([3, 1], generator=draw(0)))


@given(seed=st.integers(0, 2**31), ranks=st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_moments_gram_is_that_of_the_dense_second_moments_whatever_the_ranks(seed, ranks):
    changes = make_adapters(ranks, generator=draw(seed))
    wanted = torch.zeros(len(ranks), len(ranks), dtype=torch.float64)
    for name in LAYERS:
        factors = [[one[name].lora_A.double() for one in changes], [one[name].lora_B.T.double() for one in changes]]
        for rows in factors:
            moments = torch.stack([(one.T @ one).flatten() for one in rows])
            unit = moments / moments.norm(dim=1, keepdim=True)
            wanted += unit @ unit.T / (2 * len(LAYERS))
    torch.testing.assert_close(moments_gram(changes), wanted)


def test_factor_that_did_not_change_is_like_no_other():
    (start,), (one, other) = make_adapters([2], generator=draw(0)), make_adapters([2, 2], generator=draw(1))
    name = next(iter(LAYERS))
    other[name] = LoraFactors(start[name].lora_A, start[name].lora_B, 2.0)
    gram = moments_gram([changes_of_factors(start, after) for after in (one, other)])
    same = len(LAYERS)
    assert gram[0, 0] == pytest.approx(1) and gram[1, 1] == pytest.approx((same - 1) / same)
    assert 0 < gram[0, 1] < gram[1, 1]


def test_slots_that_learn_opposite_things_from_data_of_one_kind_are_found_by_moments_and_not_by_products():
    """Two kinds of inputs, each in a subspace of its own; what is learned from them has a sign of the slot's own."""
    generator, tasks, layers = draw(3), [0, 1] * 10, [f"layer.{number}" for number in range(12)]

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    start = {name: LoraFactors(normal(1, 32), torch.zeros(24, 1), 1.0) for name in layers}
    kinds = [{name: normal(3, 32) for name in layers} for _ in range(2)]
    after = [
        {
            name: LoraFactors(pair.lora_A + 0.1 * normal(1, 3) @ kinds[task][name], 0.1 * normal(24, 1), 1.0)
            for name, pair in start.items()
        }
        for task in tasks
    ]

    def found(gram):
        groups = kmeans(directions(gram.numpy(), num_dims=2), num_clusters=2, seed=0)
        return sum(in_matched_group(groups.tolist(), tasks)) / len(tasks)

    assert found(moments_gram([changes_of_factors(start, one) for one in after])) == 1
    assert found(product_gram(after)) < 0.8
