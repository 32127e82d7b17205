"""What the files of a run folder are called, a contract that tools rely on; and the rule of how far a run has come."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Literal

CONFIG = "config.json"  # every setting of the run
MANIFEST = "manifest.json"  # what it was run with: versions, data, sizes
ROUNDS = "rounds.jsonl"  # a line a round
METRICS = "metrics.json"  # the result; there once the run is finished
STATUS = "status.json"  # where it is, for a progress display
ANSWERS = "answers.json"  # what a language model answered, where `fedtalora answers` was asked
REPORT = "report.html"
LOGS = "logs"
CHECKPOINT = "checkpoint"
LATEST = "latest.json"  # in it: the last finished round

Standing = Literal["nothing", "stopped", "finished"]


def standing(folder: Path) -> Standing:
    """Tell whether a folder holds no run, one that was stopped or is running, or a finished one.

    A run that failed before its data were known is none: nothing of it is lost when another takes its place.
    """
    if not (folder / CONFIG).is_file():
        return "nothing"
    if (folder / METRICS).is_file():
        return "finished"
    return "stopped" if (folder / MANIFEST).is_file() or not _failed(folder) else "nothing"


def _failed(folder: Path) -> bool:
    with suppress(OSError, ValueError):
        status = json.loads((folder / STATUS).read_text())
        return isinstance(status, dict) and status.get("phase") == "failed"
    return False


def holds_checkpoint(folder: Path) -> bool:
    """Tell whether a run finished a round in a folder: it can go on, and a fresh one would mix its files with that."""
    return (folder / CHECKPOINT / LATEST).is_file()
