"""Whole runs of the methods over slots in this process, on a few digits."""

import json
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message
from local_grid import TINY, defaults, tiny_run
from tensors import opened

from client_app.app import app
from fedtalora_flwr import wire
from fedtalora_flwr.aggregation import ClusteredState, GlobalState, Slot
from fedtalora_flwr.aggregation.methods.fl_tac import FLTAC
from fedtalora_flwr.client import handlers
from fedtalora_flwr.config import ConfigError, RunConfig
from fedtalora_flwr.inference.export import ExportError, export
from fedtalora_flwr.inference.model import TrainedModelError, open_trained
from fedtalora_flwr.model.backbones import vit_mini
from fedtalora_flwr.model.heads import Classifier, FeatureSums
from fedtalora_flwr.model.lora import PlacementError
from fedtalora_flwr.model.router import by_cluster, sum_slots
from fedtalora_flwr.model.session import model_of, slots_of, test_examples, training_examples
from fedtalora_flwr.model.train import count_correct, fit
from fedtalora_flwr.report import write_report
from fedtalora_flwr.run_folder import checkpoint
from fedtalora_flwr.server.failures import RunFailed

test_examples.__test__ = False  # type: ignore[attr-defined]

CLIENTS, TASKS = 3, 2
SETTINGS = {
    "method": "fl-tac",
    "clusters": TASKS,
    "head": "linear",
    "rank": 1,
    "lora_targets": "q,v",
    "test_fraction": 0.02,
    "verify": True,
}
ClientCall = Callable[[Message, Context], Message | None]


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture(autouse=True, scope="module")
def _backbone_is_built_once():
    built = vit_mini.create()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vit_mini, "create", lambda: deepcopy(built))
        yield


def run(out: Path, client: ClientCall = app, **changes: Any) -> Path:
    return tiny_run(out, client, **(SETTINGS | changes))


def rounds(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def read(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / name).read_text())


def clustered(out: Path) -> ClusteredState:
    state = checkpoint.load(out / "checkpoint").clustered
    assert state is not None
    return state


def configured(out: Path) -> RunConfig:
    return RunConfig.parse(read(out, "config.json"))


def configured_like(**changes: Any) -> RunConfig:
    settings = {key.replace("_", "-"): value for key, value in (SETTINGS | changes).items()}
    return RunConfig.parse(defaults() | TINY | settings)


def result(out: Path) -> tuple[Any, ...]:
    """All that a run leaves, less its times and the bytes sent, which depend on what clients still hold."""
    aside = {"seconds", "bytes_down", "crc32"}
    lines = [{key: value for key, value in line.items() if key not in aside} for line in rounds(out)]
    told = read(out / "checkpoint", "latest.json")["clustered"]
    return lines, told, next((out / "checkpoint").glob("*.safetensors")).read_bytes(), read(out, "metrics.json")["faa"]


def partition_of(context: Context) -> int:
    return int(context.node_config["partition-id"])


def meddle(change: Callable[[Message], None], *, kind: str = "train.slots", partition: int = 1) -> ClientCall:
    """A client that changes one partition's reply of the first round."""

    def client(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if (message.metadata.message_type, partition_of(context), message.metadata.group_id) == (kind, partition, "1"):
            change(reply)
        return reply

    return client


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("slots") / "run")


SHARED_RANK = 3


@pytest.fixture(scope="module")
def sharing(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("sharing") / "run", shared_rank=SHARED_RANK)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("alone") / "run", method="local-only")


def test_every_client_trains_all_its_tasks_in_every_round(undisturbed):
    lines, manifest = rounds(undisturbed), read(undisturbed, "manifest.json")
    assert [line["server_round"] for line in lines] == [1, 2]  # rounds-per-task, for all tasks at once
    assert [sorted(tasks) for tasks in manifest["slots"]] == [[0, 1]] * CLIENTS
    assert manifest["num_rounds"] == len(lines)
    for line in lines:
        assert [(slot["partition_id"], slot["number"]) for slot in line["slots"]] == [
            (partition, number) for partition in range(CLIENTS) for number in range(TASKS)
        ]
        assert line["failures"] == [] and line["participants"] == [0, 1, 2]
        found = [(slot["cluster"], manifest["slots"][slot["partition_id"]][slot["number"]]) for slot in line["slots"]]
        clusters = sorted({cluster for cluster, _ in found} - {None}) + [-1] * TASKS  # -1: no cluster for a task
        hits = max(sum(of[task] == cluster for cluster, task in found) for of in permutations(clusters, TASKS))
        assert line["cluster_accuracy"] == hits / len(found)
        assert sum(slot["right"] for slot in line["slots"]) == hits


