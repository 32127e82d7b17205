"""A run goes to a Ray cluster that is there, uses all its nodes and leaves it as it was: real Ray, two nodes."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from fedtalora_flwr.launch import ray_probe
from fedtalora_flwr.launch.simulation import launch
from fedtalora_flwr.launch.supervisor import LaunchError

SCRIPTS = Path(sys.executable).parent
PROBE = Path(ray_probe.__file__)
START_SECONDS = 120
TINY = [
    "num-tasks=5",
    "stop-after-task=1",
    "num-clients=4",
    "rounds-per-task=1",
    "max-per-class=8",
    "lora-blocks=last:1",
]
EIGHT_AND_TWO = [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 3.0}]


# --- What is decided without a cluster ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("client_cpus", "client_gpus", "number"),
    [(1, 0.0, 11), (2, 0.0, 5), (4, 0.0, 2), (9, 0.0, 0), (1, 0.2, 5), (3, 0.2, 2), (1, 2.0, 0)],
)
def test_clients_fit_on_each_node_apart_as_flower_counts_them(client_cpus, client_gpus, number):
    from flwr.simulation.ray_transport import ray_actor

    assert ray_probe.places(EIGHT_AND_TWO, client_cpus=client_cpus, client_gpus=client_gpus) == number
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_actor.ray, "nodes", lambda: [{"Resources": resources} for resources in EIGHT_AND_TWO])
        if number:
            share = {"num_cpus": client_cpus, "num_gpus": client_gpus}
            assert ray_actor.pool_size_from_resources(share) == number


def test_a_cluster_with_room_for_clients_on_free_nodes_is_not_refused():
    assert ray_probe.refusal(EIGHT_AND_TWO, {"CPU": 11.0}, client_cpus=2, client_gpus=0.0) == ""


def test_a_cluster_without_room_for_one_client_is_refused_with_what_its_nodes_have():
    why = ray_probe.refusal(EIGHT_AND_TWO, {"CPU": 11.0, "GPU": 1.0}, client_cpus=9, client_gpus=0.5)
    assert "no node of the Ray cluster has room for one client of 9 CPUs and 0.5 GPUs" in why
    assert "8 CPUs, 1 GPUs; 3 CPUs, 0 GPUs" in why


def test_a_busy_cluster_is_refused_since_clients_on_taken_cpus_would_wait():
    why = ray_probe.refusal(EIGHT_AND_TWO, {"CPU": 10.0, "GPU": 1.0}, client_cpus=1, client_gpus=0.5)
    assert "of the Ray cluster's 11 CPUs only 10 are free" in why
    why = ray_probe.refusal(EIGHT_AND_TWO, {"CPU": 11.0}, client_cpus=1, client_gpus=0.5)
    assert "of the Ray cluster's 1 GPUs only 0 are free" in why
    assert ray_probe.refusal(EIGHT_AND_TWO, {"CPU": 11.0}, client_cpus=1, client_gpus=0.0) == ""


def launch_at(address: str, folder: Path, **options: object) -> None:
    config = folder / "run-config.toml"
    config.touch()
    launch(folder, run_config=config, num_supernodes=1, work_dir=folder, on_tick=list, ray_address=address, **options)


@pytest.mark.parametrize("address", ["auto", "ray://head:10001", "head", "head:", ":6379", "head:ray"])
def test_an_address_that_is_not_host_and_port_is_refused_before_anything_starts(tmp_path, address):
    with pytest.raises(ValueError, match="the address of a Ray cluster is HOST:PORT"):
        launch_at(address, tmp_path)
    assert not (tmp_path / "keeper.log").exists()


def test_a_port_where_nobody_listens_is_told_at_once_with_the_command_that_starts_a_head(tmp_path):
    port = free_port()
    with pytest.raises(
        LaunchError, match=f"no Ray cluster answers at 127.0.0.1:{port} .*ray start --head --port {port}"
    ):
        launch_at(f"127.0.0.1:{port}", tmp_path)
    assert not (tmp_path / "keeper.log").exists()


def test_the_size_of_an_own_ray_and_a_clusters_address_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="a cluster's CPUs are set by its ray start"):
        launch_at("127.0.0.1:1", tmp_path, ray_cpus=2)


# --- On a cluster of two nodes -----------------------------------------------------------------------------------


def real(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that starts Ray and takes a minute or more."""
    return pytest.mark.full(pytest.mark.ray(pytest.mark.timeout(900)(test)))


@dataclass(frozen=True)
class Node:
    """A node that ``ray start --block`` keeps: our child, so that it can be ended by its process id."""

    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def raylet(self) -> psutil.Process | None:
        children = psutil.Process(self.process.pid).children()
        return next((child for child in children if "raylet/raylet" in command_line(child)), None)

    def workers(self) -> list[str]:
        """Titles of Ray's processes for users' code on this node."""
        raylet = self.raylet
        titles = map(command_line, raylet.children(recursive=True)) if raylet else ()
        return [title for title in titles if "ClientApp" in title]


