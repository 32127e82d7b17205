"""What ``precision = auto`` takes on a CPU: the verdict on a trial, and that a machine has but one."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedtalora_flwr.model import precision
from fedtalora_flwr.model.precision import Verdict, judge, on_cpu, verdict_file

ROOT = Path(__file__).parents[1]
PRINTS = "import json; print(json.dumps({'speedup': %s, 'error': %s}))"


@pytest.fixture
def fresh(tmp_path, monkeypatch) -> Path:
    """A cache folder without an answer."""
    monkeypatch.setenv("FEDTALORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("code", "takes_bf16", "reason"),
    [
        (PRINTS % (2.04, 0.01), True, "bf16 is 2.0 times as fast as float32 here"),
        (PRINTS % (1.2, 0.01), True, "bf16 is 1.2 times as fast"),
        (PRINTS % (1.1, 0.01), False, "bf16 is 1.1 times as fast"),
        (PRINTS % (2.0, 0.3), False, "bf16 is off by 0.3 of a result's size here"),
        (PRINTS % (2.0, "float('nan')"), False, "bf16 is off by nan"),
        ("import os; os.kill(os.getpid(), 4)", False, "bf16 crashes here (signal 4)"),
        ("raise SystemExit(1)", False, "bf16 fails here"),
        ("import time; time.sleep(60)", False, "bf16 gave no answer in 1 s"),
    ],
)
def test_bf16_is_taken_where_its_trial_neither_faults_nor_hangs_nor_errs_and_gains(code, takes_bf16, reason):
    verdict = judge([sys.executable, "-c", code], limit_seconds=1.0 if "sleep" in code else 60.0)
    assert verdict.takes_bf16 == takes_bf16 and verdict.reason.startswith(reason)


def test_trial_on_this_cpu_gives_both_numbers_and_bf16_is_off_by_its_rounding_alone():
    ended = subprocess.run(
        [sys.executable, "-m", "fedtalora_flwr.model.trial"], cwd=ROOT, capture_output=True, check=True
    )
    found = json.loads(ended.stdout)
    assert found.keys() == {"speedup", "error"}
    assert found["speedup"] > 0 and 0 < found["error"] < 0.02


def test_verdict_is_kept_and_the_next_process_makes_no_trial(fresh, monkeypatch):
    monkeypatch.setattr(precision, "judge", lambda: Verdict(True, "as tried"))
    assert on_cpu() == Verdict(True, "as tried")
    assert [path.name for path in fresh.glob("*.json")] == [verdict_file().name]
    precision._known.cache_clear()  # as a new process begins
    monkeypatch.setattr(precision, "judge", lambda: pytest.fail("a second trial"))
    assert on_cpu() == Verdict(True, "as tried")


def test_processes_that_ask_at_once_make_one_trial_and_get_one_answer(fresh):
    code = """
import os, time
from fedtalora_flwr.model import precision
def judge():
    time.sleep(0.5)
    return precision.Verdict(True, f"tried by {os.getpid()}")
precision.judge = judge
print(precision.on_cpu().reason)
"""

    def ask(_: int) -> str:
        ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        return ended.stdout

    with ThreadPoolExecutor(4) as pool:
        answers = set(pool.map(ask, range(4)))
    assert len(answers) == 1 and answers.pop().startswith("tried by ")


def test_another_cpu_or_version_of_torch_is_tried_anew(fresh, monkeypatch):
    here = verdict_file()
    precision._cpu_and_torch.cache_clear()
    monkeypatch.setattr(precision.importlib.metadata, "version", lambda name: "9.9")
    try:
        assert verdict_file() != here and verdict_file().parent == here.parent == fresh
    finally:
        precision._cpu_and_torch.cache_clear()


@pytest.mark.parametrize("damage", ["", "{}", '{"takes_bf16": tr', "[1]"])
def test_damaged_answer_is_tried_anew(fresh, monkeypatch, damage):
    fresh.mkdir()
    verdict_file().write_text(damage)
    monkeypatch.setattr(precision, "judge", lambda: Verdict(True, "tried anew"))
    assert on_cpu() == Verdict(True, "tried anew")
    assert json.loads(verdict_file().read_text())["reason"] == "tried anew"


def test_machine_that_cannot_keep_the_answer_stays_in_float32_without_a_trial(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDTALORA_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(precision, "judge", lambda: pytest.fail("each process would come to its own"))
    verdict = on_cpu()
    assert not verdict.takes_bf16 and "cannot be kept" in verdict.reason and os.fspath(tmp_path) in verdict.reason
