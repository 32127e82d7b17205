"""The loop over tasks and rounds: train, aggregate, evaluate, write down, checkpoint."""

import hashlib
import logging
import math
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from flwr.serverapp import Grid

from fedtalora_flwr import aggregation, wire
from fedtalora_flwr.aggregation import Aggregator, GlobalState, SlotAggregator
from fedtalora_flwr.config import ConfigError, RunConfig
from fedtalora_flwr.metrics import TaskMatrix
from fedtalora_flwr.metrics.judged import of_clients
from fedtalora_flwr.model import heads, penalties
from fedtalora_flwr.model.heads import FeatureSums
from fedtalora_flwr.model.private import privacy_of, require_possible
from fedtalora_flwr.model.session import device_of, model_of, own_reader, slots_of
from fedtalora_flwr.model.train import precision_of
from fedtalora_flwr.run_folder import checkpoint, names
from fedtalora_flwr.run_folder.checkpoint import Checkpoint, CheckpointError
from fedtalora_flwr.run_folder.writer import RoundLog, RunFolder
from fedtalora_flwr.server.data import NodeData, RunData, SharedData
from fedtalora_flwr.server.failures import RunFailed
from fedtalora_flwr.server.federation import Federation, Scored, Trained, Training
from fedtalora_flwr.server.one_adapter import OneAdapter
from fedtalora_flwr.server.residuals import Residuals, SharedResidual, SlotResiduals
from fedtalora_flwr.server.slots import Slots, check_settings, clustered_of
from fedtalora_flwr.server.true_tasks import TrueTasks

log = logging.getLogger("fedtalora.server")

_LONGEST_SILENCE = 30.0  # seconds between two words on a wait, so that a run is known to go on


@dataclass(frozen=True)
class Waiting:
    """Whom the server has asked and waits for, as the progress display was told; times are seconds since the epoch."""

    asked: Sequence[int] = ()
    waiting: Sequence[int] = ()
    since: float = 0.0
    written: float = 0.0


