"""Whole runs in this process, on the library's own grid: real messages and records, no Ray and no SuperLink."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from flwr.common.config import flatten_dict

from fedtalora_flwr.launch.in_process import ClientCall, LocalGrid

ROOT = Path(__file__).parents[1]


def defaults() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return flatten_dict(tomllib.load(file)["tool"]["flwr"]["app"]["config"])


def run_server(
    run_config: dict[str, Any],
    client: ClientCall | None = None,
    num_nodes: int | None = None,
    data_paths: Sequence[Path] = (),
) -> None:
    from client_app.app import app as client_app
    from server_app.app import app as server_app

    grid = LocalGrid(client or client_app, run_config, num_nodes, data_paths)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(run_config))
    server_app(grid, context)


TINY = {
    "num-tasks": 2,
    "max-per-class": 6,
    "num-clients": 3,
    "rounds-per-task": 2,
    "test-fraction": 0.2,
    "lora-blocks": "last:1",
    "batch-size": 8,
    "device": "cpu",
    "partition": "iid",
    "learning-rate": 0.01,
    "ridge-features": 30,
}


def tiny_run(out: Path, client: ClientCall | None = None, **changes: Any) -> Path:
    """Play a whole run of a few examples in this process, and give its folder."""
    settings = {key.replace("_", "-"): value for key, value in changes.items()}
    run_server(defaults() | TINY | {"out": str(out)} | settings, client)
    return out
