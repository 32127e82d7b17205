"""Play a sweep's runs side by side: what is finished stays, what was stopped goes on, a failure stops no other run."""

import fcntl
import json
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from fedtalora_flwr.config import MAY_CHANGE_ON_RESUME, ConfigError, RunConfig
from fedtalora_flwr.launch.engine import Order, Playing, gpu_share, prepare
from fedtalora_flwr.launch.sweep.plan import Plan, PlannedRun
from fedtalora_flwr.run_folder import names

_TICK_SECONDS = 0.2
_RUN_BYTES = 2 * 2**30  # memory of one run, generously: libraries, a backbone, its data


Standing = Literal["nothing", "other", "stopped", "finished"]
"""What stands in a run's folder: nothing, a run that is finished or was stopped, or one of other settings."""


@dataclass(frozen=True)
class Outcome:
    """How a run of a sweep ended.

    Parameters
    ----------
    run, folder
        Which, and where it stands.
    failure
        Why it failed; empty for a finished run.
    """

    run: PlannedRun
    folder: Path
    failure: str = ""


class Watch(Protocol):
    """Somebody who is told how a sweep goes."""

    def begins(self, name: str, folder: Path, *, resumed: bool) -> None:
        """Learn that a run begins or goes on."""

    def ends(self, outcome: Outcome) -> None:
        """Learn how a run ended."""

    def tick(self) -> None:
        """Look at what is going on."""


def side_by_side(plan: Plan) -> int:
    """Choose how many runs go at a time: by the plan's ``jobs``, else by cores, memory and what a run needs."""
    if plan.jobs:
        return plan.jobs
    cores = os.cpu_count() or 1
    clients = 1 if plan.engine == "process" else max(run.config.num_clients for run in plan.runs)
    by_cores = cores // (clients * max(run.config.threads for run in plan.runs))
    return max(1, min(by_cores, _available_bytes() // _RUN_BYTES, len(plan.runs)))


def standing(plan: Plan, folder: Path) -> dict[str, Standing]:
    """Tell of each run, by its name, what stands in `folder` for it."""
    return {run.name: _standing(folder / run.name, run.config) for run in plan.runs}


def play_all(plan: Plan, folder: Path, *, app: Path, jobs: int, watch: Watch) -> list[Outcome]:
    """Play what is not finished, `jobs` runs at a time, and give how each run of the plan ended.

    Every way out, exceptions and signals included, stops the runs that are at work and waits until they are gone.

    Parameters
    ----------
    plan
        The runs.
    folder
        Holds a run folder each. A run that stands there with other settings is moved to ``set-aside``.
    app
        Folder of the Flower app.
    jobs
        Runs side by side.
    watch
        Told how it goes.

    Raises
    ------
    ConfigError
        If another sweep is at work in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: dict[str, Outcome] = {}
    waiting: deque[PlannedRun] = deque()
    playing: dict[str, tuple[Outcome, Playing]] = {}
    with _alone(folder):
        for run in plan.runs:
            found = _standing(folder / run.name, run.config)
            if found == "finished":
                outcomes[run.name] = Outcome(run, folder / run.name)
                continue
            if found == "other":
                _set_aside(folder / run.name)
            waiting.append(run)
        try:
            while waiting or playing:
                while waiting and len(playing) < jobs:
                    run = waiting.popleft()
                    out = folder / run.name
                    resumed = names.holds_checkpoint(out)
                    watch.begins(run.name, out, resumed=resumed)
                    config = replace(run.config, out=str(out), resume=resumed)
                    try:
                        playing[run.name] = Outcome(run, out), Playing(_order(plan, config, app=app, jobs=jobs))
                    except OSError as error:  # its folder cannot be written
                        outcomes[run.name] = Outcome(run, out, failure=str(error))
                        watch.ends(outcomes[run.name])
                time.sleep(_TICK_SECONDS)
                for name, (outcome, process) in list(playing.items()):
                    if process.wait(0):
                        del playing[name]
                        outcomes[name] = replace(outcome, failure=_failure(outcome.folder, process))
                        watch.ends(outcomes[name])
                watch.tick()
        finally:
            for _, process in playing.values():
                process.ask_to_stop()
            for _, process in playing.values():
                process.stop()
    return [outcomes[run.name] for run in plan.runs]


def _order(plan: Plan, config: RunConfig, *, app: Path, jobs: int) -> Order:
    cpus = max(1, (os.cpu_count() or 1) // jobs)
    return Order(
        app_dir=app,
        run_config=prepare(config),
        work_dir=Path(config.out) / "logs",
        engine=plan.engine,
        num_clients=config.num_clients,
        client_cpus=min(config.threads, cpus),
        client_gpus=gpu_share(-1, device=config.device) / jobs,
        cpus=cpus,
    )


def _standing(folder: Path, config: RunConfig) -> Standing:
    if (found := names.standing(folder)) == "nothing":
        return found
    try:
        before, wanted = json.loads((folder / names.CONFIG).read_text()), config.flat()
    except ValueError:  # cut off
        return "other"
    if any(before.get(key) != wanted[key] for key in wanted if key not in MAY_CHANGE_ON_RESUME):
        return "other"
    return found


def _set_aside(folder: Path) -> None:
    """Move a run's folder out of the way, under a name that is free."""
    aside = folder.parent / "set-aside"
    aside.mkdir(exist_ok=True)
    number = 1
    while (target := aside / f"{folder.name}-{number}").exists():
        number += 1
    folder.rename(target)


def _failure(folder: Path, process: Playing) -> str:
    """Say why a run failed: by its own words, else by its process's end; empty where it did not."""
    if process.ok and (folder / names.METRICS).is_file():
        return ""
    path = folder / names.STATUS
    status = json.loads(path.read_text()) if path.is_file() else {}
    return str(status.get("message") or process.details) if status.get("phase") == "failed" else process.details


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder against a second sweep; the lock goes with the process."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another sweep is at work in {folder}; wait for it, or give another --out") from None
        yield


def _available_bytes() -> int:
    """Give the memory that new processes can have, as Linux sees it."""
    facts: Sequence[str] = Path("/proc/meminfo").read_text().splitlines()
    available = next(line for line in facts if line.startswith("MemAvailable:"))
    return int(available.split()[1]) * 1024
