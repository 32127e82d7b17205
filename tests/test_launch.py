"""A launch tells how its run ended and leaves nothing behind: real SuperLinks, real Ray, real signals."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from flwr.cli.build import build_fab_from_disk

from fedtalora_flwr.launch.simulation import LaunchResult, launch
from fedtalora_flwr.launch.supervisor import LaunchError, stage

pytestmark = pytest.mark.ray

APP = Path(__file__).parent / "launch_app"
NUM_SUPERNODES = 3
START_SECONDS = 120  # a cold start of Ray on a loaded machine
GONE_SECONDS = 40
ESSENTIAL = (
    "flower-superlink",
    "flower-superexec",
    "flwr-simulation",
    "gcs_server",
    "raylet",
    "ray::ClientAppActor",
)


def run_app(work_dir: Path, toml: str) -> LaunchResult:
    work_dir.mkdir(exist_ok=True)
    config = work_dir / "run-config.toml"
    config.write_text(toml)
    ticks: list[float] = []
    try:
        return launch(
            APP,
            run_config=config,
            num_supernodes=NUM_SUPERNODES,
            ray_cpus=2,
            work_dir=work_dir,
            on_tick=lambda: ticks.append(time.monotonic()),
        )
    finally:
        assert len(ticks) > 1


@dataclass(frozen=True)
class Traces:
    """What the run with this work folder can leave on the machine."""

    port: int
    home: Path

    @classmethod
    def read(cls, work_dir: Path) -> "Traces":
        found = re.search(r"port (\d+), home (\S+)", (work_dir / "keeper.log").read_text())
        assert found is not None
        return cls(int(found[1]), Path(found[2]))

    def processes(self) -> list[str]:
        commands = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
        return [c for c in commands if f"127.0.0.1:{self.port}" in c or str(self.home) in c]

    def assert_none(self) -> None:
        assert self.processes() == []
        assert not self.home.exists()
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", self.port))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LaunchResult]:
    """Run an app that succeeds and one that raises, side by side."""
    folder = tmp_path_factory.mktemp("pair")
    with ThreadPoolExecutor() as pool:
        futures = {b: pool.submit(run_app, folder / b, f'behaviour = "{b}"') for b in ("succeed", "raise")}
    return {behaviour: future.result() for behaviour, future in futures.items()}


def test_completed_run_is_ok_and_its_log_holds_what_the_app_printed(pair: dict[str, LaunchResult]) -> None:
    result = pair["succeed"]
    assert result.ok
    assert (result.status, result.details) == ("finished:completed", "")
    assert f"round 1: {NUM_SUPERNODES} replies" in result.log_path.read_text()


def test_failed_run_is_not_ok_and_says_why(pair: dict[str, LaunchResult]) -> None:
    result = pair["raise"]
    assert not result.ok
    assert result.status == "finished:failed"
    assert "the app was asked to fail" in result.details


def test_ended_runs_leave_no_process_no_folder_and_no_port(pair: dict[str, LaunchResult]) -> None:
    traces = [Traces.read(result.log_path.parent) for result in pair.values()]
    assert traces[0].port != traces[1].port
    for each in traces:
        each.assert_none()


def test_unknown_key_is_a_launch_error_with_the_message_of_flwr(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="Invalid run configuration"):
        run_app(tmp_path, "no-such-key = 1")
    Traces.read(tmp_path).assert_none()


def test_missing_flower_is_a_launch_error_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(LaunchError, match=r"flower-superlink not found.*pip install"):
        launch(APP, run_config=tmp_path / "x", num_supernodes=1, work_dir=tmp_path, on_tick=lambda: None)


def test_exception_of_on_tick_ends_the_run_and_restores_the_signal_handler(tmp_path: Path) -> None:
    def on_tick() -> None:
        if (tmp_path / "superlink.log").exists():
            raise RuntimeError("the caller is tired")

    config = tmp_path / "run-config.toml"
    config.touch()
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="tired"):
        launch(APP, run_config=config, num_supernodes=1, work_dir=tmp_path, on_tick=on_tick)
    assert signal.getsignal(signal.SIGTERM) is handler
    Traces.read(tmp_path).assert_none()


INCLUDED = ["{name}/**/*.py", "LICENSE"]


def make_app(folder: Path, *, include: list[str]) -> Path:
    """Copy the small app, say what belongs to it, and put beside it what does not."""
    shutil.copytree(APP, folder, ignore=shutil.ignore_patterns("__pycache__"))
    [package] = {path.parent.name for path in folder.glob("*/*.py")}
    pyproject = (folder / "pyproject.toml").read_text()
    patterns = [pattern.format(name=package) for pattern in include]
    said = pyproject.replace("[tool.flwr.app]", f"[tool.flwr.app]\nfab-include = {patterns}")
    assert said != pyproject
    (folder / "pyproject.toml").write_text(said)
    (folder / "LICENSE").write_text("as is")
    for other in (".venv/lib/code.py", "docs/notes.md", f"{package}/notes.txt"):
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_text("not the app's")
    return folder


def test_staged_app_gives_the_bundle_of_its_folder_without_what_is_beside_it(tmp_path: Path) -> None:
    app = make_app(tmp_path / "app", include=INCLUDED)
    staged = stage(app, tmp_path / "staged")
    assert staged == tmp_path / "staged"
    assert not (staged / ".venv").exists() and not (staged / "docs").exists()
    assert build_fab_from_disk(staged) == build_fab_from_disk(app)


@pytest.mark.parametrize("include", [["**/*.py"], ["*.py", "{name}/**/*.py"], ["/{name}/*.py"], ["other/*.py"], []])
def test_app_whose_folders_are_not_named_is_bundled_from_where_it_is(tmp_path: Path, include: list[str]) -> None:
    app = make_app(tmp_path / "app", include=include)
    assert stage(app, tmp_path / "staged") == app
    assert not (tmp_path / "staged").exists()


@dataclass(frozen=True)
class Launcher:
    """A python of its own that launches an app which sleeps; `tree` is every process below it."""

    process: subprocess.Popen[bytes]
    keeper: psutil.Process
    tree: dict[psutil.Process, str]  # to its command line
    traces: Traces

    def named(self, name: str) -> list[psutil.Process]:
        return [process for process, command in self.tree.items() if name in command]

    def alive(self) -> list[str]:
        return [command for process, command in self.tree.items() if is_alive(process)]

    def essential_are_alive(self) -> bool:
        return all(is_alive(process) for name in ESSENTIAL for process in self.named(name))


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it ended while we looked
        return ""


def start_launcher(work_dir: Path) -> Launcher:
    work_dir.mkdir(exist_ok=True)
    marker = work_dir / "asleep"
    toml = f'behaviour = "sleep"\nmarker = "{marker}"'
    code = "import pathlib, signal, test_launch\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where the tests run in background
    code += f"test_launch.run_app(pathlib.Path({str(work_dir)!r}), {toml!r})"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    with (work_dir / "launcher.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code], env=env, stdout=log, stderr=log, start_new_session=True
        )
    try:
        await_marker(marker, process)
        tree = {p: command_line(p) for p in psutil.Process(process.pid).children(recursive=True)}
        launcher = Launcher(process, psutil.Process(process.pid).children()[0], tree, Traces.read(work_dir))
        # What follows means something only if Ray is in the tree we watch.
        assert all(launcher.named(name) for name in ESSENTIAL)
        assert all(str(launcher.traces.home) in tree[p] for p in launcher.named("raylet/raylet"))
    except BaseException:
        process.kill()
        raise
    return launcher


def await_marker(marker: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not marker.exists():
        assert process.poll() is None, (marker.parent / "launcher.log").read_text()
        assert time.monotonic() < deadline, (marker.parent / "flwr-run.log").read_text()
        time.sleep(0.2)


@pytest.fixture(scope="module")
def neighbour(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Keep another launch running, which must not notice how the ones beside it end."""
    launcher = start_launcher(tmp_path_factory.mktemp("neighbour"))
    yield launcher
    launcher.process.terminate()
    launcher.process.wait(GONE_SECONDS)


