"""Measure local training, in images a second, against the plain PEFT loop that one writes first.

Both sides train the same backbone with LoRA of the same rank on the same layers and a linear classifier, on the same
Tiny-ImageNet images, with AdamW, the same batch size, number of steps, threads and precision:

- fedtalora: what a client does in a round. `AdaptedModel.load` of the server's state with its dense residual, then
  `train.fit` on examples that were decoded once into one uint8 tensor; augmenting, enlarging and normalising are done
  a batch at a time on the device. The decoding is timed apart, since a process does it once, not once a round.
- plain PEFT: `peft.get_peft_model` on timm's model, fed by a `torch.utils.data.DataLoader` over a data set that
  decodes each image's bytes with PIL whenever it is drawn and prepares it with torchvision's transforms; no state is
  loaded. The encoded bytes lie in memory, so no disk takes part, and its workers stay between epochs.

Each precision that is asked for makes rows of its own: fedtalora's epoch as a run in this precision plays it, and the
plain loop under torch's autocast, its model being as timm builds it.

An epoch of each is played in turn, all in one process, as often as `--repeats` says, after a warm-up epoch of each
that is left out; the figures are medians. The weights of timm's backbones are random: they take the same time. The
seconds of CPU beside them are those of the training process, all its threads together but none of the DataLoader's
worker processes: on a CPU that other programs use too, these are what to compare.

For a ViT on a CUDA device the share of the card's bf16 matrix rate is given too: the floating-point operations of the
epoch over its seconds, divided by the rate that `torch.matmul` reaches on two large square bf16 matrices just before.
The operations of one image are counted so, for T tokens, width d and LoRA rank r, a multiply-add being two:

- forward: 2 T d_in d_out for each linear layer of the blocks and 2 T r (d_in + d_out) for its LoRA pair, 4 T^2 d for
  the attention of a block (scores and weighted sum), and the patch embedding;
- backward, the pre-trained weights being frozen and getting no gradient: 2 T d_in d_out for each linear layer above
  the lowest adapted one (the gradient of its input), 8 T^2 d for each attention above it, 2 T r (d_in + d_out) for
  the gradient of each LoRA pair and as much again for what flows back through it (through lora_B alone in the lowest
  layer). Nothing below the lowest adapted layer is counted.

Normalisation, softmax, activations, the classifier and whatever a kernel computes again are not counted. It is the
share of useful matrix work, and low where the batches are small or the model is.

Usage: python benchmarks/train_step.py [--backbone vit_mini] [--precision fp32 bf16] [--images 512] [--workers 0 2]
       [--json FILE]
"""

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft
import PIL.Image
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms  # type: ignore[import-untyped]

from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.config.sources import app_folder, gather
from fedtalora_flwr.data.hf_load import load_files
from fedtalora_flwr.data.images import decode_image
from fedtalora_flwr.data.locate import known_folder, where_to_put
from fedtalora_flwr.data.source import NO_ROWS, Source, Split
from fedtalora_flwr.model import penalties
from fedtalora_flwr.model.backbones import vit_mini
from fedtalora_flwr.model.backbones.images import ImageBackbone
from fedtalora_flwr.model.heads import init_rows
from fedtalora_flwr.model.lora import AdaptedModel
from fedtalora_flwr.model.session import device_of, placed
from fedtalora_flwr.model.train import Examples, autocast, fit

