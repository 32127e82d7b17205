"""Runs scored by the groups of their data's classes, as FL-TAC's tasks are; and what their adapters can be told by."""

import io
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_grid import ROOT, tiny_run

from fedtalora_flwr.inference.model import open_trained
from fedtalora_flwr.inference.predict import predict, read_items
from fedtalora_flwr.run_folder import checkpoint

DOMAINS = {"bank": ["pay", "save"], "home": ["lamp", "door", "oven"], "talk": ["hello", "bye"]}
PHRASES = ("now {}", "i would like {} if that can be", "what about {} today", "{}", "do {} again please", "why {}")
SCRIPT = runpy.run_path(str(ROOT / "experiments" / "by_group.py"))
SIGNATURES = runpy.run_path(str(ROOT / "experiments" / "signatures.py"))
SLOTS = {"num_tasks": 3, "task_order": "domain", "rank": 1, "clusters": 3}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A data root with a CLINC150 of three domains of unequal size, and unequal numbers of test sentences."""
    folder = tmp_path_factory.mktemp("root") / "clinc150"
    folder.mkdir()
    intents = [intent for found in DOMAINS.values() for intent in found]
    train = [[phrase.format(intent), intent] for intent in intents for phrase in PHRASES]
    test = [[f"{word} {intent}", intent] for intent in intents for word in ("so", "but", "well")[: len(intent) - 2]]
    (folder / "data_full.json").write_text(json.dumps({"train": train, "test": test}))
    (folder / "domains.json").write_text(json.dumps(DOMAINS))
    return folder.parent


@pytest.fixture(scope="module")
def play(root, small_bert, tmp_path_factory):
    def played(name: str, **changes: Any) -> Path:
        common = {"dataset": "clinc150", "data_root": str(root), "backbone": f"hf:{small_bert}", "head": "linear"}
        out = tmp_path_factory.mktemp("runs") / name
        return tiny_run(out, **(common | {"lora_targets": "q,v", "learning_rate": 0.05} | changes))

    return played


@pytest.fixture(scope="module")
def fedit(play) -> Path:
    return play("fedit", method="fedit", num_tasks=1, task_order="given")


@pytest.fixture(scope="module")
def fl_tac(play) -> Path:
    return play("fl-tac", method="fl-tac", **SLOTS)


@pytest.fixture(scope="module")
def local_only(play) -> Path:
    return play("local-only", method="local-only", **(SLOTS | {"stop_after_task": 2}))


def read(run: Path, name: str) -> dict[str, Any]:
    return json.loads((run / name).read_text())


def of_all(accuracies: list[float], num_examples: list[int]) -> float:
    return sum(a * n for a, n in zip(accuracies, num_examples, strict=True)) / sum(num_examples)


def test_a_run_of_one_model_is_scored_among_all_classes_and_among_those_of_the_group(fedit, root):
    found = SCRIPT["scores"](fedit, device="cpu")
    assert found.groups == list(DOMAINS.values()) and found.num_examples == [3, 6, 4]
    assert of_all(found.among_all, found.num_examples) == pytest.approx(read(fedit, "metrics.json")["faa"])
    texts = json.loads((root / "clinc150" / "data_full.json").read_text())["test"]
    stdin = io.BytesIO("\n".join(text for text, _ in texts).encode())
    predictions = predict(open_trained(fedit, device="cpu"), read_items(["-"], modality="text", stdin=stdin), top=7)
    rankings = [[name for name, _ in prediction.ranking] for prediction in predictions]
    for group, among_all, among_group in zip(found.groups, found.among_all, found.among_group, strict=True):
        asked = [(ranking, intent) for ranking, (_, intent) in zip(rankings, texts, strict=True) if intent in group]
        assert among_all == pytest.approx(sum(ranking[0] == intent for ranking, intent in asked) / len(asked))
        first = [next(name for name in ranking if name in group) == intent for ranking, intent in asked]
        assert among_group == pytest.approx(sum(first) / len(first))
    assert sum(found.among_group) > sum(found.among_all)


def test_a_run_of_clusters_has_what_it_wrote_of_each_task_and_what_routing_gives(fl_tac):
    found = SCRIPT["scores"](fl_tac, device="cpu")
    row = read(fl_tac, "metrics.json")["accuracy_matrix"][-1]
    manifest = read(fl_tac, "manifest.json")
    of_task = {
        tuple(manifest["class_names"][c] for c in task): a for task, a in zip(manifest["tasks"], row, strict=True)
    }
    assert found.among_group == [of_task[tuple(group)] for group in DOMAINS.values()]
    routed = json.loads((fl_tac / "rounds.jsonl").read_text().splitlines()[-1])["accuracy_routed"]
    assert of_all(found.among_all, found.num_examples) == pytest.approx(routed)


def test_a_run_that_averages_nothing_has_no_model_for_all_and_no_word_on_tasks_it_left_out(local_only):
    found = SCRIPT["scores"](local_only, device="cpu")
    assert found.among_all == [None] * 3
    assert sum(a is None for a in found.among_group) == 1
    assert SCRIPT["mean"](found.among_all) is None and 0 <= SCRIPT["mean"](found.among_group) <= 1


def test_runs_are_printed_side_by_side_and_written_as_json(fedit, fl_tac, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["by_group.py", str(fedit), str(fl_tac), "--json", str(tmp_path / "found.json")])
    SCRIPT["main"]()
    printed = capsys.readouterr().out
    first, second = json.loads((tmp_path / "found.json").read_text())
    for words in ("pay, save (", "lamp, door, … (", "mean of the groups", "fedit", "fl-tac"):
        assert words in printed
    line = next(line for line in printed.splitlines() if "mean of the groups" in line)
    for one in (first, second):
        assert f"{100 * one['mean_among_all']:.1f} | {100 * one['mean_among_group']:.1f}" in line
    assert first["mean_among_all"] == pytest.approx(sum(first["among_all"]) / 3)


def test_what_cannot_be_scored_by_groups_is_refused_with_the_reason(play, fedit, digits_run):
    scores = SCRIPT["scores"]
    with pytest.raises(ValueError, match="has no groups of classes"):
        scores(digits_run, device="cpu")
    other = play("halves", method="local-only", **(SLOTS | {"num_tasks": 2}))
    with pytest.raises(ValueError, match=r"each of 2 tasks, which are not the 3 groups .*num-tasks=3"):
        scores(other, device="cpu")
    (other / "metrics.json").unlink()
    with pytest.raises(ValueError, match="halves is not finished; go on with: fedtalora run --resume"):
        scores(other, device="cpu")
    found = scores(fedit, device="cpu")
    fewer = SCRIPT["Scores"]("fewer", found.groups, [1, 1, 1], found.among_all, found.among_group)
    with pytest.raises(ValueError, match=r"were not tested on the same groups: .* and 3 of 3"):
        SCRIPT["require_same_groups"]([found, fewer])


def test_adapters_that_trained_alone_are_clustered_by_each_signature(local_only, fl_tac, monkeypatch, capsys):
    grams, tasks = SIGNATURES["grams_and_tasks"](local_only)
    slots = read(local_only, "manifest.json")["slots"]
    assert tasks == [task for of_client in slots for task in of_client] and len(set(tasks)) == 2
    own = checkpoint.load(local_only / "checkpoint").clustered.own
    adapters = [own[slot].adapters for slot in sorted(own)]
    flat = [torch.cat([pair.delta().flatten() for pair in one.values()]).double() for one in adapters]
    dense = torch.stack(flat) @ torch.stack(flat).T
    np.testing.assert_allclose(grams["product"], dense, rtol=1e-4, atol=1e-9)
    monkeypatch.setattr(sys, "argv", ["signatures.py", str(local_only)])
    SIGNATURES["main"]()
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("product", "lora_B", "raw", f"{len(tasks)} slots"))
    with pytest.raises(ValueError, match="no run with method=local-only, but with method=fl-tac"):
        SIGNATURES["grams_and_tasks"](fl_tac)


def test_the_share_of_slots_in_the_group_of_their_task_and_the_cosines_within_and_between_tasks():
    points, tasks = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), [0, 0, 1, 1]
    assert SIGNATURES["found"](points, tasks) == 1.0
    assert SIGNATURES["found"](points, [0, 1, 1, 1]) == 0.75
    unit = np.array([[1.0, 0.6, 0.1, 0.2], [0.6, 1.0, 0.3, 0.4], [0.1, 0.3, 1.0, 0.8], [0.2, 0.4, 0.8, 1.0]])
    assert SIGNATURES["apart"](unit, tasks) == pytest.approx((0.7, 0.25, 0.0125**0.5))
