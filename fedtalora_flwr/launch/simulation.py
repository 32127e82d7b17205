"""Run one Flower app in the simulation runtime, with an honest exit status and nothing left behind.

``flwr run`` returns 0 for a failed run, and a killed SuperLink leaves its SuperExec, the simulation and all
of Ray alive. So `launch` owns no Flower process itself: it starts a `keeper`, a program in a session of its own,
which starts everything else and cleans up after it.
"""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from fedtalora_flwr.launch.supervisor import Job, LaunchError

COMPLETED = "finished:completed"
RAY_CONNECT_SECONDS = 3.0


@dataclass(frozen=True)
class LaunchResult:
    """How a run ended.

    Parameters
    ----------
    status
        Flower's own word: ``finished:completed``, ``finished:failed`` or ``finished:stopped``.
    details
        Flower's reason for it, empty for a completed run.
    run_id
        The run's id on its SuperLink.
    log_path
        The app's log.
    """

    status: str
    details: str
    run_id: int
    log_path: Path

    @property
    def ok(self) -> bool:
        """Tell whether the ServerApp came to its end."""
        return self.status == COMPLETED


def launch(
    app_dir: Path,
    *,
    run_config: Path,
    num_supernodes: int,
    work_dir: Path,
    on_tick: Callable[[], None],
    client_cpus: int = 1,
    client_gpus: float = 0.0,
    ray_cpus: int | None = None,
    ray_address: str | None = None,
    tick_seconds: float = 0.2,
) -> LaunchResult:
    """Run one app to its end on a SuperLink of its own, and on a Ray of its own or on a cluster that is there.

    Launches may run side by side. Every way out, exceptions and signals included, waits until no process
    and no temporary file of the run is left; a second Ctrl-C gives up the waiting, not the cleaning.

    Parameters
    ----------
    app_dir
        Folder with the app's pyproject.toml.
    run_config
        TOML file with the keys to override.
    num_supernodes
        Simulated clients.
    work_dir
        Folder for the logs, made if absent; logs of an earlier launch are overwritten.
    on_tick
        Called in this thread every `tick_seconds` until the run is cleaned up, and once more after it.
    client_cpus
        CPUs that Ray reserves for each client; clients at work = ray_cpus // client_cpus.
    client_gpus
        GPUs that Ray reserves for each client; fractions share one.
    ray_cpus
        CPUs that Ray may hand out; None: all it finds.
    ray_address
        HOST:PORT of a running Ray cluster of which this machine is a node; its clients take all its nodes' CPUs,
        so `ray_cpus` must be None. None: start a Ray for this run.
    tick_seconds
        Pause between two calls of `on_tick`.

    Raises
    ------
    LaunchError
        If Flower is not installed, the Ray cluster cannot be used, the SuperLink does not come up, ``flwr run``
        refuses the app or its configuration, or the SuperLink dies. A run that fails is no error: see
        `LaunchResult.ok`.
    ValueError
        If `ray_address` is not HOST:PORT, or comes with `ray_cpus`.
    SystemExit
        With code 143, on SIGTERM (in the main thread only).
    """
    _check(run_config)
    if ray_address is not None:
        if ray_cpus is not None:
            raise ValueError("ray_cpus sizes a Ray of the run's own; a cluster's CPUs are set by its ray start")
        check_ray_address(ray_address)
    work_dir.mkdir(parents=True, exist_ok=True)
    job = Job(
        app_dir=str(app_dir.resolve()),
        run_config=str(run_config.resolve()),
        federation_config=_federation_config(num_supernodes, client_cpus, client_gpus, ray_cpus),
        work_dir=str(work_dir.resolve()),
        ray_address=ray_address,
        client_cpus=client_cpus,
        client_gpus=client_gpus,
    )
    with sigterm_as_exit():
        report = json.loads(_follow(job, on_tick, tick_seconds) or '{"error": "No report, see keeper.log."}')
    on_tick()
    if "error" in report:
        raise LaunchError(f"{report['error']}\nAll logs: {work_dir}")
    return LaunchResult(report["status"], report["details"], report["run_id"], job.run_log)


def _check(run_config: Path) -> None:
    if not sys.platform.startswith("linux"):
        raise LaunchError(f"The local simulation needs Linux (child subreapers, /proc), got {sys.platform}.")
    superlink = Path(sysconfig.get_path("scripts"), "flower-superlink")
    if not superlink.is_file():
        command = f'{sys.executable} -m pip install "flwr[simulation]==1.39.*"'
        raise LaunchError(f"{superlink} not found. Install Flower: {command}")
    if not run_config.is_file():
        raise LaunchError(f"Run configuration {run_config} not found: give the path of a TOML file.")


def check_ray_address(ray_address: str) -> None:
    """Knock at the cluster's port: the common mistake is told at once, before anything is started.

    Raises
    ------
    ValueError
        If it is not HOST:PORT.
    LaunchError
        If nobody answers there.
    """
    host, colon, port = ray_address.rpartition(":")
    if not (colon and host and port.isdigit()) or "/" in host:
        raise ValueError(
            f"the address of a Ray cluster is HOST:PORT, as ray start --head prints it, got {ray_address!r}; ray:// "
            "and auto will not do, since a run joins as a node and no cluster but the one that is meant"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), RAY_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise LaunchError(
            f"no Ray cluster answers at {ray_address} ({error}). Start its head with: ray start --head --port {port}; "
            "docs/CLUSTER.md has all steps. Without the address the run starts a Ray of its own."
        ) from None


def _federation_config(num_supernodes: int, client_cpus: int, client_gpus: float, ray_cpus: int | None) -> str:
    keys = {
        "num-supernodes": num_supernodes,
        "client-resources-num-cpus": client_cpus,
        "client-resources-num-gpus": float(client_gpus),  # fractions share a GPU; the CPUs are whole
        "init-args-num-cpus": ray_cpus,
    }
    return " ".join(f"{key}={value}" for key, value in keys.items() if value is not None)


def _follow(job: Job, on_tick: Callable[[], None], tick_seconds: float) -> str:
    """Start the keeper, tick until it ends, and return its report (empty if it broke)."""
    # -I: nothing in PYTHONPATH or beside this file can shadow the keeper's imports.
    command = [sys.executable, "-I", str(Path(__file__).with_name("supervisor.py"))]
    with Path(job.work_dir, "keeper.log").open("w") as log:
        keeper = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    assert keeper.stdin is not None
    assert keeper.stdout is not None
    try:
        keeper.stdin.write(json.dumps(asdict(job)) + "\n")
        keeper.stdin.flush()
        while keeper.poll() is None:
            on_tick()
            with contextlib.suppress(subprocess.TimeoutExpired):
                keeper.wait(tick_seconds)
        return keeper.stdout.read()
    finally:
        keeper.stdin.close()
        keeper.wait()
        keeper.stdout.close()


@contextlib.contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Let SIGTERM unwind the stack, as Ctrl-C does; other threads than the main one cannot."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)
