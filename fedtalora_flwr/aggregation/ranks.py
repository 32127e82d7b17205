"""Clients of a lower rank than the server's: what they train of a pair, and what becomes of its other rows.

A client of rank r_k trains the first r_k rows of the pair ``(B, A) = ([B_1, B_2], [A_1; A_2])``, by the scaling s that
all share. The other rows are

- held (`held`, `completed`), unless the method says otherwise: they stand in the client's frozen weight, and behind
  what comes back. Its model begins as the server's and is, when trained to (B_k, A_k),

      W_0 + R + s (B_2 A_2 + B_k A_k);

- left out, where the method truncates (`Method.truncates`), as FlexLoRA and HetLoRA do: its model is
  ``W_0 + R + s B_k A_k``. It begins without what the other rows have learned, and its weight in the mean takes its
  share of that away.

Either way the effective weights of clients are those of the models that they trained, and an exact method is exact.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from fedtalora_flwr.aggregation.factors import LoraFactors
from fedtalora_flwr.aggregation.types import GlobalState


def first_rows(adapters: Mapping[str, LoraFactors], rank: int) -> dict[str, LoraFactors]:
    """Give the first `rank` rows of every pair, or all that it has."""
    return {name: pair.parted(min(rank, pair.rank))[0] for name, pair in adapters.items()}


def truncated(state: GlobalState, rank: int | None) -> GlobalState:
    """Give the state with the pairs that a client of this rank trains; None: it trains all of them."""
    return state if rank is None else replace(state, adapters=first_rows(state.adapters, rank))


def held(state: GlobalState, rank: int | None) -> GlobalState:
    """Give the state from which a client of this rank trains: the other rows of each pair have gone to its residual."""
    if rank is None:
        return state
    residual = dict(state.residual)
    for name, pair in state.adapters.items():
        if rank < pair.rank:
            rest = pair.parted(rank)[1].delta()
            residual[name] = residual[name] + rest if name in residual else rest
    return replace(truncated(state, rank), residual=residual)


def completed(pair: LoraFactors, sent: LoraFactors) -> LoraFactors:
    """Put behind the rows that a client of a lower rank trained those that it did not, as they were sent."""
    if pair.rank == sent.rank:
        return pair
    lora_B = sent.scaling / pair.scaling * sent.lora_B[:, pair.rank :]
    return LoraFactors(
        torch.cat([pair.lora_A, sent.lora_A[pair.rank :]]), torch.cat([pair.lora_B, lora_B], 1), pair.scaling
    )
