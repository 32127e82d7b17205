"""The types that a method takes and gives: plain tensors, no model, no data, no Flower.

Shape names: d_out, d_in of an adapted `torch.nn.Linear`; rank; C classes; K clients. Tensors are float32 on
the CPU. Keys are module names as in ``model.named_modules()``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedtalora_flwr.aggregation.step import Step

FACTORS = frozenset({"lora_A", "lora_B"})


@dataclass(frozen=True)
class LoraFactors:
    """One layer's low-rank pair (LoRA, arXiv 2106.09685): it adds ``scaling * lora_B @ lora_A``.

    Parameters
    ----------
    lora_A
        (rank, d_in).
    lora_B
        (d_out, rank).
    scaling
        alpha / rank.
    """

    lora_A: Tensor  # (rank, d_in)
    lora_B: Tensor  # (d_out, rank)
    scaling: float

    @classmethod
    def initial(cls, *, rank: int, d_in: int, d_out: int, scaling: float, generator: torch.Generator) -> "LoraFactors":
        """Draw LoRA's usual start, which adds nothing yet: lora_A Kaiming-uniform, lora_B zero."""
        lora_A = nn.init.kaiming_uniform_(torch.empty(rank, d_in), a=math.sqrt(5), generator=generator)
        return cls(lora_A, torch.zeros(d_out, rank), scaling)

    @classmethod
    def dense(cls, *, d_in: int, d_out: int) -> "LoraFactors":
        """Give the pair of full rank that adds nothing yet: lora_A the identity, lora_B zero, scaling 1."""
        return cls(torch.eye(d_in), torch.zeros(d_out, d_in), 1.0)

    @property
    def rank(self) -> int:
        """Number of rows of lora_A."""
        return self.lora_A.shape[0]

    @property
    def is_dense(self) -> bool:
        """Whether lora_A is the identity, as `dense` makes it, so that lora_B is the weight's change itself."""
        rank, d_in = self.lora_A.shape
        return rank == d_in and torch.equal(self.lora_A, torch.eye(d_in, dtype=self.lora_A.dtype))

    def delta(self) -> Tensor:
        """Form the dense product ``scaling * lora_B @ lora_A``, shape (d_out, d_in): the one place that does."""
        if self.is_dense:
            return self.scaling * self.lora_B
        return self.scaling * (self.lora_B @ self.lora_A)


@dataclass(frozen=True)
class GlobalState:
    """What the server broadcasts; the effective weight of a layer is ``W_0 + residual + delta``.

    Parameters
    ----------
    adapters
        The shared factors of every adapted module.
    residual
        (d_out, d_in) for every adapted module: what is added to the frozen weight, summed over all rounds.
        Clients *set* ``W = W_0 + residual``; loading a state twice equals loading it once.
    head
        The classifier's parameters, classes along the first dimension: (C, ...).
    version
        Number of aggregations behind this state.
    step
        What the last aggregation added to each module's residual, in factors, for the wire: where a module has
        one, ``residual = step.added_to(previous residual)``, bit for bit. A module without one is sent dense.
    owed
        What truncation has left out of the residual so far; it stays on the server and joins the next step.
    """

    adapters: Mapping[str, LoraFactors]
    residual: Mapping[str, Tensor] = field(default_factory=dict)
    head: Mapping[str, Tensor] = field(default_factory=dict)
    version: int = 0
    step: Mapping[str, Step] = field(default_factory=dict)
    owed: Mapping[str, Step] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientUpdate:
    """What one client sends back after local training.

    Parameters
    ----------
    partition_id
        Stable identity of the client's data; the order of summation.
    num_examples
        Examples trained on: the client's weight n_k, or the weight that it was given in their place (`weights`).
    adapters, head
        As in `GlobalState`; the rank may differ from the server's.
    class_counts
        (C,) int64, examples of each class trained on; float64 where it is a weight.
    base_version
        `GlobalState.version` that the training started from.
    """

    partition_id: int
    num_examples: float
    adapters: Mapping[str, LoraFactors]
    head: Mapping[str, Tensor]
    class_counts: Tensor  # (C,)
    base_version: int


class Method(ABC):
    """What all methods say of themselves.

    Attributes
    ----------
    trainable
        The factors that clients train, of `FACTORS`.
    exact
        Whether the aggregate's effective weights equal the weighted mean of the clients' effective weights.
    keeps_pair
        Whether the broadcast pair goes on from round to round; a method that draws it anew has none to remember.
    dense
        Whether the pair is of full rank, with the identity as lora_A and 1 as scaling, so that lora_B is any change of
        the weight.
    """

    trainable: frozenset[str]
    exact: bool
    keeps_pair: bool = True
    dense: bool = False


class Aggregator(Method):
    """A method with one state for all: how the server folds the clients' updates into it."""

    @abstractmethod
    def aggregate(self, state: GlobalState, updates: Sequence[ClientUpdate]) -> GlobalState:
        """Fold the updates into a new state; neither argument is changed.

        Raises
        ------
        ValueError
            If there is no update, or the updates hold no example.
        """


def in_summation_order(updates: Sequence[ClientUpdate]) -> list[ClientUpdate]:
    """Sort updates by partition: float sums are not associative and replies arrive in any order."""
    return sorted(updates, key=lambda update: update.partition_id)


def example_weights(updates: Sequence[ClientUpdate]) -> list[float]:
    """Give p_k = n_k / sum n, in the order of `updates`.

    Raises
    ------
    ValueError
        If there is no update, or the updates hold no example.
    """
    total = sum(update.num_examples for update in updates)
    if total <= 0:
        raise ValueError(f"nothing to average: {len(updates)} updates hold {total} examples")
    return [update.num_examples / total for update in updates]
