"""Refuse a bad update by name before it can touch the state."""

import math
import statistics
from collections.abc import Hashable, Mapping
from typing import TypeVar

import torch

from fedtalora_flwr.aggregation.factors import FACTORS, Step
from fedtalora_flwr.aggregation.types import ClientUpdate, GlobalState
from fedtalora_flwr.aggregation.weights import capped, further, row_change

Key = TypeVar("Key", bound=Hashable)


class BadUpdate(ValueError):
    """An update that the server refuses; the message is the reason in the round's log."""


def check_update(
    state: GlobalState,
    update: ClientUpdate,
    *,
    trainable: frozenset[str] = FACTORS,
    norm_limit: float = math.inf,
) -> None:
    """Check an update against the state it claims to start from.

    Parameters
    ----------
    state, update
        What was sent, and what came back.
    trainable
        The factors that the method trains; the others must have come back as they were sent.
    norm_limit
        The largest `update_norm` that is taken.

    Raises
    ------
    BadUpdate
        If its version, keys, shapes, numbers, counts or norm cannot be right.
    """
    if update.base_version != state.version:
        raise BadUpdate(f"trained on version {update.base_version}, the server is at {state.version}")
    _check_counts(state, update)
    _check_keys("adapters", set(state.adapters), set(update.adapters))
    _check_keys("head", set(state.head), set(update.head))
    for name, ours in state.adapters.items():
        theirs = update.adapters[name]
        d_out, d_in = ours.lora_B.shape[0], ours.lora_A.shape[1]
        a, b = tuple(theirs.lora_A.shape), tuple(theirs.lora_B.shape)
        if len(a) != 2 or len(b) != 2 or a[1] != d_in or b[0] != d_out or a[0] != b[1] or a[0] < 1:
            raise BadUpdate(f"{name}: lora_A {a} and lora_B {b} do not fit ({d_out}, rank) @ (rank, {d_in})")
        if a[0] > ours.rank:
            raise BadUpdate(f"{name}: rank {a[0]} is more than the run's {ours.rank}")
        if not 0 < theirs.scaling < float("inf"):
            raise BadUpdate(f"{name}: scaling {theirs.scaling} is not a positive number")
        if trainable != FACTORS and theirs.scaling != ours.scaling:  # the mean would be another pair altogether
            raise BadUpdate(f"{name}: scaling {theirs.scaling}, the server's is {ours.scaling}, and a factor is frozen")
        _check_numbers(f"{name}.lora_A", theirs.lora_A)
        _check_numbers(f"{name}.lora_B", theirs.lora_B)
        largest = theirs.scaling * float(theirs.lora_A.double().norm() * theirs.lora_B.double().norm())
        if largest > torch.finfo(torch.float32).max:  # finite factors whose product would poison the residual
            raise BadUpdate(f"{name}: lora_B @ lora_A is too large for float32, norm up to {largest:.1e}")
        for factor in sorted(FACTORS - trainable):
            if not torch.equal(getattr(theirs, factor), getattr(ours, factor)):
                raise BadUpdate(f"{name}.{factor} has changed, but the method keeps it frozen")
    for name, gram in update.grams.items():
        _check_gram(name, gram)
    for name, parameter in state.head.items():
        if update.head[name].shape != parameter.shape:
            got, want = tuple(update.head[name].shape), tuple(parameter.shape)
            raise BadUpdate(f"head {name} has shape {got}, expected {want}")
        _check_numbers(f"head {name}", update.head[name])
    if (norm := update_norm(state, update)) > norm_limit:
        raise BadUpdate(f"changes the weights by a norm of {norm:.3g}, norm-limit is {norm_limit:g}")


def outliers(
    changes: Mapping[Key, tuple[GlobalState, ClientUpdate]], *, limit: float, max_weight: float = 0.0
) -> dict[Key, str]:
    """Find the updates that change something far more than the others do.

    What is compared is the norm of the change of the effective weights, of either factor (whose product says nothing
    of ``(c B, A / c)``), and of a class row. A client that has more examples than the median takes more steps, and may
    go as much further; a factor may always change by its own norm, since in a client's first step lora_A does not move.

    Parameters
    ----------
    changes
        What was sent, and what came back, from each client or slot of a round, checked one by one.
    limit
        The multiple of the round's median from which on a change is too large; 0: none is.
    max_weight
        As of `Weighing`: examples beyond it let nobody go further.

    Returns
    -------
    Key -> why. Of two it cannot be said which is far off: where there are fewer than three, only a factor
    that changes by more than `limit` times the norm of both factors is too large.
    """
    if not limit:
        return {}
    if len(changes) < 3:
        return _out_of_bounds(changes, limit=limit)
    examples = torch.tensor([float(update.num_examples) for _, update in changes.values()], dtype=torch.float64)
    found: dict[Key, str] = {}
    sizes_of = [_changes(state, update) for state, update in changes.values()]
    for what in sizes_of[0]:
        sizes = torch.tensor([size[what] for size in sizes_of], dtype=torch.float64)
        own = torch.tensor([_factor_norm(state, what) for state, _ in changes.values()], dtype=torch.float64)
        allowed = (limit * sizes.median() * further(capped(examples, max_weight))).maximum(own)
        for key, size, most in zip(changes, sizes.tolist(), allowed.tolist(), strict=True):
            if size > most > 0:
                times = limit * size / most
                reason = f"changes {what} by {times:.3g} times as much as is usual, outlier-limit is {limit:g}"
                found.setdefault(key, reason)
    return found


