"""Rows of Hugging Face `datasets` as a `Source`: find the columns, decode inputs on demand.

`datasets` is imported inside the functions, as in `hf_load`.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from fedtalora_flwr.data.hf_labels import Table, column_values, is_integer, read_labels, without_bad_rows
from fedtalora_flwr.data.images import decode_image
from fedtalora_flwr.data.instructions import instruction_reader
from fedtalora_flwr.data.source import NO_ROWS, DataError, Ints, Modality, Source, Split, join_classes

if TYPE_CHECKING:
    from datasets import Dataset

_Kind = tuple[Modality, int]  # what an input is, and of how many columns

_IMAGE_COLUMNS = ("image", "img", "picture", "photo", "jpg", "jpeg", "png")
TEXT_COLUMNS = ("text", "sentence", "utterance", "query", "question", "content", "review")
PAIR_COLUMNS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
)
_LABEL_COLUMNS = ("label", "labels", "fine_label", "intent", "class", "category", "target")
_TEST_SPLITS = ("test", "validation", "valid", "val", "dev")


def source_from_splits(
    name: str,
    splits: Mapping[str, "Dataset"],
    *,
    input_column: str,
    label_column: str,
    answer_column: str = "",
    files: Mapping[str, Sequence[Path]] = MappingProxyType({}),
    bad_files: str = "",
) -> Source:
    """Make a source of a training split and the first labelled test or validation split.

    Parameters
    ----------
    name
        What to call the data in messages: a path or hub name.
    splits
        Tables by split name; ``train`` is required.
    input_column, label_column
        Columns to use; empty: found by their usual names. Two with a comma between them are a pair of texts.
    answer_column
        Column of answers, where the inputs are instructions; empty: they are not.
    files
        What each split was read from, so that messages number a row as an editor does.
    bad_files
        What is done about rows without a label or an input: ``error`` or ``skip``; empty: inputs are not looked
        through, and a row without a label is an error.

    Raises
    ------
    DataError
        If there is no training split, no such column, or a label or input is missing or of the wrong kind.
    """
    if "train" not in splits:
        raise DataError(f"{name} has no split named train, only {', '.join(splits)}; rename one to train")
    columns = _Columns(input_column, label_column, answer_column)

    def opened(split_name: str) -> _Opened:
        table = Table(splits[split_name], f"{name} ({split_name})", tuple(files.get(split_name, ())))
        return _read_split(table, columns, bad_files)

    train = opened("train")
    modality, num_texts = train.kind
    source = Source(
        name, modality, train.names, train=train.split, test=NO_ROWS, num_texts=(num_texts,), remarks=train.remarks
    )
    for split_name in _TEST_SPLITS:
        if split_name not in splits or _is_unlabelled(splits[split_name], label_column):
            continue
        test = opened(split_name)
        if test.kind != train.kind:
            raise DataError(
                f"{name}: training inputs are of kind {_called(train.kind)}, those of {split_name} of kind "
                f"{_called(test.kind)}; set input-column to what is in both"
            )
        class_names, split = join_classes(train.names, test.split, test.names)
        return replace(source, class_names=class_names, test=split, remarks=train.remarks + test.remarks)
    return source


def _called(kind: "_Kind") -> str:
    modality, num_texts = kind
    return "pair of texts" if num_texts == 2 else modality


@dataclass(frozen=True)
class _Columns:
    """Columns to use; empty: found by their usual names, but for answers, which only instructions have."""

    inputs: str
    label: str
    answer: str


@dataclass(frozen=True)
class _Opened:
    """A split as it is read, the classes' names, and what is odd about it."""

    kind: "_Kind"
    split: Split
    names: tuple[str, ...]
    remarks: tuple[str, ...]


def _read_split(table: Table, columns: _Columns, bad_files: str) -> _Opened:
    if len(table) == 0:
        raise DataError(f"{table.name} has no rows; check that the file is complete")
    column = _find_label_column(table.rows, table.name, columns.label)
    if columns.answer:
        table, remarks = without_bad_rows(table, label=column)
        ask = instruction_reader(table, input_column=columns.inputs, answer_column=columns.answer)
        labels, class_names = read_labels(table, column)
        return _Opened(("instruction", 1), Split(labels=labels, read=ask), class_names, remarks)
    modality, inputs = _find_input_columns(table.rows, table.name, columns.inputs, not_this=column)

    def reader(table: Table) -> Callable[[Ints], Sequence[Any]]:
        if modality == "image":
            return _image_reader(table, inputs[0])
        readers = [_text_reader(table, column) for column in inputs]
        return readers[0] if len(readers) == 1 else _pair_reader(readers)

    texts = inputs if modality == "text" and bad_files else ()
    read = reader(table) if modality == "image" and bad_files == "skip" else None
    table, remarks = without_bad_rows(table, label=column, texts=texts, read=read, bad_files=bad_files)
    labels, class_names = read_labels(table, column)
    return _Opened((modality, len(inputs)), Split(labels=labels, read=reader(table)), class_names, remarks)