def test_a_runs_own_ray_lets_nobody_in_who_was_not_given_its_token(neighbour: Launcher) -> None:
    (gcs,) = neighbour.named("gcs_server")
    port = next(each.laddr.port for each in gcs.net_connections("tcp") if each.status == psutil.CONN_LISTEN)
    code = f"import ray\nray.init('127.0.0.1:{port}', log_to_driver=False)\nprint('let in')"
    stranger = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    stranger |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # else it would look for 127.0.0.1 at another address
    tried = subprocess.run([sys.executable, "-c", code], env=stranger, capture_output=True, text=True, timeout=60)
    assert tried.returncode and "let in" not in tried.stdout
    assert "auth" in tried.stderr.lower()


def test_a_run_listens_on_loopback_alone(neighbour: Launcher) -> None:
    found = {
        (each.laddr.ip.removeprefix("::ffff:"), Path(neighbour.tree[process].split()[0]).name)
        for process in neighbour.tree
        if is_alive(process)
        for each in process.net_connections("inet")
        if each.status == psutil.CONN_LISTEN
    }
    assert len(found) > 2  # the SuperLink and Ray's parts
    assert {(ip, name) for ip, name in found if ip != "127.0.0.1"} == set()


@pytest.mark.parametrize(
    ("crashed", "signals", "code"),
    [
        pytest.param([], [signal.SIGTERM], 143, id="SIGTERM"),
        pytest.param([], [signal.SIGINT, signal.SIGINT], -signal.SIGINT, id="SIGINT-twice", marks=pytest.mark.full),
        pytest.param([], [signal.SIGKILL], -signal.SIGKILL, id="SIGKILL"),
        # Ray's processes are orphans now: nothing above them is left to take them along.
        pytest.param(
            ["flower-superexec", "flwr-simulation", "raylet/raylet"],
            [signal.SIGKILL],
            -signal.SIGKILL,
            id="SIGKILL-after-a-crash",
            marks=pytest.mark.full,
        ),
    ],
)
def test_killed_launcher_leaves_nothing_and_spares_its_neighbour(
    tmp_path: Path, neighbour: Launcher, crashed: list[str], signals: list[signal.Signals], code: int
) -> None:
    launcher = start_launcher(tmp_path)
    for name in crashed:
        for process in launcher.named(name):
            process.kill()
    for number in signals:
        os.killpg(launcher.process.pid, number)  # the whole group, as a terminal does
        time.sleep(0.5)
    assert launcher.process.wait(GONE_SECONDS) == code

    deadline = time.monotonic() + GONE_SECONDS
    while is_alive(launcher.keeper) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert launcher.alive() == []
    launcher.traces.assert_none()
    assert neighbour.essential_are_alive()


def test_launch_outside_the_main_thread_leaves_signal_handlers_alone(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def on_tick() -> None:
        seen.append(signal.getsignal(signal.SIGTERM))
        raise RuntimeError

    def in_thread() -> None:
        (tmp_path / "c.toml").touch()
        with pytest.raises(RuntimeError):
            launch(APP, run_config=tmp_path / "c.toml", num_supernodes=1, work_dir=tmp_path, on_tick=on_tick)

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert seen == [handler]
