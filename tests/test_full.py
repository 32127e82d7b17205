"""Slow, full-size checks on the data sets at hand (make test-full)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
