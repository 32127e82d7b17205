"""Play pooled training of all CIFAR-100 classes twice: by a hand-written loop, and by what a client of ours does.

Both train LoRA of one rank on every layer of the ViT-S/14 at 84 pixels, on the same 50 images a class, with the same
number of passes, and are tested on the same images. The loop is what one writes first: PEFT on timm's model under
autocast, AdamW at 1e-3 with warm-up and cosine, batches of 32, flips, a LayerNorm without weights before a linear head
of rate 3e-3. Ours is `train.fit` with the preset `cifar100`, at the loop's learning rate, since one client holds
everything; its trained rows and its lda head are read.

Usage: FEDTALORA_DATA=... python benchmarks/pooled.py --weights vit_small_patch14.safetensors [--passes 2] [--json FILE]
"""

import argparse
import json
import math
import time
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.config.sources import app_folder, gather
from fedtalora_flwr.model import backbones, heads, penalties
from fedtalora_flwr.model.heads import Classifier, init_rows
from fedtalora_flwr.model.session import data_of, model_of, test_examples, training_examples
from fedtalora_flwr.model.train import Examples, autocast, count_correct, fit, sum_features

_RATE, _HEAD_RATE, _BATCH, _WARMUP = 1e-3, 3e-3, 32, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="a checkpoint of timm's vit_small_patch14_dinov2")
    parser.add_argument("--passes", type=int, default=2, help="over all images")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    app = app_folder()
    pooled = ["num-clients=1", "num-tasks=1", "partition=iid", "rounds-per-task=1", f"learning-rate={_RATE}"]
    settings = gather(
        app,
        file=app / "experiments" / "cifar100.toml",
        assignments=[*pooled, f"local-epochs={arguments.passes}", f"backbone-checkpoint={arguments.weights}"],
    )
    config = RunConfig.parse(settings)
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    train, test = training_examples(config, partition_id=0, task_id=0), test_examples(config, task_id=0)
    num_classes = data_of(config).source.num_classes

    figures = {}
    for side, play in (("ours", ours), ("by hand", by_hand)):
        began = time.perf_counter()
        for name, accuracy in play(config, train, test, num_classes=num_classes).items():
            figures[name] = accuracy
            print(f"{name:24}{accuracy:.4f}")
        print(f"{side}: {time.perf_counter() - began:.0f} s", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def ours(config: RunConfig, train: Examples, test: Examples, *, num_classes: int) -> dict[str, float]:
    """Train as the one client of a federation, and give the accuracy of either classifier."""
    model, head = model_of(config), heads.resolve(config.head, {"lda_shrinkage": config.lda_shrinkage})
    model.load(model.initial_factors(seed=config.seed), {})
    plain = heads.resolve("linear", {})
    rows = init_rows(num_classes=num_classes, feature_dim=model.backbone.feature_dim)
    if config.rows_start == "means":
        start = sum_features(model, train, head=plain, num_classes=num_classes, config=config).moment
        rows = heads.rows_at_means(start[:, :-1] / start[:, -1:])
    everything = list(range(num_classes))
    result = fit(
        model,
        rows,
        train,
        classes=everything,
        trainable=frozenset({"lora_A", "lora_B"}),
        penalty=penalties.resolve("none", {}),
        old_classes=[],
        config=config,
        task_id=0,
        round_in_task=0,
        seed=[config.seed],
    )
    sums = sum_features(model, train, head=head, num_classes=num_classes, config=config).sums()
    classifiers = {"ours, lda": head.classifier({}, sums), "ours, trained rows": Classifier(result.head)}
    hits = count_correct(model, list(classifiers.values()), test, classes=everything, config=config)
    return {name: hit / len(test) for name, hit in zip(classifiers, hits, strict=True)}


def by_hand(config: RunConfig, train: Examples, test: Examples, *, num_classes: int) -> dict[str, float]:
    """Train by the hand-written loop, and give the accuracy."""
    backbone = backbones.resolve(
        config.backbone, {"backbone_checkpoint": config.backbone_checkpoint, "image_size": config.image_size}
    )
    backbone.feature_norm = "none"
    backbone.unfuse_attention()  # as ours: torch's fused kernel is slow backwards in bf16
    lora = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=["qkv", "proj", "fc1", "fc2"])
    peft.inject_adapter_in_model(lora, backbone.model)
    head = nn.Linear(backbone.feature_dim, num_classes)
    factors = [p for name, p in backbone.named_parameters() if "lora_" in name]
    groups = [{"params": factors, "lr": _RATE}, {"params": head.parameters(), "lr": _HEAD_RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    generator = torch.Generator().manual_seed(config.seed)
    num_steps = config.local_epochs * math.ceil(len(train) / _BATCH)
    share = lambda step: min(1.0, (step + 1) / (_WARMUP * num_steps)) * (1 + math.cos(math.pi * step / num_steps)) / 2  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)

    def scores(images: Tensor, augment: str = "none") -> Tensor:
        with autocast(torch.device("cpu"), "bf16"):
            features = backbone(images, augment=augment, generator=generator)
        return head(F.layer_norm(features.float(), features.shape[-1:]))

    for _ in range(config.local_epochs):
        for batch in torch.randperm(len(train), generator=generator).split(_BATCH):
            loss = F.cross_entropy(scores(train.inputs[batch], "flip"), train.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        hits = sum(
            int((scores(images).argmax(1) == labels).sum())
            for images, labels in zip(test.inputs.split(256), test.labels.split(256), strict=True)
        )
    return {"by hand": hits / len(test)}


if __name__ == "__main__":
    main()
