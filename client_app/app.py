"""Train on what this node holds, sum features, count hits, and say what it holds."""

import logging
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtalora_flwr import aggregation, heads, penalties, wire
from fedtalora_flwr.aggregation import ClientUpdate
from fedtalora_flwr.config import ConfigError, RunConfig
from fedtalora_flwr.heads import Classifier
from fedtalora_flwr.holding import Own, Share, holding_of
from fedtalora_flwr.resident import base_store, model_of
from fedtalora_flwr.residual import BaseMissing
from fedtalora_flwr.train import compared_classes, count_correct, fit, sum_features
from fedtalora_flwr.wire import WireError

app = ClientApp()
log = logging.getLogger("fedtalora.client")

# What these say comes from the run's settings and the node's config: no path of the data, nothing of what is in it.
_SAFE = (WireError, ConfigError)


class ClientError(RuntimeError):
    """What leaves the node of an error: no path, no data."""


_Handler = Callable[[Message, Context], Message]


def _discreet(handler: _Handler) -> _Handler:
    """Log an error in full on the node, and raise it with a text that may travel.

    Flower sends an exception's text to the server, and an error over data may hold a file's name or a row of it. So
    only its class is told, unless it is one of those that know nothing of the data.
    """

    @wraps(handler)
    def guarded(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except _SAFE as error:
            log.exception("refused a message")
            raise ClientError(f"{type(error).__name__}: {error}") from None
        except Exception as error:
            log.exception("failed on a message")
            raise ClientError(f"{type(error).__name__}, see the node's log") from None

    return guarded


@app.query()
@_discreet
def hello(message: Message, context: Context) -> Message:
    """Say which partition this node holds; a bad file or setting is found here, before the first round."""
    config, _, holding = _settings(message, context)
    if config.check_data:
        holding.check()
    reply = holding.hello(num_partitions=int(str(context.node_config.get("num-partitions", config.num_clients))))
    return Message(wire.hello_reply(reply), reply_to=message)


@app.train()
@_discreet
def train(message: Message, context: Context) -> Message:
    """Set the model to the server's state, train on this node's data of the task, send the pairs and rows back."""
    config, partition_id, holding = _settings(message, context)
    state, parcel, order = wire.read_state(message)
    try:
        base = base_store(config).reach(parcel)
    except BaseMissing as missing:
        return _without_base(missing, message)
    method = aggregation.resolve(config.method, **asdict(config))
    tasks = holding.tasks
    examples = holding.training(order.task_id)
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
    reply = wire.update_reply(
        update,
        like=state,
        trainable=method.trainable,
        mean_loss=result.mean_loss,
        scaling=config.alpha / config.rank,
        wire_dtype=config.wire_dtype,
    )
    return Message(reply, reply_to=message)


@app.train("sums")
@_discreet
def sums(message: Message, context: Context) -> Message:
    """Sum this node's features of the task under the server's state."""
    config, _, holding = _settings(message, context)
    state, parcel, order = wire.read_state(message)
    try:
        base = base_store(config).reach(parcel)
    except BaseMissing as missing:
        return _without_base(missing, message)
    model = model_of(config)
    model.load(state.adapters, base.residual)
    examples = holding.training(order.task_id)
    head = heads.resolve(config.head, asdict(config))
    result = sum_features(model, examples, head=head, num_classes=holding.num_classes, config=config)
    return Message(wire.sums_reply(result), reply_to=message)


@app.evaluate()
@_discreet
def evaluate(message: Message, context: Context) -> Message:
    """Count the hits of the server's classifier on what this node has held out of the tasks so far."""
    config, _, holding = _settings(message, context)
    if not isinstance(holding, Own):
        raise wire.WireError("this node holds no test data; the server evaluates where all read one data set")
    state, parcel, order = wire.read_state(message)
    try:
        base = base_store(config).reach(parcel)
    except BaseMissing as missing:
        return _without_base(missing, message)
    model = model_of(config)
    model.load(state.adapters, base.residual)
    classifier = Classifier(state.head, heads.resolve(config.head, asdict(config)).lift)
    seen = holding.classes.seen(order.task_id)
    held_out = [holding.held_out(task_id) for task_id in range(order.task_id + 1)]
    correct = [
        count_correct(model, [classifier], examples, classes=seen, config=config)[0] if len(examples) else 0
        for examples in held_out
    ]
    return Message(wire.hits_reply(correct, [len(examples) for examples in held_out]), reply_to=message)


def _without_base(missing: BaseMissing, message: Message) -> Message:
    log.info("asks for the base: %s", missing)
    return Message(wire.base_missing_reply(missing.held), reply_to=message)


def _settings(message: Message, context: Context) -> tuple[RunConfig, int, Share | Own]:
    config = RunConfig.parse(context.run_config)
    torch.set_num_threads(config.threads)
    partition_id, classes = wire.partition_of(context.node_config, config), wire.read_classes(message)
    return config, partition_id, holding_of(config, context.node_config, partition_id=partition_id, classes=classes)
