"""Train on what this node holds, sum features, and say what it holds.

A handler keeps nothing in Flower's context, so the process that does the work need not be the one that Flower started.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from flwr.app import Message, RecordDict

from client_app.discreet import discreet
from fedtalora_flwr import aggregation, heads, penalties, wire
from fedtalora_flwr.aggregation import ClientUpdate
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.resident import base_store, data_of, model_of, training_examples
from fedtalora_flwr.residual import BaseMissing
from fedtalora_flwr.train import compared_classes, fit, sum_features

log = logging.getLogger("fedtalora.client")


@discreet
def hello(message: Message, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> RecordDict:
    """Say which partition this node holds; a bad file or setting is found here, before the first round."""
    config, partition_id = _settings(run_config, node_config)
    data = data_of(config)
    if config.check_data:
        for task_id in range(config.last_task):
            training_examples(config, partition_id=partition_id, task_id=task_id)
    counts = data.stream.class_counts(data.source.train.labels)[partition_id]
    reply = wire.Hello(
        partition_id=partition_id,
        num_partitions=int(str(node_config.get("num-partitions", config.num_clients))),
        partition_hash=data.stream.partition_hash(data.source.train.labels, partition_id),
        class_counts=torch.as_tensor(counts, dtype=torch.int64),
        held=tuple(base_store(config).digests()),
    )
    return wire.hello_reply(reply)


@discreet
def train(message: Message, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> RecordDict:
    """Set the model to the server's state, train on this node's data of the task, send the pairs and rows back."""
    config, partition_id = _settings(run_config, node_config)
    state, parcel, order = wire.read_state(message)
    try:
        base = base_store(config).reach(parcel)
    except BaseMissing as missing:
        return _without_base(missing)
    method = aggregation.resolve(config.method, **asdict(config))
    tasks = data_of(config).stream.tasks
    examples = training_examples(config, partition_id=partition_id, task_id=order.task_id)
    model = model_of(config)
    model.load(state.adapters, base.residual)
    class_counts = torch.bincount(examples.labels, minlength=len(state.head["bias"]))
    result = fit(
        model,
        state.head,
        examples,
        classes=compared_classes(
            config.loss_classes,
            task_classes=tasks[order.task_id],
            present=class_counts.nonzero().flatten().tolist(),
            seen=[c for task in tasks[: order.task_id + 1] for c in task],
        ),
        trainable=method.trainable,
        penalty=penalties.resolve(config.penalty, asdict(config)),
        old_classes=[c for task in tasks[: order.task_id] for c in task],
        config=config,
        task_id=order.task_id,
        round_in_task=order.round_in_task,
        seed=[config.seed, order.server_round, partition_id],
    )
    update = ClientUpdate(
        partition_id=partition_id,
        num_examples=len(examples),
        adapters=result.adapters,
        head=result.head,
        class_counts=class_counts,
        base_version=state.version,
    )
    return wire.update_reply(
        update,
        like=state,
        trainable=method.trainable,
        mean_loss=result.mean_loss,
        scaling=config.alpha / config.rank,
        wire_dtype=config.wire_dtype,
    )


@discreet
def sums(message: Message, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> RecordDict:
    """Sum this node's features of the task under the server's state."""
    config, partition_id = _settings(run_config, node_config)
    state, parcel, order = wire.read_state(message)
    try:
        base = base_store(config).reach(parcel)
    except BaseMissing as missing:
        return _without_base(missing)
    model = model_of(config)
    model.load(state.adapters, base.residual)
    examples = training_examples(config, partition_id=partition_id, task_id=order.task_id)
    head = heads.resolve(config.head, asdict(config))
    num_classes = len(data_of(config).source.class_names)
    result = sum_features(model, examples, head=head, num_classes=num_classes, config=config)
    return wire.sums_reply(result)


def _without_base(missing: BaseMissing) -> RecordDict:
    log.info("asks for the base: %s", missing)
    return wire.base_missing_reply(missing.held)


def _settings(run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> tuple[RunConfig, int]:
    config = RunConfig.parse(run_config)
    torch.set_num_threads(config.threads)
    return config, wire.partition_of(node_config, config)
