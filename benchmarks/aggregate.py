"""Measure what the server does in a round: the time and memory of folding K clients' updates into the state.

The method is fedtalora with an accumulating residual, the shapes those of ViT-B/16: six blocks with LoRA on qkv, proj,
fc1 and fc2, and a classifier of 100 rows. Factors, rows and numbers of examples are random. Each pair of K and rank
is a cell, played in a process of its own after a call on a tiny state:

- seconds: the median of `--repeats` calls of ``aggregate``;
- memory: what the first call adds to the process's highest resident set (`resource.getrusage`), and so what it
  takes beyond the state and the updates that are given to it. The new state that it returns is part of this; the
  size of its pairs, residual and rows stands beside.

Where the updates of K clients would take more than `--memory-gb`, only so many distinct ones are drawn as fit, and
the clients take turns in sharing their tensors; the column `distinct` says how many there are. Time and memory are
those of K clients nevertheless: the method cannot know, and the tensors that are shared are far larger than any cache.

Usage: python benchmarks/aggregate.py [--clients 10,100,1000] [--ranks 4,16,64] [--repeats 3] [--json FILE]
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedtalora_flwr.aggregation import ClientUpdate, GlobalState, LoraFactors, resolve
from fedtalora_flwr.model.heads import init_rows

Shapes = Mapping[str, tuple[int, int]]  # (d_out, d_in) by module name

_WIDTH = 768
_LAYERS = {"attn.qkv": (2304, 768), "attn.proj": (768, 768), "mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}
_VIT_B = {f"blocks.{block}.{name}": shape for block in range(6) for name, shape in _LAYERS.items()}
_TINY = {"tiny": (7, 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=_numbers, default=[10, 100, 1000], help="e.g. 10,100")
    parser.add_argument("--ranks", type=_numbers, default=[4, 16, 64], help="e.g. 4,16")
    parser.add_argument("--classes", type=int, default=100, help="rows of the classifier")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--memory-gb", type=float, default=6.0, help="the most that distinct updates may take")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--cell", action="store_true", help=argparse.SUPPRESS)  # play the one cell given, print JSON
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(play_cell(arguments)))
        return
    cells = []
    print("clients  rank  distinct   updates   new state   memory added   seconds")
    for clients in arguments.clients:
        for rank in arguments.ranks:
            cell = in_own_process(arguments, clients=clients, rank=rank)
            cells.append(cell)
            updates, state, added = (
                f"{cell[key] / 2**30:.2f} GiB" for key in ("update_bytes", "new_state_bytes", "added_bytes")
            )
            print(
                f"{clients:7}  {rank:4}  {cell['distinct_clients']:8}  {updates:>8}   {state:>9}   {added:>12}"
                f"   {statistics.median(cell['seconds']):7.2f}",
                flush=True,
            )
    if any(cell["distinct_clients"] < cell["clients"] for cell in cells):
        print(f"Fewer distinct than clients: they share tensors, to stay within --memory-gb {arguments.memory_gb:g}.")
    if arguments.json:
        figures = {"threads": arguments.threads, "classes": arguments.classes, "cells": cells}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def in_own_process(arguments: argparse.Namespace, *, clients: int, rank: int) -> dict[str, Any]:
    """Play a cell in a fresh process, whose highest resident set is then its own."""
    command = [sys.executable, __file__, "--cell", "--clients", str(clients), "--ranks", str(rank)]
    for option in ("classes", "repeats", "threads", "memory_gb"):
        command += [f"--{option.replace('_', '-')}", str(getattr(arguments, option))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{clients} clients at rank {rank} ended with status {done.returncode} (-9: out of memory)")
    cell: dict[str, Any] = json.loads(done.stdout)
    return cell


def play_cell(arguments: argparse.Namespace) -> dict[str, Any]:
    """Aggregate the updates of one cell, the first of `clients` and of `ranks`, as often as asked."""
    [clients], [rank] = arguments.clients, arguments.ranks
    torch.set_num_threads(arguments.threads)
    method = resolve("fedtalora", {"residual": "accumulate"})
    method.aggregate(*random_round(_TINY, clients=2, distinct=2, rank=2, classes=3))
    bytes_each = _update_bytes(_VIT_B, rank=rank, classes=arguments.classes)
    distinct = max(1, min(clients, int(arguments.memory_gb * 2**30 / bytes_each)))
    state, updates = random_round(_VIT_B, clients=clients, distinct=distinct, rank=rank, classes=arguments.classes)
    before, added, seconds, new_state_bytes = _highest_resident_bytes(), 0, [], 0
    for repeat in range(arguments.repeats):
        began = time.perf_counter()
        new = method.aggregate(state, updates)
        seconds.append(time.perf_counter() - began)
        if repeat == 0:
            added = _highest_resident_bytes() - before
            new_state_bytes = _state_bytes(new)
        del new
    return {
        "clients": clients,
        "rank": rank,
        "distinct_clients": distinct,
        "update_bytes": clients * bytes_each,
        "new_state_bytes": new_state_bytes,
        "added_bytes": added,
        "seconds": seconds,
    }


def random_round(
    shapes: Shapes, *, clients: int, distinct: int, rank: int, classes: int
) -> tuple[GlobalState, list[ClientUpdate]]:
    """Draw a state and the updates of its clients, of which only the first `distinct` have tensors of their own."""
    generator = torch.Generator().manual_seed(0)

    def factors() -> dict[str, LoraFactors]:
        return {
            name: LoraFactors(
                torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator), 2.0
            )
            for name, (d_out, d_in) in shapes.items()
        }

    residual = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    rows = init_rows(num_classes=classes, feature_dim=_WIDTH)
    state = GlobalState(adapters=factors(), residual=residual, head=rows)
    adapters = [factors() for _ in range(distinct)]
    heads = [{n: torch.randn(row.shape, generator=generator) for n, row in rows.items()} for _ in range(distinct)]
    counts = torch.randint(1, 50, (clients, classes), generator=generator)
    updates = [
        ClientUpdate(
            partition_id=k,
            num_examples=int(counts[k].sum()),
            adapters=adapters[k % distinct],
            head=heads[k % distinct],
            class_counts=counts[k],
            base_version=0,
        )
        for k in range(clients)
    ]
    return state, updates


def _update_bytes(shapes: Shapes, *, rank: int, classes: int) -> int:
    return 4 * (rank * sum(d_out + d_in for d_out, d_in in shapes.values()) + classes * (_WIDTH + 1))


def _state_bytes(state: GlobalState) -> int:
    pairs = [tensor for pair in state.adapters.values() for tensor in (pair.lora_A, pair.lora_B)]
    return sum(tensor.nbytes for tensor in [*pairs, *state.residual.values(), *state.head.values()])


def _highest_resident_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, Linux in KiB
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
