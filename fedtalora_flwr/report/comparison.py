"""Put runs side by side, in a terminal and on a page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fedtalora_flwr.report import figures
from fedtalora_flwr.report.html import picture, render, write_whole
from fedtalora_flwr.report.measures import MEASURES, points
from fedtalora_flwr.run_folder.reader import NOT_A_SETTING_OF_THE_METHOD, RunRecord, read_run, setting_text


@dataclass(frozen=True)
class Comparison:
    """Hold runs side by side; `table` is for a rich console.

    Parameters
    ----------
    runs
        In the order given.
    names
        What each is called, told apart where folders share a name.
    differing
        Settings that are not the same in all runs, each with its value in every run.
    notes
        What a reader should know before he trusts the numbers.
    """

    runs: tuple[RunRecord, ...]
    names: tuple[str, ...]
    differing: tuple[tuple[str, tuple[str, ...]], ...]
    notes: tuple[str, ...]

    def results(self) -> list[dict[str, Any]]:
        """Return a row a run: its name and its numbers as text, the best of a kind marked."""
        best = {}
        for measure in MEASURES:
            values = [run.metric(measure.key) for run in self.runs if run.state == "complete"]
            values = [value for value in values if not math.isnan(value)]
            if measure.best and len(set(values)) > 1:
                best[measure.key] = measure.best(values)
        return [
            {
                "name": name if run.state == "complete" else f"{name} ({run.state})",
                "cells": [
                    {
                        "text": measure.text(value := run.metric(measure.key)),
                        "best": run.state == "complete" and best.get(measure.key) == value,
                    }
                    for measure in MEASURES
                ],
            }
            for name, run in zip(self.names, self.runs, strict=True)
        ]

    def table(self) -> Group:
        """Return notes and tables for a rich console: results, accuracy over tasks, settings that differ."""
        return Group(
            *(Text(note, style="yellow") for note in self.notes),
            self._results_table(),
            self._curves_table(),
            self._settings_table(),
        )

    def _results_table(self) -> Table:
        table = Table(title="results", title_justify="left")
        table.add_column("run", overflow="fold")
        for measure in MEASURES:
            table.add_column(measure.label, justify="right")
        for row in self.results():
            cells = [Text(cell["text"], style="bold" if cell["best"] else "") for cell in row["cells"]]
            table.add_row(Text(row["name"]), *cells)
        return table

    def _curves_table(self) -> Table:
        num_tasks = max(run.num_tasks for run in self.runs)
        step = math.ceil(num_tasks / 10)
        tasks = sorted({*range(0, num_tasks, step), num_tasks - 1})
        table = Table(title="accuracy (%) on all classes seen, after task", title_justify="left")
        table.add_column("run", overflow="fold")
        for task in tasks:
            table.add_column(f"{task + 1}", justify="right")
        for name, run in zip(self.names, self.runs, strict=True):
            seen = (*run.accuracy_seen(), *[math.nan] * num_tasks)
            table.add_row(Text(name), *(points(seen[task]) for task in tasks))
        return table

    def _settings_table(self) -> Table | Text:
        if not self.differing:
            return Text("The runs have the same settings.")
        table = Table(title="settings that differ", title_justify="left")
        table.add_column("setting")
        for name in self.names:
            table.add_column(Text(name), overflow="fold")
        for key, values in self.differing:
            table.add_row(Text(key), *(Text(value) for value in values))
        return table


def compare(
    paths: Sequence[Path | str], *, allow_different_partitions: bool = False, out: Path | None = None
) -> Comparison:
    """Put runs side by side; print the result with a rich console.

    Parameters
    ----------
    paths
        Two run folders or more.
    allow_different_partitions
        Compare runs whose clients did not hold the same data.
    out
        HTML page to write as well.

    Raises
    ------
    ValueError
        If there are fewer than two runs, or they differ in their partitions and that is not allowed.
    FileNotFoundError, ValueError
        As `read_run`.
    """
    if len(paths) < 2:
        raise ValueError(f"compare needs two run folders or more, got {len(paths)}")
    runs = tuple(read_run(path) for path in paths)
    names = _distinct_names(runs)
    notes = [f"{name} is {run.state}." for name, run in zip(names, runs, strict=True) if run.state != "complete"]
    hashes = [run.manifest.get("partition_hash") for run in runs]
    if len(set(hashes)) > 1 or None in hashes:
        listed = ", ".join(
            f"{name}: {str(h)[:12] if h else 'no partition hash'}" for name, h in zip(names, hashes, strict=True)
        )
        if not allow_different_partitions:
            raise ValueError(
                f"the clients of these runs did not hold the same data ({listed}), so their numbers say "
                "little about the methods; pass --allow-different-partitions to compare them all the same"
            )
        notes.append(f"The clients of these runs did not hold the same data ({listed}).")
    keys = sorted({key for run in runs for key in run.config} - NOT_A_SETTING_OF_THE_METHOD)
    values = {key: tuple(setting_text(run.config.get(key, "–")) for run in runs) for key in keys}
    differing = tuple((key, row) for key, row in values.items() if len(set(row)) > 1)
    comparison = Comparison(runs, names, differing, tuple(notes))
    if out is not None:
        write_whole(Path(out), comparison_page(comparison))
    return comparison


def _distinct_names(runs: Sequence[RunRecord]) -> tuple[str, ...]:
    """Name each run by as few trailing parts of its path as tell them apart."""
    depth = max(len(run.path.parts) for run in runs)
    for kept in range(1, depth + 1):
        names = tuple("/".join(run.path.parts[-kept:]) for run in runs)
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"compare needs different runs, got {runs[0].path} more than once")


def comparison_page(comparison: Comparison) -> str:
    """Give a page of runs side by side, as HTML."""
    curves = {n: r.accuracy_seen() for n, r in zip(comparison.names, comparison.runs, strict=True)}
    num_tasks = max(run.num_tasks for run in comparison.runs)
    return render(
        "compare.html.j2",
        title=f"{len(comparison.runs)} runs compared",
        subtitle=" · ".join(comparison.names),
        notes=comparison.notes,
        columns=[measure.label for measure in MEASURES],
        results=comparison.results(),
        differing=comparison.differing,
        pictures=[
            picture(
                figures.accuracy_over_tasks(curves, num_tasks=num_tasks),
                name="seen",
                title="Accuracy over the stream",
                caption="Per cent of the test data of all classes seen so far that each run's model gets "
                "right after each task. The last point of a line is its FAA, the mean of its points its AIA. "
                "The axis shows the part of the scale where they are.",
                wide=True,
            )
        ],
    )