def test_a_slot_number_says_nothing_of_its_task():
    numberings = set()
    for seed in range(4):
        config = configured_like(seed=seed, num_tasks=4)
        numberings |= {slots_of(config, partition_id=partition) for partition in range(CLIENTS)}
    assert all(sorted(tasks) == [0, 1, 2, 3] for tasks in numberings)
    assert len(numberings) > 5


def test_a_client_with_too_little_of_a_task_has_no_slot_for_it():
    config = configured_like(partition="dirichlet", dirichlet_beta=0.3, max_per_class=40)
    shares = {}
    for partition in range(CLIENTS):
        for task_id in range(TASKS):
            held = len(training_examples(config, partition_id=partition, task_id=task_id))
            shares[partition, task_id] = held / (5 * 40)
    least = sorted(shares.values())[2]
    strict = replace(config, min_slot_share=least + 1e-6)
    for partition in range(CLIENTS):
        wanted = {task_id for task_id in range(TASKS) if shares[partition, task_id] > least}
        assert set(slots_of(strict, partition_id=partition)) == wanted


def test_clusters_are_exact_where_the_method_within_them_is(undisturbed, tmp_path):
    assert max(line["exactness_error"] for line in rounds(undisturbed)) < 1e-6
    run(tmp_path, residual="off", clusters=1, stray_share=0.0)
    assert max(line["exactness_error"] for line in rounds(tmp_path)) > 1e-4


def test_run_killed_within_a_round_goes_on_to_the_same_bits(undisturbed, tmp_path):
    def client(message: Message, context: Context) -> Message:
        if (message.metadata.group_id, partition_of(context)) == ("2", 1):
            raise Killed
        return app(message, context)

    with pytest.raises(Killed):
        run(tmp_path, client)
    assert len(rounds(tmp_path)) == 1
    run(tmp_path, resume=True)
    assert result(tmp_path) == result(undisturbed)


def test_checkpoint_gives_back_every_state(undisturbed, alone):
    state = clustered(undisturbed)
    assert state.version == 2 and len(state.slots()) == CLIENTS * TASKS
    assert set(state.assigned.values()) == set(state.clusters)
    assert all(one.residual for one in state.clusters.values())
    apart = clustered(alone)
    assert not apart.clusters and set(apart.own) == {Slot(k, i) for k in range(CLIENTS) for i in range(TASKS)}
    assert {one.version for one in apart.own.values()} == {2}


BAD_SLOTS = (
    (lambda reply: fill(reply, "arrays.1", "lora_B/", np.nan), "slot 1 refused: "),
    (lambda reply: reply.content.pop("arrays.1") and reply.content.pop("metrics.1"), "slot 1 refused: it did not"),
    (lambda reply: claim(reply, "metrics.1", "base-version", 7), "slot 1 refused: trained on version 7"),
    (lambda reply: claim(reply, "metrics.1", "partition-id", 0), "slot 1 refused: speaks for partition 0, holds 1"),
    (lambda reply: fill(reply, "arrays.1", "lora_B/", 3.0), "slot 1 refused: changes the weights by "),
    (lambda reply: boast(reply), "slot 1 refused: speaks of other examples than the client said it holds"),
)
BAD_REPLIES = (
    (lambda reply: reply.content.update({"arrays.7": ArrayRecord()}), "refused: speaks of slot 7, has 2"),
    (lambda reply: reply.content.update({"arrays": ArrayRecord()}), "refused: record 'arrays' belongs to no slot"),
    (lambda reply: reply.content.update({"arrays.01": ArrayRecord()}), "refused: record 'arrays.01' belongs to"),
)


