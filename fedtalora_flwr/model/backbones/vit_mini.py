"""The small ViT that ships with the package: 2.7 M parameters, 64-pixel images, for demos and CPU studies.

Pre-trained on 100 of Tiny-ImageNet's 200 classes; ``weights/vit_mini.json`` holds its facts.
"""

import json
from importlib.resources import files

import timm
from safetensors.torch import load

from fedtalora_flwr.model.backbones.base import BackboneError
from fedtalora_flwr.model.backbones.images import ImageBackbone


def create(*, image_size: int = 0) -> ImageBackbone:
    """Build the backbone from the shipped weights, in float32.

    Parameters
    ----------
    image_size
        Its own, or 0 for that.

    Raises
    ------
    BackboneError
        If `image_size` is another one.
    """
    weights = files("fedtalora_flwr.model.backbones") / "weights"
    facts = json.loads((weights / "vit_mini.json").read_text())
    if image_size not in (0, own := facts["timm"]["img_size"]):
        raise BackboneError(
            f"image-size {image_size}: vit_mini was trained at {own} pixels alone; leave image-size at 0, or take a "
            "larger model, e.g. timm:vit_small_patch14_dinov2"
        )
    arguments = {**facts["timm"], "num_classes": 0}
    model = timm.create_model(arguments.pop("model"), weight_init="skip", **arguments)
    state = load((weights / "vit_mini.safetensors").read_bytes())
    model.load_state_dict({k: v.float() for k, v in state.items() if not k.startswith("head.")})
    return ImageBackbone(model, **facts["normalisation"])
