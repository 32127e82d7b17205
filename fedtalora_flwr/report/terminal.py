"""Show one run in a terminal."""

import math

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtalora_flwr.report.measures import MEASURES, points
from fedtalora_flwr.run_folder.reader import RunRecord


def print_table(run: RunRecord, console: Console) -> None:
    """Print what a run came to: its accuracy matrix, where it has one that fits, and its headline numbers."""
    accuracy = run.accuracy()
    if np.isfinite(accuracy).any() and len(accuracy) <= 12:
        table = Table(title="accuracy (%) on the test data of each task", title_justify="left")
        table.add_column("after")
        for task in range(len(accuracy)):
            table.add_column(f"T{task + 1}", justify="right")
        table.add_column("all seen", justify="right", style="bold")
        seen = (*run.accuracy_seen(), *[math.nan] * len(accuracy))
        for task, row in enumerate(accuracy):
            if np.isfinite(row).any():
                cells = ["" if math.isnan(a) else points(a) for a in row]
                table.add_row(f"task {task + 1}", *cells, points(seen[task]))
        console.print(table)
    summary = Table.grid(padding=(0, 2))
    if run.state != "complete":
        summary.add_row("state", Text(run.state, style="bold red"))
    for measure in MEASURES:
        summary.add_row(measure.label, Text(measure.text(run.metric(measure.key)), style="bold"))
    console.print(summary)
    for note in run.notes:
        console.print(Text(note, style="yellow"))
