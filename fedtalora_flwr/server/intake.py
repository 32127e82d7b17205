"""What replies of clients are worth: each read and checked once, weighed, and added up."""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Message
from torch import Tensor

from fedtalora_flwr import wire
from fedtalora_flwr.aggregation import (
    BadUpdate,
    ClientUpdate,
    GlobalState,
    Method,
    Weighing,
    capped,
    check_update,
    completed,
    far_off,
    first_rows,
    outliers,
    truncated,
)
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.model.heads import FeatureSums, Head, added_up
from fedtalora_flwr.server.failures import Tally
from fedtalora_flwr.server.roster import Roster

_GROWTH = 2  # times the examples that a node said it holds, which it may have by now

Replies = Iterable[tuple[int, Message]]  # partition id and its reply, in order of partition id
Read = TypeVar("Read")
Sized = TypeVar("Sized", bound=tuple[Any, ...])


@dataclass(frozen=True)
class UsualNorm:
    """The norm that features have in a run where all are scaled to one, and the share by which they may be longer.

    Shorter ones do no harm, and there are such: a feature of zeros cannot be scaled.
    """

    norm: float
    slack: float

    @classmethod
    def of(cls, head: Head, feature_dim: int, config: RunConfig) -> "UsualNorm | None":
        """Give that of what a head sums of features (N, feature_dim); None where these are of any size."""
        return cls(head.usual_norm(feature_dim), head.norm_slack()) if config.feature_norm == "rms" else None


@dataclass(frozen=True)
class Taken:
    """The good updates of a round, with the weights that they count with, and the mean loss over their examples.

    Of private training no loss is told.
    """

    updates: list[ClientUpdate]
    mean_loss: float | None