def test_bad_slot_is_refused_alone_with_its_reason_and_a_reply_about_slots_that_are_not_there_whole(tmp_path):
    bad = (*BAD_SLOTS, *BAD_REPLIES)  # one in each round

    def client(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "train.slots" and partition_of(context) == 1:
            bad[int(message.metadata.group_id) - 1][0](reply)
        return reply

    run(tmp_path, client, rounds_per_task=len(bad))
    everyone = {(k, i) for k in range(CLIENTS) for i in range(TASKS)}
    for line, (_, reason) in zip(rounds(tmp_path), bad, strict=True):
        (failure,) = line["failures"]
        assert failure["partition_id"] == 1 and failure["reason"].startswith(reason)
        there = {(slot["partition_id"], slot["number"]) for slot in line["slots"]}
        assert there == everyone - ({(1, 1)} if reason.startswith("slot 1") else {(1, 0), (1, 1)})


@pytest.mark.parametrize("signature", ["lora_B", "raw"])
def test_slot_of_another_rank_is_refused_where_the_signature_compares_equal_ranks_only(tmp_path, signature):
    def narrow(reply: Message) -> None:
        with opened(reply.content, "arrays.1") as tensors:
            for key in [key for key in tensors if key.startswith(("lora_A/", "lora_B/"))]:
                axis = 0 if key.startswith("lora_A/") else 1
                tensors[key] = tensors[key].take([0], axis)

    run(tmp_path, meddle(narrow), signature=signature, rank=2)
    first, second = rounds(tmp_path)
    (failure,) = first["failures"]
    assert failure["partition_id"] == 1 and not second["failures"]
    assert failure["reason"].startswith("slot 1 refused: ")
    assert f"rank 1, the server's is 2; signature {signature} compares equal ranks only" in failure["reason"]


def test_run_fails_where_fewer_clients_than_min_replies_have_a_good_slot(tmp_path):
    with pytest.raises(RunFailed, match="round 1 has 2 good replies, min-replies is 3: partition 1: refused"):
        run(tmp_path, meddle(BAD_REPLIES[0][0]), rounds_per_task=1, min_replies=3)


def fill(reply: Message, record: str, part: str, value: float) -> None:
    with opened(reply.content, record) as tensors:
        key = min(key for key in tensors if key.startswith(part))
        tensors[key] = np.full_like(tensors[key], value)


def claim(reply: Message, record: str, key: str, value: int) -> None:
    reply.content[record][key] = value


def boast(reply: Message) -> None:
    with opened(reply.content, "arrays.1") as tensors:
        tensors["counts/examples"] = 100 * tensors["counts/examples"]
    claim(reply, "metrics.1", "num-examples", 100 * reply.content["metrics.1"]["num-examples"])


def test_bad_sums_for_the_router_are_refused_and_the_others_count(tmp_path):
    client = meddle(lambda reply: fill(reply, "arrays", "sums/moment", 3.0), kind="train.slot_sums")
    run(tmp_path, client, rounds_per_task=1)
    (failure,) = rounds(tmp_path)[0]["failures"]
    assert failure["partition_id"] == 1 and failure["reason"].startswith("refused: sums have a root of ")
    assert rounds(tmp_path)[0]["routing_accuracy"] > 0


def longer(reply: Message, *, times: float) -> None:
    """Make the features of the router's sums longer, so that G and the rows still go together."""
    with opened(reply.content, "arrays") as tensors:
        width = tensors["sums/moment"].shape[1]
        numbers = len(tensors["sums/root"])
        num_rows = next(k for k in range(width + 1) if k * width - k * (k - 1) // 2 == numbers)
        columns = np.triu_indices(num_rows, m=width)[1]
        tensors["sums/root"] = tensors["sums/root"] * np.where(columns < width - 1, times, 1.0)
        tensors["sums/moment"] = tensors["sums/moment"] * np.where(np.arange(width) < width - 1, times, 1.0)


@pytest.mark.parametrize(
    ("feature_norm", "reason"),
    [("rms", "features have a norm of "), ("none", "features are .* times as large as is usual")],
)
def test_sums_for_the_router_of_features_of_another_length_are_refused(tmp_path, feature_norm, reason):
    client = meddle(lambda reply: longer(reply, times=20.0), kind="train.slot_sums")
    run(tmp_path, client, rounds_per_task=1, feature_norm=feature_norm)
    (failure,) = rounds(tmp_path)[0]["failures"]
    assert failure["partition_id"] == 1 and re.match(f"refused: {reason}", failure["reason"])


def in_gauge(factor: float) -> Callable[[Message], None]:
    """The same products of other factors, in every slot."""

    def change(reply: Message) -> None:
        for record in [name for name in reply.content if name.startswith("arrays.")]:
            with opened(reply.content, record) as tensors:
                for key in [key for key in tensors if key.startswith("lora_")]:
                    times = factor if key.startswith("lora_A/") else 1 / factor
                    tensors[key] = (tensors[key] * times).astype(np.float32)

    return change


def scaled(part: str, times: float) -> Callable[[Message], None]:
    """All tensors of a part of slot 1, so many times as large."""

    def change(reply: Message) -> None:
        with opened(reply.content, "arrays.1") as tensors:
            for key in [key for key in tensors if key.startswith(part)]:
                tensors[key] = (tensors[key] * times).astype(np.float32)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (in_gauge(1e6), r"slot [01] refused: changes lora_A by .* times as much as is usual"),
        (scaled("head/", -50.0), r"slot 1 refused: changes a class row by .* times as much as is usual"),
    ],
    ids=["gauge", "rows"],
)
def test_slot_that_changes_a_factor_or_a_row_far_more_than_the_others_is_refused(tmp_path, change, reason):
    run(tmp_path, meddle(change))
    first, second = rounds(tmp_path)
    assert first["failures"] and not second["failures"]
    assert all(f["partition_id"] == 1 and re.match(reason, f["reason"]) for f in first["failures"])


