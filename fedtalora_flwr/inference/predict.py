"""Classify files and standard input with a run's model.

Images come as files, folders of them, or one on standard input; texts as files (a text a line, or a table with a
text column), folders of such, or lines on standard input. A pair of texts is a line with a tab between the two, a row
with two text columns, or a list of two in JSON.

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
from fedtalora_flwr.data.hf_rows import PAIR_COLUMNS, TEXT_COLUMNS, columns_named
from fedtalora_flwr.data.images import decode_image, upright_rgb
from fedtalora_flwr.data.instructions import prompt_columns, prompt_of
from fedtalora_flwr.data.source import Modality
from fedtalora_flwr.data.sources.imagefolder import image_files
from fedtalora_flwr.data.tables import read_text, records
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
        A PIL image, a text or a pair of texts; None where it cannot be read.
    error
        Why it cannot be read, empty where it can.
    """

    name: str
    raw: Any
    error: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        """The text, or both of a pair; none of an image."""
        return _texts_in(self.raw)


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
        text = {"text": self.item.raw} if self.item.texts else {}
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


def read_items(
    names: Sequence[str], *, modality: Modality, stdin: BinaryIO, column: str = "", num_texts: Sequence[int] = (1,)
) -> Iterator[Item]:
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
        Text column of tables, or two with a comma between them; empty: found by their usual names.
    num_texts
        How many texts an input may be made of.

    Raises
    ------
    InputError
        If there is no such file, a text file is of no known kind, or a folder has none.
    """
    found = [file for name in names for file in _files_of(name, modality=modality)]
    wanted = _Wanted(tuple(num_texts), column, prompts=modality == "instruction")
    return _read(found, modality=modality, stdin=stdin, wanted=wanted)


def items_of(inputs: Sequence[Any], *, modality: str, num_texts: Sequence[int] = (1,)) -> Iterator[Item]:
    """Give inputs that a program has at hand one by one: PIL images, paths of image files, texts, or pairs of texts.

    An image file that cannot be read is an item with an error, and so is an image that 8-bit RGB cannot hold.

    Raises
    ------
    InputError
        If an input is none of these.
    """
    for number, one in enumerate(inputs):
        if modality == "text" and len(texts := _texts_in(one)) in num_texts:
            yield Item(f"input {number}", _raw(texts))
        elif modality == "image" and isinstance(one, PIL.Image.Image):
            yield _converted(one, name=f"input {number}")
        elif modality == "image" and isinstance(one, str | Path):
            yield _image_of(Path(one), io.BytesIO())
        else:
            wanted = _described(num_texts) if modality == "text" else "a PIL image or the path of an image file"
            raise InputError(f"input {number} is {type(one).__name__}; this run's model takes {wanted}")


def _converted(image: PIL.Image.Image, *, name: str) -> Item:
    try:
        return Item(name, upright_rgb(image, where=name))
    except DataError as error:
        return Item(name, None, str(error))


@dataclass(frozen=True)
class _Wanted:
    """What a run's inputs are made of: one text or two, or either, and the columns of tables if they are named."""

    num_texts: tuple[int, ...]
    column: str
    prompts: bool = False  # what all columns hold is one text then

    def columns(self, row: Any) -> list[tuple[str, ...]]:
        """List the columns of a row that may hold its texts, all of which it has."""
        fields = row if isinstance(row, dict) else {}
        if self.prompts:
            found = prompt_columns(fields, asked=self.column)
            return [found] if found and all(name in fields for name in found) else []
        usual = [*PAIR_COLUMNS, *((name,) for name in TEXT_COLUMNS)]
        named = [columns_named(self.column, there=fields)] if self.column else usual
        return [names for names in named if len(names) in self.num_texts and all(name in fields for name in names)]


def _texts_in(value: Any) -> tuple[str, ...]:
    """Take a text, or the two or more of a list; none where it is anything else."""
    if isinstance(value, str):
        return (value,)
    found = tuple(value) if isinstance(value, list | tuple) and len(value) > 1 else ()
    return found if all(isinstance(text, str) for text in found) else ()


def _raw(texts: tuple[str, ...]) -> str | tuple[str, ...]:
    return texts[0] if len(texts) == 1 else texts


def _described(num_texts: Sequence[int]) -> str:
    return " or ".join({1: "a text", 2: "a pair of texts"}[number] for number in num_texts)


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


def _read(files: Sequence[Path | None], *, modality: str, stdin: BinaryIO, wanted: _Wanted) -> Iterator[Item]:
    for file in files:
        if modality == "image":
            yield _image_of(file, stdin)
        elif file is None:
            yield from _lines_of(stdin, wanted=wanted)
        else:
            yield from _texts_of(file, wanted=wanted)


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


