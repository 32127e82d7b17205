"""A run's training where a client's tasks are trained at once, each in a slot, whose adapters come back unnamed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, RecordDict

from fedtalora_flwr import wire
from fedtalora_flwr.aggregation import (
    BadUpdate,
    ClientUpdate,
    ClusteredState,
    GlobalState,
    Slot,
    SlotAggregator,
    check_update,
    in_proportion,
    outliers,
    slots_exactness_error,
)
from fedtalora_flwr.aggregation.clustering import in_matched_group
from fedtalora_flwr.config import ConfigError, RunConfig
from fedtalora_flwr.model.heads import FeatureSums, trained_classes
from fedtalora_flwr.model.lora import AdaptedModel, count_parameters
from fedtalora_flwr.model.router import by_cluster, router
from fedtalora_flwr.run_folder.checkpoint import Checkpoint
from fedtalora_flwr.run_folder.writer import SlotLog
from fedtalora_flwr.server.failures import RunFailed
from fedtalora_flwr.server.federation import Federation, Scored, Trained, reply_limit
from fedtalora_flwr.server.intake import UsualNorm
from fedtalora_flwr.server.one_adapter import count_trained
from fedtalora_flwr.server.residuals import SlotResiduals
from fedtalora_flwr.server.slot_evaluation import SlotEvaluation
from fedtalora_flwr.server.true_tasks import TrueTasks

TRAIN, SUMS = "train.slots", "train.slot_sums"


class Slots:
    """The rounds of a method over slots: every client trains all its tasks in every round, each in a slot of its own.

    Parameters
    ----------
    federation
        The clients.
    config
        The run's settings.
    model
        The backbone.
    method
        The aggregation over slots.
    residuals
        The residuals that clients are brought to; the federation's.
    tasks
        Which task each slot is about.

    Raises
    ------
    RunFailed
        If fewer partitions than ``min-replies`` have a slot.
    """

    def __init__(
        self,
        federation: Federation,
        config: RunConfig,
        *,
        model: AdaptedModel,
        method: SlotAggregator,
        residuals: SlotResiduals,
        tasks: TrueTasks,
    ) -> None:
        self._federation, self._config, self._model, self._method = federation, config, model, method
        self._residuals, self._tasks = residuals, tasks
        self.at_once: Sequence[int] | None = tasks.holders()
        self.num_rounds = max(1, config.rounds_per_task)  # what each task gets, and all have it at once
        if (holders := len(self.at_once)) < config.min_replies:
            raise RunFailed(
                f"{holders} partitions have a slot, min-replies is {config.min_replies}: lower min-replies "
                "or min-slot-share"
            )

    def begin(self, point: Checkpoint, order: wire.RoundOrder) -> Checkpoint:
        """Do nothing: no task begins, all are there from the start."""
        return point

    def train(self, point: Checkpoint, order: wire.RoundOrder) -> tuple[Checkpoint, Trained]:
        """Let a sample of the clients train all their slots, and fold what comes back into the states."""
        return self._federation.nodes.insist(lambda order: self._train(point, order), order)

    def _train(self, point: Checkpoint, order: wire.RoundOrder) -> tuple[Checkpoint, Trained]:
        clustered, limit = clustered_of(point, self._config), self._config.outlier_limit
        heard: dict[Slot, tuple[ClientUpdate, float]] = {}
        shared: dict[int, ClientUpdate] = {}
        for partition, reply in self._federation.exchange.send(
            self._messages(clustered, order), most_bytes=self._most_bytes(point)
        ):
            for slot, update, mean_loss in self._read(clustered, partition, reply, shared):
                heard[slot] = update, mean_loss
        changes = {slot: (clustered.sent_to(slot), update) for slot, (update, _) in heard.items()}
        for slot, reason in outliers(changes, limit=limit).items():
            self._federation.tally.fail(slot.partition_id, f"slot {slot.number} refused: {reason}")
            del changes[slot]
        pairs: dict[int, tuple[GlobalState, ClientUpdate]] = {}
        for partition, whole in sorted(shared.items()):
            slots = [update for slot, (_, update) in changes.items() if slot.partition_id == partition]
            if slots and clustered.shared is not None:
                pairs[partition] = replace(clustered.shared, head={}), _of_slots(whole, slots)
        for partition, reason in outliers(pairs, limit=limit).items():
            self._federation.tally.fail(partition, f"shared part refused, and all slots: {reason}")
            del pairs[partition]
            changes = {slot: one for slot, one in changes.items() if slot.partition_id != partition}
        updates = in_proportion(changes, max_change=self._config.max_change)
        common = list(in_proportion(pairs, max_change=self._config.max_change).values())
        losses = [heard[slot][1] for slot in updates]
        self._federation.intake.require(len({slot.partition_id for slot in updates}))
        new = self._method.aggregate(clustered, updates, common)
        self._residuals.follow(new)
        right = self._in_cluster_of_their_task(new)
        states = [*new.states().values(), *([new.shared] if new.shared is not None else [])]
        squares = [float(r.norm()) ** 2 for state in states for r in state.residual.values()]
        return replace(point, clustered=new), Trained(
            mean_loss=float(np.average(losses, weights=[update.num_examples for update in updates.values()])),
            residual_norm=sum(squares) ** 0.5,
            exactness_error=slots_exactness_error(clustered, updates, new, common) if self._config.verify else None,
            cluster_accuracy=sum(right.values()) / len(right) if right else None,
            slots=[
                SlotLog(*slot, cluster=new.assigned.get(slot), right=right.get(slot, False), x=x, y=y)
                for slot, (x, y) in self._method.picture(new, updates).items()
            ],
        )

    def _messages(self, clustered: ClusteredState, order: wire.RoundOrder) -> list[Message]:
        """Build the round's training messages, each with the states of all its client's slots."""
        packed: dict[int, ArrayRecord] = {}  # id of a state -> its arrays, shared by all that train from it
        messages: list[Message] = []
        common: dict[wire.Part, RecordDict] = {}
        if clustered.shared is not None:
            arrays = wire.pack_state(clustered.shared, classes=trained_classes(clustered.shared.head))
            common[wire.SHARED] = self._content(clustered.shared, arrays, order)
        for partition in self._federation.roster.sample(order.server_round, order.task_id):
            parts = {**common}
            for slot in self._tasks.slots_of(partition):
                state = clustered.of(slot)
                if id(state) not in packed:
                    rows = () if clustered.shared else trained_classes(state.head)  # or they come with what is shared
                    packed[id(state)] = wire.pack_state(state, classes=rows)
                parts[slot.number] = self._content(state, packed[id(state)], order)
            messages += self._federation.exchange.messages(
                wire.bundle(parts), partitions=[partition], message_type=TRAIN, server_round=order.server_round
            )
        return messages

    def _content(self, state: GlobalState, arrays: ArrayRecord, order: wire.RoundOrder) -> RecordDict:
        return wire.state_message(
            arrays,
            order,
            scaling=next((pair.scaling for pair in state.adapters.values()), 1.0),
            version=state.version,
            num_classes=len(self._federation.roster.holdings.classes.names),
        )

    def _read(
        self, clustered: ClusteredState, partition: int, reply: Message, shared: dict[int, ClientUpdate]
    ) -> Iterator[tuple[Slot, ClientUpdate, float]]:
        """Give the good updates in a client's reply, with their losses; what came of the shared part goes to `shared`.

        Where that is bad, so is all that was trained beside it.
        """
        slots, tally = self._tasks.slots_of(partition), self._federation.tally
        known: set[wire.Part] = {slot.number for slot in slots}
        try:
            parts = wire.unbundle(reply)
        except wire.WireError as refusal:
            tally.fail(partition, f"refused: {refusal}")
            return
        if clustered.shared is not None:
            known.add(wire.SHARED)
        if unknown := parts.keys() - known:
            tally.fail(partition, f"refused: speaks of slot {min(unknown, key=str)}, has {len(slots)}")
            return
        good: dict[Slot, tuple[ClientUpdate, float]] = {}
        for slot in slots:
            try:
                good[slot] = self._checked(clustered.sent_to(slot), slot, parts)
            except BadUpdate as refusal:
                tally.fail(partition, f"slot {slot.number} refused: {refusal}")
        if clustered.shared is not None and good:
            try:
                updates = {slot: update for slot, (update, _) in good.items()}
                pairs = replace(clustered.shared, head={})
                shared[partition] = self._checked_shared(pairs, partition, parts, updates)
            except BadUpdate as refusal:
                tally.fail(partition, f"shared part refused, and all slots: {refusal}")
                return
        for slot, (update, mean_loss) in good.items():
            yield slot, update, mean_loss

    def _checked_shared(
        self,
        state: GlobalState,
        partition: int,
        parts: Mapping[wire.Part, Message],
        updates: Mapping[Slot, ClientUpdate],
    ) -> ClientUpdate:
        """Read a client's update of the shared part and check it as any other, as trained on the examples of its slots.

        It says nothing of examples itself.
        """
        if wire.SHARED not in parts:
            raise BadUpdate("it did not come back")
        trained = self._method.trains(state.version)
        update, _ = wire.read_update(parts[wire.SHARED], like=state, trainable=trained)
        if update.partition_id != partition:
            raise BadUpdate(f"speaks for partition {update.partition_id}, holds {partition}")
        whole = _of_slots(update, list(updates.values()))
        check_update(state, whole, trainable=trained, norm_limit=self._config.norm_limit)
        return whole

    def _checked(
        self, state: GlobalState, slot: Slot, parts: Mapping[wire.Part, Message]
    ) -> tuple[ClientUpdate, float]:
        """Read a slot's update and check it as any other, against the state and the examples of its slot."""
        if slot.number not in parts:
            raise BadUpdate("it did not come back")
        update, mean_loss = self._federation.intake.update(
            slot.partition_id,
            parts[slot.number],
            like=state,
            method=self._method,
            task_id=self._tasks.task_of(slot),
        )
        if not self._method.compares_ranks:
            for name, pair in state.adapters.items():
                if (rank := update.adapters[name].rank) != pair.rank:
                    raise BadUpdate(
                        f"{name}: rank {rank}, the server's is {pair.rank}; signature {self._config.signature} "
                        "compares equal ranks only, set signature=product"
                    )
        return update, mean_loss

    def _in_cluster_of_their_task(self, clustered: ClusteredState) -> dict[Slot, bool]:
        """Judge all slots heard of; none where there is no cluster."""
        slots, assigned = clustered.slots(), clustered.assigned
        if not assigned:
            return {}
        tasks = [self._tasks.task_of(slot) for slot in slots]
        return dict(zip(slots, in_matched_group([assigned.get(slot) for slot in slots], tasks), strict=True))

    def score(self, point: Checkpoint, order: wire.RoundOrder) -> tuple[Checkpoint, Scored]:
        """Evaluate every state on the tasks of its slots; after the last round, learn to route and evaluate that."""
        is_last = order.server_round == self.num_rounds
        due = self._config.eval_every and order.server_round % self._config.eval_every == 0
        if not is_last and not due:
            return point, Scored()
        clustered = clustered_of(point, self._config)
        evaluation = SlotEvaluation(self._model, clustered, self._tasks, point.classes, self._config)
        task_id = self._config.last_task - 1
        hits = evaluation.hits()
        matrix = point.matrix.with_row(task_id, hits.correct, hits.total)
        scored = Scored(accuracy_seen=matrix.accuracy_seen()[task_id], answer_losses=hits.answer_losses or ())
        if not is_last:
            return point, scored
        point = replace(point, matrix=matrix)
        if not clustered.clusters:
            return point, scored
        routes = self._federation.nodes.insist(lambda order: self._routes(point, order), order)
        routed, correct = evaluation.routed(routes)
        return replace(point, routes=routes), replace(scored, routing_accuracy=routed, accuracy_routed=correct)

    def _routes(self, point: Checkpoint, order: wire.RoundOrder) -> FeatureSums:
        """Let every holder of a slot sum its features under what no slot has of its own: backbone and shared part."""
        clustered, tasks = clustered_of(point, self._config), self._tasks
        common = clustered.shared or clustered.start
        replies = self._federation.ask(
            self._content(common, wire.pack_state(common), order),
            order,
            partitions=tasks.holders(),
            message_type=SUMS,
            most_bytes=self._most_bytes(point),
        )
        held = {p: [tasks.num_examples(slot) for slot in tasks.slots_of(p)] for p in tasks.holders()}
        head, dim = router(self._config), self._model.backbone.feature_dim
        usual = UsualNorm.of(head, dim, self._config)
        sums = self._federation.intake.slot_sums(replies, held=held, feature_dim=head.lifted_dim(dim), usual_norm=usual)
        return by_cluster(sums, clustered)

    def _most_bytes(self, point: Checkpoint) -> int:
        """Bound a reply by what a client with the most slots sends, or its sums for the router."""
        state = point.state  # of a slot and the shared part together
        factors = [getattr(pair, factor) for pair in state.adapters.values() for factor in self._method.trainable]
        num_factors = sum(int(value.numel()) for value in [*factors, *state.head.values()])
        slots = max(map(len, self._tasks.by_partition.values()), default=0)
        size = 1 + (self._config.ridge_features or self._model.backbone.feature_dim)
        return slots * reply_limit(num_factors=num_factors, num_sums=0) + 16 * size * (size + slots)

    def parameters(self, point: Checkpoint) -> dict[str, int]:
        """Count as a client with a slot for every task trains and sends.

        That is an adapter each, the shared part once and every class row once.
        """
        clustered, adapters = clustered_of(point, self._config), self._config.last_task
        factors, dense = sorted(self._method.trainable), self._method.dense
        one = count_trained(self._model, clustered.start, factors, dense=dense)
        shared = 0 if clustered.shared is None else count_parameters(clustered.shared.adapters)
        trained = adapters * (one["trainable"] - one["head"]) + shared + one["head"]
        return {
            **one,
            "trainable": trained,
            "transmitted": adapters * one["lora"] + shared + one["head"],
            "shared": shared,
            "sums": 0,
            "adapters": adapters,
        }

    def facts(self) -> dict[str, Any]:
        """Say which task each slot is about, by partition and slot number: what the clustering is judged by."""
        return {"slots": [list(tasks) for _, tasks in sorted(self._tasks.by_partition.items())]}


