"""Fed-TaLoRA's aggregation with the residual weight update (arXiv 2505.12318, ResWU), made exact.

The mean of products is not the product of means. With p_k = n_k / sum n and one scaling s, the server
broadcasts the means Bbar, Abar and adds what they lose to a residual that accumulates over the rounds:

    R_{t+1} = R_t + s * sum_k p_k (B_k - Bbar)(A_k - Abar)

so that ``W_0 + R_{t+1} + s Bbar Abar`` equals the weighted mean of the clients' effective weights
``W_0 + R_t + s B_k A_k``, for any subset of clients and any weights. The centred sum equals the paper's
``sum_k p_k B_k A_k - Bbar Abar`` and stays accurate where that difference of near-equal products cancels.

The step from R_t to R_{t+1} has rank (K-1) r. Where factors of that rank hold fewer numbers than the dense
matrix they are kept as such, and are what travels (see `Step`).

Clients of different rank are accepted: then the broadcast pair is the best approximation of the exact mean
at the server's rank (truncated SVD), and the step takes all that it leaves out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fedtalora_flwr.aggregation.base import (
    FACTORS,
    Aggregator,
    ClientUpdate,
    GlobalState,
    LoraFactors,
    example_weights,
    in_summation_order,
)
from fedtalora_flwr.aggregation.head import average_class_rows
from fedtalora_flwr.aggregation.step import Step, added, by_strength, on_grid, pays, strongest

Residual = Literal["accumulate", "replace", "off"]
_WIDEST = 4096  # inner size of one product: bounds the memory beside the factors, whatever the number of clients


@dataclass(frozen=True)
class FedTaLoRA(Aggregator):
    """Average the factors by examples and carry what that loses in the residual.

    Parameters
    ----------
    residual
        ``accumulate``: exact in every round. ``replace``: the residual of the last round only, the literal
        reading of the paper. ``off``: none, plain FedAvg of the factors. The last two are ablations.
    residual_energy
        The share of a step's squared norm that is sent at least, in (0, 1]; what is left out is owed, and joins
        the next step. 1 sends all of it.
    trainable
        The factors that clients train; all share the others as broadcast.
    """

    residual: Residual = "accumulate"
    residual_energy: float = 1.0
    trainable: frozenset[str] = FACTORS

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Whether the aggregate equals FedAvg of the effective weights: nothing is dropped, or nothing is lost."""
        kept = self.residual == "accumulate" and self.residual_energy == 1
        return kept or len(self.trainable) == 1  # the mean is linear in one factor where all share the other

    def aggregate(self, state: GlobalState, updates: Sequence[ClientUpdate]) -> GlobalState:
        """Fold the updates into a new state (see the module's equation).

        Parameters
        ----------
        state
            What the clients started from.
        updates
            Replies of any subset of clients, in any order.

        Raises
        ------
        ValueError
            If there is no update, or the updates hold no example.
        """
        updates = in_summation_order(updates)
        weights = example_weights(updates)
        adapters: dict[str, LoraFactors] = {}
        residual: dict[str, Tensor] = {}
        steps: dict[str, Step] = {}
        owed: dict[str, Step] = {}
        for name, broadcast in state.adapters.items():
            factors = [update.adapters[name] for update in updates]
            if self.residual == "off":
                adapters[name] = mean_factors(factors, weights, like=broadcast)
                continue
            adapters[name], lost = average_factors(factors, weights, like=broadcast)
            if self.residual_energy < 1:
                lost, owed[name] = strongest(lost, owed=state.owed.get(name), energy=self.residual_energy)
            if self.residual == "replace":
                residual[name] = added(lost, to=None)
                continue
            residual[name] = added(lost, to=state.residual.get(name))
            if isinstance(lost, Step):
                steps[name] = lost
        return GlobalState(
            adapters=adapters,
            residual=residual,
            head=average_class_rows(state.head, updates),
            version=state.version + 1,
            step=steps,
            owed=owed,
        )


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
        return _best_of_rank(factors, weights, like=like)
    p = torch.tensor(weights, dtype=torch.float64)
    mean = _mean(factors, p.float(), origin=like)
    if pays((len(factors) - 1) * like.rank, (like.lora_B.shape[0], like.lora_A.shape[1])):
        return mean, _lost_in_factors(factors, p, mean=mean)
    return mean, _lost_dense(factors, p.float(), mean=mean)


def mean_factors(factors: Sequence[LoraFactors], weights: Sequence[float], *, like: LoraFactors) -> LoraFactors:
    """Give the averaged pair of `average_factors`; where the pairs are alike, without working out what it loses."""
    if not _are_alike(factors, like=like):
        return _best_of_rank(factors, weights, like=like)[0]
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


def _best_of_rank(
    factors: Sequence[LoraFactors], weights: Sequence[float], *, like: LoraFactors
) -> tuple[LoraFactors, Step | Tensor]:
    left, right = by_strength(*stacked(factors, weights))  # of the exact mean
    kept = min(like.rank, left.shape[1])
    lora_A = like.lora_A.double()  # (rank, d_in); rows that the mean does not fill stay, for a zero pair never trains
    lora_A = torch.cat([right[:kept] / like.scaling**0.5, lora_A[kept:]])
    lora_B = torch.nn.functional.pad(left[:, :kept] / like.scaling**0.5, (0, like.rank - kept))  # (d_out, rank)
    rest = on_grid(left[:, kept:], right[kept:])
    lost = rest if pays(left.shape[1] - kept, rest.shape) else rest.added_to(None)
    return LoraFactors(lora_A.float(), lora_B.float(), like.scaling), lost


def create(*, residual: str = "accumulate", residual_energy: float = 1.0) -> FedTaLoRA:
    """Build the method from the settings ``residual`` and ``residual-energy``.

    Raises
    ------
    ValueError
        If `residual` is none of accumulate, replace, off, or `residual_energy` is not in (0, 1], or below 1
        without an accumulating residual.
    """
    if residual not in get_args(Residual):
        raise ValueError(f"residual must be one of {', '.join(get_args(Residual))}, got {residual!r}")
    if not 0 < residual_energy <= 1:
        raise ValueError(f"residual-energy must be in (0, 1], got {residual_energy}")
    if residual_energy < 1 and residual != "accumulate":
        raise ValueError(
            f"residual-energy below 1 owes the rest to later rounds: residual must be accumulate, got {residual!r}"
        )
    return FedTaLoRA(residual=residual, residual_energy=residual_energy)  # type: ignore[arg-type]
