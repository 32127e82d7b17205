"""Rounds that close without a node that is late: what is there counts exactly, what comes later counts nowhere."""

import json
import time
from pathlib import Path
from typing import Any

import local_grid
import numpy as np
import pytest
from flwr.app import Message
from local_grid import LocalGrid, tiny_run
from tensors import opened

from client_app.app import app as client_app
from fedtalora_flwr.run_folder.writer import RunFolder
from fedtalora_flwr.server import exchange
from fedtalora_flwr.server.failures import RunFailed

pytestmark = pytest.mark.usefixtures("log_is_caught")

LATE = 101  # node id of partition 1
SETTINGS = {"lora_targets": "proj", "head": "linear", "min_replies": 2, "close_after": 0.2, "verify": True}
CLOSED = "late: the round was closed without it after 0.2 s"
BUSY = "not asked: it is still busy with round 2"


class Slow(LocalGrid):
    """A grid whose node 101 is done with its message of round 2 when a later round begins, or after some looks."""

    done_in_round, looks = "3", 10**6
    kept: set[str]

    def push_messages(self, messages):
        ids = []
        for message in messages:
            (number,) = super().push_messages([message])
            if (message.metadata.dst_node_id, message.metadata.group_id) == (LATE, "2"):
                self.kept = getattr(self, "kept", set()) | {number}
            if message.metadata.group_id == self.done_in_round:
                self.looks = 0
            ids.append(number)
        return ids

    def pull_messages(self, message_ids):
        self.looks -= 1
        return super().pull_messages([i for i in message_ids if self.looks < 0 or i not in getattr(self, "kept", ())])


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> type[Slow]:
    monkeypatch.setattr(local_grid, "LocalGrid", Slow)
    return Slow


def rounds(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def failures(out: Path) -> list[list[tuple[int, str]]]:
    return [[(f["partition_id"], f["reason"]) for f in line["failures"]] for line in rounds(out)]


def result(out: Path) -> tuple[Any, bytes]:
    matrix = json.loads((out / "metrics.json").read_text())["accuracy_matrix"]
    return matrix, next((out / "checkpoint").glob("*.safetensors")).read_bytes()


def test_who_trains_is_told_while_a_round_waits(monkeypatch, tmp_path):
    class Lazy(LocalGrid):
        """Keeps the reply of node 101 to its training for some two seconds."""

        def pull_messages(self, message_ids):
            kept = self.__dict__.get("kept_until", {})
            return super().pull_messages([n for n in message_ids if time.monotonic() > kept.get(n, 0)])

        def push_messages(self, messages):
            messages = list(messages)
            numbers = list(super().push_messages(messages))
            to = {n: (m.metadata.dst_node_id, m.metadata.message_type) for n, m in zip(numbers, messages, strict=True)}
            self.kept_until = {n: time.monotonic() + 2.5 for n, where in to.items() if where == (LATE, "train")}
            return numbers

    told: list[dict[str, Any]] = []
    write = RunFolder.write_status
    monkeypatch.setattr(RunFolder, "write_status", lambda self, **values: told.append(values) or write(self, **values))
    monkeypatch.setattr(local_grid, "LocalGrid", Lazy)
    tiny_run(tmp_path / "run", lora_targets="proj", head="linear", stop_after_task=1, rounds_per_task=1)
    waits = [status for status in told if status.get("waiting")]
    assert waits and all(status["asked"] == [0, 1, 2] and status["waiting"] == [1] for status in waits)
    assert {status["phase"] for status in waits} == {"training"} and "waiting" not in told[-1]
    assert time.time() - 600 < waits[0]["asked_at"] < time.time()


def silent_in(*silent: str):
    """A client whose partition 1 has no reply to messages of some rounds."""

    def client(message: Message, context: Any) -> Message | None:
        if context.node_id == LATE and message.metadata.group_id in silent:
            return None
        return client_app(message, context)

    return client


@pytest.mark.parametrize("done_in_round", ["3", "4"])
def test_round_closes_without_a_late_node_which_is_asked_again_when_it_is_done(
    slow, tmp_path, monkeypatch, done_in_round
):
    monkeypatch.setattr(slow, "done_in_round", done_in_round)
    tiny_run(tmp_path / "run", **SETTINGS)
    busy = [[(1, BUSY)], [(1, BUSY)] if done_in_round == "4" else []]
    assert failures(tmp_path / "run") == [[], [(1, CLOSED)], *busy]
    assert [line["participants"] for line in rounds(tmp_path / "run")][1:3] == [[0, 1, 2], [0, 2]]
    assert max(line["exactness_error"] for line in rounds(tmp_path / "run")) < 1e-6
    monkeypatch.undo()
    without = ("2", "3", "4") if done_in_round == "4" else ("2", "3")
    tiny_run(tmp_path / "without", silent_in(*without), **(SETTINGS | {"close_after": 0.0}))
    assert result(tmp_path / "run") == result(tmp_path / "without")


def test_round_stays_open_where_too_few_replies_are_there(slow, tmp_path, monkeypatch):
    monkeypatch.setattr(slow, "looks", 12)  # two of them before the second round
    tiny_run(tmp_path / "run", **(SETTINGS | {"min_replies": 3}))
    assert failures(tmp_path / "run") == [[], [], [], []]


def test_round_never_closes_early_without_the_setting(slow, tmp_path, monkeypatch):
    monkeypatch.setattr(slow, "looks", 12)
    tiny_run(tmp_path / "run", **(SETTINGS | {"close_after": 0.0}))
    assert failures(tmp_path / "run") == [[], [], [], []]


def spoils(message: Message, context: Any) -> Message:
    """A client whose partition 0 sends factors that are not finite in round 2."""
    reply = client_app(message, context)
    if context.node_id == 100 and message.metadata.group_id == "2":
        with opened(reply.content) as tensors:
            for key in [key for key in tensors if key.startswith("lora_B/")]:
                tensors[key] = np.full_like(tensors[key], np.nan)
    return reply


def test_closed_round_whose_replies_are_not_all_good_is_repeated_with_the_late_node(
    slow, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(slow, "looks", 24)  # two of them before the second round
    tiny_run(tmp_path / "run", spoils, **(SETTINGS | {"close_after": 0.05}))
    assert "it is repeated, and waits for those that were late" in caplog.text
    assert [partition for partition, _ in failures(tmp_path / "run")[1]] == [0, 0, 1]
    monkeypatch.undo()
    tiny_run(tmp_path / "waited", spoils, **(SETTINGS | {"close_after": 0.0}))
    assert result(tmp_path / "run") == result(tmp_path / "waited")


def test_closed_round_that_is_repeated_in_vain_fails_by_name(slow, tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "_GRACE", 0.0)
    with pytest.raises(RunFailed, match=r"round 2 has 1 good replies.*partition 1: no reply within 1 s"):
        tiny_run(tmp_path / "run", spoils, **(SETTINGS | {"round_timeout": 1.0}))
