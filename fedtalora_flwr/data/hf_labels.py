"""Labels of a table of Hugging Face `datasets`, and its rows that have no label or nothing to learn from."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtalora_flwr.data.source import DataError, Ints
from fedtalora_flwr.data.tables import place_of

if TYPE_CHECKING:
    from datasets import Dataset

_WHOLE = re.compile(r"(-?\d+)(?:[.,]0+)?")  # as spreadsheets may write a whole number
_MOST_NAMED = 5
_BLOCK = 10_000  # rows at a time
LEAVE_OUT = ", or leave them out by bad-files=skip"


@dataclass(frozen=True)
class Table:
    """Rows, and how messages name them.

    Parameters
    ----------
    rows
        The rows.
    name
        Of the whole.
    files
        What they were read from, in order; none where no editor shows them.
    kept
        (N,) their numbers in these files, where some were left out.
    """

    rows: "Dataset"
    name: str
    files: tuple[Path, ...] = ()
    kept: Ints | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, row: int) -> str:
        """Say where a row stands, as an editor numbers it."""
        return place_of(self.files, int(row if self.kept is None else self.kept[row]))

    def without(self, rows: Ints) -> "Table":
        """Leave rows out."""
        kept = np.setdiff1d(np.arange(len(self)), rows)
        numbers = kept if self.kept is None else self.kept[kept]
        return replace(self, rows=self.rows.select(kept), kept=numbers)


def column_values(rows: "Dataset", column: str) -> Any:
    """Read one column alone, as an Arrow array: nothing else is touched."""
    return rows.select_columns([column]).with_format("arrow")[:][column].combine_chunks()


def is_integer(values: Any) -> bool:
    """Tell a column of integers."""
    return str(values.type).startswith(("int", "uint"))


def blank_rows(table: Table, column: str) -> np.ndarray:
    """Tell the rows whose text is absent or blank: (N,) bool."""
    return np.array([not (text or "").strip() for text in _texts_of(table, column)], dtype=bool)


def _texts_of(table: Table, column: str) -> Iterator[str | None]:
    """Read texts block by block: a column of them may be too large for memory."""
    for block in table.rows.select_columns([column]).with_format("arrow").iter(_BLOCK):
        yield from block[column].to_pylist()


def _without_text(table: Table, columns: Sequence[str]) -> list[tuple[str, np.ndarray]]:
    """Find the rows that lack a text, by column, and those whose texts are all blank."""
    if not columns:
        return []
    absent = {column: np.array([text is None for text in _texts_of(table, column)]) for column in columns}
    blank = np.logical_and.reduce([blank_rows(table, column) for column in columns])
    blank &= ~np.logical_or.reduce([*absent.values()])
    named = " and ".join(map(repr, columns))
    faults = [(f"column {column!r} of {table.name} holds no text", rows) for column, rows in absent.items()]
    return [*faults, (f"column {named} of {table.name} is blank", blank)]


def without_bad_rows(
    table: Table,
    *,
    label: str,
    texts: Sequence[str] = (),
    read: Callable[[Ints], Sequence[Any]] | None = None,
    bad_files: str = "",
) -> tuple[Table, tuple[str, ...]]:
    """Find all rows that cannot be used, and leave them out or refuse the table.

    Parameters
    ----------
    table
        The rows.
    label
        Column of labels: an empty one, or a number below 0, is none.
    texts
        Columns of texts: none may be absent, as JSON's null is, and one of them must not be blank.
    read
        Reads inputs: each is tried.
    bad_files
        ``skip`` leaves bad rows out.

    Returns
    -------
    The others, and a line on those that are left out.

    Raises
    ------
    DataError
        If there are bad rows and they are not left out, or nothing is left.
    """
    import datasets

    values, what = column_values(table.rows, label), f"label column {label!r} of {table.name}"
    named = isinstance(table.rows.features[label], datasets.ClassLabel)  # whose range `read_labels` knows
    faults = [(f"{what} is empty", _empty_labels(table, label, values))]
    if not named and (below := _below_zero(values)).any():
        least = int(np.flatnonzero(below)[0])
        faults.append((f"{what} must be at least 0, got {values[least].as_py():g}", below))
    faults += _without_text(table, texts)
    if read is not None:
        broken = np.array([not _readable(read, row) for row in range(len(table))])
        faults.append((f"the image of {table.name} cannot be read", broken))
    faults = [(text, rows) for text, rows in faults if rows.any()]
    if not faults:
        return table, ()
    said = "; ".join(f"{text} in {_listed(table, np.flatnonzero(rows))}" for text, rows in faults)
    if bad_files != "skip":
        raise DataError(f"{said}; correct or remove these rows{LEAVE_OUT if bad_files else ''}")
    bad = np.flatnonzero(np.logical_or.reduce([rows for _, rows in faults]))
    if len(bad) == len(table):
        raise DataError(f"{said}: no row of {table.name} is left")
    return table.without(bad), (f"{len(bad)} row{'s are' if len(bad) > 1 else ' is'} left out: {said}",)


def read_labels(table: Table, column: str) -> tuple[Ints, tuple[str, ...]]:
    """Turn a column of ClassLabel, whole numbers, booleans or strings into class ids and the classes' names.

    Whole numbers may be written with a fraction of 0, as spreadsheets do: 1.0 is class 1.

    Raises
    ------
    DataError
        If it holds anything else, or numbers outside its ClassLabel.
    """
    import datasets

    values, what = column_values(table.rows, column), f"label column {column!r} of {table.name}"
    feature = table.rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        numbers = values.to_numpy().astype(np.int64)
        _require_range(numbers, len(feature.names), what, table)
        return numbers, tuple(feature.names)
    if is_integer(values) or _is_float(values):
        numbers = values.to_numpy()
        if broken := np.flatnonzero(numbers != np.trunc(numbers)).tolist():
            raise DataError(
                f"{what} holds {numbers[broken[0]]:g} in {_listed(table, broken)}: a number with a fraction names no "
                "class; set label-column to a column of classes"
            )
        present, labels = np.unique(numbers.astype(np.int64), return_inverse=True)
        return labels.astype(np.int64), tuple(map(str, present.tolist()))
    if str(values.type) in ("bool", "string", "large_string"):
        texts = [str(value) for value in values.to_pylist()]
        whole = [match for text in texts if (match := _WHOLE.fullmatch(text))]
        as_numbers = len(whole) == len(texts) and any(match[1] != match[0] for match in whole)
        texts = [match[1] for match in whole] if as_numbers else texts
        names = sorted(set(texts), key=int if as_numbers else None)
        id_of = {name: class_id for class_id, name in enumerate(names)}
        return np.array([id_of[text] for text in texts], dtype=np.int64), tuple(id_of)
    raise DataError(
        f"{what} holds {values.type}; it must hold one class a row, as an integer or a string: "
        "set label-column to such a column"
    )


def _is_float(values: Any) -> bool:
    return str(values.type) in ("halffloat", "float", "double")


def _empty_labels(table: Table, column: str, values: Any) -> np.ndarray:
    if str(values.type) in ("string", "large_string"):
        return blank_rows(table, column)
    empty: np.ndarray = values.is_null(nan_is_null=True).to_numpy(zero_copy_only=False)
    return empty


def _below_zero(values: Any) -> np.ndarray:
    if not is_integer(values) and not _is_float(values):
        return np.zeros(len(values), dtype=bool)
    below: np.ndarray = values.to_numpy(zero_copy_only=False) < 0
    return below


def _readable(read: Callable[[Ints], Sequence[Any]], row: int) -> bool:
    try:
        read(np.array([row]))
    except DataError:
        return False
    return True


def _listed(table: Table, rows: Sequence[int] | Ints) -> str:
    """Name the first of these rows, and say how many more there are: ``rows 4, 9, 12, 13, 20 and 7 more``."""
    places = [table.place(row) for row in rows[:_MOST_NAMED]]
    kind = places[0].partition(" ")[0]
    listed = places[0] if len(places) == 1 else f"{kind}s " + ", ".join(p.removeprefix(f"{kind} ") for p in places)
    return listed + (f" and {len(rows) - _MOST_NAMED} more" if len(rows) > _MOST_NAMED else "")


def _require_range(numbers: Ints, num_classes: int, what: str, table: Table) -> None:
    wrong = np.flatnonzero((numbers < 0) | (numbers >= num_classes))
    if len(wrong):
        raise DataError(
            f"{what} must be in [0, {num_classes - 1}] (its ClassLabel), got {numbers[wrong[0]]} in "
            f"{_listed(table, wrong)}; correct or remove these rows"
        )
