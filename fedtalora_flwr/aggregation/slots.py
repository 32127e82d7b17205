"""Methods over slots: a client has several local tasks at once, and each of them an adapter and class rows of its own.

A slot is one local task of one client. What the server keeps is a state for each group of slots, which slot goes on
from which, and, where a method shares one, a part that stands beside the adapter of every slot: a layer of a slot
computes with

    W  =  W_0 + (R_shared + R) + s (B_shared A_shared + B A)
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from fedtalora_flwr.aggregation.class_rows import moved_rows
from fedtalora_flwr.aggregation.types import ClientUpdate, GlobalState, Method, example_weights
from fedtalora_flwr.aggregation.verify import exactness_error


class Slot(NamedTuple):
    """One local task of one client; the order of slots is the order of summation.

    Parameters
    ----------
    partition_id
        The client's.
    number
        The client's own numbering of its tasks; it means nothing to anybody else.
    """

    partition_id: int
    number: int


Place = int | Slot | None  # a cluster, a slot of its own, or the start


def place_name(place: int | Slot) -> str:
    """Name a place as the commands take it: ``cluster 3``, ``slot 0:1``."""
    return f"slot {place.partition_id}:{place.number}" if isinstance(place, Slot) else f"cluster {place}"


@dataclass(frozen=True)
class ClusteredState:
    """What the server knows: a state for each cluster, and which slot goes on from which.

    Parameters
    ----------
    start
        What a slot trains from that was never heard of.
    clusters
        A state for each cluster id.
    assigned
        The cluster of each slot, also of those that were not there last round.
    own
        The states of slots that belong to no cluster.
    version
        Number of aggregations behind this state.
    shared
        What stands beside the adapter of every slot, a pair and a residual, and the class rows of all; those of a
        cluster then say no more than which classes its slots have trained. None: there is nothing of the kind, and a
        state is all that its slots train from.
    changes
        Cosines between what the slots changed in a round, summed over the rounds that both were there: (n, n) float64,
        in the order of `slots`. None where no method asks for them.
    """

    start: GlobalState
    clusters: Mapping[int, GlobalState] = field(default_factory=dict)
    assigned: Mapping[Slot, int] = field(default_factory=dict)
    own: Mapping[Slot, GlobalState] = field(default_factory=dict)
    version: int = 0
    shared: GlobalState | None = None
    changes: Tensor | None = None

    @classmethod
    def begin(cls, initial: GlobalState, *, shared_rank: int) -> "ClusteredState":
        """Start a run from a model's initial state: the first `shared_rank` rows of its pairs are the shared part."""
        if not shared_rank:
            return cls(initial)
        parted = {name: pair.parted(shared_rank) for name, pair in initial.adapters.items()}
        return cls(
            replace(initial, adapters={name: own for name, (_, own) in parted.items()}),
            shared=GlobalState(
                {name: first for name, (first, _) in parted.items()}, head=initial.head, version=initial.version
            ),
        )

    def whole(self, own: GlobalState) -> GlobalState:
        """Give a state with the shared part beside it, what a model is loaded with; rows of its own classes alone."""
        if self.shared is None:
            return own
        blank = ~moved_rows(own.head)
        head = {name: rows.index_fill(0, blank.nonzero().flatten(), 0) for name, rows in self.shared.head.items()}
        return replace(with_shared(own, self.shared), head=head)

    def place(self, slot: Slot) -> Place:
        """Give the cluster id of a slot, the slot itself where it goes its own way, None if it was never heard of."""
        return slot if slot in self.own else self.assigned.get(slot)

    def of(self, slot: Slot) -> GlobalState:
        """Give the state from which a slot trains next."""
        return self.states().get(self.place(slot), self.start)

    def sent_to(self, slot: Slot) -> GlobalState:
        """Give what a slot trains from of its own: its state, with the class rows that all share."""
        return self.of(slot) if self.shared is None else replace(self.of(slot), head=self.shared.head)

    def states(self) -> dict[Place, GlobalState]:
        """Give every state but the start's, by its place."""
        places: list[Place] = [*self.clusters, *self.own]
        return dict(zip(places, [*self.clusters.values(), *self.own.values()], strict=True))

    def slots(self) -> list[Slot]:
        """List all slots heard of, in order."""
        return sorted({*self.assigned, *self.own})


