"""The way to the server's residual, down; and what a client holds that cannot go it, up."""

import re
from collections.abc import Sequence
from copy import copy

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedtalora_flwr.aggregation import Step
from fedtalora_flwr.residual import Parcel
from fedtalora_flwr.wire.records import ARRAYS, BASE, BASE_ARRAYS, ORDER, array_record, read_arrays
from fedtalora_flwr.wire.refusal import WireError
from fedtalora_flwr.wire.room import Room

_DIGEST = re.compile("[0-9a-f]{64}")
_BEFORE = ".before"  # behind the names of the records that speak of an earlier state


def pack_parcel(parcel: Parcel) -> ArrayRecord:
    """Put the tensors of a parcel into one record, for all messages to clients that hold the same base."""
    tensors = {f"dense/{name}": value for name, value in parcel.dense.items()}
    for index, step in enumerate(parcel.steps):
        tensors |= {f"left {index}/{name}": change.left for name, change in step.items()}
        tensors |= {f"right {index}/{name}": change.right for name, change in step.items()}
    return array_record(tensors)


def add_parcel(content: RecordDict, parcel: Parcel, arrays: ArrayRecord) -> RecordDict:
    """Give a message's content with what its client needs to reach the base; `arrays` is the packed parcel."""
    return RecordDict({**content, BASE: ConfigRecord({"chain": " ".join(parcel.chain)}), BASE_ARRAYS: arrays})


def add_before(content: RecordDict, before: RecordDict) -> RecordDict:
    """Give a message's content with that of another message beside it, about an earlier state."""
    return RecordDict({**content, **{f"{key}{_BEFORE}": record for key, record in before.items()}})


def before_of(message: Message) -> Message | None:
    """Take the message about an earlier state out of another, whose content stays as it is; None: it has none."""
    if not tells_before(message.content):
        return None
    before = copy(message)
    before.content = RecordDict({key: message.content[f"{key}{_BEFORE}"] for key in (ARRAYS, ORDER, BASE, BASE_ARRAYS)})
    return before


def tells_before(content: RecordDict) -> bool:
    """Tell whether a message speaks of an earlier state too."""
    return f"{ORDER}{_BEFORE}" in content


def read_parcel(message: Message, *, room: Room | None = None) -> Parcel:
    """Read from a training message how to reach the base.

    Raises
    ------
    WireError
        If a base has no possible name, or there is no `room` for what leads to it.
    """
    chain = str(message.content.config_records[BASE]["chain"]).split()
    if odd := [digest for digest in chain if not _DIGEST.fullmatch(digest)]:  # names of files on a client's disk
        raise WireError(f"a base is named by 64 hexadecimal digits, not {odd[0][:80]!r}")
    base = read_arrays(message.content.array_records[BASE_ARRAYS])
    steps = tuple(
        {name: Step(left, base[f"right {index}"][name]) for name, left in base.get(f"left {index}", {}).items()}
        for index in range(len(chain) - 1)
    )
    parcel = Parcel(tuple(chain), steps, base.get("dense", {}))
    if room is not None:
        room.require_parcel(parcel)
    return parcel


def base_missing_reply(held: Sequence[str]) -> RecordDict:
    """Build the reply of a client that cannot reach the base; `held` are the digests of those it has."""
    return RecordDict({BASE: ConfigRecord({"held": " ".join(held)})})


def read_base_missing(message: Message) -> list[str] | None:
    """Give the digests held by a client that could not reach the base, or None for any other reply."""
    if BASE not in message.content.config_records:
        return None
    return str(message.content.config_records[BASE].get("held", "")).split()