_OURS = "fedtalora"
_MATRIX_SIDE = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backbone", default="vit_mini", help="vit_mini, or timm:<name> of a ViT or Swin, with random weights"
    )
    parser.add_argument(
        "--image-size", type=int, help="side of a timm backbone's input in pixels; else the model's own"
    )
    parser.add_argument("--images", type=int, default=512, help="images of an epoch, at most 20,000")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--blocks", default="all", help="blocks with LoRA: all, first:3, 0-5, ...")
    parser.add_argument("--augment", choices=("none", "flip", "crop-flip"), default="flip")
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), nargs="+", default=["auto"], help="each makes rows of its own"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the training process")
    parser.add_argument("--workers", type=int, nargs="+", default=[0], help="of the DataLoader; each number is a row")
    parser.add_argument("--repeats", type=int, default=5, help="epochs of each side, after one that is left out")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    configs = [benchmark_config(arguments, precision=precision) for precision in arguments.precision]
    config = configs[0]
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    device = device_of(config)
    contents, labels = encoded_images(arguments.images, seed=config.seed)

    ours = adapted_model(config, image_size=arguments.image_size)
    began = time.perf_counter()
    examples = decoded_examples(ours, contents, labels)
    decode_seconds = time.perf_counter() - began
    epochs: dict[str, Callable[[], None]] = {}
    counterpart: dict[str, str] = {}  # of each row of the plain loop: fedtalora's in the same precision
    for config in configs:
        model = adapted_model(config, image_size=arguments.image_size)
        side = f"{_OURS} {config.precision}"
        epochs[side] = fedtalora_epoch(model, examples, config=config)
        for workers in arguments.workers:
            backbone = build_backbone(config, image_size=arguments.image_size).to(device)
            plain = f"plain PEFT {config.precision}, {workers} workers"
            epochs[plain] = plain_epoch(backbone, list(ours.layers), contents, labels, workers=workers, config=config)
            counterpart[plain] = side
    played = alternate(epochs, repeats=arguments.repeats, device=device)

    rates = {side: len(labels) / statistics.median(times.seconds) for side, times in played.items()}
    cpu_seconds = {side: statistics.median(times.cpu_seconds) for side, times in played.items()}
    figures: dict[str, object] = {
        "backbone": config.backbone,
        "image_size": ours.backbone.image_size,
        "images": len(labels),
        "batch_size": config.batch_size,
        "rank": config.rank,
        "blocks": config.lora_blocks,
        "augment": config.augment,
        "precision": arguments.precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": config.threads,
        "decode_seconds": decode_seconds,
        "epochs": {side: asdict(times) for side, times in played.items()},
        "images_per_second": rates,
        "ratio": {plain: rates[side] / rates[plain] for plain, side in counterpart.items()},
        "cpu_ratio": {plain: cpu_seconds[side] / cpu_seconds[plain] for plain, side in counterpart.items()},
    }
    first = next(iter(played))
    print(f"{'':30}images/s   of the first row's   fedtalora is   CPU s   fedtalora takes   epochs (s)")
    for side, times in played.items():
        against = counterpart.get(side)
        faster = "" if against is None else f"{rates[against] / rates[side]:.2f} x"
        less = "" if against is None else f"{cpu_seconds[against] / cpu_seconds[side]:.2f} x"
        print(
            f"{side:30}{rates[side]:8.1f}   {rates[side] / rates[first]:16.2f} x   {faster:>12}   "
            f"{cpu_seconds[side]:5.2f}   {less:>15}   {'  '.join(f'{s:.2f}' for s in times.seconds)}"
        )
    print(f"decoding the {len(labels)} images, once in a process of fedtalora's: {decode_seconds:.2f} s")
    if device.type == "cuda" and isinstance(ours.backbone.model, timm.models.VisionTransformer):
        figures |= matrix_share(ours, rates, device=device)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def benchmark_config(arguments: argparse.Namespace, *, precision: str) -> RunConfig:
    """Give the settings of both sides: the demo's optimiser, one epoch a round."""
    app = app_folder()
    settings = gather(app, file=app / "experiments" / "tiny-imagenet.toml", assignments=[])
    settings |= {
        "backbone": arguments.backbone,
        "local-epochs": 1,
        "batch-size": arguments.batch_size,
        "rank": arguments.rank,
        "alpha": 2.0 * arguments.rank,
        "lora-blocks": arguments.blocks,
        "lora-targets": "attn+mlp",
        "head": "linear",
        "augment": arguments.augment,
        "precision": precision,
        "device": arguments.device,
        "threads": arguments.threads,
    }
    return RunConfig.parse(settings)


def build_backbone(config: RunConfig, *, image_size: int | None) -> ImageBackbone:
    """Build the backbone; unlike a run's, timm's have random weights and any size of image."""
    kind, _, name = config.backbone.partition(":")
    if kind == "vit_mini" and image_size is None:
        return vit_mini.create()
    if kind != "timm" or not name:
        raise SystemExit("--backbone must be timm:<name> or vit_mini, and vit_mini takes no --image-size")
    size = {} if image_size is None else {"img_size": image_size}
    return ImageBackbone(timm.create_model(name, pretrained=False, num_classes=0, **size))


