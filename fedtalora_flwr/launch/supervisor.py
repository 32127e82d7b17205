"""Start a run's SuperLink and ``flwr run``, and leave no process behind: a program of Python's own modules alone.

The *keeper* is what `launch` starts, this file in a session of its own. It lives for as long as `launch` holds the
other end of its stdin. The kernel closes that pipe however the launching process ends, SIGKILL included, and no
Ctrl-C reaches another session.

It is the *child subreaper* of its tree (prctl(2)): a process whose parent dies becomes the keeper's child, not
init's. Therefore its descendants are exactly the processes of this run, Ray's among them, and "no child left"
proves that the run left nothing. No process is ever chosen by its name alone.

With a `ray_address` the run's clients are actors on a Ray cluster that is there already. Its processes are no
descendants of the keeper, which therefore cannot stop them; Ray ends the actors when their run's driver ends.

Files in the work folder: ``superlink.log`` (SuperLink, simulation and Ray), ``flwr-run.log`` (the app's log
as ``flwr run --stream`` shows it) and ``keeper.log`` (port, temporary folder, what was stopped and how).
"""

import contextlib
import ctypes
import http.client
import json
import logging
import os
import random
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

CONNECTION = "run"  # a named connection: Flower's default one starts a daemon that stays
SUPERLINK_START_SECONDS = 60.0
STATUS_POLL_SECONDS = 5.0  # a flwr call costs about one second of CPU
ROOT_FILES = ("pyproject.toml", "LICENSE", ".gitignore")  # of an app, beside its folders
RAY_PROBE_SECONDS = 40.0  # longer than cluster.py waits (FREE_SECONDS) for CPUs that another run is giving back
PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>

logger = logging.getLogger("keeper")


class LaunchError(RuntimeError):
    """The run could not be started or followed; the message carries the tail of the log that says why."""


@dataclass(frozen=True)
class Job:
    """What the keeper needs to know, as it goes through the pipe."""

    app_dir: str
    run_config: str
    federation_config: str
    work_dir: str
    ray_address: str | None
    client_cpus: int
    client_gpus: float

    @property
    def superlink_log(self) -> Path:
        """Log of the SuperLink, the simulation and Ray."""
        return Path(self.work_dir, "superlink.log")

    @property
    def run_log(self) -> Path:
        """Log of the app."""
        return Path(self.work_dir, "flwr-run.log")

    @property
    def ray_log(self) -> Path:
        """What came of the look at a Ray cluster."""
        return Path(self.work_dir, "ray-cluster.json")


# --- Running --------------------------------------------------------------------------------------


class _ReleasedError(Exception):
    """The launching side let go of the pipe, or died."""


