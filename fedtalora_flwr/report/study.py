"""Show what a sweep came to: a table with mean and spread over the seeds, as CSV, as Markdown, on a page."""

import csv
import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from fedtalora_flwr.config.units import human_bytes
from fedtalora_flwr.report import figures
from fedtalora_flwr.report.html import Picture, picture, render, save, write_whole
from fedtalora_flwr.report.measures import duration, points
from fedtalora_flwr.run_folder.reader import RunRecord, number, read_run

_MOST_PICTURES = 24
_WIDE = 160  # characters that all columns need


@dataclass(frozen=True)
class Quantity:
    """A number of a finished run, and how it is worded over several.

    Parameters
    ----------
    key, label
        In CSV, and above a column.
    of
        Reads it from a run; NaN where the run has none.
    text
        Words a mean or a spread.
    worst
        Whether the largest over the seeds counts, not the mean.
    spread
        Whether the spread over the seeds is worth a word.
    brief
        Whether it stands in the main table of the page, and in that of a narrow terminal.
    """

    key: str
    label: str
    of: Callable[[RunRecord], float]
    text: Callable[[float], str]
    worst: bool = False
    spread: bool = True
    brief: bool = False

    def summary(self, values: Sequence[float]) -> str:
        """Word the values of a case's seeds: mean ± standard deviation, or the one there is."""
        mean, deviation = self.mean(values), spread(values)
        if math.isnan(mean):
            return "–"
        shown = self.spread and not self.worst and not math.isnan(deviation)
        return f"{self.text(mean)} ± {self.text(deviation)}" if shown else self.text(mean)

    def mean(self, values: Sequence[float]) -> float:
        """Give the mean, or the largest where the worst counts; NaN of nothing."""
        there = [value for value in values if not math.isnan(value)]
        return math.nan if not there else max(there) if self.worst else statistics.mean(there)


def spread(values: Sequence[float]) -> float:
    """Give the standard deviation; NaN of fewer than two numbers."""
    there = [value for value in values if not math.isnan(value)]
    return statistics.stdev(there) if len(there) > 1 else math.nan


def _last(key: str) -> Callable[[RunRecord], float]:
    return lambda run: number(run.rounds[-1].get(key)) if run.rounds else math.nan


def _largest(key: str) -> Callable[[RunRecord], float]:
    return lambda run: max((v for v in run.column(key).tolist() if not math.isnan(v)), default=math.nan)


def _least_after_the_first(key: str) -> Callable[[RunRecord], float]:
    return lambda run: min((v for v in run.column(key)[1:].tolist() if not math.isnan(v)), default=math.nan)


def _metric(key: str) -> Callable[[RunRecord], float]:
    return lambda run: run.metric(key)


FAA = Quantity("faa", "FAA (%)", _metric("faa"), points, brief=True)
FORGETTING = Quantity("forgetting", "forgetting (points)", _metric("forgetting"), points, brief=True)
FAA_LINEAR = Quantity("faa_linear", "FAA of the trained rows (%)", _last("accuracy_seen_linear"), points)
QUANTITIES = (
    FAA,
    Quantity("aia", "AIA (%)", _metric("aia"), points),
    FORGETTING,
    FAA_LINEAR,
    Quantity("bytes_up_total", "bytes up", _metric("bytes_up_total"), human_bytes, spread=False),
    Quantity("bytes_down_total", "bytes down", _metric("bytes_down_total"), human_bytes, spread=False),
    Quantity("cluster_accuracy", "slots in the cluster of their task (%)", _last("cluster_accuracy"), points),
    Quantity(
        "cluster_accuracy_least",
        "the least of it from round 2 on (%)",
        _least_after_the_first("cluster_accuracy"),
        points,
    ),
    Quantity("routing_accuracy", "inputs sent to the cluster of their task (%)", _last("routing_accuracy"), points),
    Quantity("accuracy_routed", "FAA, task not known (%)", _last("accuracy_routed"), points),
    Quantity("residual_norm", "residual norm", _last("residual_norm"), "{:.2g}".format, brief=True),
    Quantity("residual_norm_largest", "largest residual norm", _largest("residual_norm"), "{:.2g}".format),
    Quantity("exactness_error", "exactness error", _largest("exactness_error"), "{:.0e}".format, worst=True),
    Quantity("wall_seconds", "time", _metric("wall_seconds"), duration, spread=False),
)


@dataclass(frozen=True)
class Case:
    """The finished runs of one combination of the axes, a run a seed.

    Parameters
    ----------
    labels
        Its value on each axis.
    runs
        Seed -> run.
    """

    labels: tuple[str, ...]
    runs: Mapping[int, RunRecord]

    def values(self, quantity: Quantity) -> list[float]:
        """Give a quantity of every run."""
        return [quantity.of(run) for run in self.runs.values()]


