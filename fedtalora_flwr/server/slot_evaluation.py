"""How good the states of a method over slots are: each on its slots' tasks, and all on inputs of no known task."""

import math
from collections import defaultdict
from dataclasses import dataclass

import torch

from fedtalora_flwr.aggregation import ClusteredState, GlobalState, Slot
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.data import ClassList
from fedtalora_flwr.model.heads import Classifier, FeatureSums, trained_classes
from fedtalora_flwr.model.lora import AdaptedModel
from fedtalora_flwr.model.router import router
from fedtalora_flwr.model.session import test_examples
from fedtalora_flwr.model.train import Examples, classify, score
from fedtalora_flwr.server.data import Hits
from fedtalora_flwr.server.true_tasks import TrueTasks


@dataclass(frozen=True)
class SlotEvaluation:
    """Evaluates what a run over slots has come to, on the server's test data.

    Parameters
    ----------
    model
        Is loaded with one state after the other.
    clustered
        The states.
    tasks
        Which task each slot is about.
    classes
        The classes of each task.
    config
        The run's settings.
    """

    model: AdaptedModel
    clustered: ClusteredState
    tasks: TrueTasks
    classes: ClassList
    config: RunConfig

    def hits(self) -> Hits:
        """Count the hits of each task, every slot of it weighing as many times as it has examples.

        A slot chooses among the classes of its task, which its client knows.
        """
        weights: defaultdict[int | Slot | None, defaultdict[int, int]] = defaultdict(lambda: defaultdict(int))
        tasks, clustered = self.tasks, self.clustered
        for partition in tasks.holders():
            for slot in tasks.slots_of(partition):
                weights[clustered.place(slot)][tasks.task_of(slot)] += tasks.num_examples(slot)
        correct, total = [0] * self.config.last_task, [0] * self.config.last_task
        loss_sums = [0.0] * self.config.last_task
        states = clustered.states()
        for place, by_task in weights.items():
            state = states.get(place, clustered.start)
            self._load(state)
            for task_id, weight in by_task.items():
                found = score(
                    self.model,
                    [Classifier((clustered.shared or state).head)],
                    test_examples(self.config, task_id=task_id),
                    classes=self.classes.tasks[task_id],
                    config=self.config,
                )
                correct[task_id] += weight * found.correct[0]
                total[task_id] += weight * found.total
                loss_sums[task_id] += weight * (found.loss_sum or 0.0)
        losses = [loss / n if n else math.nan for loss, n in zip(loss_sums, total, strict=True)]
        return Hits(correct, total, answer_losses=losses if any(loss_sums) else None)

    def routed(self, routes: FeatureSums) -> tuple[float, float]:
        """Route all test examples by their features alone, then classify each among the classes of its cluster.

        Returns
        -------
        The share that goes to the cluster of their task (that of most of the task's training examples), and the share
        that is classified right.
        """
        clusters = sorted(self.clustered.clusters.items())
        rule = router(self.config).classifier({}, routes)
        home = self._clusters_of_tasks()
        tests = {task_id: test_examples(self.config, task_id=task_id) for task_id in range(self.config.last_task)}
        self._load(self.clustered.start)
        chosen = {
            task_id: classify(self.model, rule, examples, classes=range(len(clusters)), config=self.config)
            for task_id, examples in tests.items()
        }
        at_home = correct = judged = 0
        for index, (cluster, own) in enumerate(clusters):
            self._load(own)
            state = self.clustered.whole(own)
            for task_id, examples in tests.items():
                here = chosen[task_id] == index
                if not here.any():
                    continue
                at_home += int(here.sum()) * (home.get(task_id) == cluster)
                routed = Examples(examples.inputs[here], examples.labels[here])
                classes = trained_classes(state.head)
                if not classes and self.config.head != "lm":  # as of tasks of one class: no row has moved
                    judged += len(routed)
                    continue
                found = score(self.model, [Classifier(state.head)], routed, classes=classes, config=self.config)
                correct, judged = correct + found.correct[0], judged + found.total
        return at_home / sum(map(len, tests.values())), correct / judged

    def _clusters_of_tasks(self) -> dict[int, int]:
        """Give the cluster in which most training examples of each task are."""
        counts = torch.zeros(self.config.last_task, max(self.clustered.clusters) + 1, dtype=torch.int64)
        for slot, cluster in self.clustered.assigned.items():
            counts[self.tasks.task_of(slot), cluster] += self.tasks.num_examples(slot)
        return {task_id: int(row.argmax()) for task_id, row in enumerate(counts) if row.any()}

    def _load(self, state: GlobalState) -> None:
        whole = self.clustered.whole(state)
        self.model.load(whole.adapters, whole.residual)
