"""The server of the methods over slots, which train all tasks at once."""

from dataclasses import asdict, replace
from typing import Any

from flwr.serverapp import Grid

from fedtalora_flwr import aggregation, wire
from fedtalora_flwr.aggregation import ClusteredState, SlotAggregator
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.heads import FeatureSums
from fedtalora_flwr.resident import own_reader, slots_of
from fedtalora_flwr.routing import by_cluster, router
from fedtalora_flwr.runlog import RunFolder
from server_app.judge import Judge
from server_app.server import Scored, Server, Trained
from server_app.slots import SUMS, SlotStrategy, check_settings


class SlotServer(Server):
    """A run of a method over slots: every client trains all its tasks in every round, each in a slot of its own."""

    strategy: SlotStrategy

    def __init__(self, grid: Grid, config: RunConfig, folder: RunFolder) -> None:
        check_settings(config, own_data=own_reader(config) is not None)
        super().__init__(grid, config, folder)

    @property
    def num_rounds(self) -> int:
        """Rounds of the whole run; ``rounds-per-task`` is what each task gets, and all have it at once."""
        return self.rounds_per_task

    def _strategy(self) -> SlotStrategy:
        method = aggregation.resolve(self.config.method, **asdict(self.config))
        assert isinstance(method, SlotAggregator)
        return SlotStrategy(
            config=self.config,
            method=method,
            clustered=self.point.clustered or ClusteredState(self.point.state),
            tasks_of={p: slots_of(self.config, partition_id=p) for p in range(self.config.num_clients)},
        )

    def _facts(self) -> dict[str, Any]:
        """Say also which task each slot is about, by partition and slot number: what the clustering is judged by."""
        return {**super()._facts(), "slots": [list(tasks) for _, tasks in sorted(self.strategy.tasks_of.items())]}

    def _parameters(self) -> dict[str, int]:
        """Count as a client with a slot for every task trains and sends: an adapter each, and every class row once."""
        one, adapters = super()._parameters(), self.config.last_task
        lora = adapters * one["lora"]
        trained = adapters * (one["trainable"] - one["head"]) + one["head"]
        return {**one, "trainable": trained, "transmitted": lora + one["head"], "adapters": adapters}

    def _train(self, order: wire.RoundOrder) -> Trained:
        trained, strategy = super()._train(order), self.strategy
        return replace(trained, cluster_accuracy=strategy.cluster_accuracy, slots=strategy.placed)

    def _score(self, order: wire.RoundOrder) -> Scored:
        """Evaluate every state on the tasks of its slots; after the last round, learn to route and evaluate that."""
        is_last = order.server_round == self.num_rounds
        due = self.config.eval_every and order.server_round % self.config.eval_every == 0
        before = Scored(sums=self.point.sums, matrix=self.point.matrix)
        if not is_last and not due:
            return before
        judge = Judge(self.model, self.strategy, self.point.classes, self.config)
        task_id = self.config.last_task - 1
        matrix = self.point.matrix.with_row(task_id, *judge.hits())
        scored = replace(before, accuracy_seen=matrix.accuracy_seen()[task_id])
        if not is_last:
            return scored
        scored = replace(scored, matrix=matrix)
        if not self.strategy.clustered.clusters:
            return scored
        routes = self.nodes.insist(self._collect_routes, order)
        routed, correct = judge.routed(routes)
        return replace(scored, routes=routes, routing_accuracy=routed, accuracy_routed=correct)

    def _collect_routes(self, order: wire.RoundOrder) -> FeatureSums:
        """Let every holder of a slot sum its features under the untouched backbone."""
        strategy = self.strategy
        arrays = wire.pack_state(strategy.state)
        messages = strategy.messages(arrays, order, partitions=strategy.holds_task[0], message_type=SUMS)
        replies = strategy.exchange(self.grid, messages)
        dim = router(self.config).lifted_dim(self.model.backbone.feature_dim)
        return by_cluster(strategy.read_slot_sums(order.server_round, replies, feature_dim=dim), strategy.clustered)
