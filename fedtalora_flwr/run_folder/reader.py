"""Read a run folder.

A run may have stopped anywhere, so everything but ``config.json`` may be missing.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtalora_flwr.run_folder import names, round_lines

NOT_A_SETTING_OF_THE_METHOD = frozenset({"out", "resume"})


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

    @property
    def num_rounds(self) -> int:
        """Return the rounds of the whole run, played or not."""
        return _planned_rounds(self.config, self.manifest)

    def accuracy(self) -> NDArray[np.float64]:
        """Return a_ij in [0, 1], shape (T, T), NaN where not measured; (0, 0) without metrics.json."""
        rows = (self.metrics or {}).get("accuracy_matrix") or []
        return np.array([[number(a) for a in row] for row in rows]).reshape(len(rows), len(rows))

    def accuracy_seen(self) -> tuple[float, ...]:
        """Return A_1..A_n in [0, 1] of the tasks that were finished, NaN where one was not measured."""
        if self.metrics is not None:
            seen = [number(a) for a in self.metrics.get("accuracy_seen") or ()]
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
            if not math.isnan(accuracy := number(line.get("accuracy_seen"))):
                last[task_id] = accuracy
        # Measured half-way through a task, accuracy is not yet that task's A_i.
        per_task = int(self.config.get("rounds-per-task") or 1)
        return {task_id: a for task_id, a in last.items() if count[task_id] >= per_task}

    def metric(self, name: str) -> float:
        """Return a number of metrics.json, or what the rounds say of it so far; NaN where neither does."""
        if self.metrics is not None:
            return number(self.metrics.get(name))
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
        return np.array([number(line.get(name)) for line in self.rounds], dtype=np.float64)

    @property
    def answers(self) -> Mapping[str, Any]:
        """Return what answers.json holds; empty where nobody has let the run's language model answer."""
        file = self.path / names.ANSWERS
        return _read_object(file) if file.is_file() else {}

    @property
    def writes(self) -> bool:
        """Return whether the run is of a language model, whose accuracy is that of the answers' tokens."""
        return self.config.get("head") == "lm"

    @property
    def epsilon_spent(self) -> Mapping[str, Mapping[str, float]]:
        """Return what private training has cost each client of each task, by task id and partition id; else empty."""
        return round_lines.epsilon_spent(self.rounds)

    def seconds(self, part: str) -> NDArray[np.float64]:
        """Return the seconds each round spent on `part`, (num_rounds,), NaN where a round does not say."""
        return np.array([number((line.get("seconds") or {}).get(part)) for line in self.rounds])


def read_run(path: Path | str) -> RunRecord:
    """Read a run folder, finished or not.

    Raises
    ------
    FileNotFoundError
        If `path` is no folder, or has no config.json.
    ValueError
        If a JSON file in it is not what the run folder's contract says; the message names the file. A damaged line of
        rounds.jsonl is no error, but a note.
    """
    folder = Path(path).resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"{path} is no run folder: there is no such directory")
    if not (folder / names.CONFIG).is_file():
        raise FileNotFoundError(
            f"{path} is no run folder: config.json is missing; give the folder that `fedtalora run --out` wrote"
        )
    notes = []
    config = _read_object(folder / names.CONFIG)
    manifest = _read_object(folder / names.MANIFEST) if (folder / names.MANIFEST).is_file() else {}
    if not manifest:
        notes.append("manifest.json is missing: the run stopped before its data were known.")
    rounds, damaged = _read_rounds(folder / names.ROUNDS)
    notes += damaged
    metrics = _read_object(folder / names.METRICS) if (folder / names.METRICS).is_file() else None
    status = _read_object(folder / names.STATUS) if (folder / names.STATUS).is_file() else {}
    state, why = _diagnose(config, manifest, rounds, status, finished=metrics is not None)
    notes += [f"About the data: {remark}." for remark in manifest.get("remarks") or ()]
    return RunRecord(folder, config, manifest, rounds, metrics, state, (*why, *notes))


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content


def _read_rounds(file: Path) -> tuple[tuple[Mapping[str, Any], ...], list[str]]:
    """Return the lines in the order of rounds, and a sentence on each that cannot be used or is not there."""
    lines, damages = round_lines.read(file)
    # A resumed run does the round after its checkpoint again, and later lines replace earlier ones.
    by_round = {line.values["server_round"]: line.values for line in lines}
    missing = sorted(set(range(1, max(by_round, default=0))) - by_round.keys())
    notes = [f"{damage}." for damage in damages]
    if missing:
        notes.append(f"rounds.jsonl has no line of round {', '.join(map(str, missing))}.")
    return tuple(by_round[server_round] for server_round in sorted(by_round)), notes


def _diagnose(
    config: Mapping[str, Any],
    manifest: Mapping[str, Any],
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
    planned = _planned_rounds(config, manifest)
    reached = f"round {last['server_round']}" + (f" of {planned}" if planned else "")
    return "unfinished", [f"metrics.json is missing: the run stopped after {reached}, or is still running."]


def _planned_rounds(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> int:
    if "num_rounds" in manifest:
        return int(manifest["num_rounds"])
    # An earlier version did not write it down; over slots all tasks are trained at once.
    tasks = 1 if "slots" in manifest else int(config.get("stop-after-task") or config.get("num-tasks") or 0)
    return tasks * max(1, int(config.get("rounds-per-task") or 0))


def number(value: Any) -> float:
    """Return a JSON value as a float, NaN for null, missing, infinite or no number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else math.nan


def setting_text(value: Any) -> str:
    """Word the value of a setting as a command line takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
