"""Play a run in a process of its own: in that process alone, or from there on Flower's simulation with Ray.

Runs in one process are forked from a server that has loaded the libraries before (`multiprocessing`'s forkserver), so
only the first run of a session waits for them. A run prints into ``logs/run.log`` and ends with the process that
started it, however that one ends.
"""

import multiprocessing
import os
import signal
import sys
import threading
import tomllib
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType

import tomli_w

from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.launch.simulation import launch
from fedtalora_flwr.launch.supervisor import LaunchError
from fedtalora_flwr.run_folder import names

ENGINES = ("ray", "process")

_PRELOADED = [
    *("torch", "timm", "peft", "transformers", "datasets", "flwr.serverapp.strategy"),
    *(f"fedtalora_flwr.{name}" for name in ("launch.in_process", "server.run", "client.handlers")),
]
_STOP_SECONDS = 60.0  # for a stopped run to clean up: Ray takes its time


@dataclass(frozen=True)
class Order:
    """What a run needs to be played.

    Parameters
    ----------
    app_dir
        Folder with the app's ``pyproject.toml``.
    run_config
        TOML file with every setting.
    work_dir
        Folder for the logs.
    engine
        One of `ENGINES`.
    num_clients, client_cpus, client_gpus, cpus
        Of Ray: simulated clients, what each reserves, and CPUs for all of them.
    """

    app_dir: Path
    run_config: Path
    work_dir: Path
    engine: str = "process"
    num_clients: int = 1
    client_cpus: int = 1
    client_gpus: float = 0.0
    cpus: int | None = None


def prepare(config: RunConfig) -> Path:
    """Make the run's folder, ``out``, ready to be played, and give the file with its settings."""
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names.STATUS).unlink(missing_ok=True)
    run_config = folder / "run-config.toml"
    run_config.write_text(tomli_w.dumps(config.flat()))
    return run_config


def gpu_share(asked: float, *, device: str) -> float:
    """Choose the GPU share of a client, -1 by the machine: Ray hides the GPU from a client that has none of it."""
    if asked >= 0:
        return asked
    gpus = Path("/proc/driver/nvidia/gpus")
    return 0.2 if device != "cpu" and gpus.is_dir() and any(gpus.iterdir()) else 0.0


class Playing:
    """A run that is being played; as a context it is stopped at the end.

    Parameters
    ----------
    order
        What to play; it starts at once.
    """

    def __init__(self, order: Order) -> None:
        order.work_dir.mkdir(parents=True, exist_ok=True)
        self.log_path = order.work_dir / "run.log"
        context = multiprocessing.get_context("forkserver")
        # Runs side by side would otherwise burn each other's cores while their threads wait; read when OpenMP loads.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        context.set_forkserver_preload(_PRELOADED)
        self._process: BaseProcess = context.Process(target=_play, args=(order,), daemon=True)
        with _without_main():
            self._process.start()

    def __enter__(self) -> "Playing":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait(self, seconds: float) -> bool:
        """Wait for the end, and tell whether it came."""
        self._process.join(seconds)
        return self._process.exitcode is not None

    @property
    def ok(self) -> bool:
        """Whether the run has come to its end without an error."""
        return self._process.exitcode == 0

    @property
    def details(self) -> str:
        """Say why the run failed, as far as its end tells."""
        code = self._process.exitcode
        if code is not None and code < 0:
            return f"its process was ended by {signal.Signals(-code).name}"
        lines = self.log_path.read_text(errors="replace").strip().splitlines() if self.log_path.exists() else []
        return lines[-1] if lines else "it printed nothing"

    def ask_to_stop(self) -> None:
        """Send SIGTERM, and do not wait."""
        if self._process.exitcode is None:
            self._process.terminate()

    def stop(self) -> None:
        """End the run where it still goes on, and wait until it is gone."""
        self.ask_to_stop()
        if not self.wait(_STOP_SECONDS):
            self._process.kill()
            self._process.join()


@contextmanager
def _without_main() -> Iterator[None]:
    """Let a new process not run the main module again, of which it needs nothing: a script needs no ``if __name__``."""
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def follow(order: Order, on_tick: Callable[[], None], *, tick_seconds: float = 0.2) -> Playing:
    """Play a run to its end, calling `on_tick` every `tick_seconds` and once more after it."""
    with Playing(order) as playing:
        while not playing.wait(tick_seconds):
            on_tick()
    on_tick()
    return playing


def _play(order: Order) -> None:
    """Play the run in this process, which ends with its starter's."""
    threading.Thread(target=_end_with_starter, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C goes to all; the starter answers for them
    log = os.open(order.work_dir / "run.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    try:
        if order.engine == "ray":
            _play_on_ray(order)
        else:
            from fedtalora_flwr.launch.in_process import play

            with order.run_config.open("rb") as file:
                play(order.app_dir, tomllib.load(file))
    except Exception as error:
        traceback.print_exc()
        print(f"{error}" or type(error).__name__, flush=True)
        sys.exit(1)


def _end_with_starter() -> None:
    starter = multiprocessing.parent_process()
    assert starter is not None
    wait([starter.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def _play_on_ray(order: Order) -> None:
    result = launch(
        order.app_dir,
        run_config=order.run_config,
        num_supernodes=order.num_clients,
        work_dir=order.work_dir,
        on_tick=lambda: None,
        client_cpus=order.client_cpus,
        client_gpus=order.client_gpus,
        ray_cpus=order.cpus,
    )
    if not result.ok:
        raise LaunchError(result.details)
