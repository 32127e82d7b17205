"""Train on what this node holds, sum features, count hits, and say what it holds.

A handler keeps nothing in Flower's context, so the process that does the work need not be the one that Flower started.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial, wraps
from importlib import import_module
from types import ModuleType
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
from fedtalora_flwr.config import ConfigError, RunConfig
from fedtalora_flwr.model import heads, penalties
from fedtalora_flwr.model.grams import input_grams
from fedtalora_flwr.model.heads import Classifier, FeatureRoot
from fedtalora_flwr.model.lora import AdaptedModel
from fedtalora_flwr.model.private import (
    Privacy,
    fit_privately,
    require_possible,
    sample_rate,
    secret_normal,
    steps_of_round,
)
from fedtalora_flwr.model.private_sums import private_root
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
    config, _, data = _settings(message, run_config, node_config, private=True)
    if config.check_data:
        data.check()
    device = device_of(config)
    log.info("computes in %s on %s", precision_of(device, config.precision), device)
    num_partitions = int(str(node_config.get("num-partitions", config.num_clients)))
    told = replace(data.hello(num_partitions=num_partitions), name=str(node_config.get("name", "")))
    if config.dp_epsilon and isinstance(data, LocalFolder):
        told = replace(told, partition_hash=_budgets().sealed(told.partition_hash))
    return wire.hello_reply(told)


@redacted
@_asks_for_the_version
def train(message: Message, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> RecordDict:
    """Set the model to the server's state, train on this node's data of the task, send the pairs and rows back.

    Of the pairs it trains as many rows as were agreed with it (see `aggregation.ranks`).
    """
    config, partition_id, data = _settings(message, run_config, node_config, private=True)
    model, rank = model_of(config), config.rank_of(partition_id)
    method = aggregation.resolve(config.method, config.settings)
    state, order = _read(message, config, data, rank=rank if method.truncates else None)
    state = held(state, rank)
    model.load(state.adapters, state.residual)
    if config.dp_epsilon:
        return _privately_trained(model, state, order, config=config, partition_id=partition_id, data=data)
    result, counts = _trained(message, model, state, order, config=config, partition_id=partition_id, data=data)
    update = _update(state, result.adapters, result.head, counts, partition_id=partition_id)
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
    examples = data.training(task_id)
    class_counts = torch.bincount(examples.labels, minlength=len(state.head["bias"]))
    result = fit(
        model,
        state.head,
        examples,
        classes=_compared(class_counts, order, config=config, data=data, task_id=task_id),
        trainable=method.trains(state.version),
        penalty=penalties.resolve(config.penalty, config.settings),
        old_classes=[c for task in data.tasks[: order.task_id] for c in task],
        config=config,
        task_id=order.task_id,
        round_in_task=order.round_in_task,
        seed=[config.seed, order.server_round, partition_id, *([] if number is None else [number])],
        memory=wire.read_memory(message, room=_room(model, config, data)),
    )
    return result, class_counts


def _privately_trained(
    model: AdaptedModel,
    state: GlobalState,
    order: wire.RoundOrder,
    *,
    config: RunConfig,
    partition_id: int,
    data: SharedPartition | LocalFolder,
) -> RecordDict:
    """Train a loaded model by private steps within the task's budget; the same order gets the same answer again."""
    method, head = aggregation.resolve(config.method, config.settings), heads.resolve(config.head, config.settings)
    require_possible(config, model, method=method, head=head)
    budgets = _budgets()
    told = budgets.Budget.of(config, order, partition_id=partition_id, examples="train")
    digest = budgets.digest_of(order, state)
    kept: RecordDict | None = told.kept(digest)
    if kept is not None:
        log.info("answers once more what it has answered to round %d, and spends nothing", order.server_round)
        return kept
    examples = data.training(order.task_id)
    class_counts = torch.bincount(examples.labels, minlength=len(state.head["bias"]))
    budget = budgets.Budget.of(config, order, partition_id=partition_id, examples=f"train-{order.task_id}")
    spend = partial(
        budget.spend,
        "training",
        sample_rate=sample_rate(config, len(examples)),
        num_steps=steps_of_round(config, len(examples)),
        noise=lambda: budgets.Plan(config, head.collects_sums).noise_of_training(len(examples)),
    )
    spent = spend(only_ask=True)
    log.info("task %d will have spent an epsilon of %.3g of %g", order.task_id + 1, spent.epsilon, config.dp_epsilon)
    result = fit_privately(
        model,
        state.head,
        examples,
        classes=_compared(class_counts, order, config=config, data=data, task_id=order.task_id),
        trainable=method.trains(state.version),
        config=config,
        task_id=order.task_id,
        round_in_task=order.round_in_task,
        privacy=Privacy(spent.noise_multiplier, config.dp_clip),
    )
    update = _update(state, result.adapters, result.head, class_counts, partition_id=partition_id)
    answer = _reply(update, state, mean_loss=result.mean_loss, config=config, epsilon_spent=spent.epsilon)
    spend()
    told.keep(answer, to=digest)
    return answer


