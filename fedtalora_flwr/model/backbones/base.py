"""A pre-trained encoder, and where in it LoRA can go."""

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtalora_flwr.data import Source, Split
from fedtalora_flwr.data.source import Modality


class BackboneError(ValueError):
    """A backbone that cannot be had; the message says what was looked for and where it can come from."""


@dataclass(frozen=True)
class Placement:
    """The places in a transformer that the LoRA settings speak of.

    Parameters
    ----------
    blocks
        Module name of every transformer block, from the input up.
    roles
        Role (q, k, v, qkv, in_proj, proj, fc1, fc2) -> names of its Linear layers inside a block: one, or the two
        inputs of a gated MLP.
    """

    blocks: tuple[str, ...]
    roles: Mapping[str, tuple[str, ...]]

    def layers(self) -> list[str]:
        """Name every Linear of every block."""
        return [f"{block}.{name}" for block in self.blocks for names in self.roles.values() for name in names]


class Backbone(nn.Module):
    """A pre-trained encoder from raw inputs to features.

    Attributes
    ----------
    model
        The library's own module; adapter keys are names in ``model.named_modules()``.
    modality
        ``image``, ``text``, or ``instruction`` of a language model.
    feature_dim
        d, the size of a feature vector.
    placement
        Where LoRA can go.
    hub_name
        What the library fetches the untouched model by; None where it comes from files of this machine or is resized.
    feature_norm
        ``rms`` scales every feature vector to a mean square of 1, so that one recipe and one regularisation suit any
        backbone; ``none`` leaves it as it is.
    """

    model: nn.Module
    modality: Modality
    feature_dim: int
    placement: Placement
    hub_name: str | None = None
    feature_norm: str = "rms"

    @abstractmethod
    def encode(self, split: Split, rows: NDArray[np.int64], *, source: Source) -> Tensor:
        """Read rows of a split of `source` into one CPU tensor.

        It is uint8 (N, 3, H, W), int32 tokens (N, L), or of instructions int32 (N, 2, L): tokens, and those to learn.
        """

    def batch_order(self, inputs: Tensor) -> Tensor:
        """Order encoded inputs (N, ...) so that batches of neighbours are cheap; (N,) int64."""
        return torch.arange(len(inputs))

    def forward(self, batch: Tensor, *, augment: str = "none", generator: torch.Generator | None = None) -> Tensor:
        """Compute features (n, d) of an encoded batch on its device, augmented as asked, and scaled."""
        pooled = self.pool(batch, augment=augment, generator=generator)
        return F.normalize(pooled, dim=-1) * pooled.shape[-1] ** 0.5 if self.feature_norm == "rms" else pooled

    @abstractmethod
    def pool(self, batch: Tensor, *, augment: str, generator: torch.Generator | None) -> Tensor:
        """Compute features (n, d) as the model gives them; see `forward`."""

    def unfuse_attention(self) -> None:
        """Compute attention as products and a softmax, where the library can; the same function.

        Torch's fused kernel goes back through bf16 on CPUs six times as slowly as through float32, and half of a
        step is lost on it; the products take two thirds of float32's time. They keep the (n, heads, L, L) weights.
        """

    @abstractmethod
    def save(self, folder: Path, *, class_names: Sequence[str] = (), rows: Mapping[str, Tensor] | None = None) -> bool:
        """Write the model, not adapted by PEFT, as a folder that its own library loads.

        Parameters
        ----------
        folder
            Made if it is not there.
        class_names
            Name of each class, for the library's configuration file where that has a use for them.
        rows
            ``weight`` (C, d) and ``bias`` (C,) of a classifier on the features.

        Returns
        -------
        Whether the rows are part of what was written: not every architecture has a place for them.
        """

    @abstractmethod
    def preparation(self) -> dict[str, Any]:
        """Give what `forward` and `encode` take and do to inputs, for a JSON file."""


def find_placement(model: nn.Module, *, blocks: re.Pattern[str], roles: Mapping[str, Sequence[str]]) -> Placement:
    """Find the blocks of a model and the Linear layers in them.

    Parameters
    ----------
    model
        The library's module.
    blocks
        Full match on the name of a block.
    roles
        Role -> names its Linear layers go by in different architectures; all of those in the first block count.

    Raises
    ------
    BackboneError
        If no block or no Linear is found, or a later block lacks a Linear of the first.
    """
    names = tuple(name for name, _ in model.named_modules() if blocks.fullmatch(name))
    if not names:
        raise BackboneError(f"{type(model).__name__} has no transformer blocks by a name that is known here")
    inside = {name for name, module in model.get_submodule(names[0]).named_modules() if isinstance(module, nn.Linear)}
    found = {role: tuple(n for n in spellings if n in inside) for role, spellings in roles.items()}
    placement = Placement(names, {role: layers for role, layers in found.items() if layers})
    if not placement.roles:
        raise BackboneError(f"{names[0]} of {type(model).__name__} has no layer known here; it has {sorted(inside)}")
    there = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if absent := [layer for layer in placement.layers() if layer not in there]:
        raise BackboneError(f"{type(model).__name__} has blocks of different kinds: it has no layer {absent[0]}")
    return placement
