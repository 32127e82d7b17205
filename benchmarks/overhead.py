"""Measure what federation costs: a simulated round against the same local work without a federation.

All sides train the same clients, the same number of steps, on the same examples, with one thread a client:

- the hand-written loop: plain PyTorch with PEFT's own LoRA layers on timm's or transformers' own model, no Flower, no
  messages, no state to load and no aggregation: what a researcher would write to estimate the cost;
- fedtalora's `train.fit` called in the same way: the simulation's own local training and nothing else, so that a
  faster training step does not hide what the federation costs;
- the Flower simulation.

The first two play the clients one after another in as many processes as the simulation has actors. The ratios are of
steady-state round times: each side's first round is left out.

Usage: python benchmarks/overhead.py [--preset tiny-imagenet] [--clients 10] [--rounds 4] [--per-class 20] [--cpus 2]
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import tomli_w

from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.config.sources import app_folder, gather
from fedtalora_flwr.launch.simulation import launch

if TYPE_CHECKING:
    from torch import nn

    from fedtalora_flwr.model.train import Examples


BY_HAND, FIT, SIMULATION = "hand-written loop", "fit without Flower", "Flower simulation"
TASKS = {"tiny-imagenet": 2, "clinc150": 3}  # preset -> tasks of 50 classes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(TASKS), default="tiny-imagenet", help="the data and the backbone")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=4, help="rounds of each side; the first is left out")
    parser.add_argument("--per-class", type=int, default=20, help="images of each of the task's 50 classes")
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    config = benchmark_config(arguments)
    sides = {
        side: rounds_without_federation(config, side, rounds=arguments.rounds, processes=arguments.cpus)
        for side in (BY_HAND, FIT)
    }
    sides[SIMULATION] = simulated_rounds(config, cpus=arguments.cpus)
    medians = {side: statistics.median(seconds[1:]) for side, seconds in sides.items()}
    print(f"{'':24}first round   steady-state rounds (s)")
    for side, seconds in sides.items():
        print(f"{side:24}{seconds[0]:11.2f}   {'  '.join(f'{s:.2f}' for s in seconds[1:])}")
    ratios = {side: medians[SIMULATION] / medians[side] for side in (BY_HAND, FIT)}
    print("the simulation takes " + ", ".join(f"{ratio:.3f} x the {side}" for side, ratio in ratios.items()))
    figures = {
        "preset": arguments.preset,
        "clients": arguments.clients,
        "cpus": arguments.cpus,
        "examples_per_round": 50 * arguments.per_class,
        "seconds": sides,
        "ratios": ratios,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def benchmark_config(arguments: argparse.Namespace) -> RunConfig:
    """Give the settings of all sides: the preset's model and optimiser on its first task, of 50 classes."""
    app = app_folder()
    settings = gather(app, file=app / "experiments" / f"{arguments.preset}.toml", assignments=[])
    settings |= {
        "num-clients": arguments.clients,
        "num-tasks": TASKS[arguments.preset],
        "stop-after-task": 1,
        "partition": "iid",
        "max-per-class": arguments.per_class,
        "rounds-per-task": arguments.rounds,
        "augment": "none",
        "head": "linear",
        "threads": 1,
        "device": "cpu",
    }
    return RunConfig.parse(settings)


def rounds_without_federation(config: RunConfig, side: str, *, rounds: int, processes: int) -> list[float]:
    """Time rounds of one side, its clients shared out among processes as actors would be."""
    context = multiprocessing.get_context("spawn")
    barrier, times = context.Barrier(processes + 1, timeout=600), []
    workers = [
        context.Process(
            target=_work, args=(config, side, rounds, list(range(first, config.num_clients, processes)), barrier)
        )
        for first in range(processes)
    ]
    for worker in workers:
        worker.start()
    barrier.wait()
    for _ in range(rounds):
        began = time.perf_counter()
        barrier.wait()  # a round begins
        barrier.wait()  # every process has trained its clients
        times.append(time.perf_counter() - began)
    for worker in workers:
        worker.join()
    return times


def _work(
    config: RunConfig, side: str, rounds: int, clients: list[int], barrier: "multiprocessing.synchronize.Barrier"
) -> None:
    import torch

    from fedtalora_flwr.model.session import training_examples

    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    data = [training_examples(config, partition_id=k, task_id=0) for k in clients]
    play = (_hand_written if side == BY_HAND else _fit)(config)
    barrier.wait()
    for _ in range(rounds):
        barrier.wait()
        for examples in data:
            play(examples)
        barrier.wait()


def _hand_written(config: RunConfig) -> "Callable[[Examples], None]":
    """Give the plain loop over one client's examples."""
    import peft
    import torch
    import torch.nn.functional as F

    from fedtalora_flwr.model.backbones import resolve

    base = resolve(config.backbone, config.settings)
    as_timm_builds_it(base.model)
    names = sorted({name for layers in base.placement.roles.values() for name in layers})
    model = peft.get_peft_model(
        base.model, peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=names)
    )
    head = torch.nn.Linear(base.feature_dim, 150)

    def play(examples: "Examples") -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            [
                {"params": parameters, "lr": config.learning_rate},
                {"params": head.parameters(), "lr": config.head_learning_rate},
            ],
            weight_decay=config.weight_decay,
        )
        for _ in range(config.local_epochs):
            order = torch.randperm(len(examples))
            for step in range(math.ceil(len(examples) / config.batch_size)):
                batch = order[step * config.batch_size : (step + 1) * config.batch_size]
                loss = F.cross_entropy(head(base(examples.inputs[batch])), examples.labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    return play


def _fit(config: RunConfig) -> "Callable[[Examples], None]":
    """Give fedtalora's own local training of one client's examples."""
    from fedtalora_flwr.model.heads import init_rows
    from fedtalora_flwr.model.session import model_of
    from fedtalora_flwr.model.train import fit

    model = model_of(config)
    head = init_rows(num_classes=150, feature_dim=model.backbone.feature_dim)
    adapters = model.initial_factors(seed=config.seed)

    def play(examples: "Examples") -> None:
        model.load(adapters, {})
        fit(
            model,
            head,
            examples,
            classes=sorted(set(examples.labels.tolist())),
            trainable=frozenset({"lora_A", "lora_B"}),
            config=config,
            task_id=0,
            round_in_task=0,
            seed=[config.seed],
        )

    return play


def as_timm_builds_it(model: "nn.Module") -> None:
    """Undo what fedtalora changes in a ViT of timm."""
    from timm.models.vision_transformer import Block, VisionTransformer

    if isinstance(model, VisionTransformer):
        for block in model.blocks:
            block.__class__ = Block


def simulated_rounds(config: RunConfig, *, cpus: int) -> list[float]:
    """Time the rounds of a real run, without evaluation, from its own log."""
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        out = Path(folder) / "run"
        out.mkdir()
        run_config = out / "run-config.toml"
        run_config.write_text(tomli_w.dumps({**config.flat(), "out": str(out)}))
        result = launch(
            app_folder(),
            run_config=run_config,
            num_supernodes=config.num_clients,
            ray_cpus=cpus,
            work_dir=out / "logs",
            on_tick=lambda: None,
        )
        if not result.ok:
            raise SystemExit(f"the simulated run failed: {result.details}\n{(out / 'status.json').read_text()}")
        lines = [json.loads(text) for text in (out / "rounds.jsonl").read_text().splitlines()]
        return [line["seconds"]["total"] - line["seconds"]["evaluate"] for line in lines]


if __name__ == "__main__":
    main()
