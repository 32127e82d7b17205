"""Inner products between LoRA adapters, from the factors alone: what adapters are clustered on.

A pair (B, A) and ``(B M, M^-1 A)`` are one and the same layer, so the flattened factors say as much about the gauge M
as about what was learned. The product B A does not know the gauge, and its inner products need no dense matrix:

    <B_i A_i, B_j A_j>  =  tr((B_j^T B_i) (A_i A_j^T))

which for n adapters of rank r are two (n r, n r) Gram matrices a layer, times each other, summed over blocks.

What a slot *changes* in a round is a pair too, of twice the rank (`change`):  B' A' - B A = [B', -B] [A'; A].
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fedtalora_flwr.aggregation.factors import LoraFactors

Adapters = Mapping[str, LoraFactors]


def change(before: Adapters, after: Adapters) -> Adapters:
    """Give what has come to adapters, ``delta after - delta before`` of each layer, in factors."""
    changed = {}
    for name, old in before.items():
        new = after[name]
        left = torch.cat([new.scaling * new.lora_B, -old.scaling * old.lora_B], 1)
        changed[name] = LoraFactors(torch.cat([new.lora_A, old.lora_A]), left, 1.0)
    return changed


def product_gram(adapters: Sequence[Adapters]) -> Tensor:
    """Give ``sum over layers <delta_i, delta_j>`` of n adapters, of any ranks: (n, n) float64."""
    gram = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for name in adapters[0]:
        pairs = [one[name] for one in adapters]
        stacked_A = torch.cat([pair.lora_A.double() for pair in pairs], 0)  # (sum r_i, d_in)
        stacked_B = torch.cat([pair.scaling * pair.lora_B.double() for pair in pairs], 1)  # (d_out, sum r_i)
        products = (stacked_B.T @ stacked_B).mul_(stacked_A @ stacked_A.T)  # (sum r_i, sum r_i)
        owner = torch.repeat_interleave(torch.arange(len(pairs)), torch.tensor([pair.rank for pair in pairs]))
        rows = gram.new_zeros(len(pairs), len(owner)).index_add_(0, owner, products)
        gram.index_add_(1, owner, rows)
    return gram


def lora_B_gram(adapters: Sequence[Adapters]) -> Tensor:
    """Give ``sum over layers <B_i, B_j>``: right while all share one A, as in a first round or with A frozen."""
    return _flat_gram(adapters, ("lora_B",))


def raw_gram(adapters: Sequence[Adapters]) -> Tensor:
    """Give the inner products of the flattened (A, B), the paper's own choice; it sees the gauge."""
    return _flat_gram(adapters, ("lora_A", "lora_B"))


def _flat_gram(adapters: Sequence[Adapters], factors: tuple[str, ...]) -> Tensor:
    gram = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for name in adapters[0]:
        ranks = sorted({one[name].rank for one in adapters})
        if len(ranks) > 1:
            raise ValueError(f"{name}: adapters of ranks {ranks} compare by their product only; take signature product")
        for factor in factors:
            flat = torch.stack([getattr(one[name], factor).double().flatten() for one in adapters])  # (n, d r)
            gram.addmm_(flat, flat.T)
    return gram


SIGNATURES: Mapping[str, Callable[[Sequence[Adapters]], Tensor]] = {
    "product": product_gram,
    "changes": product_gram,  # of the rounds' changes
    "lora_B": lora_B_gram,
    "raw": raw_gram,
}
