"""Whole runs of the real ServerApp and ClientApp in this process, on a few digits."""

import json
import logging.handlers
import re
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType
from local_grid import defaults, run_server, tiny_run
from PIL import Image
from sklearn import metrics as sklearn_metrics
from tensors import opened, packed

import fedtalora_flwr
from client_app.app import app
from fedtalora_flwr import aggregation, wire
from fedtalora_flwr.aggregation import GlobalState, resolve
from fedtalora_flwr.client import handlers, redact
from fedtalora_flwr.client.versions import _version_store, version_store
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.data import DataError
from fedtalora_flwr.inference.model import open_trained
from fedtalora_flwr.model.backbones import BackboneError, vit_mini
from fedtalora_flwr.model.session import test_examples as held_out
from fedtalora_flwr.run_folder import checkpoint
from fedtalora_flwr.run_folder.writer import FolderTaken, RunFolder
from fedtalora_flwr.server.failures import RunFailed, Tally
from fedtalora_flwr.server.roster import Roster
from fedtalora_flwr.wire import ARRAYS, HELLO, METRICS, WireError

TINY = {
    "num-tasks": 2,
    "max-per-class": 6,
    "num-clients": 3,
    "rounds-per-task": 2,
    "test-fraction": 0.02,
    "lora-blocks": "last:1",
    "lora-targets": "proj",
    "batch-size": 8,
    "device": "cpu",
    "partition": "iid",
    "head": "linear",
    "learning-rate": 0.002,
    "later-learning-rate": 1.0,
}
SHORT = {"num-tasks": 5, "stop-after-task": 1}  # two rounds on two classes
LAYER = "blocks.5.attn.proj"
DEADLINE = "error 3: no reply in time"

ClientCall = Callable[[Message, Context], Message | None]
run_client: ClientCall = app


class Killed(BaseException):
    """The process ends here."""


def run(out: Path, client: ClientCall = run_client, num_nodes: int | None = None, **changes: Any) -> Path:
    settings = {key.replace("_", "-"): value for key, value in changes.items()}
    run_server(defaults() | TINY | {"out": str(out)} | settings, client, num_nodes)
    return out


def read(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / name).read_text())


def rounds(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def result(out: Path) -> dict[str, Any]:
    """All that a run leaves, less its times and the bytes sent, which depend on what clients still hold."""
    point = checkpoint.load(out / "checkpoint")
    tensors = next((out / "checkpoint").glob("*.safetensors")).read_bytes()
    aside = {"seconds", "wall_seconds", "bytes_down", "bytes_down_total", "crc32"}
    return {
        "metrics": {key: value for key, value in read(out, "metrics.json").items() if key not in aside},
        "rounds": [{key: value for key, value in line.items() if key not in aside} for line in rounds(out)],
        "tensors": tensors,
        "facts": (point.server_round, point.state.version, point.bytes_up, point.matrix.to_json()),
    }


def partition_of(context: Context) -> int:
    return int(context.node_config["partition-id"])


def round_of(message: Message) -> int:
    return int(message.metadata.group_id or 0)


def meddle(
    change: Callable[[Message], Message | None], *, partition: int = 1, kind: str = "train", server_round: int = 1
):
    """A client that changes one partition's reply to one message."""

    def client(message: Message, context: Context) -> Message | None:
        reply = run_client(message, context)
        here = (message.metadata.message_type, partition_of(context), round_of(message))
        return change(reply) if here == (kind, partition, server_round) else reply

    return client


def edit(key: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Message], Message]:
    def edited(reply: Message) -> Message:
        with opened(reply.content) as tensors:
            tensors[key] = change(tensors[key])
        return reply

    return edited


def claim(key: str, value: float) -> Callable[[Message], Message]:
    def claimed(reply: Message) -> Message:
        reply.content[METRICS][key] = value
        return reply

    return claimed


def lose(record: str) -> Callable[[Message], Message]:
    def lost(reply: Message) -> Message:
        del reply.content[record]
        return reply

    return lost


def fill(value: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: np.full_like(array, value)


def fail(reply: Message) -> Message:
    raise RuntimeError("the disk is full")


def killed_at(server_round: int, partition: int = 1) -> ClientCall:
    def client(message: Message, context: Context) -> Message | None:
        if (round_of(message), partition_of(context)) == (server_round, partition):
            raise Killed
        return run_client(message, context)

    return client


@pytest.fixture(autouse=True, scope="module")
def _backbone_is_built_once():
    """Every run has settings of its own, hence a model of its own; building one takes longer than the run."""
    built = vit_mini.create()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vit_mini, "create", lambda: deepcopy(built))
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("undisturbed") / "run", verify=True)


def test_run_leaves_the_files_of_the_contract(undisturbed):
    names = {path.name for path in undisturbed.iterdir()}
    assert names == {"config.json", "manifest.json", "rounds.jsonl", "metrics.json", "status.json", "checkpoint"}
    config = read(undisturbed, "config.json")
    assert config == defaults() | TINY | {"out": str(undisturbed), "verify": True}


