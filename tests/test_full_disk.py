"""A full disk under the checkpoint: a clear error, the last good checkpoint whole, and a run that goes on from it."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message
from local_grid import tiny_run

from client_app.app import app as client_app
from fedtalora_flwr.run_folder import checkpoint
from fedtalora_flwr.server.failures import RunFailed

SETTINGS = {"lora_targets": "proj", "head": "linear"}
ROOM = 100_000  # bytes that are left: enough for a line of the log, not for a checkpoint


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes; needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # a checkpoint that was read may still be mapped


def result(out: Path) -> tuple[Any, bytes]:
    """The accuracies and the state that a run ends with."""
    matrix = json.loads((out / "metrics.json").read_text())["accuracy_matrix"]
    return matrix, next((out / "checkpoint").glob("*.safetensors")).read_bytes()


def test_full_disk_ends_the_run_with_a_clear_error_and_it_goes_on_to_the_same_bits(disk: Path, tmp_path: Path) -> None:
    ballast, out = disk / "ballast", disk / "run"

    def client(message: Message, context: Context) -> Message:
        if message.metadata.group_id == "3" and not ballast.exists():
            ballast.write_bytes(bytes(shutil.disk_usage(disk).free - ROOM))
        return client_app(message, context)

    with pytest.raises(RunFailed) as failed:
        tiny_run(out, client, **SETTINGS)
    message = str(failed.value)
    assert f"round 3 cannot be written to {out}" in message and "No space left on device" in message
    assert message.endswith("the checkpoint of round 2 is whole. Make room, and go on with resume=true")
    assert checkpoint.load(out / "checkpoint").server_round == 2
    assert not list(out.rglob("*.part"))
    ballast.unlink()
    tiny_run(out, **SETTINGS, resume=True)
    assert result(out) == result(tiny_run(tmp_path / "undisturbed", **SETTINGS))
    numbers = [json.loads(line)["server_round"] for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert numbers == [1, 2, 3, 4]
