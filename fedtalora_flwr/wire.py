"""Between Flower's records and our types: with `inprocess`, of the library files the one that knows Flower.

An array's key is its part and its place: ``lora_A/<module>``, ``lora_B/<module>``, ``head/<parameter>``; of the
base (see `Parcel`) ``left <i>/<module>`` and ``right <i>/<module>`` for the i-th step, ``dense/<module>``. Scalars
travel in config and metric records under kebab-case keys.
"""

import hashlib
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from copy import copy
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from torch import Tensor

import fedtalora_flwr
from fedtalora_flwr.aggregation import FACTORS, BadUpdate, ClientUpdate, GlobalState, LoraFactors, Step
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.data import ClassList, HeldClass
from fedtalora_flwr.heads import FeatureSums
from fedtalora_flwr.penalties import Memory
from fedtalora_flwr.residual import Parcel

ARRAYS, ORDER, METRICS, HELLO, BASE, BASE_ARRAYS = "arrays", "order", "metrics", "hello", "base", "base-arrays"
CLASSES, HELD = "classes", "held"
COUNTS = frozenset({"counts/class", "counts/examples"})
_QUOTED = re.compile(r"<class '[^']*'>:<'(.*)'>", re.DOTALL)  # an exception as Flower writes it
_LONGEST_HEADER = 256  # characters that describe an array; np.save writes some 60


class WireError(ValueError):
    """A message that the other side cannot use; the text is safe to send."""


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
    """

    partition_id: int
    num_partitions: int
    partition_hash: str
    class_counts: Tensor  # (C,)
    held: tuple[str, ...] = ()
    own: tuple[HeldClass, ...] = ()
    remarks: tuple[str, ...] = ()


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
    tensors = _pack_factors(state.adapters, trainable)
    if memory is not None:
        tensors |= {f"anchor/{key}": value for key, value in memory.anchor.items()}
        tensors |= {f"fisher/{key}": value for key, value in memory.fisher.items()}
    if classes is not None:
        rows = torch.tensor(sorted(set(classes)), dtype=torch.int64)
        tensors |= {f"head/{name}": value[rows] for name, value in state.head.items()}
        tensors["rows/class"] = rows.int()
    return _record(tensors)


def pack_parcel(parcel: Parcel) -> ArrayRecord:
    """Put the tensors of a parcel into one record, for all messages to clients that hold the same base."""
    tensors = {f"dense/{name}": value for name, value in parcel.dense.items()}
    for index, step in enumerate(parcel.steps):
        tensors |= {f"left {index}/{name}": change.left for name, change in step.items()}
        tensors |= {f"right {index}/{name}": change.right for name, change in step.items()}
    return _record(tensors)


def frozen_digest(adapters: Mapping[str, LoraFactors], trainable: frozenset[str]) -> str:
    """Name the factors that never change by their SHA-256; empty where all change."""
    frozen = _pack_factors(adapters, FACTORS - trainable)
    digest = hashlib.sha256()
    for key in sorted(frozen):
        digest.update(key.encode() + frozen[key].contiguous().numpy().tobytes())
    return digest.hexdigest() if frozen else ""


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
        "library": fedtalora_flwr.__version__,
    }
    return RecordDict({ARRAYS: arrays, ORDER: ConfigRecord(settings)})


def add_parcel(content: RecordDict, parcel: Parcel, arrays: ArrayRecord) -> RecordDict:
    """Give a message's content with what its client needs to reach the base; `arrays` is the packed parcel."""
    return RecordDict({**content, BASE: ConfigRecord({"chain": " ".join(parcel.chain)}), BASE_ARRAYS: arrays})


def bundle(parts: Mapping[int, RecordDict]) -> RecordDict:
    """Put the contents of messages about several slots into one: a record ``<key>`` of slot i is ``<key>.<i>``."""
    return RecordDict({f"{key}.{number}": record for number, part in parts.items() for key, record in part.items()})


