"""A partition belongs to one node for a run: who else claims it, or comes back with other data, is refused by name."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import local_grid
import pytest
import torch
from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from local_grid import LocalGrid, tiny_run

from client_app.app import app as client_app
from fedtalora_flwr import wire
from fedtalora_flwr.server import nodes
from fedtalora_flwr.wire.records import ARRAYS, array_record

pytestmark = pytest.mark.usefixtures("log_is_caught")

HOLDER, GUEST = 101, 201  # node ids; both say that they are partition 1
SETTINGS = {"lora_targets": "proj", "head": "linear", "min_replies": 2, "node_timeout": 60.0}


class Guests(LocalGrid):
    """A grid on which nodes come and go with the rounds, as Flower tells it.

    Class attributes: round -> the nodes that are there from it on, of 100, 101, 102 and 201; the names under which keys
    are registered; round -> node -> since when it is connected, from that round on.
    """

    there: dict[int, set[int]]
    names: dict[int, str]
    since: dict[int, dict[int, str]]
    server_round = 0

    def _now(self, plan):
        return plan[max(number for number in plan if number <= self.server_round)]

    def push_messages(self, messages):
        messages = list(messages)
        self.server_round = max([self.server_round, *(int(m.metadata.group_id or 0) for m in messages)])
        if GUEST not in self.contexts:
            self.contexts[GUEST] = replace(self.contexts[HOLDER], node_id=GUEST)
        return super().push_messages(messages)

    def get_nodes(self):
        since = self._now(self.since)
        return [
            NodeInfo(node_id=node, name=self.names.get(node), last_activated_at=since.get(node, "then"))
            for node in sorted(self._now(self.there))
        ]

    def get_node_ids(self):
        return [node.node_id for node in self.get_nodes()]


@pytest.fixture
def guests(monkeypatch: pytest.MonkeyPatch) -> type[Guests]:
    monkeypatch.setattr(local_grid, "LocalGrid", Guests)
    monkeypatch.setattr(nodes, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(Guests, "there", {0: {100, 101, 102}}, raising=False)
    monkeypatch.setattr(Guests, "names", {}, raising=False)
    monkeypatch.setattr(Guests, "since", {0: {}}, raising=False)
    return Guests


class Asked:
    """A client that notes who trains in which round, and says what a test wants of itself when asked again."""

    def __init__(self, *, of: int = 0, counts: Sequence[int] = (), **changes: Any) -> None:
        self.of, self.counts, self.changes = of, counts, changes
        self.trained: dict[str, list[int]] = {}
        self.hellos = 0

    def __call__(self, message: Message, context: Any) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == "query" and context.node_id == self.of:
            self.hellos += 1
            if self.of == GUEST or self.hellos > 1:
                for key, value in self.changes.items():
                    reply.content[wire.HELLO][key.replace("_", "-")] = value
                if self.counts:
                    reply.content[ARRAYS] = array_record({"counts/class": torch.tensor(self.counts)})
        if message.metadata.message_type == "train":
            self.trained.setdefault(message.metadata.group_id, []).append(context.node_id)
        return reply


def failures(out: Path) -> list[list[tuple[int, str]]]:
    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    return [[(f["partition_id"], f["reason"]) for f in line["failures"]] for line in lines]


def test_newcomer_that_shows_the_data_of_a_node_that_is_there_is_refused_by_name(guests, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(guests, "there", {0: {100, 101, 102}, 1: {100, 101, 102, GUEST}})
    asked = Asked()
    tiny_run(tmp_path / "run", asked, **SETTINGS)
    assert asked.trained == {f"{number}": [100, HOLDER, 102] for number in range(1, 5)}
    reason = f"node {GUEST} (partition 1) cannot take part: partition 1 is held by node {HOLDER}, which is connected"
    assert caplog.text.count(reason) == 1


def test_newcomer_is_asked_again_and_taken_once_the_holder_is_gone(guests, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(guests, "there", {0: {100, 101, 102}, 1: {100, 101, 102, GUEST}, 2: {100, 102, GUEST}})
    asked = Asked(of=GUEST)
    with caplog.at_level("INFO", logger="fedtalora.server"):
        tiny_run(tmp_path / "run", asked, **SETTINGS)
    assert [nodes[1] for nodes in asked.trained.values()] == [HOLDER, HOLDER, GUEST, GUEST]
    assert f"node {GUEST} is back with partition 1" in caplog.text
    assert asked.hellos == 2  # once while the holder was there, once when it was gone


@pytest.mark.parametrize(
    "other", [{}, {GUEST: "site-c"}, {GUEST: "site-b"}], ids=["no name", "other name", "same name"]
)
def test_partition_of_a_registered_node_is_given_to_no_other_but_one_that_was_registered_in_its_place(
    guests, tmp_path, monkeypatch, caplog, other
):
    monkeypatch.setattr(guests, "there", {0: {100, 101, 102}, 2: {100, 102, GUEST}})
    monkeypatch.setattr(guests, "names", {HOLDER: "site-b", **other})
    asked = Asked()
    tiny_run(tmp_path / "run", asked, **SETTINGS)
    taken = other == {GUEST: "site-b"}
    assert any(GUEST in nodes for nodes in asked.trained.values()) == taken
    refusal = "partition 1 belongs to the node that is registered as 'site-b', in this run"
    assert (refusal in caplog.text) != taken


@pytest.mark.parametrize("how", ["it was away", "nobody saw it away"])
def test_node_that_comes_back_shows_its_data_again_and_is_refused_by_name_if_they_are_others(
    guests, tmp_path, monkeypatch, caplog, how
):
    if how == "it was away":
        monkeypatch.setattr(guests, "there", {0: {100, 101, 102}, 1: {100, 102}, 2: {100, 101, 102}})
    else:
        monkeypatch.setattr(guests, "since", {0: {}, 2: {HOLDER: "now"}})
    asked = Asked(of=HOLDER, partition_hash="other")
    tiny_run(tmp_path / "run", asked, **SETTINGS)
    reason = "it holds other data than partition 1 of this run"
    assert f"node {HOLDER} (partition 1) cannot take part: {reason}" in caplog.text
    assert failures(tmp_path / "run")[2:] == [[(1, reason)], [(1, reason)]]
    assert HOLDER not in asked.trained["3"] and asked.hellos == 2


def test_node_that_comes_back_with_the_same_data_goes_on(guests, tmp_path, monkeypatch):
    monkeypatch.setattr(guests, "since", {0: {}, 2: {HOLDER: "now"}})
    asked = Asked(of=HOLDER)
    tiny_run(tmp_path / "run", asked, **SETTINGS)
    assert failures(tmp_path / "run") == [[], [], [], []] and asked.hellos == 2


def test_node_that_comes_back_as_another_partition_is_refused_by_name(guests, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(guests, "since", {0: {}, 2: {HOLDER: "now"}})
    manifest = json.loads((tiny_run(tmp_path / "first", **SETTINGS) / "manifest.json").read_text())
    counts, digest = manifest["class_counts"][2], manifest["partition_hashes"][2]
    tiny_run(tmp_path / "run", Asked(of=HOLDER, counts=counts, partition_id=2, partition_hash=digest), **SETTINGS)
    assert (
        f"node {HOLDER} (partition 1) cannot take part: it was partition 1 of this run, and says 2 now" in caplog.text
    )


def test_resumed_run_goes_on_without_a_node_that_shows_other_data(tmp_path, caplog):
    class Killed(BaseException):
        """The process ends here."""

    def killed(message: Message, context: Any) -> Message:
        if message.metadata.group_id == "2":
            raise Killed
        return client_app(message, context)

    with pytest.raises(Killed):
        tiny_run(tmp_path / "run", killed, **SETTINGS)
    asked = Asked(of=HOLDER, partition_hash="other")
    asked.hellos = 1
    tiny_run(tmp_path / "run", asked, **SETTINGS, resume=True)
    reason = "it holds other data than partition 1 of this run"
    assert f"node {HOLDER} (partition 1) cannot take part: {reason}" in caplog.text
    assert failures(tmp_path / "run")[1:] == [[(1, reason)]] * 3
