"""Nodes that are gone for a while: the server waits where too few are left, says so, and loses nothing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import local_grid
import pytest
from flwr.app import Message
from local_grid import LocalGrid, tiny_run

from client_app.app import app as client_app
from fedtalora_flwr import checkpoint, wire
from server_app import attendance
from server_app.strategy import RunFailed

GONE, NEW = 101, 201  # node ids
SETTINGS = {"lora_targets": "proj", "head": "ridge", "min_replies": 3, "node_timeout": 60.0}


class Absence(LocalGrid):
    """A grid whose node 101 loses the message of round 2 and is then away for some looks."""

    looks, new_id = 3, GONE
    left: int | None = None  # looks until it is back; None before it went

    def push_messages(self, messages):
        ids = []
        for message in messages:
            if (message.metadata.dst_node_id, message.metadata.group_id, self.left) == (GONE, "2", None):
                self.left, client = self.looks, self.client
                self.client = lambda *_: None
                ids += super().push_messages([message])
                self.client = client
            else:
                ids += super().push_messages([message])
        return ids

    def get_node_ids(self):
        if self.left is not None:
            self.left -= 1
            if self.left >= 0:
                return [node for node in self.contexts if node != GONE]
            if GONE in self.contexts and self.new_id != GONE:
                self.contexts[self.new_id] = replace(self.contexts.pop(GONE), node_id=self.new_id)
        return list(self.contexts)


@pytest.fixture
def absence(monkeypatch: pytest.MonkeyPatch) -> type[Absence]:
    monkeypatch.setattr(local_grid, "LocalGrid", Absence)
    monkeypatch.setattr(attendance, "_LOOK_SECONDS", 0.01)
    return Absence


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("undisturbed") / "run", **SETTINGS)


def rounds(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def result(out: Path) -> tuple[Any, bytes]:
    """The accuracies and the state that a run ends with."""
    matrix = json.loads((out / "metrics.json").read_text())["accuracy_matrix"]
    return matrix, next((out / "checkpoint").glob("*.safetensors")).read_bytes()


@pytest.mark.parametrize("new_id", [GONE, NEW], ids=["same id", "new id"])
def test_round_that_lost_a_node_waits_for_it_and_ends_with_the_same_bits(
    undisturbed, absence, tmp_path, monkeypatch, caplog, new_id
):
    monkeypatch.setattr(absence, "new_id", new_id)
    with caplog.at_level("INFO", logger="fedtalora.server"):
        tiny_run(tmp_path / "run", **SETTINGS)
    assert result(tmp_path / "run") == result(undisturbed)
    lines = rounds(tmp_path / "run")
    assert [line["server_round"] for line in lines] == [1, 2, 3, 4]
    assert [failure["partition_id"] for failure in lines[1]["failures"]] == [1]
    assert "round 2 waits: 2 nodes, min-replies is 3" in caplog.text
    assert "round 2 goes on with 3 nodes" in caplog.text
    assert (f"node {NEW} is back with partition 1" in caplog.text) == (new_id == NEW)


def test_node_that_is_not_back_in_time_fails_the_run_and_it_can_be_resumed(undisturbed, absence, tmp_path, monkeypatch):
    monkeypatch.setattr(absence, "looks", 10**6)
    with pytest.raises(RunFailed, match=r"round 2 has waited 0\.2 s for nodes: 2 are connected.* resume=true"):
        tiny_run(tmp_path / "run", **(SETTINGS | {"node_timeout": 0.2}))
    assert checkpoint.load(tmp_path / "run" / "checkpoint").server_round == 1
    monkeypatch.undo()
    tiny_run(tmp_path / "run", **SETTINGS, resume=True)
    assert result(tmp_path / "run") == result(undisturbed)


def test_round_goes_on_without_a_node_where_enough_are_left_and_takes_it_in_when_it_is_back(
    absence, tmp_path, monkeypatch
):
    monkeypatch.setattr(absence, "new_id", NEW)
    monkeypatch.setattr(absence, "looks", 1)
    tiny_run(tmp_path / "run", **(SETTINGS | {"min_replies": 2}))
    assert [[f["partition_id"] for f in line["failures"]] for line in rounds(tmp_path / "run")] == [[], [1], [], []]


def test_newcomer_with_other_data_is_left_out(absence, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(absence, "new_id", NEW)

    def client(message: Message, context: Any) -> Message:
        reply = client_app(message, context)
        if context.node_id == NEW and message.metadata.message_type == "query":
            reply.content[wire.HELLO]["partition-hash"] = "other"
        return reply

    with pytest.raises(RunFailed, match="round 2 has waited"):
        tiny_run(tmp_path / "run", client, **(SETTINGS | {"node_timeout": 0.2}))
    assert f"node {NEW} cannot take part: it holds other data than partition 1 of this run" in caplog.text
