"""The run folder: what a run was, how each round went, how it ended. DESIGN: a contract that tools rely on."""

import fcntl
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import fedtalora_flwr
from fedtalora_flwr.config import MAY_CHANGE_ON_RESUME
from fedtalora_flwr.config.sources import with_later
from fedtalora_flwr.config.whole import write_text
from fedtalora_flwr.metrics import TaskMatrix, measured
from fedtalora_flwr.run_folder import names, round_lines
from fedtalora_flwr.run_folder.round_lines import Damage, epsilon_spent

_OPTIONAL = (
    *("resent", "weights", "kept_energy", "exactness_error", "epsilon_spent", "accuracy_seen_linear", "answer_losses"),
    *("cluster_accuracy", "routing_accuracy", "accuracy_routed", "slots"),
)
_LIBRARIES = ("torch", "flwr", "timm", "peft", "transformers", "datasets", "numpy", "ray")


@dataclass(frozen=True)
class Failure:
    """A client that did not contribute to a round, and why."""

    partition_id: int
    reason: str


@dataclass(frozen=True)
class SlotLog:
    """Where a slot was put in a round: its cluster, None for none, and whether that is the cluster of its task.

    Its place on a plane is for a picture: like beside like.
    """

    partition_id: int
    number: int
    cluster: int | None
    right: bool
    x: float
    y: float


@dataclass(frozen=True)
class RoundLog:
    """One line of ``rounds.jsonl``; bytes are message bytes, times are seconds, the loss is a mean over steps.

    ``resent`` are partitions that had lost the base and got it once more; ``kept_energy`` is the share of the
    residual's energy that was sent, where ``residual-energy`` is below 1. ``weights`` are the clients that counted
    less than their examples say, as a share of that. ``epsilon_spent`` is what private training has cost each client of
    the task's budget so far. ``accuracy_seen_linear`` is what the
    trained class rows alone would give, where the head is another one. Of a language model accuracies are those of the
    answers' tokens, and ``answer_losses`` the mean cross-entropy of these by task, in nats.

    Of a method over slots: `slots` are those of the round; ``cluster_accuracy`` is the share of all slots whose cluster
    is that of their true task. After its last round ``routing_accuracy`` is the share of test examples that go to the
    cluster of their task when nobody says which that is, and ``accuracy_routed`` the accuracy among that cluster's
    classes then.
    """

    server_round: int
    task_id: int
    participants: Sequence[int]
    failures: Sequence[Failure]
    bytes_up: int
    bytes_down: int
    seconds: Mapping[str, float]
    mean_loss: float | None
    residual_norm: float
    resent: Sequence[int] = ()
    weights: Mapping[int, float] = field(default_factory=dict)
    kept_energy: float | None = None
    exactness_error: float | None = None
    epsilon_spent: Mapping[int, float] = field(default_factory=dict)
    accuracy_seen: float | None = None
    accuracy_seen_linear: float | None = None
    answer_losses: Sequence[float] = ()
    cluster_accuracy: float | None = None
    routing_accuracy: float | None = None
    accuracy_routed: float | None = None
    slots: Sequence[SlotLog] = ()


class FolderTaken(ValueError):
    """A run folder that another run writes to; the message says which."""


