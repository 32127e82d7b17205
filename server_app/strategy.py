"""One exchange with the clients as a Flower strategy: what to send to whom, and what the replies mean."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from logging import getLogger
from math import ceil

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedtalora_flwr import wire
from fedtalora_flwr.aggregation import (
    Aggregator,
    BadUpdate,
    ClientUpdate,
    GlobalState,
    check_update,
    exactness_error,
)
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.heads import FeatureSums
from fedtalora_flwr.runlog import Failure

log = getLogger("fedtalora.server")

_GRACE = 15.0  # seconds beyond a message's time to live, so that its expiry is reported and not just silence


class RunFailed(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


@dataclass
class Tally:
    """What a round has cost so far and who failed in it, over all its exchanges.

    Parameters
    ----------
    participants
        Partitions that were asked.
    failures
        Those that gave no usable reply, and why.
    bytes_up, bytes_down
        Of the replies received and of the messages sent.
    wait_seconds
        Spent waiting for replies.
    """

    participants: set[int] = field(default_factory=set)
    failures: list[Failure] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    wait_seconds: float = 0.0


class AdapterStrategy(Strategy):
    """Send the shared adapter to a sample of the clients and fold their updates with a method.

    Parameters
    ----------
    config
        The run's settings.
    method
        The aggregation.
    state
        Where the run begins, or goes on from.
    """

    def __init__(self, *, config: RunConfig, method: Aggregator, state: GlobalState) -> None:
        self.config = config
        self.method = method
        self.state = state
        self.node_of: dict[int, int] = {}  # partition id -> node id
        self.holds_task: dict[int, list[int]] = {}  # task id -> partitions with data of it
        self.counts: dict[tuple[int, int], Tensor] = {}  # (task id, partition id) -> examples of each class, (C,)
        self.task_id = 0
        self.tally = Tally()

    def meet(self, hellos: Mapping[int, wire.Hello], tasks: Iterable[Iterable[int]]) -> None:
        """Learn from the first exchange who holds what (node id -> its hello).

        Raises
        ------
        RunFailed
            If a task that will be run is held by fewer partitions than ``min-replies``.
        """
        self.node_of = {hello.partition_id: node for node, hello in hellos.items()}
        for task_id, classes in enumerate(tasks):
            for hello in hellos.values():
                of_task = torch.zeros_like(hello.class_counts)
                of_task[list(classes)] = hello.class_counts[list(classes)]
                self.counts[task_id, hello.partition_id] = of_task
            held = {h.partition_id for h in hellos.values() if int(h.class_counts[list(classes)].sum())}
            self.holds_task[task_id] = sorted(held)
            if task_id < self.config.last_task and len(held) < self.config.min_replies:
                raise RunFailed(
                    f"task {task_id} is held by {len(held)} partitions, min-replies is {self.config.min_replies}: "
                    "lower min-replies, or spread the data over more partitions"
                )

    def exchange(self, grid: Grid, messages: Iterable[Message]) -> dict[int, Message]:
        """Send messages, wait for the replies, and add the cost and the failures to the tally.

        A reply that comes from the server's own side (expired, node gone) names no node, so replies are tied
        to messages and not to senders.

        Returns
        -------
        Partition id -> its reply with content, in order of partition id.
        """
        began = time.monotonic()
        sent = list(messages)
        received = list(grid.send_and_receive(sent, timeout=self.config.round_timeout + _GRACE))
        partition_of = {node: partition for partition, node in self.node_of.items()}
        asked = {m.metadata.message_id: partition_of[m.metadata.dst_node_id] for m in sent}
        replies = {asked[m.metadata.reply_to_message_id]: m for m in received}
        for partition in asked.values():
            if partition not in replies:
                self.tally.failures.append(Failure(partition, f"no reply within {self.config.round_timeout:g} s"))
            elif replies[partition].has_error():
                error = replies[partition].error
                self.tally.failures.append(Failure(partition, f"error {error.code}: {error.reason}"))
        self.tally.participants.update(asked.values())
        self.tally.bytes_down += sum(wire.message_bytes(m) for m in sent)
        self.tally.bytes_up += sum(wire.message_bytes(m) for m in received)
        self.tally.wait_seconds += time.monotonic() - began
        return {partition: reply for partition, reply in sorted(replies.items()) if not reply.has_error()}

    def sample(self, server_round: int, task_id: int) -> list[int]:
        """Draw the partitions of a round, among those that hold data of the task; the rest sit it out."""
        held = self.holds_task[task_id]
        rng = np.random.default_rng([self.config.seed, server_round])
        share = ceil(round(self.config.fraction_train * len(held), 6))  # 0.14 * 50 is 7.000000000000001
        count = min(len(held), max(self.config.min_replies, share))
        return sorted(rng.choice(held, size=count, replace=False).tolist())

    def messages(
        self, arrays: ArrayRecord, order: wire.RoundOrder, *, partitions: Iterable[int], message_type: str
    ) -> list[Message]:
        """Address one message with the state to each partition; the arrays are shared, not copied."""
        content = wire.state_message(
            arrays, order, scaling=self.config.alpha / self.config.rank, version=self.state.version
        )
        return [
            Message(
                RecordDict(dict(content)),
                dst_node_id=self.node_of[partition],
                message_type=message_type,
                group_id=str(order.server_round),
                ttl=self.config.round_timeout,
            )
            for partition in partitions
        ]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Build the round's training messages; `config` carries ``task-id`` and ``round-in-task``."""
        order = wire.RoundOrder(server_round, int(str(config["task-id"])), int(str(config["round-in-task"])))
        self.task_id = order.task_id
        partitions = self.sample(server_round, order.task_id)
        return self.messages(arrays, order, partitions=partitions, message_type=MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies into the next state; a bad one is refused with its reason in the tally.

        Raises
        ------
        RunFailed
            If fewer than ``min-replies`` good updates remain.
        """
        updates: list[ClientUpdate] = []
        losses: list[float] = []
        partition_of = {node: partition for partition, node in self.node_of.items()}
        for reply in replies:
            partition = partition_of[reply.metadata.src_node_id]
            try:
                update, mean_loss = wire.read_update(reply)
                if update.partition_id != partition:
                    raise BadUpdate(f"speaks for partition {update.partition_id}, holds {partition}")
                check_update(self.state, update)
                self._check_counts(partition, update.class_counts)
            except BadUpdate as refusal:
                self.tally.failures.append(Failure(partition, f"refused: {refusal}"))
                continue
            updates.append(update)
            losses.append(mean_loss)
        self.require(len(updates), server_round)
        new_state = self.method.aggregate(self.state, updates)
        metrics: dict[str, int | float | list[int] | list[float]] = {
            "mean-loss": float(np.average(losses, weights=[u.num_examples for u in updates])),
            "residual-norm": sum(float(r.norm()) ** 2 for r in new_state.residual.values()) ** 0.5,
        }
        if self.config.verify:
            metrics["exactness-error"] = exactness_error(self.state, updates, new_state)
        self.state = new_state
        return wire.pack_state(new_state), MetricRecord(metrics)

    def add_sums(self, server_round: int, replies: Mapping[int, Message], *, to: FeatureSums) -> FeatureSums:
        """Add the clients' feature sums up, in order of partition id; a bad one is refused into the tally.

        Raises
        ------
        RunFailed
            If fewer than ``min-replies`` good ones remain.
        """
        good: list[FeatureSums] = []
        for partition, reply in replies.items():
            try:
                sums = wire.read_sums(reply, like=to)
                self._check_counts(partition, sums.moment[:, -1])
                good.append(sums)
            except BadUpdate as refusal:
                self.tally.failures.append(Failure(partition, f"refused: {refusal}"))
        self.require(len(good), server_round)
        return sum(good, start=to)

    def _check_counts(self, partition: int, counts: Tensor) -> None:
        """Refuse examples of each class (C,) that are not those which the client holds of the task."""
        if not torch.equal(counts.long(), self.counts[self.task_id, partition]):
            raise BadUpdate("speaks of other examples than the client said it holds of this task")

    def require(self, num_good: int, server_round: int) -> None:
        """Fail the run if a round has fewer than ``min-replies`` good replies."""
        if num_good < self.config.min_replies:
            reasons = (
                "; ".join(f"partition {f.partition_id}: {f.reason}" for f in self.tally.failures) or "no client replied"
            )
            raise RunFailed(
                f"round {server_round} has {num_good} good replies, min-replies is {self.config.min_replies}: {reasons}"
            )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nobody: the server has the test data."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Expect nothing: the server has the test data."""
        return None

    def summary(self) -> None:
        """Log what this strategy does."""
        log.info("%s, residual %s", self.config.method, self.config.residual)