def test_metrics_hold_what_the_contract_names(undisturbed):
    metrics = read(undisturbed, "metrics.json")
    assert set(metrics) == {
        *("accuracy_matrix", "accuracy_seen", "faa", "aia", "forgetting", "backward_transfer"),
        *("bytes_up_total", "bytes_down_total", "wall_seconds", "num_rounds", "evaluation"),
    }
    assert metrics["num_rounds"] == 4
    (first, empty), (earlier, later) = metrics["accuracy_matrix"]
    assert empty is None and all(0 <= a <= 1 for a in (first, earlier, later))
    assert metrics["accuracy_seen"][1] == metrics["faa"]


def test_figures_by_class_are_those_of_the_model_that_the_run_came_to(undisturbed):
    found, manifest = read(undisturbed, "metrics.json")["evaluation"], read(undisturbed, "manifest.json")
    trained = open_trained(undisturbed, device="cpu")
    tests = [held_out(trained.config, task_id=task_id) for task_id in range(2)]
    scores = trained.logits(torch.cat([examples.inputs for examples in tests]))
    sure, said = trained.head.probabilities(scores).max(1)
    labels = torch.cat([examples.labels for examples in tests])
    assert trained.classes == tuple(range(10))  # a column is its class
    wanted = sklearn_metrics.confusion_matrix(labels, said, labels=range(10))
    assert found["confusion"] == wanted.tolist() and np.trace(wanted) < wanted.sum()
    assert found["accuracy"] == read(undisturbed, "metrics.json")["faa"]
    assert found["macro_f1"] == pytest.approx(sklearn_metrics.f1_score(labels, said, average="macro"))
    assert found["balanced_accuracy"] == pytest.approx(sklearn_metrics.balanced_accuracy_score(labels, said))
    in_bins = sum(one["confidence"] * one["num_examples"] for one in found["calibration"])
    assert in_bins == pytest.approx(float(sure.sum()), rel=1e-5)
    recall = wanted.diagonal() / wanted.sum(1)
    for client, counts in zip(found["clients"], manifest["class_counts"], strict=True):
        assert client["accuracy"] == pytest.approx(np.average(recall, weights=counts))


def test_each_round_has_a_line_with_what_the_contract_names(undisturbed):
    lines = rounds(undisturbed)
    assert [(line["server_round"], line["task_id"]) for line in lines] == [(1, 0), (2, 0), (3, 1), (4, 1)]
    for line in lines:
        assert set(line) == {
            *("server_round", "task_id", "participants", "failures", "bytes_up", "bytes_down", "seconds"),
            *("mean_loss", "residual_norm", "exactness_error", "accuracy_seen", "crc32"),
        }
        assert set(line["seconds"]) == {"wait", "aggregate", "evaluate", "total"}
        assert line["participants"] == [0, 1, 2] and line["failures"] == []
    assert lines[-1]["mean_loss"] < lines[-2]["mean_loss"]
    assert sum(line["bytes_up"] for line in lines) == read(undisturbed, "metrics.json")["bytes_up_total"]


def test_manifest_says_what_ran_on_which_data(undisturbed):
    manifest = read(undisturbed, "manifest.json")
    assert manifest["fedtalora_version"] == fedtalora_flwr.__version__
    assert {"python", "torch", "flwr"} <= set(manifest["versions"])
    assert sorted(manifest["class_order"]) == list(range(10))
    assert (manifest["image_side"], manifest["num_rounds"]) == (8, 4)
    assert [c for task in manifest["tasks"] for c in task] == manifest["class_order"]
    assert len(set(manifest["partition_hashes"])) == 3
    assert np.sum(manifest["class_counts"], axis=0).tolist() == [6] * 10
    assert manifest["adapted_modules"] == {LAYER: [192, 192]}
    assert manifest["parameters"]["lora"] == 2 * 4 * 192


def test_status_of_a_finished_run_says_done(undisturbed):
    status = read(undisturbed, "status.json")
    assert (status["phase"], status["rounds_done"], status["num_rounds"]) == ("done", 4, 4)


def test_verified_run_is_exact_in_every_round_and_its_residual_grows_from_zero(undisturbed):
    lines = rounds(undisturbed)
    assert max(line["exactness_error"] for line in lines) < 1e-6
    assert lines[0]["residual_norm"] > 0 or lines[1]["residual_norm"] > 0


def test_same_settings_give_the_same_bits(undisturbed, tmp_path):
    assert result(run(tmp_path / "again", verify=True)) == result(undisturbed)


@pytest.mark.parametrize("server_round", [2, 3])
def test_run_killed_within_a_round_goes_on_to_the_same_bits(undisturbed, tmp_path, server_round):
    with pytest.raises(Killed):
        run(tmp_path, killed_at(server_round), verify=True)
    assert not (tmp_path / "metrics.json").exists()
    run(tmp_path, verify=True, resume=True)
    assert result(tmp_path) == result(undisturbed)


