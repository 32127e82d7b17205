"""Instructions: what a language model is asked, and the answer that it should give.

A table has a column of answers, one of instructions, and maybe one of context that belongs to the instruction.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from fedtalora_flwr.data.hf_labels import Table, blank_rows
from fedtalora_flwr.data.source import DataError, Ints

PROMPT_COLUMNS = ("instruction", "prompt", "question", "input")
CONTEXT_COLUMN = "context"


@dataclass(frozen=True)
class Instruction:
    """One example.

    Parameters
    ----------
    prompt
        What is asked; a context stands behind the instruction, after an empty line.
    answer
        What should be answered; empty where nobody knows.
    """

    prompt: str
    answer: str = ""


def prompt_columns(names: Collection[str], *, asked: str) -> tuple[str, ...]:
    """Choose the columns that make up a prompt: those asked for, joined by commas, or the usual ones that are there."""
    if asked:
        return tuple(name.strip() for name in asked.split(",") if name.strip())
    found = next((name for name in PROMPT_COLUMNS if name in names), None)
    context = (CONTEXT_COLUMN,) if CONTEXT_COLUMN in names else ()
    return () if found is None else (found, *context)


def prompt_of(texts: Iterable[str | None]) -> str:
    """Put the texts of a prompt's columns together, with an empty line between them; one may be empty."""
    return "\n\n".join(text.strip() for text in texts if text and text.strip())


def instruction_reader(
    table: Table, *, input_column: str, answer_column: str
) -> Callable[[Ints], Sequence[Instruction]]:
    """Give what reads rows of a table as instructions; both columns are looked through here, so that a hole is found.

    Raises
    ------
    DataError
        If there is no such column, one holds no texts, or a prompt or an answer is empty.
    """
    rows, where = table.rows, table.name
    columns, there = prompt_columns(rows.column_names, asked=input_column), ", ".join(rows.column_names)
    if not columns:
        raise DataError(
            f"{where} has no column with a usual name for instructions ({', '.join(PROMPT_COLUMNS)}); it has {there}; "
            "set input-column to one of them, or to several joined by a comma"
        )
    for key, column in (*(("input-column", column) for column in columns), ("answer-column", answer_column)):
        if column not in rows.column_names:
            raise DataError(f"{key} {column!r}: {where} has no such column; it has {there}")
    for column in (columns[0], answer_column):
        _require_texts(table, column)
    texts = rows.select_columns([*columns, answer_column])

    def read(numbers: Ints) -> Sequence[Instruction]:
        found = texts[[int(number) for number in numbers]]
        prompts = zip(*(found[column] for column in columns), strict=True)
        return [
            Instruction(prompt_of(texts), answer.strip())
            for texts, answer in zip(prompts, found[answer_column], strict=True)
        ]

    return read


def _require_texts(table: Table, column: str) -> None:
    kind = str(table.rows.features[column].dtype)
    if kind not in ("string", "large_string"):
        raise DataError(f"column {column!r} of {table.name} holds {kind}; instructions and answers are texts")
    empty = blank_rows(table, column).nonzero()[0].tolist()
    if empty:
        raise DataError(
            f"column {column!r} of {table.name} is empty in {table.place(empty[0])} ({len(empty)} such rows); remove "
            "these rows"
        )
