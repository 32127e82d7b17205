"""Read a run folder and show it: one HTML file that opens offline, tables in a terminal, runs side by side.

A run may have stopped anywhere, so everything but ``config.json`` may be missing; what is there is shown.
Tasks count from 1 on a page and in a table, from 0 in the files.
"""

import json
import math
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from fedtalora_flwr import figures

_NOT_A_SETTING_OF_THE_METHOD = frozenset({"out", "resume"})
_LONGEST_ON_A_COMMAND_LINE = 80
_MOST_FAILURES_SHOWN = 200


# ---------------------------------------------------------------------------------------------- reading a run


@dataclass(frozen=True)
class RunRecord:
    """Hold what a run folder says.

    Parameters
    ----------
    path
        The folder.
    config
        Resolved settings by kebab-case key.
    manifest
        What manifest.json holds; empty where the run stopped before it.
    rounds
        Lines of rounds.jsonl in the order of rounds; a round that was done again after a restart stands once.
    metrics
        What metrics.json holds; None where the run did not get so far.
    state
        "complete", "failed" or "unfinished" (stopped, or still running).
    notes
        Sentences on what is missing and why.
    """

    path: Path
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]
    rounds: tuple[Mapping[str, Any], ...]
    metrics: Mapping[str, Any] | None
    state: str
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Return the folder's name."""
        return self.path.name

    @property
    def num_tasks(self) -> int:
        """Return T, the length of the stream, trained or not."""
        return len(self.manifest.get("tasks") or ()) or int(self.config.get("num-tasks") or 1)

    def accuracy(self) -> NDArray[np.float64]:
        """Return a_ij in [0, 1], shape (T, T), NaN where not measured; (0, 0) without metrics.json."""
        rows = (self.metrics or {}).get("accuracy_matrix") or []
        return np.array([[_number(a) for a in row] for row in rows]).reshape(len(rows), len(rows))

    def accuracy_seen(self) -> tuple[float, ...]:
        """Return A_1..A_n in [0, 1] of the tasks that were finished, NaN where one was not measured."""
        if self.metrics is not None:
            seen = [_number(a) for a in self.metrics.get("accuracy_seen") or ()]
        else:
            by_task = self._last_accuracy_of_tasks()
            seen = [by_task.get(t, math.nan) for t in range(max(by_task, default=-1) + 1)]
        while seen and math.isnan(seen[-1]):
            seen.pop()
        return tuple(seen)

    def _last_accuracy_of_tasks(self) -> dict[int, float]:
        last: dict[int, float] = {}
        count: dict[int, int] = {}
        for line in self.rounds:
            task_id = line["task_id"]
            count[task_id] = count.get(task_id, 0) + 1
            if not math.isnan(accuracy := _number(line.get("accuracy_seen"))):
                last[task_id] = accuracy
        # Measured half-way through a task, accuracy is not yet that task's A_i.
        per_task = int(self.config.get("rounds-per-task") or 1)
        return {task_id: a for task_id, a in last.items() if count[task_id] >= per_task}

    def metric(self, name: str) -> float:
        """Return a number of metrics.json, or what the rounds say of it so far; NaN where neither does."""
        if self.metrics is not None:
            return _number(self.metrics.get(name))
        measured = [a for a in self.accuracy_seen() if not math.isnan(a)]
        so_far: dict[str, Callable[[], float]] = {
            "faa": lambda: measured[-1] if measured else math.nan,
            "aia": lambda: sum(measured) / len(measured) if measured else math.nan,
            "bytes_up_total": lambda: float(np.nansum(self.column("bytes_up"))),
            "bytes_down_total": lambda: float(np.nansum(self.column("bytes_down"))),
            "wall_seconds": lambda: float(np.nansum(self.seconds("total"))),
            "num_rounds": lambda: float(len(self.rounds)),
        }
        return so_far[name]() if name in so_far else math.nan

    def column(self, name: str) -> NDArray[np.float64]:
        """Return a number of each round, (num_rounds,), NaN where a round has none."""
        return np.array([_number(line.get(name)) for line in self.rounds], dtype=np.float64)

    def seconds(self, part: str) -> NDArray[np.float64]:
        """Return the seconds each round spent on `part`, (num_rounds,), NaN where a round does not say."""
        return np.array([_number((line.get("seconds") or {}).get(part)) for line in self.rounds])