class SlotAggregator(Method):
    """A method over slots: how the server folds their updates into its states.

    Attributes
    ----------
    compares_ranks
        Whether slots can be compared whose adapters are of different rank.
    shared_rank
        Rank of the part that all slots share; 0: there is none.
    """

    compares_ranks: bool = True
    shared_rank: int = 0

    @abstractmethod
    def aggregate(
        self, state: ClusteredState, updates: Mapping[Slot, ClientUpdate], shared: Sequence[ClientUpdate] = ()
    ) -> ClusteredState:
        """Fold the slots' updates into a new state; no argument is changed.

        Parameters
        ----------
        state
            What the slots started from: each from ``state.of(slot)``.
        updates
            Of any subset of slots, in any order.
        shared
            What their clients made of the shared part, one update a client, which weighs as all its slots do; none
            where ``state.shared`` is None.

        Raises
        ------
        ValueError
            If there is no update, or a group's updates hold no example.
        """

    def picture(self, state: ClusteredState, updates: Mapping[Slot, ClientUpdate]) -> dict[Slot, tuple[float, float]]:
        """Lay slots out on a plane, like beside like, after a round; none where the method compares no slots.

        Parameters
        ----------
        state
            What `aggregate` returned.
        updates
            What it was given.
        """
        return {}


def followed(new: GlobalState, *, before: GlobalState, same_place: bool) -> GlobalState:
    """Drop the step of a new state where nobody can walk it: its place had another base, or none that is known."""
    return new if same_place or not before.residual else replace(new, step={})


def weighted_residual(bases: Sequence[GlobalState], weights: Sequence[float]) -> dict[str, Tensor]:
    """Add up the residuals of states by weight, (d_out, d_in) float32 each; a state without one counts as zero."""
    total: dict[str, Tensor] = {}
    for name in dict.fromkeys(chain.from_iterable(base.residual for base in bases)):
        there = [
            p * base.residual[name].double() for p, base in zip(weights, bases, strict=True) if name in base.residual
        ]
        total[name] = torch.stack(there).sum(0).float()
    return total


def with_shared(own: GlobalState, shared: GlobalState) -> GlobalState:
    """Put a shared part before the rows of a state's pairs, and its residual to theirs."""
    return replace(
        own,
        adapters={name: pair.beside(shared.adapters[name]) for name, pair in own.adapters.items()},
        residual=weighted_residual([shared, own], [1.0, 1.0]),
        step={},
    )


def slots_exactness_error(
    state: ClusteredState,
    updates: Mapping[Slot, ClientUpdate],
    new_state: ClusteredState,
    shared: Sequence[ClientUpdate] = (),
) -> float:
    """Measure how far each group is from the weighted mean of its slots' effective weights; the largest error.

    The shared part, which is the mean over the clients of all groups, is measured by itself.

    Parameters
    ----------
    state, updates, shared
        What `SlotAggregator.aggregate` was given.
    new_state
        What it returned.
    """
    groups: dict[Place, list[Slot]] = {}
    for slot in sorted(updates):
        groups.setdefault(new_state.place(slot), []).append(slot)
    worst = 0.0
    if state.shared is not None and new_state.shared is not None:
        worst = exactness_error(state.shared, shared, new_state.shared)
    for slots in groups.values():
        replies = [updates[slot] for slot in slots]
        bases = [state.of(slot) for slot in slots]
        mixed = replace(bases[0], residual=weighted_residual(bases, example_weights(replies)))
        worst = max(worst, exactness_error(mixed, replies, new_state.of(slots[0])))
    return worst
