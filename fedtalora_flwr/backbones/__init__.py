"""Pre-trained encoders. A file here with ``create`` is a backbone."""

from collections.abc import Mapping
from typing import Any

from fedtalora_flwr import registry
from fedtalora_flwr.backbones.base import Backbone, BackboneError, Placement

__all__ = ["Backbone", "BackboneError", "Placement", "resolve"]


def resolve(name: str, settings: Mapping[str, Any]) -> Backbone:
    """Build the backbone `name`, e.g. ``vit_mini`` or ``timm:vit_base_patch16_224.dino``.

    Raises
    ------
    ValueError
        If there is no such backbone, or its weights cannot be had.
    """
    backbone: Backbone = registry.build(__name__, name, settings)
    return backbone
