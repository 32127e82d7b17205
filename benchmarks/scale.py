"""Measure what many virtual clients cost on one machine: memory over the rounds, and seconds a round.

Plays the first task of Tiny-ImageNet's novel classes (`vit_mini`, LoRA of rank 4 on three blocks, the demo's optimiser)
with the clients given, of which a fraction takes part in a round, and follows the run's whole tree of processes:
server, SuperLink, Ray and its actors. Memory is the sum of their proportional set sizes (pages that processes share are
counted once). That of the first third of the rounds stands beside that of the last, which shows a leak.

Usage: python benchmarks/scale.py [--clients 100 1000] [--fractions 1.0 0.01] [--rounds 6] [--cpus 2] [--json FILE]
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import psutil
import tomli_w

from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.config.sources import app_folder, gather
from fedtalora_flwr.launch.simulation import launch

SAMPLE_SECONDS = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--fractions", type=float, nargs="+", default=[1.0, 0.01], help="of each number of clients")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    print("clients  a round   hello (s)   first round (s)   later rounds (s)   memory early   memory late   MB down/up")
    cells = []
    for clients, fraction in zip(arguments.clients, arguments.fractions, strict=True):
        cell = play(benchmark_config(clients, fraction, rounds=arguments.rounds), cpus=arguments.cpus)
        cells.append({"clients": clients, "fraction": fraction, **cell})
        early, late = (f"{cell[key] / 2**30:.2f} GiB" for key in ("early_bytes", "late_bytes"))
        print(
            f"{clients:7}  {cell['participants']:7}   {cell['hello_seconds']:9.1f}   {cell['round_seconds'][0]:15.2f}"
            f"   {statistics.median(cell['round_seconds'][1:]):16.2f}   {early:>12}   {late:>11}"
            f"   {cell['bytes_down'] / 1e6:.1f}/{cell['bytes_up'] / 1e6:.1f}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"cpus": arguments.cpus, "cells": cells}, indent=1) + "\n")


def benchmark_config(clients: int, fraction: float, *, rounds: int) -> RunConfig:
    """Give the settings: one task of 50 classes, 200 images each, spread evenly over the clients."""
    app = app_folder()
    settings = gather(app, file=app / "experiments" / "tiny-imagenet.toml", assignments=[])
    settings |= {
        "num-clients": clients,
        "fraction-train": fraction,
        "num-tasks": 2,
        "stop-after-task": 1,
        "partition": "iid",
        "rounds-per-task": rounds,
        "local-epochs": 1,
        "rank": 4,
        "lora-blocks": "first:3",
        "head": "linear",
        "max-per-class": 200,
        "threads": 1,
        "device": "cpu",
    }
    return RunConfig.parse(settings)


def play(config: RunConfig, *, cpus: int) -> dict[str, object]:
    """Play one run and sample the memory of its processes."""
    samples: list[tuple[float, int]] = []  # seconds since the epoch, bytes

    def sample() -> None:
        if not samples or time.time() - samples[-1][0] > SAMPLE_SECONDS:
            samples.append((time.time(), tree_bytes()))

    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        out = Path(folder) / "run"
        out.mkdir()
        run_config = out / "run-config.toml"
        run_config.write_text(tomli_w.dumps({**config.flat(), "out": str(out)}))
        began = time.time()
        result = launch(
            app_folder(),
            run_config=run_config,
            num_supernodes=config.num_clients,
            ray_cpus=cpus,
            work_dir=out / "logs",
            on_tick=sample,
        )
        if not result.ok:
            raise SystemExit(f"the run failed: {result.details}\n{(out / 'status.json').read_text()}")
        lines = [json.loads(text) for text in (out / "rounds.jsonl").read_text().splitlines()]
    seconds = [line["seconds"]["total"] - line["seconds"]["evaluate"] for line in lines]
    rounds_began = samples[-1][0] - sum(line["seconds"]["total"] for line in lines)
    rounds = [size for at, size in samples if at > rounds_began]
    third = max(1, len(rounds) // 3)
    return {
        "participants": len(lines[-1]["participants"]),
        "failures": sum(len(line["failures"]) for line in lines),
        "hello_seconds": rounds_began - began,
        "round_seconds": seconds,
        "early_bytes": max(rounds[:third]),
        "late_bytes": max(rounds[-third:]),
        "bytes_down": lines[-1]["bytes_down"],
        "bytes_up": lines[-1]["bytes_up"],
    }


def tree_bytes() -> int:
    """Add up the proportional set sizes of this process's descendants."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it ended while we looked
            continue
    return total


if __name__ == "__main__":
    main()
