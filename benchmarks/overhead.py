"""Measure what federation costs: a simulated round against the same local work in one hand-written loop.

Both train the same clients, the same number of steps, on the same images, with one thread a client. The loop is
plain PyTorch, with PEFT's LoRA and timm's model, no Flower, no messages, no state to load and no aggregation: what
a researcher would write to estimate the cost. It plays the clients one after another in as many processes as the
simulation has actors. The ratio is of steady-state round times: each side's first round is left out.

Usage: python benchmarks/overhead.py [--clients 10] [--rounds 4] [--per-class 20] [--cpus 2] [--json FILE]
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

import tomli_w

from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.launch import launch
from fedtalora_flwr.settings import app_folder, gather


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=4, help="rounds of each side; the first is left out")
    parser.add_argument("--per-class", type=int, default=20, help="images of each of the task's 50 classes")
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    config = benchmark_config(arguments)
    by_hand = hand_written_rounds(config, rounds=arguments.rounds, processes=arguments.cpus)
    simulated = simulated_rounds(config, cpus=arguments.cpus)
    figures = {
        "clients": arguments.clients,
        "cpus": arguments.cpus,
        "images_per_round": 50 * arguments.per_class,
        "hand_written_seconds": by_hand,
        "simulated_seconds": simulated,
        "ratio": statistics.median(simulated[1:]) / statistics.median(by_hand[1:]),
    }
    print(f"{'':24}first round   steady-state rounds (s)")
    print(f"{'hand-written loop':24}{by_hand[0]:11.2f}   {'  '.join(f'{s:.2f}' for s in by_hand[1:])}")
    print(f"{'Flower simulation':24}{simulated[0]:11.2f}   {'  '.join(f'{s:.2f}' for s in simulated[1:])}")
    print(f"ratio of the medians: {figures['ratio']:.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def benchmark_config(arguments: argparse.Namespace) -> RunConfig:
    """Give the settings of both sides: the demo's model and optimiser on one task of 50 classes."""
    app = app_folder()
    settings = gather(app, file=app / "experiments" / "tiny-imagenet.toml", assignments=[])
    settings |= {
        "num-clients": arguments.clients,
        "num-tasks": 2,
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


def hand_written_rounds(config: RunConfig, *, rounds: int, processes: int) -> list[float]:
    """Time rounds of the plain loop, its clients shared out among processes as actors would be."""
    context = multiprocessing.get_context("spawn")
    barrier, times = context.Barrier(processes + 1, timeout=600), []
    workers = [
        context.Process(target=_work, args=(config, rounds, list(range(first, config.num_clients, processes)), barrier))
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


def _work(config: RunConfig, rounds: int, clients: list[int], barrier: "multiprocessing.synchronize.Barrier") -> None:
    import peft
    import timm
    import torch
    import torch.nn.functional as F

    from fedtalora_flwr.backbones import vit_mini
    from fedtalora_flwr.resident import training_examples

    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    data = [training_examples(config, partition_id=k, task_id=0) for k in clients]
    base = vit_mini.create()
    mean, std = base.mean, base.std
    names = ["qkv", "proj", "fc1", "fc2"]
    lora = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=names)
    model = peft.get_peft_model(base.model, lora)
    assert isinstance(base.model, timm.models.VisionTransformer)
    head = torch.nn.Linear(base.feature_dim, 100)
    barrier.wait()
    for _ in range(rounds):
        barrier.wait()
        for examples in data:
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(
                [
                    {"params": parameters, "lr": config.learning_rate},
                    {"params": head.parameters(), "lr": config.head_learning_rate},
                ],
                weight_decay=config.weight_decay,
            )
            order = torch.randperm(len(examples))
            for step in range(math.ceil(len(examples) / config.batch_size)):
                batch = order[step * config.batch_size : (step + 1) * config.batch_size]
                images = (examples.inputs[batch].float() / 255 - mean) / std
                features = model.forward_head(model.forward_features(images), pre_logits=True)
                loss = F.cross_entropy(head(features), examples.labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        barrier.wait()


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