def test_run_killed_between_log_and_checkpoint_repeats_that_round_and_logs_it_once(undisturbed, tmp_path, monkeypatch):
    save = checkpoint.save

    def save_or_die(folder, point, **options):
        if point.server_round == 3:
            raise Killed
        save(folder, point, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_or_die)
        with pytest.raises(Killed):
            run(tmp_path, verify=True)
    assert len(rounds(tmp_path)) == 3
    with (tmp_path / "rounds.jsonl").open("a") as file:
        file.write('{"server_round": 4, "task_')  # a line that the kill cut short
    run(tmp_path, verify=True, resume=True)
    assert result(tmp_path) == result(undisturbed)


def test_finished_run_that_is_resumed_plays_no_round_and_gives_the_same_result(undisturbed, tmp_path):
    run(tmp_path, verify=True)

    def client(message, context):
        assert message.metadata.message_type == MessageType.QUERY
        return run_client(message, context)

    run(tmp_path, client, verify=True, resume=True)
    assert result(tmp_path) == result(undisturbed)


def test_resume_on_other_data_is_refused(tmp_path):
    folder = run(tmp_path, **SHORT, rounds_per_task=1)
    pointer = folder / "checkpoint" / "latest.json"
    facts = json.loads(pointer.read_text())
    facts["partition_hashes"][1] = "another"
    del facts["crc32"]  # as an earlier version wrote it
    pointer.write_text(json.dumps(facts))
    with pytest.raises(RunFailed, match="was run on other data or another partition; it cannot be resumed"):
        run(tmp_path, **SHORT, rounds_per_task=1, resume=True)


def test_resume_with_other_settings_is_refused_naming_them(tmp_path):
    run(tmp_path, **SHORT, rounds_per_task=1)
    with pytest.raises(ValueError, match=r"other settings \(learning-rate 0.002 -> 0.5\)"):
        run(tmp_path, **SHORT, rounds_per_task=1, resume=True, learning_rate=0.5)


def test_run_from_before_a_setting_came_goes_on_unless_the_setting_says_something_new(tmp_path):
    folder = run(tmp_path, **SHORT, rounds_per_task=1)
    settings = read(folder, "config.json")
    del settings["outlier-limit"]
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"other settings \(outlier-limit .* -> 3.5\)"):
        run(tmp_path, **SHORT, rounds_per_task=1, resume=True, outlier_limit=3.5)
    run(tmp_path, **SHORT, rounds_per_task=1, resume=True)
    assert rounds(folder)[-1]["server_round"] == len(rounds(folder))