def unbundle(message: Message) -> dict[int, Message]:
    """Take a message apart again, into one for each slot.

    Raises
    ------
    WireError
        If a record belongs to no slot.
    """
    parts: dict[int, dict[str, Any]] = {}
    for name, record in message.content.items():
        key, dot, number = name.rpartition(".")
        if not (dot and re.fullmatch(r"0|[1-9]\d{0,5}", number, re.ASCII)):
            raise WireError(f"record {name[:40]!r} belongs to no slot")
        parts.setdefault(int(number), {})[key] = record
    messages = {number: copy(message) for number in sorted(parts)}
    for slot, part in messages.items():
        part.content = RecordDict(parts[slot])
    return messages


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
    """Read the classes that the server told; none where it knows none yet."""
    if CLASSES not in message.content.config_records:
        return ClassList()
    settings = message.content.config_records[CLASSES]
    return ClassList(
        names=tuple(cast(list[str], settings["names"])),
        tasks=tuple(tuple(int(row) for row in rows.split()) for rows in cast(list[str], settings["tasks"])),
        task_names=tuple(cast(list[str], settings["task-names"])),
    )


def read_state(
    message: Message, *, initial: Callable[[], Mapping[str, LoraFactors]] | None = None
) -> tuple[GlobalState, Parcel, RoundOrder]:
    """Read a training message on the client: the state without its residual, and how to reach that.

    Head rows that were not sent are zero, and factors that were not sent are as they started.

    Parameters
    ----------
    message
        From the server.
    initial
        Gives the start of every pair; asked only where factors were left out.

    Raises
    ------
    WireError
        If the server runs another version of the library, or its pairs started otherwise than this side's.
    """
    settings = message.content.config_records[ORDER]
    check_library(str(settings["library"]), whose="server")
    parts = _parts(message.content.array_records[ARRAYS])
    if (frozen := str(settings["frozen"])) and initial is not None:
        started, trainable = initial(), frozenset(FACTORS & parts.keys())
        if frozen_digest(started, trainable) != frozen:
            raise WireError(
                "the server's pairs started from other numbers than this node draws for the same seed; install the "
                "server's version of PyTorch"
            )
        parts |= _frozen(started, trainable)
    head, rows = parts.get("head", {}), parts.get("rows", {}).get("class", torch.zeros(0)).long()
    num_classes = cast(int, settings["num-classes"])
    state = GlobalState(
        adapters=_factors(parts, scaling=cast(float, settings["scaling"])),
        head={
            name: value.new_zeros(num_classes, *value.shape[1:]).index_copy_(0, rows, value)
            for name, value in head.items()
        },
        version=cast(int, settings["version"]),
    )
    chain = str(message.content.config_records[BASE]["chain"]).split()
    base = _parts(message.content.array_records[BASE_ARRAYS])
    steps = tuple(
        {name: Step(left, base[f"right {index}"][name]) for name, left in base.get(f"left {index}", {}).items()}
        for index in range(len(chain) - 1)
    )
    clock = {key: cast(int, settings[key]) for key in ("server-round", "task-id", "round-in-task")}
    return (
        state,
        Parcel(tuple(chain), steps, base.get("dense", {})),
        RoundOrder(clock["server-round"], clock["task-id"], clock["round-in-task"]),
    )


def read_memory(message: Message) -> Memory:
    """Read on the client what a training message tells of finished tasks; an empty memory where it tells nothing."""
    record = message.content.array_records[ARRAYS]
    told = ArrayRecord({key: array for key, array in record.items() if key.startswith(("anchor/", "fisher/"))})
    parts = _parts(told)
    return Memory(parts.get("anchor", {}), parts.get("fisher", {}))


def base_missing_reply(held: Sequence[str]) -> RecordDict:
    """Build the reply of a client that cannot reach the base; `held` are the digests of those it has."""
    return RecordDict({BASE: ConfigRecord({"held": " ".join(held)})})


def read_base_missing(message: Message) -> list[str] | None:
    """Give the digests held by a client that could not reach the base, or None for any other reply."""
    if BASE not in message.content.config_records:
        return None
    return str(message.content.config_records[BASE].get("held", "")).split()


