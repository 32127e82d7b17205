"""A lab on this machine: a real SuperLink and real SuperNodes with our certificates and keys, and who is kept out."""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import psutil
import pytest
import yaml
from clock import skewed

from fedtalora_flwr.deploy.certs import make_certificates
from fedtalora_flwr.deploy.commands import environment
from fedtalora_flwr.deploy.folder import FederationFolder
from fedtalora_flwr.deploy.nodes import list_nodes, make_node_key, register, unregister
from fedtalora_flwr.deploy.processes import pid_of
from fedtalora_flwr.launch.supervisor import claim_port

APP = Path(__file__).parents[1] / "launch_app"
SECONDS = 240  # of patience on a loaded machine


@dataclass(frozen=True)
class Played:
    """A lab that is up.

    Parameters
    ----------
    folder
        Holds the file of the lab, and below it each process's folder.
    address
        By which the nodes call the server.
    spare_port
        On loopback, for one more node.
    """

    folder: Path
    address: str
    control_port: int
    spare_port: int

    @property
    def file(self) -> str:
        return str(self.folder / "lab.yaml")

    @property
    def server(self) -> FederationFolder:
        return FederationFolder(self.folder / "superlink")

    def statuses(self) -> dict[str, str]:
        return {node.name: node.status for node in list_nodes(self.server)}


def fedtalora(
    *words: str, stdin: str = "", variables: Mapping[str, str] = MappingProxyType({})
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedtalora_flwr.cli.app", *words]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **variables}
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env=env, timeout=SECONDS)


def said(*words: str, stdin: str = "") -> str:
    done = fedtalora(*words, stdin=stdin)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def refused(*words: str, stdin: str = "", variables: Mapping[str, str] = MappingProxyType({})) -> str:
    done = fedtalora(*words, stdin=stdin, variables=variables)
    assert done.returncode == 2, f"{words}: {done.stdout}{done.stderr}"
    return done.stderr


