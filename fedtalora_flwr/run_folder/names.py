"""What the files of a run folder are called, a contract that tools rely on; and the rule of how far a run has come."""

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
    """Tell whether a folder holds no run, one that was stopped or is running, or a finished one."""
    if not (folder / CONFIG).is_file():
        return "nothing"
    return "finished" if (folder / METRICS).is_file() else "stopped"


def holds_checkpoint(folder: Path) -> bool:
    """Tell whether a run finished a round in a folder: it can go on, and a fresh one would mix its files with that."""
    return (folder / CHECKPOINT / LATEST).is_file()
