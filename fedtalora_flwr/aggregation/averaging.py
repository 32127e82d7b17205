"""One layer's mean over clients: the mean of the factors, and exactly what it loses against the mean of the products.

With weights p_k that sum to 1 and one scaling s,

    sum_k p_k s B_k A_k  =  s Bbar Abar  +  s sum_k p_k (B_k - Bbar)(A_k - Abar)

and the last term, what is lost, is a product of inner size (K-1) r (`contrasts`).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedtalora_flwr.aggregation.factors import LoraFactors, Step, by_strength, on_grid, pays

_WIDEST = 4096  # inner size of one product: bounds the memory beside the factors, whatever the number of clients


def average_factors(
    factors: Sequence[LoraFactors], weights: Sequence[float], *, like: LoraFactors
) -> tuple[LoraFactors, Step | Tensor]:
    """Average one layer's factors.

    Parameters
    ----------
    factors
        The clients' pairs, K of them, in summation order.
    weights
        p_k, summing to 1.
    like
        The broadcast pair, whose rank and scaling the average has.

    Returns
    -------
    The averaged pair, and what it loses against the mean of the products,
    ``sum_k p_k delta_k - average.delta()``: a `Step` where factors hold fewer numbers, else (d_out, d_in) float32.
    """
    if not _are_alike(factors, like=like):
        return _best_and_lost(factors, weights, like=like)
    p = torch.tensor(weights, dtype=torch.float64)
    mean = _mean(factors, p.float(), origin=like)
    if pays((len(factors) - 1) * like.rank, (like.lora_B.shape[0], like.lora_A.shape[1])):
        return mean, _lost_in_factors(factors, p, mean=mean)
    return mean, _lost_dense(factors, p.float(), mean=mean)


def mean_factors(factors: Sequence[LoraFactors], weights: Sequence[float], *, like: LoraFactors) -> LoraFactors:
    """Give the averaged pair of `average_factors`; where the pairs are alike, without working out what it loses."""
    if not _are_alike(factors, like=like):
        return best_of_rank(factors, weights, like=like)[0]
    return _mean(factors, torch.tensor(weights), origin=like)


def _are_alike(factors: Sequence[LoraFactors], *, like: LoraFactors) -> bool:
    return all(f.rank == like.rank and f.scaling == like.scaling for f in factors)


def stacked(factors: Sequence[LoraFactors], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Stack one layer's pairs, of any ranks, into float64 factors of ``sum_k p_k delta_k``.

    Returns
    -------
    ``[p_1 s_1 B_1, ..., p_K s_K B_K]`` (d_out, sum_k rank_k) and ``[A_1; ...; A_K]`` (sum_k rank_k, d_in).
    """
    left = [p_k * f.scaling * f.lora_B.double() for p_k, f in zip(weights, factors, strict=True)]
    return torch.cat(left, 1), torch.cat([f.lora_A.double() for f in factors], 0)


def _mean(factors: Sequence[LoraFactors], p: Tensor, *, origin: LoraFactors) -> LoraFactors:
    """Average what the clients changed since `origin`: in float32 the error is then one of the changes."""
    change_A, change_B = torch.zeros_like(origin.lora_A), torch.zeros_like(origin.lora_B)
    for some in _parts(len(factors), rank=origin.rank):
        changed_A, changed_B = _spreads(factors[some], less=origin)
        change_A += torch.tensordot(p[some], changed_A, 1)
        change_B += torch.tensordot(p[some], changed_B, 1)
    return LoraFactors(origin.lora_A + change_A, origin.lora_B + change_B, origin.scaling)


def _lost_in_factors(factors: Sequence[LoraFactors], p: Tensor, *, mean: LoraFactors) -> Step:
    spread_A, spread_B = _spreads(factors, less=mean)  # (K, rank, d_in), (K, d_out, rank)
    contrast = contrasts(p).float()  # (K-1, K)
    right = torch.tensordot(contrast, spread_A, 1).flatten(0, 1)  # ((K-1) rank, d_in)
    left = torch.tensordot(mean.scaling * contrast, spread_B, 1).transpose(0, 1).flatten(1)  # (d_out, (K-1) rank)
    return on_grid(left, right)


