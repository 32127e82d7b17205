"""Who a client is and what it holds, up; and the classes that the server knows by then, down."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from torch import Tensor

import fedtalora_flwr
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.config.units import one_line
from fedtalora_flwr.data import MOST_CLASSES, ClassList, HeldClass, as_read
from fedtalora_flwr.wire.errors import WireError, check_library
from fedtalora_flwr.wire.records import (
    ARRAYS,
    CLASSES,
    HELD,
    HELLO,
    MOST_EXAMPLES,
    array_record,
    read_arrays,
    whole_numbers,
)

_LONGEST_OWN_NAME = 32
_LONGEST_NAME, _LONGEST_REMARK, _MOST_NAMES = 200, 500, 10_000  # of one node


@dataclass(frozen=True)
class Hello:
    """What a client says of itself before the first round.

    Parameters
    ----------
    partition_id, num_partitions
        From the node's config.
    partition_hash
        SHA-256 over the row numbers and labels it holds, all tasks.
    class_counts
        (C,) int64, its training examples of each class; empty where it brings data of its own.
    held
        Digests of the bases that it holds from before, if it was there when the run was begun.
    own
        The classes of the data that it brings, by name.
    remarks
        What is odd about these data.
    name
        What people call the node, as its config says; nothing depends on it.
    """

    partition_id: int
    num_partitions: int
    partition_hash: str
    class_counts: Tensor  # (C,)
    held: tuple[str, ...] = ()
    own: tuple[HeldClass, ...] = ()
    remarks: tuple[str, ...] = ()
    name: str = ""


def hello_reply(hello: Hello) -> RecordDict:
    """Build the content of the reply to the first exchange."""
    settings = ConfigRecord(
        {
            "name": hello.name,
            "partition-id": hello.partition_id,
            "num-partitions": hello.num_partitions,
            "partition-hash": hello.partition_hash,
            "held": " ".join(hello.held),
            "library": fedtalora_flwr.build(),
        }
    )
    content = RecordDict({HELLO: settings, ARRAYS: array_record({"counts/class": hello.class_counts})})
    if hello.own or hello.remarks:
        content[HELD] = ConfigRecord(
            {
                "task": [one.task for one in hello.own],
                "name": [one.name for one in hello.own],
                "num-train": [one.num_train for one in hello.own],
                "num-test": [one.num_test for one in hello.own],
                "remarks": list(hello.remarks),
            }
        )
    return content


def refusal_reply(reason: str, *, partition_id: int | None, name: str = "") -> RecordDict:
    """Build the content of the reply by which a node says that it cannot take part, and why."""
    claim: dict[str, Any] = {} if partition_id is None else {"partition-id": partition_id}
    settings = {**claim, "name": name, "refusal": reason, "library": fedtalora_flwr.build()}
    return RecordDict({HELLO: ConfigRecord(settings)})


def read_hello(message: Message) -> Hello:
    """Read the reply to the first exchange.

    Raises
    ------
    WireError
        If the client runs another version of the library, says that it cannot take part, or cannot be understood.
    """
    try:
        settings = message.content.config_records[HELLO]
        check_library(_text(settings["library"]), whose="client")
        if "refusal" in settings:
            raise WireError(_text(settings["refusal"]))
        own: Mapping[str, Any] = message.content.config_records[HELD] if HELD in message.content else {}
        counts = read_arrays(message.content.array_records[ARRAYS], only={"counts/class"})["counts"]["class"]
        return Hello(
            partition_id=_whole(settings["partition-id"], what="partition-id"),
            num_partitions=_whole(settings["num-partitions"], what="num-partitions"),
            partition_hash=_name(settings["partition-hash"]),
            class_counts=_counts(whole_numbers(counts)),
            name=_name(settings["name"]),
            held=tuple(_name(digest) for digest in _list(_text(settings["held"]).split())),
            own=_held_classes(own) if own else (),
            remarks=tuple(one_line(_text(r), most=_LONGEST_REMARK) for r in _list(own["remarks"])) if own else (),
        )
    except KeyError as error:
        raise WireError(f"the first reply lacks {error}") from error
    except WireError:
        raise
    except Exception as error:  # as of an update
        raise WireError(f"the first reply cannot be read: {type(error).__name__} {error}") from error


def claimed_partition(message: Message) -> int | None:
    """Give the partition that a first reply claims, though the rest of it be of no use; None where it claims none."""
    settings: Mapping[str, Any] = message.content.config_records.get(HELLO, {})
    claimed = settings.get("partition-id")
    return claimed if type(claimed) is int else None


def claimed_name(message: Message) -> str:
    """Give the name by which the node of a first reply calls itself, for people to read; empty where it has none."""
    settings: Mapping[str, Any] = message.content.config_records.get(HELLO, {})
    name = settings.get("name", "")
    return one_line(name, most=_LONGEST_OWN_NAME) if isinstance(name, str) else ""


def _held_classes(own: Mapping[str, Any]) -> tuple[HeldClass, ...]:
    """Read the classes of a node's own data: each at one place, with a name and possible numbers of examples."""
    columns = [_list(own[key]) for key in ("task", "name", "num-train", "num-test")]
    classes = []
    for task, name, *examples in zip(*columns, strict=True):
        if not _name(name):
            raise ValueError("a class has no name")
        num_train, num_test = _counts(torch.tensor([_whole(count, what=f"examples of {name}") for count in examples]))
        classes.append(HeldClass(_name(task), name, int(num_train), int(num_test)))
    if len({(one.task, one.name) for one in classes}) < len(classes):
        raise ValueError("a class is named twice")
    return tuple(classes)


