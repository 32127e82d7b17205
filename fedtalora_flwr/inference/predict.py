"""Classify files and standard input with a run's model.

Images come as files, folders of them, or one on standard input; texts as files (a text a line, or a table with a
text column), folders of such, or lines on standard input.

A name that stands for nothing stops the whole; what is there and cannot be read is told in its place among the others.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import PIL.Image

from fedtalora_flwr.data import DataError
from fedtalora_flwr.data.hf_rows import TEXT_COLUMNS
from fedtalora_flwr.data.images import decode_image
from fedtalora_flwr.data.source import Modality
from fedtalora_flwr.data.sources.imagefolder import image_files
from fedtalora_flwr.inference.model import TrainedModel

STDIN = "-"


class InputError(ValueError):
    """An input that cannot be; the message names it and says what can."""


Ranking = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Item:
    """One input.

    Parameters
    ----------
    name
        The file, with the number of the line or row where it holds several.
    raw
        A PIL image or a text; None where it cannot be read.
    error
        Why it cannot be read, empty where it can.
    """

    name: str
    raw: Any
    error: str = ""


@dataclass(frozen=True)
class Prediction:
    """What the model says of one input.

    Parameters
    ----------
    item
        The input; an image is cut to the square that the model takes of it.
    ranking
        Class names with their probabilities in [0, 1], the likeliest first; empty where the item has an error.
    """

    item: Item
    ranking: Ranking

    def to_json(self) -> dict[str, Any]:
        """Give it as an object; a text is repeated, an image is not. An item that cannot be read gives its error."""
        if self.item.error:
            return {"input": self.item.name, "error": self.item.error}
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
    # One original at a time: a batch of photographs as they come from a camera would take gigabytes.
    stored = (item if item.error else replace(item, raw=trained.stored(item.raw)) for item in items)
    while batch := list(islice(stored, trained.config.eval_batch_size)):
        rankings = _rankings(trained, [item.raw for item in batch if not item.error], top=top)
        for item in batch:
            yield Prediction(item, () if item.error else next(rankings))


def _rankings(trained: TrainedModel, raw: Sequence[Any], *, top: int) -> Iterator[Ranking]:
    if not raw:
        return
    scores = trained.logits(trained.encode(raw))
    best = trained.head.probabilities(scores).topk(min(top, scores.shape[1]))
    for values, columns in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        yield tuple(zip((trained.class_names[column] for column in columns), values, strict=True))


def read_items(names: Sequence[str], *, modality: Modality, stdin: BinaryIO, column: str = "") -> Iterator[Item]:
    """Read inputs one by one, in the order given; those of a folder in the order of their names.

    The names are looked at before the first input is read. An image that cannot be decoded, a text file that cannot be
    read or holds no text, a row without a text and an empty standard input are items with an error.

    Parameters
    ----------
    names
        Files and folders; ``-`` is standard input.
    modality
        What the inputs hold; instructions are prompts, read as texts are.
    stdin
        Standard input.
    column
        Text column of tables; empty: found by its usual name.

    Raises
    ------
    InputError
        If there is no such file, a text file is of no known kind, or a folder has none.
    """
    found = [file for name in names for file in _files_of(name, modality=modality)]
    return _read(found, modality=modality, stdin=stdin, column=column)


def items_of(inputs: Sequence[Any], *, modality: str) -> Iterator[Item]:
    """Give inputs that a program has at hand one by one: PIL images, paths of image files, or texts.

    An image file that cannot be read is an item with an error.

    Raises
    ------
    InputError
        If an input is none of these.
    """
    for number, one in enumerate(inputs):
        if modality == "text" and isinstance(one, str):
            yield Item(f"input {number}", one)
        elif modality == "image" and isinstance(one, PIL.Image.Image):
            yield Item(f"input {number}", one.convert("RGB"))
        elif modality == "image" and isinstance(one, str | Path):
            yield _image_of(Path(one), io.BytesIO())
        else:
            wanted = "a text" if modality == "text" else "a PIL image or the path of an image file"
            raise InputError(f"input {number} is {type(one).__name__}; this run's model takes {wanted}")


def _files_of(name: str, *, modality: str) -> list[Path | None]:
    """List the files that a name stands for; None is standard input."""
    if name == STDIN:
        return [None]
    path = Path(name)
    if not path.exists():
        raise InputError(f"{name}: no such file or folder; give {_wanted(modality)}, or - for standard input")
    if path.is_dir():
        return [*_files_in(path, modality=modality)]
    if modality != "image" and path.suffix.lower() not in _READERS:
        raise InputError(
            f"{name}: {path.suffix or 'a file without ending'} is no text format known here; convert it to one of "
            f"{', '.join(_READERS)}, or pipe its lines into standard input (-)"
        )
    return [path]


def _read(files: Sequence[Path | None], *, modality: str, stdin: BinaryIO, column: str) -> Iterator[Item]:
    for file in files:
        if modality == "image":
            yield _image_of(file, stdin)
        elif file is None:
            yield from _lines_of(stdin)
        else:
            yield from _texts_of(file, column=column)


def _image_of(file: Path | None, stdin: BinaryIO) -> Item:
    name = STDIN if file is None else str(file)
    content = stdin.read() if file is None else file
    if not content:
        return Item(name, None, "standard input is empty; pipe one image file into it")
    try:
        return Item(name, decode_image(content, where=f"image {file}" if file else "the image on standard input"))
    except DataError as error:
        return Item(name, None, str(error))


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


def _lines_of(stdin: BinaryIO) -> Iterator[Item]:
    empty = True
    for number, line in enumerate(stdin, start=1):
        name = f"{STDIN}:{number}"
        try:
            item = Item(name, line.decode().strip())
        except UnicodeDecodeError as error:
            reason = f"line {number} of standard input is not UTF-8 ({error}); convert it first"
            item = Item(name, None, reason)
        if item.raw or item.error:
            empty = False
            yield item
    if empty:
        yield Item(STDIN, None, "standard input is empty; pipe texts into it, one a line")


def _texts_of(file: Path, *, column: str) -> Iterator[Item]:
    try:
        rows = list(_READERS[file.suffix.lower()](file.read_text(encoding="utf-8-sig")))
    except (OSError, csv.Error, ValueError) as error:
        reason = f"{file} cannot be read as {file.suffix}: {error}; save it as UTF-8 and check its end"
        yield Item(str(file), None, reason)
        return
    items = [_text_item(row, column=column, name=f"{file}:{number}") for number, row in rows]
    items = [item for item in items if item.raw or item.error]
    items = items or [Item(str(file), None, f"{file} holds no text; give one that does, or leave it out")]
    # Where no row has a column for a text, the file as a whole is at fault, which is said once.
    yield from items if any(isinstance(row, str) or _present(row, column=column) for _, row in rows) else items[:1]


def _text_item(row: Any, *, column: str, name: str) -> Item:
    try:
        text = row if isinstance(row, str) else _column_of(row, column=column, where=name)
        text.encode()
    except InputError as error:
        return Item(name, None, str(error))
    except UnicodeEncodeError as error:  # JSON can hold half a character: "\ud83d"
        return Item(name, None, f"{name} is no valid Unicode text ({error}); replace it")
    return Item(name, text.strip())


def _column_of(row: Any, *, column: str, where: str) -> str:
    """Take the text out of a table's row."""
    fields = row if isinstance(row, dict) else {}
    present = _present(row, column=column)
    found = next((name for name in present if isinstance(fields[name], str)), None)
    if found is not None:
        return str(fields[found])
    if present and fields[present[0]] is None:
        raise InputError(f"{where} holds no text in its column {present[0]}; fill it in, or remove the row")
    if present:
        raise InputError(
            f"{where} must hold a string in its column {present[0]}, got {json.dumps(fields[present[0]])[:40]}; "
            "put it in quotes, or remove the row"
        )
    wanted = f"text column {column!r}" if column else f"text column (looked for {', '.join(TEXT_COLUMNS)})"
    raise InputError(f"{where} has no {wanted}, only {', '.join(map(str, fields)) or type(row).__name__}; rename one")


def _present(row: Any, *, column: str) -> list[str]:
    """List the columns of a row that may hold its text."""
    return [name for name in ([column] if column else TEXT_COLUMNS) if isinstance(row, dict) and name in row]


def _lines(content: str) -> Iterator[tuple[int, Any]]:
    yield from enumerate(content.split("\n"), start=1)  # splitlines() would end a line at U+2028 too


def _json_lines(content: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(content.split("\n"), start=1):
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
