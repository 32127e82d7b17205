"""Classify files and standard input with a run's model.

Images come as files, folders of them, or one on standard input; texts as files (a text a line, or a table with a
text column), folders of such, or lines on standard input.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from fedtalora_flwr.data.hf_rows import TEXT_COLUMNS
from fedtalora_flwr.data.images import decode_image
from fedtalora_flwr.data.sources.imagefolder import image_files
from fedtalora_flwr.trained import TrainedModel

STDIN = "-"


class InputError(ValueError):
    """An input that cannot be read; the message names it and says what can."""


@dataclass(frozen=True)
class Item:
    """One input.

    Parameters
    ----------
    name
        The file, with the number of the line or row where it holds several.
    raw
        A PIL image or a text.
    """

    name: str
    raw: Any


@dataclass(frozen=True)
class Prediction:
    """What the model says of one input.

    Parameters
    ----------
    item
        The input.
    ranking
        Class names with their probabilities in [0, 1], the likeliest first.
    """

    item: Item
    ranking: tuple[tuple[str, float], ...]

    def to_json(self) -> dict[str, Any]:
        """Give it as an object; a text is repeated, an image is not."""
        text = {"text": self.item.raw} if isinstance(self.item.raw, str) else {}
        classes = [{"class": name, "probability": probability} for name, probability in self.ranking]
        return {"input": self.item.name, **text, "predictions": classes}


def predict(trained: TrainedModel, items: Iterator[Item], *, top: int) -> Iterator[Prediction]:
    """Classify items, a batch at a time and in their order.

    Parameters
    ----------
    trained
        The model.
    items
        Inputs of its modality.
    top
        Classes to name for each, at most.
    """
    while batch := list(islice(items, trained.config.eval_batch_size)):
        scores = trained.logits(trained.encode([item.raw for item in batch]))
        best = trained.head.probabilities(scores).topk(min(top, scores.shape[1]))
        for item, values, columns in zip(batch, best.values.tolist(), best.indices.tolist(), strict=True):
            names = (trained.class_names[column] for column in columns)
            yield Prediction(item, tuple(zip(names, values, strict=True)))


def read_items(names: Sequence[str], *, modality: str, stdin: BinaryIO, column: str = "") -> Iterator[Item]:
    """Read inputs one by one, in the order given; those of a folder in the order of their names.

    Parameters
    ----------
    names
        Files and folders; ``-`` is standard input.
    modality
        ``image`` or ``text``: what the inputs hold.
    stdin
        Standard input.
    column
        Text column of tables; empty: found by its usual name.

    Raises
    ------
    InputError
        If there is no such file, it cannot be read or is of no known kind, or a folder or standard input is empty.
    DataError
        If an image cannot be decoded.
    """
    for name in names:
        if name == STDIN:
            yield from _from_stdin(stdin, modality=modality)
            continue
        path = Path(name)
        if not path.exists():
            raise InputError(f"{name}: no such file or folder; give {_wanted(modality)}, or - for standard input")
        files = _files_in(path, modality=modality) if path.is_dir() else [path]
        for file in files:
            if modality == "image":
                yield Item(str(file), decode_image(file, where=f"image {file}"))
            else:
                yield from _texts_of(file, column=column)


def _wanted(modality: str) -> str:
    return "image files" if modality == "image" else f"text files ({', '.join(_READERS)})"


def _files_in(folder: Path, *, modality: str) -> list[Path]:
    if modality == "image":
        files = image_files(folder)
    else:
        files = sorted(path for path in folder.rglob("[!.]*") if path.is_file() and path.suffix.lower() in _READERS)
    if not files:
        raise InputError(f"{folder} holds no {_wanted(modality)}; give a folder that does, or the files themselves")
    return files


def _from_stdin(stdin: BinaryIO, *, modality: str) -> Iterator[Item]:
    if modality == "image":
        content = stdin.read()
        if not content:
            raise InputError("standard input is empty; pipe one image file into it")
        yield Item(STDIN, decode_image(content, where="the image on standard input"))
        return
    empty = True
    for number, line in enumerate(stdin, start=1):
        try:
            text = line.decode().strip()
        except UnicodeDecodeError as error:
            raise InputError(f"line {number} of standard input is not UTF-8 ({error}); convert it first") from error
        if text:
            empty = False
            yield Item(f"{STDIN}:{number}", text)
    if empty:
        raise InputError("standard input is empty; pipe texts into it, one a line")


def _texts_of(file: Path, *, column: str) -> Iterator[Item]:
    read = _READERS.get(file.suffix.lower())
    if read is None:
        raise InputError(
            f"{file}: {file.suffix or 'a file without ending'} is no text format known here; convert it to one of "
            f"{', '.join(_READERS)}, or pipe its lines into standard input (-)"
        )
    try:
        content = file.read_text(encoding="utf-8-sig")
        rows = list(read(content))
    except (UnicodeDecodeError, csv.Error, ValueError) as error:
        raise InputError(
            f"{file} cannot be read as {file.suffix}: {error}; save it as UTF-8 and check its end"
        ) from error
    for number, row in rows:
        text = row if isinstance(row, str) else _column_of(row, column=column, where=f"{file}:{number}")
        if text.strip():
            yield Item(f"{file}:{number}", text.strip())


def _column_of(row: Any, *, column: str, where: str) -> str:
    """Take the text out of a table's row."""
    fields = row if isinstance(row, dict) else {}
    found = next((name for name in ([column] if column else TEXT_COLUMNS) if isinstance(fields.get(name), str)), None)
    if found is None:
        wanted = f"text column {column!r}" if column else f"text column (looked for {', '.join(TEXT_COLUMNS)})"
        raise InputError(
            f"{where} has no {wanted}, only {', '.join(map(str, fields)) or type(row).__name__}; rename one"
        )
    return str(fields[found])


def _lines(content: str) -> Iterator[tuple[int, Any]]:
    yield from enumerate(content.splitlines(), start=1)


def _json_lines(content: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            yield number, json.loads(line)


def _json(content: str) -> Iterator[tuple[int, Any]]:
    rows = json.loads(content)
    if not isinstance(rows, list):
        raise ValueError(f"it must hold a list of texts or of objects, got {type(rows).__name__}")
    yield from enumerate(rows, start=1)


def _comma_table(content: str) -> Iterator[tuple[int, Any]]:
    yield from enumerate(csv.DictReader(io.StringIO(content)), start=1)


def _tab_table(content: str) -> Iterator[tuple[int, Any]]:
    yield from enumerate(csv.DictReader(io.StringIO(content), delimiter="\t"), start=1)


_READERS: dict[str, Callable[[str], Iterator[tuple[int, Any]]]] = {
    ".txt": _lines,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _comma_table,
    ".tsv": _tab_table,
}
