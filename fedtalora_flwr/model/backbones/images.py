"""Image backbones from timm (ViT, EVA, Swin, ...): batched preparation on the device, pooled features."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import timm.data
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.models import get_model_input_config, save_for_hf
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call

from fedtalora_flwr.data import Source, Split, load_images, stored_side
from fedtalora_flwr.data.images import BACKGROUND, CONVERTIBLE
from fedtalora_flwr.model.backbones.base import Backbone, BackboneError, find_placement

_BLOCKS = re.compile(r"blocks\.\d+|layers\.\d+\.blocks\.\d+")  # ViT; Swin, whose stages nest
_ROLES = {
    "qkv": ("attn.qkv",),
    "q": ("attn.q_proj",),  # of the larger EVA-02
    "k": ("attn.k_proj",),
    "v": ("attn.v_proj",),
    "proj": ("attn.proj",),
    "fc1": ("mlp.fc1", "mlp.fc1_g", "mlp.fc1_x", "mlp.w0", "mlp.w1"),  # plain or packed; SwiGLU; ViTamin's GeGLU
    "fc2": ("mlp.fc2", "mlp.w2"),
}
_INSTEAD = "use a ViT, DeiT, DINOv2, DINOv3, EVA-02, BEiT, Swin or Hiera of timm"


class ImageBackbone(Backbone):
    """A timm vision transformer without its classifier.

    Parameters
    ----------
    model
        Built with ``num_classes=0``.
    mean, std
        Normalisation of the channels, from the model's own data configuration unless given.

    Raises
    ------
    BackboneError
        If the model has no transformer blocks, gives no feature of an image, or computes past a layer that LoRA would
        go on.
    """

    def __init__(
        self, model: nn.Module, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        data = timm.data.resolve_model_data_config(model)
        self.model = model
        _spare_what_is_not_pooled(model)
        self.modality = "image"
        try:
            self.placement = find_placement(model, blocks=_BLOCKS, roles=_ROLES)
        except BackboneError as error:
            raise BackboneError(f"{error}; {_INSTEAD}") from None
        self._calls_qkv_apart = _call_qkv_apart(model)
        # The model as built, not its published configuration: img_size may have been set on creation.
        self.image_size = int(get_model_input_config(model)["input_size"][-1])
        self.register_buffer("mean", torch.tensor(mean or data["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std or data["std"]).view(1, 3, 1, 1), persistent=False)
        self.feature_dim = _try_out(self)

    def encode(self, split: Split, rows: NDArray[np.int64], *, source: Source) -> Tensor:
        """Decode images into uint8 (N, 3, side, side); images below the model's size are enlarged on the device."""
        return load_images(split, rows, side=stored_side(source, size=self.image_size))

    def pool(self, batch: Tensor, *, augment: str, generator: torch.Generator | None) -> Tensor:
        """Augment, resize, normalise and encode images (n, 3, H, W) uint8 into features (n, d)."""
        images = batch.float().div_(255)
        if augment == "remix":
            images = _remix(images, generator=generator)
        elif augment != "none":
            images = _augment(images, smallest=0.6 if augment == "crop-flip" else 1.0, generator=generator)
        if images.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp_(0, 1)
        features = self.model.forward_features((images - self.mean) / self.std)  # type: ignore[operator]
        pooled: Tensor = self.model.forward_head(features, pre_logits=True)  # type: ignore[operator]
        return pooled

    def unfuse_attention(self) -> None:
        """Use timm's own attention in steps."""
        for module in self.model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # type: ignore[assignment]

    @torch.no_grad()
    def save(self, folder: Path, *, class_names: Sequence[str] = (), rows: Mapping[str, Tensor] | None = None) -> bool:
        """Write a folder for ``timm.create_model("local-dir:...")``, the rows as the model's own classifier."""
        if rows is not None:
            self.model.reset_classifier(len(class_names))  # type: ignore[operator]
            classifier = self.model.get_classifier()  # type: ignore[operator]
            if isinstance(classifier, nn.Linear):
                classifier.weight.copy_(rows["weight"])
                classifier.bias.copy_(rows["bias"])
            else:  # e.g. a distilled DeiT, which has two
                self.model.reset_classifier(0)  # type: ignore[operator]
                rows = None
        names = {} if rows is None else {"label_names": list(class_names)}  # of a classifier's outputs, not of features
        save_for_hf(
            self.model,
            str(folder),
            model_config={"pretrained_cfg": {"tag": "fedtalora"}, **names},
            safe_serialization=True,
            data_config={"interpolation": "bicubic", "crop_pct": 1.0, **self._normalisation()},
        )
        return rows is not None

    def preparation(self) -> dict[str, Any]:
        """Give the model's side in pixels, the modes of images taken, mean and deviation of channels in [0, 1].

        And the colour that shows where an image is transparent, and whether timm's attention must be told to call its
        qkv layer, which an adapter wraps.
        """
        return {
            "image_size": self.image_size,
            "image_modes": sorted(CONVERTIBLE),
            "background": list(BACKGROUND),
            "qkv_bias_separate": self._calls_qkv_apart,
            **self._normalisation(),
        }

    def _normalisation(self) -> dict[str, list[float]]:
        buffers = dict(self.named_buffers(recurse=False))
        return {name: buffers[name].flatten().tolist() for name in ("mean", "std")}


