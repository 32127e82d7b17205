"""The types that a method takes and gives: plain tensors, no model, no data, no Flower.

Shape names: d_out, d_in of an adapted `torch.nn.Linear`; rank; C classes; K clients. Tensors are float32 on
the CPU. Keys are module names as in ``model.named_modules()``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fedtalora_flwr.aggregation.factors import LoraFactors, Step


@dataclass(frozen=True)
class GlobalState:
    """What the server broadcasts; the effective weight of a layer is ``W_0 + residual + delta``.

    Parameters
    ----------
    adapters
        The shared factors of every adapted module.
    residual
        (d_out, d_in) for every adapted module: what is added to the frozen weight, summed over all rounds.
        Clients *set* ``W = W_0 + residual``; loading a state twice equals loading it once. Beside it stands what a
        method holds fixed of a layer (see `core`).
    head
        The classifier's parameters, classes along the first dimension: (C, ...).
    version
        Number of aggregations behind this state.
    step
        What the last aggregation added to each module's residual, in factors, for the wire: where a module has
        one, ``residual = step.added_to(previous residual)``, bit for bit. A module without one is sent dense.
    owed
        What truncation has left out of the residual so far; it stays on the server and joins the next step.
    extra
        Tensors of the method's own, by name, such as moments of a server's optimiser: they stay on the server, and a
        run that goes on has them again.
    """

    adapters: Mapping[str, LoraFactors]
    residual: Mapping[str, Tensor] = field(default_factory=dict)
    head: Mapping[str, Tensor] = field(default_factory=dict)
    version: int = 0
    step: Mapping[str, Step] = field(default_factory=dict)
    owed: Mapping[str, Step] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)


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
        As in `GlobalState`; the rank may be lower than the server's (see `ranks`).
    class_counts
        (C,) int64, examples of each class trained on; float64 where it is a weight.
    base_version
        `GlobalState.version` that the training started from.
    grams
        Of a method that asks for them, the mean over examples of ``sum x x^T`` over each module's inputs x, or over
        ``lora_A x`` where lora_B was trained: (m, m), m being d_in or the rank.
    """

    partition_id: int
    num_examples: float
    adapters: Mapping[str, LoraFactors]
    head: Mapping[str, Tensor]
    class_counts: Tensor  # (C,)
    base_version: int
    grams: Mapping[str, Tensor] = field(default_factory=dict)


class Method(ABC):
    """What all methods say of themselves.

    Attributes
    ----------
    trainable
        The factors that clients train, of `FACTORS`, in one round or another (see `trains`).
    exact
        Whether the aggregate's effective weights equal the weighted mean of the clients' effective weights.
    truncates
        Whether a client of a lower rank trains without the rows that it does not train (see `ranks`).
    keeps_pair
        Whether the broadcast pair goes on from round to round; a method that draws it anew has none to remember.
    dense
        Whether the pair is of full rank, with the identity as lora_A and 1 as scaling, so that lora_B is any change of
        the weight.
    core
        Whether the pair is a core between fixed factors of the layer, which `start` puts into the base (see `core`).
    sends_grams
        Whether clients send Gram matrices of the layers' inputs beside what they trained (see `ClientUpdate`).
    """

    trainable: frozenset[str]
    exact: bool
    truncates: bool = False
    keeps_pair: bool = True
    dense: bool = False
    core: bool = False
    sends_grams: bool = False

    @property
    def changing(self) -> frozenset[str]:
        """The factors that go down, for a run changes them; the others every side has as they started."""
        return self.trainable

    def trains(self, version: int) -> frozenset[str]:
        """Give the factors that clients train from a state of this version, and send up."""
        return self.trainable

    def start(self, state: GlobalState, weights: Mapping[str, Tensor]) -> GlobalState:
        """Give the state that a run begins with, from the usual one; `weights` are W_0 of every adapted layer."""
        return state


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
