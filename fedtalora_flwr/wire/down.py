"""What the server sends: its state and clock, what a penalty remembers, and the way to its residual."""

import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

import fedtalora_flwr
from fedtalora_flwr.aggregation import FACTORS, GlobalState, LoraFactors, Step
from fedtalora_flwr.model.penalties import Memory
from fedtalora_flwr.residual import Patch
from fedtalora_flwr.wire.errors import WireError, check_library
from fedtalora_flwr.wire.records import (
    ARRAYS,
    BASE,
    BASE_ARRAYS,
    ORDER,
    array_record,
    frozen_digest,
    frozen_factors,
    pack_factors,
    read_arrays,
    read_factors,
)
from fedtalora_flwr.wire.room import Room


@dataclass(frozen=True)
class RoundOrder:
    """The server's clock, sent with every state: a client derives none of it.

    Parameters
    ----------
    server_round
        From 1, over the whole run.
    task_id, round_in_task
        From 0.
    run
        Names the run to clients that keep a ledger of their privacy, and stays when it is resumed; else empty.
    """

    server_round: int
    task_id: int
    round_in_task: int
    run: str = ""


def pack_state(
    state: GlobalState,
    *,
    classes: Sequence[int] | None = None,
    memory: Memory | None = None,
    changing: frozenset[str] = FACTORS,
) -> ArrayRecord:
    """Put the shared tensors of a state into one record; share it among messages, it is serialised once.

    Parameters
    ----------
    state
        Its residual is left out: it travels as a `Patch`, as far as a client needs it.
    classes
        The class rows of the head that the clients need; None where they need no head.
    memory
        What a penalty needs of finished tasks.
    changing
        The factors that a run changes; a client draws the others itself, as they started.
    """
    tensors = pack_factors(state.adapters, changing)
    if memory is not None:
        tensors |= {f"anchor/{key}": value for key, value in memory.anchor.items()}
        tensors |= {f"fisher/{key}": value for key, value in memory.fisher.items()}
    if classes is not None:
        rows = torch.tensor(sorted(set(classes)), dtype=torch.int64)
        tensors |= {f"head/{name}": value[rows] for name, value in state.head.items()}
        tensors["rows/class"] = rows.int()
    return array_record(tensors)


def state_message(
    arrays: ArrayRecord, order: RoundOrder, *, scaling: float, version: int, num_classes: int, frozen: str = ""
) -> RecordDict:
    """Build the content of a training message, but for the base (see `add_patch`).

    `frozen` is the digest of the factors that `arrays` leave out.
    """
    settings: dict[str, Any] = {
        "server-round": order.server_round,
        "task-id": order.task_id,
        "round-in-task": order.round_in_task,
        "scaling": scaling,
        "version": version,
        "num-classes": num_classes,
        "frozen": frozen,
        "library": fedtalora_flwr.build(),
    }
    if order.run:
        settings["run"] = order.run
    return RecordDict({ARRAYS: arrays, ORDER: ConfigRecord(settings)})


def read_state(
    message: Message, *, initial: Callable[[], Mapping[str, LoraFactors]] | None = None, room: Room | None = None
) -> tuple[GlobalState, Patch, RoundOrder]:
    """Read a training message on the client: the state without its residual, and how to reach that.

    Head rows that were not sent are zero, and factors that were not sent are as they started.

    Parameters
    ----------
    message
        From the server.
    initial
        Gives the start of every pair; asked only where factors were left out.
    room
        The sizes that it may speak of; None where it is one's own.

    Raises
    ------
    WireError
        If the server runs another version of the library, its pairs started otherwise than this side's, it speaks of
        sizes that this side does not have, or its run has no possible name.
    """
    settings = message.content.config_records[ORDER]
    check_library(str(settings["library"]), whose="server")
    parts = read_arrays(message.content.array_records[ARRAYS])
    if (frozen := str(settings["frozen"])) and initial is not None:
        started, changing = initial(), frozenset(FACTORS & parts.keys())
        if frozen_digest(started, changing) != frozen:
            raise WireError(
                "the server's pairs started from other numbers than this node draws for the same seed; install the "
                "server's version of PyTorch"
            )
        parts |= frozen_factors(started, changing)
    head, rows = parts.get("head", {}), parts.get("rows", {}).get("class", torch.zeros(0)).long()
    num_classes = cast(int, settings["num-classes"])
    if room is not None:
        room.require_head(head, num_classes)
        room.require_task(cast(int, settings["task-id"]))
    state = GlobalState(
        adapters=read_factors(parts, scaling=cast(float, settings["scaling"])),
        head={
            name: value.new_zeros(num_classes, *value.shape[1:]).index_copy_(0, rows, value)
            for name, value in head.items()
        },
        version=cast(int, settings["version"]),
    )
    server_round, task_id, round_in_task = (
        cast(int, settings[key]) for key in ("server-round", "task-id", "round-in-task")
    )
    run = str(settings.get("run", ""))
    if run and not _RUN.fullmatch(run):  # it is part of a file's name
        raise WireError(f"a run is named by 16 hexadecimal digits, not {run[:40]!r}")
    if room is not None:
        room.require_pairs(state.adapters)
    return state, read_patch(message, room=room), RoundOrder(server_round, task_id, round_in_task, run)


def read_memory(message: Message, *, room: Room | None = None) -> Memory:
    """Read on the client what a training message tells of finished tasks; an empty memory where it tells nothing.

    Raises
    ------
    WireError
        If it is of other factors than there is `room` for.
    """
    parts = read_arrays(message.content.array_records[ARRAYS])
    memory = Memory(parts.get("anchor", {}), parts.get("fisher", {}))
    if room is not None:
        room.require_factors("the anchor of", memory.anchor)
        room.require_factors("the squared gradients of", memory.fisher)
    return memory


_DIGEST, _RUN = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{16}")
_LONGEST_HELD = 65 * 10_000  # characters: far more digests than a client keeps bases
_BEFORE = ".before"  # behind the names of the records that speak of an earlier state


def pack_patch(patch: Patch) -> ArrayRecord:
    """Put the tensors of a patch into one record, for all messages to clients that hold the same base."""
    tensors = {f"dense/{name}": value for name, value in patch.dense.items()}
    for index, step in enumerate(patch.steps):
        tensors |= {f"left {index}/{name}": change.left for name, change in step.items()}
        tensors |= {f"right {index}/{name}": change.right for name, change in step.items()}
    return array_record(tensors)


def add_patch(content: RecordDict, patch: Patch, arrays: ArrayRecord) -> RecordDict:
    """Give a message's content with what its client needs to reach the base; `arrays` is the packed patch."""
    return RecordDict({**content, BASE: ConfigRecord({"chain": " ".join(patch.chain)}), BASE_ARRAYS: arrays})


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


def read_patch(message: Message, *, room: Room | None = None) -> Patch:
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
    patch = Patch(tuple(chain), steps, base.get("dense", {}))
    if room is not None:
        room.require_patch(patch)
    return patch


def version_missing_reply(held: Sequence[str]) -> RecordDict:
    """Build the reply of a client that cannot reach the base; `held` are the digests of those it has."""
    return RecordDict({BASE: ConfigRecord({"held": " ".join(held)})})


def read_version_missing(message: Message) -> list[str] | None:
    """Give the digests held by a client that could not reach the base, or None for any other reply."""
    if BASE not in message.content.config_records:
        return None
    return str(message.content.config_records[BASE].get("held", ""))[:_LONGEST_HELD].split()
