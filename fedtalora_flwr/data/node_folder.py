"""What lies in a node's folder: the folders of its tasks, their classes, and the files or texts of each."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from fedtalora_flwr.data.classes import require_distinct
from fedtalora_flwr.data.faults import Fault, image_fault, left_out
from fedtalora_flwr.data.hf_load import load_files
from fedtalora_flwr.data.hf_rows import source_from_splits
from fedtalora_flwr.data.source import DataError
from fedtalora_flwr.data.sources.imagefolder import image_files
from fedtalora_flwr.data.tables import read_text

BadFiles = Literal["error", "skip"]
Layout = Literal["auto", "class", "task"]
Item = Path | str | tuple[str, str]  # an image file, a text, or a pair of texts

_TABLES = (".csv", ".tsv", ".json", ".jsonl")


def task_folders(root: Path, layout: Layout) -> list[Path]:
    """List the folders of tasks in a node's folder; none where the folders, and files, are those of classes.

    Raises
    ------
    DataError
        If there are classes beside tasks, or `layout` is ``auto`` and all folders hold the same.
    """
    if layout == "class":
        return []
    entries = entries_of(root)
    subfolders = [entry for entry in entries if entry.is_dir()]
    filled = [folder for folder in subfolders if entries_of(folder)]
    of_tasks = [folder for folder in filled if _holds_classes(folder)]
    if layout == "task":
        of_tasks = of_tasks or filled
    if of_tasks and len(of_tasks) + len(subfolders) - len(filled) < len(entries):
        others = sorted({entry.name for entry in entries} - {folder.name for folder in of_tasks})
        raise DataError(
            f"data-path {root} holds task folders ({of_tasks[0].name}) beside classes ({others[0]}); "
            "put every class into a task folder, or none"
        )
    # Texts in them make tasks of folders: only pictures may lie at any depth below their class.
    below = {tuple((entry.name, entry.is_dir()) for entry in entries_of(task)) for task in of_tasks}
    if layout == "auto" and len(of_tasks) > 1 and len(below) == 1 and all(is_dir for (_, is_dir) in next(iter(below))):
        names = " and ".join(_some([folder.name for folder in of_tasks]))
        inner = ", ".join(_some([entry.name for entry in entries_of(of_tasks[0])]))
        raise DataError(
            f"data-path {root}: its folders, as {names}, all hold the same ({inner}), so that a "
            f"class cannot be told from a task; set folder-layout=class if {names} are classes, or "
            "folder-layout=task if they are tasks, each with the same classes"
        )
    return of_tasks


@dataclass
class Listing:
    """The listing of one folder: what of it cannot be used is noted, and the rest goes on.

    Parameters
    ----------
    root
        The node's folder.
    input_column, label_column
        Of tables; empty: found by their usual names.
    bad_files
        ``error``, or ``skip`` to leave out what cannot be read.
    """

    root: Path
    input_column: str
    label_column: str
    bad_files: BadFiles
    faults: list[Fault] = field(default_factory=list)
    skipped: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)  # all that was taken for data, good or bad

    def classes(self, folder: Path) -> list[tuple[str, list[Item]]]:
        """List the classes in a folder, by name, with their examples."""
        classes: dict[str, list[Item]] = {}
        for entry in entries_of(folder):
            if entry.is_dir():
                classes.setdefault(entry.name, []).extend(self._usable(image_files(entry)))
            elif entry.suffix.lower() in (".txt", *_TABLES):
                for name, texts in self._texts(entry).items():
                    classes.setdefault(name, []).extend(texts)
        require_distinct(sorted(classes), where=f"the folders and files in {folder}")
        return sorted(classes.items())

    def remarks(self) -> tuple[str, ...]:
        """Say what was left out."""
        return (*left_out(self.skipped), *self.notes)

    def _usable(self, files: Sequence[Path]) -> list[Path]:
        """Leave out images that cannot be decoded, where that is asked for."""
        self.files += files
        if self.bad_files != "skip":
            return list(files)
        found = [image_fault(file, root=self.root) for file in files]
        self.skipped += filter(None, found)
        return [file for file, fault in zip(files, found, strict=True) if fault is None]

    def _texts(self, file: Path) -> dict[str, list[Item]]:
        """Give the texts in a file by class."""
        self.files.append(file)
        try:
            return {file.stem: list(_lines(file))} if file.suffix.lower() == ".txt" else self._table(file)
        except (DataError, OSError) as error:
            fault = Fault(file.relative_to(self.root), f"cannot be used: {error}")
            (self.skipped if self.bad_files == "skip" else self.faults).append(fault)
            return {}

    def _table(self, file: Path) -> dict[str, list[Item]]:
        source = source_from_splits(
            file.name,
            {"train": load_files([file])},
            input_column=self.input_column,
            label_column=self.label_column,
            files={"train": [file]},
            bad_files=self.bad_files,
        )
        if source.modality != "text":
            raise DataError(f"{file} holds no texts; put images into one subfolder a class")
        self.notes += source.remarks
        texts = source.train.read(np.arange(len(source.train)))
        by_class: dict[str, list[Item]] = {}
        for label, text in zip(source.train.labels, texts, strict=True):
            by_class.setdefault(source.class_names[label], []).append(text)
        return by_class


def entries_of(folder: Path) -> list[Path]:
    """List what lies in a folder, in order of name; what is hidden is left out."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _holds_classes(folder: Path) -> bool:
    """Tell a task's folder from a class's: it holds folders or texts, and no image itself."""
    entries = entries_of(folder)
    images = {path.name for path in image_files(folder) if path.parent == folder}
    return not images and any(entry.is_dir() or entry.suffix.lower() in (".txt", *_TABLES) for entry in entries)


def _some(names: Sequence[str], *, most: int = 3) -> list[str]:
    return [*names[:most], *(["..."] if len(names) > most else [])]


def _lines(file: Path) -> list[str]:
    lines = read_text(file).split("\n")  # splitlines() would end a line at U+2028 too
    return [line.strip() for line in lines if line.strip()]
