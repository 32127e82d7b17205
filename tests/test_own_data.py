"""Whole runs in which every node brings a folder of its own, in this process, on a few digits."""

import io
import json
import re
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import local_grid
import numpy as np
import PIL.Image
import pytest
import torch
from flwr.app import Context, Error, Message, MessageType
from flwr.common.constant import ErrorCode
from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_ins_message
from local_grid import LocalGrid, defaults, run_server
from sklearn.datasets import load_digits
from tensors import opened

from client_app import app as client_module
from fedtalora_flwr import wire
from fedtalora_flwr.client import handlers
from fedtalora_flwr.data import DataError, HeldClass, OwnReader
from fedtalora_flwr.inference.model import open_trained
from fedtalora_flwr.inference.predict import predict, read_items
from fedtalora_flwr.model.backbones import vit_mini
from fedtalora_flwr.run_folder import checkpoint
from fedtalora_flwr.run_folder.reader import read_run
from fedtalora_flwr.server import nodes
from fedtalora_flwr.server.failures import RunFailed
from fedtalora_flwr.wire import METRICS

pytestmark = pytest.mark.usefixtures("log_is_caught")

TINY = {
    "dataset": "nodes",
    "num-tasks": 2,
    "num-clients": 3,
    "rounds-per-task": 1,
    "test-fraction": 0.3,
    "task-order": "given",
    "lora-blocks": "last:1",
    "lora-targets": "proj",
    "batch-size": 8,
    "device": "cpu",
    "head": "linear",
    "head-learning-rate": 0.01,
    "ridge-features": 0,
}
DIGITS = load_digits()
NAMES = ("ant", "bee", "cat", "dog", "elk", "fox")

# Task -> class -> examples, by node; the second node has nothing of the second task.
NODES: list[dict[str, dict[str, int]]] = [
    {"task-2": {"ant": 7, "bee": 5}, "task-10": {"cat": 6, "dog": 9}},
    {"task-2": {"bee": 8}},
    {"task-2": {"ant": 4}, "task-10": {"cat": 10, "dog": 3}},
]

ClientCall = Callable[[Message, Context], Message | None]
run_client: ClientCall = client_module.app


class Killed(BaseException):
    """The process ends here."""