def adapted_model(config: RunConfig, *, image_size: int | None) -> AdaptedModel:
    """Build a client's model, as a run in this precision does."""
    return AdaptedModel(
        placed(build_backbone(config, image_size=image_size), config),
        rank=config.rank,
        alpha=config.alpha,
        blocks=config.lora_blocks,
        targets=config.lora_targets,
    )


def encoded_images(num_images: int, *, seed: int) -> tuple[list[bytes], Tensor]:
    """Draw images of Tiny-ImageNet, as the files' bytes, and their labels (N,), numbered from 0."""
    folder = known_folder("tiny-imagenet", data_root="")
    if folder is None:
        raise SystemExit(f"no data: {where_to_put('tiny-imagenet', data_root='')}")
    table = load_files([folder / "train-novel.parquet"]).with_format("arrow")
    rows = np.random.default_rng(seed).permutation(len(table))[:num_images]
    drawn = table[rows].to_pydict()
    classes, labels = np.unique(drawn["label"], return_inverse=True)
    assert len(classes) > 1, classes
    return [image["bytes"] for image in drawn["image"]], torch.from_numpy(labels)


def decoded_examples(model: AdaptedModel, contents: Sequence[bytes], labels: Tensor) -> Examples:
    """Decode the images as a client does, into one tensor."""
    numbers = labels.numpy()
    split = Split(numbers, lambda rows: [decode_image(contents[row], where=f"image {row}") for row in rows])
    names = tuple(str(label) for label in range(int(numbers.max()) + 1))
    source = Source(name="tiny-imagenet", modality="image", class_names=names, train=split, test=NO_ROWS)
    return Examples(model.backbone.encode(split, np.arange(len(labels)), source=source), labels)


def fedtalora_epoch(model: AdaptedModel, examples: Examples, *, config: RunConfig) -> Callable[[], None]:
    """Give a client's round: load the state that the server sends, train for one epoch."""
    num_classes = int(examples.labels.max()) + 1
    head = init_rows(num_classes=num_classes, feature_dim=model.backbone.feature_dim)
    adapters = model.initial_factors(seed=config.seed)
    residual = {name: torch.zeros(pair.lora_B.shape[0], pair.lora_A.shape[1]) for name, pair in adapters.items()}

    def play() -> None:
        model.load(adapters, residual)
        fit(
            model,
            head,
            examples,
            classes=range(num_classes),
            trainable=frozenset({"lora_A", "lora_B"}),
            penalty=penalties.resolve("none", {}),
            old_classes=(),
            config=config,
            task_id=0,
            round_in_task=0,
            seed=[config.seed],
        )

    return play


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Images that are decoded and prepared whenever they are drawn."""

    def __init__(self, contents: Sequence[bytes], labels: Sequence[int], transform: transforms.Compose) -> None:
        self.contents, self.labels, self.transform = contents, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = PIL.Image.open(io.BytesIO(self.contents[index])).convert("RGB")
        return self.transform(image), self.labels[index]


def plain_epoch(
    backbone: ImageBackbone,
    targets: Sequence[str],
    contents: Sequence[bytes],
    labels: Tensor,
    *,
    workers: int,
    config: RunConfig,
) -> Callable[[], None]:
    """Give the plain loop: an epoch of PEFT on timm's model and a DataLoader."""
    mean, std = (value.flatten().tolist() for value in (backbone.get_buffer("mean"), backbone.get_buffer("std")))
    transform = transforms.Compose(
        [*prepared(config.augment, size=backbone.image_size), transforms.ToTensor(), transforms.Normalize(mean, std)]
    )
    device = backbone.get_buffer("mean").device
    loader = DataLoader(
        ImageFiles(contents, labels.tolist(), transform),
        batch_size=config.batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )
    for block in backbone.model.modules():
        if isinstance(block, timm.models.vision_transformer.Block):
            block.__class__ = timm.models.vision_transformer.Block  # as timm builds it; fedtalora's last one does less
    lora = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(targets))
    model = peft.get_peft_model(backbone.model, lora)
    classifier = nn.Linear(backbone.feature_dim, int(labels.max()) + 1, device=device)

    def play() -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            [
                {"params": parameters, "lr": config.learning_rate},
                {"params": classifier.parameters(), "lr": config.head_learning_rate},
            ],
            weight_decay=config.weight_decay,
        )
        for images, answers in loader:
            images, answers = images.to(device, non_blocking=True), answers.to(device, non_blocking=True)
            with autocast(device, config.precision):
                features = model.forward_head(model.forward_features(images), pre_logits=True)
            loss = F.cross_entropy(classifier(features.float()), answers)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return play


