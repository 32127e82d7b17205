"""Files that are whole at any moment: written beside their place, and put there when they are done."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: Path, *, flush: bool = True, mode: int | None = None) -> Iterator[Path]:
    """Give the path to write to; at the end it is put in the place of `path`, or the old file stays and no rest of it.

    Parameters
    ----------
    path
        The file; its folder must be there.
    flush
        Wait until it is on the disk: whoever sees the file sees all of it, after a power cut too.
    mode
        Of the file, from its first byte on; None: as the process makes files.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if mode is not None:
            with suppress(FileNotFoundError):
                part.unlink()
            os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
            part.chmod(mode)
        yield part
        if flush:
            _flush(part)
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")
