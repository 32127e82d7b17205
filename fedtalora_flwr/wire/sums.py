"""What clients sum over their examples, up: features for the head, squared gradients for a penalty, and hits."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from flwr.app import Message, MetricRecord, RecordDict
from torch import Tensor

from fedtalora_flwr.aggregation import BadUpdate, GlobalState
from fedtalora_flwr.model.heads import FeatureRoot, FeatureSums
from fedtalora_flwr.wire.records import (
    ARRAYS,
    COUNTS,
    DRIFT,
    EPSILON,
    METRICS,
    MOST_EXAMPLES,
    array_record,
    class_numbers,
    pack_counts,
    pack_factors,
    read_arrays,
    read_counts,
)


def sums_reply(root: FeatureRoot, drift: Tensor | None = None, *, epsilon_spent: float | None = None) -> RecordDict:
    """Build the content of a reply with feature sums: roots from their diagonal on, and the rows that are not zero.

    Parameters
    ----------
    root
        Of the features.
    drift
        The root of features before and now, (k, 2 d + 1); see `FeatureSums.followed`.
    epsilon_spent
        What the task has cost the client so far, where the sums are private.
    """
    held = root.moment[:, -1].nonzero().flatten()  # the last feature is the constant 1: it counts the examples
    tensors = {"sums/root": _upper(root.root), "sums/moment": root.moment[held], "sums/class": held.int()}
    content = RecordDict({ARRAYS: array_record(tensors)})
    if drift is not None:
        content[DRIFT] = array_record({"drift/root": _upper(drift)})
    if epsilon_spent is not None:
        content[METRICS] = MetricRecord({EPSILON: epsilon_spent})
    return content


def read_sums(message: Message, *, like: FeatureSums) -> FeatureSums:
    """Read a reply with feature sums.

    Raises
    ------
    BadUpdate
        If a part is missing, has another shape than in `like`, or holds a number that is not finite.
    """
    try:
        names = {"sums/root", "sums/moment", "sums/class"}
        parts = read_arrays(message.content.array_records[ARRAYS], only=names)["sums"]
        upper, moment = parts["root"], parts["moment"]
        held = class_numbers(parts["class"], len(like.moment))
        if not upper.dtype == moment.dtype == torch.float64:
            raise ValueError(f"they hold {upper.dtype} and {moment.dtype}, expected torch.float64")
    except Exception as error:  # as of an update
        raise BadUpdate(f"sums cannot be read: {type(error).__name__} {error}") from error
    if moment.shape != (len(held), like.moment.shape[1]):
        raise BadUpdate(f"sums have a moment of shape {tuple(moment.shape)}")
    if not torch.isfinite(moment).all():
        raise BadUpdate("sums hold a number that is not finite")
    size = len(like.gram)
    root = _triangle(upper, num_vectors=int(moment[:, -1].sum().clamp(0, size)), size=size)
    return FeatureRoot(root, torch.zeros_like(like.moment).index_copy_(0, held, moment)).sums()


def read_drift(message: Message, *, num_vectors: int, feature_dim: int) -> Tensor:
    """Read from a reply with feature sums how features have moved: a root, (k, 2 d + 1) float64.

    Parameters
    ----------
    message
        The reply.
    num_vectors
        That it must be over: the client's examples, times the views of each.
    feature_dim
        d.

    Raises
    ------
    BadUpdate
        If it is missing, has another shape, or holds a number that is not finite.
    """
    try:
        upper = read_arrays(message.content.array_records[DRIFT], only={"drift/root"})["drift"]["root"]
        if upper.dtype != torch.float64:
            raise ValueError(f"it holds {upper.dtype}, expected torch.float64")
    except Exception as error:  # as of an update
        raise BadUpdate(f"the drift cannot be read: {type(error).__name__} {error}") from error
    return _triangle(upper, num_vectors=num_vectors, size=2 * feature_dim + 1)


def _upper(root: Tensor) -> Tensor:
    rows, columns = torch.triu_indices(*root.shape)
    return root[rows, columns]


def _triangle(upper: Tensor, *, num_vectors: int, size: int) -> Tensor:
    """Undo `_upper` of a root over so many vectors: it has a row for each, up to its width."""
    num_rows = min(num_vectors, size)
    rows, columns = torch.triu_indices(num_rows, size)
    if upper.shape != rows.shape:
        raise BadUpdate(f"sums have a root of {tuple(upper.shape)} numbers, expected {len(rows)} in {num_rows} rows")
    if not torch.isfinite(upper).all():
        raise BadUpdate("sums hold a number that is not finite")
    root = upper.new_zeros(num_rows, size)
    root[rows, columns] = upper
    return root


def means_reply(moment: Tensor) -> RecordDict:
    """Build the content of a reply with the sums of a client's features by class, (C, d + 1); see `FeatureSums`."""
    held = moment[:, -1].nonzero().flatten()
    return RecordDict({ARRAYS: array_record({"means/moment": moment[held], "means/class": held.int()})})


def read_means(message: Message, *, num_classes: int, feature_dim: int) -> Tensor:
    """Read a reply with the sums of features by class, (C, d + 1) float64.

    Raises
    ------
    BadUpdate
        If a part is missing, has another shape, or holds a number that is not finite.
    """
    try:
        parts = read_arrays(message.content.array_records[ARRAYS], only={"means/moment", "means/class"})["means"]
        held, moment = class_numbers(parts["class"], num_classes), parts["moment"]
        if moment.dtype != torch.float64 or moment.shape != (len(held), feature_dim + 1):
            raise ValueError(f"they hold {moment.dtype} {tuple(moment.shape)}")
    except Exception as error:  # as of an update
        raise BadUpdate(f"means cannot be read: {type(error).__name__} {error}") from error
    if not torch.isfinite(moment).all():
        raise BadUpdate("means hold a number that is not finite")
    return torch.zeros(num_classes, feature_dim + 1, dtype=torch.float64).index_copy_(0, held, moment)


def fisher_reply(sums: Mapping[str, Tensor], *, class_counts: Tensor) -> RecordDict:
    """Build the content of a reply with squared gradients, summed over the client's examples."""
    tensors = {f"fisher/{key}": value for key, value in sums.items()}
    return RecordDict({ARRAYS: array_record(tensors | pack_counts(class_counts))})


def read_fisher(message: Message, *, like: GlobalState, trainable: frozenset[str]) -> tuple[dict[str, Tensor], Tensor]:
    """Read a reply with squared gradients: the sums by factor, and the examples of each class, (C,).

    Raises
    ------
    BadUpdate
        If a part is missing, has another shape than the factor, or holds a number that is no sum of squares.
    """
    factors = pack_factors(like.adapters, trainable)
    try:
        names = {*(f"fisher/{key}" for key in factors), *COUNTS}
        parts = read_arrays(message.content.array_records[ARRAYS], only=names)
        counts = read_counts(parts["counts"], len(next(iter(like.head.values()))))
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
        pairs = zip(correct, total, strict=True)
        fits = all(type(c) is type(n) is int and 0 <= c <= n <= MOST_EXAMPLES for c, n in pairs)
    except (KeyError, ValueError, TypeError) as error:
        raise BadUpdate(f"hits cannot be read: {type(error).__name__} {error}") from error
    if len(correct) != num_tasks:
        raise BadUpdate(f"hits are of {len(correct)} tasks, expected {num_tasks}")
    if not fits:
        raise BadUpdate(f"hits are not whole numbers with 0 <= num-correct <= num-examples <= {MOST_EXAMPLES}")
    return correct, total