def eventually(condition: Callable[[], bool], *, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return held


def naming(folder: Path) -> list[str]:
    """Find the processes whose command names the folder."""
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return [command for command in commands if str(folder) in command]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    folder = tmp_path_factory.mktemp("played")
    with contextlib.ExitStack() as claims:
        ports = []
        for _ in range(5):
            port, claim = claim_port()
            claims.enter_context(claim)
            ports.append(port)
        lab = Played(folder, f"127.0.0.1:{ports[0]}", ports[1], ports[2])
        nodes = [{"name": f"site{k}", "host": "local", "port": ports[3 + k], "device": "cpu"} for k in range(2)]
        server = {"host": "local", "address": lab.address, "control-port": lab.control_port}
        Path(lab.file).write_text(yaml.safe_dump({"folder": str(folder), "server": server, "nodes": nodes}))
        try:
            said("lab", "up", lab.file)
            yield lab
        finally:
            said("lab", "down", lab.file)
            assert naming(folder) == []


def test_up_brings_server_and_nodes_online_and_again_changes_nothing(played):
    assert played.statuses() == {"site0": "online", "site1": "online"}
    before = {name: pid_of(FederationFolder(played.folder / name), name) for name in ("superlink", "site0", "site1")}
    again = said("lab", "up", played.file)
    assert all(f"{name} runs already, as process {pid}" in again for name, pid in before.items())
    shown = [line.split() for line in said("lab", "status", played.file).splitlines()]
    assert [(words[0], words[2], words[-1]) for words in shown[1:]] == [
        ("site0", "running", "online"),
        ("site1", "running", "online"),
    ]
    assert "SuperNode ID:" in said("lab", "logs", played.file, "site1")


def test_nothing_but_the_fleet_port_leaves_loopback(played):
    pids = [pid_of(FederationFolder(played.folder / name), name) for name in ("superlink", "site0", "site1")]
    listening = [
        connection.laddr
        for pid in pids
        for connection in psutil.Process(pid).net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    fleet = int(played.address.rpartition(":")[2])
    assert {address.ip for address in listening if address.port != fleet} == {"127.0.0.1"}
    assert fleet in {address.port for address in listening}


def test_health_is_told_of_server_and_node(played):
    assert all_is_well(played)
    assert "stranger does not run" in ailment(played, "stranger")


def test_a_node_that_the_server_has_not_answered_for_a_minute_is_ill(played):
    seen = FederationFolder(played.folder / "site0").seen("site0")

    def told() -> bool:
        os.utime(seen, (time.time() - 75, time.time() - 75))
        return "the server has not answered site0 for 7" in ailment(played, "site0")

    assert told() or told()  # a heartbeat may come in between, two in a row do not
    assert eventually(lambda: ailment(played, "site0") == "")  # heartbeats are 17.5 to 22.5 s apart


@pytest.mark.parametrize("name", ["superlink", pytest.param("site0", marks=pytest.mark.full)])
def test_who_has_lost_its_superexec_is_ill_and_starts_again(played, name):
    lost = superexec_of(played, name)
    lost.kill()
    told: list[str] = []
    assert eventually(lambda: told.append(ailment(played, name)) or told[-1] == "", seconds=SECONDS), told
    assert "the SuperExec of" in told[0] or "has ended, and is about to be started again" in told[0], told
    assert superexec_of(played, name) != lost
    log = FederationFolder(played.folder / name).log(name).read_text()
    assert "its SuperExec has ended, so it starts no app any more. It starts again in 10.0 s" in log
    assert eventually(lambda: all_is_well(played), seconds=SECONDS)


def superexec_of(played: Played, name: str) -> psutil.Process:
    """Find the SuperExec that a SuperLink or SuperNode has started."""
    children = psutil.Process(pid_of(FederationFolder(played.folder / name), name)).children()
    (found,) = (child for child in children if "flower-superexec" in " ".join(child.cmdline()))
    return found


def all_is_well(played: Played) -> bool:
    return not any(ailment(played, name) for name in ("superlink", "site0", "site1"))


def ailment(played: Played, name: str) -> str:
    """Give what ``fedtalora health`` says; nothing if it is well."""
    done = fedtalora("health", name, "--dir", str(played.folder / name))
    assert done.returncode == bool(done.stdout), done.stdout + done.stderr
    return done.stdout.strip()


def test_a_key_that_was_not_registered_is_refused_and_says_what_to_do(played, tmp_path):
    said("node", "key", "stranger", "--dir", str(tmp_path), "--ca", str(played.server.ca_certificate))
    assert "does not accept this node's key" in refused(*node_words(played, "stranger", tmp_path))


def test_a_second_use_of_a_key_is_refused_while_the_first_stays_online(played, tmp_path):
    shutil.copytree(played.folder / "site0", tmp_path / "copy", ignore=shutil.ignore_patterns("*.pid", "*.log"))
    assert "does not accept this node's key" in refused(*node_words(played, "site0", tmp_path / "copy"))
    assert played.statuses()["site0"] == "online"


@pytest.mark.full
@pytest.mark.parametrize("wrong", ["nothing", "no CA", "another CA", "another name", "no key", "unknown key"])
def test_flower_s_own_node_comes_in_with_the_right_ca_name_and_key_alone(played, tmp_path, wrong):
    node, other = FederationFolder(tmp_path / "node"), FederationFolder(tmp_path / "other")
    for made in (node, other):
        make_node_key(made, "guest")
    make_certificates(other, ["127.0.0.1"])
    register(played.server, "guest", node.node_public_key("guest").read_bytes())
    port = played.address.rpartition(":")[2]
    superlink = f"0.0.0.0:{port}" if wrong == "another name" else played.address  # both are the same socket here
    command = ["flower-supernode", "--superlink", superlink, "--host", "127.0.0.1", "--port", str(played.spare_port)]
    if wrong != "no CA":
        authority = (other if wrong == "another CA" else played.server).ca_certificate
        command += ["--root-certificates", str(authority)]
    if wrong != "no key":
        key = (other if wrong == "unknown key" else node).node_key("guest")
        command += ["--auth-supernode-private-key", str(key)]
    log = tmp_path / "log"
    with log.open("wb") as file:
        env = environment(node)
        node.make()
        process = subprocess.Popen(command, env=env, cwd=node.working_directory, stdout=file, stderr=file)
    try:
        told = {
            "no CA": "CERTIFICATE_VERIFY_FAILED",
            "another CA": "CERTIFICATE_VERIFY_FAILED",
            "nothing": "SuperNode ID:",
        }
        told |= {"another name": "Connection attempt failed", "no key": "2001", "unknown key": "2004"}
        assert eventually(lambda: told[wrong].encode() in log.read_bytes()), log.read_text()
        time.sleep(3)
        assert (b"SuperNode ID:" in log.read_bytes()) == (wrong == "nothing")
        assert played.statuses()["guest"] == ("online" if wrong == "nothing" else "registered")
    finally:
        process.terminate()
        process.wait(60)
        unregister(played.server, "guest")


def test_the_same_node_does_not_start_twice_on_its_machine(played):
    words = [word for word in node_words(played, "site0", played.folder / "site0") if word != "--background"]
    assert "site0 runs already, as process" in refused(*words)


def test_a_node_with_another_command_line_is_started_again_and_says_so(played, tmp_path):
    described = yaml.safe_load(Path(played.file).read_text())
    before = {name: pid_of(FederationFolder(played.folder / name), name) for name in ("superlink", "site0", "site1")}
    (scans := tmp_path / "scans").mkdir()
    described["nodes"][1]["data-path"] = str(scans)
    Path(played.file).write_text(yaml.safe_dump(described))
    again = said("lab", "up", played.file)
    assert "site1 is started again, for its command line is another: " in again and str(scans) in again
    after = {name: pid_of(FederationFolder(played.folder / name), name) for name in before}
    assert {name for name in before if before[name] != after[name]} == {"site1"}
    assert f'data-path="{scans}"' in " ".join(psutil.Process(after["site1"]).cmdline())
    assert f"site1 runs already, as process {after['site1']}" in said("lab", "up", played.file)
    assert played.statuses()["site1"] == "online"


@pytest.mark.parametrize("seconds", [10, -400])
def test_a_node_whose_clock_is_off_is_told_so_in_the_foreground_and_in_its_log(played, tmp_path, seconds):
    said("node", "key", "site5", "--dir", str(tmp_path), "--ca", str(played.server.ca_certificate))
    words = [word for word in node_words(played, "site5", tmp_path) if word != "--background"]
    told = "refuses a node whose clock is more than 5 s ahead of its own or 5 minutes behind"
    assert told in refused(*words, variables=skewed(tmp_path, seconds))
    assert told in said("logs", "site5", "--dir", str(tmp_path))


@pytest.mark.full
def test_a_run_completes_over_certificates_and_keys_and_its_failure_is_told(played):
    flower = environment(played.server)
    for behaviour, status in (("succeed", "finished:completed"), ("raise", "finished:failed")):
        words = ["run", str(APP), "lab", "--stream", "--run-config", f"num-rounds=1 behaviour='{behaviour}'"]
        log = subprocess.run(["flwr", *words], env=flower, capture_output=True, text=True, timeout=SECONDS).stdout
        assert "round 0: 2 replies" in log, log
        listed = ["flwr", "list", "lab", "--format", "json"]
        runs = json.loads(subprocess.check_output(listed, env=flower, text=True))["runs"]
        assert status in {run["status"] for run in runs}


@pytest.mark.full
def test_a_node_that_was_killed_comes_back_by_itself(played):
    folder = FederationFolder(played.folder / "site0")
    killed, began = pid_of(folder, "site0"), time.monotonic()
    let_in = b"SuperNode ID:"
    before = folder.log("site0").read_bytes().count(let_in)
    os.kill(killed, signal.SIGKILL)
    assert eventually(lambda: folder.log("site0").read_bytes().count(let_in) == before + 1, seconds=SECONDS)
    print(f"| SuperNode of a lab killed | let in again after {time.monotonic() - began:.0f} s |")
    assert pid_of(folder, "site0") != killed and played.statuses()["site0"] == "online"
    assert "it was killed by signal 9. It starts again" in folder.log("site0").read_text()


@contextlib.contextmanager
def database_locked(played: Played) -> Iterator[None]:
    """Hold the SuperLink's database, as a disk that hangs or another program does."""
    with contextlib.closing(sqlite3.connect(played.server.database, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        yield
        database.execute("ROLLBACK")


@contextlib.contextmanager
def superlink_suspended(played: Played) -> Iterator[None]:
    process = psutil.Process(pid_of(played.server, "superlink"))
    process.suspend()
    yield
    process.resume()


@pytest.mark.full
@pytest.mark.parametrize(("stalled", "seconds"), [(database_locked, 12), (superlink_suspended, 75)])
def test_a_server_that_stalls_is_well_again_by_itself_and_plays_the_next_run(played, capsys, stalled, seconds):
    flower = environment(played.server)
    submitted = ["flwr", "run", str(APP), "lab", "--run-config", "num-rounds=1"]

    def asked(*words: str) -> str:
        return subprocess.run(words, env=flower, capture_output=True, text=True, timeout=SECONDS).stdout

    def statuses() -> list[str]:
        said = asked("flwr", "list", "lab", "--format", "json")
        return [run["status"] for run in json.loads(said[said.index("{") :]).get("runs", [])]

    before = statuses().count("finished:completed")
    with stalled(played):
        time.sleep(seconds)
    began = time.monotonic()
    assert eventually(lambda: "Successfully started run" in asked(*submitted), seconds=SECONDS), "no run is taken"
    assert eventually(lambda: statuses().count("finished:completed") == before + 1, seconds=SECONDS), statuses()
    over = time.monotonic() - began
    assert eventually(lambda: all_is_well(played), seconds=SECONDS)
    well = time.monotonic() - began
    with capsys.disabled():
        print(f"\n| {stalled.__name__}, {seconds} s | run over after {over:.0f} s, all well after {well:.0f} s |")
    assert "round 0: 2 replies" in (log := asked(*submitted, "--stream")), log


@pytest.mark.full
def test_a_replaced_node_is_shut_out_for_good_and_its_successor_comes_in(played, tmp_path):
    old = FederationFolder(played.folder / "site1")
    server = ("--dir", str(played.server.root))
    public = said("node", "key", "site1", "--dir", str(tmp_path), "--ca", str(played.server.ca_certificate))
    assert "site1 has another key here" in refused("node", "add", "site1", "-", *server, stdin=public)
    assert "with its new key" in said("node", "replace", "site1", "-", *server, stdin=public)
    assert "has that key already" in said("node", "replace", "site1", "-", *server, stdin=public)
    former = old.node_public_key("site1").read_text()
    assert "its use is over" in refused("node", "add", "former", "-", *server, stdin=former)
    assert eventually(lambda: "does not accept this node's key" in said("logs", "site1", "--dir", str(old.root)))
    said("stop", "site1", "--dir", str(old.root))
    assert "does not accept this node's key" in refused(*node_words(played, "site1", old.root))
    said(*node_words(played, "site1", tmp_path))
    try:
        assert played.statuses() == {"site0": "online", "site1": "online"}
    finally:
        said("stop", "site1", "--dir", str(tmp_path))
    assert pid_of(FederationFolder(tmp_path), "site1") is None and naming(tmp_path) == []


def test_a_port_that_is_taken_is_named_as_the_cause(played, tmp_path):
    said("certs", "localhost", "--dir", str(tmp_path))
    words = ("superlink", "--dir", str(tmp_path), "--fleet", played.address, "--control-port", str(played.spare_port))
    assert "a port is taken" in refused(*words, "--background")
    assert pid_of(FederationFolder(tmp_path), "superlink") is None


def node_words(played: Played, name: str, folder: Path) -> list[str]:
    words = ["supernode", name, "--superlink", played.address, "--partition-id", "5", "--device", "cpu"]
    return [*words, "--port", str(played.spare_port), "--dir", str(folder), "--background"]


@pytest.mark.full
def test_a_run_that_no_superexec_takes_is_told_and_a_superexec_without_superlink_ends(tmp_path):
    with contextlib.ExitStack() as held:
        (fleet, claim), (control, another) = claim_port(), claim_port()
        held.enter_context(claim), held.enter_context(another)
        folder, here = FederationFolder(tmp_path), ("--dir", str(tmp_path))
        control_port = ("--control-port", str(control))
        said("certs", "localhost", *here)
        held.callback(said, "stop", "superlink", *here)
        listening = ("--fleet", f"127.0.0.1:{fleet}", *control_port)
        said("superlink", *listening, "--separate-superexec", "--background", *here)
        flower = environment(folder)
        submitted = ["flwr", "run", str(APP), "lab", "--stream", "--run-config", "num-rounds=0"]
        run = held.enter_context(subprocess.Popen(submitted, env=flower, stdout=subprocess.DEVNULL))

        def told(name: str) -> str:
            return fedtalora("health", name, *here).stdout

        assert told("superlink") == "" and "superexec does not run" in told("superexec")
        assert eventually(lambda: "s: no SuperExec takes it" in told("superlink"), seconds=90)
        command = [sys.executable, "-m", "fedtalora_flwr.cli.app", "superexec", *control_port, *here]
        superexec = held.enter_context(subprocess.Popen(command, env=os.environ, stderr=subprocess.PIPE, text=True))
        held.callback(superexec.kill)
        assert run.wait(SECONDS) == 0 and told("superlink") == told("superexec") == ""
        said("stop", "superlink", *here)
        assert "the SuperLink does not list its runs" in told("superexec")
        assert f"no SuperLink has answered at 127.0.0.1:{control} for 90 s" in superexec.communicate(timeout=SECONDS)[1]
        assert superexec.returncode == 1