@dataclass(frozen=True)
class Study:
    """What a sweep came to.

    Parameters
    ----------
    title, about
        Name, and what it is to answer.
    axes
        Names of the axes.
    compare
        Number of the axis whose values are set against its first one; None for none.
    first
        That first one, whether or not a run with it is finished; empty for none.
    cases
        Those of which a run is finished, in the order of the plan, but what is compared stands together.
    notes
        What a reader should know: failed runs, runs of several commits.
    """

    title: str
    about: str
    axes: tuple[str, ...]
    compare: int | None
    first: str
    cases: tuple[Case, ...]
    notes: tuple[str, ...]

    def quantities(self) -> list[Quantity]:
        """List the quantities that some run has."""
        known = {quantity.key for quantity in QUANTITIES} | {"num_rounds"}
        runs = [run for case in self.cases for run in case.runs.values()]
        others = sorted({key for run in runs for key in run.metrics or {}} - known)
        more = [Quantity(key, key.replace("_", " "), _metric(key), "{:.4g}".format) for key in others]
        return [q for q in (*QUANTITIES, *more) if any(not math.isnan(value) for run in runs for value in [q.of(run)])]

    def gains(self, case: Case) -> list[float] | None:
        """Give the FAA of a case less that of the first value on the compared axis, seed by seed.

        Only runs whose clients hold the same data are compared; None where there is nothing to compare with.
        """
        first = self._first_of(case)
        if first is None:
            return None
        pairs = [(run, first.runs[seed]) for seed, run in case.runs.items() if seed in first.runs]
        hashes = [(a.manifest.get("partition_hash"), b.manifest.get("partition_hash")) for a, b in pairs]
        same = [pair for pair, (one, other) in zip(pairs, hashes, strict=True) if one is not None and one == other]
        return [FAA.of(a) - FAA.of(b) for a, b in same] or None

    def _first_of(self, case: Case) -> Case | None:
        if self.compare is None:
            return None
        labels = (*case.labels[: self.compare], self.first, *case.labels[self.compare + 1 :])
        return next((other for other in self.cases if other.labels == labels and other is not case), None)

    def header(self) -> list[str]:
        """Give the columns of the table."""
        against = [] if self.compare is None else [f"FAA against the first {self.axes[self.compare]}"]
        return [*self.axes, "seeds", *(quantity.label for quantity in self.quantities()), *against]

    def brief(self) -> list[int]:
        """Give the numbers of the columns that matter most."""
        left_out = {quantity.label for quantity in self.quantities() if not quantity.brief}
        return [index for index, label in enumerate(self.header()) if label not in left_out]

    def rows(self) -> list[list[str]]:
        """Give the table's cells, a row a case."""
        rows = []
        for case in self.cases:
            cells = [quantity.summary(case.values(quantity)) for quantity in self.quantities()]
            cells += [] if self.compare is None else [_gain_text(self.gains(case))]
            rows.append([*case.labels, str(len(case.runs)), *cells])
        return rows


def study(
    title: str,
    *,
    about: str,
    axes: Sequence[str],
    compare: int | None,
    cases: Mapping[tuple[str, ...], Mapping[int, Path]],
    failures: Mapping[str, str],
) -> Study:
    """Read the finished runs of a sweep.

    Parameters
    ----------
    title, about, axes, compare
        As of `Study`.
    cases
        Labels -> seed -> folder of a finished run; a case without one is named too, for it may be the first.
    failures
        Name of a run -> why it failed.
    """
    read = [Case(labels, {seed: read_run(path) for seed, path in runs.items()}) for labels, runs in cases.items()]
    notes = [f"{name} failed: {reason}" for name, reason in failures.items()]
    commits = {str(run.manifest.get("git_commit"))[:10] for case in read for run in case.runs.values()}
    if len(commits) > 1:
        notes.append(f"The runs were made at several commits: {', '.join(sorted(commits))}.")
    if compare is not None:  # what is compared stands together
        rests = list(dict.fromkeys(_without(case.labels, compare) for case in read))
        read.sort(key=lambda case: rests.index(_without(case.labels, compare)))
    first = "" if compare is None else next((labels[compare] for labels in cases), "")
    there = tuple(case for case in read if case.runs)
    return Study(title, about, tuple(axes), compare, first, there, tuple(notes))


def study_table(found: Study, *, width: int) -> Table:
    """Return the table for a rich console of so many characters; a narrow one gets fewer columns."""
    kept = found.brief() if width < _WIDE else list(range(len(found.header())))
    table = Table(title=Text(found.title), title_justify="left")
    for index in kept:
        table.add_column(found.header()[index], justify="left" if index < len(found.axes) else "right", overflow="fold")
    for row in found.rows():
        table.add_row(*(Text(row[index]) for index in kept))
    return table


