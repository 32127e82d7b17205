"""The small ViT that ships with the package: 2.7 M parameters, 64-pixel images, for demos and CPU studies.

Pre-trained on 100 of Tiny-ImageNet's 200 classes; ``weights/vit_mini.json`` holds its facts.
"""

import json
from importlib.resources import files

import timm
from safetensors.torch import load

from fedtalora_flwr.backbones.images import ImageBackbone


def create() -> ImageBackbone:
    """Build the backbone from the shipped weights, in float32."""
    weights = files("fedtalora_flwr.backbones") / "weights"
    facts = json.loads((weights / "vit_mini.json").read_text())
    arguments = {**facts["timm"], "num_classes": 0}
    model = timm.create_model(arguments.pop("model"), weight_init="skip", **arguments)
    state = load((weights / "vit_mini.safetensors").read_bytes())
    model.load_state_dict({k: v.float() for k, v in state.items() if not k.startswith("head.")})
    return ImageBackbone(model, **facts["normalisation"])
