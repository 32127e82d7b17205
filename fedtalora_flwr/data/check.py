"""Data looked through before any run: what they are taken for, and all that is wrong or odd about them at once."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fedtalora_flwr.config import registry
from fedtalora_flwr.data import DataError, HeldClass, OwnReader, Source, open_data
from fedtalora_flwr.data.faults import Fault, image_fault
from fedtalora_flwr.data.images import frames_in, image_endings
from fedtalora_flwr.data.locate import existing
from fedtalora_flwr.data.remarks import on_names
from fedtalora_flwr.data.sources.imagefolder import files_below, image_files

OUTSIDE = "pictures in no class's folder"

_One = TypeVar("_One")
Watch = Callable[[Sequence[_One]], Iterable[_One]]  # goes through a sequence, and may show how far it is


@dataclass(frozen=True)
class Checked:
    """What was found.

    Parameters
    ----------
    path
        Where.
    dataset
        As which `dataset` it was read.
    modality
        ``image`` or ``text``; empty where there is nothing to learn from.
    classes
        The classes with the examples that can be used, by task where there are task folders.
    faults
        All files, or rows, that cannot be used.
    remarks
        What is odd.
    passed_over
        Files that are not looked at, by their ending.
    frames
        Of the files that hold several frames or pages, how many, by their ending.
    """

    path: Path
    dataset: str
    modality: str
    classes: tuple[HeldClass, ...]
    faults: tuple[Fault, ...]
    remarks: tuple[str, ...]
    passed_over: Mapping[str, int] = field(default_factory=dict)
    frames: Mapping[str, Sequence[int]] = field(default_factory=dict)


def check_data(path: str, settings: Mapping[str, Any], *, watch: Watch[Any] = iter) -> Checked:
    """Look a folder or a table through, and decode every image.

    Parameters
    ----------
    path
        A node's folder, or a table; or what `dataset` of the settings reads, if that reads a path.
    settings
        Settings by snake_case name, e.g. ``config.settings``.
    watch
        Goes through the files in place of ``iter``, to show how far it is.

    Raises
    ------
    DataError
        If there is nothing there, or it cannot be told what it is.
    """
    found = existing(path, key="path")
    dataset = _dataset_of(found, str(settings["dataset"]))
    settings = {**settings, "data_path": str(found), "test_path": settings.get("test_path", "")}
    if dataset == "nodes":
        return _of_node(found, settings, watch)
    return _of_shared(found, dataset, settings, watch)


def _dataset_of(path: Path, asked: str) -> str:
    """Say as what a path is read: as asked if that reads one, else as a node's folder or as the table that it is."""
    if "data_path" in registry.parameters(registry.PACKAGES["dataset"], asked):
        return asked
    if path.is_dir():
        return "nodes"
    return "parquet" if path.suffix.lower() == ".parquet" else "text"


def _of_node(path: Path, settings: Mapping[str, Any], watch: Watch[Any]) -> Checked:
    reader = open_data("nodes", settings)
    assert isinstance(reader, OwnReader)
    whole = replace(reader, bad_files="error", max_per_class=0, max_test_per_class=0).look(str(path))
    tried = [image_fault(file, root=path) for file in watch(sorted(whole.images))]
    faults = (*whole.faults, *(fault for fault in tried if fault))
    usable = replace(reader, bad_files="skip").look(str(path))
    return Checked(
        path=path,
        dataset="nodes",
        modality=usable.modality or "",
        classes=usable.held,
        faults=faults,
        remarks=(usable if reader.bad_files == "skip" else whole).remarks,
        passed_over=_passed_over(path, whole.files),
        frames=_frames(whole.images),
    )


def _of_shared(path: Path, dataset: str, settings: Mapping[str, Any], watch: Watch[Any]) -> Checked:
    faults: list[Fault] = []
    images = image_files(path) if dataset == "imagefolder" else []
    skips = settings["bad_files"] == "skip"
    faults += [fault for file in watch(images) if (fault := image_fault(file, root=path))]
    source: Source | None = None
    try:
        source = _opened(dataset, {**settings, "bad_files": "error"})
    except DataError as error:
        faults.append(Fault(Path(path.name), f"cannot be used: {error}"))
    if faults:
        with suppress(DataError):  # which is among the faults: nothing would be left
            source = _opened(dataset, {**settings, "bad_files": "skip"})
    if source is not None and source.modality == "image" and not images and not skips:
        faults += _row_faults(source, watch, name=path.name)
    return Checked(
        path=path,
        dataset=dataset,
        modality="" if source is None else source.modality,
        classes=() if source is None else _held(source),
        faults=tuple(faults),
        remarks=() if source is None else (*(source.remarks if skips else ()), *on_names(source.class_names)),
        passed_over=_passed_over(path, images) if images else {},
        frames=_frames(images),
    )


def _opened(dataset: str, settings: Mapping[str, Any]) -> Source:
    source = open_data(dataset, settings)
    assert isinstance(source, Source)
    return source


def _held(source: Source) -> tuple[HeldClass, ...]:
    counts = [np.bincount(split.labels, minlength=source.num_classes).tolist() for split in (source.train, source.test)]
    return tuple(HeldClass("", name, *counted) for name, *counted in zip(source.class_names, *counts, strict=True))


def _row_faults(source: Source, watch: Watch[Any], *, name: str) -> list[Fault]:
    """Decode the images of a table one by one."""
    faults = []
    every = [(split, row) for split in (source.train, source.test) for row in range(len(split))]
    for one, row in watch(every):
        try:
            one.read(np.array([row]))
        except DataError as error:
            faults.append(Fault(Path(name), f"cannot be used: {error}"))
    return faults


def _passed_over(root: Path, used: Iterable[Path]) -> dict[str, int]:
    """Count the files that are no data, by their ending; the most frequent first."""
    others = set(files_below(root)) - set(used)
    kinds = Counter(
        OUTSIDE if file.name.lower().endswith(image_endings()) else file.suffix.lower() or "no ending"
        for file in others
    )
    return dict(kinds.most_common())


def _frames(images: Iterable[Path]) -> dict[str, list[int]]:
    """List how many frames or pages there are in each file that holds several, by ending."""
    found: dict[str, list[int]] = {}
    for file in images:
        if (number := frames_in(file)) > 1:
            found.setdefault(file.suffix.lower(), []).append(number)
    return found