def draw(folder: Path, name: str, count: int, *, first: int = 0, digit: int | None = None) -> None:
    """Put pictures of one digit into a folder of the class's name."""
    pixels = (DIGITS.images[DIGITS.target == (NAMES.index(name) if digit is None else digit)] * 255 / 16).astype("u1")
    (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        PIL.Image.fromarray(pixels[number]).save(folder / name / f"{folder.parent.name}-{number}.png")


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Folders of three nodes with task folders."""
    for node, tasks in enumerate(NODES):
        for task, classes in tasks.items():
            for name, count in classes.items():
                draw(tmp_path / f"site{node}" / task, name, count, first=10 * node)
    return [tmp_path / f"site{node}" for node in range(len(NODES))]


@pytest.fixture(autouse=True, scope="module")
def _backbone_is_built_once():
    built = vit_mini.create()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vit_mini, "create", lambda: deepcopy(built))
        yield


def run(out: Path, paths: list[Path], client: ClientCall = run_client, **changes: Any) -> Path:
    settings = {key.replace("_", "-"): value for key, value in changes.items()}
    run_server(defaults() | TINY | {"out": str(out)} | settings, client, data_paths=paths)
    return out


def read(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / name).read_text())


def rounds(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def sizes(nodes: list[dict[str, dict[str, int]]]) -> list[int]:
    """Examples of each class over all nodes."""
    return [sum(classes.get(name, 0) for tasks in nodes for classes in tasks.values()) for name in NAMES[:4]]


def before_task(task_id: int, change: Callable[[], None]) -> ClientCall:
    """A client in whose world something changes before the server asks for the second time, third time, ..."""
    asked = {"times": -len(NODES)}

    def client(message: Message, context: Context) -> Message | None:
        if message.metadata.message_type == MessageType.QUERY:
            if asked["times"] == (task_id - 1) * len(NODES):
                change()
            asked["times"] += 1
        return run_client(message, context)

    return client


@pytest.mark.parametrize(("head", "least_faa"), [("linear", 0.0), ("ridge", 0.6)])
def test_run_on_the_nodes_own_folders_learns_their_classes_by_name(paths, tmp_path, head, least_faa):
    out = run(tmp_path / "run", paths, head=head, rounds_per_task=2)
    manifest, metrics = read(out, "manifest.json"), read(out, "metrics.json")
    assert manifest["class_names"] == ["ant", "bee", "cat", "dog"]
    assert manifest["tasks"] == [[0, 1], [2, 3]]
    point = checkpoint.load(out / "checkpoint")
    assert point.classes.task_names == ("task-2", "task-10")
    held_out = np.array(sizes(NODES)) - np.sum(manifest["class_counts"], axis=0)
    assert point.matrix.total[1].tolist() == [held_out[:2].sum(), held_out[2:].sum()]
    assert metrics["faa"] > least_faa  # a guess gives 0.25
    found = metrics["evaluation"]
    assert found["accuracy"] == metrics["faa"] and "classes" not in found and "not known here" in found["remark"]
    brought = [sum(sizes([node])) for node in NODES]
    assert [c["num_examples"] for c in found["clients"]] == (brought - np.sum(manifest["class_counts"], 1)).tolist()
    losses = [line["mean_loss"] for line in rounds(out)]
    assert losses[1] < losses[0] and losses[3] < losses[2]


def test_node_without_data_of_a_task_sits_it_out_and_is_still_asked_about_what_it_held_before(paths, tmp_path):
    asked: list[tuple[str, int, int]] = []

    def client(message: Message, context: Context) -> Message | None:
        server_round = int(message.metadata.group_id or 0)
        asked.append((message.metadata.message_type, int(context.node_config["partition-id"]), server_round))
        return run_client(message, context)

    out = run(tmp_path / "run", paths, client)
    assert [partition for kind, partition, now in asked if (kind, now) == (MessageType.TRAIN, 2)] == [0, 2]
    assert (MessageType.EVALUATE, 1, 2) in asked
    assert [line["failures"] for line in rounds(out)] == [[], []]


def test_node_is_told_no_name_that_it_has_not_said_itself(paths, tmp_path):
    told: dict[int, set[str]] = {0: set(), 1: set(), 2: set()}

    def client(message: Message, context: Context) -> Message | None:
        told[int(context.node_config["partition-id"])].update(wire.read_classes(message).names)
        return run_client(message, context)

    run(tmp_path / "run", paths, client)
    assert told == {0: {"ant", "bee", "cat", "dog"}, 1: {"", "bee"}, 2: {"", "ant", "cat", "dog"}}


@pytest.mark.parametrize("head", ["linear", "ridge"])
def test_class_that_arrives_between_tasks_gets_a_row_behind_the_others(paths, tmp_path, head):
    arrives = before_task(1, lambda: draw(paths[1] / "task-10", "fox", 9))
    out = run(tmp_path / "run", paths, arrives, head=head)
    manifest, point = read(out, "manifest.json"), checkpoint.load(out / "checkpoint")
    assert manifest["class_names"] == list(point.classes.names) == ["ant", "bee", "cat", "dog", "fox"]
    assert manifest["tasks"] == [[0, 1], [2, 3, 4]]
    assert [line["participants"] for line in rounds(out)] == [[0, 1, 2], [0, 1, 2]]
    assert len(point.state.head["weight"]) == len(point.sums.moment) == 5
    assert point.state.head["weight"][4].abs().sum() > 0
    if head == "ridge":
        assert int(point.sums.moment[4, -1]) == manifest["class_counts"][1][4] > 0


def test_rows_of_known_classes_stay_bit_for_bit_when_a_class_arrives(paths, tmp_path):
    alone = run(tmp_path / "alone", paths, num_tasks=2, stop_after_task=1)
    before = checkpoint.load(alone / "checkpoint").state.head["weight"]
    out = run(tmp_path / "run", paths, before_task(1, lambda: draw(paths[1] / "task-10", "elk", 9)))
    after = checkpoint.load(out / "checkpoint").state.head["weight"]
    assert torch.equal(after[:2], before[:2]) and len(after) == 5


def test_task_whose_folder_is_not_there_when_it_is_due_fails_and_the_run_goes_on_once_it_is(paths, tmp_path):
    late = [path / "task-10" for path in (paths[0], paths[2])]
    for folder in late:
        folder.rename(folder.parent.with_name(f"{folder.parent.name}-later"))
    with pytest.raises(RunFailed, match="task 1 is held by 0 partitions, min-replies is 1"):
        run(tmp_path / "run", paths)
    for folder in late:
        folder.parent.with_name(f"{folder.parent.name}-later").rename(folder)
    out = run(tmp_path / "run", paths, resume=True)
    assert read(out, "manifest.json")["class_names"] == ["ant", "bee", "cat", "dog"]
    assert len(rounds(out)) == 2 and read(out, "metrics.json")["faa"] is not None


def test_run_killed_within_a_task_and_after_it_ends_with_the_same_bits(paths, tmp_path):
    def killed_at(server_round: int) -> ClientCall:
        def client(message: Message, context: Context) -> Message | None:
            if int(message.metadata.group_id or 0) == server_round:
                raise Killed
            return run_client(message, context)

        return client

    whole = run(tmp_path / "whole", paths, rounds_per_task=2, head="ridge")
    for server_round in (2, 3):
        with pytest.raises(Killed):
            run(
                tmp_path / "run",
                paths,
                killed_at(server_round),
                rounds_per_task=2,
                head="ridge",
                resume=server_round > 2,
            )
    out = run(tmp_path / "run", paths, rounds_per_task=2, head="ridge", resume=True)
    first, second = ({p.name: p.read_bytes() for p in (f / "checkpoint").glob("*.safetensors")} for f in (whole, out))
    assert first == second
    assert read(whole, "metrics.json")["accuracy_matrix"] == read(out, "metrics.json")["accuracy_matrix"]


def test_one_folder_a_class_is_cut_into_tasks_and_a_late_class_joins_the_next_one(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for path, names in zip(paths, (("dog", "ant"), ("bee", "ant"), ("cat",)), strict=True):
        for name in names:
            draw(path, name, 6)
    out = run(tmp_path / "run", paths, before_task(1, lambda: draw(paths[2], "aardvark", 5, digit=7)))
    manifest = read(out, "manifest.json")
    assert manifest["class_names"] == ["ant", "bee", "cat", "dog", "aardvark"]
    assert manifest["tasks"] == [[0, 1], [2, 3, 4]]
    assert [line["participants"] for line in rounds(out)] == [[0, 1], [0, 2]]


def test_node_that_cannot_say_what_it_holds_sits_the_task_out_and_is_named(paths, tmp_path):
    def corrupt() -> None:
        draw(paths[2] / "task-10", "fox", 3)
        (paths[2] / "task-10" / "fox" / "broken.png").write_bytes(b"no picture")

    out = run(tmp_path / "run", paths, before_task(1, corrupt))
    failure = rounds(out)[1]["failures"][0]
    assert failure["partition_id"] == 2
    assert "broken.png (task-10, fox) cannot be decoded" in failure["reason"] and str(tmp_path) not in failure["reason"]
    assert rounds(out)[1]["participants"] == [0]
    assert read(out, "manifest.json")["class_names"] == ["ant", "bee", "cat", "dog"]


class Border(LocalGrid):
    """A grid whose node 102 goes away as the second task begins, as Flower tells it, and is back after some looks."""

    how, new_id, looks = "unlisted", 102, 3
    left = -1  # looks for which it is still away; -1 before it went and once it is back
    met = False

    def get_node_ids(self):
        if self.left > 0:
            self.left -= 1
            return [node for node in self.contexts if node != 102]
        if self.left == 0 and self.new_id != 102:
            self.contexts[self.new_id] = replace(self.contexts.pop(102), node_id=self.new_id)
        self.left = -1
        return list(self.contexts)

    def push_messages(self, messages):
        messages = list(messages)
        if self.how == "unlisted" and messages[0].metadata.message_type == MessageType.EVALUATE:
            self.left = self.looks
            self.how = ""
        return super().push_messages(messages)

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        if not self.met or self.how not in ("dies", "removed"):
            self.met = True
            return super().send_and_receive(messages, timeout=timeout)
        replies = super().send_and_receive([m for m in messages if m.metadata.dst_node_id != 102])
        lost = next(m for m in messages if m.metadata.dst_node_id == 102)
        lost.metadata.__dict__["_message_id"] = "lost"  # which Flower's grid gives before it sends
        if self.how == "dies":
            error = Error(ErrorCode.NODE_UNAVAILABLE, "the node is unavailable")
            replies.append(Message(error, reply_to=lost))
        else:  # its message is not taken: the SuperLink gives it no id, and this for the id that is none
            replies.append(create_message_error_unavailable_ins_message("", run_id=1))
        self.left, self.how = self.looks, ""
        return replies


@pytest.fixture
def border(monkeypatch: pytest.MonkeyPatch) -> type[Border]:
    monkeypatch.setattr(local_grid, "LocalGrid", Border)
    monkeypatch.setattr(nodes, "_LOOK_SECONDS", 0.01)
    return Border


@pytest.mark.parametrize(("how", "new_id"), [("unlisted", 102), ("unlisted", 202), ("dies", 102), ("removed", 202)])
def test_node_that_is_gone_as_a_task_begins_is_waited_for(paths, tmp_path, border, monkeypatch, caplog, how, new_id):
    monkeypatch.setattr(border, "how", how)
    monkeypatch.setattr(border, "new_id", new_id)
    with caplog.at_level("INFO", logger="fedtalora.server"):
        out = run(tmp_path / "run", paths, min_replies=2, node_timeout=60.0)
    assert [(line["participants"], line["failures"]) for line in rounds(out)] == [([0, 1, 2], []), ([0, 2], [])]
    assert "task 2 waits: partition 2 is not here" in caplog.text
    assert "task 2 goes on with 3 nodes" in caplog.text
    assert ("node 202 is back with partition 2" in caplog.text) == (new_id == 202)


def test_node_that_is_not_back_in_time_sits_the_task_out_or_ends_the_run_by_name(paths, tmp_path, border, monkeypatch):
    monkeypatch.setattr(border, "looks", 10**6)
    reason = "sits the task out: its node is not connected"
    out = run(tmp_path / "run", paths, node_timeout=0.1)
    assert rounds(out)[1]["participants"] == [0]
    assert rounds(out)[1]["failures"] == [{"partition_id": 2, "reason": reason}]
    message = (
        f"task 1 is held by 1 partitions, min-replies is 2: partition 2 {reason}. Mend that, and go on with resume"
    )
    with pytest.raises(RunFailed, match=message):
        run(tmp_path / "other", paths, min_replies=2, node_timeout=0.1)


MALFORMED: dict[str, tuple[str, Any, str]] = {
    "another version": ("library", "9.9", "the client runs fedtalora 9.9, this side"),
    "no number of its own": ("partition-id", "2", "the first reply cannot be read: ValueError partition-id must be"),
    "another's number": ("partition-id", 0, "it is partition 0 now"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_node_whose_word_is_of_no_use_as_a_task_begins_sits_it_out_and_is_named(paths, tmp_path, caplog, what):
    key, value, reason = MALFORMED[what]
    asked = []

    def client(message: Message, context: Context) -> Message | None:
        reply = run_client(message, context)
        if message.metadata.message_type == MessageType.QUERY and context.node_config["partition-id"] == 2:
            asked.append(message)
            if len(asked) == 2:
                reply.content[wire.HELLO][key] = value
        return reply

    out = run(tmp_path / "run", paths, client)
    assert [line["participants"] for line in rounds(out)] == [[0, 1, 2], [0]]
    (failure,) = rounds(out)[1]["failures"]
    assert failure["partition_id"] == 2 and failure["reason"].startswith(f"sits the task out: {reason}")
    assert f"node 102 (partition 2) sits the task out: {reason}" in caplog.text


def test_name_that_most_nodes_bring_to_a_later_task_stays_and_the_one_like_it_is_left_out(paths, tmp_path):
    def arrives() -> None:
        for path, name in zip(paths, ("Elk", "elk", "elk"), strict=True):
            draw(path / "task-10", name, 4, digit=4)

    out = run(tmp_path / "run", paths, before_task(1, arrives))
    (failure,) = rounds(out)[1]["failures"]
    assert failure["partition_id"] == 0 and "'Elk' and a class 'elk', which differ" in failure["reason"]
    assert rounds(out)[1]["participants"] == [1, 2]


def test_class_that_arrives_under_a_name_like_a_known_one_leaves_out_its_node_alone(paths, tmp_path):
    out = run(tmp_path / "run", paths, before_task(1, lambda: draw(paths[1] / "task-10", "Cat", 3, digit=0)))
    assert [line["participants"] for line in rounds(out)] == [[0, 1, 2], [0, 2]]
    (failure,) = rounds(out)[1]["failures"]
    assert failure["partition_id"] == 1 and "a class 'cat' and a class 'Cat', which differ only by" in failure["reason"]
    assert read(out, "manifest.json")["class_names"] == ["ant", "bee", "cat", "dog"]


def test_reason_that_repeats_a_nodes_own_words_is_cut(paths, tmp_path):
    long = 39 * "long "
    asked = []

    def client(message: Message, context: Context) -> Message | None:
        reply = run_client(message, context)
        if message.metadata.message_type == MessageType.QUERY and context.node_config["partition-id"] == 1:
            asked.append(message)
            if len(asked) == 2:  # as the second task begins
                own = (HeldClass("task-10", f"{long}cat", 1, 0), HeldClass("task-10", f"{long}Cat", 1, 0))
                return Message(wire.hello_reply(replace(wire.read_hello(reply), own=own)), reply_to=message)
        return reply

    (failure,) = rounds(run(tmp_path / "run", paths, client))[1]["failures"]
    assert failure["reason"].startswith("sits the task out: the nodes name a class 'long ")
    assert len(failure["reason"]) <= 500


class Late(LocalGrid):
    """A grid whose node 102 is not there from the start."""

    there = False

    def get_node_ids(self):
        return [node for node in self.contexts if self.there or node != 102]


def test_run_that_goes_on_takes_in_at_the_next_task_a_node_that_comes_late(paths, tmp_path, monkeypatch):
    def client(message: Message, context: Context) -> Message | None:
        if message.metadata.group_id == "2" and local_grid.LocalGrid is not Late:
            raise Killed
        if message.metadata.message_type == MessageType.EVALUATE:
            monkeypatch.setattr(Late, "there", True)
        return run_client(message, context)

    settings = {"rounds_per_task": 2, "min_replies": 2, "node_timeout": 0.1}
    with pytest.raises(Killed):
        run(tmp_path / "run", paths, client, **settings)
    monkeypatch.setattr(local_grid, "LocalGrid", Late)
    monkeypatch.setattr(nodes, "_LOOK_SECONDS", 0.01)
    out = run(tmp_path / "run", paths, client, **settings, resume=True)
    assert [line["participants"] for line in rounds(out)] == [[0, 1, 2], [0, 1], [0, 2], [0, 2]]
    failure = {"partition_id": 2, "reason": "sits the task out: no node has come for it"}
    assert [line["failures"] for line in rounds(out)] == [[], [failure], [], []]


def test_examples_that_come_during_a_task_are_trained_on_at_once(paths, tmp_path):
    def client(message: Message, context: Context) -> Message | None:
        if message.metadata.message_type == MessageType.TRAIN and context.node_config["partition-id"] == 0:
            draw(paths[0] / "task-2", "ant", 12)
        return run_client(message, context)

    assert rounds(run(tmp_path / "run", paths, client))[0]["failures"] == []


def test_more_than_twice_the_examples_that_a_node_said_it_has_are_refused(paths, tmp_path):
    def boasts(message: Message, context: Context) -> Message | None:
        reply = run_client(message, context)
        if message.metadata.message_type == MessageType.TRAIN and context.node_config["partition-id"] == 0:
            with opened(reply.content) as tensors:
                tensors["counts/examples"] = 3 * tensors["counts/examples"]
            reply.content[METRICS]["num-examples"] *= 3
        return reply

    (failure,) = rounds(run(tmp_path / "run", paths, boasts, num_tasks=2))[0]["failures"]
    reason = "refused: speaks of other examples than the client said it holds of this task"
    assert failure == {"partition_id": 0, "reason": reason}


WRONG: dict[str, tuple[Callable[[list[Path]], None], str]] = {
    "a name that differs by case on another node": (
        lambda paths: draw(paths[1] / "task-2", "Ant", 3, digit=0),
        "'Ant' and a class 'ant', which differ only by case, space or",
    ),
    "a name that differs by a space on one node": (
        lambda paths: draw(paths[0] / "task-2", "ant ", 3, digit=0),
        "'ant' and a class 'ant ', which differ only by case, space or",
    ),
    "a corrupt file": (
        lambda paths: (paths[1] / "task-2" / "bee" / "x.png").write_bytes(b"x"),
        "x.png (task-2, bee) cannot be decoded",
    ),
    "more task folders than tasks": (
        lambda paths: draw(paths[1] / "task-11", "fox", 3),
        "the nodes hold 3 task folders (task-2, task-10, task-11), num-tasks is 2",
    ),
    "a class beside the tasks of a node": (
        lambda paths: draw(paths[1], "fox", 3),
        "holds task folders (task-2) beside classes (fox)",
    ),
    "another layout than the other nodes": (
        lambda paths: (shutil.rmtree(paths[1] / "task-2"), draw(paths[1], "fox", 3))[1],
        "some nodes have one folder a class, others one folder a task",
    ),
    "no folder": (lambda paths: shutil.rmtree(paths[1]), "there is no file or folder"),
    "texts": (
        lambda paths: (paths[1] / "task-2" / "notes.txt").write_text("one\ntwo\n"),
        "holds images and texts",
    ),
}


# Who is odd: the second node, but where the first one differs from both others.
SPOILT = {"a name that differs by a space on one node": 0}


@pytest.mark.parametrize("what", WRONG)
def test_node_is_refused_by_name_before_the_first_round_with(paths, tmp_path, caplog, what):
    spoil, message = WRONG[what]
    spoil(paths)
    odd = SPOILT.get(what, 1)
    out = run(tmp_path / "run", paths, min_replies=1)
    (failure,) = rounds(out)[0]["failures"]
    assert failure["partition_id"] == odd and message in failure["reason"]
    named = rf"node 10{odd}( \(partition {odd}\))? cannot take part|partition {odd} \(node 10{odd}\) sits the task out"
    assert re.search(rf"({named}): .*{re.escape(message)}", caplog.text)
    assert rounds(out)[0]["participants"] == [p for p in range(3) if p != odd]


def spoil_three(folder: Path) -> None:
    (folder / "task-2" / "bee" / "x.png").write_bytes(b"x")
    (folder / "task-2" / "bee" / "y.png").touch()
    PIL.Image.new("I;16", (8, 8)).save(folder / "task-2" / "bee" / "z.png")


def test_refused_node_names_all_its_bad_files_at_once_and_itself(paths, tmp_path, caplog):
    spoil_three(paths[1])

    def with_name(message: Message, context: Context) -> Message | None:
        context.node_config["name"] = f"site{context.node_config['partition-id']}"
        return run_client(message, context)

    out = run(tmp_path / "run", paths, with_name)
    (failure,) = rounds(out)[0]["failures"]
    assert failure["partition_id"] == 1 and "3 files cannot be used: x.png (task-2, bee) cannot be" in failure["reason"]
    assert (
        "; y.png (task-2, bee) holds no byte; replace or remove it; z.png (task-2, bee) has image" in failure["reason"]
    )
    assert "site1 (partition 1) cannot take part: 3 files" in caplog.text and "node 101" not in caplog.text
    assert str(tmp_path) not in failure["reason"]


def test_bad_files_are_left_out_counted_and_named_in_the_report_where_that_is_asked_for(paths, tmp_path):
    clean = run(tmp_path / "clean", paths)
    spoil_three(paths[1])
    out = run(tmp_path / "run", paths, bad_files="skip")
    named = "x.png (task-2, bee); y.png (task-2, bee); z.png (task-2, bee)"
    remark = f"partition 1: 3 files are left out, which cannot be read: {named}"
    assert remark in read(out, "manifest.json")["remarks"]
    assert f"About the data: {remark}." in read_run(out).notes
    assert [line["failures"] for line in rounds(out)] == [[], []]
    assert read(out, "metrics.json")["faa"] == read(clean, "metrics.json")["faa"]


def test_class_without_test_images_is_named_and_counts_as_nothing(tmp_path):
    path = tmp_path / "site0"
    for place, name in enumerate((*NAMES, "gnu")):  # of `gnu` two pictures, which are both trained on
        draw(path, name, 2 if name == "gnu" else 12, digit=place)
    out = run(tmp_path / "run", [path], num_clients=1, num_tasks=3, head="ridge")
    held = {one.name: one for one in OwnReader("", "", 0.3, 0).read(str(path)).held}
    assert held["gnu"].num_test == 0 and all(held[name].num_test for name in NAMES)
    assert read(out, "manifest.json")["remarks"] == ["class gnu has no test example, and no part in any accuracy"]
    tasks = read(out, "manifest.json")["tasks"]
    assert [len(task) for task in tasks] == [3, 2, 2] and tasks[2] == [5, 6]  # fox and gnu
    tested = [sum(held[(*NAMES, "gnu")[row]].num_test for row in task) for task in tasks]
    accuracies, seen = read(out, "metrics.json")["accuracy_matrix"][2], read(out, "metrics.json")["accuracy_seen"][2]
    hits = [accuracy * number for accuracy, number in zip(accuracies, tested, strict=True)]
    assert all(abs(number - round(number)) < 1e-9 for number in hits)  # of whole examples, none of them gnu's
    assert seen == pytest.approx(sum(hits) / sum(tested))


def test_node_that_was_refused_and_is_mended_takes_part_in_the_next_task(paths, tmp_path, caplog):
    (broken := paths[0] / "task-2" / "bee" / "x.png").write_bytes(b"x")
    out = run(tmp_path / "run", paths, before_task(1, broken.unlink))
    assert [line["participants"] for line in rounds(out)] == [[1, 2], [0, 2]]
    assert [[f["partition_id"] for f in line["failures"]] for line in rounds(out)] == [[0], []]
    assert "node 100 is back with partition 0" in caplog.text


@pytest.mark.parametrize("what", WRONG)
def test_run_that_such_a_node_leaves_with_too_few_fails_by_name(paths, tmp_path, what):
    spoil, message = WRONG[what]
    spoil(paths)
    with pytest.raises((RunFailed, DataError), match=re.escape(message)):
        run(tmp_path / "run", paths, min_replies=3)
    assert message.split("'")[0] in read(tmp_path / "run", "status.json")["message"]


def test_odd_one_is_who_does_not_go_with_most_and_not_who_comes_last(paths, tmp_path):
    for path in (paths[1], paths[2]):
        draw(path / "task-2", "bee", 6)
        (path / "task-2" / "bee").rename(path / "task-2" / "Bee")
    out = run(tmp_path / "run", paths)
    (failure,) = rounds(out)[0]["failures"]
    assert failure["partition_id"] == 0 and "a class 'Bee' and a class 'bee'" in failure["reason"]
    assert rounds(out)[0]["participants"] == [1, 2]


def test_nodes_that_hold_too_few_classes_together_are_none_of_them_odd(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        draw(path, "ant", 5)
    with pytest.raises(DataError, match="the nodes hold 1 classes, too few for num-tasks 2; lower num-tasks"):
        run(tmp_path / "run", paths)


def test_node_that_names_no_folder_is_told_how_to(paths, tmp_path):
    with pytest.raises(RunFailed, match="this node has no data-path; start it with fedtalora supernode --data-path"):
        run(tmp_path / "run", [])


def test_simulated_nodes_find_their_folders_by_their_number(paths, tmp_path):
    out = run(tmp_path / "run", [], data_path=str(tmp_path / "site{partition-id}"))
    assert read(out, "manifest.json")["class_names"] == ["ant", "bee", "cat", "dog"]


def test_empty_folders_are_named_and_a_node_with_nothing_else_sits_out(paths, tmp_path):
    shutil.rmtree(paths[1] / "task-2")
    (paths[0] / "task-10" / "gnu").mkdir()
    out = run(tmp_path / "run", paths)
    assert read(out, "manifest.json")["remarks"] == [
        "partition 0: task-10/gnu is empty",
        "partition 1: no example in data-path",
    ]
    assert [line["participants"] for line in rounds(out)] == [[0, 2], [0, 2]]


def test_texts_in_files_of_lines_are_learnt_by_the_name_of_the_file(tmp_path, small_bert, monkeypatch):
    monkeypatch.setenv("FEDTALORA_DATA", str(small_bert))  # else the nodes would not open the encoder
    paths = [tmp_path / f"site{node}" for node in range(3)]
    for path, names in zip(paths, (("lamp", "door"), ("door",), ("oven", "lamp")), strict=True):
        path.mkdir()
        for name in names:
            lines = [f"{verb} the {name} {path.name}" for verb in ("open", "close", "clean", "sell", "find", "lose")]
            (path / f"{name}.txt").write_text("\n".join(lines))
    out = run(tmp_path / "run", paths, backbone=f"hf:{small_bert}", lora_targets="attn", head="ridge")
    assert read(out, "manifest.json")["class_names"] == ["door", "lamp", "oven"]
    assert read(out, "manifest.json")["image_side"] is None
    assert read(out, "metrics.json")["faa"] is not None


def test_run_can_be_opened_and_names_its_classes(paths, tmp_path):
    out = run(tmp_path / "run", paths, head="ridge")
    trained = open_trained(out, device="cpu")
    assert trained.class_names == ("ant", "bee", "cat", "dog")
    picture = next((paths[0] / "task-2" / "ant").iterdir())
    (found,) = predict(trained, read_items([str(picture)], modality="image", stdin=io.BytesIO()), top=1)
    assert found.ranking[0][0] == "ant"


@pytest.mark.parametrize("new_id", [102, 202])
def test_data_that_grew_while_a_node_was_away_are_taken_from_the_same_node_alone(
    paths, tmp_path, border, monkeypatch, caplog, new_id
):
    monkeypatch.setattr(border, "new_id", new_id)

    def client(message: Message, context: Context) -> Message | None:
        if message.metadata.message_type == MessageType.EVALUATE and context.node_id == 102:
            draw(paths[2] / "task-10", "cat", 12)
        return run_client(message, context)

    out = run(tmp_path / "run", paths, client, min_replies=1, node_timeout=0.3)
    other = "it holds other data than partition 2 showed last, and without a node key nothing else says that it is"
    assert (f"node 202 (partition 2) cannot take part: {other}" in caplog.text) == (new_id == 202)
    assert (2 in rounds(out)[1]["participants"]) == (new_id == 102)


def test_a_private_run_tells_hits_with_noise_and_no_digest_by_which_a_guess_can_be_checked(
    paths, tmp_path, monkeypatch
):
    monkeypatch.setenv("FEDTALORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(handlers, "secret_normal", lambda size: torch.full((size,), 100.0))  # hits alone draw by it
    out = run(tmp_path / "run", paths, dp_epsilon=8.0)
    assert not any(line["failures"] for line in rounds(out)) and read(out, "metrics.json")["faa"] == 1
    steps = {
        path.stem.partition("-")[2]: [row[2:] for row in json.loads(path.read_text())]
        for path in (tmp_path / "cache" / "privacy").glob("*-0-*.json")
    }
    assert steps.keys() == {"0-train-0", "0-train-1", "0-held-out-0", "0-held-out-1"}
    assert steps["0-held-out-0"] == [[1.0, 1], [1.0, 1]] and steps["0-held-out-1"] == [[1.0, 1]]
    plain = OwnReader("", "", TINY["test-fraction"], 0).read(str(paths[0])).digest
    assert plain not in read(out, "manifest.json")["partition_hashes"]
