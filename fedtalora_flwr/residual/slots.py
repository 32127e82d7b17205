"""The server's memory of bases where slots train from several states: one ledger for each of them."""

from collections.abc import Iterable

from fedtalora_flwr.aggregation.slots import ClusteredState, Slot
from fedtalora_flwr.residual.ledger import Ledger
from fedtalora_flwr.residual.version import Patch


class SlotLedger(Ledger):
    """A ledger for the start, each cluster and each slot of its own; as a `Ledger` itself, that of the shared part.

    Parameters
    ----------
    state
        Where the run begins, or goes on from.
    """

    def __init__(self, state: ClusteredState) -> None:
        super().__init__(state.shared.residual if state.shared else {})
        self._state, self._start = state, Ledger(state.start.residual)
        self._of = {place: Ledger(one.residual) for place, one in state.states().items()}

    @property
    def shares(self) -> bool:
        """Whether there is a shared part."""
        return self._state.shared is not None

    def follow(self, state: ClusteredState) -> None:
        """Take in what an aggregation made of the states; a place that is new starts from the untouched weights."""
        self._state = state
        if state.shared is not None:
            self.advance(state.shared.residual, state.shared.step)
        self._of = {place: self._of.get(place) or Ledger({}) for place in state.states()}
        for place, one in state.states().items():
            self._of[place].advance(one.residual, one.step)

    def acknowledge(self, partition_id: int) -> None:
        """Note that a client has reached the newest base of each of its slots."""
        super().acknowledge(partition_id)
        for slot in self._state.slots():
            if slot.partition_id == partition_id:
                self._of[self._state.place(slot)].acknowledge(partition_id)

    def report(self, partition_id: int, digests: Iterable[str]) -> None:
        """Note which bases a client says it holds, on any of the chains."""
        there = list(digests)
        super().report(partition_id, there)
        for ledger in self._of.values():
            ledger.report(partition_id, there)

    def slot_patch(self, slot: Slot) -> Patch:
        """Give what a slot's client needs to reach the base of the slot."""
        place = self._state.place(slot)
        return (self._start if place is None else self._of[place]).patch(slot.partition_id)
