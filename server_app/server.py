"""The loop over tasks and rounds: train, aggregate, evaluate, write down, checkpoint."""

import hashlib
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid
from torch import Tensor

from fedtalora_flwr import aggregation, checkpoint, heads, penalties, wire
from fedtalora_flwr.aggregation import Aggregator, GlobalState
from fedtalora_flwr.checkpoint import Checkpoint, CheckpointError
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.data import ClassList
from fedtalora_flwr.heads import Classifier, FeatureSums
from fedtalora_flwr.holding import Share
from fedtalora_flwr.lora import count_parameters
from fedtalora_flwr.metrics import TaskMatrix
from fedtalora_flwr.penalties import Memory
from fedtalora_flwr.resident import data_of, device_of, model_of, own_reader, test_examples
from fedtalora_flwr.runlog import RoundLog, RunFolder, SlotLog
from fedtalora_flwr.train import count_correct, num_views, precision_of
from server_app import census
from server_app.attendance import Attendance
from server_app.census import Census
from server_app.strategy import AdapterStrategy, RunFailed, Tally, UsualNorm

log = logging.getLogger("fedtalora.server")


@dataclass(frozen=True)
class Trained:
    """What a round's training gave: its fields are those of `RoundLog`."""

    mean_loss: float | None = None
    residual_norm: float = 0.0
    kept_energy: float | None = None
    exactness_error: float | None = None
    cluster_accuracy: float | None = None
    slots: Sequence[SlotLog] = ()


@dataclass(frozen=True)
class Scored:
    """The head's sums and the hits over finished tasks, and what an evaluation in this round showed."""

    sums: FeatureSums
    matrix: TaskMatrix
    accuracy_seen: float | None = None
    accuracy_seen_linear: float | None = None
    routes: FeatureSums | None = None
    routing_accuracy: float | None = None
    accuracy_routed: float | None = None


