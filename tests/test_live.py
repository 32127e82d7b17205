"""The page of all runs, as a real server gives it, over run folders in every state."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from test_report import HOSTILE, rewrite_last_round, synthetic_run

from fedtalora_flwr.report.live import runs as live_runs
from fedtalora_flwr.report.live.prometheus import prometheus
from fedtalora_flwr.report.live.runs import Board, find_runs
from fedtalora_flwr.run_folder.writer import RunFolder

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
WAITING = {
    "phase": "training",
    "task_id": 1,
    "num_tasks": 3,
    "server_round": 5,
    "rounds_done": 4,
    "num_rounds": 9,
    "remaining_seconds": 25.0,
    "asked": [0, 1, 2, 3],
    "waiting": [1, 3],
}


def set_old(folder: Path, *, seconds: float) -> None:
    when = time.time() - seconds
    for file in folder.iterdir():
        os.utime(file, (when, when))


def say(folder: Path, **status: Any) -> Path:
    (folder / "status.json").write_text(json.dumps(status))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("lab") / "runs"
    finished = synthetic_run(root / "finished")
    (finished / "export" / "merged").mkdir(parents=True)
    for inner in ("config.json", "manifest.json"):  # an export is no run
        (finished / "export" / "merged" / inner).write_text("{}")
    synthetic_run(root / "a sweep" / "rank-8", rank=8)
    say(synthetic_run(root / "failed", stop_at_round=2), phase="failed", message=f"disk full {HOSTILE}")
    set_old(say(synthetic_run(root / "killed", stop_at_round=3), **WAITING), seconds=3600)
    (root / "broken").mkdir()
    for name in ("config.json", "status.json"):
        (root / "broken" / name).write_text("{")
    (root / "backbone").mkdir()
    (root / "backbone" / "config.json").write_text("{}")  # of a model: no run either
    running = say(synthetic_run(root / "running", stop_at_round=4), **WAITING, asked_at=time.time() - 100)
    set_old(running, seconds=3600)  # it is the lock that tells
    with RunFolder(running).only_ours():
        yield root


def serve(root: Path, *options: str) -> tuple["subprocess.Popen[str]", str]:
    """Start the command on a free port, and give it with the address that it prints."""
    program = [sys.executable, "-m", "fedtalora_flwr.cli.app", "serve", str(root), "--port", "0", *options]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.readline()
    return process, re.search(r"http://\S+", said)[0]  # type: ignore[index]


def end(process: "subprocess.Popen[str]") -> int:
    process.send_signal(signal.SIGINT)
    try:
        return process.wait(timeout=60)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def page(runs) -> Iterator[httpx.Client]:
    before = sorted(path for path in runs.rglob("*"))
    process, address = serve(runs)
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client
    assert end(process) in (0, 130)
    assert sorted(path for path in runs.rglob("*")) == before  # nothing is written


def test_all_runs_below_the_folder_are_listed_with_their_state_and_nothing_else(page):
    found = page.get("/api/runs").json()["runs"]
    assert {run["name"]: run["state"] for run in found} == {
        "running": "running",
        "finished": "finished",
        "a sweep/rank-8": "finished",
        "failed": "failed",
        "killed": "silent",
        "broken": "unreadable",
    }
    assert found[0]["name"] == "running"


def test_a_running_run_says_who_trains_who_is_late_and_how_far_it_is(page, runs):
    (run,) = (one for one in page.get("/api/runs").json()["runs"] if one["state"] == "running")
    lines = [json.loads(line) for line in (runs / "running" / "rounds.jsonl").read_text().splitlines()]
    assert (run["task"], run["num_tasks"], run["round"], run["num_rounds"]) == (2, 3, 5, 9)
    assert run["asked"] == [0, 1, 2, 3] and run["waiting"] == [1, 3]
    assert run["late"] == [1, 3] and run["waited_seconds"] == pytest.approx(100, abs=60)  # a wait is about 3 s here
    assert run["mean_loss"] == lines[-1]["mean_loss"] and run["remaining_seconds"] == 25
    assert run["losses"] == [[line["server_round"], line["mean_loss"]] for line in lines]
    assert [point[0] for point in run["accuracies"]] == [3]  # a task's last round
    assert run["bytes_up"] == sum(line["bytes_up"] for line in lines)


def test_a_finished_run_has_the_numbers_of_its_metrics_and_a_failed_one_its_reason(page, runs):
    found = {run["name"]: run for run in page.get("/api/runs").json()["runs"]}
    metrics = json.loads((runs / "finished" / "metrics.json").read_text())
    assert found["finished"]["accuracy"] == metrics["faa"] and found["finished"]["asked"] == []
    assert "disk full" in found["failed"]["message"]
    assert "config.json is not JSON" in found["broken"]["message"]
    assert found["killed"]["waiting"] == []  # its status.json says otherwise for ever


def test_the_page_loads_its_own_files_alone_and_is_told_to(page):
    answer = page.get("/")
    assert answer.status_code == 200 and "default-src 'none'" in answer.headers["content-security-policy"]
    assert re.findall(r'(?:src|href)="([^"]*)"', answer.text) == ["live.js", "api/runs"]
    script = page.get("/live.js")
    assert script.headers["content-type"].startswith("text/javascript")
    assert set(re.findall(r"https?://[^\"'\s]+", answer.text + script.text)) == {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in script.text  # names of classes and reasons of clients are strangers' words


@pytest.mark.skipif(BROWSER is None, reason="no Chromium to show the page in")
def test_a_browser_shows_who_is_late_and_strangers_words_as_words(page, tmp_path):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    program = [str(BROWSER), *flags, f"--user-data-dir={tmp_path}", str(page.base_url)]
    shown = subprocess.run(program, capture_output=True, text=True, timeout=300).stdout
    assert re.search(r'class="late"[^>]*>client 3 late<', shown) and re.search(r'class="done"[^>]*>client 0 ✓<', shown)
    assert "2 of 3" in shown and "waits for 2 of 4 clients" in shown and "a sweep/rank-8" in shown
    assert "disk full &lt;script&gt;" in shown and "no answer" not in shown


def test_reports_and_comparisons_are_made_as_they_are_asked_for(page):
    for name in ("finished", "running", "a sweep/rank-8"):
        report = page.get("/report", params={"run": name})
        assert report.status_code == 200 and report.text.count("<svg") >= 5, name
    both = page.get("/compare", params={"run": ["finished", "a sweep/rank-8"]})
    assert both.status_code == 200 and "<th>rank</th>" in both.text and "<script" not in both.text
    other = page.get("/report", params={"run": "broken"})
    assert other.status_code == 500 and "is not JSON" in other.text


@pytest.mark.parametrize(
    "path",
    ["/report?run=../runs/finished", "/report?run=/etc", "/report", "/compare?run=finished", "/compare?run=x&run=y"],
)
def test_what_is_no_run_of_the_list_is_not_found(page, path):
    assert page.get(path).status_code == 404


def test_it_can_only_be_read(page):
    assert {page.request(method, "/api/runs").status_code for method in ("POST", "PUT", "DELETE")} == {405}


def test_without_a_token_it_answers_to_the_names_of_this_machine_alone(page):
    for name, status in (("localhost", 200), ("127.0.0.1:9", 200), ("evil.example", 400), ("evil.example:80", 400)):
        assert page.get("/api/runs", headers={"host": name}).status_code == status, name


def test_prometheus_gets_a_sample_a_run_of_every_number(page, runs):
    answer = page.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'fedtalora_run_state{run="running",state="running"} 1' in answer.text
    assert 'fedtalora_run_state{run="killed",state="running"} 0' in answer.text
    assert 'fedtalora_run_late_clients{run="running"} 2' in answer.text
    faa = json.loads((runs / "finished" / "metrics.json").read_text())["faa"]
    found = re.search(r'fedtalora_run_accuracy\{run="finished"\} (\S+)', answer.text)
    assert found and float(found[1]) == faa
    for line in answer.text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) fedtalora_\w+ .+|fedtalora_\w+\{(\w+="[^"]*",?)+\} [-+.e\d]+', line), line


def test_a_name_cannot_break_out_of_its_label():
    run = {"name": 'a"\n\\', "state": "failed", "last_word": 1.0, "asked": [], "waiting": [], "late": []}
    assert r'fedtalora_run_last_word_timestamp_seconds{run="a\"\n\\"} 1' in prometheus([run]).splitlines()


def test_elsewhere_than_on_loopback_it_asks_for_a_token(runs):
    process, address = serve(runs, "--host", "0.0.0.0")
    try:
        bare, token = address.replace("0.0.0.0", "127.0.0.1").split("?token=")
        assert len(token) >= 20
        with httpx.Client(base_url=bare) as client:
            assert client.get("/api/runs").status_code == client.get("/?token=wrong").status_code == 401
            assert client.get("/metrics", headers={"authorization": f"Bearer {token}"}).status_code == 200
            assert client.get("/api/runs").status_code == 401
            shown = client.get(f"/compare?run=a&token={token}")
            assert shown.status_code == 303 and shown.headers["location"] == "/compare?run=a"  # not left in the address
            assert {"HttpOnly", "SameSite=strict"} <= set(shown.headers["set-cookie"].split("; "))
            assert client.get("/api/runs").status_code == 200
    finally:
        end(process)


def test_a_folder_that_is_not_there_and_a_port_that_is_taken_are_told(tmp_path, page):
    for given, words in (
        ([tmp_path / "no"], f"{tmp_path / 'no'} is no folder; give the one that holds the runs"),
        ([tmp_path, "--port", page.base_url.port], "cannot listen on 127.0.0.1 port"),
    ):
        program = [sys.executable, "-m", "fedtalora_flwr.cli.app", "serve", *map(str, given)]
        done = subprocess.run(program, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and words in done.stderr


def test_a_run_that_goes_on_is_read_again_and_one_that_does_not_is_not(tmp_path, monkeypatch):
    folder = synthetic_run(tmp_path / "runs" / "one", stop_at_round=4)
    set_old(folder, seconds=3600)
    board, times, reads = Board(tmp_path / "runs"), [], live_runs.read_run
    monkeypatch.setattr(live_runs, "read_run", lambda path: times.append(path) or reads(path))
    assert [board.summaries()[0]["rounds_done"] for _ in range(2)] == [4, 4]
    assert len(times) == 1
    rewrite_last_round(folder, mean_loss=0.125, accuracy_seen=0.5)
    assert board.summaries()[0]["mean_loss"] == 0.125 and len(times) == 2


def test_a_single_run_and_runs_four_deep_are_found(tmp_path):
    deep = synthetic_run(tmp_path / "a" / "b" / "c" / "d")
    synthetic_run(tmp_path / "a" / "b" / "c" / "x" / "e")
    synthetic_run(tmp_path / ".hidden" / "f")
    assert find_runs(tmp_path) == [deep]
    assert Board(deep).summaries()[0]["name"] == "d"