class Intake:
    """Takes in the replies of a round's exchanges; a bad one is refused with its reason in the tally.

    Every exchange here needs ``min-replies`` good ones, or raises `TooFewReplies`.

    Parameters
    ----------
    config
        The run's settings.
    roster
        What each partition said that it holds.
    tally
        Takes the refusals.
    """

    def __init__(self, config: RunConfig, roster: Roster, tally: Tally) -> None:
        self._config, self._roster, self._tally = config, roster, tally
        self._weighing = Weighing(config.aggregation_weights, config.suspects, config.max_weight, config.max_change)
        self.trust: dict[int, float] = {}  # partition id -> its weight by its examples, relative to the largest such

    def updates(self, replies: Replies, *, state: GlobalState, method: Method, task_id: int) -> Taken:
        """Take in what clients trained, weighed by the run's rule; how much less one counts goes for its sums too.

        Parameters
        ----------
        replies
            To a training message.
        state
            What they trained from.
        method
            Says which factors they trained.
        task_id
            The task.
        """
        updates: list[ClientUpdate] = []
        losses: dict[int, float] = {}
        for partition, reply in replies:
            like = truncated(state, self._config.rank_of(partition))
            try:
                update, losses[partition] = self.update(partition, reply, like=like, method=method, task_id=task_id)
                _check_rank(update, like)
                self._note_spent(partition, reply)
            except BadUpdate as refusal:
                self._tally.fail(partition, f"refused: {refusal}")
                continue
            whole = {name: completed(pair, state.adapters[name]) for name, pair in update.adapters.items()}
            updates.append(replace(update, adapters=whole))  # so that all can be compared
        limit, max_weight = self._config.outlier_limit, self._config.max_weight
        changes = {update.partition_id: (state, update) for update in updates}
        refused = outliers(changes, limit=limit, max_weight=max_weight)
        for partition, reason in refused.items():
            self._tally.fail(partition, f"refused: {reason}")
        updates = [update for update in updates if update.partition_id not in refused]
        self.require(len(updates))
        updates = self._weighed(state, updates)
        if method.truncates:
            updates = [self._of_its_rank(update) for update in updates]
        weights = [update.num_examples for update in updates]
        mean_loss = float(np.average([losses[update.partition_id] for update in updates], weights=weights))
        return Taken(updates, mean_loss=None if self._config.dp_epsilon else mean_loss)

    def _of_its_rank(self, update: ClientUpdate) -> ClientUpdate:
        rank = self._config.rank_of(update.partition_id)
        return update if rank is None else replace(update, adapters=first_rows(update.adapters, rank))

    def update(
        self, partition: int, reply: Message, *, like: GlobalState, method: Method, task_id: int
    ) -> tuple[ClientUpdate, float]:
        """Read one training reply and check it against the state and the examples that it is of.

        Raises
        ------
        BadUpdate
            If it cannot be right.
        """
        trained, private = method.trains(like.version), bool(self._config.dp_epsilon)
        update, mean_loss = wire.read_update(
            reply, like=like, trainable=trained, grams=method.sends_grams, private=private
        )
        if update.partition_id != partition:
            raise BadUpdate(f"speaks for partition {update.partition_id}, holds {partition}")
        check_update(like, update, trainable=trained, norm_limit=self._config.norm_limit)
        self._check_counts(task_id, partition, update.class_counts)
        return update, mean_loss

    def _weighed(self, state: GlobalState, updates: list[ClientUpdate]) -> list[ClientUpdate]:
        """Weigh the clients by the run's rule; how much less than by its examples one counts goes for its sums too."""
        weighed = self._weighing(state, updates)
        examples = {update.partition_id: update.num_examples for update in updates}
        trust = dict.fromkeys(examples, 0.0)
        trust |= {update.partition_id: update.num_examples / examples[update.partition_id] for update in weighed}
        most = max(trust.values())
        self.trust |= {partition: value / most for partition, value in trust.items()}
        less = {partition: value for partition, value in self.trust.items() if partition in trust and value < 1}
        self._tally.weights = {partition: round(value, 4) for partition, value in sorted(less.items())}
        return weighed

    def _counts_for(self, partition: int, task_id: int) -> float:
        """Give the share of its examples that a partition counts for in sums: as in training, `max-weight` at most.

        Without training, or where it was not drawn for it, nothing but what it says of itself tells how much it holds.
        """
        trust = self.trust.get(partition, 1.0)
        if not self._config.max_weight:
            return trust
        holders = self._roster.holds_task[task_id]
        held = torch.stack([self._roster.holdings.counts[task_id, p].sum() for p in holders]).double()
        most = capped(held, self._config.max_weight)
        return min(trust, float((most / held)[holders.index(partition)]))

    def sums(
        self,
        replies: Replies,
        *,
        task_id: int,
        to: FeatureSums,
        views: int,
        usual_norm: UsualNorm | None = None,
    ) -> FeatureSums:
        """Add the clients' feature sums up as they come, in order of partition id; a bad one is refused.

        Parameters
        ----------
        replies
            To a message that asks for sums.
        task_id
            The task that they are of.
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
            self._note_spent(partition, reply)
            self._check_counts(task_id, partition, sums.moment[:, -1], least=self._config.min_class_examples)
            norm, drift = self._check_sums(sums, usual_norm), like.gram.new_zeros(())
            if views:
                num_vectors = views * int(sums.moment[:, -1].sum())
                drift = wire.read_drift(reply, num_vectors=num_vectors, feature_dim=len(like.gram) - 1)
                mean_square = float(drift.square().sum()) / (2 * num_vectors)
                norm = max(norm, self._check_norm(math.sqrt(mean_square), usual_norm))
            return sums, drift, norm

        good = self._good(replies, read)
        for partition, (sums, drift, _) in good if usual_norm else self._near(good, "features"):
            total, num_good = total + sums.times(self._counts_for(partition, task_id)), num_good + 1
            if views:
                drifts[partition] = drift, _distance_moved(drift, num_vectors=views * float(sums.moment[:, -1].sum()))
        self.require(num_good)
        return (to.followed(self._total_drift(drifts, task_id)) if views else to) + total

    def _total_drift(self, drifts: Mapping[int, tuple[Tensor, float]], task_id: int) -> Tensor:
        """Add up how features have moved, by partition id: a root, and how far.

        A few examples that claim another move than all others would carry every old class's sums there, so the bounds
        of a change of the weights go for it too: it is left out beyond ``outlier-limit``, and counts less beyond
        ``max-change``.
        """
        near = dict(self._near(drifts.items(), "the moves of features"))
        longest = self._config.max_change * statistics.median_low(moved for _, moved in near.values())
        total = torch.zeros((), dtype=torch.float64)
        for partition, (root, moved) in near.items():
            less = longest / moved if 0 < longest < moved else 1.0
            total = total + self._counts_for(partition, task_id) * less * (root.T @ root)
        return total

    def class_means(
        self,
        replies: Replies,
        *,
        task_id: int,
        feature_dim: int,
        most_norm: float = math.inf,
        join: Callable[[Sequence[Tensor]], Tensor] = added_up,
    ) -> tuple[Tensor, Tensor]:
        """Give the mean feature of each class over all clients' examples, and which have one; a bad reply is refused.

        No mean is longer than the features, `most_norm` at most. `join` makes one of the clients' sums.

        Returns
        -------
        (C, d) float64, zero where there is no example, and (C,) bool.

        Raises
        ------
        TooFewReplies
            If fewer than ``min-replies`` good replies remain.
        """
        num_classes, moments = len(self._roster.holdings.classes.names), list[Tensor]()

        def read(partition: int, reply: Message) -> tuple[Tensor, float]:
            moment = wire.read_means(reply, num_classes=num_classes, feature_dim=feature_dim)
            self._check_counts(task_id, partition, moment[:, -1], least=self._config.min_class_examples)
            longest = float((moment[:, :-1] / moment[:, -1:].clamp(min=1)).norm(dim=1).max())
            if longest > most_norm:
                raise BadUpdate(
                    f"a class mean has a norm of {longest:.3g}, features of this run at most {most_norm:.3g}"
                )
            return moment, self._check_norm(longest)

        for partition, (moment, _) in self._near(self._good(replies, read), "class means"):
            moments.append(self._counts_for(partition, task_id) * moment)
        self.require(len(moments))
        total = join(moments)
        return total[:, :-1] / total[:, -1:].clamp(min=1), total[:, -1] > 0

    def mean_fisher(self, replies: Replies, *, like: GlobalState, method: Method, task_id: int) -> dict[str, Tensor]:
        """Give the mean squared gradient over all clients' examples, by trained factor; a bad reply is refused.

        Raises
        ------
        TooFewReplies
            If fewer than ``min-replies`` good ones remain.
        """
        total: dict[str, Tensor] = {}
        num_good, num_examples = 0, 0.0

        def read(partition: int, reply: Message) -> tuple[dict[str, Tensor], int, float]:
            sums, counts = wire.read_fisher(reply, like=like, trainable=method.trainable)
            self._check_counts(task_id, partition, counts)
            held = int(counts.sum())
            norm = (sum(float(value.double().sum()) for value in sums.values()) / max(1, held)) ** 0.5
            return sums, held, self._check_norm(norm, what="gradients")

        for partition, (sums, held, _) in self._near(self._good(replies, read), "gradients"):
            trust = self._counts_for(partition, task_id)
            total = {key: trust * value + total.get(key, 0) for key, value in sums.items()}
            num_good, num_examples = num_good + 1, num_examples + trust * held
        self.require(num_good)
        return {key: value / max(1.0, num_examples) for key, value in total.items()}

    def hits(self, replies: Replies, *, num_tasks: int) -> tuple[list[int], list[int], dict[int, tuple[int, int]]]:
        """Add up the hits on what clients have held out: correct and all examples, by task id, and both by client.

        As in training, no client counts for more than `max-weight` equal shares of a task; what is told of a client is
        what it said.

        Raises
        ------
        RunFailed
            If no good one remains; how many there are depends on who has held out any example.
        """

        def read(partition: int, reply: Message) -> tuple[list[int], list[int]]:
            hits = wire.read_hits(reply, num_tasks=num_tasks)
            self._check_tested(partition, hits[1])
            return hits

        good = dict(self._good(replies, read))
        if not good:
            self.require(0)
        counted = torch.tensor(list(good.values()), dtype=torch.float64)  # (K, 2, T)
        totals = counted[:, 1]  # (K, T)
        most = torch.stack([capped(of_task, self._config.max_weight) for of_task in totals.unbind(1)], 1)
        correct, total = (counted * (most / totals.clamp(min=1))[:, None]).sum(0).round().long().tolist()
        return correct, total, {partition: (sum(hits[0]), sum(hits[1])) for partition, hits in good.items()}

    def slot_sums(
        self,
        replies: Replies,
        *,
        held: Mapping[int, Sequence[int]],
        feature_dim: int,
        usual_norm: UsualNorm | None,
    ) -> dict[int, FeatureSums]:
        """Read what clients summed over their slots; as of the head's sums, none is far larger than the others'.

        Parameters
        ----------
        replies
            To a message that asks for them.
        held
            Partition id -> training examples of each of its slots.
        feature_dim
            Of the lifted features.
        usual_norm
            As of `sums`.
        """

        def read(partition: int, reply: Message) -> tuple[FeatureSums, float]:
            like = FeatureSums.zero(num_classes=len(held[partition]), feature_dim=feature_dim)
            sums = wire.read_sums(reply, like=like)
            if not torch.equal(sums.moment[:, -1], torch.tensor(held[partition]).double()):
                raise BadUpdate("sums over other examples than the client said it holds in its slots")
            return sums, self._check_sums(sums, usual_norm)

        good = self._good(replies, read)
        near = {p: sums for p, (sums, _) in (good if usual_norm else self._near(good, "features"))}
        self.require(len(near))
        return near

    def _good(self, replies: Replies, read: Callable[[int, Message], Read]) -> Iterator[tuple[int, Read]]:
        """Give what can be read of each reply; a bad one is refused."""
        for partition, reply in replies:
            try:
                good = read(partition, reply)
            except BadUpdate as refusal:
                self._tally.fail(partition, f"refused: {refusal}")
                continue
            yield partition, good

    def _near(self, good: Iterable[tuple[int, Sized]], what: str) -> Iterator[tuple[int, Sized]]:
        """Leave out those whose size, the last of what was read, is far beyond the round's median."""
        heard = dict(good)
        sizes = {partition: float(read[-1]) for partition, read in heard.items()}
        for partition, times in far_off(sizes, limit=self._config.outlier_limit).items():
            limit = f"outlier-limit is {self._config.outlier_limit:g}"
            self._tally.fail(partition, f"refused: {what} are {times:.3g} times as large as is usual, {limit}")
            del heard[partition]
        yield from heard.items()

    def _note_spent(self, partition: int, reply: Message) -> None:
        """Take down what a client of a private run says that the task has cost it."""
        if self._config.dp_epsilon:
            self._tally.epsilon_spent[partition] = wire.read_epsilon(reply, budget=self._config.dp_epsilon)

    def _check_tested(self, partition: int, total: Sequence[int]) -> None:
        """Refuse hits on other examples than the node said that it has held out; its data may have grown since."""
        held = [self._roster.holdings.tests.get(task_id, {}).get(partition, 0) for task_id in range(len(total))]
        if any(count > _GROWTH * known for count, known in zip(total, held, strict=True)):
            raise BadUpdate(f"counts hits on {list(total)} examples of the tasks, the node said it has {held}")

    def _check_counts(self, task_id: int, partition: int, counts: Tensor, *, least: int = 1) -> None:
        """Refuse examples of each class (C,) that are not those which the client holds of the task, `least` or more.

        To data that a node brings, examples may come at any time: as many as it said it has, of classes it has named.
        """
        held = self._roster.holdings.counts[task_id, partition]
        can_be = (counts >= 0) & (counts <= _GROWTH * held) & (counts == counts.round())
        grows = partition in self._roster.holdings.told and bool(can_be.all())
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
        if not norm <= self._config.norm_limit:
            raise BadUpdate(f"{what} have a norm of {norm:.3g}, norm-limit is {self._config.norm_limit:g}")
        return norm

    def require(self, num_good: int) -> None:
        """Check that a round has ``min-replies`` good replies.

        Raises
        ------
        TooFewReplies
            If it has fewer.
        """
        self._tally.require(num_good, at_least=self._config.min_replies)


def _check_rank(update: ClientUpdate, like: GlobalState) -> None:
    for name, pair in like.adapters.items():
        if (rank := update.adapters[name].rank) != pair.rank:
            raise BadUpdate(f"{name}: rank {rank}, {pair.rank} was agreed with this client (ranks)")


def _distance_moved(drift: Tensor, *, num_vectors: float) -> float:
    """Give the root mean square distance between features before and now, of a root of (f', f, 1)."""
    before, now = drift[:, :-1].chunk(2, dim=1)
    return math.sqrt(float((now - before).square().sum()) / num_vectors)