def test_a_model_that_cannot_be_is_refused_before_any_data_are_read(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr("fedtalora_flwr.model.session.open_data", lambda *_: read.append("data"))
    with pytest.raises(BackboneError, match="set image-size to 84 or 98"):
        run(tmp_path / "run", backbone="timm:vit_small_patch14_dinov2", image_size=85)
    assert read == []


def test_a_corrupt_test_image_is_found_before_the_first_round(tmp_path):
    for split, count in (("train", 6), ("test", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (9, 9), (20 * index, 0, 0)).save(folder / f"{index}.png")
    (tmp_path / "pets" / "test" / "dog" / "1.png").write_bytes(b"no picture")
    asked: list[str] = []

    def client(message: Message, context: Context) -> Message | None:
        asked.append(message.metadata.message_type)
        return run_client(message, context)

    data = {"dataset": "imagefolder", "data-path": str(tmp_path / "pets"), "num-tasks": 1}
    with pytest.raises(DataError, match=r"1\.png"):
        run(tmp_path / "run", client, **data)
    assert MessageType.TRAIN not in asked
    assert "1.png" in read(tmp_path / "run", "status.json")["message"]


def test_resume_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="holds no checkpoint"):
        run(tmp_path, resume=True)


def test_fresh_run_in_the_folder_of_another_is_refused_and_leaves_it_as_it_was(undisturbed):
    before = {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}
    with pytest.raises(RunFailed, match="holds a run already; choose another out, or go on with it by resume=true"):
        run(undisturbed)
    assert {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()} == before


class Witness:
    """Passes messages on, and keeps states, good updates and bytes by round."""

    def __init__(self, client: ClientCall, bad: tuple[int, int] | None = None) -> None:
        self.client, self.bad = client, bad
        self.states: dict[int, GlobalState] = {}
        self.updates = defaultdict(list)
        self.bytes_up: dict[int, int] = defaultdict(int)
        self.bytes_down: dict[int, int] = defaultdict(int)
        self.asked: dict[int, list[int]] = defaultdict(list)

    def __call__(self, message: Message, context: Context) -> Message | None:
        now, kind = round_of(message), message.metadata.message_type
        if kind == MessageType.QUERY:
            return self.client(message, context)
        self.bytes_down[now] += wire.message_bytes([message])
        self.asked[now].append(partition_of(context))
        if kind == MessageType.TRAIN:
            state, patch, _ = wire.read_state(message)
            config = RunConfig.parse(context.run_config)
            self.states[now] = replace(state, residual=version_store(config).reach(patch).residual)
        reply = self.client(message, context)
        if reply is not None:
            self.bytes_up[now] += wire.message_bytes([reply])
            if kind == MessageType.TRAIN and self.bad != (now, partition_of(context)):
                self.updates[now].append(wire.read_update(reply, like=self.states[now])[0])
        return reply


BAD_CLIENTS = {
    "raises": (fail, r"error 2: .*the disk is full"),
    "returns nothing": (lambda reply: None, DEADLINE),
    "returns NaN in a factor": (edit(f"lora_B/{LAYER}", fill(np.nan)), f"refused: {LAYER}.lora_B holds a number that"),
    "returns infinity in the head": (edit("head/weight", fill(np.inf)), "refused: head weight holds a number that"),
    "returns numbers whose product overflows": (edit(f"lora_B/{LAYER}", fill(3e38)), "is too large for float32"),
    "returns half precision": (
        edit("head/bias", lambda a: a.astype(np.float16)),
        "refused: head bias holds torch.float16",
    ),
    "returns another shape": (edit(f"lora_A/{LAYER}", lambda a: a[:, :-1]), f"refused: {LAYER}: lora_A .* do not fit"),
    "returns no arrays": (lose(ARRAYS), "refused: reply cannot be read: KeyError"),
    "returns no numbers": (lose(METRICS), "refused: reply cannot be read: KeyError"),
    "returns counts of more than it trained on": (
        edit("counts/examples", lambda a: a + 1),
        "refused: class counts do not",
    ),
    "returns an infinite number of examples": (claim("num-examples", float("inf")), "refused: reply cannot be read"),
    "speaks for another partition": (claim("partition-id", 2), "refused: speaks for partition 2, holds 1"),
    "trained on another version": (claim("base-version", 7), "refused: trained on version 7, the server is at 0"),
}


@pytest.mark.parametrize("name", BAD_CLIENTS)
def test_round_goes_on_without_a_client_that(name, tmp_path):
    change, reason = BAD_CLIENTS[name]
    witness = Witness(meddle(change), bad=(1, 1))
    run(tmp_path, witness, **SHORT)
    first, second = rounds(tmp_path)
    assert first["participants"] == second["participants"] == [0, 1, 2]
    (failure,) = first["failures"]
    assert failure["partition_id"] == 1
    assert re.search(reason, failure["reason"]), failure["reason"]
    assert second["failures"] == []
    assert [update.partition_id for update in witness.updates[1]] == [0, 2]
    wanted, got = resolve("fedtalora").aggregate(witness.states[1], witness.updates[1]), witness.states[2]
    assert got.version == 1
    assert torch.equal(got.residual[LAYER], wanted.residual[LAYER])
    assert torch.equal(got.adapters[LAYER].lora_A, wanted.adapters[LAYER].lora_A)
    assert torch.equal(got.adapters[LAYER].lora_B, wanted.adapters[LAYER].lora_B)
    assert all(torch.equal(got.head[key], wanted.head[key]) for key in wanted.head)


def test_a_long_reason_of_a_client_is_cut_and_stays_on_one_line(tmp_path):
    def client(message, context):
        if (round_of(message), partition_of(context)) == (1, 1):
            raise RuntimeError("word\n" * 100_000)
        return run_client(message, context)

    run(tmp_path, client, **SHORT)
    (failure,) = rounds(tmp_path)[0]["failures"]
    assert len(failure["reason"]) <= 500 and "\n" not in failure["reason"]


def test_every_message_expires_with_its_round_so_that_a_slow_client_finds_no_stale_ones(tmp_path):
    lives: list[float] = []

    def client(message, context):
        lives.append(message.metadata.ttl)
        return run_client(message, context)

    run(tmp_path, client, **SHORT, head="ridge", round_timeout=7.0)
    assert set(lives) == {7.0}


def test_too_few_good_replies_fail_the_run_with_a_message_that_names_everyone(tmp_path):
    def client(message, context):
        partition, reply = partition_of(context), run_client(message, context)
        if round_of(message) != 2:
            return reply
        if partition == 2:
            return edit("head/weight", fill(np.nan))(reply)
        return reply if partition == 0 else None

    with pytest.raises(RunFailed) as failed:
        run(tmp_path, client, **SHORT, min_replies=2)
    message = str(failed.value)
    assert "round 2 has 1 good replies, min-replies is 2" in message
    assert f"partition 1: {DEADLINE}" in message
    assert "partition 2: refused: head weight holds a number that is not finite" in message
    assert not (tmp_path / "metrics.json").exists()
    status = read(tmp_path, "status.json")
    assert (status["phase"], status["message"]) == ("failed", message)
    assert len(rounds(tmp_path)) == 1


@pytest.mark.parametrize(("num_nodes", "text"), [(2, "but 2 SuperNodes"), (4, "but 4 SuperNodes")])
def test_wrong_number_of_nodes_is_an_error_that_names_the_option(tmp_path, num_nodes, text):
    with pytest.raises(RunFailed, match=f'num-clients is 3, {text} .*--federation-config "num-supernodes=3"'):
        run(tmp_path, num_nodes=num_nodes, node_timeout=0.1)
    assert read(tmp_path, "status.json")["phase"] == "failed"


def with_hello(**changes: Any) -> Callable[[Message], Message]:
    """Change what a node says of itself."""

    def changed(reply: Message) -> Message:
        for key, value in changes.items():
            reply.content[HELLO][key.replace("_", "-")] = value
        return reply

    return changed


def posing(message: Message, context: Context) -> Message | None:
    """A client of which partition 1 says that it is partition 0."""
    if (message.metadata.message_type, partition_of(context)) == ("query", 1):
        context = replace(context, node_config={**context.node_config, "partition-id": 0})
    return run_client(message, context)


def oddly(change: Callable[[Message], Message | None]) -> ClientCall:
    return meddle(change, kind="query", server_round=0)


ODD: dict[str, tuple[ClientCall, str]] = {
    "another version": (oddly(with_hello(library="9.9")), "the client runs fedtalora 9.9, this side"),
    "another number of classes": (
        oddly(edit("counts/class", lambda counts: counts[:-1])),
        "it knows 9 classes, the server 10; both must read the same data set",
    ),
    "other data": (oddly(with_hello(partition_hash="other")), "it holds other data than partition 1 of this run"),
    "a thousand times its examples": (
        oddly(edit("counts/class", lambda counts: 1000 * counts)),
        "it holds other data than partition 1 of this run",
    ),
    "another federation": (oddly(with_hello(num_partitions=7)), "it says num-partitions 7, num-clients is 3"),
    "no such partition": (oddly(with_hello(partition_id=5)), "partition-id 5 is not among the 3 of num-clients"),
    "the partition of another": (
        posing,
        "partition 0 is held by node 100, which is connected; give every node its own partition-id in its node config",
    ),
    "a broken hello": (oddly(lose(HELLO)), "the first reply lacks 'hello'"),
    "a hello of 48 MB": (
        oddly(edit("counts/class", lambda counts: np.zeros(6_000_000, counts.dtype))),
        "its first reply holds 48.0 MB, at most 4.2 MB can be of use",
    ),
    "a record that nobody asked for": (
        oddly(lambda reply: reply.content.update({"more": ConfigRecord({"x": 1})}) or reply),
        "its first reply holds a record 'more'",
    ),
    "an error": (oddly(fail), "the disk is full"),
    "no answer": (oddly(lambda reply: None), "no reply in time"),
}


@pytest.mark.usefixtures("log_is_caught")
@pytest.mark.parametrize("what", ODD)
def test_one_odd_node_is_refused_by_name_and_the_run_begins_with_the_others(tmp_path, caplog, what):
    client, reason = ODD[what]
    logging.getLogger("fedtalora").propagate = True
    run(tmp_path, client, **SHORT, min_replies=2, node_timeout=0.1)
    assert re.search(rf"node 101( \(partition \d\))? cannot take part: .*{re.escape(reason)}", caplog.text)
    for line in rounds(tmp_path):
        assert line["participants"] == [0, 2]
        (failure,) = line["failures"]
        assert failure["partition_id"] == 1
        assert reason in failure["reason"] or what in ("no such partition", "the partition of another")
    assert len(set(read(tmp_path, "manifest.json")["partition_hashes"])) == 3


@pytest.mark.parametrize("what", ODD)
def test_run_that_an_odd_node_leaves_with_too_few_fails_before_it_begins_by_name(tmp_path, what):
    client, reason = ODD[what]
    with pytest.raises(RunFailed, match=rf"node 101.* cannot take part: .*{re.escape(reason)}"):
        run(tmp_path, client, min_replies=3, node_timeout=0.1)
    assert rounds(tmp_path) == [] and reason in read(tmp_path, "status.json")["message"]


def test_partition_without_data_of_a_task_sits_it_out(tmp_path):
    witness = Witness(run_client)
    run(tmp_path, witness, **SHORT, max_per_class=1)  # two examples for three partitions
    manifest = read(tmp_path, "manifest.json")
    held = [p for p, counts in enumerate(manifest["class_counts"]) if sum(counts[c] for c in manifest["tasks"][0])]
    assert len(held) == 2
    assert [line["participants"] for line in rounds(tmp_path)] == [held, held]
    assert sorted(witness.asked[1]) == held


def test_task_that_too_few_partitions_hold_fails_the_run_before_it_begins(tmp_path):
    with pytest.raises(RunFailed, match="task 0 is held by 2 partitions, min-replies is 3: lower min-replies"):
        run(tmp_path, **SHORT, max_per_class=1, min_replies=3)
    assert rounds(tmp_path) == []


def make_roster(**changes: Any) -> Roster:
    settings = {key.replace("_", "-"): value for key, value in changes.items()}
    config = RunConfig.parse(defaults() | {"num-clients": 100} | settings)
    roster = Roster(config, Tally())
    roster.holds_task = {0: list(range(0, 100, 2)), 1: [3, 5, 8]}
    return roster


def test_sample_is_seeded_and_drawn_among_the_holders_of_the_task():
    roster = make_roster(fraction_train=0.2)
    drawn = [roster.sample(server_round, 0) for server_round in range(1, 9)]
    assert drawn == [make_roster(fraction_train=0.2).sample(server_round, 0) for server_round in range(1, 9)]
    assert drawn != [make_roster(fraction_train=0.2, seed=1).sample(server_round, 0) for server_round in range(1, 9)]
    assert len({tuple(sample) for sample in drawn}) > 1
    for sample in drawn:
        assert len(sample) == 10 == len(set(sample))
        assert sample == sorted(sample) and set(sample) <= set(roster.holds_task[0])


@pytest.mark.parametrize(
    ("fraction", "task_id", "min_replies", "wanted"),
    [(1.0, 0, 1, 50), (0.14, 0, 1, 7), (0.01, 0, 1, 1), (0.01, 0, 4, 4), (0.5, 1, 1, 2), (0.5, 1, 5, 3)],
)
def test_sample_is_the_fraction_of_the_holders_and_at_least_min_replies(fraction, task_id, min_replies, wanted):
    roster = make_roster(fraction_train=fraction, min_replies=min_replies)
    assert len(roster.sample(1, task_id)) == wanted


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (DataError("cannot decode /secret/dir/x.jpg: broken"), "cannot decode x.jpg: broken"),
        (DataError("cannot decode '/secret/my dir/x.jpg'"), "x.jpg"),
        (DataError(r"cannot decode C:\secret\dir\x.jpg"), "cannot decode x.jpg"),
        (DataError("cannot decode /secret/dir, my/x.jpg: broken"), "cannot decode x.jpg: broken"),
        (DataError("cannot decode secret/dir/x.jpg (in secret/y.zip); replace it"), "x.jpg (in y.zip); replace it"),
        (ValueError("no number: 'a patient'"), "ValueError, see the node's log"),
        (FileNotFoundError(2, "No such file", "/secret/dir/x.jpg"), "FileNotFoundError, see the node's log"),
        (RuntimeError("a patient in /secret/dir/x.jpg"), "RuntimeError, see the node's log"),
        (UnicodeDecodeError("utf-8", b"secret dir", 0, 1, "bad"), "UnicodeDecodeError, see the node's log"),
        (WireError("this node has no partition-id"), "this node has no partition-id"),
    ],
)
def test_text_of_a_clients_error_travels_without_the_folders_in_it_and_is_whole_in_the_nodes_log(
    tmp_path, monkeypatch, error, wanted
):
    def broken(*arguments, **options):
        raise error

    monkeypatch.setattr(handlers, "fit", broken)
    kept = logging.handlers.BufferingHandler(capacity=100)
    monkeypatch.setattr(redact.log, "handlers", [kept])
    with pytest.raises(RunFailed) as failed:
        run(tmp_path, **SHORT, num_clients=1)
    left = [str(failed.value), read(tmp_path, "status.json")["message"]]
    for text in left:
        assert wanted in text
        assert not {"secret", "dir", "patient"} & set(re.findall(r"\w+", text))
    (logged,) = [record for record in kept.buffer if record.exc_info]
    assert logged.exc_info[1] is error