def prepared(augment: str, *, size: int) -> list[Callable[[PIL.Image.Image], PIL.Image.Image]]:
    """List torchvision's transforms for an augmentation, up to the image of the model's size."""
    bicubic = transforms.InterpolationMode.BICUBIC
    flip = [transforms.RandomHorizontalFlip()] if augment != "none" else []
    if augment == "crop-flip":
        return [transforms.RandomResizedCrop(size, scale=(0.6, 1.0), ratio=(1.0, 1.0), interpolation=bicubic), *flip]
    return [transforms.Resize((size, size), interpolation=bicubic), *flip]


@dataclass
class EpochTimes:
    """One side's epochs in the order played: by the clock, and on the CPU in the training process."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)


def alternate(epochs: dict[str, Callable[[], None]], *, repeats: int, device: torch.device) -> dict[str, EpochTimes]:
    """Time the epochs of all sides in turn, so that a slow minute of the machine meets all of them."""
    played = {side: EpochTimes() for side in epochs}
    for repeat in range(repeats + 1):
        for side, play in epochs.items():
            _wait_for(device)
            began, cpu_began = time.perf_counter(), time.process_time()
            play()
            _wait_for(device)
            if repeat > 0:
                played[side].seconds.append(time.perf_counter() - began)
                played[side].cpu_seconds.append(time.process_time() - cpu_began)
    return played


def matrix_share(model: AdaptedModel, rates: dict[str, float], *, device: torch.device) -> dict[str, object]:
    """Print, and give for the record, the share of the card's bf16 matrix rate that each side reaches."""
    peak = matrix_rate(device)
    operations = flops_per_image(model)
    shares = {side: rate * operations / peak for side, rate in rates.items()}
    print(f"{torch.cuda.get_device_name(device)}: {peak / 1e12:.0f} TFLOP/s in bf16 on {_MATRIX_SIDE}-wide matrices")
    print(f"training one image counts {operations / 1e9:.2f} GFLOP; share of that rate:")
    for side, share in shares.items():
        print(f"{side:24}{100 * share:7.1f} %")
    return {"matrix_flops_per_second": peak, "flops_per_image": operations, "matrix_share": shares}


def matrix_rate(device: torch.device, *, repeats: int = 50) -> float:
    """Time the product of two square bf16 matrices on a GPU: its operations a second."""
    a, b = (torch.randn(_MATRIX_SIDE, _MATRIX_SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(10):
        torch.matmul(a, b)
    _wait_for(device)
    began = time.perf_counter()
    for _ in range(repeats):
        torch.matmul(a, b)
    _wait_for(device)
    return 2.0 * _MATRIX_SIDE**3 * repeats / (time.perf_counter() - began)


def flops_per_image(model: AdaptedModel) -> float:
    """Count the operations of a training step on one image, as the module's docstring says."""
    vit: Any = model.backbone.model
    placement = model.backbone.placement
    patches = vit.patch_embed.num_patches
    tokens = patches + vit.num_prefix_tokens
    width = model.backbone.feature_dim
    attention = 4.0 * tokens**2 * width
    flops: float = 2.0 * patches * vit.patch_embed.proj.weight.numel()
    flows_back = False  # whether anything below the layer at hand has a gradient, in order of execution
    for block in placement.blocks:
        for role in ("qkv", "proj", "fc1", "fc2"):
            (layer,) = placement.roles[role]
            name = f"{block}.{layer}"
            adapted = model.layers.get(name)
            linear = vit.get_submodule(name) if adapted is None else adapted.get_base_layer()
            d_out, d_in = linear.weight.shape
            flops += 2.0 * tokens * d_in * d_out * (2 if flows_back else 1)
            if adapted is not None:
                pair = 2.0 * tokens * model.rank * (d_in + d_out)
                through = pair if flows_back else 2.0 * tokens * model.rank * d_out
                flops += 2 * pair + through
                flows_back = True
            if role == "qkv":
                flops += attention * (3 if flows_back else 1)
    return flops


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
