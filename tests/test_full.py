"""Slow, full-size checks on the data sets at hand (make test-full)."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.inference.export import export
from fedtalora_flwr.inference.model import open_trained
from fedtalora_flwr.model.session import data_of

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("FEDTALORA_DATA", ROOT.parent / "shared" / "data"))

pytestmark = [pytest.mark.full, pytest.mark.ray, pytest.mark.timeout(1800)]


def finished(folder: Path, *options: str) -> dict:
    command = [Path(sys.executable).parent / "fedtalora", "run", "--out", folder, *options]
    environment = {**os.environ, "FEDTALORA_DATA": str(DATA), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "metrics.json").read_text())


def needs(name: str) -> None:
    if not (DATA / name).is_dir():
        pytest.skip(f"no {name} below {DATA}; set FEDTALORA_DATA")


def test_demo_learns_all_ten_digits(tmp_path):
    metrics = finished(tmp_path / "run")
    assert metrics["faa"] > 0.85


def test_the_documented_snippet_classifies_with_the_export_of_the_demos_run_as_it_is(tmp_path):
    finished(tmp_path / "runs" / "digits", "--engine", "process")
    trained = open_trained(export(tmp_path / "runs" / "digits", to="merged").folder.parents[1], device="cpu")
    snippet = re.search(r"```python\n(import runpy.*?)```", (ROOT / "docs" / "EXPORT.md").read_text(), re.S)[1]
    for row, image in enumerate(data_of(trained.config).source.test.read(np.arange(5))):
        image.save(tmp_path / "scan.png")
        code = "import sys; sys.modules['fedtalora_flwr'] = None\n" + snippet
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        wanted = trained.class_names[int(trained.logits(trained.encode([image])).argmax())]
        assert done.stdout.strip() == wanted, (row, done.stderr)


@pytest.mark.parametrize("name", ["clinc150", "tiny-imagenet"])
def test_exports_give_the_logits_of_a_real_run_on_two_hundred_real_test_samples(name, tmp_path, monkeypatch):
    needs(name)
    monkeypatch.setenv("FEDTALORA_DATA", str(DATA))
    short = ["--set", "stop-after-task=2", "--set", "max-per-class=20", "--engine", "process"]
    finished(tmp_path / "run", "--preset", name, *short)
    worst = export_differences(tmp_path / "run")
    print(f"{name}: largest difference of a logit {worst}")  # shown by pytest -s
    assert max(worst.values()) <= 1e-5


def export_differences(run: Path) -> dict[str, float]:
    """Export a run as both kinds; the largest difference of a logit on test samples of the classes it knows."""
    trained = open_trained(run, device="cpu")
    config = RunConfig.parse(json.loads((run / "config.json").read_text()))
    test = data_of(config).source.test
    known = np.flatnonzero(np.isin(test.labels, trained.classes))
    raw = test.read(known[np.linspace(0, len(known) - 1, 200).astype(int)])
    wanted = trained.logits(trained.encode(raw))
    assert wanted.abs().max() > 0.1
    differences = {}
    for to in ("merged", "peft"):
        logits = runpy.run_path(str(export(run, to=to).folder / "load.py"))["logits"]
        differences[to] = float((logits(raw) - wanted).abs().max())
    return differences


def test_clinc150_ends_above_a_frozen_encoder_with_a_plain_ridge_head(tmp_path):
    needs("clinc150")
    metrics = finished(tmp_path / "run", "--preset", "clinc150")
    assert metrics["faa"] > 0.91


def test_slice_of_tiny_imagenet_is_learnt_far_above_chance(tmp_path):
    needs("tiny-imagenet")
    short = ["--set", "stop-after-task=2", "--set", "max-per-class=60", "--set", "verify=true"]
    metrics = finished(tmp_path / "run", "--preset", "tiny-imagenet", *short)
    assert metrics["accuracy_seen"][1] > 0.3  # 20 classes: chance is .05
    lines = [json.loads(text) for text in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert max(line["exactness_error"] for line in lines) < 1e-6


def test_fl_tac_finds_the_domains_of_clinc150_from_the_second_round_on(tmp_path):
    needs("clinc150")
    finished(tmp_path / "run", "--preset", "clinc150-fl-tac", "--set", "rounds-per-task=3", "--set", "eval-every=0")
    lines = [json.loads(text) for text in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert min(line["cluster_accuracy"] for line in lines[1:]) >= 0.95
    assert lines[-1]["routing_accuracy"] > 0.9
