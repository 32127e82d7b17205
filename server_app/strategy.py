"""One exchange with the clients as a Flower strategy: what to send to whom, and what the replies mean."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from logging import getLogger
from math import ceil
from typing import Any, TypeVar

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
    ClusteredState,
    GlobalState,
    Weighing,
    capped,
    check_update,
    exactness_error,
    far_off,
    kept_energy,
    outliers,
)
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.data import ClassList
from fedtalora_flwr.heads import FeatureSums
from fedtalora_flwr.residual import Ledger, Parcel
from fedtalora_flwr.runlog import Failure
from fedtalora_flwr.words import one_line
from server_app.census import Census
from server_app.stragglers import Stragglers

log = getLogger("fedtalora.server")

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0  # seconds between two looks for replies, a twentieth of the wait so far
_GROWTH = 2  # times the examples that a node said it holds, which it may have by now
_SMALL = 2**22  # bytes that are never too many
_GRACE = 15.0  # seconds beyond a message's time to live, so that its expiry is reported and not just silence
LONGEST_REASON = 500  # characters

Read = TypeVar("Read")
Sized = TypeVar("Sized", bound=tuple[Any, ...])


class RunFailed(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


class TooFewReplies(RunFailed):
    """A round has fewer than ``min-replies`` good replies; the message names everyone's reason."""


@dataclass(frozen=True)
class UsualNorm:
    """The norm that features have in a run where all are scaled to one, and the share by which they may be longer.

    Shorter ones do no harm, and there are such: a feature of zeros cannot be scaled.
    """

    norm: float
    slack: float


def _distance_moved(drift: Tensor, *, num_vectors: float) -> float:
    """Give the root mean square distance between features before and now, of a root of (f', f, 1)."""
    before, now = drift[:, :-1].chunk(2, dim=1)
    return math.sqrt(float((now - before).square().sum()) / num_vectors)


