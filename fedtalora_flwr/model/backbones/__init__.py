"""Pre-trained encoders. A file here with ``create`` is a backbone."""

from collections.abc import Mapping
from typing import Any

from fedtalora_flwr.config import registry
from fedtalora_flwr.model.backbones.base import Backbone, BackboneError, Placement

__all__ = ["Backbone", "BackboneError", "Placement", "resolve"]


def resolve(name: str, settings: Mapping[str, Any]) -> Backbone:
    """Build the backbone `name`, e.g. ``vit_mini`` or ``timm:vit_base_patch16_224.dino``.

    Raises
    ------
    ValueError
        If there is no such backbone, its weights cannot be had, or it takes no ``image-size`` and one is set.
    """
    image_size = settings.get("image_size", 0)
    if image_size and "image_size" not in registry.parameters(__name__, name):
        raise BackboneError(f"image-size {image_size}: backbone {name} has no images to size; leave image-size at 0")
    backbone: Backbone = registry.build(__name__, name, settings)
    return backbone
