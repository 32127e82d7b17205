"""The wheel is the whole product: built, installed into an empty environment, and used in an empty folder."""

import contextlib
import os
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_grid import ROOT

import fedtalora_flwr as fedtalora

PROGRAMS = (
    "flwr",
    "flower-superlink",
    "flower-supernode",
    "flower-superexec",
    "flwr-serverapp",
    "flwr-clientapp",
    "flwr-simulation",
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give the programs of an environment with the wheel, whose libraries are those of this one."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("this is no checkout: what belongs to the source is not known")
    for name in filter(None, tracked.stdout.split("\0")):
        if not name.startswith(("tests/", "docs/")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", place, source], check=True, timeout=300)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / "env"], check=True)
    python = place / "env" / "bin" / "python"
    home = Path(sysconfig.get_path("purelib", vars={"base": str(place / "env")}))
    (home / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = place.glob("*.whl")
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True, timeout=300)
    for program in PROGRAMS:
        script = (Path(sys.executable).parent / program).read_text().split("\n", 1)[1]
        (python.parent / program).write_text(f"#!{python}\n{script}")
        (python.parent / program).chmod(0o755)
    yield python.parent


def use(installed: Path, folder: Path, *words: str) -> str:
    """Run an installed program in an empty folder, and give what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PATH": f"{installed}:{os.environ['PATH']}", "OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "150"}
    done = subprocess.run(
        [installed / words[0], *words[1:]], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_knows_the_presets_and_the_sweeps_and_finds_its_programs(installed, tmp_path):
    assert f"fedtalora {fedtalora.__version__}" in use(installed, tmp_path, "fedtalora", "--version")
    assert "clinc150-fl-tac" in use(installed, tmp_path, "fedtalora", "presets")
    assert 'dataset = "cifar100"' in use(installed, tmp_path, "fedtalora", "presets", "cifar100")
    assert "clinc150_1_seed-0" in use(installed, tmp_path, "fedtalora", "sweep", "rank", "--dry-run")
    assert "Flower" in use(installed, tmp_path, "fedtalora", "doctor")
    assert not list(tmp_path.iterdir())


def test_the_demo_runs_from_the_wheel_in_an_empty_folder(installed, tmp_path):
    short = ["num-tasks=1", "rounds-per-task=1", "num-clients=2", "max-per-class=8", "max-test-per-class=4"]
    words = [word for setting in short for word in ("--set", setting)]
    use(installed, tmp_path, "fedtalora", "run", "--engine", "process", "--out", "run", *words)
    assert (tmp_path / "run" / "metrics.json").is_file() and (tmp_path / "run" / "report.html").is_file()
    code = "import fedtalora_flwr as f; r = f.Run.load('run'); print(f.__file__, r.state)"
    where, state = use(installed, tmp_path, "python", "-c", code).split()
    assert Path(where).is_relative_to(installed.parent) and state == "complete"


@pytest.mark.full
@pytest.mark.ray
def test_the_demo_runs_from_the_wheel_on_flowers_simulation(installed, tmp_path):
    short = ["num-tasks=1", "rounds-per-task=1", "num-clients=2", "max-per-class=8", "max-test-per-class=4"]
    words = [word for setting in short for word in ("--set", setting)]
    use(installed, tmp_path, "fedtalora", "run", "--out", "run", *words)
    assert (tmp_path / "run" / "metrics.json").is_file()


def test_a_server_and_a_node_run_from_the_wheel(installed, tmp_path):
    fleet, port, node_port = free_ports(3)
    here = ["--dir", "lab", "--insecure", "--background"]
    use(installed, tmp_path, "fedtalora", "superlink", *here, "--fleet", f"127.0.0.1:{fleet}", "--control-port", port)
    try:
        server = ["--superlink", f"127.0.0.1:{fleet}", "--partition-id", "0", "--port", node_port]
        use(installed, tmp_path, "fedtalora", "supernode", "site0", *here, *server)
        use(installed, tmp_path, "fedtalora", "health", "site0", "--dir", "lab")
    finally:
        for name in ("site0", "superlink"):
            use(installed, tmp_path, "fedtalora", "stop", name, "--dir", "lab")


def free_ports(count: int) -> list[str]:
    """Give ports that are free now, by holding all of them at once."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [str(each.getsockname()[1]) for each in sockets]