@dataclass
class RunFolder:
    """Writes a run's folder; every file is whole at any moment.

    Parameters
    ----------
    path
        Created if it is not there.
    """

    path: Path
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)

    @property
    def checkpoint(self) -> Path:
        """Folder of the checkpoint."""
        return self.path / names.CHECKPOINT

    @property
    def holds_rounds(self) -> bool:
        """Whether a run finished a round here: a fresh one would mix its files with that one's."""
        return names.holds_checkpoint(self.path)

    @contextmanager
    def only_ours(self) -> Iterator[None]:
        """Keep every other run out of the folder; the lock goes with the process, however it ends.

        Raises
        ------
        FolderTaken
            If another run writes here.
        """
        lock = os.open(self.path, os.O_RDONLY)  # the folder itself: no file is left behind
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FolderTaken(
                    f"another run writes to {self.path} just now; choose another out, or wait until it has ended"
                ) from None
            yield
        finally:
            os.close(lock)

    def write_config(self, flat: Mapping[str, Any]) -> None:
        """Write ``config.json``."""
        self._write(names.CONFIG, dict(flat))

    def check_config(self, flat: Mapping[str, Any]) -> None:
        """Refuse to go on with other settings than the folder's.

        Raises
        ------
        ValueError
            If a setting differs that may not: only where and how the run is carried out may.
        """
        before = with_later(json.loads((self.path / names.CONFIG).read_text()))
        changed = [key for key in flat if key not in MAY_CHANGE_ON_RESUME and flat[key] != before.get(key)]
        if changed:
            what = ", ".join(f"{key} {before.get(key)!r} -> {flat[key]!r}" for key in changed)
            raise ValueError(f"{self.path} was run with other settings ({what}); a resumed run keeps its own")

    def write_manifest(self, facts: Mapping[str, Any]) -> None:
        """Write ``manifest.json``: `facts`, the versions of what ran, and the commit."""
        versions = {"python": platform.python_version()}
        versions |= {name: importlib.metadata.version(name) for name in _LIBRARIES}
        self._write(
            names.MANIFEST,
            {
                "fedtalora_version": fedtalora_flwr.__version__,
                "versions": versions,
                "git_commit": _git_commit(),
                "started_at": datetime.now().astimezone().isoformat(timespec="seconds"),
                **facts,
            },
        )

    def update_manifest(self, facts: Mapping[str, Any]) -> None:
        """Write `facts` into ``manifest.json`` in place of what it says of them."""
        before = json.loads((self.path / names.MANIFEST).read_text())
        self._write(names.MANIFEST, {**before, **facts})

    def append_round(self, line: RoundLog) -> None:
        """Append a line to ``rounds.jsonl``; what does not apply to the round is left out."""
        values = asdict(line)
        for optional in _OPTIONAL:
            if values[optional] in (None, [], (), {}):
                del values[optional]
        round_lines.append(self.path / names.ROUNDS, _finite(values))

    def keep_rounds(self, last: int) -> list[Damage]:
        """Drop the lines of rounds after `last`, and those that are cut or damaged, which are given back."""
        path = self.path / names.ROUNDS
        lines, damages = round_lines.read(path)
        write_text(path, "".join(f"{line.raw.decode()}\n" for line in lines if line.values["server_round"] <= last))
        return damages

    def write_metrics(
        self,
        matrix: TaskMatrix,
        *,
        bytes_up: int,
        bytes_down: int,
        wall_seconds: float,
        num_rounds: int,
        evaluation: Mapping[str, Any],
    ) -> None:
        """Write ``metrics.json``, the result of a finished run, and what it has cost each client of its privacy.

        An empty evaluation is left out.
        """
        lines, _ = round_lines.read(self.path / names.ROUNDS)
        spent = epsilon_spent(line.values for line in lines)
        self._write(
            names.METRICS,
            {
                **measured(matrix),
                "bytes_up_total": bytes_up,
                "bytes_down_total": bytes_down,
                "wall_seconds": wall_seconds,
                "num_rounds": num_rounds,
                **({"epsilon_spent": spent} if spent else {}),
                **({"evaluation": evaluation} if evaluation else {}),
            },
        )

    def write_status(self, **values: Any) -> None:
        """Write ``status.json``, what the progress display shows; a full disk is for the checkpoint to report."""
        with suppress(OSError):
            self._write(names.STATUS, values)

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        write_text(self.path / name, json.dumps(_finite(value), indent=1) + "\n")


def _finite(value: Any) -> Any:
    """Replace NaN and infinities by null: JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _git_commit() -> str | None:
    """Name the commit of the checkout that holds this library, where there is one."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