def update_reply(
    update: ClientUpdate,
    *,
    like: GlobalState,
    mean_loss: float,
    scaling: float,
    trainable: frozenset[str] = FACTORS,
    wire_dtype: str = "fp32",
) -> RecordDict:
    """Build the content of a training reply: the trained factors, and the head rows of the classes trained on.

    Parameters
    ----------
    update
        What was trained.
    like
        What it started from.
    mean_loss
        Over the client's steps.
    scaling
        Of all its pairs.
    trainable
        The factors that were trained; the server has the others.
    wire_dtype
        ``fp32`` sends the numbers as they are. ``fp16`` sends their change since `like`, each tensor times a
        power of two that takes its largest number near the top of half precision.
    """
    trained = update.class_counts.nonzero().flatten()
    tensors = _trained(update.adapters, update.head, trained, factors=trainable)
    metrics: dict[str, Any] = {
        "partition-id": update.partition_id,
        "num-examples": update.num_examples,
        "base-version": update.base_version,
        "scaling": scaling,
        "mean-loss": mean_loss,
    }
    if wire_dtype == "fp16":
        origin = _trained(like.adapters, like.head, trained, factors=trainable)
        halves = {key: _to_half(value - origin[key]) for key, value in tensors.items()}
        tensors = {key: half for key, (half, _) in halves.items()}
        metrics["exponents"] = [halves[key][1] for key in sorted(halves)]
    tensors |= {"counts/class": trained.int(), "counts/examples": update.class_counts[trained].int()}
    return RecordDict({ARRAYS: _record(tensors), METRICS: MetricRecord(metrics)})


def read_update(
    message: Message, *, like: GlobalState, trainable: frozenset[str] = FACTORS
) -> tuple[ClientUpdate, float]:
    """Read a training reply: the update and its mean loss.

    Head rows that were not sent are those of `like`, and so are factors other than the `trainable` ones.

    Raises
    ------
    BadUpdate
        If a part is missing or cannot be read.
    """
    try:
        metrics = message.content.metric_records[METRICS]
        names = {*_pack_factors(like.adapters, trainable), *(f"head/{name}" for name in like.head), *COUNTS}
        parts = _parts(message.content.array_records[ARRAYS], only=names)
        num_classes = len(next(iter(like.head.values()))) if like.head else 0
        counted = parts.pop("counts")
        trained = _class_numbers(counted["class"], num_classes)
        counts = _read_counts(counted, num_classes)
        if "exponents" in metrics:
            origin = _trained(like.adapters, like.head, trained, factors=trainable)
            parts = _from_halves(parts, cast(list[int], metrics["exponents"]), origin)
        parts = _frozen(like.adapters, trainable) | parts
        update = ClientUpdate(
            partition_id=_whole(metrics, "partition-id"),
            num_examples=_whole(metrics, "num-examples"),
            adapters=_factors(parts, scaling=float(cast(float, metrics["scaling"]))),
            head={name: _with_rows(like.head, name, trained, rows) for name, rows in parts.get("head", {}).items()},
            class_counts=counts,
            base_version=_whole(metrics, "base-version"),
        )
        mean_loss = float(cast(float, metrics["mean-loss"]))
    except BadUpdate:
        raise
    except Exception as error:  # whatever a foreign reply trips over, it is that reply which is refused
        raise BadUpdate(f"reply cannot be read: {type(error).__name__} {error}") from error
    if not math.isfinite(mean_loss):
        raise BadUpdate(f"mean-loss is {mean_loss}")
    return update, mean_loss


def hello_reply(hello: Hello) -> RecordDict:
    """Build the content of the reply to the first exchange."""
    settings = ConfigRecord(
        {
            "partition-id": hello.partition_id,
            "num-partitions": hello.num_partitions,
            "partition-hash": hello.partition_hash,
            "held": " ".join(hello.held),
            "library": fedtalora_flwr.__version__,
        }
    )
    content = RecordDict({HELLO: settings, ARRAYS: _record({"counts/class": hello.class_counts})})
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


def read_hello(message: Message) -> Hello:
    """Read the reply to the first exchange.

    Raises
    ------
    WireError
        If the client runs another version of the library, or the reply cannot be read.
    """
    try:
        settings = message.content.config_records[HELLO]
        check_library(str(settings["library"]), whose="client")
        own: Mapping[str, Any] = message.content.config_records.get(HELD, {})
        held = [own.get(key, []) for key in ("task", "name", "num-train", "num-test")]
        return Hello(
            partition_id=int(cast(int, settings["partition-id"])),
            num_partitions=int(cast(int, settings["num-partitions"])),
            partition_hash=str(settings["partition-hash"]),
            class_counts=_whole_numbers(_parts(message.content.array_records[ARRAYS])["counts"]["class"]),
            held=tuple(str(settings["held"]).split()),
            own=tuple(HeldClass(str(t), str(name), int(n), int(m)) for t, name, n, m in zip(*held, strict=True)),
            remarks=tuple(own.get("remarks", ())),
        )
    except KeyError as error:
        raise WireError(f"the first reply lacks {error}") from error
    except WireError:
        raise
    except Exception as error:  # as of an update
        raise WireError(f"the first reply cannot be read: {type(error).__name__} {error}") from error


