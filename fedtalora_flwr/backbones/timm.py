"""Any vision transformer of timm by name: ``timm:vit_base_patch16_224.dino``, ``timm:swin_tiny_patch4_window7_224``.

Weights come from the hub or, with ``backbone-checkpoint``, from a local timm checkpoint file.
"""

import difflib
import sys
from pathlib import Path

import timm
from timm.models import load_checkpoint
from torch import nn

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
        near = difflib.get_close_matches(argument.partition(".")[0], timm.list_models(), n=5)
        raise BackboneError(f"timm has no model {argument!r}; near it: {', '.join(near) or 'none'}")
    if backbone_checkpoint and not Path(backbone_checkpoint).is_file():
        raise BackboneError(f"backbone-checkpoint {backbone_checkpoint}: no such file")
    try:
        model = timm.create_model(argument, pretrained=not backbone_checkpoint, num_classes=0)
        missing = _load(model, backbone_checkpoint) if backbone_checkpoint else []
    except Exception as error:  # the hub's client, unpickling and timm's filters raise what they like
        source = backbone_checkpoint or "the hub"
        raise BackboneError(
            f"weights of timm model {argument} cannot be had from {source}: {_first_line(error)}; where no hub can "
            "be reached, set backbone-checkpoint to a local file"
        ) from error
    if missing:  # timm would leave these at random, with a line in its log
        raise BackboneError(
            f"backbone-checkpoint {backbone_checkpoint} lacks {len(missing)} weights of {argument}, e.g. {missing[0]}; "
            "give a checkpoint of this very model"
        )
    backbone = ImageBackbone(model)
    backbone.hub_name = None if backbone_checkpoint else argument
    return backbone


def _load(model: nn.Module, checkpoint: str) -> list[str]:
    """Load a checkpoint, with or without a classifier, and name the weights that it lacks."""
    family = sys.modules[type(model).__module__]
    convert = getattr(family, "checkpoint_filter_fn", None)  # timm's own, for checkpoints of other origin
    keys = load_checkpoint(model, checkpoint, strict=False, filter_fn=convert)
    return list(keys.missing_keys) if keys is not None else []  # None: a NumPy file, which is loaded whole


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