def _compared(
    class_counts: Tensor,
    order: wire.RoundOrder,
    *,
    config: RunConfig,
    data: SharedPartition | LocalFolder,
    task_id: int,
) -> list[int]:
    """Choose the classes that the loss on a task compares."""
    tasks = data.tasks
    return compared_classes(
        config.loss_classes,
        task_classes=tasks[task_id],
        present=class_counts.nonzero().flatten().tolist(),
        seen=[c for task in tasks[: order.task_id + 1] for c in task],
    )


def _budgets() -> ModuleType:
    """Give the ledgers of privacy; opacus, which counts for them, takes seconds to import, and few runs need it."""
    return import_module("fedtalora_flwr.client.budget")


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


def _reply(
    update: ClientUpdate, state: GlobalState, *, mean_loss: float, config: RunConfig, epsilon_spent: float | None = None
) -> RecordDict:
    """Build the reply about what was trained from a state."""
    return wire.update_reply(
        update,
        like=state,
        trainable=aggregation.resolve(config.method, config.settings).trains(state.version),
        mean_loss=mean_loss,
        scaling=next((pair.scaling for pair in state.adapters.values()), 1.0),
        wire_dtype=config.wire_dtype,
        epsilon_spent=epsilon_spent,
    )


@redacted
@_asks_for_the_version
def sums(message: Message, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> RecordDict:
    """Sum this node's features of the task under the server's state, beside those of an earlier one if told."""
    config, partition_id, data = _settings(message, run_config, node_config, private=True)
    head, num_classes = heads.resolve(config.head, config.settings), data.num_classes
    if config.dp_epsilon:
        model, state, order = _loaded(message, config, data)
        return _privately_summed(model, state, order, config=config, partition_id=partition_id, data=data)
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


def _privately_summed(
    model: AdaptedModel,
    state: GlobalState,
    order: wire.RoundOrder,
    *,
    config: RunConfig,
    partition_id: int,
    data: SharedPartition | LocalFolder,
) -> RecordDict:
    """Sum the features with noise, within the budget of the task's examples; see `_privately_trained`."""
    method, head = aggregation.resolve(config.method, config.settings), heads.resolve(config.head, config.settings)
    require_possible(config, model, method=method, head=head)
    budgets = _budgets()
    told = budgets.Budget.of(config, order, partition_id=partition_id, examples="sums")
    digest = budgets.digest_of(order, state)
    kept: RecordDict | None = told.kept(digest)
    if kept is not None:
        return kept
    examples = _summed(data, order, config)
    budget = budgets.Budget.of(config, order, partition_id=partition_id, examples=f"train-{order.task_id}")
    plan = budgets.Plan(config, sums=True)
    spent = budget.spend("sums", sample_rate=1.0, num_steps=1, noise=plan.noise_of_sums)
    features = lifted_views(model, examples, head=head, config=config, seed=[0])[: len(examples)]
    root = private_root(
        features,
        examples.labels,
        num_classes=data.num_classes,
        radius=math.sqrt(head.usual_norm(model.backbone.feature_dim) ** 2 - 1),
        noise_multiplier=spent.noise_multiplier,
    )
    answer = wire.sums_reply(root, epsilon_spent=spent.epsilon)
    told.keep(answer, to=digest)
    return answer


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
    config, partition_id, data = _settings(message, run_config, node_config, private=True)
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
    if config.dp_epsilon:
        return _privately_told(correct, held_out, state, order, config=config, partition_id=partition_id)
    return wire.hits_reply(correct, [len(examples) for examples in held_out])


def _privately_told(
    correct: Sequence[int],
    held_out: Sequence[Examples],
    state: GlobalState,
    order: wire.RoundOrder,
    *,
    config: RunConfig,
    partition_id: int,
) -> RecordDict:
    """Tell hits with noise: an example changes those of its task by 1, and those held out have a budget as well."""
    budgets = _budgets()
    told = budgets.Budget.of(config, order, partition_id=partition_id, examples="hits")
    digest = budgets.digest_of(order, state)
    kept: RecordDict | None = told.kept(digest)
    if kept is not None:
        return kept
    plan = budgets.Plan(config, sums=False)
    noisy = [0] * len(correct)
    for task_id, (hits, examples) in enumerate(zip(correct, held_out, strict=True)):
        if not len(examples):
            continue
        budget = budgets.Budget.of(config, order, partition_id=partition_id, examples=f"held-out-{task_id}")
        spent = budget.spend("hits", sample_rate=1.0, num_steps=1, noise=partial(plan.noise_of_hits, task_id))
        noisy[task_id] = min(len(examples), max(0, round(hits + spent.noise_multiplier * float(secret_normal(1)))))
    answer = wire.hits_reply(noisy, [len(examples) for examples in held_out])
    told.keep(answer, to=digest)
    return answer


def _settings(
    message: Message, run_config: Mapping[str, Any], node_config: Mapping[str, Any], *, private: bool = False
) -> tuple[RunConfig, int, SharedPartition | LocalFolder]:
    """Read the settings and open this node's data, for a message whose answer is `private` where the run asks for it.

    Raises
    ------
    ConfigError
        If the run asks for privacy and the answer would have none.
    """
    config = RunConfig.parse(run_config)
    if config.dp_epsilon and not private:
        asked = message.metadata.message_type
        raise ConfigError(f"dp-epsilon {config.dp_epsilon:g}: what {asked} asks for would leave without noise")
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
