"""What a deployment survives, on a real SuperLink and real SuperNodes: what is lost, and how long it takes to recover.

Every test prints a row of the table in docs/DEPLOY.md.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import network
import psutil
import pytest
from clock import skewed
from deployment import COMPLETED, Deployment, Part
from flwr.app import Context, Message
from local_grid import ROOT, defaults, run_server
from network import Network

import fedtalora_flwr
from client_app.app import app as run_client

pytestmark = [pytest.mark.full, pytest.mark.timeout(1200)]

NUM_NODES = 2  # every message is a new process that imports torch: few of them are slow enough
SETTINGS = {"num-tasks": 5, "stop-after-task": 2, "num-clients": NUM_NODES, "rounds-per-task": 1, "max-per-class": 64}
SETTINGS |= {"head": "linear", "lora-blocks": "last:2", "round-timeout": 200.0, "node-timeout": 240.0}
PATIENCE = 700  # seconds, of a loaded machine
TORCH_BYTES = 300e6  # a process that has imported torch holds more
SERVICE_MANAGER_SECONDS = 10  # RestartSec of deploy/systemd


class Watch:
    """A run in its folder, followed from outside."""

    def __init__(self, lab: Deployment, out: Path) -> None:
        self.lab, self.out = lab, out

    def submit(self, **changes: Any) -> int:
        settings = {key.replace("_", "-"): value for key, value in changes.items()}
        return self.lab.submit(ROOT, SETTINGS | {"out": str(self.out)} | settings)

    def rounds(self) -> list[dict[str, Any]]:
        path = self.out / "rounds.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def failures(self) -> dict[int, dict[int, str]]:
        """The round's number -> the partition's -> the reason, of all that failed."""
        return {
            line["server_round"]: {failure["partition_id"]: failure["reason"] for failure in line["failures"]}
            for line in self.rounds()
            if line["failures"]
        }

    def await_training(self, server_round: int, node: Part) -> int:
        """Wait until a node trains in a round, and give the number of its ClientApp's process."""
        found: list[int] = []

        def trains() -> bool:
            status = json.loads((self.out / "status.json").read_text()) if (self.out / "status.json").exists() else {}
            if (status.get("phase"), status.get("server_round")) != ("training", server_round):
                return False
            asked = (self.out / "status.json").stat().st_mtime  # an older ClientApp is that of the message before
            found[:] = [
                pid
                for pid, command in node.processes().items()
                if "flwr-clientapp" in command and works_since(pid) > asked
            ]
            return bool(found)

        until(trains, f"{node.name} trains in round {server_round}", self.lab)
        return found[0]

    def await_checkpoint(self, server_round: int) -> None:
        """Wait until a round is checkpointed."""
        pointer = self.out / "checkpoint" / "latest.json"

        def there() -> bool:
            return pointer.exists() and json.loads(pointer.read_text())["server_round"] >= server_round

        until(there, f"round {server_round} is checkpointed", self.lab)

    def await_round(self, server_round: int) -> None:
        """Wait until a round is written down."""
        until(lambda: len(self.rounds()) >= server_round, f"round {server_round} is over", self.lab)

    def metrics(self) -> dict[str, Any]:
        return metrics(self.out)


def works_since(pid: int) -> float:
    """When a ClientApp that has loaded torch, hence has its message, started; 0 while it has not, or has ended.

    Where one was killed at its very start, the round had all replies nevertheless: that is no fault to measure.
    """
    try:
        process = psutil.Process(pid)
        if process.memory_info().rss < TORCH_BYTES:
            return 0.0
        return process.create_time() + 1.0  # known to the second
    except psutil.NoSuchProcess:
        return 0.0


