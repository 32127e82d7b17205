"""The state that clients train from, with the server's clock and what a penalty remembers, down."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

import fedtalora_flwr
from fedtalora_flwr.aggregation import FACTORS, GlobalState, LoraFactors
from fedtalora_flwr.penalties import Memory
from fedtalora_flwr.residual import Parcel
from fedtalora_flwr.wire.factors import frozen_digest, frozen_factors, pack_factors, read_factors
from fedtalora_flwr.wire.parcel import read_parcel
from fedtalora_flwr.wire.records import ARRAYS, ORDER, array_record, read_arrays
from fedtalora_flwr.wire.refusal import WireError, check_library
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
    """

    server_round: int
    task_id: int
    round_in_task: int


def pack_state(
    state: GlobalState,
    *,
    classes: Sequence[int] | None = None,
    memory: Memory | None = None,
    trainable: frozenset[str] = FACTORS,
) -> ArrayRecord:
    """Put the shared tensors of a state into one record; share it among messages, it is serialised once.

    Parameters
    ----------
    state
        Its residual is left out: it travels as a `Parcel`, as far as a client needs it.
    classes
        The class rows of the head that the clients need; None where they need no head.
    memory
        What a penalty needs of finished tasks.
    trainable
        The factors that change; a client draws the others itself, as they started.
    """
    tensors = pack_factors(state.adapters, trainable)
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
    """Build the content of a training message, but for the base (see `add_parcel`).

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
    return RecordDict({ARRAYS: arrays, ORDER: ConfigRecord(settings)})


def read_state(
    message: Message, *, initial: Callable[[], Mapping[str, LoraFactors]] | None = None, room: Room | None = None
) -> tuple[GlobalState, Parcel, RoundOrder]:
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
        If the server runs another version of the library, its pairs started otherwise than this side's, or it speaks of
        sizes that this side does not have.
    """
    settings = message.content.config_records[ORDER]
    check_library(str(settings["library"]), whose="server")
    parts = read_arrays(message.content.array_records[ARRAYS])
    if (frozen := str(settings["frozen"])) and initial is not None:
        started, trainable = initial(), frozenset(FACTORS & parts.keys())
        if frozen_digest(started, trainable) != frozen:
            raise WireError(
                "the server's pairs started from other numbers than this node draws for the same seed; install the "
                "server's version of PyTorch"
            )
        parts |= frozen_factors(started, trainable)
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
    clock = (cast(int, settings[key]) for key in ("server-round", "task-id", "round-in-task"))
    if room is not None:
        room.require_pairs(state.adapters)
    return state, read_parcel(message, room=room), RoundOrder(*clock)


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
