"""How good a run's model is on labelled data of one's own: a folder with a subfolder or file a class, or a table."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedtalora_flwr.data import DataError, Source
from fedtalora_flwr.data.hf_load import load_files
from fedtalora_flwr.data.hf_rows import source_from_splits
from fedtalora_flwr.data.own import OwnData, OwnReader
from fedtalora_flwr.inference.model import TrainedModel
from fedtalora_flwr.inference.predict import InputError, Item, items_of, predict
from fedtalora_flwr.metrics import Judged


@dataclass(frozen=True)
class Labelled:
    """Examples with the names of their classes; each is read when its turn comes."""

    class_names: Sequence[str]  # (N,)
    items: Iterator[Item]  # N of them


@dataclass(frozen=True)
class Evaluation:
    """What a model said of labelled data.

    Parameters
    ----------
    judged
        Counts by the model's own class ids.
    class_names
        Their names.
    left_out
        Examples of classes that the model does not know, by class: no answer of it could be right.
    unread
        Why examples could not be read, a sentence each.
    """

    judged: Judged
    class_names: Sequence[str]
    left_out: dict[str, int]
    unread: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Give the figures as ``metrics.json`` has them, and what does not stand in them."""
        found = self.judged.summary(self.class_names, classes=range(len(self.class_names)))
        return {**found, "left_out": self.left_out, "unread": list(self.unread)}


def read_labelled(path: Path, trained: TrainedModel, *, input_column: str = "", label_column: str = "") -> Labelled:
    """List labelled examples; nothing is decoded yet.

    Parameters
    ----------
    path
        A folder as a node brings it (``<class>/*.png``, ``<class>.txt``, tables with a label column, in task folders
        or not), or one table (.csv, .tsv, .json, .jsonl, .parquet).
    trained
        Whose kind of input is wanted.
    input_column, label_column
        Of tables; empty: the run's, else found by their usual names.

    Raises
    ------
    InputError
        If there is no such file, it holds no example, or examples of another kind than the model takes.
    DataError
        If a table cannot be read.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; give a folder with a subfolder a class, or a table")
    columns = (input_column or trained.config.input_column, label_column or trained.config.label_column)
    modality = trained.model.backbone.modality
    if modality == "instruction":
        raise InputError("a language model has no classes to be right about; fedtalora answers scores its answers")
    found: OwnData | Source
    if path.is_dir():
        found = OwnReader(*columns, test_fraction=0.0, max_per_class=0).read(str(path))
    else:
        rows = {"train": load_files([path])}
        found = source_from_splits(str(path), rows, input_column=columns[0], label_column=columns[1])
    if found.modality is None:
        raise InputError(f"{path} holds no example; give a folder with a subfolder or a text file a class, or a table")
    if found.modality != modality:
        raise InputError(f"{path} holds {found.modality}s, the run's model takes {modality}s")
    return _of_table(found) if isinstance(found, Source) else _of_folder(found, num_texts=trained.num_texts)


def evaluate(trained: TrainedModel, labelled: Labelled) -> Evaluation:
    """Let a model say the class of every example.

    Raises
    ------
    InputError
        If the model knows the class of none of them.
    """
    known = {name: class_id for class_id, name in enumerate(trained.class_names)}
    if not known.keys() & set(labelled.class_names):
        theirs, ours = _few(dict.fromkeys(labelled.class_names)), _few(known)
        raise InputError(f"the model knows none of the classes there ({theirs}); it knows {ours}: rename them")
    left_out: dict[str, int] = {}
    for name in labelled.class_names:
        if name not in known:
            left_out[name] = left_out.get(name, 0) + 1
    wanted = [name for name in labelled.class_names if name in known]
    items = (item for name, item in zip(labelled.class_names, labelled.items, strict=True) if name in known)
    counted, unread = [], []
    for name, prediction in zip(wanted, predict(trained, items, top=1), strict=True):
        if prediction.item.error:
            unread.append(prediction.item.error)
            continue
        said, confidence = prediction.ranking[0]
        counted.append((known[name], known[said], confidence))
    labels, said_ids, confidences = zip(*counted, strict=True) if counted else ((), (), ())
    judged = Judged.of(labels, said_ids, confidences, num_classes=len(known))
    return Evaluation(judged, trained.class_names, left_out, tuple(unread))


def _of_folder(data: OwnData, *, num_texts: Sequence[int]) -> Labelled:
    pairs = [(folder.name, one) for folder in data.folders for one in folder.train]
    kind = str(data.modality)
    items = (item for _, one in pairs for item in items_of([one], modality=kind, num_texts=num_texts))
    return Labelled([name for name, _ in pairs], items)


def _of_table(source: Source) -> Labelled:
    return Labelled([source.class_names[label] for label in source.train.labels], _rows(source))


def _rows(source: Source) -> Iterator[Item]:
    for row in range(len(source.train)):
        try:
            (raw,) = source.train.read(np.array([row]))
            if source.modality == "image":
                (item,) = items_of([raw], modality="image")
                raw = item.raw
            yield Item(f"{source.name}, row {row}", raw)
        except DataError as error:
            yield Item(f"{source.name}, row {row}", None, str(error))


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:5]) + ", ..." * (len(listed) > 5)