def read_run(path: Path | str) -> RunRecord:
    """Read a run folder, finished or not.

    Raises
    ------
    FileNotFoundError
        If `path` is no folder, or has no config.json.
    ValueError
        If a file in it is not what the run folder's contract says; the message names file and line.
    """
    folder = Path(path).resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"{path} is no run folder: there is no such directory")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} is no run folder: config.json is missing; give the folder that `fedtalora run --out` wrote"
        )
    notes = []
    config = _read_object(folder / "config.json")
    manifest = _read_object(folder / "manifest.json") if (folder / "manifest.json").is_file() else {}
    if not manifest:
        notes.append("manifest.json is missing: the run stopped before its data were known.")
    rounds, cut = _read_rounds(folder / "rounds.jsonl")
    if cut:
        notes.append("The last line of rounds.jsonl is cut off, as if the run was stopped while it wrote.")
    metrics = _read_object(folder / "metrics.json") if (folder / "metrics.json").is_file() else None
    status = _read_object(folder / "status.json") if (folder / "status.json").is_file() else {}
    state, why = _diagnose(config, rounds, status, finished=metrics is not None)
    return RunRecord(folder, config, manifest, rounds, metrics, state, (*why, *notes))


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content


def _read_rounds(file: Path) -> tuple[tuple[Mapping[str, Any], ...], bool]:
    """Return the lines in the order of rounds, and whether the last one was cut off."""
    if not file.is_file():
        return (), False
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    by_round: dict[int, Mapping[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return _in_order(by_round), True
            raise ValueError(f"{file}, line {number} is not JSON: {error}") from error
        for key in ("server_round", "task_id"):
            if not isinstance(content, dict) or not isinstance(content.get(key), int):
                raise ValueError(f"{file}, line {number} needs a whole number {key!r}")
        # A resumed run does the round after its checkpoint again, and later lines replace earlier ones.
        by_round[content["server_round"]] = content
    return _in_order(by_round), False


def _in_order(by_round: Mapping[int, Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    return tuple(by_round[server_round] for server_round in sorted(by_round))


def _diagnose(
    config: Mapping[str, Any],
    rounds: Sequence[Mapping[str, Any]],
    status: Mapping[str, Any],
    *,
    finished: bool,
) -> tuple[str, list[str]]:
    """Tell a run that failed from one that was stopped or still goes on, by its status and its last round."""
    if finished:
        return "complete", []
    if status.get("phase") == "failed":
        return "failed", [str(status.get("message") or "status.json gives no reason.")]
    if not rounds:
        return "unfinished", ["No round was recorded and metrics.json is missing."]
    last = rounds[-1]
    lost = {failure.get("partition_id") for failure in last.get("failures") or ()}
    good = len(set(last.get("participants") or ()) - lost)
    needed = int(config.get("min-replies") or 1)
    if lost and good < needed:
        return "failed", [
            f"Round {last['server_round']} got {good} good update{'' if good == 1 else 's'}, "
            f"fewer than min-replies = {needed}; the reasons are under Failures."
        ]
    tasks = int(config.get("stop-after-task") or config.get("num-tasks") or 0)
    planned = tasks * int(config.get("rounds-per-task") or 0)
    reached = f"round {last['server_round']}" + (f" of {planned}" if planned else "")
    return "unfinished", [f"metrics.json is missing: the run stopped after {reached}, or is still running."]


def _number(value: Any) -> float:
    """Return a JSON value as a float, NaN for null, missing, infinite or no number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else math.nan


# ------------------------------------------------------------------------------------------ numbers as text


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"


def _points(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f}"


def _bytes(num_bytes: float) -> str:
    if math.isnan(num_bytes):
        return "–"
    unit, name = figures.byte_unit(num_bytes)
    return f"{num_bytes / unit:.{0 if unit == 1 else 1}f} {name}"


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _count(number: float) -> str:
    return "–" if math.isnan(number) else f"{number:,.0f}"


def _setting(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class _Measure:
    """Say how a number of a run is named, written and judged."""

    key: str
    label: str
    text: Callable[[float], str]
    best: Callable[[Sequence[float]], float] | None


_MEASURES = (
    _Measure("faa", "FAA", _percent, max),
    _Measure("aia", "AIA", _percent, max),
    _Measure("forgetting", "forgetting (points)", _points, min),
    _Measure("bytes_up_total", "bytes up", _bytes, min),
    _Measure("bytes_down_total", "bytes down", _bytes, min),
    _Measure("wall_seconds", "time", _duration, min),
    _Measure("num_rounds", "rounds", _count, None),
)


# ------------------------------------------------------------------------------------------------- the page


@dataclass(frozen=True)
class _Picture:
    title: str
    caption: str
    svg: Markup
    wide: bool


def _picture(figure: figures.Figure, *, name: str, title: str, caption: str, wide: bool = False) -> _Picture:
    return _Picture(title, caption, Markup(figures.to_svg(figure, name=name, title=title)), wide)


def _render(template: str, **values: Any) -> str:
    # Class names, failure reasons and settings come from other machines: everything is escaped but our SVGs.
    environment = Environment(
        loader=PackageLoader("fedtalora_flwr"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def _write(path: Path, content: str) -> Path:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(content, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def write_report(path: Path | str) -> Path:
    """Write ``report.html`` into a run folder and return its path.

    Raises
    ------
    FileNotFoundError, ValueError
        As `read_run`.
    """
    run = read_run(path)
    failures = _failures(run)
    command, left_out = _command(run)
    content = _render(
        "report.html.j2",
        title=f"{run.name} · fedtalora",
        run=run,
        subtitle=_subtitle(run),
        cards=_cards(run),
        sections=[
            {"title": "Accuracy", "pictures": _accuracy_pictures(run)},
            {"title": "Training", "pictures": _training_pictures(run)},
            {"title": "Who held which classes", "pictures": _class_pictures(run)},
            {"title": "Communication and time", "pictures": _cost_pictures(run)},
        ],
        failures=failures[:_MOST_FAILURES_SHOWN],
        num_failures=len(failures),
        parameters=_parameters(run),
        modules=[
            {"name": name, "shape": " × ".join(str(size) for size in shape)}
            for name, shape in (run.manifest.get("adapted_modules") or {}).items()
        ],
        settings=[(key, _setting(value) or '""') for key, value in sorted(run.config.items())],
        command=command,
        left_out=left_out,
        provenance=_provenance(run),
        partition_hashes=run.manifest.get("partition_hashes") or [],
    )
    return _write(run.path / "report.html", content)


def _subtitle(run: RunRecord) -> str:
    config = run.config
    stream = f"{run.num_tasks} task{'' if run.num_tasks == 1 else 's'}"
    parts = [config.get("method"), config.get("dataset"), config.get("backbone"), stream]
    if "num-clients" in config:
        parts.append(f"{config['num-clients']} clients")
    if "partition" in config:
        parts.append(f"{config['partition']} partition")
    return " · ".join(str(part) for part in parts if part)


def _cards(run: RunRecord) -> list[dict[str, str]]:
    complete = run.state == "complete"
    seen = run.accuracy_seen()
    trained = f"after task {len(seen)} of {run.num_tasks}" if seen else "not measured yet"
    up, down = run.metric("bytes_up_total"), run.metric("bytes_down_total")
    participants = {p for line in run.rounds for p in line.get("participants") or ()}
    return [
        _card(
            "Final accuracy" if complete else "Accuracy so far",
            _percent(run.metric("faa")),
            f"{'FAA: ' if complete else ''}all classes seen, {trained}",
        ),
        _card(
            "Average accuracy",
            _percent(run.metric("aia")),
            "AIA: mean over the tasks of the accuracy after each",
        ),
        _card(
            "Forgetting",
            _points(run.metric("forgetting")),
            "points lost since a task's best; lower is better",
        ),
        _card("Traffic", _bytes(up + down), f"{_bytes(up)} up, {_bytes(down)} down"),
        _card(
            "Time",
            _duration(run.metric("wall_seconds")),
            "wall clock, whole run" if complete else "the recorded rounds together",
        ),
        _card("Rounds", _count(run.metric("num_rounds")), f"{len(participants)} clients took part"),
    ]


def _card(label: str, value: str, hint: str) -> dict[str, str]:
    return {"label": label, "value": value, "hint": hint}


def _accuracy_pictures(run: RunRecord) -> list[_Picture]:
    pictures = []
    accuracy = run.accuracy()
    if np.isfinite(accuracy).any():
        pictures.append(
            _picture(
                figures.accuracy_matrix(accuracy),
                name="matrix",
                title="Accuracy on each task after each task",
                caption="Per cent of a task's test data (column) that the model gets right after training up "
                "to a task (row), with all classes seen so far to choose from. Down a column: how a task "
                "fares as others follow. The diagonal: how well each task was learned at first. Darker is "
                "better; most tones lie near 100 %.",
            )
        )
    if seen := run.accuracy_seen():
        pictures.append(
            _picture(
                figures.accuracy_over_tasks({run.name: seen}, num_tasks=run.num_tasks),
                name="seen",
                title="Accuracy over the stream",
                caption="Per cent of the test data of all classes seen so far that the model gets right "
                "after each task. The last point is FAA, the mean of the points is AIA.",
            )
        )
    return pictures


def _clock(run: RunRecord) -> dict[str, Any]:
    return {
        "rounds": [line["server_round"] for line in run.rounds],
        "task_ids": [line["task_id"] for line in run.rounds],
    }


def _training_pictures(run: RunRecord) -> list[_Picture]:
    described = (
        (
            "mean_loss",
            figures.loss,
            "Training loss",
            "Mean cross-entropy (nats) of the participants' training steps in each round. Shaded bands are "
            "tasks; it jumps where new classes arrive.",
        ),
        (
            "residual_norm",
            figures.residual_norm,
            "Aggregation residual",
            "Frobenius norm of the cumulative residual (no unit), over all adapted modules: what averaging "
            "the factors alone would have lost of the mean of the clients' products so far.",
        ),
        (
            "exactness_error",
            figures.exactness_error,
            "Exactness error",
            "Relative Frobenius distance, in the worst layer, of what the new global model has learned to "
            "the weighted mean of the clients' full weights (no unit, log scale). Rounding alone leaves "
            "about 1e-7. A hollow dot at the lower edge is exactly 0.",
        ),
    )
    return [
        _picture(
            draw(run.column(key), **_clock(run)),
            name=key,
            title=title,
            caption=caption,
            wide=key == "exactness_error",
        )
        for key, draw, title, caption in described
        if np.isfinite(run.column(key)).any()
    ]


def _class_pictures(run: RunRecord) -> list[_Picture]:
    manifest = run.manifest
    if not manifest.get("class_counts") or not manifest.get("tasks"):
        return []
    return [_class_picture(manifest["class_counts"], manifest["tasks"], manifest.get("class_names") or [])]


def _class_picture(class_counts: ArrayLike, tasks: Sequence[Sequence[int]], class_names: Sequence[str]) -> _Picture:
    counts = np.asarray(class_counts)
    names = [*class_names, *(f"class {c}" for c in range(len(class_names), counts.shape[1]))]
    caption = (
        "Rows are clients, columns are classes, grouped by the task that brings them. A cell is the number "
        "of training examples of the class that the client holds; white means none."
        if figures.shows_classes(counts, tasks=tasks)
        else "Rows are clients, columns are tasks. A cell is the number of training examples of the task's "
        "classes that the client holds, in brackets of how many of its classes; white means none."
    )
    figure = figures.class_map(counts, tasks=tasks, class_names=names)
    return _picture(figure, name="classes", title="Classes by client and task", caption=caption, wide=True)


def _cost_pictures(run: RunRecord) -> list[_Picture]:
    if not run.rounds:
        return []
    parts = {part: np.nan_to_num(run.seconds(part)) for part in ("wait", "aggregate", "evaluate")}
    rest = np.nan_to_num(run.seconds("total")) - sum(parts.values())
    if rest.sum() > 0.01 * sum(part.sum() for part in parts.values()):
        parts["other"] = np.maximum(rest, 0)
    return [
        _picture(
            figures.bytes_per_round(run.column("bytes_up"), run.column("bytes_down"), **_clock(run)),
            name="bytes",
            title="Bytes on the wire",
            caption="Left: bytes of all clients in each round, what the server sent stacked on what it got. "
            "Right: the same, summed since the start. Decimal units (1 MB is 1,000,000 bytes).",
            wide=True,
        ),
        _picture(
            figures.seconds_per_round(parts, **_clock(run)),
            name="seconds",
            title="Time of a round",
            caption="Seconds at the server: waiting for the clients (their training and the network), adding "
            "up their updates, evaluating. The rounds that evaluate stand out.",
            wide=True,
        ),
    ]


def _failures(run: RunRecord) -> list[dict[str, Any]]:
    return [
        {
            "server_round": line["server_round"],
            "task": line["task_id"] + 1,
            "client": "unknown" if failure.get("partition_id") is None else f"client {failure['partition_id']}",
            "reason": str(failure.get("reason") or "no reason given")[:2000],
        }
        for line in run.rounds
        for failure in line.get("failures") or ()
    ]


def _parameters(run: RunRecord) -> list[dict[str, str]]:
    counts = run.manifest.get("parameters") or {}
    total = _number(counts.get("total"))
    return [
        {
            "name": key.replace("_", " ").replace("-", " "),
            "count": _count(_number(count)),
            "share": "–" if not total > 0 else f"{100 * _number(count) / total:.2f} %",
        }
        for key, count in counts.items()
    ]


def _command(run: RunRecord) -> tuple[str, list[str]]:
    """Return the command that does the run again, and the settings that are too long for it."""
    pairs, left_out = [], []
    for key, value in sorted(run.config.items()):
        pair = f"{key}={_setting(value)}"
        if key in _NOT_A_SETTING_OF_THE_METHOD:
            continue
        if len(pair) > _LONGEST_ON_A_COMMAND_LINE or "\n" in pair:
            left_out.append(key)
        else:
            pairs.append(f"--set {shlex.quote(pair)}")
    lines, line = [], "fedtalora run"
    for pair in pairs:
        if len(line) + len(pair) > 110:
            lines.append(line)
            line = "   "
        line = f"{line} {pair}"
    return " \\\n".join([*lines, line]), left_out


def _provenance(run: RunRecord) -> list[tuple[str, str]]:
    manifest = run.manifest
    named = {
        "run folder": run.path,
        "started at": manifest.get("started_at"),
        "fedtalora": manifest.get("fedtalora_version"),
        "git commit": manifest.get("git_commit"),
        "seed": manifest.get("seed", run.config.get("seed")),
        "partition hash": manifest.get("partition_hash"),
        **(manifest.get("versions") or {}),
    }
    return [(key, "–" if value in (None, "") else str(value)) for key, value in named.items()]


# ------------------------------------------------------------------------------------------------ a terminal


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
                cells = ["" if math.isnan(a) else _points(a) for a in row]
                table.add_row(f"task {task + 1}", *cells, _points(seen[task]))
        console.print(table)
    summary = Table.grid(padding=(0, 2))
    if run.state != "complete":
        summary.add_row("state", Text(run.state, style="bold red"))
    for measure in _MEASURES:
        summary.add_row(measure.label, Text(measure.text(run.metric(measure.key)), style="bold"))
    console.print(summary)
    for note in run.notes:
        console.print(Text(note, style="yellow"))


# --------------------------------------------------------------------------------------------- side by side


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
        for measure in _MEASURES:
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
                    for measure in _MEASURES
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
        for measure in _MEASURES:
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
            table.add_row(Text(name), *(_points(seen[task]) for task in tasks))
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
    keys = sorted({key for run in runs for key in run.config} - _NOT_A_SETTING_OF_THE_METHOD)
    values = {key: tuple(_setting(run.config.get(key, "–")) for run in runs) for key in keys}
    differing = tuple((key, row) for key, row in values.items() if len(set(row)) > 1)
    comparison = Comparison(runs, names, differing, tuple(notes))
    if out is not None:
        _write(Path(out), _comparison_page(comparison))
    return comparison


def _distinct_names(runs: Sequence[RunRecord]) -> tuple[str, ...]:
    """Name each run by as few trailing parts of its path as tell them apart."""
    depth = max(len(run.path.parts) for run in runs)
    for kept in range(1, depth + 1):
        names = tuple("/".join(run.path.parts[-kept:]) for run in runs)
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"compare needs different runs, got {runs[0].path} more than once")


def _comparison_page(comparison: Comparison) -> str:
    curves = {n: r.accuracy_seen() for n, r in zip(comparison.names, comparison.runs, strict=True)}
    num_tasks = max(run.num_tasks for run in comparison.runs)
    return _render(
        "compare.html.j2",
        title=f"{len(comparison.runs)} runs compared",
        subtitle=" · ".join(comparison.names),
        notes=comparison.notes,
        columns=[measure.label for measure in _MEASURES],
        results=comparison.results(),
        differing=comparison.differing,
        pictures=[
            _picture(
                figures.accuracy_over_tasks(curves, num_tasks=num_tasks),
                name="seen",
                title="Accuracy over the stream",
                caption="Per cent of the test data of all classes seen so far that each run's model gets "
                "right after each task. The last point of a line is its FAA, the mean of its points its AIA.",
                wide=True,
            )
        ],
    )


# ------------------------------------------------------------------------------------------------- the data


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
    return _write(
        target,
        _render(
            "data.html.j2",
            title=title,
            subtitle=f"{len(holdings)} clients · {len(tasks)} tasks · "
            f"{sum(len(task) for task in tasks)} classes · {num_examples:,} training examples",
            drawn=_class_picture(class_counts, tasks, class_names),
            tasks=[[class_names[c] for c in task] for task in tasks],
            rows=[
                {"client": f"client {client}", "cells": cells, "hash": hashes[client]}
                for client, cells in enumerate(holdings)
            ],
        ),
    )
