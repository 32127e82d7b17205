"""The data that a node brings: a folder of its own, with one subfolder or text file a class, maybe in task folders.

    <data-path>/<class>/*.png             or   <data-path>/<task>/<class>/*.png
    <data-path>/<class>.txt, *.csv        or   <data-path>/<task>/<class>.txt, *.csv

Pictures may lie at any depth below their class. Where the folders below all others are named alike, a task and a class
cannot be told apart, and ``folder-layout`` says which is meant.

A share of each class is held out to test on. Which examples these are follows from the names of the files, or from
the texts, alone: what arrives later moves none from one side to the other.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedtalora_flwr.data.classes import ClassList, HeldClass
from fedtalora_flwr.data.faults import Fault, image_fault, refusal
from fedtalora_flwr.data.images import decode_image
from fedtalora_flwr.data.locate import existing
from fedtalora_flwr.data.node_folder import BadFiles, Item, Layout, Listing, task_folders
from fedtalora_flwr.data.source import DataError, Ints, Split

_BYTES_AS_THEY_ARE = "surrogateescape"  # the name of a file need be no UTF-8


@dataclass(frozen=True)
class _Folder:
    """One class in one task, as found: its examples with the names by which they are held out."""

    task: str
    name: str
    train: tuple[Item, ...]
    test: tuple[Item, ...]


@dataclass(frozen=True)
class OwnData:
    """What a node found in its folder.

    Parameters
    ----------
    root
        The folder.
    folders
        Its classes, in order of task and name.
    remarks
        What is odd but no error, without paths.
    faults
        What cannot be used, as far as it was found by listing: images are not decoded for it.
    files
        All files that were taken for data, good or bad.
    """

    root: Path
    folders: tuple[_Folder, ...]
    remarks: tuple[str, ...]
    faults: tuple[Fault, ...] = ()
    files: tuple[Path, ...] = ()

    @property
    def held(self) -> tuple[HeldClass, ...]:
        """What to tell the server."""
        return tuple(HeldClass(f.task, f.name, len(f.train), len(f.test)) for f in self.folders)

    @property
    def modality(self) -> Literal["image", "text"] | None:
        """What the examples are; None where there is none."""
        for folder in self.folders:
            return "image" if isinstance((*folder.train, *folder.test)[0], Path) else "text"
        return None

    @property
    def images(self) -> tuple[Path, ...]:
        """All its image files."""
        items = (item for folder in self.folders for item in (*folder.train, *folder.test))
        return tuple(item for item in items if isinstance(item, Path))

    def image_faults(self) -> list[Fault]:
        """Decode all images, and list those that cannot be used, in order of their paths."""
        found = (image_fault(file, root=self.root) for file in sorted(self.images))
        return [fault for fault in found if fault is not None]

    @cached_property
    def digest(self) -> str:
        """Fingerprint of the names of files and the texts: SHA-256 in hexadecimal."""
        digest = hashlib.sha256()
        for folder in self.folders:
            for item in (*folder.train, *folder.test):
                digest.update("\0".join((folder.task, folder.name, _key(item), "")).encode(errors=_BYTES_AS_THEY_ARE))
        return digest.hexdigest()

    def split(self, which: Literal["train", "test"], task_id: int, classes: ClassList) -> Split:
        """Give the examples of a task, labelled by their rows in `classes`."""
        items: list[Item] = []
        labels: list[int] = []
        for folder in self.folders:
            place = classes.place(folder.task, folder.name)
            if place is not None and place[0] == task_id:
                found: tuple[Item, ...] = getattr(folder, which)
                items += found
                labels += [place[1]] * len(found)
        return _split(items, labels)

    def unknown(self, classes: ClassList) -> Split:
        """Give the examples of classes that are not in `classes`, without their labels."""
        folders = [folder for folder in self.folders if classes.place(folder.task, folder.name) is None]
        items = [item for folder in folders for item in (*folder.train, *folder.test)]
        return _split(items, [0] * len(items))


@dataclass(frozen=True)
class OwnReader:
    """How every node reads its own folder.

    Parameters
    ----------
    input_column, label_column
        Of tables; empty: found by their usual names.
    test_fraction
        Share of each class that is held out, in (0, 1).
    max_per_class
        Training examples to keep of each class in a task; 0 keeps all.
    max_test_per_class
        The same of those held out.
    bad_files
        ``error``, or ``skip`` to leave out what cannot be read, with a remark; then every image is decoded.
    folder_layout
        What the folders in a node's folder are: ``class`` or ``task``, or ``auto``, which looks what they hold.
    """

    input_column: str
    label_column: str
    test_fraction: float
    max_per_class: int
    max_test_per_class: int = 0
    bad_files: BadFiles = "error"
    folder_layout: Layout = "auto"

    def read(self, data_path: str) -> OwnData:
        """List a node's folder; of images the names alone, unless what cannot be read is left out.

        Raises
        ------
        DataError
            As `look`, or if files in it cannot be used: the message names them all.
        """
        found = self.look(data_path)
        if found.faults:
            raise DataError(refusal(found.faults))
        return found

    def look(self, data_path: str) -> OwnData:
        """List a node's folder as `read` does, with all that is wrong in it.

        Raises
        ------
        DataError
            If there is no such folder, it cannot be told what its folders are, it holds images and texts, the name of
            a class or task is no UTF-8, or two names differ only by case, space or spelling in Unicode.
        """
        root = existing(data_path, key="data-path")
        if not root.is_dir():
            raise DataError(f"data-path {root} is a file; give the folder that holds a subfolder or a file a class")
        listing = Listing(root, self.input_column, self.label_column, self.bad_files)
        tasks = task_folders(root, self.folder_layout)
        found = [(task.name, *one) for task in tasks for one in listing.classes(task)]
        found = found or [("", *one) for one in listing.classes(root)]
        for task, name, _ in found:
            _require_unicode(f"{task}/{name}" if task else name, root=root)
        folders = [self._held_out(task, name, items) for task, name, items in found if items]
        remarks = [f"{'/'.join(filter(None, (task, name)))} is empty" for task, name, items in found if not items]
        if not folders:
            remarks = [*remarks, "no example in data-path"]
        remarks = [*listing.remarks(), *remarks]
        data = OwnData(root, tuple(folders), tuple(remarks), tuple(listing.faults), tuple(listing.files))
        if len({isinstance(item, Path) for folder in folders for item in (*folder.train, *folder.test)}) > 1:
            raise DataError(f"data-path {root} holds images and texts; a run trains on one kind")
        return data

    def _held_out(self, task: str, name: str, items: Sequence[Item]) -> _Folder:
        """Part a class's examples by their names; where all would be held out, all are trained on."""
        places = [_draw(name, _key(item)) for item in items]
        train = [row for row, place in enumerate(places) if place >= self.test_fraction]
        test = [row for row, place in enumerate(places) if place < self.test_fraction] if train else []
        train = train or list(range(len(items)))
        if self.max_per_class:
            train = sorted(sorted(train, key=places.__getitem__)[: self.max_per_class])
        if self.max_test_per_class:
            test = sorted(sorted(test, key=places.__getitem__)[: self.max_test_per_class])
        return _Folder(task, name, tuple(items[row] for row in train), tuple(items[row] for row in test))


def _require_unicode(name: str, *, root: Path) -> None:
    """Refuse the name of a class or task that could not be told to the server."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"data-path {root} holds {name!a}, a name that is not UTF-8; rename it") from error


def _key(item: Item) -> str:
    """Name an example: a file by its own name, a text by itself, a pair by both."""
    if isinstance(item, Path):
        return item.name
    return item if isinstance(item, str) else "\0".join(item)


def _draw(name: str, key: str) -> float:
    """Draw a number in [0, 1) that is the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256(f"{name}/{key}".encode(errors=_BYTES_AS_THEY_ARE)).digest()[:6]) / 2**48


def _split(items: Sequence[Item], labels: Sequence[int]) -> Split:
    def read(rows: Ints) -> Sequence[Any]:
        found = [items[row] for row in rows]
        return [decode_image(item, where=f"image {item}") if isinstance(item, Path) else item for item in found]

    return Split(labels=np.asarray(labels, dtype=np.int64), read=read)
