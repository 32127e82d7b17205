"""The shipped ViT is the one its facts describe, and sees something."""

import hashlib
import json
from importlib.resources import files

import torch
from sklearn.datasets import load_digits

from fedtalora_flwr.model.backbones import resolve

WEIGHTS = files("fedtalora_flwr.model.backbones") / "weights"
FACTS = json.loads((WEIGHTS / "vit_mini.json").read_text())


def test_shipped_weights_are_those_that_their_facts_describe():
    assert hashlib.sha256((WEIGHTS / "vit_mini.safetensors").read_bytes()).hexdigest() == FACTS["sha256"]
    backbone = resolve("vit_mini", {})
    head = (backbone.feature_dim + 1) * FACTS["timm"]["num_classes"]
    assert sum(p.numel() for p in backbone.parameters()) + head == FACTS["parameters"]
    assert backbone.mean.flatten().tolist() == torch.tensor(FACTS["normalisation"]["mean"]).tolist()


@torch.no_grad()
def test_features_are_finite_and_tell_digits_apart_by_their_nearest_mean():
    backbone = resolve("vit_mini", {}).eval()
    digits = load_digits()
    chosen = digits.target < 3
    pixels = torch.from_numpy(digits.images[chosen][:120] * 255 / 16).to(torch.uint8)
    labels = torch.from_numpy(digits.target[chosen][:120])
    features = backbone(pixels[:, None].expand(-1, 3, -1, -1))
    assert features.shape == (120, 192) and features.dtype == torch.float32 and features.isfinite().all()
    means = torch.stack([features[:60][labels[:60] == digit].mean(0) for digit in range(3)])
    hits = torch.cdist(features[60:], means).argmin(1) == labels[60:]
    assert hits.float().mean() > 0.8  # chance is 1/3