@pytest.mark.parametrize("rounds_per_task", [0, 1])
def test_ridge_head_learns_with_and_without_training_rounds(tmp_path, rounds_per_task):
    run(tmp_path, head="ridge", rounds_per_task=rounds_per_task, max_per_class=20)
    lines = rounds(tmp_path)
    assert [line["task_id"] for line in lines] == [0, 1]
    assert [line["participants"] for line in lines] == [[0, 1, 2]] * 2
    assert all((line["mean_loss"] is None) == (rounds_per_task == 0) for line in lines)
    assert all(line["bytes_up"] > 0 for line in lines)
    assert read(tmp_path, "metrics.json")["faa"] > 0.6


def test_a_ridge_run_reports_beside_its_own_what_the_linear_head_would_have_given(undisturbed, tmp_path):
    run(tmp_path, verify=True, head="ridge")
    linear, ridge = rounds(undisturbed), rounds(tmp_path)
    assert [line["accuracy_seen"] for line in linear] == [line.get("accuracy_seen_linear") for line in ridge]
    assert [line["mean_loss"] for line in linear] == [line["mean_loss"] for line in ridge]


def test_ridge_head_does_not_depend_on_the_partition(tmp_path):
    settings = {"head": "ridge", "rounds_per_task": 0, "max_per_class": 20}
    even = read(run(tmp_path / "even", **settings), "metrics.json")
    skewed = read(run(tmp_path / "skewed", **settings, partition="dirichlet", dirichlet_beta=0.1), "metrics.json")
    assert even["accuracy_matrix"] == skewed["accuracy_matrix"]