def contrasts(p: Tensor) -> Tensor:
    """Give C, (K-1, K), with ``C^T C = diag(p) - p p^T``, the covariance of drawing one of K clients by p.

    So ``sum_k p_k b_k a_k - bbar abar = (C b)^T (C a)``: K-1 products, and no difference of near-equal ones. C is a
    reflection that takes the unit vector ``sqrt(p)`` to the first axis, up to its sign, times ``diag(sqrt(p))``,
    without its first row; each row that is left sums to zero.
    """
    root = p.sqrt()
    normal = root.clone()
    normal[0] += 1
    reflection = torch.eye(len(p), dtype=p.dtype) - torch.outer(normal, normal) * (2 / normal.square().sum())
    return reflection[1:] * root


def _lost_dense(factors: Sequence[LoraFactors], p: Tensor, *, mean: LoraFactors) -> Tensor:
    lost = torch.zeros(mean.lora_B.shape[0], mean.lora_A.shape[1])
    for some in _parts(len(factors), rank=mean.rank):
        spread_A, spread_B = _spreads(factors[some], less=mean)
        spread_B.mul_(p[some].view(-1, 1, 1))
        lost.addmm_(spread_B.transpose(0, 1).flatten(1), spread_A.flatten(0, 1))
    return lost.mul_(mean.scaling)


def _spreads(factors: Sequence[LoraFactors], *, less: LoraFactors) -> tuple[Tensor, Tensor]:
    """Stack the pairs less one: (K, rank, d_in) and (K, d_out, rank)."""
    lora_A, lora_B = torch.stack([f.lora_A for f in factors]), torch.stack([f.lora_B for f in factors])
    return lora_A.sub_(less.lora_A), lora_B.sub_(less.lora_B)


def _parts(num_clients: int, *, rank: int) -> Iterator[slice]:
    """Cut the clients so that a part's stacked factors have an inner size of at most `_WIDEST`."""
    size = max(1, _WIDEST // rank)
    return (slice(start, start + size) for start in range(0, num_clients, size))


def best_of_rank(
    factors: Sequence[LoraFactors], weights: Sequence[float], *, like: LoraFactors
) -> tuple[LoraFactors, tuple[Tensor, Tensor]]:
    """Give the best approximation of the mean of the products at the rank of `like` (Eckart and Young), and the rest.

    Its rows are ordered by strength, and each singular value is shared out evenly over the two factors. Rows that the
    mean does not fill keep the lora_A of `like`, for a pair of zeros never trains.

    Parameters
    ----------
    factors, weights, like
        As in `average_factors`; the pairs may be of any ranks and scalings.

    Returns
    -------
    The pair, and float64 factors (d_out, m) and (m, d_in) of what it leaves out, orthogonal to it.
    """
    left, right = by_strength(*stacked(factors, weights))  # of the exact mean
    kept = min(like.rank, left.shape[1])
    lora_A = like.lora_A.double()  # (rank, d_in)
    lora_A = torch.cat([right[:kept] / like.scaling**0.5, lora_A[kept:]])
    lora_B = torch.nn.functional.pad(left[:, :kept] / like.scaling**0.5, (0, like.rank - kept))  # (d_out, rank)
    return LoraFactors(lora_A.float(), lora_B.float(), like.scaling), (left[:, kept:], right[kept:])


def _best_and_lost(
    factors: Sequence[LoraFactors], weights: Sequence[float], *, like: LoraFactors
) -> tuple[LoraFactors, Step | Tensor]:
    pair, (left, right) = best_of_rank(factors, weights, like=like)
    rest = on_grid(left, right)
    return pair, rest if pays(left.shape[1], rest.shape) else rest.added_to(None)
