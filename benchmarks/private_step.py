"""What a step costs that is private for each example, against a plain one.

    python benchmarks/private_step.py [--rounds 7]

Both train all pairs of vit_mini and the class rows on batches of 16 images of the digits' size, in turns, in one
process; a time is the median of the rounds, in which 4 steps each are taken. Peak memory is not told apart: what a
private step holds beyond a plain one are 16 gradients of the trained numbers in place of one.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.config.sources import defaults
from fedtalora_flwr.model import penalties
from fedtalora_flwr.model.backbones import resolve
from fedtalora_flwr.model.heads import init_rows
from fedtalora_flwr.model.lora import AdaptedModel, count_parameters
from fedtalora_flwr.model.private import Privacy, fit_privately
from fedtalora_flwr.model.train import Examples, fit

BATCH, STEPS, CLASSES = 16, 4, list(range(10))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=7)
    rounds = options.parse_args().rounds
    torch.set_num_threads(1)
    settings = defaults(Path(__file__).parents[1])
    config = RunConfig.parse(settings | {"device": "cpu", "precision": "fp32", "head": "linear"})
    config = replace(config, batch_size=BATCH, local_epochs=STEPS)
    model = AdaptedModel(
        resolve("vit_mini", {}), rank=config.rank, alpha=config.alpha, blocks="all", targets=config.lora_targets
    )
    start = model.initial_factors(seed=0)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (BATCH, 3, 16, 16), generator=generator, dtype=torch.uint8)
    examples = Examples(images, torch.arange(BATCH) % len(CLASSES))
    told = {
        "head": init_rows(num_classes=len(CLASSES), feature_dim=model.backbone.feature_dim),
        "examples": examples,
        "classes": CLASSES,
        "trainable": frozenset({"lora_A", "lora_B"}),
        "config": config,
        "task_id": 0,
        "round_in_task": 0,
    }
    # As many examples as a batch has, so that a Poisson batch is the whole too and both steps see the same images.
    ways: dict[str, Callable[[], object]] = {
        "plain": lambda: fit(model, penalty=penalties.resolve("none", {}), old_classes=(), seed=[0], **told),
        "private": lambda: fit_privately(model, privacy=Privacy(1.0, 1.0), **told),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, train in ways.items():
            model.load(start, {})
            began = time.process_time()
            train()
            if number:  # the first warms up
                seconds[name].append((time.process_time() - began) / STEPS)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{count_parameters(start):,} numbers of pairs, batches of {BATCH}, {rounds} rounds of {STEPS} steps, fp32")
    for name, time_of_step in middle.items():
        print(f"{name:8} {1000 * time_of_step:8.1f} ms of CPU a step")
    ratios = [private / plain for private, plain in zip(seconds["private"], seconds["plain"], strict=True)]
    spread = math.inf if rounds < 2 else statistics.stdev(ratios)
    print(f"ratio    {statistics.median(ratios):8.2f} +- {spread:.2f}")


if __name__ == "__main__":
    main()
