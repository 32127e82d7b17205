"""Texts and tables as editors and spreadsheets write them: encoding, what parts the columns, which row is which.

Excel marks the start of ``CSV UTF-8``, writes ``Unicode text`` as UTF-16 with tabs, and parts columns by semicolons
where a comma is the decimal sign. An encoding of 8 bits that is not UTF-8 is named and not guessed: another guess would
be another class name, on one node of several.
"""

import codecs
import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import TextIO

from fedtalora_flwr.data.source import DataError

_MARKS = (  # UTF-32 first: its mark begins as that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
_SEPARATORS = (",", ";", "\t", "|")
_TOLD = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)  # Excel's first line, which it shows to nobody
_DECIMAL_COMMA = re.compile(r"-?\d+,\d+")
_SAMPLE = 200  # lines


@dataclass(frozen=True)
class Dialect:
    """How a CSV or TSV file is written.

    Parameters
    ----------
    encoding
        As Python names it.
    separator
        Between two columns.
    decimal
        The sign before the fraction of a number.
    num_skipped
        Lines before the header.
    """

    encoding: str
    separator: str
    decimal: str
    num_skipped: int


def encoding_of(file: Path) -> str:
    """Find how a file of text is encoded: UTF-8, or UTF-16 or UTF-32 by its mark or its zeros.

    Raises
    ------
    DataError
        If it is none of these; the message names the line.
    """
    with file.open("rb") as content:
        start = content.read(4096)
        for mark, encoding in _MARKS:
            if start.startswith(mark):
                return encoding
        if b"\0" in start:  # UTF-16 without a mark: of letters without accents every other byte is 0
            return "utf-16-be" if start[::2].count(0) > start[1::2].count(0) else "utf-16-le"
        content.seek(0)
        for number, line in enumerate(content, start=1):  # no character but the line's end holds its byte
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{file} is not UTF-8 (line {number}), but of an older encoding, such as Windows-1252 (Latin-1); "
                    "save it as UTF-8 (Excel: CSV UTF-8), or convert it: iconv -f WINDOWS-1252 -t UTF-8"
                ) from error
    return "utf-8"


def read_text(file: Path) -> str:
    """Read a file of text, whatever `encoding_of` finds.

    Raises
    ------
    DataError
        As `encoding_of`, or if the file ends within a character.
    """
    try:
        return file.read_text(encoding=encoding_of(file))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} cannot be read ({error}); save it as UTF-8") from error


def dialect_of(file: Path) -> Dialect:
    """Find how a CSV or TSV file is written, from its first lines.

    Of the signs that may part its columns it is the one by which most rows are as wide as the header.

    Raises
    ------
    DataError
        As `encoding_of`.
    """
    encoding = encoding_of(file)
    usual = "\t" if file.suffix.lower() == ".tsv" else ","
    with _opened(file, encoding) as content:
        lines = list(islice(content, _SAMPLE))
    told = _TOLD.fullmatch(lines[0]) if lines else None
    if told:
        separator, lines = told[1], lines[1:]
    else:
        separator = max(_SEPARATORS, key=lambda sign: _fit(lines, sign, usual=usual))
    fields = (field for row in _rows(lines, separator) for field in row)
    decimal = "," if separator != "," and any(map(_DECIMAL_COMMA.fullmatch, fields)) else "."
    return Dialect(encoding, separator, decimal, num_skipped=1 if told else 0)


def records(file: Path) -> Iterator[tuple[int, dict[str, str | None]]]:
    """Give the rows of a CSV or TSV file by column, each with its number in a spreadsheet, where the header's is 1.

    A row that is too short has None in its last columns; empty rows are counted and passed over.

    Raises
    ------
    DataError
        As `encoding_of`.
    csv.Error
        If a field is longer than Python's limit.
    """
    header: list[str] | None = None
    for number, _, row in _numbered(file):
        if header is None:
            header = row
        else:
            yield number, dict(zip_longest(header, row[: len(header)]))


def uneven_row(file: Path) -> str:
    """Name the first row with more fields than the header; empty where there is none."""
    width = 0
    for number, line, row in _numbered(file):
        width = width or len(row)
        if len(row) > width:
            return f"{_called(number, line)} has {len(row)} fields, the header {width}"
    return ""


def place_of(files: Sequence[Path], row: int) -> str:
    """Say where a row of tables that were read as one stands, as an editor numbers it.

    Parameters
    ----------
    files
        The tables in their order; none: nobody knows.
    row
        Its number among all rows, from 0, headers not counted.
    """
    remaining = row
    for file in files:
        places = _places(file)
        for place in places:
            if remaining == 0:
                return f"{place} of {file.name}" if len(files) > 1 else place
            remaining -= 1
    return f"row {row}"


def _places(file: Path) -> Iterator[str]:
    """Name the rows of a file in their order; those of no editor are not named."""
    kind = file.suffix.lower()
    if kind in (".csv", ".tsv"):
        yield from (_called(number, line) for number, line, _ in islice(_numbered(file), 1, None))
    elif kind == ".jsonl":
        with _opened(file, encoding_of(file)) as lines:
            yield from (f"line {number}" for number, line in enumerate(lines, start=1) if line.strip())


def _called(number: int, line: int) -> str:
    """Name a row; beside its number in a spreadsheet, the line in an editor of text where that is another."""
    return f"row {number}" if number == line else f"row {number} (line {line})"


def _numbered(file: Path) -> Iterator[tuple[int, int, list[str]]]:
    """Give the rows that are not empty, the header first: number in a spreadsheet, first line in the file, fields."""
    dialect = dialect_of(file)
    with _opened(file, dialect.encoding) as content:
        for _ in range(dialect.num_skipped):
            content.readline()
        reader, line = csv.reader(content, delimiter=dialect.separator), 1
        for number, row in enumerate(reader, start=1):
            if not _is_empty(row):
                yield number, line + dialect.num_skipped, row
            line = reader.line_num + 1


def _rows(lines: Iterable[str], separator: str) -> list[list[str]]:
    try:
        return [row for row in csv.reader(lines, delimiter=separator) if not _is_empty(row)]
    except csv.Error:  # of a field as long as no text is: the sign is another
        return []


def _is_empty(row: Sequence[str]) -> bool:
    """Tell what pandas takes for an empty line; one of separators alone is none."""
    return not row or (len(row) == 1 and not row[0].strip())


def _fit(lines: Iterable[str], separator: str, *, usual: str) -> tuple[float, bool, int]:
    """Say how well a sign parts the columns: the share of rows that are as wide as the header comes first."""
    rows = _rows(lines, separator)
    width = len(rows[0]) if rows else 0
    if width < 2:
        return 0.0, separator == usual, width
    return sum(len(row) == width for row in rows) / len(rows), separator == usual, width


def _opened(file: Path, encoding: str) -> TextIO:
    return file.open(encoding=encoding, newline="")