def test_slot_that_changes_its_rows_more_than_the_others_counts_less_in_them(tmp_path, monkeypatch):
    """Nine times as far is no outlier yet, and would be most of the mean."""
    shares: dict[Slot, float] = {}
    aggregate = FLTAC.aggregate

    def watched(self, state, updates, shared):
        shares.update({slot: float(u.class_counts.sum()) / u.num_examples for slot, u in updates.items()})
        return aggregate(self, state, updates, shared)

    monkeypatch.setattr(FLTAC, "aggregate", watched)
    run(tmp_path, meddle(scaled("head/", -9.0)), rounds_per_task=1)
    assert 0.2 < shares.pop(Slot(1, 1)) < 0.5  # 3 of about 9
    assert len(shares) == CLIENTS * TASKS - 1 and {*shares.values()} == {1.0}


def test_round_of_slots_that_hardly_change_goes_on(tmp_path):
    def still(message: Message, context: Context) -> Message:
        reply = app(message, context)
        for record in [name for name in reply.content if name.startswith("arrays.")]:
            with opened(reply.content, record) as tensors:
                for key in [key for key in tensors if key.startswith("lora_")]:
                    tensors[key] = np.full_like(tensors[key], 1e-44)
        return reply

    run(tmp_path, still)
    assert [line["failures"] for line in rounds(tmp_path)] == [[], []]


def test_local_only_averages_nothing_and_scores_the_mean_over_clients_weighted_by_examples(alone):
    config, state = configured(alone), clustered(alone)
    model, manifest = model_of(config), read(alone, "manifest.json")
    correct, total = [0] * TASKS, [0] * TASKS
    for slot, one in state.own.items():
        task_id = manifest["slots"][slot.partition_id][slot.number]
        weight = len(training_examples(config, partition_id=slot.partition_id, task_id=task_id))
        model.load(one.adapters, one.residual)
        examples, classes = test_examples(config, task_id=task_id), manifest["tasks"][task_id]
        correct[task_id] += (
            weight * count_correct(model, [Classifier(one.head)], examples, classes=classes, config=config)[0]
        )
        total[task_id] += weight * len(examples)
    wanted = [hits / of for hits, of in zip(correct, total, strict=True)]
    assert read(alone, "metrics.json")["accuracy_matrix"][-1] == pytest.approx(wanted)
    last = rounds(alone)[-1]
    assert "slots" not in last and "routing_accuracy" not in last and last["exactness_error"] < 1e-6


def test_what_a_local_only_slot_trains_does_not_depend_on_the_other_clients(alone, tmp_path):
    def only_two(message: Message, context: Context) -> Message:
        if partition_of(context) == 2 and message.metadata.message_type == "train.slots":
            raise RuntimeError("the disk is full")
        return app(message, context)

    run(tmp_path, only_two, method="local-only")
    mine, others = clustered(tmp_path).own, clustered(alone).own
    assert {slot.partition_id for slot in mine} == {0, 1}
    for slot, one in mine.items():
        assert all(torch.equal(pair.lora_B, others[slot].adapters[name].lora_B) for name, pair in one.adapters.items())


def test_client_that_comes_later_starts_anew_and_its_slots_find_a_cluster(tmp_path):
    def late(message: Message, context: Context) -> Message:
        if partition_of(context) == 2 and message.metadata.group_id == "1":
            raise RuntimeError("not there yet")
        if partition_of(context) == 2 and message.metadata.message_type == "train.slots":
            versions.append({part.content["order"]["version"] for part in wire.unbundle(message).values()})
        return app(message, context)

    versions: list[set[Any]] = []
    run(tmp_path, late)
    assert versions == [{0}]  # the start's
    first, second = rounds(tmp_path)
    assert {slot["partition_id"] for slot in first["slots"]} == {0, 1}
    assert {slot["partition_id"] for slot in second["slots"]} == {0, 1, 2} and not second["failures"]
    assert {Slot(2, 0), Slot(2, 1)} <= set(clustered(tmp_path).slots())


