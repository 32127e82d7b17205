"""A tree of image files with one subfolder a class, at any depth below it (``<class>/images/*`` does too)."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedtalora_flwr.data.faults import Fault, image_fault, left_out
from fedtalora_flwr.data.images import decode_image, image_endings
from fedtalora_flwr.data.locate import existing
from fedtalora_flwr.data.source import NO_ROWS, DataError, Ints, Source, Split, join_classes

_TEST_FOLDERS = ("test", "val", "validation", "valid")


def create(*, data_path: str, test_path: str, bad_files: str = "error") -> Source:
    """List the images; classes are the subfolders' names in alphabetical order.

    Parameters
    ----------
    data_path
        A folder with one subfolder a class, or with such folders ``train`` and maybe ``test`` or ``val``.
    test_path
        A folder with one subfolder a class; empty: as `data_path` has it.
    bad_files
        ``skip`` decodes every image now, and leaves out those that cannot be.
    """
    root = existing(data_path, key="data-path")
    has_splits = bool(_class_folders(root / "train"))
    skips = bad_files == "skip"
    train, names, remarks = _list_images(root / "train" if has_splits else root, skips=skips)
    if test_path:
        test_root = existing(test_path, key="test-path")
    else:
        candidates = (root / folder for folder in _TEST_FOLDERS) if has_splits else iter(())
        # ImageNet's test folder is flat, without classes: pass on to the validation folder.
        found = next((folder for folder in candidates if _class_folders(folder)), None)
        if found is None:
            return Source(str(root), "image", class_names=names, train=train, test=NO_ROWS, remarks=remarks)
        test_root = found
    test, test_names, test_remarks = _list_images(test_root, skips=skips)
    class_names, test = join_classes(names, test, test_names)
    return Source(str(root), "image", class_names, train=train, test=test, remarks=remarks + test_remarks)


def _class_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _list_images(root: Path, *, skips: bool) -> tuple[Split, tuple[str, ...], tuple[str, ...]]:
    """List the images by class: the split, the classes' names, and what is left out."""
    folders = _class_folders(root)
    files = [image_files(folder) for folder in folders]
    faults: list[Fault] = []
    if skips:
        found = [[image_fault(path, root=root) for path in paths] for paths in files]
        faults = [fault for of_class in found for fault in of_class if fault]
        files = [
            [path for path, fault in zip(*pair, strict=True) if not fault] for pair in zip(files, found, strict=True)
        ]
    paths = [path for found in files for path in found]
    if not paths:
        names = ", ".join(folder.name for folder in folders[:5]) or "none"
        raise DataError(
            f"{root} holds no images in subfolders (subfolders: {names}); put each class's images in a "
            "folder of the class's name"
        )
    labels = np.repeat(np.arange(len(folders), dtype=np.int64), [len(found) for found in files])

    def read(rows: Ints) -> Sequence[Any]:
        return [decode_image(paths[row], where=f"image {paths[row]}") for row in rows]

    return Split(labels=labels, read=read), tuple(folder.name for folder in folders), left_out(faults)


def image_files(folder: Path) -> list[Path]:
    """List the pictures in a folder and below it, by their endings, as `files_below` does."""
    endings = image_endings()
    return [file for file in files_below(folder) if file.name.lower().endswith(endings)]


def files_below(folder: Path) -> list[Path]:
    """List the files in a folder and below it, in order of name; hidden ones are left out.

    Links to folders are followed, but none to a folder that was walked already or lies above: that would be a circle.
    """
    found: list[Path] = []
    walked = {_identity(place) for place in folder.resolve().parents}
    for parent, subfolders, names in os.walk(folder, followlinks=True):
        if (here := _identity(Path(parent))) in walked:
            subfolders.clear()
            continue
        walked.add(here)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found += [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
    return found


def _identity(folder: Path) -> tuple[int, int]:
    """Tell a folder from every other, by whichever path it is reached."""
    status = folder.stat()
    return status.st_dev, status.st_ino
