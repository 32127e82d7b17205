"""Whose data a run is on: a data set that all processes read, or what every node brings."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from logging import getLogger
from typing import Protocol

import numpy as np
from flwr.app import Message, MessageType

from fedtalora_flwr import wire
from fedtalora_flwr.aggregation import GlobalState
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.data import ClassList, Share
from fedtalora_flwr.data.remarks import on_shared
from fedtalora_flwr.metrics import Judged
from fedtalora_flwr.model.heads import Classifier
from fedtalora_flwr.model.lora import AdaptedModel
from fedtalora_flwr.model.session import data_of, test_examples
from fedtalora_flwr.model.train import score
from fedtalora_flwr.run_folder.checkpoint import Checkpoint
from fedtalora_flwr.server import holdings
from fedtalora_flwr.server.failures import RunFailed
from fedtalora_flwr.server.federation import Federation
from fedtalora_flwr.server.holdings import Holdings

log = getLogger("fedtalora.server")

# Asks partitions to evaluate a state on some classes.
AskToEvaluate = Callable[[GlobalState, Sequence[int], Sequence[int], str], Iterator[tuple[int, Message]]]


@dataclass(frozen=True)
class Hits:
    """Hits and what was judged by task id, examples or a language model's tokens.

    Where they are counted too: the hits of the trained rows alone, and the mean loss of a token; what was said of each
    class where the server has the examples, or hits and examples of each client where it does not.
    """

    correct: Sequence[int]
    total: Sequence[int]
    correct_linear: Sequence[int] | None = None
    answer_losses: Sequence[float] | None = None
    judged: Judged | None = None
    of_clients: Mapping[int, tuple[int, int]] = field(default_factory=dict)


class RunData(Protocol):
    """What the loop asks of the data."""

    classes: ClassList  # at the start of a run
    shares: Sequence[Share] | None  # what each partition holds, where the server can tell

    @property
    def image_side(self) -> int | None:
        """Give the side in pixels at which images are stored before the model enlarges them; None for text."""

    @property
    def num_texts(self) -> tuple[int, ...]:
        """Give how many texts an input may be made of."""

    def check(self) -> None:
        """Find data that cannot be used before training."""

    def hashes(self, said: Mapping[int, wire.Hello], known: Sequence[str]) -> tuple[str, ...]:
        """Give the hash of what each partition holds; `known` are those of a run that goes on."""

    def taken_in(
        self,
        hellos: Sequence[wire.Hello],
        absent: Mapping[int, str],
        *,
        federation: Federation,
        classes: ClassList,
        next_task: int,
    ) -> Holdings:
        """Say who holds what; who cannot take part, and why, goes into the tally."""

    def settled(self, playing: int) -> range:
        """Give the tasks whose data must be there while one is played."""

    def asked_again(
        self, federation: Federation, order: wire.RoundOrder
    ) -> tuple[list[wire.Hello], dict[int, str]] | None:
        """Before a task, hear what nodes hold by now, and why others say nothing; None where that cannot change."""

    def hits(
        self,
        point: Checkpoint,
        order: wire.RoundOrder,
        classifiers: Sequence[Classifier],
        *,
        federation: Federation,
        ask: AskToEvaluate,
    ) -> Hits:
        """Count hits on every task so far among all classes seen, of the head and of the trained rows beside it."""


class SharedData:
    """A data set that all processes read, and of which the server has the test examples.

    Parameters
    ----------
    config
        The run's settings.
    model
        Reads the test examples.
    """

    def __init__(self, config: RunConfig, model: AdaptedModel) -> None:
        self._config, self._model = config, model
        data = data_of(config)
        self.classes = ClassList(data.source.class_names, data.stream.tasks)
        self.shares: Sequence[Share] | None = data.stream.shares(data.source.train.labels)

    @property
    def image_side(self) -> int | None:
        """The side at which images are stored before the model enlarges them; None for text."""
        source, first = data_of(self._config).source, np.zeros(1, dtype=np.int64)
        if source.modality != "image":
            return None
        return int(self._model.backbone.encode(source.train, first, source=source).shape[-1])

    @property
    def num_texts(self) -> tuple[int, ...]:
        """How many texts an input may be made of."""
        return data_of(self._config).source.num_texts

    def check(self) -> None:
        """Decode all test examples, so that a bad file is found before training.

        Raises
        ------
        RunFailed
            If a task has none.
        """
        for task_id in range(self._config.last_task):
            if not len(test_examples(self._config, task_id=task_id)):
                raise RunFailed(f"task {task_id} has no test example; give test data of all classes")

    def hashes(self, said: Mapping[int, wire.Hello], known: Sequence[str]) -> tuple[str, ...]:
        """Give the hash of every partition, and refuse to go on with a run on others."""
        hashes = tuple(share.partition_hash for share in self.shares or ())
        if known and hashes != tuple(known):
            raise RunFailed(f"{self._config.out} was run on other data or another partition; it cannot be resumed")
        return hashes

    def taken_in(
        self,
        hellos: Sequence[wire.Hello],
        absent: Mapping[int, str],
        *,
        federation: Federation,
        classes: ClassList,
        next_task: int,
    ) -> Holdings:
        """Say who holds what, which the settings tell."""
        data = data_of(self._config)
        remarks = on_shared(data.source, data.stream)
        for remark in remarks:
            log.warning("%s", remark)
        return holdings.of_shared(self.shares or (), self.classes, remarks=remarks)

    def settled(self, playing: int) -> range:
        """Give all tasks."""
        return range(self._config.last_task)

    def asked_again(
        self, federation: Federation, order: wire.RoundOrder
    ) -> tuple[list[wire.Hello], dict[int, str]] | None:
        """Give nothing: the data stay as they are."""
        return None

    def hits(
        self,
        point: Checkpoint,
        order: wire.RoundOrder,
        classifiers: Sequence[Classifier],
        *,
        federation: Federation,
        ask: AskToEvaluate,
    ) -> Hits:
        """Count them here."""
        self._model.load(point.state.adapters, point.state.residual)
        seen = point.classes.seen(order.task_id)
        tests = [test_examples(self._config, task_id=t) for t in range(order.task_id + 1)]
        scores = [score(self._model, classifiers, one, classes=seen, config=self._config) for one in tests]
        correct, *others = (list(counts) for counts in zip(*(one.correct for one in scores), strict=True))
        losses = [one.loss_sum / one.total for one in scores if one.loss_sum is not None]
        judged = None
        if all(one.verdicts for one in scores):
            judged = Judged.of(
                np.concatenate([examples.labels for examples in tests]),
                np.concatenate([one.verdicts[0].said for one in scores]),
                np.concatenate([one.verdicts[0].confidence for one in scores]),
                num_classes=len(point.classes.names),
            )
        return Hits(correct, [one.total for one in scores], others[0] if others else None, losses or None, judged)


class NodeData:
    """Data that every node brings: the server has none, and learns of classes by their names.

    Parameters
    ----------
    config
        The run's settings.
    model
        Says at which size images are stored.
    """

    def __init__(self, config: RunConfig, model: AdaptedModel) -> None:
        self._config = config
        self._model = model
        self.classes = ClassList(tasks=((),) * config.num_tasks)
        self.shares: Sequence[Share] | None = None

    @property
    def image_side(self) -> int | None:
        """The side that the backbone takes, the same on every node."""
        side: int | None = self._model.backbone.preparation().get("image_size")
        return side

    @property
    def num_texts(self) -> tuple[int, ...]:
        """How many texts an input is made of where the settings name its columns; else nodes may bring either."""
        columns = self._config.input_column
        return (len(columns.split(",")),) if columns else (1, 2)

    def check(self) -> None:
        """Leave it to the nodes."""

    def hashes(self, said: Mapping[int, wire.Hello], known: Sequence[str]) -> tuple[str, ...]:
        """Give what nodes say, else what they said before."""
        before = dict(enumerate(known))
        everyone = range(self._config.num_clients)
        return tuple(said[p].partition_hash if p in said else before.get(p, "") for p in everyone)

    def taken_in(
        self,
        hellos: Sequence[wire.Hello],
        absent: Mapping[int, str],
        *,
        federation: Federation,
        classes: ClassList,
        next_task: int,
    ) -> Holdings:
        """Take in what nodes bring by now: new classes get rows behind the others.

        A node whose own do not go with those known, or with most nodes', sits the task out, as do those in `absent`.
        """
        good, refused = holdings.compatible(hellos, classes, next_task=next_task, config=self._config)
        for partition, why in refused.items():
            node = federation.roster.node_of.get(partition)
            called = "its node is gone" if node is None else federation.nodes.called(node)
            log.warning("partition %d (%s) sits the task out: %s", partition, called, why)
        for partition, why in sorted({**absent, **refused}.items()):
            federation.tally.fail(partition, f"sits the task out: {why}")
        found = holdings.of_own(good, classes, next_task=next_task, config=self._config)
        for remark in found.remarks:
            log.info("%s", remark)
        if new := found.classes.names[len(classes.names) :]:
            log.info("new classes: %s", ", ".join(new))
        return found

    def settled(self, playing: int) -> range:
        """Give the task that is played: what nodes bring for later ones may still come."""
        return range(playing, min(playing + 1, self._config.last_task))

    def asked_again(
        self, federation: Federation, order: wire.RoundOrder
    ) -> tuple[list[wire.Hello], dict[int, str]] | None:
        """Ask the nodes what they hold by now; one that does not say sits the task out."""
        return federation.nodes.roll_call(order)

    def hits(
        self,
        point: Checkpoint,
        order: wire.RoundOrder,
        classifiers: Sequence[Classifier],
        *,
        federation: Federation,
        ask: AskToEvaluate,
    ) -> Hits:
        """Let the nodes count them on what they have held out; the trained rows alone are not evaluated."""
        num_tasks = order.task_id + 1
        testers = federation.roster.testers(order.task_id)
        if not testers:
            return Hits([0] * num_tasks, [0] * num_tasks)
        classified = replace(point.state, head=classifiers[0].rows)
        replies = ask(classified, point.classes.seen(order.task_id), testers, MessageType.EVALUATE)
        correct, total, of_clients = federation.intake.hits(replies, num_tasks=num_tasks)
        return Hits(correct, total, of_clients=of_clients)