def _whole(value: Any, *, what: str) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{what} must be a whole number from 0, got {value!r}")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"a text was expected, got {value!r}")
    return value


def _name(value: Any) -> str:
    """Read a name that stands in logs, on pages and in file names: short, and with nothing that steers a terminal."""
    name = _text(value)
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"a name has {len(name)} characters, at most {_LONGEST_NAME} are taken: {name[:40]!r}...")
    if not name.isprintable():
        raise ValueError(f"the name {name!r} has characters that cannot be printed")
    return name if as_read(name) else ""


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise ValueError(f"a list was expected, got {value!r}")
    if len(value) > _MOST_NAMES:
        raise ValueError(f"a list of {len(value)} is too long, at most {_MOST_NAMES} are taken")
    return value


def _counts(counts: Tensor) -> Tensor:
    """Refuse numbers of examples that cannot be: below 0, or more than an update could count."""
    if len(counts) and not 0 <= counts.min() <= counts.max() <= MOST_EXAMPLES:
        raise ValueError(f"{counts.min()} to {counts.max()} examples of a class cannot be")
    return counts


def tell_classes(classes: ClassList | None) -> RecordDict:
    """Pack the classes for a node that brings its own data, beside a message's other records; None: nothing yet."""
    if classes is None:
        return RecordDict()
    settings: dict[str, Any] = {
        "names": list(classes.names),
        "tasks": [" ".join(map(str, rows)) for rows in classes.tasks],
        "task-names": list(classes.task_names),
    }
    return RecordDict({CLASSES: ConfigRecord(settings)})


def read_classes(message: Message) -> ClassList:
    """Read the classes that the server told; none where it knows none yet.

    Raises
    ------
    WireError
        If there are more classes than a run has, or a task has one that the list does not name.
    """
    if CLASSES not in message.content.config_records:
        return ClassList()
    settings = message.content.config_records[CLASSES]
    names = tuple(cast(list[str], settings["names"]))
    if len(names) > MOST_CLASSES:
        raise WireError(f"the server told {len(names)} classes, a run has at most {MOST_CLASSES}")
    tasks = tuple(tuple(int(row) for row in rows.split()) for rows in cast(list[str], settings["tasks"]))
    if odd := [row for rows in tasks for row in rows if not 0 <= row < len(names)]:
        raise WireError(f"a task has class {odd[0]}, the server told {len(names)} classes")
    return ClassList(
        names=names,
        tasks=tasks,
        task_names=tuple(cast(list[str], settings["task-names"])),
    )


def partition_of(node_config: Mapping[str, Any], config: RunConfig) -> int:
    """Read which partition a node holds.

    Raises
    ------
    WireError
        If the node has none, or one that the run does not have.
    """
    try:
        partition_id = int(node_config["partition-id"])
    except KeyError:
        raise WireError("this node has no partition-id; start it with --node-config 'partition-id=0 ...'") from None
    if not 0 <= partition_id < config.num_clients:
        raise WireError(f"partition-id {partition_id} is not among the {config.num_clients} of num-clients")
    return partition_id
