"""The state of all runs as Prometheus reads it (text exposition format 0.0.4)."""

from collections.abc import Sequence
from typing import Any

from fedtalora_flwr.report.live.runs import Summary

_STATES = ("running", "finished", "failed", "silent", "unreadable")
_GAUGES = (
    ("rounds_done", "rounds_done", "Rounds that are finished."),
    ("rounds", "num_rounds", "Rounds of the whole run."),
    ("task", "task", "Task that is trained, from 1."),
    ("mean_loss", "mean_loss", "Mean training loss of the last round."),
    ("accuracy", "accuracy", "Accuracy over all classes seen, in [0, 1]."),
    ("bytes_up", "bytes_up", "Bytes from the clients so far."),
    ("bytes_down", "bytes_down", "Bytes to the clients so far."),
    ("seconds", "seconds", "Seconds that the rounds took so far."),
    ("remaining_seconds", "remaining_seconds", "Seconds that are left, about."),
    ("failures", "num_failures", "Updates that could not be used so far."),
    ("last_word_timestamp_seconds", "last_word", "When the run folder was last written to."),
)
_COUNTS = (("asked_clients", "asked"), ("waiting_clients", "waiting"), ("late_clients", "late"))


def prometheus(runs: Sequence[Summary]) -> str:
    """Give a sample a run of every number that it has."""
    lines = _family("run_state", "1 for the state that a run is in.")
    for run in runs:
        lines += [_sample("run_state", run, float(run["state"] == state), state=state) for state in _STATES]
    lines += _family("run_info", "What a run is.")
    keys = ("method", "dataset", "backbone", "seed")
    lines += [_sample("run_info", run, 1.0, **{key: run.get(key) for key in keys}) for run in runs]
    for name, key, about in _GAUGES:
        lines += _family(f"run_{name}", about)
        lines += [_sample(f"run_{name}", run, run[key]) for run in runs if run.get(key) is not None]
    for name, key in _COUNTS:
        lines += _family(f"run_{name}", f"How many clients are {name.partition('_')[0]} now.")
        lines += [_sample(f"run_{name}", run, len(run[key])) for run in runs if run["state"] == "running"]
    return "\n".join(lines) + "\n"


def _family(name: str, about: str) -> list[str]:
    return [f"# HELP fedtalora_{name} {about}", f"# TYPE fedtalora_{name} gauge"]


def _sample(name: str, run: Summary, value: float, **labels: Any) -> str:
    told = {"run": run["name"], **labels}
    inside = ",".join(f'{key}="{_escaped(label)}"' for key, label in told.items() if label is not None)
    return f"fedtalora_{name}{{{inside}}} {value:.17g}"


def _escaped(label: Any) -> str:
    return str(label).replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