class _ClassTokenBlock(Block):  # type: ignore[misc]  # timm is untyped
    """A last block that gives the class token alone: after its attention no other token is needed."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Encode tokens (n, T, d) into the class token (n, 1, d)."""
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = (x + self.drop_path1(self.ls1(attended)))[:, :1]
        token: Tensor = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return token


def _spare_what_is_not_pooled(model: nn.Module) -> None:
    """Where a ViT's feature is its class token, keep the last block's MLP from the other tokens; same feature."""
    if type(model) is VisionTransformer and model.global_pool == "token" and model.attn_pool is None:
        last = model.blocks[-1]
        if type(last) is Block:
            last.__class__ = _ClassTokenBlock


def _call_qkv_apart(model: nn.Module) -> bool:
    """Have attention (BEiT, SwinV2, EVA) call its qkv layer and then add its biases; same function.

    By default it computes with the layer's weight and never calls it, so that no LoRA would take part.
    """
    found = [module for module in model.modules() if getattr(module, "qkv_bias_separate", None) is False]
    for attention in found:
        attention.qkv_bias_separate = True  # type: ignore[assignment]
    return bool(found)


@torch.no_grad()
def _try_out(backbone: ImageBackbone) -> int:
    """Encode one image of the model's size, see that every layer of the placement is called, and give d."""
    kind, side = type(backbone.model).__name__, backbone.image_size
    uncalled = dict.fromkeys(backbone.placement.layers())  # in order
    hooks = [
        backbone.model.get_submodule(name).register_forward_hook(lambda *_, name=name: uncalled.pop(name, None))
        for name in list(uncalled)
    ]
    was_training = backbone.training
    backbone.eval()  # no statistics are to change
    image = torch.zeros(1, 3, side, side, dtype=torch.uint8)
    tensors = [*backbone.named_parameters(), *backbone.named_buffers()]
    try:
        try:  # with shapes alone, which takes no time
            on_meta = {name: tensor.to("meta") for name, tensor in tensors}
            feature: Tensor = functional_call(backbone, on_meta, (image.to("meta"),))
        except Exception:  # the numbers matter to the model, or it truly cannot
            feature = backbone(image)
    except Exception as error:  # timm's modules raise what they like
        raise BackboneError(
            f"{kind} cannot encode RGB images of {side} x {side} pixels: {error}; {_INSTEAD}"
        ) from error
    finally:
        backbone.train(was_training)
        for hook in hooks:
            hook.remove()
    if feature.ndim != 2:
        raise BackboneError(f"{kind} gives {tuple(feature.shape)} for an image instead of a vector; {_INSTEAD}")
    if uncalled:
        raise BackboneError(
            f"{kind} computes past its layer {next(iter(uncalled))}, which LoRA could not reach; {_INSTEAD}"
        )
    return feature.shape[1]


def _remix(images: Tensor, *, generator: torch.Generator | None) -> Tensor:
    """Make images (n, 3, H, W) in [0, 1] that are like many others: zoomed, recoloured, mixed with one another.

    They are not trained on: features of them show how features move where no example of a class is at hand.
    """
    n = len(images)
    images = _augment(images, smallest=0.2, generator=generator)
    draw = torch.rand(n, 5, generator=generator).to(images.device)[:, :, None, None]
    middle = images.mean((2, 3), keepdim=True)
    contrast, brightness = 0.35 + 1.3 * draw[:, :1], 0.5 + draw[:, 1:4]  # of all channels; of each
    images = ((images - middle) * contrast + middle * brightness).clamp(0, 1)
    return torch.lerp(images, images.roll(1, 0), draw[:, 4:])


def _augment(images: Tensor, *, smallest: float, generator: torch.Generator | None) -> Tensor:
    """Flip each image with probability 1/2, and zoom into a random part of its area, `smallest` to 1."""
    n = len(images)
    draw = torch.rand(n, 4, generator=generator).to(images.device)
    flip = torch.where(draw[:, 0] < 0.5, -1.0, 1.0)
    zoom = (smallest + (1 - smallest) * draw[:, 1]).sqrt()
    shift = (2 * draw[:, 2:] - 1) * (1 - zoom).unsqueeze(1)
    theta = images.new_zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = zoom * flip, zoom, shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
