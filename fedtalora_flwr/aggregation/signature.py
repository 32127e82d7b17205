"""Inner products between LoRA adapters, from the factors alone: what adapters are clustered on.

A pair (B, A) and ``(B M, M^-1 A)`` are one and the same layer, so the flattened factors say as much about the gauge M
as about what was learned. The product B A does not know the gauge, and its inner products need no dense matrix:

    <B_i A_i, B_j A_j>  =  tr((B_j^T B_i) (A_i A_j^T))

which for n adapters of rank r are two (n r, n r) Gram matrices a layer, times each other, summed over blocks.

What a slot *changes* in a round is a pair too, of twice the rank (`change`):  B' A' - B A = [B', -B] [A'; A].

The sign of such a change is the labels': it says what a slot's classes are, of which two clients with the same task may
hold different ones. What kind of data a task has is in the changes of the two factors by themselves, D_A and D_B. The
gradient of lora_A is ``s B^T delta x^T``, that of lora_B ``s delta (A x)^T``, sums over a layer's inputs x and what
comes back, delta: so they lie in the span of these, with signs that the labels give. Second moments have no sign, and
their inner products are as cheap (`moments_gram`):

    <D_A^T D_A, E_A^T E_A>  =  ||D_A E_A^T||^2,    <D_B D_B^T, E_B E_B^T>  =  ||D_B^T E_B||^2
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


def changes_of_factors(before: Adapters, after: Adapters) -> Adapters:
    """Give by how much each factor changed, in the place of the factor."""
    return {
        name: LoraFactors(after[name].lora_A - old.lora_A, after[name].lora_B - old.lora_B, 1.0)
        for name, old in before.items()
    }


def product_gram(adapters: Sequence[Adapters]) -> Tensor:
    """Give ``sum over layers <delta_i, delta_j>`` of n adapters, of any ranks: (n, n) float64."""
    gram = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for name in adapters[0]:
        pairs = [one[name] for one in adapters]
        stacked_A = torch.cat([pair.lora_A.double() for pair in pairs], 0)  # (sum r_i, d_in)
        stacked_B = torch.cat([pair.scaling * pair.lora_B.double() for pair in pairs], 1)  # (d_out, sum r_i)
        products = (stacked_B.T @ stacked_B).mul_(stacked_A @ stacked_A.T)  # (sum r_i, sum r_i)
        owner = torch.repeat_interleave(torch.arange(len(pairs)), torch.tensor([pair.rank for pair in pairs]))
        gram += _summed(products, owner, len(pairs))
    return gram


def _summed(products: Tensor, owner: Tensor, n: int) -> Tensor:
    """Add up the rows and columns, (sum r_i, sum r_i), of each of n owners: (n, n)."""
    rows = products.new_zeros(n, len(owner)).index_add_(0, owner, products)
    return products.new_zeros(n, n).index_add_(1, owner, rows)


def moments_gram(changes: Sequence[Adapters]) -> Tensor:
    """Give the mean cosine of the second moments of n changes, over the layers and both factors: (n, n) float64.

    Where a factor did not change, it is like no other.
    """
    total = torch.zeros(len(changes), len(changes), dtype=torch.float64)
    for name in changes[0]:
        pairs = [one[name] for one in changes]
        owner = torch.repeat_interleave(torch.arange(len(pairs)), torch.tensor([pair.rank for pair in pairs]))
        for rows in (torch.cat([p.lora_A for p in pairs], 0), torch.cat([p.lora_B.T for p in pairs], 0)):
            rows = rows.double()  # (sum r_i, d)
            moments = _summed((rows @ rows.T).square_(), owner, len(pairs))
            length = moments.diagonal().sqrt()
            total += (moments / torch.outer(length, length)).nan_to_num_(nan=0.0)
    return total / (2 * len(changes[0]))


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
    "changes": product_gram,
    "moments": moments_gram,
    "lora_B": lora_B_gram,
    "raw": raw_gram,
}

# Those of them that are taken of what a slot changed in a round, and added up over the rounds.
OF_A_ROUND: Mapping[str, Callable[[Adapters, Adapters], Adapters]] = {"changes": change, "moments": changes_of_factors}