class ServerRun:
    """One run of a federation.

    It owns the state: `point` is what the last finished round left, and every step of a round takes a point and gives
    the next, so that a round that fails has changed nothing.

    Parameters
    ----------
    grid
        Flower's way to the nodes.
    config
        The settings.
    folder
        Where the run is written down; with ``resume``, where it goes on from.

    Raises
    ------
    ConfigError, DataError, RunFailed
        If the run cannot be as the settings say; nothing was asked of a client then.
    """

    def __init__(self, grid: Grid, config: RunConfig, folder: RunFolder) -> None:
        torch.set_num_threads(os.cpu_count() or 1)
        self.config, self.folder = config, folder
        self.folder.write_status(phase="loading data and model", message="")
        method = aggregation.resolve(config.method, config.settings)
        if isinstance(method, SlotAggregator):
            check_settings(config, own_data=own_reader(config) is not None)
        if config.shared_rank != (method.shared_rank if isinstance(method, SlotAggregator) else 0):
            raise ConfigError(f"method {config.method} has no part that slots share; set shared-rank=0")
        one_rank = method.dense or method.core or method.sends_grams or isinstance(method, SlotAggregator)
        if config.ranks and one_rank:
            raise ConfigError(f"method {config.method} has no pairs of several ranks; leave ranks empty")
        self.model = model_of(config)  # first: a model that cannot be is refused before any data are read
        self.data: RunData = NodeData(config, self.model) if own_reader(config) else SharedData(config, self.model)
        self.head = heads.resolve(config.head, config.settings)
        if config.dp_epsilon:
            require_possible(config, self.model, method=method, head=self.head)
        if config.check_data:  # a bad file is found before training, not at the first evaluation
            self.data.check()
        self.point = self._resumed() if config.resume else self._fresh(method)
        self._first_round = self.point.server_round + 1
        self._status: dict[str, Any] = {}  # as it was told last
        self._told = Waiting()
        self._rounds_per_task = max(1, config.rounds_per_task)  # one without training collects the head's sums
        self.federation, self.training = self._assembled(grid, method)

    def _assembled(self, grid: Grid, method: aggregation.Method) -> tuple[Federation, Training]:
        """Put together who is asked, and what is trained: one adapter for all, or one for each slot."""
        config, point = self.config, self.point
        if isinstance(method, SlotAggregator):
            by_partition = {p: slots_of(config, partition_id=p) for p in range(config.num_clients)}
            residuals = SlotResiduals(
                clustered_of(point, config),
                lambda p: [aggregation.Slot(p, number) for number in range(len(by_partition[p]))],
            )
            federation = self._federation(grid, residuals)
            tasks = TrueTasks(by_partition, federation.roster)
            return federation, Slots(
                federation, config, model=self.model, method=method, residuals=residuals, tasks=tasks
            )
        assert isinstance(method, Aggregator)
        residual = SharedResidual(point.state)
        federation = self._federation(grid, residual)
        return federation, OneAdapter(
            federation,
            config,
            model=self.model,
            method=method,
            head=self.head,
            penalty=penalties.resolve(config.penalty, config.settings),
            data=self.data,
            residuals=residual,
            point=point,
        )

    def _federation(self, grid: Grid, residuals: Residuals) -> Federation:
        return Federation(
            grid, self.config, residuals=residuals, show=self._show, waits=self._tell_waits, shares=self.data.shares
        )

    def play(self) -> None:
        """Meet the clients, play all rounds, write the result.

        Raises
        ------
        RunFailed
            If the nodes are not as the settings say, or a round has too few good replies.
        """
        self._meet()
        for server_round in range(self._first_round, self.training.num_rounds + 1):
            self.play_round(server_round)
        self.folder.write_metrics(
            self.point.matrix,
            bytes_up=self.point.bytes_up,
            bytes_down=self.point.bytes_down,
            wall_seconds=self.point.wall_seconds,
            num_rounds=self.training.num_rounds,
            evaluation=self._evaluation(),
        )
        self._show("done", self.training.num_rounds)

    def play_round(self, server_round: int) -> None:
        """Play one round and everything that belongs to it, then checkpoint: a kill repeats the whole round."""
        began, tally = time.monotonic(), self.federation.tally
        order = wire.RoundOrder(server_round, *divmod(server_round - 1, self._rounds_per_task), self.point.run)
        is_first = server_round == self._first_round  # who sits it out was found when the nodes were met
        tally.begin(server_round, keep_failures=is_first)
        if order.round_in_task == 0 and not is_first:
            self._ask_again(order)
        point = self.training.begin(self.point, order)
        self._show("training", server_round)
        trained = Trained()
        if self.config.rounds_per_task:
            point, trained = self.training.train(point, order)
        aggregate_seconds = time.monotonic() - began - tally.wait_seconds
        self._show("evaluating", server_round, mean_loss=trained.mean_loss)
        point, scored = self.training.score(point, order)
        total_seconds = time.monotonic() - began
        line = _line(
            order,
            trained,
            scored,
            told=tally.told(),
            seconds={
                "wait": tally.wait_seconds,
                "aggregate": aggregate_seconds,
                "evaluate": total_seconds - tally.wait_seconds - aggregate_seconds,
                "total": total_seconds,
            },
        )
        self._write_down(line, point)
        self._say(line)
        self._show("training", server_round, mean_loss=trained.mean_loss)

    def _write_down(self, line: RoundLog, point: Checkpoint) -> None:
        """Log and checkpoint a round; where that cannot be, the checkpoint before it stays as it was."""
        point = replace(
            point,
            server_round=line.server_round,
            bytes_up=point.bytes_up + line.bytes_up,
            bytes_down=point.bytes_down + line.bytes_down,
            wall_seconds=point.wall_seconds + line.seconds["total"],
        )
        try:
            self.folder.append_round(line)
            checkpoint.save(self.folder.checkpoint, point, keep=self.config.keep_checkpoints)
        except (OSError, CheckpointError) as error:
            done = self.point.server_round
            kept = f"the checkpoint of round {done} is whole" if done else "no round was finished before"
            raise RunFailed(
                f"round {line.server_round} cannot be written to {self.folder.path}: {error}; {kept}. "
                f"Make room, and {'go on with resume=true' if done else 'start again'}"
            ) from error
        self.point = point

    def _meet(self) -> None:
        """Wait for the nodes, learn who holds what, and write the manifest."""
        self._show("waiting for nodes", self.point.server_round)
        nodes, roster, known = self.federation.nodes, self.federation.roster, self.point.partition_hashes
        roster.hashes = dict(enumerate(known))  # of a run that goes on
        hellos, absent = nodes.gather(self.point.server_round)
        said = {hello.partition_id: hello for hello in hellos.values()}
        hashes = self.data.hashes(said, known)
        roster.meet(hellos, hashes=hashes, absent=absent)
        for node, hello in hellos.items():
            self.federation.exchange.welcome(node, hello)
        self.point = replace(self.point, partition_hashes=hashes)
        task_id, begun = divmod(self.point.server_round, self._rounds_per_task)
        self._take_in([said[p] for p in sorted(said)], absent, playing=task_id, next_task=task_id + (begun > 0))
        if not self.config.resume:
            self.folder.write_manifest({"seed": self.config.seed, **self._facts()})
        elif self.data.shares is None:  # classes may have come while the run was down
            self.folder.update_manifest(self._facts())
        counts = self.training.parameters(self.point)
        log.info("trains %(trainable)d parameters (LoRA %(lora)d, head %(head)d) of %(total)d", counts)

    def _evaluation(self) -> dict[str, Any]:
        """Give what the last evaluation showed of each class and client, as far as the server can tell."""
        classes, judged = self.point.classes, self.point.judged
        if judged is None:
            return of_clients(self.point.hits_of_clients)
        seen = classes.seen(self.config.last_task - 1)
        found, everyone = self.federation.roster.holdings, range(self.config.num_clients)
        expected = judged.accuracy_on([found.of_partition(partition) for partition in everyone])
        clients = [
            {"partition_id": p, "accuracy": None if math.isnan(a) else float(a)}
            for p, a in zip(everyone, expected, strict=True)
        ]
        return {**judged.summary(classes.names, classes=seen), "clients": clients}

    def _ask_again(self, order: wire.RoundOrder) -> None:
        """Before a task, hear what the nodes hold by now, where that can have changed."""
        if (answers := self.data.asked_again(self.federation, order)) is not None:
            self._take_in(*answers, playing=order.task_id, next_task=order.task_id)
            self.folder.update_manifest(self._facts())

    def _take_in(
        self, hellos: Sequence[wire.Hello], absent: Mapping[int, str], *, playing: int, next_task: int
    ) -> None:
        """Learn who holds what, and make room for classes that are new."""
        found = self.data.taken_in(
            hellos, absent, federation=self.federation, classes=self.point.classes, next_task=next_task
        )
        num_classes = len(found.classes.names)
        state = replace(self.point.state, head=heads.with_classes(self.point.state.head, num_classes))
        self.point = replace(
            self.point, state=state, sums=self.point.sums.with_classes(num_classes), classes=found.classes
        )
        self.federation.roster.take_stock(found, settled=self.data.settled(playing), at_once=self.training.at_once)

    def _facts(self) -> dict[str, Any]:
        """Give what the manifest says of classes, partitions and sizes."""
        classes, hashes = self.point.classes, self.point.partition_hashes
        found = self.federation.roster.holdings
        remarks = {"remarks": list(found.remarks)} if found.remarks else {}
        return {
            "class_names": list(classes.names),
            "image_side": self.data.image_side,
            "num_texts": list(self.data.num_texts),
            "class_order": [row for task in classes.tasks for row in task],
            "tasks": [list(task) for task in classes.tasks],
            "num_rounds": self.training.num_rounds,
            "partition_hashes": list(hashes),
            "partition_hash": hashlib.sha256("".join(hashes).encode()).hexdigest(),
            "class_counts": [found.of_partition(partition) for partition in range(self.config.num_clients)],
            "parameters": self.training.parameters(self.point),
            "precision": precision_of(device_of(self.config), self.config.precision),
            "privacy": privacy_of(self.config),
            "adapted_modules": {name: list(weight.shape) for name, weight in self.model.frozen_weights().items()},
            **remarks,
            **self.training.facts(),
        }

    def _fresh(self, method: aggregation.Method) -> Checkpoint:
        self.folder.write_config(self.config.flat())
        (self.folder.path / names.ROUNDS).write_text("")
        num_classes, feature_dim = len(self.data.classes.names), self.model.backbone.feature_dim
        start = GlobalState(
            adapters=self.model.initial_factors(seed=self.config.seed),
            head=heads.init_rows(num_classes=num_classes, feature_dim=self.head.row_dim(feature_dim)),
        )
        return Checkpoint(
            server_round=0,
            state=method.start(start, self.model.frozen_weights()),
            sums=FeatureSums.zero(num_classes=num_classes, feature_dim=self.head.lifted_dim(feature_dim)),
            matrix=TaskMatrix.empty(self.config.num_tasks),
            bytes_up=0,
            bytes_down=0,
            wall_seconds=0.0,
            partition_hashes=(),
            classes=self.data.classes,
            run=secrets.token_hex(8) if self.config.dp_epsilon else "",
        )

    def _resumed(self) -> Checkpoint:
        point = checkpoint.load(self.folder.checkpoint, self.config.resume_from)
        self.folder.check_config(self.config.flat())
        for damage in self.folder.keep_rounds(point.server_round):
            log.warning("%s: %s; the line is left out", self.folder.path, damage)
        log.info("resuming after round %d", point.server_round)
        return point

    def _show(self, phase: str, server_round: int, *, mean_loss: float | None = None) -> None:
        """Tell the progress display where the run is."""
        done, spent, num_rounds = self.point.server_round, self.point.wall_seconds, self.training.num_rounds
        accuracies = [a for a in self.point.matrix.accuracy_seen() if a is not None]
        self._status = {
            "phase": phase,
            "task_id": (max(1, server_round) - 1) // self._rounds_per_task,
            "num_tasks": self.config.last_task,
            "server_round": server_round,
            "rounds_done": done,
            "num_rounds": num_rounds,
            "mean_loss": mean_loss,
            "accuracy_seen": accuracies[-1] if accuracies else None,
            "bytes_up_total": self.point.bytes_up,
            "bytes_down_total": self.point.bytes_down,
            "elapsed_seconds": spent,
            "remaining_seconds": spent / done * (num_rounds - done) if done else None,
            "message": "",
        }
        self.folder.write_status(**self._status)

    def _tell_waits(self, asked: Sequence[int], waiting: Sequence[int]) -> None:
        """Tell the progress display who is at work, where that takes more than a second: a write waits for the disk."""
        now, told = time.time(), self._told
        if asked is not told.asked:
            self._told = told = Waiting(asked, since=now, written=now)
        if now - told.written >= (1 if waiting != told.waiting else _LONGEST_SILENCE):
            self._told = replace(told, waiting=waiting, written=now)
            self.folder.write_status(**self._status, asked=asked, waiting=waiting, asked_at=round(told.since, 3))

    def _say(self, line: RoundLog) -> None:
        """Log one line a round, for whoever follows the stream."""
        log.info(
            "task %d/%d round %d/%d  loss %s  accuracy %s%s  %.1f s%s",
            line.task_id + 1,
            self.config.last_task,
            line.server_round,
            self.training.num_rounds,
            "-" if line.mean_loss is None else f"{line.mean_loss:.4f}",
            "-" if line.accuracy_seen is None else f"{line.accuracy_seen:.4f}",
            "" if line.cluster_accuracy is None else f"  clusters {line.cluster_accuracy:.4f}",
            line.seconds["total"],
            "".join(f"; partition {f.partition_id} failed: {f.reason}" for f in line.failures),
        )


def _line(
    order: wire.RoundOrder, trained: Trained, scored: Scored, *, told: Mapping[str, Any], seconds: Mapping[str, float]
) -> RoundLog:
    """Put together what ``rounds.jsonl`` says of a round."""
    return RoundLog(
        server_round=order.server_round,
        task_id=order.task_id,
        seconds=seconds,
        **told,
        **vars(trained),
        **vars(scored),
    )
