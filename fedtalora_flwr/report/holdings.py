"""Show who holds how much of which classes: a table, a page, a picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from rich.table import Table
from rich.text import Text

from fedtalora_flwr.report import figures
from fedtalora_flwr.report.html import Picture, picture, render, write_whole


def _holdings(class_counts: ArrayLike, tasks: Sequence[Sequence[int]]) -> list[list[str]]:
    """Return a row a client: examples (classes) of each task, and of all tasks."""
    counts = np.asarray(class_counts)
    groups = [*(list(task) for task in tasks), [c for task in tasks for c in task]]
    held = [[row[group] for group in groups] for row in counts]
    return [[f"{h.sum():,} ({(h > 0).sum()})" if h.any() else "·" for h in row] for row in held]


def data_table(class_counts: ArrayLike, *, tasks: Sequence[Sequence[int]], title: str = "") -> Table:
    """Return a rich table: how many examples, and of how many classes, each client holds of each task.

    Parameters
    ----------
    class_counts
        (num_partitions, num_classes), training examples.
    tasks
        Class ids of each task.
    title
        Stands above the table.
    """
    table = Table(title=Text(title) if title else None, title_justify="left")
    table.caption = "training examples (classes) that each client holds of each task"
    table.add_column("client", justify="right")
    for task in range(len(tasks)):
        table.add_column(f"task {task + 1}", justify="right")
    table.add_column("all", justify="right", style="bold")
    for client, cells in enumerate(_holdings(class_counts, tasks)):
        table.add_row(str(client), *cells)
    return table


def write_data_page(
    path: Path | str,
    *,
    class_counts: ArrayLike,
    tasks: Sequence[Sequence[int]],
    class_names: Sequence[str],
    partition_hashes: Sequence[str] = (),
    title: str = "Who holds which classes",
) -> Path:
    """Write the map of classes and clients as a page (``.html``) or a picture (``.png``, ``.svg``).

    Parameters
    ----------
    path
        Its ending decides what is written.
    class_counts
        (num_partitions, num_classes), training examples.
    tasks
        Class ids of each task.
    class_names
        (num_classes,).
    partition_hashes
        (num_partitions,), or none.
    title
        Heads the page.

    Raises
    ------
    ValueError
        If the ending is another.
    """
    target = Path(path)
    kind = target.suffix.lower().lstrip(".")
    if kind in ("png", "svg"):
        target.parent.mkdir(parents=True, exist_ok=True)
        figures.to_file(figures.class_map(class_counts, tasks=tasks, class_names=class_names), target, kind)
        return target
    if kind != "html":
        raise ValueError(f"the map of classes is written as .html, .png or .svg, got {target.name!r}")
    holdings = _holdings(class_counts, tasks)
    hashes = [*partition_hashes, *["–"] * (len(holdings) - len(partition_hashes))]
    num_examples = int(sum(np.asarray(class_counts)[:, list(task)].sum() for task in tasks))
    return write_whole(
        target,
        render(
            "data.html.j2",
            title=title,
            subtitle=f"{len(holdings)} clients · {len(tasks)} tasks · "
            f"{sum(len(task) for task in tasks)} classes · {num_examples:,} training examples",
            drawn=class_picture(class_counts, tasks, class_names),
            tasks=[[class_names[c] for c in task] for task in tasks],
            rows=[
                {"client": f"client {client}", "cells": cells, "hash": hashes[client]}
                for client, cells in enumerate(holdings)
            ],
        ),
    )


def class_picture(class_counts: ArrayLike, tasks: Sequence[Sequence[int]], class_names: Sequence[str]) -> Picture:
    """Draw who holds which classes, with the words that explain it."""
    counts = np.asarray(class_counts)
    names = [*class_names, *(f"class {c}" for c in range(len(class_names), counts.shape[1]))]
    caption = (
        "Rows are clients, columns are classes, grouped by the task that brings them. A cell is the number "
        "of training examples of the class that the client holds; an empty cell is none."
        if figures.shows_classes(counts, tasks=tasks)
        else "Rows are clients, columns are tasks. A cell is the number of training examples of the task's "
        "classes that the client holds, in brackets of how many of its classes; an empty cell is none."
    )
    figure = figures.class_map(counts, tasks=tasks, class_names=names)
    return picture(figure, name="classes", title="Classes by client and task", caption=caption, wide=True)
