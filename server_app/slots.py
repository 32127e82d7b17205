"""The exchange of methods over slots: a client's tasks are trained at once, and their adapters come back unnamed."""

from collections.abc import Iterable, Iterator, Mapping
from logging import getLogger

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedtalora_flwr import wire
from fedtalora_flwr.aggregation import (
    BadUpdate,
    ClientUpdate,
    ClusteredState,
    Slot,
    SlotAggregator,
    check_update,
    far_off,
    slots_exactness_error,
    update_norm,
)
from fedtalora_flwr.clustering import in_matched_group
from fedtalora_flwr.config import ConfigError, RunConfig
from fedtalora_flwr.heads import FeatureSums, trained_classes
from fedtalora_flwr.residual import SlotLedger
from fedtalora_flwr.runlog import SlotLog
from server_app.census import Census
from server_app.strategy import AdapterStrategy, RunFailed

log = getLogger("fedtalora.server")

TRAIN, SUMS = "train.slots", "train.slot_sums"


class SlotStrategy(AdapterStrategy):
    """Send every slot of a sample of the clients its state, and fold what comes back.

    Parameters
    ----------
    config
        The run's settings.
    method
        The aggregation over slots.
    clustered
        Where the run begins, or goes on from.
    tasks_of
        Partition id -> its task ids by slot number. They say which examples a slot's update must be of, and how good a
        clustering is; the method never sees them.
    """

    method: SlotAggregator  # type: ignore[assignment]
    ledger: SlotLedger
    clustered: ClusteredState

    def __init__(
        self,
        *,
        config: RunConfig,
        method: SlotAggregator,
        clustered: ClusteredState,
        tasks_of: Mapping[int, tuple[int, ...]],
    ) -> None:
        super().__init__(config=config, method=method, state=clustered.start)  # type: ignore[arg-type]
        self.clustered, self.tasks_of = clustered, tasks_of
        self.ledger = SlotLedger(clustered)
        self.placed: list[SlotLog] = []  # of the last round
        self.cluster_accuracy: float | None = None  # after the last round

    def take_stock(self, census: Census, *, settled: range) -> None:
        """Learn who holds what: all tasks are played at once, by everyone who has a slot.

        Raises
        ------
        RunFailed
            If fewer partitions than ``min-replies`` have a slot.
        """
        super().take_stock(census, settled=range(0))
        holders = [partition for partition, tasks in sorted(self.tasks_of.items()) if tasks]
        self.holds_task = {0: holders}
        if len(holders) < self.config.min_replies:
            raise RunFailed(
                f"{len(holders)} partitions have a slot, min-replies is {self.config.min_replies}: lower min-replies "
                "or min-slot-share"
            )

    def slots_of(self, partition: int) -> list[Slot]:
        """List a partition's slots."""
        return [Slot(partition, number) for number in range(len(self.tasks_of[partition]))]

    def reply_limit(self) -> int:
        """Give it for a client with the most slots, or its sums for the router."""
        size = 1 + (self.config.ridge_features or self.state.head["weight"].shape[1])
        slots = max(map(len, self.tasks_of.values()), default=0)
        return slots * super().reply_limit() + 16 * size * (size + slots)

    def num_examples(self, slot: Slot) -> int:
        """Count the training examples of a slot."""
        return int(self.census.counts[self.task_of(slot), slot.partition_id].sum())

    def task_of(self, slot: Slot) -> int:
        """Give the task that a slot is about."""
        return self.tasks_of[slot.partition_id][slot.number]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Build the round's training messages, each with the states of all its client's slots."""
        order = wire.RoundOrder(server_round, int(str(config["task-id"])), int(str(config["round-in-task"])))
        packed: dict[int, ArrayRecord] = {}  # id of a state -> its arrays, shared by all that train from it
        for partition in self.reachable(self.sample(server_round, order.task_id)):
            parts = {}
            for slot in self.slots_of(partition):
                state = self.clustered.of(slot)
                if id(state) not in packed:
                    packed[id(state)] = wire.pack_state(state, classes=trained_classes(state.head))
                parts[slot.number] = wire.state_message(
                    packed[id(state)],
                    order,
                    scaling=next((pair.scaling for pair in state.adapters.values()), 1.0),
                    version=state.version,
                    num_classes=len(self.census.classes.names),
                )
            yield self._addressed(wire.bundle(parts), partition, message_type=TRAIN, group_id=str(server_round))

    def _with_base(self, content: RecordDict, partition: int) -> RecordDict:
        """Add what the client needs to reach the base of the message, or of each slot in it."""
        if wire.ORDER in content:
            return super()._with_base(content, partition)
        parcels = {slot.number: self.ledger.slot_parcel(slot) for slot in self.slots_of(partition)}
        bases = {number: self._with_parcel(RecordDict(), parcel) for number, parcel in parcels.items()}
        return RecordDict({**content, **wire.bundle(bases)})

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the slots of all replies into the next states; a bad slot is refused with its reason in the tally.

        Raises
        ------
        TooFewReplies
            If fewer than ``min-replies`` clients have a good slot.
        """
        partition_of = {node: partition for partition, node in self.node_of.items()}
        heard: dict[Slot, tuple[ClientUpdate, float, float]] = {}
        for reply in replies:
            for slot, update, mean_loss in self._read(partition_of[reply.metadata.src_node_id], reply):
                heard[slot] = update, mean_loss, update_norm(self.clustered.of(slot), update)
        limit = self.config.outlier_limit
        for slot, times in far_off({slot: norm for slot, (_, _, norm) in heard.items()}, limit=limit).items():
            reason = f"changes the weights by {times:.3g} times as much as is usual, outlier-limit is {limit:g}"
            self.tally.fail(slot.partition_id, f"slot {slot.number} refused: {reason}")
            del heard[slot]
        updates = {slot: update for slot, (update, _, _) in heard.items()}
        losses = [mean_loss for _, mean_loss, _ in heard.values()]
        self.require(len({slot.partition_id for slot in updates}), server_round)
        new = self.method.aggregate(self.clustered, updates)
        states = new.states()
        metrics: dict[str, int | float | list[int] | list[float]] = {
            "mean-loss": float(np.average(losses, weights=[update.num_examples for update in updates.values()])),
            "residual-norm": sum(float(r.norm()) ** 2 for one in states.values() for r in one.residual.values()) ** 0.5,
        }
        if self.config.verify:
            metrics["exactness-error"] = slots_exactness_error(self.clustered, updates, new)
        self.clustered = new
        self.ledger.follow(new)
        self._records.clear()
        right = self._in_cluster_of_their_task()
        self.cluster_accuracy = sum(right.values()) / len(right) if right else None
        self.placed = [
            SlotLog(*slot, cluster=new.assigned.get(slot), right=right.get(slot, False), x=x, y=y)
            for slot, (x, y) in self.method.picture(updates).items()
        ]
        return None, MetricRecord(metrics)

    def _read(self, partition: int, reply: Message) -> Iterator[tuple[Slot, ClientUpdate, float]]:
        """Give the good updates in a client's reply, with their losses."""
        slots = self.slots_of(partition)
        try:
            parts = wire.unbundle(reply)
        except wire.WireError as refusal:
            self.tally.fail(partition, f"refused: {refusal}")
            return
        if unknown := parts.keys() - {slot.number for slot in slots}:
            self.tally.fail(partition, f"refused: speaks of slot {min(unknown)}, has {len(slots)}")
            return
        for slot in slots:
            try:
                yield slot, *self._checked(slot, parts)
            except BadUpdate as refusal:
                self.tally.fail(partition, f"slot {slot.number} refused: {refusal}")

    def _checked(self, slot: Slot, parts: Mapping[int, Message]) -> tuple[ClientUpdate, float]:
        """Read a slot's update and check it as any other, against the state and the examples of its slot."""
        if slot.number not in parts:
            raise BadUpdate("it did not come back")
        state = self.clustered.of(slot)
        update, mean_loss = wire.read_update(parts[slot.number], like=state, trainable=self.method.trainable)
        if update.partition_id != slot.partition_id:
            raise BadUpdate(f"speaks for partition {update.partition_id}, holds {slot.partition_id}")
        check_update(state, update, trainable=self.method.trainable, norm_limit=self.config.norm_limit)
        if not self.method.compares_ranks:
            for name, pair in state.adapters.items():
                if (rank := update.adapters[name].rank) != pair.rank:
                    raise BadUpdate(
                        f"{name}: rank {rank}, the server's is {pair.rank}; signature {self.config.signature} compares "
                        "equal ranks only, set signature=product"
                    )
        self._check_counts(self.task_of(slot), slot.partition_id, update.class_counts)
        return update, mean_loss

    def _in_cluster_of_their_task(self) -> dict[Slot, bool]:
        """Judge all slots heard of; none where there is no cluster."""
        slots, assigned = self.clustered.slots(), self.clustered.assigned
        if not assigned:
            return {}
        tasks = [self.task_of(slot) for slot in slots]
        return dict(zip(slots, in_matched_group([assigned.get(slot) for slot in slots], tasks), strict=True))

    def read_slot_sums(
        self, server_round: int, replies: Iterable[tuple[int, Message]], *, feature_dim: int
    ) -> dict[int, FeatureSums]:
        """Read what clients summed over their slots; a bad one is refused.

        Raises
        ------
        TooFewReplies
            If fewer than ``min-replies`` good ones remain.
        """
        good = {}
        for partition, reply in replies:
            slots = self.slots_of(partition)
            try:
                sums = wire.read_sums(reply, like=FeatureSums.zero(num_classes=len(slots), feature_dim=feature_dim))
                held = torch.tensor([self.num_examples(slot) for slot in slots])
                if not torch.equal(sums.moment[:, -1], held.double()):
                    raise BadUpdate("sums over other examples than the client said it holds in its slots")
                self._check_sums(sums)
            except BadUpdate as refusal:
                self.tally.fail(partition, f"refused: {refusal}")
                continue
            good[partition] = sums
        self.require(len(good), server_round)
        return good


def check_settings(config: RunConfig, *, own_data: bool) -> None:
    """Refuse settings that mean nothing where all tasks are trained at once.

    Raises
    ------
    ConfigError
        If there is one.
    """
    if own_data:
        raise ConfigError(f"method {config.method} needs a data set that all nodes read, not dataset {config.dataset}")
    if config.head != "linear":
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