def test_bad_sums_are_refused_and_fail_the_run_where_too_few_are_left(tmp_path):
    client = meddle(edit("sums/root", fill(np.nan)), kind="train.sums")
    settings = {"head": "ridge", "rounds_per_task": 0, **SHORT}
    run(tmp_path / "two", client, **settings)
    (line,) = rounds(tmp_path / "two")
    assert line["failures"] == [{"partition_id": 1, "reason": "refused: sums hold a number that is not finite"}]
    with pytest.raises(RunFailed, match="round 1 has 2 good replies, min-replies is 3: partition 1: refused: sums"):
        run(tmp_path / "three", client, **settings, min_replies=3)


def test_client_that_can_keep_no_base_is_sent_it_once_more_in_every_exchange(tmp_path, monkeypatch):
    (tmp_path / "file").touch()

    def forgetful(message, context):
        if partition_of(context) != 2:
            return run_client(message, context)
        _version_store.cache_clear()  # as in a new process
        with monkeypatch.context() as patch:
            patch.setenv("FEDTALORA_CACHE", str(tmp_path / "file"))
            return run_client(message, context)

    run(tmp_path / "run", forgetful, **SHORT | {"head": "ridge", "rounds_per_task": 3})
    lines = rounds(tmp_path / "run")
    assert [line["failures"] for line in lines] == [[], [], []]
    assert [line.get("resent", []) for line in lines] == [[], [], [2]]  # to train and to sum