def _keep() -> None:
    """Run the job that stands on the first line of stdin; clean up at its end or at the end of stdin."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Not SIG_IGN: children inherit that, and would be deaf to the SIGTERM that ends them.
        signal.signal(number, lambda *_: None)
    line = sys.stdin.readline()
    if not line:
        return
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    # Short and in /tmp: Ray's socket paths below it must stay under 107 bytes.
    home = Path(tempfile.mkdtemp(prefix="ftl-", dir="/tmp"))
    report: dict[str, object] = {"error": "released"}
    try:
        report = _run(Job(**json.loads(line)), home)
    except _ReleasedError:
        logger.info("released before the end of the run")
    except (LaunchError, OSError, subprocess.TimeoutExpired) as error:
        report = {"error": str(error)}
    finally:
        _clean(finished="status" in report)
        shutil.rmtree(home, ignore_errors=True)
        logger.info("removed %s, left over: %s", home, list(_descendants()))
    with contextlib.suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), json.dumps(report).encode())


def _run(job: Job, home: Path) -> dict[str, object]:
    """Run the app on a SuperLink of its own and return ``status``, ``details`` and ``run_id``."""
    port, claim = claim_port()
    with claim:
        logger.info("port %d, home %s", port, home)
        app = stage(Path(job.app_dir), home / "app")
        env = _environment(home, job, app)
        cwd = home / "cwd"  # empty: Ray's workers import from the SuperLink's folder before the app's own
        cwd.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n'
            f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        probe = _start(_probe_command(job), env, cwd, job.ray_log) if job.ray_address else None
        superlink = _start(_superlink_command(port), env, cwd, job.superlink_log)
        _await_health(superlink, port, job.superlink_log)
        if probe is not None:
            _await_probe(probe, job)
        cli = _start(_run_command(job, app), env, cwd, job.run_log)
        while cli.poll() is None:
            _require_alive(superlink, job.superlink_log)
            _pause(0.2)
        started = re.search(r"Successfully started run (\d+)", job.run_log.read_text(errors="replace"))
        if started is None:
            raise LaunchError(f"flwr run refused the app {job.app_dir}:\n{_tail(job.run_log)}")
        run_id = int(started[1])
        status, details = _await_status(run_id, superlink, env, cwd, job.superlink_log)
        logger.info("run %d: %s", run_id, status)
        return {"status": status, "details": details, "run_id": run_id}


def claim_port() -> tuple[int, socket.socket]:
    """Return a free port of 127.0.0.1 and the claim that keeps other keepers off it.

    The port must be named before the SuperLink binds it. Drawn below Linux's ephemeral range and above Ray's
    worker ports, so no outgoing connection takes it meanwhile; an abstract socket (gone with its process)
    tells the keepers of this machine apart.
    """
    for port in random.SystemRandom().sample(range(20000, 32000), 200):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0fedtalora-port-{port}")
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))
        except OSError:
            claim.close()
            continue
        return port, claim
    raise LaunchError("No free port on 127.0.0.1 among 200 drawn from 20000-31999.")


def stage(app_dir: Path, folder: Path) -> Path:
    """Copy the folders that make up the app's bundle, and return where it is then to be bundled from.

    ``flwr run`` looks at every file below the app's folder; in a checkout with a ``.venv`` those are tens of thousands,
    and seconds. Only where ``fab-include`` names folders is it plain what belongs to the app.
    """
    patterns = [pattern.partition("/") for pattern in _fab_include(app_dir) if pattern not in ROOT_FILES]
    if not patterns or not all(slash and name and (app_dir / name).is_dir() for name, slash, _ in patterns):
        return app_dir
    folder.mkdir()
    for name in ROOT_FILES:
        if (app_dir / name).is_file():
            shutil.copyfile(app_dir / name, folder / name)
    for name in sorted({name for name, _, _ in patterns}):
        shutil.copytree(app_dir / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def _fab_include(app_dir: Path) -> list[str]:
    try:
        with (app_dir / "pyproject.toml").open("rb") as file:
            return [str(pattern) for pattern in tomllib.load(file)["tool"]["flwr"]["app"]["fab-include"]]
    except (OSError, ValueError, LookupError, TypeError):
        return []  # flwr run says what is wrong with it


def _environment(home: Path, job: Job, app: Path) -> dict[str, str]:
    env = dict(os.environ)
    env.pop("RAY_ADDRESS", None)  # Ray would join that cluster instead of starting its own
    no_proxy = ",".join(filter(None, [env.get("no_proxy") or env.get("NO_PROXY"), "127.0.0.1", "localhost"]))
    return (
        env
        | _ray_environment(home, job, app)
        | {
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",  # seconds until a submitted run is started; 1 by default
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": os.pathsep.join(filter(None, [sysconfig.get_path("scripts"), env.get("PATH")])),
            "PYTHONUNBUFFERED": "1",  # the logs are files: without it they lag behind the run
            "no_proxy": no_proxy,
            "NO_PROXY": no_proxy,
        }
    )


def _ray_environment(home: Path, job: Job, app: Path) -> dict[str, str]:
    """Tell Ray where to live: in `home`, or on a cluster, to which it then carries the app's client side.

    Flower 1.39 passes no address to ``ray.init``, which therefore reads RAY_ADDRESS. It does pass an environment for
    the workers, with this machine's ``sys.path``; the other nodes do not have the app's folder that is on it. Ray
    merges the job configuration below with that environment and unpacks the packages on every node.
    """
    if job.ray_address is None:
        return {
            "RAY_TMPDIR": str(home),
            # Whoever reaches Ray unasked could run code as us: other users of this machine have no token ...
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            # ... and other machines no way. Without clusters Ray takes loopback for its address, on Linux too.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }
    packages = [str(folder) for folder in sorted(app.iterdir()) if (folder / "__init__.py").is_file()]
    config = {"runtime_env": {"py_modules": packages}}
    return {"RAY_ADDRESS": job.ray_address, "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(config)}


def _script(name: str) -> str:
    return str(Path(sysconfig.get_path("scripts"), name))


def _superlink_command(port: int) -> list[str]:
    command = [_script("flower-superlink"), "--insecure", "--simulation", "--host", "127.0.0.1"]
    return [*command, "--port", str(port), "--disable-runtime-dependency-installation"]


def _run_command(job: Job, app: Path) -> list[str]:
    command = [_script("flwr"), "run", str(app), CONNECTION, "--stream"]
    return [*command, "--federation-config", job.federation_config, "--run-config", job.run_config]


def _probe_command(job: Job) -> list[str]:
    program = str(Path(__file__).with_name("ray_probe.py"))
    return [sys.executable, "-I", program, str(job.ray_address), str(job.client_cpus), str(job.client_gpus)]


def _start(command: list[str], env: dict[str, str], cwd: Path, log_path: Path) -> subprocess.Popen[bytes]:
    with log_path.open("w") as log:
        return subprocess.Popen(
            command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )


def _pause(seconds: float) -> None:
    """Sleep, but raise `_ReleasedError` as soon as the launching side is gone."""
    if select.select([sys.stdin], [], [], seconds)[0]:
        raise _ReleasedError


def _await_health(superlink: subprocess.Popen[bytes], port: int, log_path: Path) -> None:
    deadline = time.monotonic() + SUPERLINK_START_SECONDS
    while not _healthy(port):
        _require_alive(superlink, log_path)
        if time.monotonic() > deadline:
            raise LaunchError(f"No SuperLink within {SUPERLINK_START_SECONDS:.0f} s:\n{_tail(log_path)}")
        _pause(0.1)


def _await_probe(probe: subprocess.Popen[bytes], job: Job) -> None:
    """Wait for the verdict on the cluster, the last line that the probe prints."""
    deadline = time.monotonic() + RAY_PROBE_SECONDS
    while probe.poll() is None:
        if time.monotonic() > deadline:
            raise LaunchError(
                f"what listens at {job.ray_address} does not answer as a Ray cluster within {RAY_PROBE_SECONDS:.0f} s; "
                "ray status --address shows whether it is one"
            )
        _pause(0.1)
    try:
        verdict = json.loads(job.ray_log.read_text(errors="replace").splitlines()[-1])
    except (IndexError, ValueError):
        raise LaunchError(f"Ray could not join the cluster at {job.ray_address}:\n{_tail(job.ray_log)}") from None
    if "error" in verdict:
        raise LaunchError(verdict["error"])
    logger.info("cluster %s: %s", job.ray_address, verdict["nodes"])


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=0.5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _require_alive(superlink: subprocess.Popen[bytes], log_path: Path) -> None:
    if superlink.poll() is not None:
        raise LaunchError(f"The SuperLink ended with code {superlink.returncode}:\n{_tail(log_path)}")


def _await_status(
    run_id: int, superlink: subprocess.Popen[bytes], env: dict[str, str], cwd: Path, log_path: Path
) -> tuple[str, str]:
    """Ask for the run until it is finished; the log stream may end a little before it, or break off."""
    command = [_script("flwr"), "ls", CONNECTION, "--run-id", str(run_id), "--format", "json"]
    while True:
        _require_alive(superlink, log_path)
        answer = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=60)
        try:
            row = json.loads(answer.stdout)["runs"][0]
        except (ValueError, LookupError):
            said = answer.stdout + answer.stderr
            raise LaunchError(f"flwr ls gave no status of run {run_id}:\n{said}") from None
        if row["status"].startswith("finished"):
            details = row["status-details"]
            return row["status"], "" if details == "N/A" else details
        _pause(STATUS_POLL_SECONDS)


def _tail(log_path: Path, *, num_lines: int = 30) -> str:
    return "\n".join(log_path.read_text(errors="replace").rstrip().splitlines()[-num_lines:])


# --- Cleaning up ----------------------------------------------------------------------------------


def _clean(*, finished: bool) -> None:
    """Stop what is left of the run from the inside out: simulation and Ray, SuperLink, the rest."""
    if finished:
        _settle("flwr-simulation", 15)  # it is still closing Ray
    _signal("flwr-simulation", signal.SIGTERM)
    _settle("flwr-simulation", 10)
    _signal("flower-superlink", signal.SIGTERM)
    _signal("flwr", signal.SIGTERM)
    _settle("", 3)  # not longer: after an abort the SuperExec may hang in its exit handler for 40 s
    deadline = time.monotonic() + 10
    while not _childless() and time.monotonic() < deadline:
        _signal("", signal.SIGKILL)
        time.sleep(0.1)


def _descendants() -> dict[int, str]:
    """Return the live processes below this one: process id to command line."""
    parents, commands = {}, {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it ended while we looked
            # "pid (name) state parent ...", where the name may hold blanks and brackets
            state, parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
            parents[int(entry.name)] = int(parent)
            if state not in "ZX":
                commands[int(entry.name)] = (entry / "cmdline").read_text(errors="replace").replace("\0", " ")
    return {pid: command for pid, command in commands.items() if _is_below(pid, os.getpid(), parents)}


def _is_below(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid in parents:
        pid = parents[pid]
        if pid == ancestor:
            return True
    return False


def _named(name: str) -> dict[int, str]:
    """Return our descendants that run the program `name`; all of them for an empty name."""
    return {
        pid: command
        for pid, command in _descendants().items()
        if not name or any(Path(word).name == name for word in command.split()[:2])
    }


def _signal(name: str, number: signal.Signals) -> None:
    for pid, command in _named(name).items():
        logger.info("%s to %d: %s", number.name, pid, command[:120])
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _settle(name: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not _childless() and _named(name) and time.monotonic() < deadline:
        time.sleep(0.1)


def _childless() -> bool:
    """Collect ended children; True proves the tree empty, for every orphan in it becomes our child."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return True
    return False


if __name__ == "__main__":
    _keep()