def _out_of_bounds(changes: Mapping[Key, tuple[GlobalState, ClientUpdate]], *, limit: float) -> dict[Key, str]:
    """Find updates with a factor that no training has moved so far: ``(c B, A / c)`` with a large or a small c."""
    found: dict[Key, str] = {}
    for key, (state, update) in changes.items():
        usual = math.hypot(*(_factor_norm(state, factor) for factor in FACTORS))
        sizes = _changes(state, update)
        for factor in sorted(FACTORS):
            if sizes[factor] > limit * usual > 0:
                times = sizes[factor] / usual
                reason = f"changes {factor} by {times:.3g} times the norm of both factors, outlier-limit is {limit:g}"
                found.setdefault(key, reason)
    return found


def far_off(sizes: Mapping[Key, float], *, limit: float) -> dict[Key, float]:
    """Find sizes of more than `limit` times the median, and how many times it is; of two nobody is far off."""
    if len(sizes) < 3 or not limit:
        return {}
    usual = statistics.median(sizes.values())
    return {key: size / usual for key, size in sizes.items() if size > limit * usual > 0}


def _factor_norm(state: GlobalState, factor: str) -> float:
    """Give the norm of a factor over all layers; 0 for what is no factor."""
    if factor not in FACTORS:
        return 0.0
    return math.sqrt(sum(float(getattr(pair, factor).double().square().sum()) for pair in state.adapters.values()))


def _changes(state: GlobalState, update: ClientUpdate) -> dict[str, float]:
    factors = dict.fromkeys(sorted(FACTORS), 0.0)
    for name, ours in state.adapters.items():
        for factor in factors:
            before, after = getattr(ours, factor), getattr(update.adapters[name], factor)
            if before.shape == after.shape:  # of another rank the product alone can be compared
                factors[factor] += float((after - before).double().square().sum())
    weights, rows = math.sqrt(_weights_energy(state, update)), row_change(state, update)
    sizes = {"the weights": weights, "a class row": rows, **{key: math.sqrt(moved) for key, moved in factors.items()}}
    if update.grams:  # a large one would count for more than its examples do
        sizes["the layers' inputs"] = math.sqrt(sum(float(gram.trace()) for gram in update.grams.values()))
    return sizes


def update_norm(state: GlobalState, update: ClientUpdate) -> float:
    """Give the Frobenius norm of all that an update changes: the layers' effective weights, and the head's rows.

    It is taken from the factors, where the pairs are not dense, and from what these changed by, so that a pair that
    did not change gives zero and not what rounding leaves:
    ``s B A - s_0 B_0 A_0 = [s B - s_0 B_0, s_0 B_0] [A; A - A_0]``.
    """
    energy = _weights_energy(state, update)
    for name, parameter in state.head.items():
        energy += float((update.head[name].double() - parameter.double()).square().sum())
    return math.sqrt(energy)


def _weights_energy(state: GlobalState, update: ClientUpdate) -> float:
    energy = 0.0
    for name, ours in state.adapters.items():
        theirs = update.adapters[name]
        if ours.is_dense and theirs.is_dense:
            energy += float((theirs.delta().double() - ours.delta().double()).square().sum())
            continue
        before, after = ours.scaling * ours.lora_B.double(), theirs.scaling * theirs.lora_B.double()
        if ours.rank == theirs.rank:
            change = Step(
                torch.cat([after - before, before], 1), torch.cat([theirs.lora_A, theirs.lora_A - ours.lora_A], 0)
            )
        else:
            change = Step(torch.cat([after, -before], 1), torch.cat([theirs.lora_A, ours.lora_A], 0))
        energy += max(0.0, change.energy())
    return energy


def _check_counts(state: GlobalState, update: ClientUpdate) -> None:
    counts = update.class_counts
    num_classes = next(iter(state.head.values())).shape[0] if state.head else counts.numel()
    if tuple(counts.shape) != (num_classes,):
        raise BadUpdate(f"class counts have shape {tuple(counts.shape)}, expected ({num_classes},)")
    if counts.dtype != torch.int64:
        raise BadUpdate(f"class counts hold {counts.dtype}, expected torch.int64")
    if update.num_examples < 1:
        raise BadUpdate(f"num_examples is {update.num_examples}")
    if (counts < 0).any() or int(counts.sum()) != update.num_examples:
        raise BadUpdate(f"class counts do not add up to num_examples {update.num_examples}")


def _check_keys(part: str, ours: set[str], theirs: set[str]) -> None:
    if ours != theirs:
        missing, unknown = sorted(ours - theirs)[:3], sorted(theirs - ours)[:3]
        raise BadUpdate(f"{part}: missing {missing}, unknown {unknown}")


def _check_gram(name: str, gram: torch.Tensor) -> None:
    _check_numbers(f"the Gram matrix of {name}", gram)
    norms = gram.double().diagonal()
    if (norms < 0).any() or (gram.double().square() > torch.outer(norms, norms) * (1 + 1e-5)).any():
        raise BadUpdate(f"the Gram matrix of {name} contradicts itself: no inputs have such products")


def _check_numbers(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype != torch.float32:
        raise BadUpdate(f"{name} holds {tensor.dtype}, expected torch.float32")
    if not torch.isfinite(tensor).all():
        raise BadUpdate(f"{name} holds a number that is not finite")