def _lines_of(stdin: BinaryIO, *, wanted: _Wanted) -> Iterator[Item]:
    empty = True
    for number, line in enumerate(stdin, start=1):
        name = f"{STDIN}:{number}"
        try:
            item = _text_item(line.decode(), wanted=wanted, name=name)
        except UnicodeDecodeError as error:
            reason = f"line {number} of standard input is not UTF-8 ({error}); convert it first"
            item = Item(name, None, reason)
        if item.raw or item.error:
            empty = False
            yield item
    if empty:
        yield Item(STDIN, None, "standard input is empty; pipe texts into it, one a line")


def _texts_of(file: Path, *, wanted: _Wanted) -> Iterator[Item]:
    try:
        rows = list(_READERS[file.suffix.lower()](file))
    except DataError as error:
        yield Item(str(file), None, str(error))
        return
    except (OSError, csv.Error, ValueError) as error:
        reason = f"{file} cannot be read as {file.suffix}: {error}; save it as UTF-8 and check its end"
        yield Item(str(file), None, reason)
        return
    items = [_text_item(row, wanted=wanted, name=f"{file}:{number}") for number, row in rows]
    items = [item for item in items if item.raw or item.error]
    items = items or [Item(str(file), None, f"{file} holds no text; give one that does, or leave it out")]
    # Where no row has a column for a text, the file as a whole is at fault, which is said once.
    yield from items if any(isinstance(row, str | list) or wanted.columns(row) for _, row in rows) else items[:1]


def _text_item(row: Any, *, wanted: _Wanted, name: str) -> Item:
    try:
        texts = _columns_of(row, wanted=wanted, where=name) if isinstance(row, dict) else _texts_of_line(row, wanted)
        texts = (prompt_of(texts),) if wanted.prompts else texts
        "".join(texts).encode()
    except InputError as error:
        return Item(name, None, str(error))
    except UnicodeEncodeError as error:  # JSON can hold half a character: "\ud83d"
        return Item(name, None, f"{name} is no valid Unicode text ({error}); replace it")
    texts = tuple(text.strip() for text in texts)
    if texts and not any(texts):
        return Item(name, "")
    if len(texts) not in wanted.num_texts:
        hint = "; put a tab between the two, or give a list of two in JSON" if 2 in wanted.num_texts else ""
        takes = f"this run's model takes {_described(wanted.num_texts)}{hint}"
        return Item(name, None, f"{name} holds {len(texts) or 'no'} text{'s' * (len(texts) != 1)}; {takes}")
    return Item(name, _raw(texts))


def _texts_of_line(row: Any, wanted: _Wanted) -> tuple[str, ...]:
    """Take the texts of a line or a JSON value; a tab is part of a text where the run has no pairs."""
    if isinstance(row, str) and 2 in wanted.num_texts:
        return tuple(row.strip().split("\t"))
    return _texts_in(row)


def _columns_of(row: dict[str, Any], *, wanted: _Wanted, where: str) -> tuple[str, ...]:
    """Take the text, or the texts of a pair, out of a table's row."""
    present = wanted.columns(row)
    for names in present:
        if all(isinstance(row[name], str) for name in names):
            return tuple(row[name] for name in names)
    if not present:
        usual = [", ".join(TEXT_COLUMNS)] * (1 in wanted.num_texts)
        usual += [", ".join(map(" and ".join, PAIR_COLUMNS))] * (2 in wanted.num_texts)
        columns = f"text column {wanted.column!r}" if wanted.column else f"text column (looked for {', '.join(usual)})"
        raise InputError(f"{where} has no {columns}, only {', '.join(map(str, row)) or 'nothing'}; rename one")
    odd = next(name for name in present[0] if not isinstance(row[name], str))
    if row[odd] is None:
        raise InputError(f"{where} holds no text in its column {odd}; fill it in, or remove the row")
    raise InputError(
        f"{where} must hold a string in its column {odd}, got {json.dumps(row[odd])[:40]}; "
        "put it in quotes, or remove the row"
    )


def _lines(file: Path) -> Iterator[tuple[int, Any]]:
    yield from enumerate(read_text(file).split("\n"), start=1)  # splitlines() would end a line at U+2028 too


def _json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(file):
        if line.strip():
            yield number, json.loads(line)


def _json(file: Path) -> Iterator[tuple[int, Any]]:
    rows = json.loads(read_text(file))
    if not isinstance(rows, list):
        raise ValueError(f"it must hold a list of texts or of objects, got {type(rows).__name__}")
    yield from enumerate(rows, start=1)


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".txt": _lines,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": records,
    ".tsv": records,
}