def _describe_columns(rows: "Dataset") -> str:
    return ", ".join(f"{name} ({_describe(feature)})" for name, feature in rows.features.items())


def _describe(feature: Any) -> str:
    kind: str = type(feature).__name__
    return str(feature.dtype) if kind == "Value" else kind


def _named_column(rows: "Dataset", where: str, column: str, key: str) -> str:
    if column not in rows.features:
        raise DataError(f"{key} {column!r}: {where} has no such column; it has {_describe_columns(rows)}")
    return column


def _find_label_column(rows: "Dataset", where: str, label_column: str) -> str:
    import datasets

    if label_column:
        return _named_column(rows, where, label_column, "label-column")
    by_name = [column for column in _LABEL_COLUMNS if column in rows.features]
    by_type: list[str] = [column for column, f in rows.features.items() if isinstance(f, datasets.ClassLabel)]
    if by_name:
        return by_name[0]
    if len(by_type) == 1:
        return by_type[0]
    raise DataError(
        f"{where} has no column with a usual name for labels ({', '.join(_LABEL_COLUMNS)}); "
        f"it has {_describe_columns(rows)}; set label-column to one of them"
    )


def columns_named(input_column: str, *, there: Container[str]) -> tuple[str, ...]:
    """Read ``input-column``: one column, whose own name may hold a comma, or two with a comma between them."""
    return (input_column,) if input_column in there else tuple(name.strip() for name in input_column.split(","))


def _find_input_columns(
    rows: "Dataset", where: str, input_column: str, *, not_this: str
) -> tuple[Literal["image", "text"], tuple[str, ...]]:
    images = [column for column, feature in rows.features.items() if _is_image(feature)]
    texts = [
        column
        for column, feature in rows.features.items()
        if _describe(feature) in ("string", "large_string") and column != not_this
    ]
    if input_column:
        named = columns_named(input_column, there=rows.features)
        columns = tuple(_named_column(rows, where, column, "input-column") for column in named)
        if len(columns) == 1 and columns[0] in images:
            return "image", columns
        if len(set(columns)) == len(columns) <= 2 and set(columns) <= set(texts):
            return "text", columns
        held = ", ".join(_describe(rows.features[column]) for column in columns)
        raise DataError(
            f"input-column {input_column!r} of {where} holds {held}, neither images nor text nor two different texts; "
            f"the columns are {_describe_columns(rows)}"
        )
    for column in (*(c for c in _IMAGE_COLUMNS if c in images), *(images if len(images) == 1 else ())):
        return "image", (column,)
    for pair in PAIR_COLUMNS:
        if set(pair) <= set(texts):
            return "text", pair
    for column in (*(c for c in TEXT_COLUMNS if c in texts), *(texts if len(texts) == 1 else ())):
        return "text", (column,)
    raise DataError(
        f"{where} has no column with a usual name for images ({', '.join(_IMAGE_COLUMNS)}) or text "
        f"({', '.join(TEXT_COLUMNS)}) that holds such; it has {_describe_columns(rows)}; "
        "set input-column to one of them, or to two of texts, as a,b"
    )


def _is_image(feature: Any) -> bool:
    """Tell images from other columns, also where a Parquet file carries no Hugging Face metadata."""
    import datasets

    if isinstance(feature, dict):
        return "bytes" in feature
    return isinstance(feature, datasets.Image) or _describe(feature) in ("binary", "large_binary")


def _image_reader(table: Table, column: str) -> Callable[[Ints], Sequence[Any]]:
    import datasets

    encoded = table.rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))

    def read(numbers: Ints) -> Sequence[Any]:
        images = []
        for number, record in zip(numbers, encoded[[int(n) for n in numbers]][column], strict=True):
            record = record or {}
            path, content = record.get("path"), record.get("bytes")
            if content is None and path:
                content = Path(path)
            named = f"{table.place(number)} of {table.name}" + (f", file {path}" if path else "")
            if content is None:
                raise DataError(f"{named} holds no image; remove the row")
            images.append(decode_image(content, where=named))
        return images

    return read


def _text_reader(table: Table, column: str) -> Callable[[Ints], Sequence[Any]]:
    texts = table.rows.select_columns([column])

    def read(numbers: Ints) -> Sequence[Any]:
        found: list[str | None] = list(texts[[int(n) for n in numbers]][column])
        if None in found:
            place = table.place(numbers[found.index(None)])
            raise DataError(f"{place} of {table.name} holds no text in column {column!r}; remove the row")
        return found

    return read


def _pair_reader(readers: Sequence[Callable[[Ints], Sequence[Any]]]) -> Callable[[Ints], Sequence[Any]]:
    return lambda numbers: list(zip(*(read(numbers) for read in readers), strict=True))


def _is_unlabelled(rows: "Dataset", label_column: str) -> bool:
    """Tell test splits whose labels are withheld: the hub's convention is -1 in every row."""
    column = label_column or next((c for c in _LABEL_COLUMNS if c in rows.features), "")
    if column not in rows.features or len(rows) == 0:
        return False
    values = column_values(rows, column)
    return is_integer(values) and values.null_count == 0 and bool((values.to_numpy() == -1).all())
