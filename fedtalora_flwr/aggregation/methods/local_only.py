"""Local only: every slot goes on from its own adapter and nothing is averaged.

The baseline that says what a client gains by taking part at all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedtalora_flwr.aggregation.factors import FACTORS
from fedtalora_flwr.aggregation.methods.fedtalora import FedTaLoRA
from fedtalora_flwr.aggregation.slots import ClusteredState, Slot, SlotAggregator
from fedtalora_flwr.aggregation.types import ClientUpdate

_MEAN_OF_ONE = FedTaLoRA(residual="off")


@dataclass(frozen=True)
class LocalOnly(SlotAggregator):
    """Give every slot back what it sent."""

    trainable: frozenset[str] = FACTORS
    exact: bool = True

    def aggregate(
        self, state: ClusteredState, updates: Mapping[Slot, ClientUpdate], shared: Sequence[ClientUpdate] = ()
    ) -> ClusteredState:
        """Take each slot's update for its own state (see `SlotAggregator.aggregate`)."""
        if not updates:
            raise ValueError("nothing to take in: no slot sent an update")
        own = {slot: _MEAN_OF_ONE.aggregate(state.of(slot), [updates[slot]]) for slot in sorted(updates)}
        return ClusteredState(state.start, own={**state.own, **own}, version=state.version + 1)


def create() -> LocalOnly:
    """Build the method; it has no settings."""
    return LocalOnly()
