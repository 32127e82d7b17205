"""Nodes that are gone for a while: the server waits where too few are left, says so, and loses nothing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import local_grid
import pytest
from flwr.app import Message
from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_ins_message
from local_grid import LocalGrid, tiny_run

from client_app.app import app as client_app
from fedtalora_flwr import wire
from fedtalora_flwr.run_folder import checkpoint
from fedtalora_flwr.server import nodes
from fedtalora_flwr.server.failures import RunFailed

pytestmark = pytest.mark.usefixtures("log_is_caught")

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
    monkeypatch.setattr(nodes, "_LOOK_SECONDS", 0.01)
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
    assert f"node {NEW} (partition 1) cannot take part: it holds other data than partition 1 of this run" in caplog.text


class Late(LocalGrid):
    """A grid whose node 101 comes late: after some looks, or not before a round."""

    looks, first_round = 3, 0

    def push_messages(self, messages):
        messages = list(messages)
        self.looks = 0 if messages[0].metadata.group_id == f"{self.first_round}" else self.looks
        return super().push_messages(messages)

    def get_node_ids(self):
        self.looks -= 1
        return [node for node in self.contexts if node != GONE or self.looks < 0]

    def pull_messages(self, message_ids):
        """Give also what a node may send that nobody asked for."""
        return [*super().pull_messages(message_ids), create_message_error_unavailable_ins_message("", run_id=1)]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> type[Late]:
    monkeypatch.setattr(local_grid, "LocalGrid", Late)
    monkeypatch.setattr(nodes, "_LOOK_SECONDS", 0.01)
    return Late


def test_run_begins_when_the_last_node_is_there_and_says_meanwhile_who_is_not(undisturbed, late, tmp_path, caplog):
    with caplog.at_level("INFO", logger="fedtalora.server"):
        tiny_run(tmp_path / "run", **SETTINGS)
    assert caplog.text.count("waiting: 2 of 3 nodes are here, partition 1 is not") == 1
    assert result(tmp_path / "run") == result(undisturbed)


def test_run_that_lacks_a_node_at_its_start_fails_by_the_name_of_the_partition(late, tmp_path, monkeypatch):
    monkeypatch.setattr(late, "looks", 10**6)
    message = (
        r"2 of 3 nodes are here after 0\.\d s, partition 1 is not\. Start every node .* run again; node-timeout, now 0"
    )
    with pytest.raises(RunFailed, match=message):
        tiny_run(tmp_path / "run", **(SETTINGS | {"node_timeout": 0.1}))
    assert (tmp_path / "run" / "rounds.jsonl").read_text() == ""


class Killed(BaseException):
    """The process ends here."""


def kill_in_round_2(message: Message, context: Any) -> Message | None:
    if message.metadata.group_id == "2":
        raise Killed
    return client_app(message, context)


SLOTS = {"method": "fl-tac", "head": "linear"}


@pytest.mark.parametrize("changes", [{}, SLOTS], ids=["tasks in turn", "slots"])
def test_run_goes_on_without_a_node_and_takes_it_in_when_it_comes(late, tmp_path, monkeypatch, caplog, changes):
    settings = SETTINGS | {"min_replies": 2, "node_timeout": 0.1, "rounds_per_task": 4, "stop_after_task": 1}
    settings |= changes
    with pytest.raises(Killed), monkeypatch.context() as patch:
        patch.setattr(local_grid, "LocalGrid", LocalGrid)
        tiny_run(tmp_path / "run", kill_in_round_2, **settings)
    monkeypatch.setattr(late, "looks", 10**6)
    monkeypatch.setattr(late, "first_round", 3)
    with caplog.at_level("INFO", logger="fedtalora.server"):
        tiny_run(tmp_path / "run", **settings, resume=True)
    failures = [[(f["partition_id"], f["reason"]) for f in line["failures"]] for line in rounds(tmp_path / "run")]
    assert failures == [[], [(1, "no node has come for it")], [(1, "no node has come for it")], []]
    assert [line["participants"] for line in rounds(tmp_path / "run")][1:] == [[0, 2], [0, 2], [0, 1, 2]]
    assert "but partition 1 is not here" in caplog.text and f"node {GONE} is back with partition 1" in caplog.text


def test_run_goes_on_without_a_node_of_another_version_and_names_it(tmp_path, caplog):
    def other_version(message: Message, context: Any) -> Message:
        reply = client_app(message, context)
        if context.node_id == GONE:
            reply.content[wire.HELLO]["library"] = "9.9"
        return reply

    settings = SETTINGS | {"min_replies": 2, "stop_after_task": 1}
    with pytest.raises(Killed):
        tiny_run(tmp_path / "run", kill_in_round_2, **settings)
    tiny_run(tmp_path / "run", other_version, **settings, resume=True)
    assert f"node {GONE} (partition 1) cannot take part: the client runs fedtalora 9.9" in caplog.text
    (failure,) = rounds(tmp_path / "run")[1]["failures"]
    assert failure["partition_id"] == 1 and failure["reason"].startswith("the client runs fedtalora 9.9, this side")
