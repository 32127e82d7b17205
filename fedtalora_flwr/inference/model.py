"""The model that a run has come to: read from its folder, finished or not, and ready to score inputs."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from fedtalora_flwr.aggregation import ClusteredState, GlobalState, Place, place_name
from fedtalora_flwr.config import ConfigError, RunConfig, kebab
from fedtalora_flwr.config.sources import with_later
from fedtalora_flwr.data import Source, Split
from fedtalora_flwr.data.images import square
from fedtalora_flwr.data.source import NO_ROWS, Ints
from fedtalora_flwr.model import heads
from fedtalora_flwr.model.heads import Classifier, Head, trained_classes
from fedtalora_flwr.model.lora import AdaptedModel
from fedtalora_flwr.model.router import router
from fedtalora_flwr.model.session import build_model
from fedtalora_flwr.run_folder import checkpoint
from fedtalora_flwr.run_folder.checkpoint import Checkpoint
from fedtalora_flwr.run_folder.reader import RunRecord, read_run


class TrainedModelError(ValueError):
    """A run folder from which no model can be had; the message says what is missing."""


@dataclass(frozen=True)
class Routes:
    """Where an input goes in a run with clusters.

    Parameters
    ----------
    classifier
        From the features under what no cluster has of its own (`TrainedModel.state`) to a place in `states`.
    states
        Of the clusters, in the order of their ids.
    """

    classifier: Classifier
    states: tuple[GlobalState, ...]


@dataclass(frozen=True)
class TrainedModel:
    """A run's model after its last finished round.

    Parameters
    ----------
    record, config
        What the run folder says, and its settings.
    server_round
        The round.
    state
        The server's state after it.
    model
        Loaded with the state, on the device of the settings, in float32.
    head, classifier
        How logits are made of features.
    classes
        Class ids that the classifier knows so far, sorted; logits have one column each.
    routes
        Of a run with clusters: each input goes to one of them, and is compared with the classes of that one alone.
    place
        Whose model it is in a run over slots, where one was asked for.
    """

    record: RunRecord
    config: RunConfig
    server_round: int
    state: GlobalState
    model: AdaptedModel
    head: Head
    classifier: Classifier
    classes: tuple[int, ...]
    routes: Routes | None = None
    place: Place = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class in `classes`."""
        return tuple(self.record.manifest["class_names"][class_id] for class_id in self.classes)

    @property
    def num_rounds(self) -> int:
        """Rounds of the whole run."""
        return self.record.num_rounds

    @property
    def standing(self) -> str:
        """Say how far the run has come."""
        if self.server_round >= self.num_rounds:
            return f"after all {self.num_rounds} rounds"
        known, total = len(self.classes), len(self.record.manifest["class_names"])
        return f"unfinished: after round {self.server_round} of {self.num_rounds}, {known} of {total} classes"

    @cached_property
    def image_side(self) -> int | None:
        """Side in pixels at which the run stored its images before the model enlarged them; None for text."""
        if self.model.backbone.modality != "image":
            return None
        return int(self.record.manifest["image_side"])

    @property
    def num_texts(self) -> tuple[int, ...]:
        """How many texts an input of the run was made of; a run made before there were pairs says nothing of it."""
        return tuple(self.record.manifest.get("num_texts", (1,)))

    def stored(self, raw: Any) -> Any:
        """Cut an RGB image to the square that `encode` takes of it; a text stays as it is."""
        return raw if self.image_side is None else square(raw, side=self.image_side)

    def encode(self, raw: Sequence[Any]) -> Tensor:
        """Prepare images, texts, pairs or instructions as the run prepared its data (see `Backbone.encode`)."""

        def read(rows: Ints) -> Sequence[Any]:
            return [raw[row] for row in rows]

        split = Split(labels=np.zeros(len(raw), dtype=np.int64), read=read)
        return self.model.backbone.encode(split, np.arange(len(raw)), source=self._stand_in)

    @cached_property
    def _stand_in(self) -> Source:
        """Stand in for the training data, of which encoding looks at the first image's size alone."""
        side = self.image_side or 1
        blank = Split(np.zeros(1, dtype=np.int64), lambda rows: [PIL.Image.new("RGB", (side, side))] * len(rows))
        names = tuple(self.record.manifest["class_names"])
        return Source(self.record.name, self.model.backbone.modality, names, train=blank, test=NO_ROWS)

    @torch.inference_mode()
    def place_for(self, inputs: Tensor) -> list[int]:
        """Tell for each encoded input (N, ...) which of the clusters' states it needs."""
        assert self.routes is not None
        places = range(len(self.routes.states))
        return self._scores(inputs, self.state, self.routes.classifier, places).argmax(1).tolist()

    def become(self, state: GlobalState) -> None:
        """Set the model to a state of a run with clusters."""
        self.model.load(state.adapters, state.residual)

    @torch.inference_mode()
    def logits(self, inputs: Tensor) -> Tensor:
        """Score encoded inputs (N, ...), N at least 1, against `classes`: (N, n) float32 on the CPU."""
        if self.routes is None:
            return self._scores(inputs, self.state, self.classifier, self.classes)
        chosen = torch.tensor(self.place_for(inputs))  # (N,)
        scores = torch.full((len(inputs), len(self.classes)), -torch.inf)
        column = {class_id: index for index, class_id in enumerate(self.classes)}
        for place in sorted(set(chosen.tolist())):
            state, here = self.routes.states[place], (chosen == place).nonzero()  # (n, 1)
            classes = trained_classes(state.head)
            columns = torch.tensor([column[class_id] for class_id in classes])
            scores[here, columns] = self._scores(inputs[here[:, 0]], state, Classifier(state.head), classes)
        return scores

    def _scores(self, inputs: Tensor, state: GlobalState, classifier: Classifier, classes: Sequence[int]) -> Tensor:
        """Score encoded inputs under a state: (N, n) float32 on the CPU."""
        if self.routes is not None:
            self.become(state)
        device = next(self.model.parameters()).device
        on_device, compared = classifier.to(device), torch.tensor(classes, device=device)
        scores = [
            on_device.logits(self.model.backbone(batch.to(device)), compared).cpu()
            for batch in inputs.split(self.config.eval_batch_size)  # type: ignore[no-untyped-call]
        ]
        return torch.cat(scores)


