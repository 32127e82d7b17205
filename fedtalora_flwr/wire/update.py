"""What a client trained, up: its factors and the head rows of its classes, whole or in half precision."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from flwr.app import Message, MetricRecord, RecordDict
from torch import Tensor

from fedtalora_flwr.aggregation import FACTORS, BadUpdate, ClientUpdate, GlobalState, LoraFactors
from fedtalora_flwr.wire.records import (
    ARRAYS,
    COUNTS,
    EPSILON,
    METRICS,
    array_record,
    class_numbers,
    frozen_factors,
    pack_counts,
    pack_factors,
    read_arrays,
    read_counts,
    read_factors,
)


def update_reply(
    update: ClientUpdate,
    *,
    like: GlobalState,
    mean_loss: float,
    scaling: float,
    trainable: frozenset[str] = FACTORS,
    wire_dtype: str = "fp32",
    epsilon_spent: float | None = None,
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
    epsilon_spent
        What the client's training on the task has cost so far, where it is private; its loss is not told then.
    """
    trained = update.class_counts.nonzero().flatten()
    tensors = _trained(update.adapters, update.head, trained, factors=trainable)
    metrics: dict[str, Any] = {
        "partition-id": update.partition_id,
        "num-examples": update.num_examples,
        "base-version": update.base_version,
        "scaling": scaling,
        **({"mean-loss": mean_loss} if epsilon_spent is None else {EPSILON: epsilon_spent}),
    }
    if wire_dtype == "fp16":
        origin = _trained(like.adapters, like.head, trained, factors=trainable)
        halves = {key: _to_half(value - origin[key]) for key, value in tensors.items()}
        tensors = {key: half for key, (half, _) in halves.items()}
        metrics["exponents"] = [halves[key][1] for key in sorted(halves)]
    tensors |= pack_counts(update.class_counts)
    tensors |= {f"gram/{name}": gram[_upper(len(gram))] for name, gram in update.grams.items()}
    return RecordDict({ARRAYS: array_record(tensors), METRICS: MetricRecord(metrics)})


def read_update(
    message: Message,
    *,
    like: GlobalState,
    trainable: frozenset[str] = FACTORS,
    grams: bool = False,
    private: bool = False,
) -> tuple[ClientUpdate, float]:
    """Read a training reply: the update and its mean loss, NaN where training is `private`.

    Head rows that were not sent are those of `like`, and so are factors other than the `trainable` ones. With `grams`
    there is a Gram matrix for each module.

    Raises
    ------
    BadUpdate
        If a part is missing or cannot be read.
    """
    try:
        metrics = message.content.metric_records[METRICS]
        names = {*pack_factors(like.adapters, trainable), *(f"head/{name}" for name in like.head), *COUNTS}
        if grams:
            names |= {f"gram/{name}" for name in like.adapters}
        parts = read_arrays(message.content.array_records[ARRAYS], only=names)
        num_classes = len(next(iter(like.head.values()))) if like.head else 0
        counted, halved = parts.pop("counts"), parts.pop("gram", {})
        trained = class_numbers(counted["class"], num_classes)
        counts = read_counts(counted, num_classes)
        if "exponents" in metrics:
            origin = _trained(like.adapters, like.head, trained, factors=trainable)
            parts = _from_halves(parts, cast(list[int], metrics["exponents"]), origin)
        parts = frozen_factors(like.adapters, trainable) | parts
        update = ClientUpdate(
            partition_id=_whole(metrics, "partition-id"),
            num_examples=_whole(metrics, "num-examples"),
            adapters=read_factors(parts, scaling=float(cast(float, metrics["scaling"]))),
            head={name: _with_rows(like.head, name, trained, rows) for name, rows in parts.get("head", {}).items()},
            class_counts=counts,
            base_version=_whole(metrics, "base-version"),
            grams={name: _from_upper(half, gram_size(like.adapters[name], trainable)) for name, half in halved.items()},
        )
        mean_loss = math.nan if private else float(cast(float, metrics["mean-loss"]))
    except BadUpdate:
        raise
    except Exception as error:  # whatever a foreign reply trips over, it is that reply which is refused
        raise BadUpdate(f"reply cannot be read: {type(error).__name__} {error}") from error
    if not (private or math.isfinite(mean_loss)):
        raise BadUpdate(f"mean-loss is {mean_loss}")
    return update, mean_loss


def gram_size(pair: LoraFactors, trainable: frozenset[str]) -> int:
    """Give the rows of a module's Gram matrix: d_in where lora_A was trained, else the rank."""
    return pair.lora_A.shape[1] if "lora_A" in trainable else pair.rank


def _upper(size: int) -> tuple[Tensor, Tensor]:
    """Give the places of a symmetric matrix that travel."""
    rows, columns = torch.triu_indices(size, size)
    return rows, columns


def _from_upper(half: Tensor, size: int) -> Tensor:
    rows, columns = _upper(size)
    if half.shape != rows.shape:
        raise ValueError(f"half of a Gram matrix holds {tuple(half.shape)} numbers, expected {len(rows)}")
    whole = half.new_zeros(size, size)
    whole[rows, columns] = half
    whole[columns, rows] = half
    return whole


def read_epsilon(message: Message, *, budget: float) -> float:
    """Read from a reply of private training what the client says that it has spent on the task.

    Raises
    ------
    BadUpdate
        If it says nothing, or something that is not within the budget.
    """
    try:
        epsilon = float(cast(float, message.content.metric_records[METRICS][EPSILON]))
    except (KeyError, TypeError, ValueError) as error:
        raise BadUpdate(f"says not what it has spent of its privacy: {type(error).__name__} {error}") from error
    if not 0 < epsilon <= budget:
        raise BadUpdate(f"says that it has spent an epsilon of {epsilon:g}, dp-epsilon is {budget:g}")
    return epsilon


def _trained(
    adapters: Mapping[str, LoraFactors], head: Mapping[str, Tensor], classes: Tensor, *, factors: frozenset[str]
) -> dict[str, Tensor]:
    return pack_factors(adapters, factors) | {f"head/{name}": value[classes] for name, value in head.items()}


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


def _whole(metrics: MetricRecord, key: str) -> int:
    value = metrics[key]
    if not isinstance(value, int):
        raise TypeError(f"{key} is {value!r}, not a whole number")
    return value