def until(condition: Callable[[], bool], what: str, lab: Deployment, *, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain: {what}\n{lab.tails()}"
        time.sleep(0.2)


def metrics(folder: Path) -> dict[str, Any]:
    """What a run gives, less its time and the bytes down, which depend on what clients still hold."""
    values: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return {key: value for key, value in values.items() if key not in {"wall_seconds", "bytes_down_total"}}


def accuracies(folder: Path) -> Any:
    return metrics(folder)["accuracy_matrix"]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    run_server(defaults() | SETTINGS | {"out": str(folder)})
    return folder


Row = Callable[[str, float, Watch], None]


@pytest.fixture
def row(capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> Row:
    """Check that no round is lost or played twice, and print the fault's row of the table."""

    def told(fault: str, seconds: float, watch: Watch) -> None:
        numbers = [line["server_round"] for line in watch.rounds()]
        assert numbers == list(range(1, watch.metrics()["num_rounds"] + 1))
        reasons = [reason for failed in watch.failures().values() for reason in failed.values()]
        told_of = "; ".join(dict.fromkeys(reasons)) or "-"
        with capsys.disabled():
            print(f"\n| {fault} | {told_of} | {seconds:.0f} | 0 | `-k {request.node.originalname[5:]}` |", flush=True)

    return told


def restarted(node: Part, lab: Deployment) -> None:
    """Start a node again and again until it is let in, as a service manager does."""
    while True:
        node.start()
        deadline = time.monotonic() + 60
        while node.alive and "SuperNode ID:" not in node.log and time.monotonic() < deadline:
            time.sleep(0.1)
        if node.alive:
            return lab.await_online(node)
        time.sleep(SERVICE_MANAGER_SECONDS)


def test_node_killed_in_a_round_is_back_in_a_later_one(tmp_path: Path, row: Row) -> None:
    with Deployment(tmp_path / "lab", num_nodes=NUM_NODES) as lab:
        watch = Watch(lab, tmp_path / "out")
        run_id = watch.submit(stop_after_task=3)
        watch.await_training(2, lab.nodes[1])
        lab.nodes[1].crash()
        began = time.monotonic()
        lab.nodes[1].start()
        watch.await_round(2)
        seconds = time.monotonic() - began
        outcome = lab.outcome(run_id, seconds=PATIENCE)
        assert outcome.status == COMPLETED
    assert list(watch.failures()) == [2] and list(watch.failures()[2]) == [1]
    assert "is back with partition 1" in outcome.log
    row("SuperNode and its ClientApp killed in a round and started again (no node keys)", seconds, watch)


def test_node_killed_while_all_are_needed_is_waited_for_and_nothing_is_lost(
    tmp_path: Path, row: Row, undisturbed: Path
) -> None:
    with Deployment(tmp_path / "lab", num_nodes=NUM_NODES, secure=True) as lab:
        watch = Watch(lab, tmp_path / "out")
        run_id = watch.submit(min_replies=NUM_NODES)
        watch.await_training(2, lab.nodes[1])
        lab.nodes[1].crash()
        began = time.monotonic()
        restarted(lab.nodes[1], lab)
        watch.await_round(2)
        seconds = time.monotonic() - began
        outcome = lab.outcome(run_id, seconds=PATIENCE)
        assert outcome.status == COMPLETED
    assert accuracies(watch.out) == accuracies(undisturbed)
    row("SuperNode killed, TLS and node keys, `min-replies` = all: fewer nodes than it for a while", seconds, watch)


def test_clientapp_killed_in_a_round_costs_its_update_of_that_round(tmp_path: Path, row: Row) -> None:
    with Deployment(tmp_path / "lab", num_nodes=NUM_NODES) as lab:
        watch = Watch(lab, tmp_path / "out")
        run_id = watch.submit()
        os.kill(watch.await_training(2, lab.nodes[1]), signal.SIGKILL)
        began = time.monotonic()
        watch.await_round(2)
        seconds = time.monotonic() - began
        assert lab.outcome(run_id, seconds=PATIENCE).status == COMPLETED
    assert list(watch.failures()) == [2] and list(watch.failures()[2]) == [1]
    row("ClientApp process killed", seconds, watch)


def test_client_beyond_the_deadline_does_not_replay_stale_rounds(tmp_path: Path, row: Row) -> None:
    deadline = 40.0
    with Deployment(tmp_path / "lab", num_nodes=NUM_NODES) as lab:
        watch = Watch(lab, tmp_path / "out")
        run_id = watch.submit(round_timeout=deadline, stop_after_task=3)
        pid = watch.await_training(2, lab.nodes[1])
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        watch.await_round(2)
        seconds = time.monotonic() - began
        os.kill(pid, signal.SIGCONT)
        assert lab.outcome(run_id, seconds=PATIENCE).status == COMPLETED
    failed = watch.failures()
    assert 1 in failed[2] and 3 not in failed
    assert seconds < deadline + 30
    row(f"client slower than `round-timeout` ({deadline:.0f} s)", seconds, watch)


def test_client_that_is_late_is_left_behind_until_it_is_done_and_its_late_reply_counts_nowhere(
    tmp_path: Path, row: Row
) -> None:
    close_after = 40.0
    with Deployment(tmp_path / "lab", num_nodes=NUM_NODES) as lab:
        watch = Watch(lab, tmp_path / "out")
        run_id = watch.submit(close_after=close_after, stop_after_task=5, verify=True)
        pid = watch.await_training(2, lab.nodes[1])
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        watch.await_round(2)
        seconds = time.monotonic() - began
        watch.await_round(3)
        os.kill(pid, signal.SIGCONT)
        assert lab.outcome(run_id, seconds=PATIENCE).status == COMPLETED
    failed = watch.failures()
    assert failed[2] == {1: f"late: the round was closed without it after {close_after:g} s"}
    assert failed[3] == {1: "not asked: it is still busy with round 2"}
    assert failed.keys() <= {2, 3, 4}  # it is asked again once it is done
    lines = watch.rounds()
    assert [line["participants"] for line in lines][1:3] == [[0, 1], [0]] and lines[-1]["participants"] == [0, 1]
    assert max(line["exactness_error"] for line in lines) < 1e-6
    assert seconds < close_after + 30
    row(f"client slower than `close-after` ({close_after:.0f} s)", seconds, watch)


def test_serverapp_killed_is_resumed_by_one_command_and_ends_with_the_same_metrics(
    tmp_path: Path, row: Row, undisturbed: Path
) -> None:
    with Deployment(tmp_path / "lab", num_nodes=NUM_NODES) as lab:
        watch = Watch(lab, tmp_path / "out")
        watch.submit()
        watch.await_training(2, lab.nodes[1])
        apps = [pid for pid, command in lab.processes().items() if "flwr-serverapp" in command]
        assert apps, lab.processes()
        for pid in apps:
            os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        assert len(watch.rounds()) == 1
        run_id = watch.submit(resume=True)
        watch.await_round(2)
        seconds = time.monotonic() - began
        assert lab.outcome(run_id, seconds=PATIENCE).status == COMPLETED
    assert watch.metrics() == metrics(undisturbed)
    row("ServerApp killed, run resumed with `resume=true`", seconds, watch)


def test_superlink_killed_goes_on_from_its_database_and_the_run_from_its_checkpoint(
    tmp_path: Path, row: Row, undisturbed: Path
) -> None:
    with Deployment(tmp_path / "lab", num_nodes=NUM_NODES, secure=True) as lab:
        watch = Watch(lab, tmp_path / "out")
        broken = watch.submit()
        watch.await_training(2, lab.nodes[1])
        pids = [node.pid for node in lab.nodes]
        lab.superlink.crash()
        began = time.monotonic()
        lab.start_superlink()
        run_id = watch.submit(resume=True)
        watch.await_round(2)
        seconds = time.monotonic() - began
        assert lab.outcome(run_id, seconds=PATIENCE).status == COMPLETED
        until(lambda: lab.row(broken).get("status") == "finished:failed", "the broken run is seen to be over", lab)
        assert [node.pid for node in lab.nodes if node.alive] == pids
    assert watch.metrics() == metrics(undisturbed)
    row("SuperLink killed, database kept, run resumed with `resume=true`", seconds, watch)


def test_newcomer_that_claims_the_partition_of_a_node_that_is_there_is_refused_by_name(
    tmp_path: Path, row: Row
) -> None:
    with Deployment(tmp_path / "lab", num_nodes=NUM_NODES) as lab:
        watch = Watch(lab, tmp_path / "out")
        run_id = watch.submit(stop_after_task=3)
        watch.await_training(1, lab.nodes[1])
        guest = lab.guest(1)
        began = time.monotonic()
        guest.start()
        lab.await_online(guest)
        watch.await_round(2)
        seconds = time.monotonic() - began
        outcome = lab.outcome(run_id, seconds=PATIENCE)
        assert outcome.status == COMPLETED
    assert watch.failures() == {}
    assert "(partition 1) cannot take part: partition 1 is held by node " in outcome.log
    assert "is back with partition 1" not in outcome.log
    row("another node claims the partition of one that is there (no node keys)", seconds, watch)


@pytest.mark.parametrize("changed", ["version", "a line of code"])
def test_node_with_another_version_of_the_library_is_named_before_the_first_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(ROOT / "fedtalora_flwr", other / "fedtalora_flwr", ignore=shutil.ignore_patterns("__pycache__"))
    file = other / "fedtalora_flwr" / "__init__.py"
    code = file.read_text()
    file.write_text(code.replace('version("fedtalora")', '"9.9"') if changed == "version" else f"{code}# more\n")
    with Deployment(tmp_path / "lab", num_nodes=NUM_NODES) as lab:
        node = lab.nodes[1]
        node.kill(signal.SIGTERM)
        node.env["PYTHONPATH"] = str(other)
        node.start()
        lab.await_online(node)
        watch = Watch(lab, tmp_path / "out")
        outcome = lab.outcome(watch.submit(min_replies=NUM_NODES), seconds=PATIENCE)
    assert outcome.status == "finished:failed"
    ours = fedtalora_flwr.build()
    theirs = "9.9+" if changed == "version" else f"{fedtalora_flwr.__version__}+"
    assert f"the client runs fedtalora {theirs}" in outcome.details and f"the client runs {ours}" not in outcome.details
    assert f"this side {ours}; install the same commit on both" in outcome.details
    assert watch.rounds() == []
    with capsys.disabled():
        told = f"{outcome.details} | at start | 0 | `-k another_version` |"
        print(f"\n| node with another {changed} of the library | {told}", flush=True)


# What partition 1 does in the rounds of the test's own copy of the bundle; the product has no such hook.
MISBEHAVIOUR = """
from fedtalora_flwr.wire.records import array_record, read_arrays

PATH = "/".join(["", "data", "ward" + "7", "patients.csv"])  # in parts: the server may hold this code, not the path


def spoiled(content, message, context):
    '''Change what leaves the node: an array, or what the node says of itself.'''
    if message.metadata.message_type != "train" or context.node_config["partition-id"] != 1:
        return content
    parts, server_round = read_arrays(content["arrays"]), int(message.metadata.group_id)
    name = min(parts["lora_B"])
    values = parts["lora_B"][name]
    if server_round == 1:
        values.fill_(float("nan"))
    if server_round == 2:
        parts["lora_B"][name] = values[:-1]
    if server_round == 3:
        content["metrics"]["base-version"] = 7
    if server_round == 4:
        values.fill_(1e6)
    tensors = {f"{part}/{key}": value for part, found in parts.items() for key, value in found.items()}
    content["arrays"] = array_record(tensors)
    return content


def failing(fit):
    '''Fail within the node's own code, with a text that no one else may read.'''
    def failed(*arguments, seed, **options):
        if seed[1:] == [5, 1]:
            raise FileNotFoundError(2, "No such file or directory", PATH)
        return fit(*arguments, seed=seed, **options)
    return failed
"""
MISBEHAVED = {
    1: "lora_B holds a number that is not finite",
    2: "do not fit",
    3: "trained on version 7, the server is at 2",
    4: "norm-limit is 1000",
    5: "FileNotFoundError, see the node's log",
}


def misbehaving_bundle(folder: Path) -> Path:
    """Copy the app, with a ClientApp that misbehaves as partition 1."""
    folder.mkdir()
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("server_app", "client_app"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "client_app" / "misbehaviour.py").write_text(MISBEHAVIOUR)
    app = folder / "client_app" / "app.py"
    answer = "return Message(content, reply_to=message)"
    assert app.read_text().count(answer) == 1
    spoilt = answer.replace("content", "spoiled(content, message, context)")
    app.write_text(app.read_text().replace(answer, spoilt) + "\n\nfrom client_app.misbehaviour import spoiled\n")
    ours = "fedtalora_flwr.client.handlers"
    app.write_text(app.read_text().replace(f'"{ours}"', '"client_app.failing_handlers"'))
    (folder / "client_app" / "failing_handlers.py").write_text(
        f"from {ours} import *\nimport {ours} as handlers\nfrom client_app.misbehaviour import failing\n\n"
        "handlers.fit = failing(handlers.fit)\n"
    )
    return folder


def test_a_node_that_misbehaves_is_refused_by_name_and_reason_and_the_run_ends_well(tmp_path: Path, row: Row) -> None:
    bundle, changes = misbehaving_bundle(tmp_path / "bundle"), {"rounds-per-task": 3, "num-clients": 3}

    def client(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1 and int(message.metadata.group_id or 0) in MISBEHAVED:
            raise RuntimeError("as if it were not there")
        return run_client(message, context)

    run_server(defaults() | SETTINGS | changes | {"out": str(tmp_path / "without")}, client)
    with Deployment(tmp_path / "lab", num_nodes=3, secure=True, node_config="warm=true") as lab:
        watch = Watch(lab, tmp_path / "out")
        outcome = lab.run(bundle, SETTINGS | changes | {"out": str(watch.out)}, seconds=PATIENCE)
        assert outcome.status == COMPLETED, f"{outcome.details}\n{lab.tails()}"
    failures = watch.failures()
    assert failures.keys() == MISBEHAVED.keys() and all(list(failed) == [1] for failed in failures.values())
    for server_round, reason in MISBEHAVED.items():
        assert reason in failures[server_round][1], failures
    assert [line["participants"] for line in watch.rounds()] == [[0, 1, 2]] * 6  # in the sixth it is welcome again
    assert accuracies(watch.out) == accuracies(tmp_path / "without")
    secret = b"ward7"
    assert secret in (lab.folder / "node1.log").read_bytes()
    elsewhere = [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith("node1")]
    assert not [path for path in elsewhere if secret in path.read_bytes()]
    row("NaN, wrong shape, wrong version, huge numbers, an error whose text holds a path: a round each", 0, watch)


@pytest.mark.parametrize("how", [[], ["--background"]], ids=["foreground", "background"])
@pytest.mark.parametrize("skew", [30, -600])
def test_node_whose_clock_is_off_is_told_so(
    tmp_path: Path, skew: int, how: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    clock = skewed(tmp_path, skew)
    with Deployment(tmp_path / "lab", num_nodes=1, secure=True) as lab:
        lab.nodes[0].kill(signal.SIGTERM)
        home = tmp_path / "site0"
        home.mkdir(mode=0o700)
        shutil.copy(lab.keys / "ca.crt", home / "ca.crt")
        shutil.copy(lab.keys / "node0", home / "site0.key")
        words = ["supernode", "site0", "--superlink", f"{lab.host}:{lab.fleet_port}", "--partition-id", "0"]
        words += ["--port", str(lab.node_ports[0]), *how, "--dir", str(home)]
        env = lab.nodes[0].env | clock
        began = time.monotonic()
        said = subprocess.run(
            [sys.executable, "-m", "fedtalora_flwr.cli.app", *words],
            env=env,
            capture_output=True,
            text=True,
            timeout=200,
        )
        seconds = time.monotonic() - began
    assert said.returncode == 2, said.stdout + said.stderr
    assert "refuses a node whose clock is" in said.stderr and "timedatectl set-ntp true" in said.stderr
    assert "refuses a node whose clock is" in (home / "site0.log").read_text()
    with capsys.disabled():
        print(
            f"\n| clock of a node {skew:+d} s | {said.stderr[:200]} | {seconds:.0f} | 0 | `-k clock_is_off` |",
            flush=True,
        )


# --- On hosts of their own ---

needs_network = pytest.mark.skipif(bool(network.missing()), reason=network.missing() or "there is a network")


@pytest.fixture
def hosts() -> Iterator[Network]:
    with Network() as made:
        yield made


@needs_network
@pytest.mark.parametrize("silent", [False, True], ids=["cable", "silent"])
def test_link_cut_for_25_seconds_costs_nothing_but_time(
    tmp_path: Path, row: Row, hosts: Network, undisturbed: Path, silent: bool
) -> None:
    watch, seconds = cut(tmp_path, hosts, for_seconds=25, silent=silent, min_replies=1)
    assert watch.failures() == {}
    assert watch.metrics() == metrics(undisturbed)
    row(f"link of a node cut for 25 s in a round ({'packets dropped' if silent else 'cable out'})", seconds, watch)


@needs_network
@pytest.mark.parametrize("silent", [False, True], ids=["cable", "silent"])
def test_link_cut_for_115_seconds_is_waited_for_where_all_are_needed(
    tmp_path: Path, row: Row, hosts: Network, undisturbed: Path, silent: bool
) -> None:
    watch, seconds = cut(tmp_path, hosts, for_seconds=115, silent=silent, min_replies=NUM_NODES)
    assert 1 in watch.failures()[2]
    assert accuracies(watch.out) == accuracies(undisturbed)
    row(f"link of a node cut for 115 s in a round ({'packets dropped' if silent else 'cable out'})", seconds, watch)


def cut(tmp_path: Path, hosts: Network, *, for_seconds: float, silent: bool, min_replies: int) -> tuple[Watch, float]:
    """Cut a node's link in round 2, and give the time from the cut to the end of that round."""
    with Deployment(tmp_path / "lab", num_nodes=NUM_NODES, host=network.SERVER, prefix=hosts.prefix) as lab:
        watch = Watch(lab, tmp_path / "out")
        run_id = watch.submit(min_replies=min_replies)
        watch.await_training(2, lab.nodes[1])
        began = time.monotonic()
        hosts.swallow("c1", packets=True) if silent else hosts.unplug("c1")
        time.sleep(for_seconds)
        hosts.swallow("c1", packets=False) if silent else hosts.plug_in("c1")
        watch.await_round(2)
        seconds = time.monotonic() - began
        assert lab.outcome(run_id, seconds=PATIENCE).status == COMPLETED
    return watch, seconds


@needs_network
def test_only_the_fleet_port_can_be_reached_from_another_host(tmp_path: Path, hosts: Network) -> None:
    knock = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).close()"

    def reaches(host: str, address: str, port: int) -> bool:
        command = [*hosts.on(host), sys.executable, "-c", knock, address, str(port)]
        return subprocess.run(command, capture_output=True, timeout=30).returncode == 0

    with Deployment(tmp_path / "lab", num_nodes=2, secure=True, host=network.SERVER, prefix=hosts.prefix) as lab:
        assert reaches("srv", "127.0.0.1", lab.control_port), "the control port is open where it should be"
        assert reaches("c2", network.SERVER, lab.fleet_port)
        assert not reaches("c2", network.SERVER, lab.control_port)
        listening = subprocess.run([*hosts.on("srv"), "ss", "-Hltn"], capture_output=True, text=True).stdout
        sockets = {line.split()[3].replace("[::ffff:10.77.0.1]", network.SERVER) for line in listening.splitlines()}
        outward = {address for address in sockets if not address.startswith("127.")}
        assert outward == {f"{network.SERVER}:{lab.fleet_port}"}
        assert not reaches("srv", "10.77.0.10", lab.node_ports[0])
        assert reaches("c0", "127.0.0.1", lab.node_ports[0])