def test_client_that_lost_its_bases_is_sent_those_of_all_its_slots_again(tmp_path, monkeypatch):
    def forgetful(message: Message, context: Context) -> Message:
        if (partition_of(context), message.metadata.group_id) == (2, "3"):
            monkeypatch.setenv("FEDTALORA_CACHE", str(tmp_path / "new"))
        return app(message, context)

    run(tmp_path / "run", forgetful, rounds_per_task=3)
    assert [line.get("resent", []) for line in rounds(tmp_path / "run")] == [[], [], [2]]
    assert [line["failures"] for line in rounds(tmp_path / "run")] == [[], [], []]


@pytest.mark.full  # one that has lost its bases: below
def test_client_that_can_keep_no_base_but_the_last_ends_where_any_other_does(tmp_path, monkeypatch):
    outs = []
    for keeps in (1.0, 0.0):
        monkeypatch.setenv("FEDTALORA_CACHE", str(tmp_path / f"cache-{keeps}"))
        outs.append(run(tmp_path / f"run-{keeps}", rounds_per_task=4, base_cache_gb=keeps))
    assert all(not line["failures"] for line in rounds(outs[1]))
    assert any("resent" in line for line in rounds(outs[1]))
    assert result(outs[0])[1:] == result(outs[1])[1:]  # but for the lines of the rounds: asking is bytes up


def test_routed_inputs_are_scored_by_the_cluster_that_they_go_to(undisturbed):
    trained, config = open_trained(undisturbed, device="cpu"), configured(undisturbed)
    assert trained.num_rounds == 2 and trained.classes == tuple(range(10))
    hits = num = 0
    for task_id in range(TASKS):
        examples = test_examples(config, task_id=task_id)
        scores = trained.logits(examples.inputs)
        assert torch.isfinite(scores).any(1).all()
        hits += int((torch.tensor(trained.classes)[scores.argmax(1)] == examples.labels).sum())
        num += len(examples)
    assert rounds(undisturbed)[-1]["accuracy_routed"] == pytest.approx(hits / num)


@pytest.mark.parametrize("changes", [{"num_tasks": 10, "stop_after_task": 2}, {"head_learning_rate": 0.0}])
def test_run_whose_class_rows_never_move_completes_and_says_why_it_cannot_predict(tmp_path, changes):
    run(tmp_path, rounds_per_task=1, **changes)
    (line,) = rounds(tmp_path)
    assert not line["failures"] and line["accuracy_routed"] == 0
    cluster = min(clustered(tmp_path).clusters)
    for asked in (None, cluster):
        with pytest.raises(TrainedModelError, match=rf"cluster {cluster}.* have not trained the row of any class"):
            open_trained(tmp_path, device="cpu", place=asked)


def test_each_cluster_can_be_exported_and_all_together_cannot(undisturbed, alone, tmp_path):
    cluster = min(clustered(undisturbed).clusters)
    done = export(undisturbed, to="merged", target=tmp_path / "out", place=cluster)
    assert done.logit_difference < 1e-5
    with pytest.raises(ExportError, match="models, one a cluster; export one by --cluster N"):
        export(undisturbed, to="merged", target=tmp_path / "all")
    with pytest.raises(TrainedModelError, match=r"has no cluster 99; it has cluster \d"):
        open_trained(undisturbed, place=99)
    with pytest.raises(TrainedModelError, match=r"has no slot 9:0; it has slot 0:0, slot 0:1, slot 1:0"):
        open_trained(alone, place=Slot(9, 0))
    with pytest.raises(TrainedModelError, match=r"no model for all; name one by --slot CLIENT:NUMBER, of slot 0:0, "):
        open_trained(alone)


def test_a_slots_own_model_scores_the_classes_of_its_task(alone):
    slot, state = min(clustered(alone).own.items())
    trained, manifest = open_trained(alone, device="cpu", place=slot), read(alone, "manifest.json")
    assert set(trained.classes) <= set(manifest["tasks"][manifest["slots"][slot.partition_id][slot.number]])
    config, examples = configured(alone), test_examples(configured(alone), task_id=0)
    model = model_of(config)
    model.load(state.adapters, state.residual)
    with torch.inference_mode():
        wanted = Classifier(state.head).logits(model.eval().backbone(examples.inputs), torch.tensor(trained.classes))
    torch.testing.assert_close(trained.logits(examples.inputs), wanted)