def test_a_client_cannot_claim_more_examples_than_it_said_it_holds(tmp_path):
    def boast(reply: Message) -> Message:
        reply = edit("counts/examples", lambda counts: 100 * counts)(reply)
        return claim("num-examples", 100 * reply.content[METRICS]["num-examples"])(reply)

    run(tmp_path, meddle(boast), **SHORT)
    reason = "refused: speaks of other examples than the client said it holds of this task"
    assert rounds(tmp_path)[0]["failures"] == [{"partition_id": 1, "reason": reason}]


def test_sums_over_other_examples_than_the_client_holds_are_refused(tmp_path):
    def relabel(moment):
        moment[:2, -1] += [1, -1]
        return moment

    run(tmp_path, meddle(edit("sums/moment", relabel), kind="train.sums", server_round=2), **SHORT, head="ridge")
    (failure,) = rounds(tmp_path)[1]["failures"]
    assert failure["partition_id"] == 1 and "other examples than the client said" in failure["reason"]


@pytest.mark.parametrize("head", ["linear", "ridge"])
def test_bytes_are_those_of_the_rounds_messages(tmp_path, head):
    witness = Witness(run_client)
    run(tmp_path, witness, **SHORT, head=head)
    lines, metrics = rounds(tmp_path), read(tmp_path, "metrics.json")
    for line in lines:
        assert line["bytes_up"] == witness.bytes_up[line["server_round"]] > 0
        assert line["bytes_down"] == witness.bytes_down[line["server_round"]] > 0
    assert metrics["bytes_up_total"] == sum(witness.bytes_up.values())
    assert metrics["bytes_down_total"] == sum(witness.bytes_down.values())


def test_stop_after_task_ends_the_run_there_and_leaves_the_rest_of_the_matrix_empty(tmp_path):
    run(tmp_path, num_tasks=5, stop_after_task=2, rounds_per_task=1)
    metrics = read(tmp_path, "metrics.json")
    assert metrics["num_rounds"] == len(rounds(tmp_path)) == 2
    assert [a is None for a in metrics["accuracy_seen"]] == [False, False, True, True, True]
    assert metrics["faa"] == metrics["accuracy_seen"][1]


def test_eval_every_evaluates_between_the_ends_of_tasks_and_changes_no_result(undisturbed, tmp_path):
    run(tmp_path, verify=True, eval_every=1)
    assert all(line["accuracy_seen"] is not None for line in rounds(tmp_path))
    assert [line["accuracy_seen"] is None for line in rounds(undisturbed)] == [True, False, True, False]
    assert result(tmp_path)["metrics"] == result(undisturbed)["metrics"]
    assert result(tmp_path)["tensors"] == result(undisturbed)["tensors"]


def test_linear_probe_without_lora_runs_and_has_no_residual(tmp_path):
    run(tmp_path, lora_blocks="none", verify=True)
    lines = rounds(tmp_path)
    assert [line["residual_norm"] for line in lines] == [0.0] * 4
    assert [line["exactness_error"] for line in lines] == [0.0] * 4
    assert lines[1]["mean_loss"] < lines[0]["mean_loss"]
    assert read(tmp_path, "manifest.json")["parameters"]["lora"] == 0


@pytest.mark.parametrize("residual", ["off", "replace"])
def test_ablations_of_the_residual_run_and_are_seen_to_be_inexact(tmp_path, residual):
    run(tmp_path, residual=residual, verify=True)
    assert max(line["exactness_error"] for line in rounds(tmp_path)) > 1e-4
    norms = [line["residual_norm"] for line in rounds(tmp_path)]
    assert (norms == [0.0] * 4) == (residual == "off")