def hits_reply(correct: Sequence[int], total: Sequence[int]) -> RecordDict:
    """Build the content of a reply with the hits on held-out examples, by task id."""
    return RecordDict({METRICS: MetricRecord({"num-correct": list(correct), "num-examples": list(total)})})


def read_hits(message: Message, *, num_tasks: int) -> tuple[list[int], list[int]]:
    """Read a reply with the hits on held-out examples of `num_tasks` tasks.

    Raises
    ------
    BadUpdate
        If a count is missing or impossible.
    """
    try:
        metrics = message.content.metric_records[METRICS]
        correct, total = (cast(list[int], metrics[key]) for key in ("num-correct", "num-examples"))
        fits = all(type(c) is type(n) is int and 0 <= c <= n for c, n in zip(correct, total, strict=True))
    except (KeyError, ValueError, TypeError) as error:
        raise BadUpdate(f"hits cannot be read: {type(error).__name__} {error}") from error
    if len(correct) != num_tasks or not fits:
        raise BadUpdate(f"hits {correct} of {total} are impossible for {num_tasks} tasks")
    return correct, total


def sums_reply(sums: FeatureSums) -> RecordDict:
    """Build the content of a reply with feature sums: half of the symmetric gram, and the rows that are not zero."""
    rows, columns = torch.triu_indices(*sums.gram.shape)
    held = sums.moment[:, -1].nonzero().flatten()  # the last feature is the constant 1: it counts the examples
    tensors = {"sums/gram": sums.gram[rows, columns], "sums/moment": sums.moment[held], "sums/class": held.int()}
    return RecordDict({ARRAYS: _record(tensors)})


def read_sums(message: Message, *, like: FeatureSums) -> FeatureSums:
    """Read a reply with feature sums.

    Raises
    ------
    BadUpdate
        If a part is missing, has another shape than in `like`, or holds a number that is not finite.
    """
    try:
        names = {"sums/gram", "sums/moment", "sums/class"}
        parts = _parts(message.content.array_records[ARRAYS], only=names)["sums"]
        triangle, moment = parts["gram"], parts["moment"]
        held = _class_numbers(parts["class"], len(like.moment))
        if not triangle.dtype == moment.dtype == torch.float64:
            raise ValueError(f"they hold {triangle.dtype} and {moment.dtype}, expected torch.float64")
    except Exception as error:  # as of an update
        raise BadUpdate(f"sums cannot be read: {type(error).__name__} {error}") from error
    rows, columns = torch.triu_indices(*like.gram.shape)
    if triangle.shape != rows.shape or moment.shape != (len(held), like.moment.shape[1]):
        raise BadUpdate(f"sums have shapes {tuple(triangle.shape)} and {tuple(moment.shape)}")
    if not (torch.isfinite(triangle).all() and torch.isfinite(moment).all()):
        raise BadUpdate("sums hold a number that is not finite")
    gram = torch.zeros_like(like.gram)
    gram[rows, columns] = gram[columns, rows] = triangle
    return FeatureSums(gram, torch.zeros_like(like.moment).index_copy_(0, held, moment))


def error_text(error: Error) -> str:
    """Give what a client's error says, without the trace and quotes that Flower and Ray put around its text."""
    reason = error.reason or f"error {error.code}"
    quoted = _QUOTED.fullmatch(reason)
    return (quoted[1] if quoted else reason).rpartition("ClientAppException occurred. Message: ")[2].strip()


def fisher_reply(sums: Mapping[str, Tensor], *, class_counts: Tensor) -> RecordDict:
    """Build the content of a reply with squared gradients, summed over the client's examples."""
    held = class_counts.nonzero().flatten()
    tensors = {f"fisher/{key}": value for key, value in sums.items()}
    return RecordDict(
        {ARRAYS: _record(tensors | {"counts/class": held.int(), "counts/examples": class_counts[held].int()})}
    )


