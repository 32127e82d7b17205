"""The warm process of a node: used where it can be, replaced where it must be, and gone with its node."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from deployment import COMPLETED, Deployment
from flwr.app import Context, Message
from local_grid import TINY, tiny_run

from client_app.app import app as run_client

ROOT = Path(__file__).parents[1]
SECONDS = 60  # of patience on a loaded machine

WORK = '''
import os, signal, time
from toyapp.error import ToyError

calls = 0

def pid():
    return os.getpid()

def count():
    global calls
    calls += 1
    return calls

def text(length):
    return "x" * length

def fail(text):
    raise ToyError(text)

def here():
    """Whether it is the message's own process."""
    return "warm_node.py" in open("/proc/self/cmdline").read()

def die():
    if not here():
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"

def freeze():
    if not here():
        os.kill(os.getpid(), signal.SIGSTOP)
    return "done"

def rest(seconds):
    time.sleep(0 if here() else seconds)
    return "done"
'''


class Node:
    """A SuperNode, its SuperExec and the processes of its messages, with an app of a few functions."""

    def __init__(self, folder: Path) -> None:
        self.home, self.app = folder / "home", folder / "app"
        (self.app / "toyapp").mkdir(parents=True)
        (self.app / "toyapp" / "__init__.py").write_text("")
        (self.app / "toyapp" / "error.py").write_text("class ToyError(RuntimeError):\n    pass\n")
        (self.app / "toyapp" / "work.py").write_text(WORK)
        self.supernode = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "warm_node.py"), "supernode", str(self.app)],
            env={**os.environ, "FLWR_HOME": str(self.home), "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def send(
        self, function: str, *arguments: object, run_id: int = 1, idle_seconds: float = 600, silent_seconds: int = 60
    ) -> None:
        asked = {"function": function, "arguments": arguments, "run_id": run_id}
        assert self.supernode.stdin is not None
        times = {"idle_seconds": idle_seconds, "silent_seconds": silent_seconds}
        self.supernode.stdin.write(json.dumps(asked | times) + "\n")
        self.supernode.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self.supernode.stdout is not None
        reply: dict[str, Any] = json.loads(self.supernode.stdout.readline())
        return reply

    def ask(self, function: str, *arguments: object, **options: Any) -> dict[str, Any]:
        self.send(function, *arguments, **options)
        return self.receive()

    def workers(self) -> set[int]:
        return self._named("fedtalora_flwr.client.warm.worker", str(self.home))

    def messages(self) -> set[int]:
        return self._named("warm_node.py", "message", str(self.app))

    def superexec(self) -> int:
        (pid,) = self._named("warm_node.py", "superexec", str(self.app))
        return pid

    def close(self) -> None:
        assert self.supernode.stdin is not None and self.supernode.stdout is not None
        self.supernode.stdin.close()
        self.supernode.wait(SECONDS)
        self.supernode.stdout.close()

    def _named(self, *words: str) -> set[int]:
        found = set()
        for process in psutil.process_iter(["cmdline", "status"]):
            command = " ".join(process.info["cmdline"] or [])
            if all(word in command for word in words) and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
        return found


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path / ("n" * 100))  # a socket's own name may have 107 bytes
    yield node
    node.close()
    assert eventually(lambda: not node.workers())


def eventually(condition: Callable[[], object]) -> bool:
    deadline = time.monotonic() + SECONDS
    while not (held := bool(condition())) and time.monotonic() < deadline:
        time.sleep(0.05)
    return held


def test_the_process_of_a_message_imports_flower_and_pythons_own_modules_alone() -> None:
    program = (
        "import sys, flwr.app, flwr.clientapp\n"
        "before = set(sys.modules)\n"
        "import client_app.app\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    # multiprocessing knows the main module by that name too
    assert set(done.stdout.split()) - sys.stdlib_module_names == {"client_app", "fedtalora_flwr", "__mp_main__"}


def test_messages_of_a_run_share_a_process_that_keeps_what_it_has(node: Node) -> None:
    first, second = node.ask("count"), node.ask("count")
    assert (first["value"], second["value"]) == (1, 2)
    assert not first["imported_here"] and first["log"] == []
    assert node.workers() == {node.ask("pid")["value"]}
    assert len(node.ask("text", 3_000_000)["value"]) == 3_000_000


def test_another_run_has_a_process_of_its_own_and_the_former_ends(node: Node) -> None:
    first, second = node.ask("pid"), node.ask("pid", run_id=2)
    assert first["value"] != second["value"]
    assert eventually(lambda: node.workers() == {second["value"]})


def test_two_runs_that_take_turns_replace_each_others_process_and_share_nothing(node: Node) -> None:
    assert [node.ask("count", run_id=run_id)["value"] for run_id in (1, 2, 2, 1)] == [1, 1, 2, 1]
    assert eventually(lambda: len(node.workers()) == 1)


def test_a_message_of_another_run_does_not_end_the_process_that_is_at_work(node: Node) -> None:
    (busy,) = {node.ask("pid", run_id=1)["value"]}
    node.send("rest", 6, run_id=1)
    assert eventually(node.messages)
    time.sleep(1)  # until it has asked
    other = node.ask("pid", run_id=2)
    assert other["value"] == other["pid"] and "has another message" in other["log"][0]
    rested = node.receive()
    assert rested["value"] == "done" and rested["log"] == [] and node.workers() == {busy}


def test_changed_code_is_seen_by_the_next_message(node: Node) -> None:
    assert node.ask("count")["value"] == 1
    work = node.app / "toyapp" / "work.py"
    work.write_text(WORK.replace("calls += 1", "calls += 100"))
    assert node.ask("count")["value"] == 100


def test_an_error_comes_back_as_it_was_raised(node: Node) -> None:
    reply = node.ask("fail", "no such class")
    assert reply["error"] == "ToyError('no such class')"
    assert not reply["imported_here"] and reply["log"] == []


def test_the_message_over_which_the_process_died_is_handled_in_its_own(node: Node) -> None:
    reply = node.ask("die")
    assert reply["value"] == "done" and reply["imported_here"]
    assert reply["log"] == ["the warm process ended over this message; this message is handled in a process of its own"]
    assert node.ask("pid")["value"] in node.workers()


def test_a_process_that_falls_silent_is_ended_and_the_message_handled(node: Node) -> None:
    reply = node.ask("freeze", silent_seconds=2)
    assert reply["value"] == "done" and "silent for 2 s, and was ended" in reply["log"][0]
    assert eventually(lambda: not node.workers())


def test_a_long_task_is_not_silence(node: Node) -> None:
    reply = node.ask("rest", 4, silent_seconds=2)
    assert reply["value"] == "done" and reply["log"] == []


def test_a_second_message_at_a_time_does_not_wait_for_the_first(node: Node) -> None:
    node.send("rest", 1000)
    assert eventually(node.workers)
    reply = node.ask("pid")
    assert reply["value"] == reply["pid"] and "has another message" in reply["log"][0]


def test_a_folder_that_others_may_enter_is_not_used(node: Node) -> None:
    (node.home / "warm").mkdir(parents=True)
    (node.home / "warm").chmod(0o755)
    reply = node.ask("pid")
    assert reply["value"] == reply["pid"] and "must be this user's alone" in reply["log"][0]


def test_what_a_message_leaves_on_the_disk_is_for_its_user_alone(node: Node) -> None:
    node.ask("pid")
    assert (node.home / "warm").stat().st_mode & 0o777 == 0o700
    assert {path.suffix for path in (node.home / "warm").iterdir()} == {".json", ".socket"}


def test_a_process_without_tasks_ends(node: Node) -> None:
    node.ask("pid", idle_seconds=0.5)
    assert eventually(lambda: not node.workers())
    assert not list((node.home / "warm").glob("*.socket"))
    assert node.ask("count")["value"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_it_ends_with_its_supernode(node: Node, number: signal.Signals, busy: bool) -> None:
    node.ask("pid")
    if busy:
        node.send("rest", 1000)
        assert eventually(node.messages)
    (worker,) = node.workers()
    node.supernode.send_signal(number)
    assert eventually(lambda: not psutil.pid_exists(worker))


def test_it_ends_with_the_process_that_starts_the_messages(node: Node) -> None:
    (worker,) = {node.ask("pid")["value"]}
    os.kill(node.superexec(), signal.SIGKILL)
    assert eventually(lambda: not psutil.pid_exists(worker))


def test_it_ends_when_nobody_waits_for_its_task(node: Node) -> None:
    node.ask("pid")
    node.send("rest", 1000)
    assert eventually(lambda: node.messages() and node.workers())
    time.sleep(1)  # until it has asked
    (worker,), (message,) = node.workers(), node.messages()
    os.kill(message, signal.SIGKILL)
    assert eventually(lambda: not psutil.pid_exists(worker))


def test_a_run_by_warm_nodes_is_that_of_cold_ones_to_the_last_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def warm_client(message: Message, context: Context) -> Message:
        context.node_config["warm"] = True
        return run_client(message, context)

    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    cold = tiny_run(tmp_path / "cold", head="linear")
    try:
        warm = tiny_run(tmp_path / "warm", warm_client, head="linear")
    finally:
        for record in (tmp_path / "home" / "warm").glob("*.json"):
            os.kill(json.loads(record.read_text())["pid"], signal.SIGKILL)  # it belongs to what started pytest
    assert "process of its own" not in caplog.text
    assert rounds(warm) == rounds(cold) and len(rounds(warm)) == 4


def rounds(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(text) for text in (folder / "rounds.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in {"seconds", "crc32"}} for line in lines]


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.full), signal.SIGKILL])
def test_flowers_messages_share_a_process_which_ends_with_flowers_supernode(
    tmp_path: Path, number: signal.Signals
) -> None:
    with Deployment(tmp_path / "lab", num_nodes=1, node_config="warm=true") as lab:
        settings = TINY | {"num-clients": 1, "num-tasks": 5, "stop-after-task": 1, "head": "linear"}
        outcome = lab.run(ROOT, settings | {"out": str(tmp_path / "out"), "node-timeout": 120.0}, seconds=200)
        assert outcome.status == COMPLETED, f"{outcome.details}\n{lab.tails()}"
        assert "process of its own" not in lab.nodes[0].log
        (worker,) = (pid for pid, command in lab.processes().items() if "fedtalora_flwr.client.warm.worker" in command)
        lab.nodes[0].kill(number)
        assert eventually(lambda: not psutil.pid_exists(worker))