def test_report_shows_the_clusters_of_every_round(undisturbed, tmp_path):
    page = write_report(undisturbed).read_text()
    assert "Adapters and their clusters" in page and "All tasks are trained at once" in page
    for line in rounds(undisturbed):
        assert f"round {line['server_round']}: {100 * line['cluster_accuracy']:.1f}" in page
    (undisturbed / "report.html").unlink()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"head": "ridge"}, "method fl-tac trains class rows in every slot; set head=linear"),
        ({"loss_classes": "seen"}, "there are no earlier ones: set loss-classes=task and penalty=none"),
        ({"penalty": "lwf"}, "there are no earlier ones: set loss-classes=task and penalty=none"),
        (
            {"dataset": "nodes", "data_path": "/tmp"},
            "method fl-tac needs a data set that all nodes read, not",
        ),
        ({"method": "fedtalora", "shared_rank": 2}, "method fedtalora has no part that slots share; set shared-rank=0"),
        (
            {"method": "local-only", "shared_rank": 2},
            "method local-only has no part that slots share; set shared-rank=",
        ),
        ({"shared_rank": -1}, "shared-rank must be at least 0, got -1"),
    ],
)
def test_settings_that_mean_nothing_for_tasks_at_once_are_refused(tmp_path, changes, text):
    with pytest.raises(ConfigError, match=text):
        run(tmp_path, **changes)


def test_shared_part_that_leaves_no_room_for_a_rank_of_ones_own_is_refused(tmp_path):
    with pytest.raises(PlacementError, match=r"rank and shared-rank together must be in \[1, 192\] .*, got 193"):
        run(tmp_path, shared_rank=192)


def test_manifest_counts_an_adapter_for_every_task(undisturbed):
    counts = read(undisturbed, "manifest.json")["parameters"]
    assert counts["lora"] == 2 * (192 + 192)  # q and v of one block, rank 1
    assert counts["transmitted"] == counts["trainable"] == 2 * counts["lora"] + counts["head"]