def open_trained(run: Path, *, device: str = "auto", place: Place = None) -> TrainedModel:
    """Read the model of a run folder; the run's data are not needed.

    Parameters
    ----------
    run
        The folder.
    device
        As the setting of that name.
    place
        Of a run over slots, the cluster, or the slot that goes its own way, whose model is wanted; None: all clusters,
        and a router before them.

    Raises
    ------
    FileNotFoundError
        If `run` is no run folder.
    ValueError
        If the run has no checkpoint or has not finished what its head needs, or the backbone cannot be had.
    """
    record = read_run(run)
    if not record.manifest:
        raise TrainedModelError(f"{run} has no manifest.json, the run stopped before its first round; resume it")
    try:
        config = replace(RunConfig.parse(with_later(record.config)), device=device)
    except ConfigError as error:
        if record.config.keys() <= {kebab(setting.name) for setting in fields(RunConfig)}:
            raise TrainedModelError(f"{run}: {error}") from None
        made_by = f"{record.manifest.get('fedtalora_version')}, commit {record.manifest.get('git_commit')}"
        raise TrainedModelError(
            f"{run} was made by another version of fedtalora ({made_by}), and has other settings: {error}; "
            "open it with that version"
        ) from None
    point = checkpoint.load(record.path / "checkpoint")
    if point.clustered is not None or place is not None:
        return _open_clustered(record, config, point, place=place)
    head = heads.resolve(config.head, config.settings)
    classes = _known_classes(record, config, server_round=point.server_round, whole_tasks=head.collects_sums)
    if not classes:
        raise TrainedModelError(
            f"{run} stopped after round {point.server_round}, within its first task, at whose end head = "
            f"{config.head} gets its classifier; go on with: fedtalora run --resume {run}"
        )
    model = build_model(config, in_float32=True)
    model.load(point.state.adapters, point.state.residual)
    return TrainedModel(
        record=record,
        config=config,
        server_round=point.server_round,
        state=point.state,
        model=model.eval(),
        head=head,
        classifier=head.classifier(point.state.head, point.sums),
        classes=classes,
    )


def _open_clustered(record: RunRecord, config: RunConfig, point: Checkpoint, *, place: Place) -> TrainedModel:
    clustered = point.clustered or ClusteredState(point.state)
    there, clusters = {at: clustered.whole(one) for at, one in clustered.states().items()}, clustered.clusters
    if place is not None and place not in there:
        raise TrainedModelError(f"{record.path} has no {place_name(place)}; it has {_listed(there) or 'one model'}")
    if place is None and not clusters:
        raise TrainedModelError(
            f"{record.path}: every slot has trained for itself, there is no model for all; name one by --slot "
            f"CLIENT:NUMBER, of {_listed(there)}"
        )
    if place is None and point.routes is None:
        raise TrainedModelError(
            f"{record.path} stopped after round {point.server_round}, before its last, at whose end it learns to tell "
            f"the clusters {sorted(clusters)} apart; name one by --cluster N, or go on with: "
            f"fedtalora run --resume {record.path}"
        )
    asked: dict[Place, GlobalState] = (
        {place: there[place]} if place is not None else {one: there[one] for one in sorted(clusters)}
    )
    blank = {one: state for one, state in asked.items() if not trained_classes(state.head)}
    if blank and config.head != "lm":
        raise TrainedModelError(
            f"{record.path}: {_listed(blank)} have not trained the row of any class, so that they cannot classify; "
            "train on tasks of at least two classes, with head-learning-rate above 0"
        )
    classes = sorted({class_id for state in asked.values() for class_id in trained_classes(state.head)})
    head, state, routes = heads.resolve(config.head, config.settings), clustered.whole(clustered.start), None
    if place is not None:
        state = there[place]
    elif point.routes is not None:
        routes = Routes(router(config).classifier({}, point.routes), tuple(asked.values()))
    model = build_model(config, in_float32=True)
    model.load(state.adapters, state.residual)
    return TrainedModel(
        record=record,
        config=config,
        server_round=point.server_round,
        state=state,
        model=model.eval(),
        head=head,
        classifier=Classifier(state.head),
        classes=tuple(classes),
        routes=routes,
        place=place,
    )


def _listed(places: Collection[Place]) -> str:
    """Name the first of some clusters and slots."""
    first = [place_name(place) for place in list(places)[:6] if place is not None]
    return ", ".join(first + ["..."] * (len(places) > len(first)))


def _known_classes(record: RunRecord, config: RunConfig, *, server_round: int, whole_tasks: bool) -> tuple[int, ...]:
    """List the classes of the tasks begun so far, or of those that ended where the head learns at their end."""
    ended, begun = divmod(server_round, max(1, config.rounds_per_task))
    tasks = record.manifest["tasks"][: ended + (begun > 0 and not whole_tasks)]
    return tuple(sorted({class_id for task in tasks for class_id in task}))