def read_fisher(message: Message, *, like: GlobalState, trainable: frozenset[str]) -> tuple[dict[str, Tensor], Tensor]:
    """Read a reply with squared gradients: the sums by factor, and the examples of each class, (C,).

    Raises
    ------
    BadUpdate
        If a part is missing, has another shape than the factor, or holds a number that is no sum of squares.
    """
    factors = _pack_factors(like.adapters, trainable)
    try:
        names = {*(f"fisher/{key}" for key in factors), *COUNTS}
        parts = _parts(message.content.array_records[ARRAYS], only=names)
        counts = _read_counts(parts["counts"], len(next(iter(like.head.values()))))
        sums = parts.get("fisher", {})
    except Exception as error:  # as of an update
        raise BadUpdate(f"squared gradients cannot be read: {type(error).__name__} {error}") from error
    for key, factor in factors.items():
        if sums[key].shape != factor.shape or sums[key].dtype != torch.float32:
            got = f"{sums[key].dtype} {tuple(sums[key].shape)}"
            raise BadUpdate(f"squared gradients of {key} hold {got}, expected torch.float32 {tuple(factor.shape)}")
        if not (torch.isfinite(sums[key]).all() and (sums[key] >= 0).all()):
            raise BadUpdate(f"squared gradients of {key} hold a number that is negative or not finite")
    return sums, counts


def message_bytes(messages: Iterable[Message]) -> int:
    """Count the bytes that Flower moves for messages, whether or not a network is between the two sides.

    Flower takes a message's content apart into objects, named by the hash of what they hold, and moves a tree of the
    names and every object once. Messages may share records: these are taken apart once, and count for each.
    """
    total = 0
    sizes: dict[str, int] = {}  # object id -> bytes
    apart: dict[int, ArrayRecord] = {}  # id of a record -> its copy
    with no_object_id_recompute():
        for message in messages:
            if not message.has_content():
                continue
            for record in message.content.array_records.values():
                if id(record) not in apart:
                    apart[id(record)] = _same_arrays(record)
            content = RecordDict(
                {name: apart[id(r)] if isinstance(r, ArrayRecord) else r for name, r in message.content.items()}
            )
            objects = get_all_nested_objects(content)
            sizes |= {name: len(objects[name].deflate()) for name in objects.keys() - sizes.keys()}
            total += get_object_tree(content).ByteSize() + sum(sizes[name] for name in objects)
    return total


def _same_arrays(record: ArrayRecord) -> ArrayRecord:
    """Copy a record but not its bytes: an array that was taken apart holds views, and cannot be pickled any more."""
    return ArrayRecord({name: Array(a.dtype, a.shape, a.stype, a.data) for name, a in record.items()})


def check_library(version: str, *, whose: str) -> None:
    """Refuse to work with another version of this library.

    Raises
    ------
    WireError
        If `version` is not ours.
    """
    ours = fedtalora_flwr.__version__
    if version != ours:
        raise WireError(f"the {whose} runs fedtalora {version}, this side {ours}; install the same version on both")


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


def _pack_factors(adapters: Mapping[str, LoraFactors], factors: frozenset[str] = FACTORS) -> dict[str, Tensor]:
    return {f"{factor}/{name}": getattr(pair, factor) for name, pair in adapters.items() for factor in sorted(factors)}


def _trained(
    adapters: Mapping[str, LoraFactors], head: Mapping[str, Tensor], classes: Tensor, *, factors: frozenset[str]
) -> dict[str, Tensor]:
    return _pack_factors(adapters, factors) | {f"head/{name}": value[classes] for name, value in head.items()}


def _frozen(adapters: Mapping[str, LoraFactors], trainable: frozenset[str]) -> dict[str, dict[str, Tensor]]:
    """Give the factors that no client sends, as parts of a record."""
    return {factor: {name: getattr(pair, factor) for name, pair in adapters.items()} for factor in FACTORS - trainable}


def _to_half(change: Tensor) -> tuple[Tensor, int]:
    """Scale a tensor by 2^exponent into half precision; the largest number comes to rest in (2^14, 2^15]."""
    largest = float(change.abs().max()) if change.numel() else 0.0
    exponent = 15 - math.ceil(math.log2(largest)) if 0 < largest < math.inf else 0
    return (change.double() * 2.0**exponent).half(), exponent