def test_shared_part_is_sent_once_by_every_client_and_counted_once(sharing, tmp_path):
    sent: list[dict[wire.Part, int]] = []

    def told(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "train.slots":
            numbers = {}
            for part, one in wire.unbundle(reply).items():
                with opened(one.content, "arrays") as tensors:
                    numbers[part] = sum(value.size for key, value in tensors.items() if key.startswith("lora_"))
                    assert part != wire.SHARED or all(key.startswith(("lora_", "counts/")) for key in tensors)
            sent.append(numbers)
        return reply

    run(tmp_path, told, shared_rank=SHARED_RANK, rounds_per_task=1)
    counts = read(sharing, "manifest.json")["parameters"]
    assert counts["lora"] == 2 * (192 + 192) and counts["shared"] == SHARED_RANK * counts["lora"]
    assert counts["transmitted"] == counts["trainable"] == 2 * counts["lora"] + counts["shared"] + counts["head"]
    assert sent == CLIENTS * [{0: counts["lora"], 1: counts["lora"], wire.SHARED: counts["shared"]}]


def test_shared_part_is_handed_on_from_slot_to_slot_and_all_train_it(sharing, monkeypatch, tmp_path):
    loaded: list[dict[str, torch.Tensor]] = []
    trained: list[dict[str, torch.Tensor]] = []

    def watched(model, *arguments, **options):
        loaded.append({name: pair.lora_B[:, :SHARED_RANK] for name, pair in model.factors().items()})
        result = fit(model, *arguments, **options)
        trained.append({name: pair.lora_B[:, :SHARED_RANK] for name, pair in result.adapters.items()})
        return result

    monkeypatch.setattr(handlers, "fit", watched)
    run(tmp_path, shared_rank=SHARED_RANK, rounds_per_task=1)
    assert len(loaded) == CLIENTS * TASKS
    for first in range(0, len(loaded), TASKS):  # in one client after the other
        for name, value in loaded[first].items():
            assert not value.any()  # as it starts
            assert torch.equal(loaded[first + 1][name], trained[first][name])
            assert not torch.equal(trained[first + 1][name], trained[first][name])


def test_shared_part_is_the_mean_over_all_clients_and_clusters_have_their_own(sharing):
    state, lines = clustered(sharing), rounds(sharing)
    assert state.shared is not None and state.shared.version == 2
    assert state.shared.head["weight"].any(1).all()  # the rows of all classes
    assert {pair.rank for pair in state.shared.adapters.values()} == {SHARED_RANK}
    assert {pair.rank for one in state.states().values() for pair in one.adapters.values()} == {1}
    assert all(value.any() for value in state.shared.residual.values())
    assert max(line["exactness_error"] for line in lines) < 1e-6 and not any(line["failures"] for line in lines)


def test_run_with_a_shared_part_that_is_killed_goes_on_to_the_same_bits(tmp_path):
    settings = {"shared_rank": SHARED_RANK, "signature": "changes", "stray_share": 0.0}
    whole, killed = run(tmp_path / "whole", **settings), tmp_path / "killed"

    def client(message: Message, context: Context) -> Message:
        if (message.metadata.group_id, partition_of(context)) == ("2", 1):
            raise Killed
        return app(message, context)

    with pytest.raises(Killed):
        run(killed, client, **settings)
    run(killed, resume=True, **settings)
    assert result(killed) == result(whole)
    assert clustered(killed).changes is not None


def test_client_of_a_run_with_a_shared_part_may_come_late_sit_out_and_lose_its_bases(tmp_path, monkeypatch):
    def unsteady(message: Message, context: Context) -> Message:
        who, when = partition_of(context), message.metadata.group_id
        if (who, when) in ((0, "1"), (1, "2")):
            raise RuntimeError("not there")
        if (who, when) == (2, "4"):  # the last that is asked, as all share one cache here
            monkeypatch.setenv("FEDTALORA_CACHE", str(tmp_path / "new"))
        return app(message, context)

    run(tmp_path / "run", unsteady, rounds_per_task=4, shared_rank=SHARED_RANK)
    lines = rounds(tmp_path / "run")
    assert [[failure["partition_id"] for failure in line["failures"]] for line in lines] == [[0], [1], [], []]
    assert [line.get("resent", []) for line in lines][3] == [2]
    assert max(line["exactness_error"] for line in lines) < 1e-6
    assert len(clustered(tmp_path / "run").slots()) == CLIENTS * TASKS


BAD_SHARED = (
    (lambda reply: fill(reply, "arrays.shared", "lora_B/", np.nan), "lora_B holds a number that is not finite"),
    (lambda reply: reply.content.pop("arrays.shared") and reply.content.pop("metrics.shared"), "it did not come back"),
    (lambda reply: claim(reply, "metrics.shared", "base-version", 7), "trained on version 7"),
    (lambda reply: claim(reply, "metrics.shared", "partition-id", 0), "speaks for partition 0, holds 1"),
    (lambda reply: fill(reply, "arrays.shared", "lora_B/", 3.0), "changes the weights by "),
)


def test_bad_shared_part_is_refused_with_all_that_was_trained_beside_it(tmp_path):
    def client(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "train.slots" and partition_of(context) == 1:
            BAD_SHARED[int(message.metadata.group_id) - 1][0](reply)
        return reply

    run(tmp_path, client, rounds_per_task=len(BAD_SHARED), shared_rank=SHARED_RANK)
    for line, (_, reason) in zip(rounds(tmp_path), BAD_SHARED, strict=True):
        (failure,) = line["failures"]
        assert failure["partition_id"] == 1
        assert failure["reason"].startswith("shared part refused, and all slots: ") and reason in failure["reason"]
        assert {slot["partition_id"] for slot in line["slots"]} == {0, 2}
        assert line["exactness_error"] < 1e-6


def test_slot_that_is_refused_alone_does_not_weigh_in_the_shared_part(tmp_path, monkeypatch):
    seen: list[tuple[dict[Slot, int], dict[int, int]]] = []
    aggregate = FLTAC.aggregate

    def watched(self, state, updates, shared=()):
        examples = {slot: update.num_examples for slot, update in updates.items()}
        seen.append((examples, {update.partition_id: update.num_examples for update in shared}))
        return aggregate(self, state, updates, shared)

    monkeypatch.setattr(FLTAC, "aggregate", watched)
    run(tmp_path, meddle(BAD_SLOTS[0][0]), rounds_per_task=1, shared_rank=SHARED_RANK)
    ((examples, weights),) = seen
    assert Slot(1, 1) not in examples and weights[1] == examples[Slot(1, 0)]
    assert weights[0] == examples[Slot(0, 0)] + examples[Slot(0, 1)]


def test_run_with_a_shared_part_predicts_as_it_was_scored_and_each_cluster_can_be_exported(sharing, tmp_path):
    trained, config, state = open_trained(sharing, device="cpu"), configured(sharing), clustered(sharing)
    hits = num = 0
    for task_id in range(TASKS):
        examples = test_examples(config, task_id=task_id)
        scores = trained.logits(examples.inputs)
        hits += int((torch.tensor(trained.classes)[scores.argmax(1)] == examples.labels).sum())
        num += len(examples)
    assert rounds(sharing)[-1]["accuracy_routed"] == pytest.approx(hits / num)
    cluster, own = min(state.clusters.items())
    assert export(sharing, to="merged", target=tmp_path / "out", place=cluster).logit_difference < 1e-5
    shared, model = state.shared, open_trained(sharing, device="cpu", place=cluster).state
    for name, pair in model.adapters.items():
        wanted = shared.adapters[name].delta() + own.adapters[name].delta() + shared.residual[name] + own.residual[name]
        assert torch.allclose(pair.delta() + model.residual[name], wanted, atol=1e-6)


def test_router_of_a_run_with_a_shared_part_sums_features_under_that_part_alone(sharing):
    point, config, state = checkpoint.load(sharing / "checkpoint"), configured(sharing), clustered(sharing)
    model, told = model_of(config), []
    for adapters, residual in (
        (state.whole(state.start).adapters, state.shared.residual),
        (model.initial_factors(seed=config.seed), {}),
    ):
        model.load(adapters, residual)
        sums = [
            sum_slots(
                model, [training_examples(config, partition_id=k, task_id=t) for t in range(TASKS)], config=config
            )
            for k in range(CLIENTS)
        ]
        told.append(sum(one.root.T @ one.root for one in sums))
    under_shared, untouched = told
    assert torch.allclose(point.routes.gram, under_shared, rtol=1e-5, atol=1e-3)
    assert not torch.allclose(point.routes.gram, untouched, rtol=1e-5, atol=1e-3)


def test_sums_of_slots_go_to_the_rows_of_their_clusters():
    def sums(*counts: int) -> FeatureSums:
        total = FeatureSums.zero(num_classes=len(counts), feature_dim=2)
        for number, count in enumerate(counts):
            labels = torch.full((count,), number)
            total = total + FeatureSums.of(torch.full((count, 2), 1.0 + number), labels, num_classes=len(counts))
        return total

    start = GlobalState({})
    state = ClusteredState(
        start,
        clusters={0: start, 3: start},
        assigned={Slot(0, 0): 3, Slot(0, 1): 0, Slot(2, 0): 3},
        own={Slot(2, 1): start},
    )
    joined = by_cluster({2: sums(4, 5), 0: sums(1, 2)}, state)
    assert joined.moment.tolist() == [[4, 4, 2], [1 + 4, 1 + 4, 1 + 4]]  # clusters 0 and 3; the stray is in neither
    assert joined.gram[-1, -1] == 12


def test_clusters_are_the_same_when_the_method_is_not_told_the_classes_of_any_slot(tmp_path, monkeypatch):
    seen: list[tuple[Any, Any]] = []
    aggregate = FLTAC.aggregate

    def watched(self, state, updates, shared=()):
        new = aggregate(self, state, updates, shared)
        nothing = {
            slot: replace(update, class_counts=update.class_counts.roll(3), head=state.of(slot).head)
            for slot, update in updates.items()
        }
        seen.append((new.assigned, aggregate(self, state, nothing).assigned))
        return new

    monkeypatch.setattr(FLTAC, "aggregate", watched)
    run(tmp_path)
    assert len(seen) == 2 and all(told == untold for told, untold in seen)


def test_texts_of_unequal_length_are_summed_and_routed(tmp_path, small_bert):
    phrases = {
        "on": "switch it on",
        "off": "off",
        "buy": "i would like to buy a much bigger one soon",
        "sell": "sell it",
    }
    rows = [f"{phrase} number {i},{label}" for label, phrase in phrases.items() for i in range(9)]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    settings = {"dataset": "text", "data_path": str(tmp_path / "texts"), "backbone": f"hf:{small_bert}"}
    run(tmp_path / "run", **settings, rounds_per_task=1, test_fraction=0.3, task_order="given")
    (line,) = rounds(tmp_path / "run")
    assert not line["failures"] and 0 <= line["routing_accuracy"] <= 1


def test_a_rounds_loss_is_the_mean_over_examples_and_not_over_slots(tmp_path):
    told: list[tuple[float, int]] = []

    def loud(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "train.slots":
            for metrics in reply.content.metric_records.values():
                metrics["mean-loss"] = 10.0 ** partition_of(context)
                told.append((metrics["mean-loss"], metrics["num-examples"]))
        return reply

    run(tmp_path, loud, rounds_per_task=1, partition="dirichlet", dirichlet_beta=0.5, max_per_class=20)
    losses, numbers = zip(*told, strict=True)
    assert len(set(numbers)) > 1
    assert rounds(tmp_path)[0]["mean_loss"] == pytest.approx(np.average(losses, weights=numbers))
