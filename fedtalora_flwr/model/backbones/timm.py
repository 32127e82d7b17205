"""Any vision transformer of timm by name: ``timm:vit_base_patch16_224.dino``, ``timm:swin_tiny_patch4_window7_224``.

Also one in timm's format that only a hub or a folder has: ``timm:hf-hub:<owner/name>``, ``timm:local-dir:<folder>``.
Weights come from there or, with ``backbone-checkpoint``, from a local timm checkpoint file.
"""

import difflib
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_checkpoint
from timm.models.hiera import Hiera
from torch import Tensor, nn

from fedtalora_flwr.model.backbones.base import BackboneError
from fedtalora_flwr.model.backbones.images import ImageBackbone

_HUB, _FOLDER = "hf-hub", "local-dir"  # timm's words for where a model that it has no name for comes from


def create(argument: str, *, backbone_checkpoint: str, image_size: int) -> ImageBackbone:
    """Build timm's model `argument` without its classifier.

    Parameters
    ----------
    argument
        timm's name of the model, with the tag of its weights; or ``hf-hub:<owner/name>``, ``local-dir:<folder>``.
    backbone_checkpoint
        A ``.safetensors`` or ``.pth`` file; empty: the weights that belong to `argument`.
    image_size
        Side of the images in pixels, 0 for the model's own. Position tables of the weights are resampled to it.

    Raises
    ------
    BackboneError
        If timm has no such model, it cannot take images of that size, or its weights cannot be read or fetched.
    """
    source = _source_of(argument)
    if backbone_checkpoint and not Path(backbone_checkpoint).is_file():
        raise BackboneError(f"backbone-checkpoint {backbone_checkpoint}: no such file")
    try:
        size = _size_argument(argument, image_size)
        model = timm.create_model(argument, pretrained=not backbone_checkpoint, num_classes=0, **size)
        missing = _load(model, backbone_checkpoint) if backbone_checkpoint else []
    except BackboneError:
        raise
    except Exception as error:  # the hub's client, unpickling and timm's filters raise what they like
        step = "where no hub can be reached, set backbone-checkpoint to a local file"
        if image_size:
            step += "; where timm does not resample a table of the model to another size, leave image-size at 0"
        raise BackboneError(
            f"weights of timm model {argument} cannot be had from {backbone_checkpoint or source}: "
            f"{_first_lines(error)}; {step}"
        ) from error
    if missing:  # timm would leave these at random, with a line in its log
        raise BackboneError(
            f"backbone-checkpoint {backbone_checkpoint} lacks {len(missing)} weights of {argument}, e.g. {missing[0]}; "
            "give a checkpoint of this very model"
        )
    backbone = ImageBackbone(model)
    of_the_hub = source == "the hub" and not backbone_checkpoint and not image_size
    backbone.hub_name = argument if of_the_hub else None
    return backbone


def _source_of(argument: str) -> str:
    """Say where the weights of a model are, if there is such a model."""
    kind, _, name = argument.partition(":")
    if kind == _HUB and name:
        return "the hub"
    if kind == _FOLDER and name:
        if not (Path(name) / "config.json").is_file():
            raise BackboneError(
                f"timm:{argument}: that folder has no config.json; give one that timm's save_for_hf wrote"
            )
        return name
    if not timm.is_model(argument):
        near = difflib.get_close_matches(argument.partition(".")[0], timm.list_models(), n=5)
        raise BackboneError(
            f"timm has no model {argument!r}; near it: {', '.join(near) or 'none'}; a model that only a hub has is "
            "timm:hf-hub:<owner/name>"
        )
    return "the hub"


def _size_argument(argument: str, image_size: int) -> dict[str, Any]:
    """Give timm's argument for a size that the model can take."""
    if not image_size:
        return {}
    with torch.device("meta"):  # shapes alone: neither weights nor memory
        step = _step(timm.create_model(argument, num_classes=0))
        if image_size % step:
            below = image_size // step * step
            nearest = " or ".join(str(size) for size in (below, below + step) if size)
            raise BackboneError(
                f"image-size {image_size} is no multiple of the {step} pixels that {argument} takes an image in; set "
                f"image-size to {nearest}"
            )
        try:
            timm.create_model(argument, num_classes=0, img_size=image_size)
        except TypeError:
            raise BackboneError(f"image-size {image_size}: {argument} has one size; leave image-size at 0") from None
    return {"img_size": image_size}


def _step(model: nn.Module) -> int:
    """Give the pixels that a side must be a multiple of: those of a patch, of Hiera a mask unit of them."""
    if isinstance(model, Hiera):
        return int(model.patch_stride[0] * model.mask_unit_size[0])
    embedding: Any = getattr(model, "patch_embed", None) or getattr(model, "embeds", None)  # the latter is NaFlexViT's
    return int(embedding.feat_ratio()) if hasattr(embedding, "feat_ratio") else 1


def _load(model: nn.Module, checkpoint: str) -> list[str]:
    """Load a checkpoint in float32, with or without a classifier, and name the weights that it lacks."""
    family = sys.modules[type(model).__module__]
    # timm's own, for checkpoints of other origin or another image size.
    convert = getattr(family, "checkpoint_filter_fn", lambda state, model: state)

    def converted(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        full: dict[str, Any] = convert({key: _as_float32(value) for key, value in state.items()}, model)
        return full

    keys = load_checkpoint(model, checkpoint, strict=False, filter_fn=converted, weights_only=True)
    return list(keys.missing_keys) if keys is not None else []  # None: a NumPy file, which is loaded whole


def _as_float32(value: Any) -> Any:
    """Widen half precision before a table is resampled, which would round it again."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[:2])[:200]