def _from_halves(
    parts: Mapping[str, Mapping[str, Tensor]], exponents: Sequence[int], origin: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    halves = {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}
    whole: dict[str, dict[str, Tensor]] = {}
    for key, exponent in zip(sorted(halves), exponents, strict=True):
        half, start = halves[key], origin[key]
        if half.shape != start.shape or half.dtype != torch.float16:
            got, want = f"{half.dtype} {tuple(half.shape)}", f"torch.float16 {tuple(start.shape)}"
            raise ValueError(f"{key} holds {got}, expected {want}")
        part, _, name = key.partition("/")
        whole.setdefault(part, {})[name] = (start.double() + half.double() * 2.0**-exponent).float()
    return whole


def _class_numbers(sent: Tensor, num_classes: int) -> Tensor:
    """Check a list of classes: rising, each in [0, num_classes)."""
    classes = _whole_numbers(sent)
    if len(classes) and (classes[0] < 0 or classes[-1] >= num_classes or (classes.diff() <= 0).any()):
        raise ValueError(f"classes must rise within 0-{num_classes - 1}")
    return classes


def _read_counts(counted: Mapping[str, Tensor], num_classes: int) -> Tensor:
    """Read the examples of each class held, (C,) int64."""
    held, examples = _class_numbers(counted["class"], num_classes), _whole_numbers(counted["examples"])
    if examples.shape != held.shape:
        raise ValueError(f"{len(held)} classes have examples of shape {tuple(examples.shape)}")
    return torch.zeros(num_classes, dtype=torch.int64).index_copy_(0, held, examples)


def _whole_numbers(sent: Tensor) -> Tensor:
    """Check a list of whole numbers, (n,), and give it as int64."""
    if sent.dtype not in (torch.int32, torch.int64) or sent.dim() != 1:
        raise ValueError(f"a list of whole numbers was expected, got {sent.dtype} {tuple(sent.shape)}")
    return sent.long()


def _whole(metrics: MetricRecord, key: str) -> int:
    value = metrics[key]
    if not isinstance(value, int):
        raise TypeError(f"{key} is {value!r}, not a whole number")
    return value


def _with_rows(head: Mapping[str, Tensor], name: str, classes: Tensor, rows: Tensor) -> Tensor:
    """Fill a client's rows into the broadcast parameter; a row of another kind is refused by name."""
    if name not in head:
        return rows
    wanted = (len(classes), *head[name].shape[1:])
    if rows.dtype != head[name].dtype:
        raise BadUpdate(f"head {name} holds {rows.dtype}, expected {head[name].dtype}")
    if rows.shape != wanted:
        raise BadUpdate(f"head {name} has shape {tuple(rows.shape)}, expected {wanted}")
    return head[name].index_copy(0, classes, rows)


def _factors(parts: Mapping[str, Mapping[str, Tensor]], *, scaling: float) -> dict[str, LoraFactors]:
    lora_A, lora_B = parts.get("lora_A", {}), parts.get("lora_B", {})
    if lora_A.keys() != lora_B.keys():
        raise ValueError("lora_A and lora_B are for different modules")
    return {name: LoraFactors(lora_A[name], lora_B[name], scaling) for name in lora_A}


def _record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    return ArrayRecord({key: Array(value.contiguous().numpy()) for key, value in tensors.items()})


def _parts(record: ArrayRecord, *, only: Set[str] | None = None) -> dict[str, dict[str, Tensor]]:
    """Read the arrays of a record; with `only`, it must hold these and no others."""
    if only is not None and record.keys() != only:
        missing, unknown = sorted(only - record.keys())[:3], sorted(record.keys() - only)[:3]
        raise ValueError(f"arrays: missing {missing}, unknown {unknown}")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, array in record.items():
        part, _, name = key.partition("/")
        _check_bytes(key, array)
        # np.load of the wire's bytes gives arrays that own their memory, so no copy is needed.
        parts.setdefault(part, {})[name] = torch.from_numpy(np.ascontiguousarray(array.numpy()))
    return parts


def _check_bytes(key: str, array: Array) -> None:
    """Refuse an array whose bytes are not what it declares: NumPy would first make room for all that they claim."""
    file = io.BytesIO(array.data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError(f"{key} is not an array as np.save writes it")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=_LONGEST_HEADER)
    if (str(dtype), shape) != (array.dtype, tuple(array.shape)):
        raise ValueError(f"{key} declares {array.dtype} {tuple(array.shape)} and holds {dtype} {shape}")
    if len(array.data) - file.tell() != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{key} is cut short or too long for {dtype} {shape}")