@pytest.mark.parametrize("method", sorted({*aggregation.available()} - {"fedtalora"}))
def test_every_other_method_learns_and_is_exact_where_it_says_so(tmp_path, method):
    run(tmp_path, method=method, verify=True, local_epochs=3, **SHORT)
    first, second = rounds(tmp_path)
    assert second["mean_loss"] < first["mean_loss"] and not first["failures"] + second["failures"]
    assert (second["exactness_error"] < 1e-5) == resolve(method).exact


def test_lwf_sends_the_rows_of_old_classes_and_changes_nothing_before_there_are_any(undisturbed, tmp_path):
    run(tmp_path, penalty="lwf")
    plain, lwf = rounds(undisturbed), rounds(tmp_path)
    assert [line["mean_loss"] for line in lwf][:2] == [line["mean_loss"] for line in plain][:2]
    assert lwf[2]["bytes_down"] > plain[2]["bytes_down"] and lwf[3]["mean_loss"] != plain[3]["mean_loss"]


def test_impossible_setting_fails_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="rank takes a whole number"):
        run(tmp_path / "out", rank="four")
    assert not (tmp_path / "out").exists()


def test_failed_start_is_in_the_status_too(tmp_path):
    with pytest.raises(ValueError, match="lora-blocks '4-9'"):
        run(tmp_path, lora_blocks="4-9")
    status = read(tmp_path, "status.json")
    assert status["phase"] == "failed" and "4-9" in status["message"]


def test_a_folder_that_a_run_writes_to_is_refused_to_another_and_free_again_after_it(tmp_path):
    refused = []

    def meanwhile(message: Message, context: Context) -> Message:
        if not refused:
            for resume in (False, True):
                with pytest.raises(FolderTaken, match="another run writes to"):
                    tiny_run(tmp_path, dataset="digits", resume=resume)
                refused.append(resume)
        return app(message, context)

    tiny_run(tmp_path, meanwhile, dataset="digits")
    assert refused == [False, True]
    assert len((tmp_path / "rounds.jsonl").read_text().splitlines()) == 4
    assert json.loads((tmp_path / "status.json").read_text())["phase"] == "done"
    with RunFolder(tmp_path).only_ours():
        pass


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda content: content.update({"extra": content[METRICS]}), "holds a record 'extra', which nobody asked for"),
        (
            lambda content: content.update({ARRAYS: packed({"x": np.zeros(2**22, dtype=np.float32)})}),
            r"holds 16.8 MB, at most [\d.]+ MB can be of use",
        ),
        (lambda content: content[METRICS].update({"x": [0.5] * 2**22}), "holds 3[0-9.]+ MB, at most"),
        (lambda content: content[METRICS].update({"x" * 2**25: 0.5}), "holds 3[0-9.]+ MB, at most"),
        (
            lambda content: content[ARRAYS].update({str(i): Array(np.ones(1)) for i in range(20_000)}),
            "holds a record of several arrays, which nobody asked for",
        ),
        (
            lambda content: content.update({f"{ARRAYS}.{i}": ArrayRecord() for i in range(20_000)}),
            "holds 2[0-9.]+ MB, at most",
        ),
    ],
    ids=["unknown record", "large arrays", "large metrics", "long names", "many arrays", "many records"],
)
def test_reply_that_nobody_could_have_asked_for_is_refused_unread_and_the_round_goes_on(tmp_path, spoil, reason):
    def floods(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == MessageType.TRAIN and context.node_config["partition-id"] == 1:
            spoil(reply.content)
        return reply

    tiny_run(tmp_path, floods, dataset="digits", num_tasks=1, rounds_per_task=1)
    (line,) = rounds(tmp_path)
    (failure,) = line["failures"]
    assert failure["partition_id"] == 1 and re.match(f"refused: {reason}", failure["reason"])
    assert line["bytes_up"] < 10e6


def test_a_rounds_loss_is_the_mean_over_examples_and_not_over_clients(tmp_path):
    told: list[tuple[float, int]] = []

    def loud(message: Message, context: Context) -> Message:
        reply = run_client(message, context)
        if message.metadata.message_type == "train":
            metrics = reply.content[METRICS]
            metrics["mean-loss"] = 10.0 ** partition_of(context)
            told.append((metrics["mean-loss"], metrics["num-examples"]))
        return reply

    skewed = {"partition": "dirichlet", "dirichlet_beta": 0.5, "max_per_class": 20, "max_change": 0.0}
    run(tmp_path, loud, **SHORT | {"stop_after_task": 1, "rounds_per_task": 1} | skewed)
    losses, numbers = zip(*told, strict=True)
    assert len(set(numbers)) > 1
    assert rounds(tmp_path)[0]["mean_loss"] == pytest.approx(np.average(losses, weights=numbers))
