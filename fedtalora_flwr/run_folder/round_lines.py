"""The lines of ``rounds.jsonl``: one a round, each with its own checksum, so that damage to one is found and named.

A line is a JSON object that begins with ``server_round`` and ends with ``crc32``, the checksum of what the object would
be without it. A line without one, as an earlier version wrote it, is taken as it is.
"""

import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CHECKSUM = "crc32"
_MARK = f', "{_CHECKSUM}": '.encode()
_BEGINS = re.compile(rb'(?=\{"server_round": )')  # no text inside a line has it: a quote is escaped there


@dataclass(frozen=True)
class Line:
    """A whole line: what it says of a round, and its bytes."""

    values: Mapping[str, Any]
    raw: bytes


@dataclass(frozen=True)
class Damage:
    """A line that cannot be used, by its number in the file, and why; the last one may just be cut off."""

    file: str
    number: int
    why: str
    cut: bool = False

    def __str__(self) -> str:
        """Name the file, the line and what is wrong with it."""
        return f"{self.file}, line {self.number} {self.why}"


def read(path: Path) -> tuple[list[Line], list[Damage]]:
    """Read all lines that are whole, in the order of the file, and name the others; a file that is not there is empty.

    Where a line break is lost, the line after it is found by how it begins.
    """
    lines: list[Line] = []
    damages: list[Damage] = []
    texts = path.read_bytes().split(b"\n") if path.exists() else []
    for number, text in enumerate(texts, start=1):
        for raw in _BEGINS.split(text):
            if not raw.strip():
                continue
            try:
                lines.append(Line(_values(raw), raw))
            except ValueError as error:
                cut = number == len(texts) and text.endswith(raw)
                why = "is cut off, as if the run was stopped while it wrote" if cut else f"is damaged: {error}"
                damages.append(Damage(path.name, number, why, cut))
    return lines, damages


def epsilon_spent(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Give what private training has cost each client of each task, by task id and partition id; empty without."""
    spent: dict[str, dict[str, float]] = {}
    for line in lines:
        for partition, epsilon in (line.get("epsilon_spent") or {}).items():
            task = spent.setdefault(str(line["task_id"]), {})
            task[partition] = max(epsilon, task.get(partition, 0.0))
    return spent


def append(path: Path, values: Mapping[str, Any]) -> None:
    """Append a line, and return when it is on the disk."""
    body = json.dumps(values)
    line = body.removesuffix("}").encode() + _MARK + b"%d}\n" % zlib.crc32(body.encode())
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read() == b"\n" else b"\n" + line  # a cut line does not take this one with it
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def _values(raw: bytes) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(raw.decode())
    for key in ("server_round", "task_id"):
        if not isinstance(values, dict) or type(values.get(key)) is not int:
            raise ValueError(f"it needs a whole number {key!r}")
    checksum = values.pop(_CHECKSUM, None)
    if checksum is not None and checksum != zlib.crc32(raw.strip().rpartition(_MARK)[0] + b"}"):
        raise ValueError("its checksum is another")
    return values
