"""Measure what a round of a deployment costs beyond its training: with cold nodes, with warm ones, with empty messages.

A SuperLink and three SuperNodes on this machine play rounds of CLINC150 (MiniLM, its preset) with a few sentences for
each node. The last row is an app whose messages hold nothing and whose nodes do nothing: what Flower itself takes.
The first round, in which a warm node loads, is left out.

- round: from the first message's departure to the new state; the evaluation and the checkpoint after it are left out.
- CPU of a message: user and system time of all processes of its node but the SuperNode.

Usage: python benchmarks/round_floor.py [--rounds 6] [--per-class 6] [--sides cold warm empty] [--json FILE]
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fedtalora_flwr.config.sources import app_folder, gather

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from deployment import COMPLETED, Deployment, Part  # noqa: E402

EMPTY_APP = ROOT / "benchmarks" / "empty_app"
SIDES = ("cold", "warm", "empty")
NODES = 3
RUN_SECONDS = 900.0


@dataclass(frozen=True)
class Floor:
    """Of the rounds after the first: seconds of each, and CPU seconds of a message on average."""

    round_seconds: list[float]
    cpu_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="of each side; the first is left out")
    parser.add_argument("--per-class", type=int, default=6, help="sentences of each of the task's 15 intents")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    settings = benchmark_settings(rounds=arguments.rounds, per_class=arguments.per_class)
    empty = {"num-rounds": arguments.rounds, "num-clients": NODES}
    apps = {"cold": (app_folder(), settings), "warm": (app_folder(), settings), "empty": (EMPTY_APP, empty)}
    print(f"{'':8}round: median (s)   range (s)     CPU of a message (s)")
    floors = {}
    for side in arguments.sides:
        floor = floors[side] = play(*apps[side], node_config="warm=true" if side == "warm" else "")
        low, high = min(floor.round_seconds), max(floor.round_seconds)
        median = statistics.median(floor.round_seconds)
        print(f"{side:8}{median:17.2f}   {low:.2f}-{high:5.2f}   {floor.cpu_seconds:20.2f}", flush=True)
    if arguments.json:
        figures = {side: vars(floor) for side, floor in floors.items()}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def benchmark_settings(*, rounds: int, per_class: int) -> dict[str, Any]:
    """Give the settings of a run: the preset's first task with little to train on."""
    app = app_folder()
    settings = gather(app, file=app / "experiments" / "clinc150.toml", assignments=[])
    return settings | {
        "num-clients": NODES,
        "stop-after-task": 1,
        "partition": "iid",
        "max-per-class": per_class,
        "rounds-per-task": rounds,
        "head": "linear",
        "threads": 1,
        "device": "cpu",
        "node-timeout": 120.0,
    }


def play(app: Path, settings: Mapping[str, Any], *, node_config: str) -> Floor:
    """Play a run on a deployment of its own."""
    with tempfile.TemporaryDirectory(prefix="floor-") as name:
        folder = Path(name)
        env = {"FEDTALORA_CACHE": str(folder / "cache")}
        with Deployment(folder / "lab", num_nodes=NODES, node_config=node_config, env=env) as lab:
            run_id = lab.submit(app, {**settings, "out": str(folder)})
            spent = []  # CPU seconds of all nodes, at the end of each round
            while lab.running(run_id):
                if len(rounds := _rounds(folder)) > len(spent):
                    spent += [sum(map(_cpu_seconds, lab.nodes))] * (len(rounds) - len(spent))
                time.sleep(0.05)
            outcome = lab.outcome(run_id, seconds=RUN_SECONDS)
        if outcome.status != COMPLETED:
            raise SystemExit(f"the run failed: {outcome.details}\n{lab.tails()}")
        seconds = [line["seconds"]["total"] - line["seconds"]["evaluate"] for line in _rounds(folder)]
        return Floor(seconds[1:], (spent[-1] - spent[0]) / (len(spent) - 1) / NODES)


def _rounds(folder: Path) -> list[dict[str, Any]]:
    file = folder / "rounds.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _cpu_seconds(node: Part) -> float:
    """Sum what the node's processes have used so far, those that have ended included, its SuperNode left aside."""
    home, total = node.env["FLWR_HOME"], 0.0
    below = psutil.Process(node.pid).children(recursive=True)
    apart = [p for p in psutil.process_iter(["cmdline"]) if f"{home}/warm/" in " ".join(p.info["cmdline"] or [])]
    for process in {*below, *apart}:
        try:
            used = process.cpu_times()
        except psutil.NoSuchProcess:
            continue  # it ended while we looked; its parent has its time
        total += used.user + used.system + used.children_user + used.children_system
    return total


if __name__ == "__main__":
    main()
