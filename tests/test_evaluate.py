"""A run's model on labelled data of one's own: the same figures as the run's, whatever the data lie in."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from phrases import DEVICES, PHRASES
from PIL import Image
from typer.testing import CliRunner

from fedtalora_flwr.cli.app import cli
from fedtalora_flwr.data import DataError
from fedtalora_flwr.inference.evaluation import evaluate, read_labelled
from fedtalora_flwr.inference.model import open_trained
from fedtalora_flwr.inference.predict import InputError
from fedtalora_flwr.metrics.judged import of_clients
from fedtalora_flwr.model.session import data_of
from fedtalora_flwr.report import read_run, write_evaluation
from fedtalora_flwr.report.page import report_page


@pytest.fixture(scope="module")
def trained(digits_run):
    return open_trained(digits_run, device="cpu")


@pytest.fixture(scope="module")
def test_folder(trained, tmp_path_factory):
    """The run's own test images as files, a subfolder a class."""
    folder, source = tmp_path_factory.mktemp("held-out"), data_of(trained.config).source
    labels = source.test.labels
    for row, image in enumerate(source.test.read(np.arange(len(labels)))):
        (folder / source.class_names[labels[row]]).mkdir(exist_ok=True)
        image.save(folder / source.class_names[labels[row]] / f"{row}.png")
    return folder


def figures(path: Path, trained, **columns):
    return evaluate(trained, read_labelled(path, trained, **columns)).to_json()


def test_the_runs_own_test_data_as_files_give_the_figures_of_the_run(digits_run, trained, test_folder):
    run = json.loads((digits_run / "metrics.json").read_text())["evaluation"]
    found = figures(test_folder, trained)
    assert found["confusion"] == run["confusion"] and found["num_examples"] == run["num_examples"] > 100
    for key in ("accuracy", "macro_f1", "balanced_accuracy", "classes", "confusions"):
        assert found[key] == run[key]
    assert found["ece"] == pytest.approx(run["ece"], abs=1e-5)
    assert found["left_out"] == {} and found["unread"] == []


def test_classes_that_the_model_does_not_know_are_left_out_and_counted(trained, test_folder, tmp_path):
    (tmp_path / "7").symlink_to(test_folder / "7")
    (tmp_path / "eleven").mkdir()
    for number in range(3):
        Image.new("L", (8, 8), number).save(tmp_path / "eleven" / f"{number}.png")
    found = figures(tmp_path, trained)
    assert found["left_out"] == {"eleven": 3}
    assert found["num_examples"] == len(list((test_folder / "7").iterdir()))
    assert [one["class"] for one in found["classes"] if one["num_examples"]] == ["7"]
    (tmp_path / "7").unlink()
    with pytest.raises(InputError, match=r"knows none of the classes there \(eleven\); it knows 0, 1, 2, 3, 4, \.\.\."):
        figures(tmp_path, trained)


def test_a_file_that_cannot_be_read_is_told_and_the_others_are_scored(trained, tmp_path):
    (tmp_path / "3").mkdir()
    Image.new("L", (8, 8), 5).save(tmp_path / "3" / "good.png")
    (tmp_path / "3" / "bad.png").write_text("no picture")
    found = figures(tmp_path, trained)
    assert found["num_examples"] == 1
    assert re.search(r"bad\.png cannot be decoded", *found["unread"])


def sentences(path: Path, *, header=("text", "label")) -> Path:
    with path.open("w", newline="") as file:
        rows = [(phrase.format(name), name) for name in DEVICES for phrase in PHRASES]
        csv.writer(file).writerows([header, *rows])
    return path


def test_a_table_and_a_folder_of_texts_give_the_same(text_run, tmp_path):
    of_texts = open_trained(text_run, device="cpu")
    table = figures(sentences(tmp_path / "all.csv"), of_texts)
    assert table["num_examples"] == len(DEVICES) * len(PHRASES)
    (tmp_path / "folder").mkdir()
    for name in DEVICES:
        (tmp_path / "folder" / f"{name}.txt").write_text("\n".join(phrase.format(name) for phrase in PHRASES))
    assert figures(tmp_path / "folder", of_texts) == table
    other = sentences(tmp_path / "other.csv", header=("said", "meant"))
    assert figures(other, of_texts, input_column="said", label_column="meant") == table


def test_data_of_another_kind_or_none_are_refused_with_what_to_do(trained, tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such file or folder; give a folder with a subfolder a class"):
        figures(tmp_path / "nowhere", trained)
    with pytest.raises(InputError, match=r"all\.csv holds texts, the run's model takes images"):
        figures(sentences(tmp_path / "all.csv"), trained)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty holds no example"):
        figures(tmp_path / "empty", trained)
    with pytest.raises(DataError, match=r"column 'kind'.*no such column"):
        figures(tmp_path / "all.csv", trained, label_column="kind")


def test_the_command_prints_the_figures_and_writes_them(digits_run, test_folder, tmp_path):
    out = tmp_path / "seen" / "figures.json"
    call = ["evaluate", str(digits_run), str(test_folder), "--device", "cpu", "--out"]
    done = CliRunner().invoke(cli, [*call, str(out)])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    for words in (
        "Macro F1",
        f"{100 * found['macro_f1']:.1f} %",
        f"{100 * found['ece']:.1f} %",
        "taken for each other",
    ):
        assert words in done.output
    assert found["server_round"] == 4 and found["data"] == str(test_folder)
    assert CliRunner().invoke(cli, [*call, "figures.pdf"]).exit_code == 2


def test_the_page_of_an_evaluation_shows_names_as_text_and_loads_nothing(tmp_path):
    evil = "<script>alert(1)</script>"
    found = {
        "num_examples": 3,
        "accuracy": 2 / 3,
        "classes": [
            {"class": evil, "num_examples": 3, "accuracy": 2 / 3, "precision": 1.0, "f1": 0.8},
            {"class": "rare", "num_examples": 0},
        ],
        "confusions": [{"class": evil, "taken_for": "rare", "num_examples": 1}],
        "confusion": [[2, 1], [0, 0]],
        "calibration": [{"up_to": 0.6, "num_examples": 3, "confidence": 0.55, "accuracy": 2 / 3}],
        "left_out": {"new": 4},
    }
    page = write_evaluation(tmp_path / "page.html", found, title=evil, subtitle="").read_text()
    assert "<script" not in page and page.count("<svg") == 3
    assert "new (4)" in page and "in no mean: rare" in page


def test_the_report_of_a_run_shows_them(digits_run):
    page = report_page(read_run(digits_run))
    found = json.loads((digits_run / "metrics.json").read_text())["evaluation"]
    assert f"<b>{100 * found['balanced_accuracy']:.1f} %</b>" in page
    for title in (
        "Accuracy on each class",
        "What is taken for what",
        "How sure, and how often right",
        "for each client",
    ):
        assert title in page


def test_a_report_of_data_that_stay_on_nodes_says_what_is_not_known(digits_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(digits_run, run)
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["evaluation"] = of_clients({0: (3, 4), 1: (1, 4)})
    (run / "metrics.json").write_text(json.dumps(metrics))
    page = report_page(read_run(run))
    assert "is not known here" in page and "Macro F1" not in page and "holds out itself" in page
