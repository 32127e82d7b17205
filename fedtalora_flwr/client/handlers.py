"""Train on what this node holds, sum features, count hits, and say what it holds.

A handler keeps nothing in Flower's context, so the process that does the work need not be the one that Flower started.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from flwr.app import Message, RecordDict
from torch import Tensor

from fedtalora_flwr import aggregation, wire
from fedtalora_flwr.aggregation import ClientUpdate, ClusteredState, GlobalState, LoraFactors, held, with_shared
from fedtalora_flwr.client.node_data import LocalFolder, SharedPartition, node_data_of
from fedtalora_flwr.client.reach import require_within_reach
from fedtalora_flwr.client.redact import ClientError, redacted
from fedtalora_flwr.client.versions import version_store
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.model import heads, penalties
from fedtalora_flwr.model.grams import input_grams
from fedtalora_flwr.model.heads import Classifier, FeatureRoot
from fedtalora_flwr.model.lora import AdaptedModel
from fedtalora_flwr.model.router import sum_slots
from fedtalora_flwr.model.session import device_of, model_of, slots_of
from fedtalora_flwr.model.train import (
    Examples,
    FitResult,
    compared_classes,
    count_correct,
    fit,
    lifted_views,
    precision_of,
    sum_drift,
    sum_features,
    sum_fisher,
)
from fedtalora_flwr.residual import Patch, ResidualVersion, VersionMissing

log = logging.getLogger("fedtalora.client")

_Handler = Callable[[Message, Mapping[str, Any], Mapping[str, Any]], RecordDict]


def _asks_for_the_version(handler: _Handler) -> _Handler:
    """Answer, where the server's base cannot be reached, with the bases that are held here."""

    @wraps(handler)
    def asking(message: Message, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> RecordDict:
        try:
            return handler(message, run_config, node_config)
        except VersionMissing as missing:
            log.info("asks for the base: %s", missing)
            return wire.version_missing_reply(missing.held)

    return asking


def hello(message: Message, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> RecordDict:
    """Say which partition this node holds; or which it would hold, and why it cannot take part."""
    try:
        return _hello(message, run_config, node_config)
    except ClientError as refusal:
        partition_id, name = node_config.get("partition-id"), str(node_config.get("name", ""))
        claimed = partition_id if isinstance(partition_id, int) else None
        return wire.refusal_reply(str(refusal), partition_id=claimed, name=name)


@redacted
def _hello(message: Message, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> RecordDict:
    """Say what is held; a bad file or setting is found here, before the first round."""
    config, _, data = _settings(message, run_config, node_config)
    if config.check_data:
        data.check()
    device = device_of(config)
    log.info("computes in %s on %s", precision_of(device, config.precision), device)
    num_partitions = int(str(node_config.get("num-partitions", config.num_clients)))
    return wire.hello_reply(replace(data.hello(num_partitions=num_partitions), name=str(node_config.get("name", ""))))


@redacted
@_asks_for_the_version
def train(message: Message, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> RecordDict:
    """Set the model to the server's state, train on this node's data of the task, send the pairs and rows back.

    Of the pairs it trains as many rows as were agreed with it (see `aggregation.ranks`).
    """
    config, partition_id, data = _settings(message, run_config, node_config)
    model, rank = model_of(config), config.rank_of(partition_id)
    truncates = aggregation.resolve(config.method, config.settings).truncates
    state, order = _read(message, config, data, rank=rank if truncates else None)
    state = held(state, rank)
    model.load(state.adapters, state.residual)
    result, counts = _trained(message, model, state, order, config=config, partition_id=partition_id, data=data)
    update = _update(state, result.adapters, result.head, counts, partition_id=partition_id)
    method = aggregation.resolve(config.method, config.settings)
    if method.sends_grams:
        inner = "lora_A" not in method.trains(state.version)
        update = replace(update, grams=input_grams(model, data.training(order.task_id), config=config, inner=inner))
    return _reply(update, state, mean_loss=result.mean_loss, config=config)


@redacted
@_asks_for_the_version
def slots(message: Message, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> RecordDict:
    """Train all of this node's slots, each from its own state and on its own task.

    A part that they share is handed on from slot to slot, and sent back once.
    """
    config, partition_id, data = _settings(message, run_config, node_config)
    tasks, parts = slots_of(config, partition_id=partition_id), wire.unbundle(message)
    known: set[wire.Part] = set(range(len(tasks)))
    if config.shared_rank:
        known.add(wire.SHARED)
    if parts.keys() != known:
        shares = ", and a part that they share" if config.shared_rank else ""
        raise wire.WireError(f"the server speaks of slots {[*parts]}, this node has {len(tasks)}{shares}")
    # A base that is missing is found before anything is trained.
    reached = version_store(config).reach_all(_patches(parts.values(), config, data))
    model, shared, replies = model_of(config), None, dict[wire.Part, RecordDict]()
    if config.shared_rank:
        begun, _ = _read(parts[wire.SHARED], config, data, reached, rank=config.shared_rank)
        rows, begun = begun.head, replace(begun, head={})
        shared = begun
    for number, task_id in enumerate(tasks):
        part, slot = parts[number], (number, task_id)
        own, order = _read(part, config, data, reached, rank=config.rank)
        if shared is not None:
            own = replace(own, head=rows)
        state = own if shared is None else with_shared(own, shared)
        model.load(state.adapters, state.residual)
        result, counts = _trained(
            part, model, own, order, config=config, partition_id=partition_id, data=data, slot=slot
        )
        adapters = result.adapters
        if shared is not None:
            parted = {name: pair.parted(config.shared_rank) for name, pair in adapters.items()}
            shared = replace(shared, adapters={name: first for name, (first, _) in parted.items()})
            adapters = {name: rest for name, (_, rest) in parted.items()}
        update = _update(own, adapters, result.head, counts, partition_id=partition_id)
        replies[number] = _reply(update, own, mean_loss=result.mean_loss, config=config)
    if shared is not None:  # its slots tell the examples and the loss
        update = _update(begun, shared.adapters, {}, torch.zeros(0, dtype=torch.int64), partition_id=partition_id)
        replies[wire.SHARED] = _reply(update, begun, mean_loss=0.0, config=config)
    return wire.bundle(replies)


@redacted
@_asks_for_the_version
def slot_sums(message: Message, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> RecordDict:
    """Sum this node's features over its slots under what no slot has of its own: the backbone, a shared part."""
    config, partition_id, data = _settings(message, run_config, node_config)
    model, (state, _) = model_of(config), _read(message, config, data, rank=config.shared_rank or config.rank)
    if config.shared_rank:  # beside it what a slot starts from, which adds nothing
        initial = GlobalState(model.initial_factors(seed=config.seed))
        state = with_shared(ClusteredState.begin(initial, shared_rank=config.shared_rank).start, state)
    model.load(state.adapters, state.residual)
    examples = [data.training(task_id) for task_id in slots_of(config, partition_id=partition_id)]
    return wire.sums_reply(sum_slots(model, examples, config=config))


def _trained(
    message: Message,
    model: AdaptedModel,
    state: GlobalState,
    order: wire.RoundOrder,
    *,
    config: RunConfig,
    partition_id: int,
    data: SharedPartition | LocalFolder,
    slot: tuple[int, int] | None = None,
) -> tuple[FitResult, Tensor]:
    """Train a loaded model on the task of the order, or on that of a slot (its number and task id).

    Returns
    -------
    What came of it, and the examples of each class, (C,).
    """
    method = aggregation.resolve(config.method, config.settings)
    number, task_id = slot or (None, order.task_id)
    tasks = data.tasks
    examples = data.training(task_id)
    class_counts = torch.bincount(examples.labels, minlength=len(state.head["bias"]))
    result = fit(
        model,
        state.head,
        examples,
        classes=compared_classes(
            config.loss_classes,
            task_classes=tasks[task_id],
            present=class_counts.nonzero().flatten().tolist(),
            seen=[c for task in tasks[: order.task_id + 1] for c in task],
        ),
        trainable=method.trains(state.version),
        penalty=penalties.resolve(config.penalty, config.settings),
        old_classes=[c for task in tasks[: order.task_id] for c in task],
        config=config,
        task_id=order.task_id,
        round_in_task=order.round_in_task,
        seed=[config.seed, order.server_round, partition_id, *([] if number is None else [number])],
        memory=wire.read_memory(message, room=_room(model, config, data)),
    )
    return result, class_counts


def _update(
    state: GlobalState,
    adapters: Mapping[str, LoraFactors],
    head: Mapping[str, Tensor],
    class_counts: Tensor,
    *,
    partition_id: int,
) -> ClientUpdate:
    return ClientUpdate(
        partition_id=partition_id,
        num_examples=int(class_counts.sum()),
        adapters=adapters,
        head=head,
        class_counts=class_counts,
        base_version=state.version,
    )


def _reply(update: ClientUpdate, state: GlobalState, *, mean_loss: float, config: RunConfig) -> RecordDict:
    """Build the reply about what was trained from a state."""
    return wire.update_reply(
        update,
        like=state,
        trainable=aggregation.resolve(config.method, config.settings).trains(state.version),
        mean_loss=mean_loss,
        scaling=next((pair.scaling for pair in state.adapters.values()), 1.0),
        wire_dtype=config.wire_dtype,
    )


@redacted
@_asks_for_the_version
def sums(message: Message, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> RecordDict:
    """Sum this node's features of the task under the server's state, beside those of an earlier one if told."""
    config, partition_id, data = _settings(message, run_config, node_config)
    head, num_classes = heads.resolve(config.head, config.settings), data.num_classes
    earlier = wire.before_of(message)
    if earlier is None:
        model, _, order = _loaded(message, config, data)
        examples = _summed(data, order, config)
        return wire.sums_reply(sum_features(model, examples, head=head, num_classes=num_classes, config=config))
    reached, views = version_store(config).reach_all(_patches((earlier, message), config, data)), []
    for each in (earlier, message):
        model, _, order = _loaded(each, config, data, reached)
        examples, seed = _summed(data, order, config), [config.seed, order.task_id, partition_id]
        views.append(lifted_views(model, examples, head=head, config=config, seed=seed))
    sums = FeatureRoot.of(views[1][: len(examples)], examples.labels, num_classes=num_classes)
    return wire.sums_reply(sums, sum_drift(*views))


@redacted
@_asks_for_the_version
def means(message: Message, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> RecordDict:
    """Sum this node's features of the task by class, under the server's state."""
    config, _, data = _settings(message, run_config, node_config)
    model, _, order = _loaded(message, config, data)
    examples = _summed(data, order, config)
    plain = heads.resolve("linear", {})  # the rows act on the features as they are, whatever the head lifts
    sums = sum_features(model, examples, head=plain, num_classes=data.num_classes, config=config)
    return wire.means_reply(sums.moment)


@redacted
@_asks_for_the_version
def fisher(message: Message, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> RecordDict:
    """Sum the squared gradients of the trained factors over this node's data of the task, under the server's state."""
    config, partition_id, data = _settings(message, run_config, node_config)
    model, state, order = _loaded(message, config, data)
    examples = data.training(order.task_id)
    sums = sum_fisher(
        model,
        state.head,
        examples,
        classes=data.tasks[order.task_id],
        trainable=aggregation.resolve(config.method, config.settings).trainable,
        config=config,
        seed=[config.seed, order.server_round, partition_id],
    )
    return wire.fisher_reply(sums, class_counts=torch.bincount(examples.labels, minlength=len(state.head["bias"])))


@redacted
@_asks_for_the_version
def evaluate(message: Message, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> RecordDict:
    """Count the hits of the server's classifier on what this node has held out of the tasks so far."""
    config, _, data = _settings(message, run_config, node_config)
    if not isinstance(data, LocalFolder):
        raise wire.WireError("this node holds no test data; the server evaluates where all read one data set")
    model, state, order = _loaded(message, config, data)
    classifier = Classifier(state.head, heads.resolve(config.head, config.settings).lift)
    seen = data.classes.seen(order.task_id)
    held_out = [data.held_out(task_id) for task_id in range(order.task_id + 1)]
    correct = [
        count_correct(model, [classifier], examples, classes=seen, config=config)[0] if len(examples) else 0
        for examples in held_out
    ]
    return wire.hits_reply(correct, [len(examples) for examples in held_out])


def _settings(
    message: Message, run_config: Mapping[str, Any], node_config: Mapping[str, Any]
) -> tuple[RunConfig, int, SharedPartition | LocalFolder]:
    config = RunConfig.parse(run_config)
    torch.set_num_threads(config.threads)
    partition_id, classes = wire.partition_of(node_config, config), wire.read_classes(message)
    require_within_reach(config, node_config, partition_id=partition_id)
    return config, partition_id, node_data_of(config, node_config, partition_id=partition_id, classes=classes)


def _summed(data: SharedPartition | LocalFolder, order: wire.RoundOrder, config: RunConfig) -> Examples:
    """Give the examples of the task that feature sums tell of."""
    return data.training(order.task_id).without_rare(config.min_class_examples)


def _loaded(
    message: Message,
    config: RunConfig,
    data: SharedPartition | LocalFolder,
    reached: Mapping[str, ResidualVersion] | None = None,
) -> tuple[AdaptedModel, GlobalState, wire.RoundOrder]:
    """Set the model to the server's state, whose residual may have been reached already."""
    model, (state, order) = model_of(config), _read(message, config, data, reached)
    model.load(state.adapters, state.residual)
    return model, state, order


def _read(
    message: Message,
    config: RunConfig,
    data: SharedPartition | LocalFolder,
    reached: Mapping[str, ResidualVersion] | None = None,
    *,
    rank: int | None = None,
) -> tuple[GlobalState, wire.RoundOrder]:
    """Read a state with its residual; its pairs are of the model's rank, or of this one, a part of it."""
    model = model_of(config)
    state, patch, order = wire.read_state(
        message, initial=lambda: model.initial_factors(seed=config.seed), room=_room(model, config, data, rank=rank)
    )
    base = version_store(config).reach(patch) if reached is None else reached[patch.target]
    return replace(state, residual=base.residual), order


def _patches(messages: Iterable[Message], config: RunConfig, data: SharedPartition | LocalFolder) -> list[Patch]:
    """Read how to reach the bases of several messages."""
    room = _room(model_of(config), config, data)
    return [wire.read_patch(each, room=room) for each in messages]


def _room(
    model: AdaptedModel, config: RunConfig, data: SharedPartition | LocalFolder, *, rank: int | None = None
) -> wire.Room:
    """Say what an order to this node may speak of: pairs of the model's rank, or of this one, a part of it."""
    features, head = model.backbone.feature_dim, heads.resolve(config.head, config.settings)
    return wire.Room(
        num_classes=data.num_classes,
        num_tasks=config.num_tasks,
        widths=frozenset({head.row_dim(features), head.lifted_dim(features)}),
        factors=model.factor_shapes(rank),
        fixed=model.fixed_shapes(),
    )
