"""Find run folders below a folder and say where each run is."""

import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedtalora_flwr.report.measures import finite
from fedtalora_flwr.run_folder import names
from fedtalora_flwr.run_folder.reader import RunRecord, number, read_run

_DEPTH = 4  # folders below the root in which runs are looked for: a sweep's runs lie two deep
_WORD_AFTER = 90.0  # seconds; a run that waits for clients writes every 30
_MOST_POINTS = 240  # of a curve
_LATE = 1.5  # times the usual wait
_FILES = (names.CONFIG, names.MANIFEST, names.ROUNDS, names.METRICS, names.STATUS)
_LOCKS = Path("/proc/locks")

Summary = dict[str, Any]


class Board:
    """All runs below a folder; one that does not run is read again only when its files have changed.

    Parameters
    ----------
    root
        The folder; it may be a run's own.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._ended: dict[Path, tuple[object, Summary]] = {}  # of runs that do not run: of which files, and what

    def paths(self) -> dict[str, Path]:
        """List the run folders by the name that a page gives them: their path below the root."""
        return {_name(path, self.root): path for path in find_runs(self.root)}

    def summaries(self) -> list[Summary]:
        """Say of each run where it is: those that run first, then by the time of their last word."""
        locked = _locked_inodes()
        found = [self._summary(name, path, locked) for name, path in self.paths().items()]
        self._ended = {path: one for path, one in self._ended.items() if path.is_dir()}  # some may have been deleted
        return sorted(found, key=lambda run: (run["state"] != "running", -run["last_word"]))

    def _summary(self, name: str, path: Path, locked: frozenset[int]) -> Summary:
        stamp = [_stamp(path / file) for file in _FILES]
        last_word = max(one[0] for one in stamp) / 1e9
        try:
            here = path.stat().st_ino in locked
            known = stamp, here
            if self._ended.get(path, (None,))[0] == known:
                return self._ended[path][1]
            run = read_run(path)
        except (OSError, ValueError) as error:
            return {"name": name, "state": "unreadable", "message": str(error), "last_word": last_word}
        found = summary(run, name=name, status=_status(path), locked=here, last_word=last_word)
        if found["state"] != "running":
            self._ended[path] = known, found
        return found


def find_runs(root: Path) -> list[Path]:
    """List the run folders at and below `root`, but for what lies inside a run; hidden folders are passed over."""
    found = []
    for folder, subfolders, files in os.walk(root):
        here = Path(folder)
        if names.CONFIG in files and {names.ROUNDS, names.STATUS, names.MANIFEST} & set(files):
            found.append(here)
            subfolders.clear()
        elif len(here.relative_to(root).parts) >= _DEPTH:
            subfolders.clear()
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
    return sorted(found)


def summary(run: RunRecord, *, name: str, status: Mapping[str, Any], locked: bool, last_word: float) -> Summary:
    """Say where a run is, as a JSON object.

    Parameters
    ----------
    run, status
        What its folder says.
    name
        How the page calls it.
    locked
        Whether a process on this machine writes to the folder.
    last_word
        When it was last written to, in seconds since the epoch.
    """
    state = _state(run, locked=locked, silent_seconds=time.time() - last_word)
    lines, is_running = run.rounds, state == "running"
    last = lines[-1] if lines else {}
    waited = time.time() - number(status.get("asked_at")) if is_running else float("nan")
    waiting = list(status.get("waiting") or ()) if is_running else []
    return {
        "name": name,
        "state": state,
        "message": " ".join(run.notes) if state in ("failed", "silent") else "",
        "last_word": last_word,
        "method": run.config.get("method"),
        "dataset": run.config.get("dataset"),
        "backbone": run.config.get("backbone"),
        "seed": run.config.get("seed"),
        "started_at": run.manifest.get("started_at"),
        "phase": status.get("phase") if is_running else None,
        "task": _one_more(status.get("task_id", last.get("task_id"))),
        "num_tasks": status.get("num_tasks") or run.num_tasks,
        "round": status.get("server_round") or last.get("server_round"),
        "rounds_done": len(lines),
        "num_rounds": run.num_rounds,
        "mean_loss": _last(run.column("mean_loss")),
        "accuracy": finite(run.metric("faa")) if run.metrics else _last(run.column("accuracy_seen")),
        "average_accuracy": finite(run.metric("aia")),
        "forgetting": finite(run.metric("forgetting")),
        "bytes_up": finite(run.metric("bytes_up_total")),
        "bytes_down": finite(run.metric("bytes_down_total")),
        "seconds": finite(run.metric("wall_seconds")),
        "remaining_seconds": status.get("remaining_seconds") if is_running else None,
        "asked": list(status.get("asked") or ()) if is_running else [],
        "waiting": waiting,
        "waited_seconds": finite(waited),
        "late": waiting if _is_late(waited, waiting, status.get("asked") or (), run) else [],
        "failures": [
            {"partition_id": one.get("partition_id"), "reason": str(one.get("reason"))[:300]}
            for one in last.get("failures") or ()
        ],
        "num_failures": sum(len(line.get("failures") or ()) for line in lines),
        "losses": _curve(run, "mean_loss") if is_running else [],
        "accuracies": _curve(run, "accuracy_seen") if is_running else [],
    }


def _state(run: RunRecord, *, locked: bool, silent_seconds: float) -> str:
    """Tell how a run stands; one that nobody is known to write to is still taken to run while it says something."""
    if locked or (run.state == "unfinished" and silent_seconds < _WORD_AFTER):
        return "running"
    return {"complete": "finished", "failed": "failed"}.get(run.state, "silent")


def _is_late(waited: float, waiting: Sequence[int], asked: Sequence[int], run: RunRecord) -> bool:
    """Tell whether those that have not answered, fewer than were asked, take longer than a round usually does."""
    usual = [wait for wait in run.seconds("wait").tolist() if wait > 0]
    return bool(usual) and 0 < len(waiting) < len(asked) and waited > _LATE * statistics.median(usual)


def _curve(run: RunRecord, key: str) -> list[list[float | None]]:
    """Give rounds and values, thinned out where there are many; the last one stays."""
    found = [[line["server_round"], finite(number(line.get(key)))] for line in run.rounds]
    points = [point for point in found if point[1] is not None]
    step = -(-len(points) // _MOST_POINTS) or 1
    return points[::-1][::step][::-1]


def _last(values: np.ndarray[Any, np.dtype[np.float64]]) -> float | None:
    known = values[~np.isnan(values)]
    return float(known[-1]) if len(known) else None


def _one_more(task_id: Any) -> int | None:
    return None if task_id is None else int(task_id) + 1


def _name(path: Path, root: Path) -> str:
    return root.name if path == root else path.relative_to(root).as_posix()


def _status(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / names.STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a run may not have come so far
        return {}
    return found if isinstance(found, dict) else {}


def _stamp(file: Path) -> tuple[int, int]:
    try:
        found = file.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def _locked_inodes() -> frozenset[int]:
    """List the inodes that processes here hold a lock on, as a run does on its folder; to try it would disturb one."""
    try:
        lines = _LOCKS.read_text().splitlines()
    except OSError:  # no Linux: the age of the last word is all there is
        return frozenset()
    fields = [line.replace("-> ", "").split() for line in lines]
    return frozenset(int(one[5].rpartition(":")[2]) for one in fields if len(one) > 5 and one[1] == "FLOCK")
