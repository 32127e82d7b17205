"""Between Flower's records and our types: the only library file that imports flwr.

An array's key is its part and its place: ``lora_A/<module>``, ``lora_B/<module>``, ``residual/<module>``,
``head/<parameter>``. Scalars travel in config and metric records under kebab-case keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

import fedtalora_flwr
from fedtalora_flwr.aggregation import BadUpdate, ClientUpdate, GlobalState, LoraFactors
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.heads import FeatureSums

ARRAYS, ORDER, METRICS, HELLO = "arrays", "order", "metrics", "hello"


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
        (C,) int64, its training examples of each class.
    """

    partition_id: int
    num_partitions: int
    partition_hash: str
    class_counts: Tensor  # (C,)


def pack_state(state: GlobalState) -> ArrayRecord:
    """Put a state's tensors into one record; share it among messages, it is serialised once."""
    tensors = _pack_factors(state.adapters)
    tensors |= {f"residual/{name}": value for name, value in state.residual.items()}
    tensors |= {f"head/{name}": value for name, value in state.head.items()}
    return _record(tensors)


def state_message(arrays: ArrayRecord, order: RoundOrder, *, scaling: float, version: int) -> RecordDict:
    """Build the content of a training message."""
    settings: dict[str, Any] = {
        "server-round": order.server_round,
        "task-id": order.task_id,
        "round-in-task": order.round_in_task,
        "scaling": scaling,
        "version": version,
        "library": fedtalora_flwr.__version__,
    }
    return RecordDict({ARRAYS: arrays, ORDER: ConfigRecord(settings)})


def read_state(message: Message) -> tuple[GlobalState, RoundOrder]:
    """Read a training message on the client.

    Raises
    ------
    WireError
        If the server runs another version of the library.
    """
    settings = message.content.config_records[ORDER]
    check_library(str(settings["library"]), whose="server")
    parts = _parts(message.content.array_records[ARRAYS])
    state = GlobalState(
        adapters=_factors(parts, scaling=cast(float, settings["scaling"])),
        residual=parts.get("residual", {}),
        head=parts.get("head", {}),
        version=cast(int, settings["version"]),
    )
    clock = {key: cast(int, settings[key]) for key in ("server-round", "task-id", "round-in-task")}
    return state, RoundOrder(clock["server-round"], clock["task-id"], clock["round-in-task"])


def update_reply(update: ClientUpdate, *, mean_loss: float, scaling: float) -> RecordDict:
    """Build the content of a training reply."""
    tensors = _pack_factors(update.adapters)
    tensors |= {f"head/{name}": value for name, value in update.head.items()}
    tensors["counts/class"] = update.class_counts
    metrics = MetricRecord(
        {
            "partition-id": update.partition_id,
            "num-examples": update.num_examples,
            "base-version": update.base_version,
            "scaling": scaling,
            "mean-loss": mean_loss,
        }
    )
    return RecordDict({ARRAYS: _record(tensors), METRICS: metrics})


def read_update(message: Message) -> tuple[ClientUpdate, float]:
    """Read a training reply: the update and its mean loss.

    Raises
    ------
    BadUpdate
        If a part is missing or cannot be read.
    """
    try:
        metrics = message.content.metric_records[METRICS]
        parts = _parts(message.content.array_records[ARRAYS])
        update = ClientUpdate(
            partition_id=int(cast(int, metrics["partition-id"])),
            num_examples=int(cast(int, metrics["num-examples"])),
            adapters=_factors(parts, scaling=float(cast(float, metrics["scaling"]))),
            head=parts.get("head", {}),
            class_counts=parts["counts"]["class"],
            base_version=int(cast(int, metrics["base-version"])),
        )
        return update, float(cast(float, metrics["mean-loss"]))
    except (KeyError, ValueError, TypeError, IndexError, OverflowError) as error:
        raise BadUpdate(f"reply cannot be read: {type(error).__name__} {error}") from error


def hello_reply(hello: Hello) -> RecordDict:
    """Build the content of the reply to the first exchange."""
    settings = ConfigRecord(
        {
            "partition-id": hello.partition_id,
            "num-partitions": hello.num_partitions,
            "partition-hash": hello.partition_hash,
            "library": fedtalora_flwr.__version__,
        }
    )
    return RecordDict({HELLO: settings, ARRAYS: _record({"counts/class": hello.class_counts})})


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
        return Hello(
            partition_id=int(cast(int, settings["partition-id"])),
            num_partitions=int(cast(int, settings["num-partitions"])),
            partition_hash=str(settings["partition-hash"]),
            class_counts=_parts(message.content.array_records[ARRAYS])["counts"]["class"],
        )
    except KeyError as error:
        raise WireError(f"the first reply lacks {error}") from error


def sums_reply(sums: FeatureSums) -> RecordDict:
    """Build the content of a reply with feature sums."""
    rows, columns = torch.triu_indices(*sums.gram.shape)
    triangle = sums.gram[rows, columns]  # the gram is symmetric: half of it says all
    return RecordDict({ARRAYS: _record({"sums/gram": triangle, "sums/moment": sums.moment})})


def read_sums(message: Message, *, like: FeatureSums) -> FeatureSums:
    """Read a reply with feature sums.

    Raises
    ------
    BadUpdate
        If a part is missing, has another shape than in `like`, or holds a number that is not finite.
    """
    try:
        parts = _parts(message.content.array_records[ARRAYS])["sums"]
        triangle, moment = parts["gram"].double(), parts["moment"].double()
    except (KeyError, ValueError, TypeError) as error:
        raise BadUpdate(f"sums cannot be read: {type(error).__name__} {error}") from error
    rows, columns = torch.triu_indices(*like.gram.shape)
    if triangle.shape != rows.shape or moment.shape != like.moment.shape:
        raise BadUpdate(f"sums have shapes {tuple(triangle.shape)} and {tuple(moment.shape)}")
    if not (torch.isfinite(triangle).all() and torch.isfinite(moment).all()):
        raise BadUpdate("sums hold a number that is not finite")
    gram = torch.zeros_like(like.gram)
    gram[rows, columns] = gram[columns, rows] = triangle
    return FeatureSums(gram, moment)


def message_bytes(message: Message) -> int:
    """Count the bytes of a message's records."""
    if not message.has_content():
        return 0
    return sum(record.count_bytes() for record in message.content.values())


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


def _pack_factors(adapters: Mapping[str, LoraFactors]) -> dict[str, Tensor]:
    return {
        f"{factor}/{name}": getattr(pair, factor) for name, pair in adapters.items() for factor in ("lora_A", "lora_B")
    }


def _factors(parts: Mapping[str, Mapping[str, Tensor]], *, scaling: float) -> dict[str, LoraFactors]:
    lora_A, lora_B = parts.get("lora_A", {}), parts.get("lora_B", {})
    if lora_A.keys() != lora_B.keys():
        raise ValueError("lora_A and lora_B are for different modules")
    return {name: LoraFactors(lora_A[name], lora_B[name], scaling) for name in lora_A}


def _record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    return ArrayRecord({key: Array(value.contiguous().numpy()) for key, value in tensors.items()})


def _parts(record: ArrayRecord) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, array in record.items():
        part, _, name = key.partition("/")
        # np.load of the wire's bytes gives arrays that own their memory, so no copy is needed.
        parts.setdefault(part, {})[name] = torch.from_numpy(np.ascontiguousarray(array.numpy()))
    return parts
