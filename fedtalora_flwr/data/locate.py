"""Find data on disk: files a setting names, and the folders of known data sets under the data root."""

import os
from collections.abc import Sequence
from pathlib import Path

from fedtalora_flwr.data.source import DataError

_TEST_PREFIXES = ("test", "val", "dev")


def existing(path: str, *, key: str) -> Path:
    """Return the file or folder that a setting names.

    Parameters
    ----------
    path
        The setting's value; ``~`` is the home folder.
    key
        The setting's name, for the message.

    Raises
    ------
    DataError
        If the setting is empty or nothing is there.
    """
    if not path:
        raise DataError(f"{key} is empty; set {key} to a file or folder on this machine")
    found = Path(path).expanduser().absolute()
    if not found.exists():
        raise DataError(f"{key} {path!r}: there is no file or folder {found}; correct {key}")
    return found


def split_files(data_path: str, test_path: str, *, suffixes: Sequence[str]) -> dict[str, list[Path]]:
    """Find the files of the training split and, where there is one, of the test split.

    Parameters
    ----------
    data_path
        A file, or a folder that holds ``train*`` and maybe ``test*``, ``val*`` or ``dev*`` files.
    test_path
        A file, or a folder as above or of test files only; empty: as `data_path` has it.
    suffixes
        Endings to look for, e.g. ``.parquet``.

    Returns
    -------
    files
        Sorted files by split: ``train``, and ``test`` where there is one.

    Raises
    ------
    DataError
        If a path does not exist, or holds no such files.
    """
    train = existing(data_path, key="data-path")
    files = {"train": [train] if train.is_file() else named_files("train", train, suffixes)}
    if not files["train"]:
        raise DataError(
            f"data-path {train} holds no train*{'|'.join(suffixes)}, only {_listing(train)}; "
            "rename its training files or give the file itself"
        )
    if test_path:
        test = existing(test_path, key="test-path")
        if test.is_dir():
            files["test"] = _test_files(test, suffixes) or named_files("", test, suffixes)
        else:
            files["test"] = [test]
        if not files["test"]:
            raise DataError(
                f"test-path {test} holds no {'|'.join(suffixes)} file, only {_listing(test)}; correct test-path"
            )
    elif train.is_dir() and (found := _test_files(train, suffixes)):
        files["test"] = found
    return files


def known_folder(name: str, *, data_root: str) -> Path | None:
    """Return ``<root>/<name>`` where that folder stands; the root is `data_root`, else ``FEDTALORA_DATA``."""
    root = data_root or os.environ.get("FEDTALORA_DATA", "")
    folder = Path(root).expanduser().absolute() / name
    return folder if root and folder.is_dir() else None


def where_to_put(name: str, *, data_root: str) -> str:
    """Say what would have made `known_folder` find the data."""
    root = data_root or os.environ.get("FEDTALORA_DATA", "") or "<data-root>"
    return f"put {name} in {root}/{name} and set data-root or the environment's FEDTALORA_DATA to {root}"


def _test_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Take the first kind that is there: of test and validation files, only the test files."""
    return next((found for p in _TEST_PREFIXES if (found := named_files(p, folder, suffixes))), [])


def named_files(prefix: str, folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """List the files in a folder whose names begin so and end in one of these, in order of name."""
    return sorted(
        file
        for file in folder.iterdir()
        if file.name.lower().startswith(prefix) and file.suffix.lower() in suffixes and file.name[0] != "."
    )


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"