def clustered_of(point: Checkpoint, config: RunConfig) -> ClusteredState:
    """Give the states of a run over slots; before its first round all begin with one."""
    return point.clustered or ClusteredState.begin(point.state, shared_rank=config.shared_rank)


def _of_slots(update: ClientUpdate, slots: Sequence[ClientUpdate]) -> ClientUpdate:
    """Let a client's update of the shared part weigh as all its slots do, of which there is one at least."""
    return replace(
        update,
        num_examples=sum(one.num_examples for one in slots),
        class_counts=torch.stack([one.class_counts for one in slots]).sum(0),
    )


def check_settings(config: RunConfig, *, own_data: bool) -> None:
    """Refuse settings that mean nothing where all tasks are trained at once.

    Raises
    ------
    ConfigError
        If there is one.
    """
    if own_data:
        raise ConfigError(f"method {config.method} needs a data set that all nodes read, not dataset {config.dataset}")
    if config.head not in ("linear", "lm"):
        raise ConfigError(f"method {config.method} trains class rows in every slot; set head=linear")
    if config.aggregation_weights != "examples" or config.max_weight:
        raise ConfigError(f"method {config.method} weighs slots by their examples: set aggregation-weights=examples")
    if config.min_class_examples > 1:
        raise ConfigError(f"method {config.method} sums over slots and not classes; set min-class-examples=1")
    if config.loss_classes == "seen" or config.penalty != "none":
        raise ConfigError(
            f"method {config.method} trains all tasks at once, there are no earlier ones: set loss-classes=task and "
            "penalty=none"
        )
