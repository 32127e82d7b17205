"""A run's training where all clients train one adapter: what each round asks of them, and what becomes of the state."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from flwr.app import Message, MessageType, RecordDict
from torch import Tensor

from fedtalora_flwr import wire
from fedtalora_flwr.aggregation import Aggregator, ClientUpdate, GlobalState, exactness_error, kept_energy, truncated
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.model import heads
from fedtalora_flwr.model.heads import Classifier, FeatureSums, Head
from fedtalora_flwr.model.lora import AdaptedModel, count_parameters
from fedtalora_flwr.model.penalties import Memory, Penalty
from fedtalora_flwr.model.train import num_views
from fedtalora_flwr.run_folder.checkpoint import Checkpoint
from fedtalora_flwr.server.data import RunData
from fedtalora_flwr.server.failures import RunFailed
from fedtalora_flwr.server.federation import Federation, Scored, Trained, reply_limit
from fedtalora_flwr.server.intake import UsualNorm
from fedtalora_flwr.server.residuals import SharedResidual


class OneAdapter:
    """The rounds of a method that trains one shared adapter.

    Parameters
    ----------
    federation
        The clients.
    config
        The run's settings.
    model
        The backbone, whose sizes are those of the features.
    method
        The aggregation.
    head, penalty
        What classifies, and what local training is held back by.
    data
        Whose data the run is on.
    residuals
        The residual that clients are brought to; the federation's.
    point
        Where the run begins, or goes on from.

    Raises
    ------
    RunFailed
        If the penalty remembers a pair that the method does not keep, or of which some clients train a part.
    """

    def __init__(
        self,
        federation: Federation,
        config: RunConfig,
        *,
        model: AdaptedModel,
        method: Aggregator,
        head: Head,
        penalty: Penalty,
        data: RunData,
        residuals: SharedResidual,
        point: Checkpoint,
    ) -> None:
        if penalty.remembers and not method.keeps_pair:
            raise RunFailed(
                f"penalty {config.penalty} remembers the pair, which method {config.method} makes anew every "
                "round; choose another of the two"
            )
        if penalty.remembers and config.ranks:
            raise RunFailed(
                f"penalty {config.penalty} remembers all rows of a pair, of which clients with ranks {config.ranks} "
                "train some; choose another penalty, or one rank for all"
            )
        self._federation, self._config, self._model, self._method = federation, config, model, method
        self._head, self._penalty, self._data, self._residuals = head, penalty, data, residuals
        self._frozen = wire.frozen_digest(point.state.adapters, method.changing)
        self.num_rounds = config.last_task * max(1, config.rounds_per_task)
        self.at_once: Sequence[int] | None = None
        if point.before is not None:
            residuals.begin_task(point.before)

    def begin(self, point: Checkpoint, order: wire.RoundOrder) -> Checkpoint:
        """Begin a task: keep the state of now where sums follow the features, and set the class rows."""
        if order.round_in_task == 0 and self._follows_drift:
            point = replace(point, before=point.state)
            self._residuals.begin_task(point.state)
        if order.round_in_task == 0 and self._config.rounds_per_task and self._config.rows_start == "means":
            means, known = self._federation.nodes.insist(lambda order: self._class_means(point, order), order)
            point = self._with_rows(point, means, known)
        return point

    def train(self, point: Checkpoint, order: wire.RoundOrder) -> tuple[Checkpoint, Trained]:
        """Let a sample of the clients train, and fold their updates into the state."""
        return self._federation.nodes.insist(lambda order: self._train(point, order), order)

    def _train(self, point: Checkpoint, order: wire.RoundOrder) -> tuple[Checkpoint, Trained]:
        state, task_id = point.state, order.task_id
        seen = self._config.loss_classes == "seen" or self._penalty.uses_old_rows
        rows = point.classes.seen(task_id) if seen else point.classes.tasks[task_id]
        messages: list[Message] = []
        for rank, partitions in self._by_rank(self._federation.roster.sample(order.server_round, task_id)).items():
            messages += self._federation.exchange.messages(
                self._content(truncated(state, rank), order, classes=rows, memory=point.memory),
                partitions=partitions,
                message_type=MessageType.TRAIN,
                server_round=order.server_round,
            )
        replies = self._federation.exchange.send(messages, most_bytes=self._most_bytes(point))
        taken = self._federation.intake.updates(replies, state=state, method=self._method, task_id=task_id)
        updates = taken.updates
        if self._config.task_average and task_id:
            updates = [*updates, update_of_server(state, updates, num_tasks=task_id)]
        new = self._method.aggregate(state, updates)
        self._residuals.advance(new)
        return replace(point, state=new), Trained(
            mean_loss=taken.mean_loss,
            residual_norm=_norm(new),
            kept_energy=kept_energy(new.step, new.owed) if self._config.residual_energy < 1 else None,
            exactness_error=exactness_error(state, updates, new) if self._config.verify else None,
        )

    def _by_rank(self, partitions: Iterable[int]) -> dict[int | None, list[int]]:
        """Group partitions by the rank of the pairs that they are sent; None: the server's."""
        groups: dict[int | None, list[int]] = {}
        for partition in partitions:
            rank = self._config.rank_of(partition) if self._method.truncates else None
            groups.setdefault(rank, []).append(partition)
        return groups

    def score(self, point: Checkpoint, order: wire.RoundOrder) -> tuple[Checkpoint, Scored]:
        """Evaluate where it is time to; what a task's end settles is kept, what its middle shows is only told."""
        rounds_per_task = max(1, self._config.rounds_per_task)
        ends = order.round_in_task + 1 == rounds_per_task
        if ends and order.task_id + 1 < self._config.last_task and self._config.rounds_per_task:
            point = replace(point, memory=self._remembered(point, order))
        if not self._config.evaluates(order.round_in_task):
            return point, Scored()
        sums = point.sums
        if self._head.collects_sums:
            sums = self._federation.nodes.insist(lambda order: self._with_sums(point, order), order)
        if ends and self._config.rounds_per_task:
            point = self._ended_rows(point, sums)
        classifiers = [self._head.classifier(point.state.head, sums)]
        if self._head.collects_sums and self._config.rounds_per_task:
            classifiers.append(Classifier(point.state.head))
        hits = self._data.hits(
            point,
            order,
            classifiers,
            federation=self._federation,
            ask=lambda state, classes, partitions, message_type: self._ask(
                point, self._content(state, order, classes=classes), order, partitions, message_type
            ),
        )
        matrix = point.matrix.with_row(order.task_id, hits.correct, hits.total)
        linear = sum(hits.correct_linear) / sum(hits.total) if hits.correct_linear else None
        scored = Scored(
            accuracy_seen=matrix.accuracy_seen()[order.task_id],
            accuracy_seen_linear=linear,
            answer_losses=hits.answer_losses or (),
        )
        if not ends:
            return point, scored
        point = replace(point, sums=sums, matrix=matrix, judged=hits.judged, hits_of_clients=hits.of_clients)
        return point, scored

    def _class_means(
        self, point: Checkpoint, order: wire.RoundOrder, *, join: Callable[[Sequence[Tensor]], Tensor] = heads.added_up
    ) -> tuple[Tensor, Tensor]:
        """Give the means of the task's classes over all holders, the old ones' where the head's sums tell them.

        `join` makes one of the holders' sums.

        Returns
        -------
        (C, d) means, and which are known, (C,). A class that no reply is about is not.
        """
        dim = self._model.backbone.feature_dim
        replies = self._ask(
            point,
            self._content(point.state, order),
            order,
            partitions=self._federation.roster.tellers(order.task_id),
            message_type="train.means",
        )
        most = 1.001 * dim**0.5 if self._config.feature_norm == "rms" else math.inf  # of float32
        means, known = self._federation.intake.class_means(
            replies, task_id=order.task_id, feature_dim=dim, most_norm=most, join=join
        )
        if self._tells_means:
            moment = point.sums.moment
            told = moment[:, -1] > 0
            means[told] = moment[told, :-1] / moment[told, -1:]
            known = known | told
        return means, known

    def _with_rows(self, point: Checkpoint, means: Tensor, known: Tensor) -> Checkpoint:
        """Put the class rows at class means (C, d) where these are known (C,); one class is nearest to everything."""
        if known.sum() <= 1:
            return point
        head = {name: value.clone() for name, value in point.state.head.items()}
        for name, rows in heads.rows_at_means(means[known]).items():
            head[name][known] = rows
        return replace(point, state=replace(point.state, head=head))

    def _ended_rows(self, point: Checkpoint, sums: FeatureSums) -> Checkpoint:
        """End a task, with ``rows-start = means``, with rows at the means that the sums tell of all classes so far.

        Rows that were trained while no old example was there to answer are biased to their own classes.
        """
        if not (self._config.rows_start == "means" and self._tells_means):
            return point
        counts = sums.moment[:, -1:]
        return self._with_rows(point, sums.moment[:, :-1] / counts.clamp(min=1), counts[:, 0] > 0)

    @property
    def _tells_means(self) -> bool:
        """Whether the head's sums hold the means of the features that the rows act on, and not only of lifted ones."""
        return self._head.collects_sums and self._head.projection(self._model.backbone.feature_dim) is None

    @property
    def _follows_drift(self) -> bool:
        """Whether the sums of finished tasks follow the features; without training these do not move."""
        sums = self._head.collects_sums and self._head.second_moments
        return sums and self._config.follow_drift and bool(self._config.rounds_per_task)

    def _remembered(self, point: Checkpoint, order: wire.RoundOrder) -> Memory:
        """Gather at the end of a task what the penalty is to remember of it."""
        if not self._penalty.remembers:
            return point.memory
        fisher = self._federation.nodes.insist(lambda order: self._mean_fisher(point, order), order)
        anchor = {
            f"{factor}/{name}": getattr(pair, factor).clone()  # a checkpoint holds no tensor twice
            for name, pair in point.state.adapters.items()
            for factor in sorted(self._method.trainable)
        }
        return point.memory.with_task(anchor, fisher)

    def _mean_fisher(self, point: Checkpoint, order: wire.RoundOrder) -> dict[str, Tensor]:
        replies = self._ask(
            point,
            self._content(point.state, order, classes=point.classes.tasks[order.task_id]),
            order,
            partitions=self._federation.roster.holds_task[order.task_id],
            message_type="train.fisher",
        )
        return self._federation.intake.mean_fisher(
            replies, like=point.state, method=self._method, task_id=order.task_id
        )

    def _with_sums(self, point: Checkpoint, order: wire.RoundOrder) -> FeatureSums:
        """Add to the sums of finished tasks what all holders of this task's data sum under the new state.

        With ``follow-drift`` they sum beside it their features under the state that the task began with, which shows
        the server how features have moved, and it carries the old sums over.
        """
        if not self._head.second_moments:
            means, known = self._class_means(point, order, join=self._head.joined)
            return replace(point.sums, moment=torch.cat([means, known[:, None]], 1))
        content, views = self._content(point.state, order), 0
        if self._follows_drift and order.task_id and point.before is not None:
            content = wire.add_before(content, self._content(point.before, order))
            views = num_views(self._model, self._config)
        replies = self._ask(
            point,
            content,
            order,
            partitions=self._federation.roster.tellers(order.task_id),
            message_type="train.sums",
        )
        return self._federation.intake.sums(
            replies,
            task_id=order.task_id,
            to=point.sums,
            views=views,
            usual_norm=UsualNorm.of(self._head, self._model.backbone.feature_dim, self._config),
        )

    def _content(
        self,
        state: GlobalState,
        order: wire.RoundOrder,
        *,
        classes: Sequence[int] | None = None,
        memory: Memory | None = None,
    ) -> RecordDict:
        """Build what all clients are sent of a state; factors that the method keeps frozen stay here."""
        return wire.state_message(
            wire.pack_state(state, classes=classes, memory=memory, changing=self._method.changing),
            order,
            scaling=next((pair.scaling for pair in state.adapters.values()), 1.0),
            version=state.version,
            num_classes=len(self._federation.roster.holdings.classes.names),
            frozen=self._frozen,
        )

    def _ask(
        self,
        point: Checkpoint,
        content: RecordDict,
        order: wire.RoundOrder,
        partitions: Iterable[int],
        message_type: str,
    ) -> Iterator[tuple[int, Message]]:
        return self._federation.ask(
            content,
            order,
            partitions=partitions,
            message_type=message_type,
            most_bytes=self._most_bytes(point),
        )

    def _most_bytes(self, point: Checkpoint) -> int:
        trained = [getattr(pair, factor) for pair in point.state.adapters.values() for factor in self._method.trainable]
        num_factors = sum(int(value.numel()) for value in [*trained, *point.state.head.values()])
        num_factors += self._num_grams(point.state, self._method.trainable)
        return reply_limit(num_factors=num_factors, num_sums=self._num_sums(point))

    def parameters(self, point: Checkpoint) -> dict[str, int]:
        """Count what the model has, trains and sends."""
        trained = self._method.trains(point.state.version)
        square = self._method.dense or self._method.core
        counts = count_trained(self._model, point.state, sorted(trained), dense=square)
        counts["transmitted"] += self._num_grams(point.state, trained)
        return {**counts, "sums": self._num_sums(point)}

    def _num_grams(self, state: GlobalState, trained: frozenset[str]) -> int:
        """Count the numbers of the Gram matrices that a client sends beside the factors that it trained."""
        if not self._method.sends_grams:
            return 0
        sizes = [wire.gram_size(pair, trained) for pair in state.adapters.values()]
        return sum(size * (size + 1) // 2 for size in sizes)

    def _num_sums(self, point: Checkpoint) -> int:
        """Count the float64 numbers that a client sends at most at a task's end: half of each gram, and the moment."""
        if not self._head.collects_sums:
            return 0
        if not self._head.second_moments:
            return point.sums.moment.numel()
        size = point.sums.gram.shape[0]
        grams = [size, 2 * size - 1] if self._follows_drift else [size]
        return sum(n * (n + 1) // 2 for n in grams) + point.sums.moment.numel()

    def facts(self) -> dict[str, Any]:
        """Give nothing beyond what the manifest says of every run."""
        return {}


def _norm(state: GlobalState) -> float:
    """Give the Frobenius norm of the residual over all layers, without what else stands in the base."""
    squares = [float(r.norm()) ** 2 for name, r in state.residual.items() if name in state.adapters]
    return float(sum(squares) ** 0.5)


def count_trained(model: AdaptedModel, state: GlobalState, trainable: Sequence[str], *, dense: bool) -> dict[str, int]:
    """Count what a model has, and what a client trains and sends of one adapter and all class rows."""
    trained = count_parameters(state.adapters, only=trainable)
    rows = sum(value.numel() for value in state.head.values())
    return {
        "total": sum(p.numel() for p in model.parameters()),
        "trainable": trained + rows,
        "transmitted": trained + rows,
        "lora": trained if dense else count_parameters(state.adapters),
        "head": rows,
    }


def update_of_server(state: GlobalState, updates: Sequence[ClientUpdate], *, num_tasks: int) -> ClientUpdate:
    """Let the server's own model take part, with ``task-average``, as if it were one more client's.

    After t finished tasks, `num_tasks`, it has t times the weight of all the round's examples, and a round moves the
    model by ``1 / (t + 1)`` of the way: the mean over tasks is taken as that over clients is, exactly. Of the class
    rows it says nothing.
    """
    return ClientUpdate(
        partition_id=-1,
        num_examples=num_tasks * sum(update.num_examples for update in updates),
        adapters=state.adapters,
        head=state.head,
        class_counts=torch.zeros_like(updates[0].class_counts),
        base_version=state.version,
    )
