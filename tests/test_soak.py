"""Three hundred rounds with clients that come, go and lose their cache: memory and disk stay where they are."""

import json
from pathlib import Path

import numpy as np
import psutil
import pytest
from flwr.app import Context, Message
from local_grid import defaults, run_server

from client_app.app import app as run_client
from fedtalora_flwr.client.versions import _version_store, version_store
from fedtalora_flwr.config import RunConfig

NUM_ROUNDS, WARM_UP = 300, 60
SETTINGS = {
    "num-tasks": 2,
    "rounds-per-task": NUM_ROUNDS // 2,
    "num-clients": 8,
    "fraction-train": 0.7,
    "max-per-class": 4,
    "lora-blocks": "last:1",
    "lora-targets": "proj",
    "partition": "iid",
    "head": "linear",
    "test-fraction": 0.02,
    "device": "cpu",
    "verify": True,
    "base-cache-gb": 0.0,
}


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_memory_and_disk_stay_bounded_over_three_hundred_rounds_with_drop_outs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDTALORA_CACHE", str(tmp_path / "cache"))
    _version_store.cache_clear()
    rng, memory, disk = np.random.default_rng(0), [], []
    config = RunConfig.parse(defaults() | SETTINGS)

    def client(message: Message, context: Context) -> Message | None:
        if message.metadata.message_type == "train":
            fate = rng.random()
            if fate < 0.05:
                raise RuntimeError("the power is out")
            if fate < 0.08:
                return None
            if fate < 0.2:
                _version_store.cache_clear()  # the process restarts
            if fate < 0.14:
                for path in version_store(config).folder.glob("*.safetensors"):
                    path.unlink()  # and its disk was replaced
            memory.append(psutil.Process().memory_info().rss)
            disk.append(sum(path.stat().st_size for path in version_store(config).folder.glob("*")))
        return run_client(message, context)

    run_server(defaults() | SETTINGS | {"out": str(tmp_path)}, client)
    lines = [json.loads(text) for text in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert len(lines) == NUM_ROUNDS
    assert sum(len(line["failures"]) for line in lines) > NUM_ROUNDS / 5
    assert sum(len(line.get("resent", [])) for line in lines) > 5
    assert max(line["exactness_error"] for line in lines) < 1e-6
    early, late = max(memory[: 3 * WARM_UP]), max(memory[-3 * WARM_UP :])
    assert late < early + 50 * 2**20
    dense = 192 * 192 * 4
    assert max(disk) < 3 * (dense + 1000)
    assert len(list((tmp_path / "checkpoint").glob("round-*"))) == 1
