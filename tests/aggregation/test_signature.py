"""Inner products of adapters from their factors, against the dense products they stand for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_updates import LAYERS, draw

from fedtalora_flwr.aggregation import LoraFactors
from fedtalora_flwr.aggregation.signature import SIGNATURES, lora_B_gram, product_gram, raw_gram


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
