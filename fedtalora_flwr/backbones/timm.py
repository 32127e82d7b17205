"""Any vision transformer of timm by name: ``timm:vit_base_patch16_224.dino``, ``timm:swin_tiny_patch4_window7_224``.

Weights come from the hub or, with ``backbone-checkpoint``, from a local timm checkpoint file.
"""

from pathlib import Path

import timm

from fedtalora_flwr.backbones.base import BackboneError
from fedtalora_flwr.backbones.images import ImageBackbone


def create(argument: str, *, backbone_checkpoint: str) -> ImageBackbone:
    """Build timm's model `argument` without its classifier.

    Parameters
    ----------
    argument
        timm's name of the model, with the tag of its weights.
    backbone_checkpoint
        A ``.safetensors`` or ``.pth`` file; empty: timm's own weights from the hub.

    Raises
    ------
    BackboneError
        If timm has no such model, or its weights cannot be read or fetched.
    """
    if not timm.is_model(argument):
        near = timm.list_models(f"*{argument.partition('.')[0][:12]}*")[:5]
        raise BackboneError(f"timm has no model {argument!r}; near it: {', '.join(near) or 'none'}")
    overlay = None
    if backbone_checkpoint:
        if not Path(backbone_checkpoint).is_file():
            raise BackboneError(f"backbone-checkpoint {backbone_checkpoint}: no such file")
        overlay = {"file": backbone_checkpoint, "custom_load": False}
    try:
        model = timm.create_model(argument, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
    except (OSError, RuntimeError) as error:
        source = backbone_checkpoint or "the hub"
        raise BackboneError(
            f"weights of timm model {argument} cannot be had from {source}: {_first_line(error)}; where no hub can "
            "be reached, set backbone-checkpoint to a local file"
        ) from error
    return ImageBackbone(model)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