@dataclass
class Tally:
    """What a round has cost so far and who failed in it, over all its exchanges.

    Parameters
    ----------
    participants
        Partitions that were asked to train or to sum.
    failures
        Those that gave no usable reply, and why.
    bytes_up, bytes_down
        Of the replies received and of the messages sent.
    wait_seconds
        Spent waiting for replies.
    resent
        Partitions that had lost the base and were sent it once more.
    weights
        Partitions that counted less than their examples say, relative to the one that counted most, and how much.
    """

    participants: set[int] = field(default_factory=set)
    failures: list[Failure] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    wait_seconds: float = 0.0
    resent: set[int] = field(default_factory=set)
    weights: dict[int, float] = field(default_factory=dict)

    def fail(self, partition: int, reason: str) -> None:
        """Note a failure on one line and not for ever long: a client may have written the reason."""
        self.failures.append(Failure(partition, one_line(reason, most=LONGEST_REASON)))

    def miss(self, partition: int, reason: str) -> None:
        """Note that a partition was not asked; once, however many exchanges the round has."""
        if partition not in {failure.partition_id for failure in self.failures}:
            self.fail(partition, reason)


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
        self.clustered: ClusteredState | None = None  # of a method over slots
        self.node_of: dict[int, int] = {}  # partition id -> node id
        self.holds_task: dict[int, list[int]] = {}  # task id -> partitions with data of it
        self.census = Census(ClassList(), counts={}, tests={}, told={})
        self.hashes: dict[int, str] = {}  # partition id -> hash of what it holds
        self.absent: dict[int, str] = {}  # partition id -> why no node has it yet
        self.task_id = 0
        self.tally = Tally()
        self.weighing = Weighing(config.aggregation_weights, config.suspects, config.max_weight, config.max_change)
        self.most_sums = 0  # numbers in a client's feature sums
        self.trust: dict[int, float] = {}  # partition id -> its weight by its examples, relative to the largest such
        self.ledger = Ledger(state.residual)
        self.stragglers = Stragglers()
        self.patient = False  # whether the next exchange waits for all, whatever ``close-after`` says
        self.closed_early = False  # whether the last one did not
        self.before: GlobalState | None = None  # the state that the task began with
        self._before_ledger = Ledger({})
        self._frozen = wire.frozen_digest(state.adapters, method.trainable)
        self._records: dict[int, ArrayRecord] = {}  # id of a parcel of the ledger -> its arrays

    def begin_task(self, before: GlobalState) -> None:
        """Keep the state that a task begins with: at its end clients compare their features with those under it."""
        self.before, self._before_ledger = before, Ledger(before.residual)

    def meet(self, hellos: Mapping[int, wire.Hello], *, hashes: Sequence[str], absent: Mapping[int, str]) -> None:
        """Learn from the first exchange who is who, and what each still has.

        Parameters
        ----------
        hellos
            Node id -> what it says.
        hashes
            Of all partitions of the run by their id, those without a node too.
        absent
            Partition id -> why no node has it, in a run that goes on.
        """
        self.node_of = {hello.partition_id: node for node, hello in hellos.items()}
        self.hashes, self.absent = dict(enumerate(hashes)), dict(absent)
        for hello in hellos.values():
            self.ledger.report(hello.partition_id, hello.held)

    def take_stock(self, census: Census, *, settled: range) -> None:
        """Learn who holds what.

        Parameters
        ----------
        census
            Classes and counts.
        settled
            The tasks whose data are there by now.

        Raises
        ------
        RunFailed
            If a task of these is held by fewer partitions than ``min-replies``.
        """
        self.census = census
        self.holds_task = {task_id: [] for task_id in range(len(census.classes.tasks))}
        for (task_id, partition), counts in sorted(census.counts.items(), key=lambda item: item[0]):
            if int(counts.sum()):
                self.holds_task[task_id].append(partition)
        for task_id in settled:
            held = self.holds_task[task_id]
            if len(held) < self.config.min_replies:
                absent = "; ".join(f"partition {f.partition_id} {f.reason}" for f in self.tally.failures)
                raise RunFailed(
                    f"task {task_id} is held by {len(held)} partitions, min-replies is {self.config.min_replies}: "
                    + (
                        f"{absent}. Mend that, and go on with resume=true"
                        if absent
                        else "lower min-replies, or spread the data over more partitions"
                    )
                )

    def rejoin(self, node: int, hello: wire.Hello) -> None:
        """Take a node for the holder of its partition from now on."""
        self.node_of[hello.partition_id] = node
        self.absent.pop(hello.partition_id, None)
        self.hashes[hello.partition_id] = hello.partition_hash
        self.ledger.report(hello.partition_id, hello.held)
        self.stragglers.forget(node)

    def dismiss(self, node: int, reason: str) -> None:
        """Ask a node nothing any more, until it rejoins."""
        for partition in [partition for partition, holder in self.node_of.items() if holder == node]:
            del self.node_of[partition]
            self.absent[partition] = reason

    def exchange(self, grid: Grid, messages: Iterable[Message]) -> Iterator[tuple[int, Message]]:
        """Send messages and give the replies with content, while the tally takes the cost and the failures.

        A reply that comes from the server's own side (expired, node gone) names no node, so replies are tied
        to messages and not to senders. A client that has lost the base is sent it once more. After ``close-after`` it
        is enough that ``min-replies`` replies are there.

        Yields
        ------
        Partition id and its reply in order of partition id, each as soon as all before it are settled, so that
        they are read while others still train.
        """
        partition_of = {node: partition for partition, node in self.node_of.items()}
        patient, self.patient, self.closed_early = self.patient, False, False
        sent = sorted(messages, key=lambda message: partition_of[message.metadata.dst_node_id])
        sent = self._without_busy(grid, sent, partition_of, needed=len(sent) if patient else self.config.min_replies)
        order = [partition_of[message.metadata.dst_node_id] for message in sent]
        asked = dict(zip(self._push(grid, sent), sent, strict=True))
        if any(message.metadata.message_type != MessageType.EVALUATE for message in sent):
            self.tally.participants.update(order)
        began, num_given = time.monotonic(), 0
        may_close = self.config.close_after > 0 and not patient
        settled: dict[int, Message | None] = {}
        resent: set[int] = set()
        for partition in order:
            while partition not in settled:
                waited = time.monotonic() - began
                if waited > self.config.round_timeout + _GRACE:
                    for message in asked.values():
                        late = partition_of[message.metadata.dst_node_id]
                        self._settle(settled, late, f"no reply within {self.config.round_timeout:g} s")
                    break
                self._pull(grid, asked, partition_of, settled, resent)
                num_there = num_given + sum(reply is not None for reply in settled.values())
                if may_close and waited > self.config.close_after and num_there >= self.config.min_replies:
                    self._close(asked, partition_of, settled)
                if partition not in settled:
                    time.sleep(min(_LONGEST_PAUSE, max(_SHORTEST_PAUSE, waited / 20)))
                self.tally.wait_seconds += time.monotonic() - began - waited
            if reply := settled.pop(partition):
                num_given += 1
                yield partition, reply

    def _without_busy(
        self, grid: Grid, messages: list[Message], partition_of: Mapping[int, int], *, needed: int
    ) -> list[Message]:
        """Leave out those to nodes that still work for a round that was closed, unless these are needed."""
        self.tally.bytes_up += wire.message_bytes(self.stragglers.late_replies(grid))
        busy = self.stragglers.busy(messages)
        free = [message for message in messages if message.metadata.dst_node_id not in busy]
        if len(free) < needed:
            return messages
        for node, server_round in busy.items():
            self.tally.miss(partition_of[node], f"not asked: it is still busy with round {server_round}")
        return free

    def _close(
        self, asked: dict[str, Message], partition_of: Mapping[int, int], settled: dict[int, Message | None]
    ) -> None:
        """Go on without those that have not answered; `asked` loses them."""
        self.closed_early = bool(asked)
        self.stragglers.leave(asked.values())
        for message in asked.values():
            late = partition_of[message.metadata.dst_node_id]
            self._settle(settled, late, f"late: the round was closed without it after {self.config.close_after:g} s")
        asked.clear()

    def _push(self, grid: Grid, messages: list[Message]) -> list[str]:
        grid.push_messages(messages)
        self.tally.bytes_down += wire.message_bytes(messages)
        return [message.metadata.message_id for message in messages]

    def _pull(
        self,
        grid: Grid,
        asked: dict[str, Message],
        partition_of: Mapping[int, int],
        settled: dict[int, Message | None],
        resent: set[int],
    ) -> None:
        """Take in the replies that are there; `asked` loses those that are answered, `resent` gains whom it is sent."""
        replies = list(grid.pull_messages(list(asked)))
        odd = {
            reply.metadata.reply_to_message_id: reason
            for reply in replies
            if reply.has_content() and (reason := wire.odd_reply(reply, most_bytes=self.reply_limit()))
        }
        self.tally.bytes_up += wire.message_bytes(r for r in replies if r.metadata.reply_to_message_id not in odd)
        for reply in replies:
            message = asked.pop(reply.metadata.reply_to_message_id, None)
            if message is None:  # a node may send what nobody asked for
                continue
            partition = partition_of[message.metadata.dst_node_id]
            if reason := odd.get(reply.metadata.reply_to_message_id):
                self._settle(settled, partition, f"refused: {reason}")
            elif reply.has_error():
                self._settle(settled, partition, f"error {reply.error.code}: {wire.error_text(reply.error)}")
            elif (held := wire.read_base_missing(reply)) is None:
                self.ledger.acknowledge(partition)
                if self.ledger.base.digest == self._before_ledger.base.digest:
                    self._before_ledger.acknowledge(partition)
                settled[partition] = reply
            elif partition in resent:
                self._settle(settled, partition, "cannot be brought to the server's base")
            else:
                resent.add(partition)
                self.tally.resent.add(partition)
                self.ledger.report(partition, held)
                self._before_ledger.report(partition, held)
                again = self._addressed(
                    message.content,
                    partition,
                    message_type=message.metadata.message_type,
                    group_id=message.metadata.group_id,
                )
                asked[self._push(grid, [again])[0]] = again

    def reply_limit(self) -> int:
        """Give the bytes of tensors that a reply can be of use with: twice what a client is asked for at most."""
        trained = [getattr(pair, factor) for pair in self.state.adapters.values() for factor in self.method.trainable]
        numbers = sum(int(value.numel()) for value in [*trained, *self.state.head.values()])
        return 2 * (4 * numbers + 8 * self.most_sums) + _SMALL

    def _settle(self, settled: dict[int, Message | None], partition: int, reason: str) -> None:
        settled[partition] = None
        self.tally.fail(partition, reason)

    def sample(self, server_round: int, task_id: int) -> list[int]:
        """Draw the partitions of a round, among those that hold data of the task; the rest sit it out."""
        held = self.holds_task[task_id]
        rng = np.random.default_rng([self.config.seed, server_round])
        share = ceil(round(self.config.fraction_train * len(held), 6))  # 0.14 * 50 is 7.000000000000001
        count = min(len(held), max(self.config.min_replies, share))
        return sorted(rng.choice(held, size=count, replace=False).tolist())

    def tellers(self, task_id: int) -> list[int]:
        """List the partitions that hold ``min-class-examples`` of some class of a task, and so have sums to tell.

        Raises
        ------
        RunFailed
            If they are fewer than ``min-replies``.
        """
        least = self.config.min_class_examples
        able = [p for p in self.holds_task[task_id] if int(self.census.counts[task_id, p].max()) >= least]
        if len(able) < self.config.min_replies:
            raise RunFailed(
                f"of task {task_id}, {len(able)} partitions hold {least} examples of a class (min-class-examples), and "
                f"min-replies is {self.config.min_replies}: lower one of them, or spread the data over fewer partitions"
            )
        return able

    def reachable(self, partitions: Iterable[int]) -> list[int]:
        """List those of the partitions that a node holds; a run that goes on may have lost some, which are named."""
        found = []
        for partition in partitions:
            if partition in self.node_of:
                found.append(partition)
            else:
                self.tally.miss(partition, self.absent[partition])
        return found

    def messages(
        self,
        arrays: ArrayRecord,
        order: wire.RoundOrder,
        *,
        partitions: Iterable[int],
        message_type: str,
        before: ArrayRecord | None = None,
    ) -> list[Message]:
        """Address a message to each partition: the shared arrays, and what it needs to reach the base.

        `before` are the arrays of the state that the task began with, for clients that are to compare.
        """
        content = self._content(arrays, order, self.state)
        if before is not None and self.before is not None:
            content = wire.add_before(content, self._content(before, order, self.before))
        return [
            self._addressed(content, partition, message_type=message_type, group_id=str(order.server_round))
            for partition in self.reachable(partitions)
        ]

    def _content(self, arrays: ArrayRecord, order: wire.RoundOrder, state: GlobalState) -> RecordDict:
        return wire.state_message(
            arrays,
            order,
            scaling=next((pair.scaling for pair in state.adapters.values()), 1.0),
            version=state.version,
            num_classes=len(self.census.classes.names),
            frozen=self._frozen,
        )

    def _addressed(self, content: RecordDict, partition: int, *, message_type: str, group_id: str) -> Message:
        if partition in self.census.told:
            content = RecordDict({**content, **wire.tell_classes(self.census.told[partition])})
        return Message(
            self._with_base(content, partition),
            dst_node_id=self.node_of[partition],
            message_type=message_type,
            group_id=group_id,
            ttl=self.config.round_timeout,
        )

    def _with_base(self, content: RecordDict, partition: int) -> RecordDict:
        content = self._with_parcel(content, self.ledger.parcel(partition))
        if not wire.tells_before(content):
            return content
        return wire.add_before(content, self._with_parcel(RecordDict(), self._before_ledger.parcel(partition)))

    def _with_parcel(self, content: RecordDict, parcel: Parcel) -> RecordDict:
        if id(parcel) not in self._records:
            self._records[id(parcel)] = wire.pack_parcel(parcel)
        return wire.add_parcel(content, parcel, self._records[id(parcel)])

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
        """Fold the replies into the next state, `state`; a bad one is refused with its reason in the tally.

        Nothing is packed for the caller: what the next round sends depends on its task.

        Raises
        ------
        TooFewReplies
            If fewer than ``min-replies`` good updates remain.
        """
        updates: list[ClientUpdate] = []
        losses: dict[int, float] = {}
        partition_of = {node: partition for partition, node in self.node_of.items()}
        for reply in replies:
            partition = partition_of[reply.metadata.src_node_id]
            try:
                update, mean_loss = wire.read_update(reply, like=self.state, trainable=self.method.trainable)
                if update.partition_id != partition:
                    raise BadUpdate(f"speaks for partition {update.partition_id}, holds {partition}")
                check_update(self.state, update, trainable=self.method.trainable, norm_limit=self.config.norm_limit)
                self._check_counts(self.task_id, partition, update.class_counts)
            except BadUpdate as refusal:
                self.tally.fail(partition, f"refused: {refusal}")
                continue
            updates.append(update)
            losses[partition] = mean_loss
        limit, max_weight = self.config.outlier_limit, self.config.max_weight
        refused = outliers(self.state, updates, limit=limit, max_weight=max_weight)
        for partition, reason in refused.items():
            self.tally.fail(partition, f"refused: {reason}")
        updates = [update for update in updates if update.partition_id not in refused]
        self.require(len(updates), server_round)
        updates = self._weighed(updates)
        weights = [update.num_examples for update in updates]
        mean_loss = float(np.average([losses[update.partition_id] for update in updates], weights=weights))
        updates += self._own_update(updates)
        new_state = self.method.aggregate(self.state, updates)
        metrics: dict[str, int | float | list[int] | list[float]] = {
            "mean-loss": mean_loss,
            "residual-norm": sum(float(r.norm()) ** 2 for r in new_state.residual.values()) ** 0.5,
        }
        if self.config.residual_energy < 1:
            metrics["kept-energy"] = kept_energy(new_state.step, new_state.owed)
        if self.config.verify:
            metrics["exactness-error"] = exactness_error(self.state, updates, new_state)
        self.state = new_state
        self.ledger.advance(new_state.residual, new_state.step)
        self._records.clear()
        return None, MetricRecord(metrics)

    def _weighed(self, updates: list[ClientUpdate]) -> list[ClientUpdate]:
        """Weigh the clients by the run's rule; how much less than by its examples one counts goes for its sums too."""
        weighed = self.weighing(self.state, updates)
        examples = {update.partition_id: update.num_examples for update in updates}
        trust = dict.fromkeys(examples, 0.0)
        trust |= {update.partition_id: update.num_examples / examples[update.partition_id] for update in weighed}
        most = max(trust.values())
        self.trust |= {partition: value / most for partition, value in trust.items()}
        less = {partition: value for partition, value in self.trust.items() if partition in trust and value < 1}
        self.tally.weights = {partition: round(value, 4) for partition, value in sorted(less.items())}
        return weighed

    def _counts_for(self, partition: int) -> float:
        """Give the share of its examples that a partition counts for in sums: as in training, `max-weight` at most.

        Without training, or where it was not drawn for it, nothing but what it says of itself tells how much it holds.
        """
        trust = self.trust.get(partition, 1.0)
        if not self.config.max_weight:
            return trust
        holders = self.holds_task[self.task_id]
        held = torch.stack([self.census.counts[self.task_id, p].sum() for p in holders]).double()
        most = capped(held, self.config.max_weight)
        return min(trust, float((most / held)[holders.index(partition)]))

    def _own_update(self, updates: list[ClientUpdate]) -> list[ClientUpdate]:
        """Let the server's own model take part, with ``task-average``, as if it were one more client's.

        After t finished tasks it has t times the weight of all the round's examples, and a round moves the model by
        ``1 / (t + 1)`` of the way: the mean over tasks is taken as that over clients is, exactly. Of the class rows
        it says nothing.
        """
        if not (self.config.task_average and self.task_id):
            return []
        return [
            ClientUpdate(
                partition_id=-1,
                num_examples=self.task_id * sum(update.num_examples for update in updates),
                adapters=self.state.adapters,
                head=self.state.head,
                class_counts=torch.zeros_like(updates[0].class_counts),
                base_version=self.state.version,
            )
        ]

    def add_sums(
        self,
        server_round: int,
        replies: Iterable[tuple[int, Message]],
        *,
        to: FeatureSums,
        views: int,
        usual_norm: UsualNorm | None = None,
    ) -> FeatureSums:
        """Add the clients' feature sums up as they come, in order of partition id; a bad one is refused.

        Parameters
        ----------
        server_round
            For the error.
        replies
            Partition ids and their replies.
        to
            The sums of earlier tasks.
        views
            Of each example that clients have compared before and now, so that `to` can follow; 0 where they have not.
        usual_norm
            That of each summed vector; None where features are of any size.

        Raises
        ------
        TooFewReplies
            If fewer than ``min-replies`` good ones remain.
        """
        total = like = FeatureSums(torch.zeros_like(to.gram), torch.zeros_like(to.moment))
        drifts: dict[int, tuple[Tensor, float]] = {}
        num_good = 0

        def read(partition: int, reply: Message) -> tuple[FeatureSums, Tensor, float]:
            sums = wire.read_sums(reply, like=like)
            self._check_counts(self.task_id, partition, sums.moment[:, -1], least=self.config.min_class_examples)
            norm, drift = self._check_sums(sums, usual_norm), like.gram.new_zeros(())
            if views:
                num_vectors = views * int(sums.moment[:, -1].sum())
                drift = wire.read_drift(reply, num_vectors=num_vectors, feature_dim=len(like.gram) - 1)
                mean_square = float(drift.square().sum()) / (2 * num_vectors)
                norm = max(norm, self._check_norm(math.sqrt(mean_square), usual_norm))
            return sums, drift, norm

        good = self._good(replies, read)
        for partition, (sums, drift, _) in good if usual_norm else self._near(good, "features"):
            total, num_good = total + sums.times(self._counts_for(partition)), num_good + 1
            if views:
                drifts[partition] = drift, _distance_moved(drift, num_vectors=views * float(sums.moment[:, -1].sum()))
        self.require(num_good, server_round)
        return (to.followed(self._total_drift(drifts)) if views else to) + total

    def _total_drift(self, drifts: dict[int, tuple[Tensor, float]]) -> Tensor:
        """Add up how features have moved, by partition id: a root, and how far.

        A few examples that claim another move than all others would carry every old class's sums there, so the bounds
        of a change of the weights go for it too: it is left out beyond ``outlier-limit``, and counts less beyond
        ``max-change``.
        """
        near = dict(self._near(drifts.items(), "the moves of features"))
        longest = self.config.max_change * statistics.median_low(moved for _, moved in near.values())
        total = torch.zeros((), dtype=torch.float64)
        for partition, (root, moved) in near.items():
            less = longest / moved if 0 < longest < moved else 1.0
            total = total + self._counts_for(partition) * less * (root.T @ root)
        return total

    def class_means(
        self,
        server_round: int,
        replies: Iterable[tuple[int, Message]],
        *,
        feature_dim: int,
        most_norm: float = math.inf,
    ) -> tuple[Tensor, Tensor]:
        """Give the mean feature of each class over all clients' examples, and which have one; a bad reply is refused.

        No mean is longer than the features, `most_norm` at most.

        Returns
        -------
        (C, d) float64, zero where there is no example, and (C,) bool.

        Raises
        ------
        TooFewReplies
            If fewer than ``min-replies`` good replies remain.
        """
        num_classes = len(self.census.classes.names)
        total, num_good = torch.zeros(num_classes, feature_dim + 1, dtype=torch.float64), 0

        def read(partition: int, reply: Message) -> tuple[Tensor, float]:
            moment = wire.read_means(reply, num_classes=num_classes, feature_dim=feature_dim)
            self._check_counts(self.task_id, partition, moment[:, -1], least=self.config.min_class_examples)
            longest = float((moment[:, :-1] / moment[:, -1:].clamp(min=1)).norm(dim=1).max())
            if longest > most_norm:
                raise BadUpdate(
                    f"a class mean has a norm of {longest:.3g}, features of this run at most {most_norm:.3g}"
                )
            return moment, self._check_norm(longest)

        for partition, (moment, _) in self._near(self._good(replies, read), "class means"):
            total, num_good = total + self._counts_for(partition) * moment, num_good + 1
        self.require(num_good, server_round)
        return total[:, :-1] / total[:, -1:].clamp(min=1), total[:, -1] > 0

    def mean_fisher(self, server_round: int, replies: Iterable[tuple[int, Message]]) -> dict[str, Tensor]:
        """Give the mean squared gradient over all clients' examples, by trained factor; a bad reply is refused.

        Raises
        ------
        TooFewReplies
            If fewer than ``min-replies`` good ones remain.
        """
        total: dict[str, Tensor] = {}
        num_good, num_examples = 0, 0.0

        def read(partition: int, reply: Message) -> tuple[dict[str, Tensor], int, float]:
            sums, counts = wire.read_fisher(reply, like=self.state, trainable=self.method.trainable)
            self._check_counts(self.task_id, partition, counts)
            held = int(counts.sum())
            norm = (sum(float(value.double().sum()) for value in sums.values()) / max(1, held)) ** 0.5
            return sums, held, self._check_norm(norm, what="gradients")

        for partition, (sums, held, _) in self._near(self._good(replies, read), "gradients"):
            trust = self._counts_for(partition)
            total = {key: trust * value + total.get(key, 0) for key, value in sums.items()}
            num_good, num_examples = num_good + 1, num_examples + trust * held
        self.require(num_good, server_round)
        return {key: value / max(1.0, num_examples) for key, value in total.items()}

    def add_hits(
        self, server_round: int, replies: Iterable[tuple[int, Message]], *, num_tasks: int
    ) -> tuple[list[int], list[int]]:
        """Add up the hits on what clients have held out: correct and all examples, by task id.

        Raises
        ------
        RunFailed
            If no good one remains; how many there are depends on who has held out any example.
        """

        def read(partition: int, reply: Message) -> tuple[list[int], list[int]]:
            hits = wire.read_hits(reply, num_tasks=num_tasks)
            self._check_tested(partition, hits[1])
            return hits

        good = [hits for _, hits in self._good(replies, read)]
        if not good:
            self.require(0, server_round)
        correct, total = np.sum(good, axis=0).tolist()
        return correct, total

    def _good(
        self, replies: Iterable[tuple[int, Message]], read: Callable[[int, Message], Read]
    ) -> Iterator[tuple[int, Read]]:
        """Give what can be read of each reply; a bad one is refused."""
        for partition, reply in replies:
            try:
                good = read(partition, reply)
            except BadUpdate as refusal:
                self.tally.fail(partition, f"refused: {refusal}")
                continue
            yield partition, good

    def _near(self, good: Iterable[tuple[int, Sized]], what: str) -> Iterator[tuple[int, Sized]]:
        """Leave out those whose size, the last of what was read, is far beyond the round's median."""
        heard = dict(good)
        sizes = {partition: float(read[-1]) for partition, read in heard.items()}
        for partition, times in far_off(sizes, limit=self.config.outlier_limit).items():
            limit = f"outlier-limit is {self.config.outlier_limit:g}"
            self.tally.fail(partition, f"refused: {what} are {times:.3g} times as large as is usual, {limit}")
            del heard[partition]
        yield from heard.items()

    def _check_tested(self, partition: int, total: Sequence[int]) -> None:
        """Refuse hits on other examples than the node said that it has held out; its data may have grown since."""
        held = [self.census.tests.get(task_id, {}).get(partition, 0) for task_id in range(len(total))]
        if any(count > _GROWTH * known for count, known in zip(total, held, strict=True)):
            raise BadUpdate(f"counts hits on {list(total)} examples of the tasks, the node said it has {held}")

    def _check_counts(self, task_id: int, partition: int, counts: Tensor, *, least: int = 1) -> None:
        """Refuse examples of each class (C,) that are not those which the client holds of the task, `least` or more.

        To data that a node brings, examples may come at any time: as many as it said it has, of classes it has named.
        """
        held = self.census.counts[task_id, partition]
        grows = partition in self.census.told and not (counts > _GROWTH * held).any()
        if not grows and not torch.equal(counts.double(), torch.where(held < least, 0, held).double()):
            raise BadUpdate("speaks of other examples than the client said it holds of this task")

    def _check_sums(self, sums: FeatureSums, usual_norm: UsualNorm | None = None) -> float:
        if not sums.possible():
            raise BadUpdate("sums contradict each other: no examples have such sums")
        return self._check_norm(sums.feature_norm(), usual_norm)

    def _check_norm(self, norm: float, usual: UsualNorm | None = None, *, what: str = "features") -> float:
        """Refuse a (root mean square) norm that nothing has, or not what is usual in this run; else give it."""
        if usual is not None and not usual.norm / 2 < norm < usual.norm * (1 + usual.slack):
            raise BadUpdate(f"{what} have a norm of {norm:.3g}, those of this run about {usual.norm:.3g}")
        if not norm <= self.config.norm_limit:
            raise BadUpdate(f"{what} have a norm of {norm:.3g}, norm-limit is {self.config.norm_limit:g}")
        return norm

    def require(self, num_good: int, server_round: int) -> None:
        """Check that a round has ``min-replies`` good replies.

        Raises
        ------
        TooFewReplies
            If it has fewer.
        """
        if num_good < self.config.min_replies:
            reasons = (
                "; ".join(f"partition {f.partition_id}: {f.reason}" for f in self.tally.failures) or "no client replied"
            )
            raise TooFewReplies(
                f"round {server_round} has {num_good} good replies, min-replies is {self.config.min_replies}: {reasons}"
            )

    def testers(self, task_id: int) -> list[int]:
        """List the partitions that have held out examples of a task or of one before it."""
        return sorted({p for earlier, held in self.census.tests.items() if earlier <= task_id for p in held})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask those who have held out examples of the tasks so far; nobody, where the server has the test data."""
        order = wire.RoundOrder(server_round, int(str(config["task-id"])), int(str(config["round-in-task"])))
        partitions = self.testers(order.task_id)
        return self.messages(arrays, order, partitions=partitions, message_type=MessageType.EVALUATE)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Leave the hits to `add_hits`, which keeps them by task."""
        return None

    def summary(self) -> None:
        """Log what this strategy does."""
        log.info("%s, residual %s", self.config.method, self.config.residual)