def write_study(found: Study, folder: Path) -> Path:
    """Write ``results.md``, ``results.csv`` (row a case), ``runs.csv`` (row a run), ``cases.svg`` and ``index.html``.

    Returns
    -------
    The page.
    """
    write_whole(folder / "results.md", _markdown(found))
    write_whole(folder / "results.csv", _cases_csv(found))
    write_whole(folder / "runs.csv", _runs_csv(found))
    pictures = _pictures(found)
    for drawn in pictures[:1]:  # the cases side by side
        save(drawn, folder)
    page = render(
        "study.html.j2",
        title=found.title,
        about=found.about,
        notes=found.notes,
        header=found.header(),
        brief=found.brief(),
        num_axes=len(found.axes),
        rows=found.rows(),
        pictures=pictures,
    )
    return write_whole(folder / "index.html", page)


def _markdown(found: Study) -> str:
    header = found.header()
    lines = [f"# {found.title}", "", *([found.about, ""] if found.about else [])]
    lines += [f"- {' '.join(note.split())}" for note in found.notes]
    lines += [""] if found.notes else []
    lines += [_markdown_row(header), _markdown_row(["---"] * len(header)), *map(_markdown_row, found.rows())]
    lines += ["", "Mean ± standard deviation over the seeds; of the exactness error the largest.", ""]
    return "\n".join(lines)


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _cases_csv(found: Study) -> str:
    header = [*found.axes, "seeds"]
    for quantity in found.quantities():
        header += [f"{quantity.key}_max"] if quantity.worst else [f"{quantity.key}_mean", f"{quantity.key}_std"]
    header += ["faa_gain_mean", "faa_gain_std"] if found.compare is not None else []
    rows = []
    for case in found.cases:
        cells: list[str | int | float] = [*case.labels, len(case.runs)]
        for quantity in found.quantities():
            values = case.values(quantity)
            cells += [quantity.mean(values)] if quantity.worst else [quantity.mean(values), spread(values)]
        if found.compare is not None:
            gains = found.gains(case) or []
            cells += [FAA.mean(gains), spread(gains)]
        rows.append(cells)
    return _csv([header, *rows])


def _runs_csv(found: Study) -> str:
    keys = [quantity.key for quantity in found.quantities()]
    rows = [
        [*case.labels, seed, *(quantity.of(run) for quantity in found.quantities()), run.path.name]
        for case in found.cases
        for seed, run in case.runs.items()
    ]
    return _csv([[*found.axes, "seed", *keys, "folder"], *rows])


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        ["" if isinstance(cell, float) and math.isnan(cell) else cell for cell in row] for row in rows
    )
    return text.getvalue()


def _gain_text(gains: Sequence[float] | None) -> str:
    if gains is None:
        return "–"
    mean, deviation = 100 * FAA.mean(gains), 100 * spread(gains)
    return f"{mean:+.2f}" + ("" if math.isnan(deviation) else f" ± {deviation:.2f}")


def _without(labels: tuple[str, ...], axis: int) -> tuple[str, ...]:
    return labels[:axis] + labels[axis + 1 :]


def _pictures(found: Study) -> list[Picture]:
    if not found.cases:
        return []
    shown = [q for q in (FAA, FAA_LINEAR, FORGETTING) if q in found.quantities()]
    rows = [
        figures.CaseRow(
            name=" · ".join(case.labels) or found.title,
            block=str(next(iter(case.runs.values())).config.get("dataset")),  # each data set has its own scale
            group=case.labels if found.compare is None else _without(case.labels, found.compare),
            values=[(100 * q.mean(v), 100 * spread(v)) for q in shown for v in [case.values(q)]],
        )
        for case in found.cases
    ]
    drawn = [
        picture(
            figures.cases(rows, [q.label for q in shown]),
            name="cases",
            title="Accuracy and forgetting of each case",
            caption="Dots are means over the seeds, bars one standard deviation to each side.",
            wide=True,
        )
    ]
    groups: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for case in found.cases:
        rest = case.labels if found.compare is None else _without(case.labels, found.compare)
        name = "all seeds" if found.compare is None else case.labels[found.compare]
        groups.setdefault(rest, {})[name] = _mean_curve([run.accuracy_seen() for run in case.runs.values()])
    for index, (rest, curves) in enumerate(list(groups.items())[:_MOST_PICTURES]):
        drawn.append(
            picture(
                figures.accuracy_over_tasks(curves, num_tasks=max(map(len, curves.values()))),
                name=f"curve{index}",
                title=" · ".join(rest) or "Accuracy over the stream",
                caption="Accuracy over all classes seen after each task, mean over the seeds.",
            )
        )
    return drawn


def _mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """Average curves over as many tasks as all of them have."""
    shortest = min(map(len, curves))
    means: list[float] = np.mean([curve[:shortest] for curve in curves], axis=0).tolist()
    return means