class Server:
    """One run of a federation.

    Parameters
    ----------
    grid
        Flower's way to the nodes.
    config
        The settings.
    folder
        Where the run is written down; with ``resume``, where it goes on from.
    """

    def __init__(self, grid: Grid, config: RunConfig, folder: RunFolder) -> None:
        torch.set_num_threads(os.cpu_count() or 1)
        self.grid, self.config, self.folder = grid, config, folder
        self.folder.write_status(phase="loading data and model", message="")
        self.model = model_of(config)  # first: a model that cannot be is refused before any data are read
        self.data = None if own_reader(config) else data_of(config)  # None: every node brings its own
        self.head = heads.resolve(config.head, asdict(config))
        self.penalty = penalties.resolve(config.penalty, asdict(config))
        if config.check_data and self.data:  # a bad file is found before training, not at the first evaluation
            for task_id in range(config.last_task):
                if not len(test_examples(config, task_id=task_id)):
                    raise RunFailed(f"task {task_id} has no test example; give test data of all classes")
        self.point = self._resumed() if config.resume else self._fresh()
        self.first_round = self.point.server_round + 1
        self.strategy = self._strategy()
        num = config.num_clients
        self.shares = [Share(config, p).hello(num_partitions=num) for p in range(num)] if self.data else []
        self.nodes = Attendance(grid, config, self.strategy, self._show, shares=self.shares or None)

    @property
    def num_rounds(self) -> int:
        """Rounds of the whole run."""
        return self.config.last_task * self.rounds_per_task

    @property
    def rounds_per_task(self) -> int:
        """Rounds of a task; without training a task still has one, which collects the head's sums."""
        return max(1, self.config.rounds_per_task)

    @property
    def _follows_drift(self) -> bool:
        """Whether the sums of finished tasks follow the features; without training these do not move."""
        return self.head.collects_sums and self.config.follow_drift and bool(self.config.rounds_per_task)

    def run(self) -> None:
        """Meet the clients, play all rounds, write the result.

        Raises
        ------
        RunFailed
            If the nodes are not as the settings say, or a round has too few good replies.
        """
        self._meet()
        for server_round in range(self.point.server_round + 1, self.num_rounds + 1):
            self._play(server_round)
        self.folder.write_metrics(
            self.point.matrix,
            bytes_up=self.point.bytes_up,
            bytes_down=self.point.bytes_down,
            wall_seconds=self.point.wall_seconds,
            num_rounds=self.num_rounds,
        )
        self._show("done", self.num_rounds)

    def _strategy(self) -> AdapterStrategy:
        method = aggregation.resolve(self.config.method, **asdict(self.config))
        assert isinstance(method, Aggregator)
        if self.penalty.remembers and not method.keeps_pair:
            raise RunFailed(
                f"penalty {self.config.penalty} remembers the pair, which method {self.config.method} draws anew every "
                "round; choose another of the two"
            )
        strategy = AdapterStrategy(config=self.config, method=method, state=self.point.state)
        if self.point.before is not None:
            strategy.begin_task(self.point.before)
        return strategy

    def _play(self, server_round: int) -> None:
        """Play one round and everything that belongs to it, then checkpoint: a kill repeats the whole round."""
        began = time.monotonic()
        task_id, round_in_task = divmod(server_round - 1, self.rounds_per_task)
        order = wire.RoundOrder(server_round, task_id, round_in_task)
        is_first = server_round == self.first_round  # who sits it out was found when the nodes were met
        self.strategy.tally = tally = Tally(failures=self.strategy.tally.failures if is_first else [])
        if self.data is None and round_in_task == 0 and not is_first:
            self._ask_again(order)
        if round_in_task == 0 and self._follows_drift:
            self.point = replace(self.point, before=self.strategy.state)
            self.strategy.begin_task(self.strategy.state)
        if round_in_task == 0 and self.config.rounds_per_task and self.config.rows_start == "means":
            self.nodes.insist(self._start_rows, order)
        self._show("training", server_round)
        trained = self.nodes.insist(self._train, order) if self.config.rounds_per_task else Trained()
        aggregate_seconds = time.monotonic() - began - tally.wait_seconds
        self._show("evaluating", server_round, mean_loss=trained.mean_loss)
        memory = self._remember(order)
        scored = self._score(order)
        total_seconds = time.monotonic() - began
        point = replace(
            self.point,
            server_round=server_round,
            state=self.strategy.state,
            clustered=self.strategy.clustered,
            sums=scored.sums,
            memory=memory,
            routes=scored.routes,
            matrix=scored.matrix,
            bytes_up=self.point.bytes_up + tally.bytes_up,
            bytes_down=self.point.bytes_down + tally.bytes_down,
            wall_seconds=self.point.wall_seconds + total_seconds,
        )
        line = RoundLog(
            server_round=server_round,
            task_id=task_id,
            participants=sorted(tally.participants),
            failures=sorted(tally.failures, key=lambda failure: failure.partition_id),
            bytes_up=tally.bytes_up,
            bytes_down=tally.bytes_down,
            seconds={
                "wait": tally.wait_seconds,
                "aggregate": aggregate_seconds,
                "evaluate": total_seconds - tally.wait_seconds - aggregate_seconds,
                "total": total_seconds,
            },
            mean_loss=trained.mean_loss,
            residual_norm=trained.residual_norm,
            kept_energy=trained.kept_energy,
            resent=sorted(tally.resent),
            weights=tally.weights,
            exactness_error=trained.exactness_error,
            accuracy_seen=scored.accuracy_seen,
            accuracy_seen_linear=scored.accuracy_seen_linear,
            cluster_accuracy=trained.cluster_accuracy,
            routing_accuracy=scored.routing_accuracy,
            accuracy_routed=scored.accuracy_routed,
            slots=trained.slots,
        )
        self._write_down(line, point)
        self._say(line)
        self._show("training", server_round, mean_loss=trained.mean_loss)

    def _write_down(self, line: RoundLog, point: Checkpoint) -> None:
        """Log and checkpoint a round; where that cannot be, the checkpoint before it stays as it was."""
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

    def _train(self, order: wire.RoundOrder) -> Trained:
        """Let a sample of the clients train, and fold their updates into the state."""
        strategy, seen = self.strategy, self.config.loss_classes == "seen" or self.penalty.uses_old_rows
        classes = self.point.classes
        rows = classes.seen(order.task_id) if seen else classes.tasks[order.task_id]
        arrays = self._packed(strategy.state, classes=rows, memory=self.point.memory)
        messages = strategy.configure_train(order.server_round, arrays, _clock(order), self.grid)
        replies = strategy.exchange(self.grid, messages)
        _, metrics = strategy.aggregate_train(order.server_round, (reply for _, reply in replies))
        assert metrics is not None
        numbers: dict[str, Any] = {key.replace("-", "_"): float(str(value)) for key, value in metrics.items()}
        return Trained(**numbers)

    def _start_rows(self, order: wire.RoundOrder) -> None:
        """Begin a task with class rows at the means of the classes, the old ones' where the head's sums tell them.

        The new classes' means are those over all holders, so that one exchange more is made; a class that no reply is
        about keeps its row.
        """
        strategy, dim = self.strategy, self.model.backbone.feature_dim
        strategy.task_id = order.task_id
        messages = strategy.messages(
            self._packed(strategy.state),
            order,
            partitions=strategy.tellers(order.task_id),
            message_type="train.means",
        )
        replies = strategy.exchange(self.grid, messages)
        most = 1.001 * dim**0.5 if self.config.feature_norm == "rms" else math.inf  # of float32
        means, known = strategy.class_means(order.server_round, replies, feature_dim=dim, most_norm=most)
        sums = self.point.sums
        if self._tells_means:
            told = sums.moment[:, -1] > 0
            means[told] = sums.moment[told, :-1] / sums.moment[told, -1:]
            known = known | told
        self._set_rows(means, known)

    def _set_rows(self, means: Tensor, known: Tensor) -> None:
        """Put the class rows at class means (C, d) where these are known (C,); one class is nearest to everything."""
        if known.sum() > 1:
            head = {name: value.clone() for name, value in self.strategy.state.head.items()}
            for name, rows in heads.rows_at_means(means[known]).items():
                head[name][known] = rows
            self.strategy.state = replace(self.strategy.state, head=head)

    def _end_rows(self, sums: FeatureSums) -> None:
        """End a task, with ``rows-start = means``, with rows at the means that the sums tell of all classes so far.

        Rows that were trained while no old example was there to answer are biased to their own classes.
        """
        if self.config.rows_start == "means" and self._tells_means:
            counts = sums.moment[:, -1:]
            self._set_rows(sums.moment[:, :-1] / counts.clamp(min=1), counts[:, 0] > 0)

    @property
    def _tells_means(self) -> bool:
        """Whether the head's sums hold the means of the features that the rows act on, and not only of lifted ones."""
        return self.head.collects_sums and self.head.projection(self.model.backbone.feature_dim) is None

    def _packed(
        self, state: GlobalState, *, classes: Sequence[int] | None = None, memory: Memory | None = None
    ) -> ArrayRecord:
        """Pack what all clients are sent of a state; factors that the method keeps frozen stay here."""
        return wire.pack_state(state, classes=classes, memory=memory, trainable=self.strategy.method.trainable)

    def _remember(self, order: wire.RoundOrder) -> Memory:
        """At the end of a task, gather what the penalty is to remember of it, unless no task follows."""
        ends = order.round_in_task + 1 == self.rounds_per_task and order.task_id + 1 < self.config.last_task
        if not (ends and self.penalty.remembers and self.config.rounds_per_task):
            return self.point.memory
        fisher = self.nodes.insist(self._mean_fisher, order)
        anchor = {
            f"{factor}/{name}": getattr(pair, factor).clone()  # a checkpoint holds no tensor twice
            for name, pair in self.strategy.state.adapters.items()
            for factor in sorted(self.strategy.method.trainable)
        }
        return self.point.memory.with_task(anchor, fisher)

    def _mean_fisher(self, order: wire.RoundOrder) -> dict[str, Tensor]:
        self.strategy.task_id = order.task_id
        arrays = self._packed(self.strategy.state, classes=self.point.classes.tasks[order.task_id])
        partitions = self.strategy.holds_task[order.task_id]
        messages = self.strategy.messages(arrays, order, partitions=partitions, message_type="train.fisher")
        return self.strategy.mean_fisher(order.server_round, self.strategy.exchange(self.grid, messages))

    def _score(self, order: wire.RoundOrder) -> Scored:
        """Evaluate where it is time to; what a task's end settles is kept, what its middle shows is only logged."""
        task_ends = order.round_in_task + 1 == self.rounds_per_task
        due = self.config.eval_every and (order.round_in_task + 1) % self.config.eval_every == 0
        before = Scored(sums=self.point.sums, matrix=self.point.matrix)
        if not task_ends and not due:
            return before
        sums = self.nodes.insist(self._collect_sums, order) if self.head.collects_sums else before.sums
        if task_ends and self.config.rounds_per_task:
            self._end_rows(sums)
        matrix, linear = self._evaluate(order.task_id, sums) if self.data else (self._ask_for_hits(order, sums), None)
        kept = Scored(sums, matrix) if task_ends else before
        return replace(kept, accuracy_seen=matrix.accuracy_seen()[order.task_id], accuracy_seen_linear=linear)

    def _collect_sums(self, order: wire.RoundOrder) -> FeatureSums:
        """Add to the sums of finished tasks what all holders of this task's data sum under the new state.

        With ``follow-drift`` they sum beside it their features under the state that the task began with, which shows
        the server how features have moved, and it carries the old sums over.
        """
        strategy = self.strategy
        strategy.task_id = order.task_id
        before = None
        if self._follows_drift and order.task_id and strategy.before is not None:
            before = self._packed(strategy.before)
        messages = strategy.messages(
            self._packed(strategy.state),
            order,
            partitions=strategy.tellers(order.task_id),
            message_type="train.sums",
            before=before,
        )
        replies = strategy.exchange(self.grid, messages)
        views = 0 if before is None else num_views(self.model, self.config)
        scaled = self.config.feature_norm == "rms"
        dim = self.model.backbone.feature_dim
        usual_norm = UsualNorm(self.head.usual_norm(dim), self.head.norm_slack()) if scaled else None
        return strategy.add_sums(order.server_round, replies, to=self.point.sums, views=views, usual_norm=usual_norm)

    def _evaluate(self, task_id: int, sums: FeatureSums) -> tuple[TaskMatrix, float | None]:
        """Count the hits on the test data of every task so far, among all classes seen so far.

        Returns
        -------
        The matrix with its new row, and the accuracy of the trained rows where the head is built otherwise.
        """
        state = self.strategy.state
        self.model.load(state.adapters, state.residual)
        classifiers = [self.head.classifier(state.head, sums)]
        classifiers += [Classifier(state.head)] if self.head.collects_sums and self.config.rounds_per_task else []
        seen = self.point.classes.seen(task_id)
        hits, total = [], []
        for earlier in range(task_id + 1):
            examples = test_examples(self.config, task_id=earlier)
            hits.append(count_correct(self.model, classifiers, examples, classes=seen, config=self.config))
            total.append(len(examples))
        correct, *others = zip(*hits, strict=True)
        linear = sum(others[0]) / sum(total) if others else None
        return self.point.matrix.with_row(task_id, list(correct), total), linear

    def _ask_for_hits(self, order: wire.RoundOrder, sums: FeatureSums) -> TaskMatrix:
        """Let the nodes count the hits on what they have held out of every task so far, and give the matrix."""
        state = self.strategy.state
        classified = replace(state, head=self.head.classifier(state.head, sums).rows)
        arrays = self._packed(classified, classes=self.point.classes.seen(order.task_id))
        num_tasks = order.task_id + 1
        if not self.strategy.testers(order.task_id):
            return self.point.matrix.with_row(order.task_id, [0] * num_tasks, [0] * num_tasks)
        messages = self.strategy.configure_evaluate(order.server_round, arrays, _clock(order), self.grid)
        replies = self.strategy.exchange(self.grid, messages)
        correct, total = self.strategy.add_hits(order.server_round, replies, num_tasks=num_tasks)
        return self.point.matrix.with_row(order.task_id, correct, total)

    def _meet(self) -> None:
        """Wait for the nodes, learn who holds what, and write the manifest."""
        self._show("waiting for nodes", self.point.server_round)
        self.strategy.hashes = dict(enumerate(self.point.partition_hashes))  # of a run that goes on
        hellos, absent = self.nodes.gather(self.point.server_round)
        said, everyone = {hello.partition_id: hello for hello in hellos.values()}, range(self.config.num_clients)
        if self.data:
            hashes = tuple(share.partition_hash for share in self.shares)
            if self.config.resume and hashes != self.point.partition_hashes:
                raise RunFailed(f"{self.folder.path} was run on other data or another partition; it cannot be resumed")
        else:
            hashes = tuple(said[p].partition_hash if p in said else self.strategy.hashes.get(p, "") for p in everyone)
        self.strategy.meet(hellos, hashes=hashes, absent=absent)
        self.point = replace(self.point, partition_hashes=hashes)
        if self.data:
            self._take_stock(census.of_shared(self.shares, self.point.classes), settled=range(self.config.last_task))
        else:
            next_task, begun = divmod(self.point.server_round, self.rounds_per_task)
            self._take_in([said[p] for p in sorted(said)], absent, playing=next_task, next_task=next_task + (begun > 0))
        if not self.config.resume:
            self.folder.write_manifest({"seed": self.config.seed, **self._facts()})
        elif self.data is None:  # classes may have come while the run was down
            self.folder.update_manifest(self._facts())
        counts = self._parameters()
        log.info("trains %(trainable)d parameters (LoRA %(lora)d, head %(head)d) of %(total)d", counts)

    def _ask_again(self, order: wire.RoundOrder) -> None:
        """Before a task, ask the nodes what they hold by now; one that does not say sits the task out."""
        hellos, reasons = self.nodes.roll_call(order)
        self._take_in(hellos, reasons, playing=order.task_id, next_task=order.task_id)
        self.folder.update_manifest(self._facts())

    def _take_in(self, hellos: list[wire.Hello], absent: Mapping[int, str], *, playing: int, next_task: int) -> None:
        """Take in what nodes bring by now: new classes get rows behind the others.

        A node whose own do not go with those known, or with most nodes', sits the task out, as do those in `absent`.
        """
        hellos, refused = census.compatible(hellos, self.point.classes, next_task=next_task, config=self.config)
        for partition, why in refused.items():
            node = self.strategy.node_of.get(partition, "gone")
            log.warning("partition %d (node %s) sits the task out: %s", partition, node, why)
        for partition, why in sorted({**absent, **refused}.items()):
            self.strategy.tally.fail(partition, f"sits the task out: {why}")
        found = census.of_own(hellos, self.point.classes, next_task=next_task, config=self.config)
        for remark in found.remarks:
            log.info("%s", remark)
        new = found.classes.names[len(self.point.classes.names) :]
        if new:
            log.info("new classes: %s", ", ".join(new))
        self._take_stock(found, settled=range(playing, min(playing + 1, self.config.last_task)))

    def _take_stock(self, found: Census, *, settled: range) -> None:
        """Learn who holds what, and make room for classes that are new."""
        num_classes = len(found.classes.names)
        state = replace(self.strategy.state, head=heads.with_classes(self.strategy.state.head, num_classes))
        self.strategy.state = state
        self.point = replace(
            self.point, state=state, sums=self.point.sums.with_classes(num_classes), classes=found.classes
        )
        self.strategy.most_sums = self._num_sums()
        self.strategy.take_stock(found, settled=settled)

    def _parameters(self) -> dict[str, int]:
        """Count what the model has, trains and sends."""
        factors = self.point.state.adapters
        trained = count_parameters(factors, only=sorted(self.strategy.method.trainable))
        lora = trained if self.strategy.method.dense else count_parameters(factors)
        rows = sum(value.numel() for value in self.point.state.head.values())
        return {
            "total": sum(p.numel() for p in self.model.parameters()),
            "trainable": trained + rows,
            "transmitted": trained + rows,
            "lora": lora,
            "head": rows,
            "sums": self._num_sums(),
        }

    def _num_sums(self) -> int:
        """Count the float64 numbers that a client sends at most at a task's end: half of each gram, and the moment."""
        if not self.head.collects_sums:
            return 0
        size = self.point.sums.gram.shape[0]
        grams = [size, 2 * size - 1] if self._follows_drift else [size]
        return sum(n * (n + 1) // 2 for n in grams) + self.point.sums.moment.numel()

    def _image_side(self) -> int | None:
        """Give the side in pixels at which images are stored before the model enlarges them; None for text."""
        if self.data is None:
            return self.model.backbone.preparation().get("image_size")
        source, first = self.data.source, np.zeros(1, dtype=np.int64)
        if source.modality != "image":
            return None
        return self.model.backbone.encode(source.train, first, source=source).shape[-1]

    def _facts(self) -> dict[str, Any]:
        """Give what the manifest says of classes, partitions and sizes."""
        classes, hashes = self.point.classes, self.point.partition_hashes
        found = self.strategy.census
        remarks = {"remarks": list(found.remarks)} if found.remarks else {}
        return {
            "class_names": list(classes.names),
            "image_side": self._image_side(),
            "class_order": [row for task in classes.tasks for row in task],
            "tasks": [list(task) for task in classes.tasks],
            "num_rounds": self.num_rounds,
            "partition_hashes": list(hashes),
            "partition_hash": hashlib.sha256("".join(hashes).encode()).hexdigest(),
            "class_counts": [found.of_partition(partition) for partition in range(self.config.num_clients)],
            "parameters": self._parameters(),
            "precision": precision_of(device_of(self.config), self.config.precision),
            "adapted_modules": {
                name: [pair.lora_B.shape[0], pair.lora_A.shape[1]] for name, pair in self.point.state.adapters.items()
            },
            **remarks,
        }

    def _fresh(self) -> Checkpoint:
        self.folder.write_config(self.config.flat())
        (self.folder.path / "rounds.jsonl").write_text("")
        classes = self._classes()
        num_classes = len(classes.names)
        feature_dim = self.model.backbone.feature_dim
        return Checkpoint(
            server_round=0,
            state=GlobalState(
                adapters=self.model.initial_factors(seed=self.config.seed),
                head=heads.init_rows(num_classes=num_classes, feature_dim=feature_dim),
            ),
            sums=FeatureSums.zero(num_classes=num_classes, feature_dim=self.head.lifted_dim(feature_dim)),
            matrix=TaskMatrix.empty(self.config.num_tasks),
            bytes_up=0,
            bytes_down=0,
            wall_seconds=0.0,
            partition_hashes=(),
            classes=classes,
        )

    def _classes(self) -> ClassList:
        """Give the classes of the data set; none yet where the nodes bring their own."""
        if self.data is None:
            return ClassList(tasks=((),) * self.config.num_tasks)
        return ClassList(self.data.source.class_names, self.data.stream.tasks)

    def _resumed(self) -> Checkpoint:
        point = checkpoint.load(self.folder.checkpoint, self.config.resume_from)
        self.folder.check_config(self.config.flat())
        for damage in self.folder.keep_rounds(point.server_round):
            log.warning("%s: %s; the line is left out", self.folder.path, damage)
        log.info("resuming after round %d", point.server_round)
        return replace(point, classes=self._classes()) if self.data else point

    def _show(self, phase: str, server_round: int, *, mean_loss: float | None = None) -> None:
        """Tell the progress display where the run is."""
        done, spent = self.point.server_round, self.point.wall_seconds
        accuracies = [a for a in self.point.matrix.accuracy_seen() if a is not None]
        self.folder.write_status(
            phase=phase,
            task_id=(max(1, server_round) - 1) // self.rounds_per_task,
            num_tasks=self.config.last_task,
            server_round=server_round,
            rounds_done=done,
            num_rounds=self.num_rounds,
            mean_loss=mean_loss,
            accuracy_seen=accuracies[-1] if accuracies else None,
            bytes_up_total=self.point.bytes_up,
            bytes_down_total=self.point.bytes_down,
            elapsed_seconds=spent,
            remaining_seconds=spent / done * (self.num_rounds - done) if done else None,
            message="",
        )

    def _say(self, line: RoundLog) -> None:
        """Log one line a round, for whoever follows the stream."""
        log.info(
            "task %d/%d round %d/%d  loss %s  accuracy %s%s  %.1f s%s",
            line.task_id + 1,
            self.config.last_task,
            line.server_round,
            self.num_rounds,
            "-" if line.mean_loss is None else f"{line.mean_loss:.4f}",
            "-" if line.accuracy_seen is None else f"{line.accuracy_seen:.4f}",
            "" if line.cluster_accuracy is None else f"  clusters {line.cluster_accuracy:.4f}",
            line.seconds["total"],
            "".join(f"; partition {f.partition_id} failed: {f.reason}" for f in line.failures),
        )


def _clock(order: wire.RoundOrder) -> ConfigRecord:
    return ConfigRecord({"task-id": order.task_id, "round-in-task": order.round_in_task})
