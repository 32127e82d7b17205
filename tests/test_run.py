"""`fedtalora run` as a user runs it: its own SuperLink, Ray, several processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import psutil
import pytest

pytestmark = pytest.mark.ray

SMALL = [
    "num-tasks=5", "stop-after-task=2", "num-clients=3", "rounds-per-task=2", "max-per-class=8", "lora-blocks=last:2",
    "head=ridge", "verify=true",
]  # fmt: skip


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [Path(sys.executable).parent / "fedtalora", "run", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    return output


def settings(*extra: str) -> list[str]:
    return [word for pair in [*SMALL, *extra] for word in ("--set", pair)]


def metrics(folder: Path) -> dict[str, object]:
    values: dict[str, object] = json.loads((folder / "metrics.json").read_text())
    del values["wall_seconds"]
    return values


def state(folder: Path) -> bytes:
    return next((folder / "checkpoint").glob("*.safetensors")).read_bytes()


def rounds(folder: Path) -> list[dict[str, object]]:
    return [
        json.loads(text) | {"seconds": {}, "crc32": 0} for text in (folder / "rounds.jsonl").read_text().splitlines()
    ]


def family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def wait_until(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start("--out", folder, *settings())
    return folder, finish(process), process.returncode


def test_a_run_completes_and_writes_what_the_contract_names(undisturbed: tuple[Path, str, int]) -> None:
    folder, output, status = undisturbed
    assert status == 0, output
    for name in ("config.json", "manifest.json", "rounds.jsonl", "metrics.json", "report.html", "checkpoint"):
        assert (folder / name).exists(), name
    assert str(folder / "report.html") in output
    assert "FAA" in output
    assert len((folder / "rounds.jsonl").read_text().splitlines()) == 4


def test_aggregation_in_a_real_run_is_exact(undisturbed: tuple[Path, str, int]) -> None:
    folder, _, _ = undisturbed
    lines = [json.loads(text) for text in (folder / "rounds.jsonl").read_text().splitlines()]
    assert max(line["exactness_error"] for line in lines) < 1e-6
    assert lines[-1]["residual_norm"] > 0


def test_a_run_in_one_process_has_the_numbers_of_the_simulation_bit_for_bit(
    undisturbed: tuple[Path, str, int], tmp_path: Path
) -> None:
    process = start("--engine", "process", "--out", tmp_path / "run", *settings())
    output = finish(process)
    assert process.returncode == 0, output
    assert metrics(tmp_path / "run") == metrics(undisturbed[0])
    assert state(tmp_path / "run") == state(undisturbed[0])
    assert rounds(tmp_path / "run") == rounds(undisturbed[0])


def test_a_run_in_one_process_opens_no_port(tmp_path: Path) -> None:
    process, seen = start("--engine", "process", "--out", tmp_path / "run", *settings()), []
    while process.poll() is None:
        for each in family(psutil.Process(process.pid)):
            with contextlib.suppress(psutil.Error):  # it ended while we looked
                seen += [s.laddr for s in each.net_connections("inet") if s.status == psutil.CONN_LISTEN]
        time.sleep(0.05)
    assert process.returncode == 0, finish(process)
    assert (tmp_path / "run" / "metrics.json").exists() and seen == []


def test_a_run_in_one_process_that_fails_says_why_and_needs_no_ray(tmp_path: Path) -> None:
    process = start("--engine", "process", "--out", tmp_path / "run", *settings("lora-blocks=4-9"))
    output = finish(process)
    assert process.returncode == 1
    assert "lora-blocks '4-9': 4-9 is out of range, blocks are 0-5" in output
    refused = start("--engine", "process", "--cpus", "1")
    assert "--engine process has no Ray" in finish(refused) and refused.returncode == 2


def test_a_run_killed_in_the_middle_of_a_round_resumes_to_the_same_metrics(
    undisturbed: tuple[Path, str, int], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = start("--out", folder, *settings())
    log = folder / "rounds.jsonl"
    assert wait_until(lambda: log.exists() and log.read_text().count("\n") >= 3, 200)
    keeper = next(p for p in psutil.process_iter(["cmdline"]) if _keeps_for(p, process.pid))
    everyone = family(keeper)
    for victim in everyone[1:]:  # the ServerApp's process and Ray's workers at once, then the command itself
        if "flwr-simulation" in " ".join(_command(victim)):
            victim.send_signal(signal.SIGKILL)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    assert wait_until(lambda: not any(p.is_running() and p.status() != "zombie" for p in everyone), 60)
    assert not (folder / "metrics.json").exists()
    resumed = start("--resume", folder)
    output = finish(resumed)
    assert resumed.returncode == 0, output
    assert metrics(folder) == metrics(undisturbed[0])
    assert [line["server_round"] for line in rounds(folder)] == [1, 2, 3, 4]


@pytest.mark.full  # the same in one process is quicker, and above
def test_a_run_that_cannot_start_training_fails_with_what_to_change(tmp_path: Path) -> None:
    process = start("--out", tmp_path / "run", *settings("lora-blocks=4-9"))
    output = finish(process)
    assert process.returncode == 1
    assert "lora-blocks '4-9': 4-9 is out of range, blocks are 0-5" in output


@pytest.mark.full
def test_a_clients_error_is_told_in_its_own_words_and_traced_in_the_log(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (4, 10, 32, 32, 3), dtype=np.uint8)
    for label, images in enumerate(noise):
        for split in ("train", "test"):
            folder = tmp_path / "patients" / split / f"class {label}"
            folder.mkdir(parents=True)
            for number, image in enumerate(images):
                PIL.Image.fromarray(image).save(folder / f"{number}.png")
    broken = tmp_path / "patients" / "train" / "class 2" / "7.png"
    broken.write_bytes(b"no image")
    data = ["dataset=imagefolder", f"data-path={tmp_path / 'patients'}", "num-tasks=2", "num-clients=2"]
    process = start("--out", tmp_path / "run", *(word for pair in data for word in ("--set", pair)))
    output = finish(process)
    assert process.returncode == 1
    assert "image 7.png cannot be decoded as an image (cannot identify image file '7.png')" in output
    assert "Traceback" not in output
    assert "patients" not in output
    assert f"DataError: image {broken}" in (tmp_path / "run" / "logs" / "flwr-run.log").read_text()


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _keeps_for(process: psutil.Process, pid: int) -> bool:
    try:
        return any(word.endswith("supervisor.py") for word in _command(process)) and process.ppid() == pid
    except psutil.Error:
        return False
