"""Whole runs on data sets that are joined, of pairs of texts and of single ones: trained, used and exported."""

import csv
import io
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_grid import tiny_run

import fedtalora_flwr as fedtalora
from fedtalora_flwr.cli import app
from fedtalora_flwr.inference.export import export
from fedtalora_flwr.inference.model import TrainedModel, open_trained
from fedtalora_flwr.inference.predict import InputError, Item, items_of, predict, read_items
from fedtalora_flwr.model.session import data_of

pytestmark = pytest.mark.usefixtures("log_is_caught")

SUBJECTS = ("the cat", "a tall man", "my old neighbour", "nobody", "the whole choir")
VERBS = ("sings", "sleeps on the sofa", "is late", "buys bread", "laughs")


def write(path: Path, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def pairs(labels: tuple[str, str], *, turned: bool) -> list[tuple[str, str, str]]:
    """Pairs of sentences, of one subject or of two."""
    one = [(f"{who} {what}", f"{who} {VERBS[n - 1]}", labels[0]) for who in SUBJECTS for n, what in enumerate(VERBS)]
    two = [(f"{SUBJECTS[n - 1]} {VERBS[n]}", f"{who} {VERBS[n]}", labels[1]) for who in SUBJECTS for n in range(5)]
    return [(b, a, label) if turned else (a, b, label) for a, b, label in one + two]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tables of pairs under different column names, and one of single texts."""
    folder = tmp_path_factory.mktemp("tables")
    write(folder / "follows.csv", ("premise", "hypothesis", "label"), pairs(("yes", "no"), turned=False))
    write(folder / "same.csv", ("question1", "question2", "label"), pairs(("same", "other"), turned=True))
    mood = [(f"{who} {what}", "up" if n % 2 else "down") for who in SUBJECTS for n, what in enumerate(VERBS)]
    write(folder / "mood.csv", ("text", "label"), mood)
    return folder


@pytest.fixture(scope="module")
def text_settings(small_bert: Path) -> dict[str, Any]:
    return {
        "backbone": f"hf:{small_bert}",
        "task_order": "domain",
        "lora_targets": "q,v",
        "lora_blocks": "all",
        "max_per_class": 20,
        "head": "linear",
        "max_length": 16,
        "learning_rate": 0.02,
    }


@pytest.fixture(scope="module")
def clustered(tables: Path, text_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over slots on two data sets of pairs."""
    return tiny_run(
        tmp_path_factory.mktemp("slots") / "run",
        **text_settings,
        dataset=f"join:text={tables / 'follows.csv'}+text={tables / 'same.csv'}",
        method="fl-tac",
        clusters=2,
        residual="off",
    )


@pytest.fixture(scope="module")
def mixed(tables: Path, text_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stream whose tasks are a data set of pairs and one of single texts, with three clients and a ridge head."""
    return tiny_run(
        tmp_path_factory.mktemp("stream") / "run",
        **text_settings | {"head": "ridge", "ridge_features": 0},
        dataset=f"join:text={tables / 'follows.csv'}+text={tables / 'mood.csv'}",
    )


def read(run: Path, name: str) -> dict[str, Any]:
    return json.loads((run / name).read_text())


def items(trained: TrainedModel, stdin: str) -> list[Item]:
    return list(read_items(["-"], modality="text", stdin=io.BytesIO(stdin.encode()), num_texts=trained.num_texts))


def test_every_part_is_a_task_of_the_slots(clustered):
    manifest = read(clustered, "manifest.json")
    assert manifest["class_names"] == ["follows/no", "follows/yes", "same/other", "same/same"]
    assert sorted(manifest["tasks"]) == [[0, 1], [2, 3]] and manifest["num_texts"] == [2]
    assert {slot["number"] for slot in read_rounds(clustered)[-1]["slots"]} == {0, 1}


def read_rounds(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def test_every_part_is_a_task_of_the_stream(mixed):
    manifest, metrics = read(mixed, "manifest.json"), read(mixed, "metrics.json")
    assert manifest["num_texts"] == [1, 2] and sorted(manifest["tasks"]) == [[0, 1], [2, 3]]
    assert len(metrics["accuracy_matrix"]) == 2 and metrics["faa"] is not None


@pytest.mark.parametrize("name", ["clustered", "mixed"])
def test_what_is_piped_in_scores_as_the_runs_own_data(name, request):
    trained = open_trained(request.getfixturevalue(name), device="cpu")
    source = data_of(trained.config).source
    rows = np.arange(0, len(source.test), 2)
    raw = source.test.read(rows)
    wanted = trained.logits(trained.model.backbone.encode(source.test, rows, source=source)).argmax(1).tolist()
    found = items(trained, "".join(f"{text if isinstance(text, str) else chr(9).join(text)}\n" for text in raw))
    assert [item.raw for item in found] == list(raw)
    best = [prediction.ranking[0][0] for prediction in predict(trained, iter(found), top=1)]
    assert best == [trained.class_names[column] for column in wanted]


def test_a_single_text_where_pairs_are_wanted_is_told_among_the_others(clustered):
    trained = open_trained(clustered, device="cpu")
    found = list(predict(trained, iter(items(trained, "one\ttwo\n\nalone\na\tb\tc\n")), top=1))
    assert [prediction.item.raw for prediction in found] == [("one", "two"), None, None]
    assert found[1].item.error.startswith("-:3 holds 1 text; this run's model takes a pair of texts; put a tab between")
    assert "-:4 holds 3 texts" in found[2].item.error
    assert found[0].to_json()["text"] == ("one", "two")
    with pytest.raises(InputError, match="input 1 is str; this run's model takes a pair of texts"):
        fedtalora.Run.load(clustered).predict([("one", "two"), "alone"])
    assert len(fedtalora.Run.load(clustered).predict([["one", "two"], ("a", "b")])) == 2


def test_the_command_prints_both_texts_of_a_pair_and_leaves_with_1_where_one_is_missing(
    mixed, clustered, tmp_path, monkeypatch, capsys
):
    (tmp_path / "said.txt").write_text("the cat sings\tnobody  sings\nalone\n")

    def call(run: Path, *options: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedtalora", "predict", str(run), str(tmp_path / "said.txt"), *options])
        with pytest.raises(SystemExit) as left:
            app.main()
        return int(left.value.code or 0), *capsys.readouterr()

    status, out, _ = call(mixed, "--top", "1")
    first, second = (line.split("\t")[2:] for line in out.splitlines())
    assert (status, first, second) == (0, ["the cat sings", "nobody sings"], ["alone"])
    status, out, _ = call(clustered, "--json")
    entries = json.loads(out)
    assert status == 1 and entries[0]["text"] == ["the cat sings", "nobody  sings"]
    assert "said.txt:2 holds 1 text; this run's model takes a pair of texts" in entries[1]["error"]


def test_a_pair_where_a_single_text_is_wanted_is_told(text_run, tmp_path):
    (tmp_path / "a.json").write_text('["on", ["on", "off"], {"sentence1": "a", "sentence2": "b"}, 5, ["one"]]')
    first, *others = read_items([str(tmp_path / "a.json")], modality="text", stdin=io.BytesIO())
    assert first.raw == "on"
    assert others[0].error.endswith("a.json:2 holds 2 texts; this run's model takes a text")
    assert "a.json:3 has no text column (looked for text, " in others[1].error
    assert [item.error.partition("a.json:")[2] for item in others[2:]] == [
        "4 holds no texts; this run's model takes a text",
        "5 holds no texts; this run's model takes a text",
    ]
    with pytest.raises(InputError, match=r"input 0 is tuple; this run's model takes a text$"):
        list(items_of([("on", "off")], modality="text"))


def test_a_tab_is_part_of_a_text_where_a_run_has_no_pairs(text_run):
    assert [item.raw for item in items(open_trained(text_run, device="cpu"), "switch\tit on\n")] == ["switch\tit on"]


def test_pairs_are_read_from_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\ttwo\n")
    write(tmp_path / "b.csv", ("id", "sentence2", "sentence1"), [("7", "two, too", "one")])
    (tmp_path / "c.tsv").write_text("premise\thypothesis\none\ttwo\n")
    (tmp_path / "d.json").write_text('[["one", "two"], {"question": "one", "sentence": "two"}, {"text": "one"}]')
    (tmp_path / "e.jsonl").write_text('{"question1": "one", "question2": null}\n')
    found = list(read_items([str(tmp_path)], modality="text", stdin=io.BytesIO(), num_texts=(2,)))
    assert [item.raw for item in found] == [("one", "two"), ("one", "two, too"), *[("one", "two")] * 3, None, None]
    assert "d.json:3 has no text column (looked for sentence1 and sentence2, " in found[-2].error
    assert "e.jsonl:1 holds no text in its column question2; fill it in" in found[-1].error
    named = read_items(
        [str(tmp_path / "b.csv")], modality="text", stdin=io.BytesIO(), num_texts=(2,), column="sentence2,id"
    )
    assert [item.raw for item in named] == [("two, too", "7")]


@pytest.mark.parametrize("to", ["merged", "peft"])
def test_load_py_of_an_export_gives_the_logits_of_pairs_and_single_texts_together(mixed, tmp_path, to):
    trained = open_trained(mixed, device="cpu")
    texts = [("the cat sings", "nobody is late"), "the whole choir laughs", ("my old neighbour buys bread " * 4, "no")]
    folder = export(mixed, to=to, target=tmp_path / to).folder
    assert json.loads((folder / "fedtalora.json").read_text())["num_texts"] == [1, 2]
    found = runpy.run_path(str(folder / "load.py"))["logits"](texts)
    wanted = trained.logits(trained.encode(texts))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max())))
    assert (wanted[0] - trained.logits(trained.encode([" ".join(texts[0])]))[0]).abs().max() > 1e-4  # a pair is no line


def test_load_py_takes_a_pair_with_a_tab_between_the_two(clustered, tmp_path):
    trained = open_trained(clustered, device="cpu", place=0)
    folder = export(clustered, to="merged", target=tmp_path / "merged", place=0).folder
    assert "Classify pairs of texts, with a tab between the two" in (folder / "load.py").read_text()
    card = (folder / "README.md").read_text()
    assert "with a tab between them" in card and "classes of join:text=follows.csv+text=same.csv, learnt" in card
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "load.py", "the cat sings\tnobody sings"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    best = trained.logits(trained.encode([("the cat sings", "nobody sings")])).argmax()
    assert done.stdout == f"{trained.class_names[best]}\tthe cat sings\tnobody sings\n"


def test_nodes_bring_tables_of_pairs_of_their_own(text_settings, tmp_path):
    rows = pairs(("yes", "no"), turned=False)
    for node in range(3):
        write(tmp_path / f"site{node}" / "follows" / "all.csv", ("premise", "hypothesis", "label"), rows[node::3])
    (tmp_path / "site1" / "mood").mkdir()
    (tmp_path / "site1" / "mood" / "up.txt").write_text("".join(f"{who} laughs\n" for who in SUBJECTS))
    (tmp_path / "site1" / "mood" / "down.txt").write_text("".join(f"{who} is late\n" for who in SUBJECTS))
    nodes = {"dataset": "nodes", "task_order": "given", "test_fraction": 0.3, "rounds_per_task": 1}
    out = tiny_run(tmp_path / "run", **text_settings | nodes, data_path=f"{tmp_path}/site{{partition-id}}")
    manifest = read(out, "manifest.json")
    assert manifest["class_names"] == ["no", "yes", "down", "up"] and manifest["num_texts"] == [1, 2]
    assert np.sum(manifest["class_counts"], axis=0)[:2].sum() > 25
    found = items(open_trained(out, device="cpu"), "the cat sings\tnobody sings\nthe cat laughs\n")
    assert [item.raw for item in found] == [("the cat sings", "nobody sings"), "the cat laughs"]
    named = {"input_column": "premise,hypothesis", "data_path": f"{tmp_path}/site{{partition-id}}/follows"}
    out = tiny_run(tmp_path / "named", **text_settings | nodes | named, num_tasks=1)
    assert read(out, "manifest.json")["num_texts"] == [2]