@dataclass(frozen=True)
class Cluster:
    address: str
    nodes: tuple[Node, Node]

    def verdict(self) -> dict[str, object]:
        """Join the cluster as a driver of its own and tell what is there."""
        command = [sys.executable, "-I", PROBE, self.address, "1", "0"]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=START_SECONDS)
        verdict: dict[str, object] = json.loads(answer.stdout.splitlines()[-1])
        return verdict

    def assert_whole_and_free(self) -> None:
        assert all(node.process.poll() is None and node.raylet for node in self.nodes)
        assert self.verdict() == {"nodes": {"one": 1.0, "two": 1.0}}
        assert [node.workers() for node in self.nodes] == [[], []]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it ended while we looked
        return ""


def await_(condition: Callable[[], object], seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def start_node(folder: Path, name: str, *options: str) -> Node:
    log = folder / f"{name}.log"
    command = [SCRIPTS / "ray", "start", "--block", "--node-name", name, "--num-cpus", "1", "--num-gpus", "0"]
    command += ["--object-store-memory", "100000000", "--min-worker-port", "0", "--max-worker-port", "0", *options]
    environment = {**os.environ, "RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    node = Node(process, log)
    await_(lambda: process.poll() is not None or "--block" in log.read_text(), START_SECONDS, log)
    assert node.raylet, log.read_text()
    return node


def stop_node(node: Node) -> None:
    """End one node and what it started, each by its own process id."""
    family = [psutil.Process(node.process.pid), *psutil.Process(node.process.pid).children(recursive=True)]
    node.process.terminate()
    try:
        node.process.wait(30)
    except subprocess.TimeoutExpired:
        node.process.kill()
    _, alive = psutil.wait_procs(family, timeout=15)
    for process in alive:
        process.kill()


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    port = free_port()
    address = f"127.0.0.1:{port}"
    nodes: list[Node] = []
    # Not pytest's own folder: the paths of Ray's sockets must stay under 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ftl-test-", dir="/tmp") as place:
        try:
            client_port = ["--ray-client-server-port", str(free_port())]
            nodes.append(start_node(Path(place), "one", "--head", "--port", str(port), *client_port))
            nodes.append(start_node(Path(place), "two", "--address", address))
            yield Cluster(address, (nodes[0], nodes[1]))
        finally:
            for node in reversed(nodes):
                stop_node(node)


def start_run(cluster: Cluster, folder: Path) -> "subprocess.Popen[str]":
    command = [SCRIPTS / "fedtalora", "run", "--out", folder, "--ray-address", ray_probe.address]
    command += [word for setting in TINY for word in ("--set", setting)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def processes_of(run: Path) -> list[str]:
    """Command lines that name what a run of ours has to itself: its folder, its temporary folder."""
    home = (run / "logs" / "keeper.log").read_text().split("home ")[1].split()[0]
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return [command for command in commands if home in command or str(run) in command]


@real
def test_a_run_uses_both_nodes_and_leaves_the_cluster_alive_and_free(two_nodes: Cluster, tmp_path: Path) -> None:
    run = start_run(two_nodes, tmp_path / "run")
    at_work: set[int] = set()  # nodes on which a ClientApp was seen to handle a message
    while run.poll() is None:
        at_work |= {i for i, node in enumerate(two_nodes.nodes) if any(".run" in title for title in node.workers())}
        time.sleep(0.05)
    output, _ = run.communicate()
    assert run.returncode == 0, output
    assert at_work == {0, 1}
    rounds = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert rounds[-1]["failures"] == [] and len(rounds[-1]["participants"]) == 4
    assert processes_of(tmp_path / "run") == []
    two_nodes.assert_whole_and_free()


@real
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "SIGKILL"])
def test_a_stopped_run_leaves_the_cluster_alive_and_free(
    two_nodes: Cluster, tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    run = start_run(two_nodes, folder)
    assert run.stdout is not None
    log = folder / "logs" / "superlink.log"
    await_(lambda: run.poll() is not None or all(node.workers() for node in two_nodes.nodes), START_SECONDS, log)
    assert run.poll() is None, run.communicate()[0]
    os.killpg(run.pid, number)
    run.communicate(timeout=60)
    assert run.returncode == (130 if number == signal.SIGINT else -number)
    await_(lambda: not processes_of(folder), 60, log)
    await_(lambda: not any(node.workers() for node in two_nodes.nodes), 60, log)
    two_nodes.assert_whole_and_free()


@real
def test_what_listens_but_is_no_ray_cluster_ends_the_launch_with_its_address(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(LaunchError, match=f"what listens at {address} does not answer as a Ray cluster"):
            launch_at(address, tmp_path)
