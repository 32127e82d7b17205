"""What brings a client to the server's residual, added to every message: one for all, or one for each slot."""

from collections.abc import Callable, Sequence
from typing import Protocol

from flwr.app import ArrayRecord, RecordDict

from fedtalora_flwr import wire
from fedtalora_flwr.aggregation import ClusteredState, GlobalState, Slot
from fedtalora_flwr.residual import Ledger, Patch, SlotLedger


class Residuals(Protocol):
    """What a client needs to reach the residual that a message builds on."""

    def add_to(self, content: RecordDict, partition: int) -> RecordDict:
        """Give a message's content with it."""

    def acknowledge(self, partition: int) -> None:
        """Note that a client has answered, and so has reached it."""

    def report(self, partition: int, held: Sequence[str]) -> None:
        """Note what a client says that it holds."""


class _Packed:
    """Records of patches, which messages to many clients share."""

    def __init__(self) -> None:
        self._records: dict[int, ArrayRecord] = {}  # id of a patch of a ledger -> its arrays

    def add(self, content: RecordDict, patch: Patch) -> RecordDict:
        if id(patch) not in self._records:
            self._records[id(patch)] = wire.pack_patch(patch)
        return wire.add_patch(content, patch, self._records[id(patch)])

    def clear(self) -> None:
        self._records.clear()


class SharedResidual:
    """The residual of one shared adapter, and that of the state which the task began with.

    Parameters
    ----------
    state
        Where the run begins, or goes on from.
    """

    def __init__(self, state: GlobalState) -> None:
        self._ledger, self._before = Ledger(state.residual), Ledger({})
        self._packed = _Packed()

    def begin_task(self, before: GlobalState) -> None:
        """Keep the residual that a task begins with."""
        self._before = Ledger(before.residual)

    def advance(self, new: GlobalState) -> None:
        """Go on to the residual of a new state."""
        self._ledger.advance(new.residual, new.step)
        self._packed.clear()

    def add_to(self, content: RecordDict, partition: int) -> RecordDict:
        """Give a message's content with what its client needs, for the earlier state too where it speaks of one."""
        content = self._packed.add(content, self._ledger.patch(partition))
        if not wire.tells_before(content):
            return content
        return wire.add_before(content, self._packed.add(RecordDict(), self._before.patch(partition)))

    def acknowledge(self, partition: int) -> None:
        """Note that a client has answered, and so has reached it."""
        self._ledger.acknowledge(partition)
        if self._ledger.base.digest == self._before.base.digest:
            self._before.acknowledge(partition)

    def report(self, partition: int, held: Sequence[str]) -> None:
        """Note what a client says that it holds."""
        self._ledger.report(partition, held)
        self._before.report(partition, held)


class SlotResiduals:
    """The residuals of the states of a method over slots.

    Parameters
    ----------
    clustered
        Where the run begins, or goes on from.
    slots_of
        Lists a partition's slots.
    """

    def __init__(self, clustered: ClusteredState, slots_of: Callable[[int], Sequence[Slot]]) -> None:
        self._ledger, self._slots_of, self._packed = SlotLedger(clustered), slots_of, _Packed()

    def follow(self, new: ClusteredState) -> None:
        """Go on to the residuals of new states."""
        self._ledger.follow(new)
        self._packed.clear()

    def add_to(self, content: RecordDict, partition: int) -> RecordDict:
        """Give a message's content with what its client needs for each of its slots, and for what they share."""
        if wire.ORDER in content:
            return self._packed.add(content, self._ledger.patch(partition))
        patches: dict[wire.Part, Patch]
        patches = {slot.number: self._ledger.slot_patch(slot) for slot in self._slots_of(partition)}
        if self._ledger.shares:
            patches[wire.SHARED] = self._ledger.patch(partition)
        parts = {number: self._packed.add(RecordDict(), patch) for number, patch in patches.items()}
        return RecordDict({**content, **wire.bundle(parts)})

    def acknowledge(self, partition: int) -> None:
        """Note that a client has answered, and so has reached them."""
        self._ledger.acknowledge(partition)

    def report(self, partition: int, held: Sequence[str]) -> None:
        """Note what a client says that it holds."""
        self._ledger.report(partition, held)
