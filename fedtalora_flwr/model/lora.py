"""LoRA in a backbone: where it goes, and setting its weights from the server's state.

PEFT injects the layers (one LoRA on each chosen Linear). The frozen weight W_0 is kept apart, and loading a
state *sets* ``W = W_0 + R``, so that loading twice equals loading once. The product of a frozen weight with a pair
beside it is one node of autograd's graph: with s the scaling and rows x of the input,

    y = x W^T + b + s (x A^T) B^T

W, frozen, gives the precision of all products; A and B stay as the optimiser holds them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora as peft_lora
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from fedtalora_flwr.aggregation.core import outer_keys
from fedtalora_flwr.aggregation.factors import LoraFactors
from fedtalora_flwr.model.backbones.base import Backbone, Placement

_ADAPTER = "default"  # PEFT's name for the only adapter in the model
_GROUPS = {"attn": ("q", "k", "v", "qkv", "in_proj", "proj"), "mlp": ("fc1", "fc2")}
_PARTS_OF_QKV = ("q", "k", "v")


class AdaptedProduct(torch.autograd.Function):
    """``x W^T + bias + scaling (x lora_A^T) lora_B^T``, computed in the dtype of W.

    Takes x (..., d_in), W (d_out, d_in), bias (d_out,) or None, lora_A (rank, d_in), lora_B (d_out, rank) and the
    scaling. W and bias have one dtype and get no gradient. x, lora_A and lora_B may have another: each is rounded to
    that of W once, and its gradient comes back in its own. Where all have one dtype nothing is rounded.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
    ) -> Tensor:
        """Give y (..., d_out) in the dtype of W."""
        rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)  # (N, d_in)
        low_A, low_B = lora_A.to(weight.dtype), lora_B.to(weight.dtype)
        inner = rows @ low_A.T  # (N, rank)
        output = F.linear(rows, weight, bias).addmm_(inner, low_B.T, alpha=scaling)
        ctx.save_for_backward(rows, inner, weight, low_A, low_B)
        ctx.scaling = scaling  # type: ignore[attr-defined]
        ctx.dtypes = x.dtype, lora_A.dtype, lora_B.dtype  # type: ignore[attr-defined]
        # No view for autograd, so that a bias can be added in place.
        shaped: Tensor = torch.ops.aten._unsafe_view(output, [*x.shape[:-1], output.shape[-1]])
        return shaped

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Give the gradients of x, lora_A and lora_B where they are wanted."""
        rows, inner, weight, low_A, low_B = ctx.saved_tensors
        wants_x, _, _, wants_A, wants_B, _ = ctx.needs_input_grad
        dtype_x, dtype_A, dtype_B = ctx.dtypes
        of_output = gradient.reshape(-1, gradient.shape[-1])  # (N, d_out)
        of_inner = (of_output @ low_B).mul_(ctx.scaling)  # (N, rank)
        of_x = of_A = of_B = None
        if wants_x:
            of_x = (of_output @ weight).addmm_(of_inner, low_A).view(*gradient.shape[:-1], -1).to(dtype_x)
        if wants_A:
            of_A = (of_inner.T @ rows).to(dtype_A)
        if wants_B:
            of_B = (inner.T @ of_output).to(dtype_B).mul_(ctx.scaling).T  # faster than of_output.T @ inner
        return of_x, None, None, of_A, of_B, None


class PlacementError(ValueError):
    """LoRA settings that match nothing in the backbone; the message lists what there is."""


class SplitQKV(nn.Module):
    """A fused qkv projection as three Linear layers, so that LoRA can go on some of them.

    Parameters
    ----------
    fused
        (3 d, d_in) Linear; rows ordered q, k, v as in timm and ModernBERT.
    """

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        for name, rows in zip(_PARTS_OF_QKV, fused.weight.chunk(3), strict=True):
            part = nn.Linear(fused.in_features, rows.shape[0], bias=fused.bias is not None)
            part.weight = nn.Parameter(rows.detach().clone())
            self.add_module(name, part)
        if fused.bias is not None:
            for name, bias in zip(_PARTS_OF_QKV, fused.bias.chunk(3), strict=True):
                self.get_submodule(name).bias = nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Project to q, k, v side by side: (..., 3 d)."""
        return torch.cat([self.get_submodule(name)(x) for name in _PARTS_OF_QKV], dim=-1)


class FusedLinear(peft_lora.Linear):  # type: ignore[misc]  # PEFT is untyped
    """PEFT's LoRA on a Linear, computed as one node of autograd's graph.

    PEFT's own forward makes a node of each of its seven operations, four of them passes over (N, d_out) that only
    scale, cast or add. Here the low-rank term is added into the output of the frozen product where that lies.

    Under autocast the frozen weight is rounded once and the copy is kept, until `forget_rounded`. The weight itself,
    ``W_0 + R``, stays in float32: a residual added to a rounded weight would mostly be lost. Where W_0 itself comes in
    fewer bits, R stands beside it, ``beside``, as ``x W_0^T + x R^T``.
    """

    _rounded: tuple[Tensor, Tensor | None] | None = None  # weight and bias
    beside: Tensor | None = None  # (d_out, d_in) float32

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Compute ``x W^T + bias + scaling (x A^T) B^T`` for x (..., d_in), in autocast's dtype where that is on."""
        base, kind = self.get_base_layer(), x.device.type
        weight, bias = base.weight, base.bias
        if torch.is_autocast_enabled(kind):
            weight, bias = self._rounded_to(torch.get_autocast_dtype(kind))
        output: Tensor = AdaptedProduct.apply(x, weight, bias, *self.pair(), self.scaling[_ADAPTER])
        return output if self.beside is None else output + F.linear(x.float(), self.beside).to(output.dtype)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Give the factors of the product, (rank, d_in) and (d_out, rank)."""
        return self.lora_A[_ADAPTER].weight, self.lora_B[_ADAPTER].weight

    def forget_rounded(self) -> None:
        """Drop the rounded copy of the frozen weight; to be called when that is set."""
        self._rounded = None

    def _rounded_to(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        if self._rounded is None or self._rounded[0].dtype != dtype:
            base = self.get_base_layer()
            # Evaluation may be the first to ask, and a tensor born in inference mode could never serve in training.
            with torch.inference_mode(False), torch.no_grad():
                bias = None if base.bias is None else base.bias.to(dtype)
                self._rounded = base.weight.to(dtype), bias
        return self._rounded


class CoreLinear(FusedLinear):
    """A core between fixed factors (see `aggregation.core`): ``W + scaling outer_B lora_B outer_A``.

    lora_A is the identity, and is not multiplied.
    """

    outer_A: Tensor  # (rank, d_in)
    outer_B: Tensor  # (d_out, rank)

    def shrink(self) -> None:
        """Make the pair square, and room for the fixed factors, which add nothing yet."""
        for key, factor in (("outer_A", self.lora_A), ("outer_B", self.lora_B)):
            weight, rank = factor[_ADAPTER].weight, self.r[_ADAPTER]
            self.register_buffer(key, torch.zeros_like(weight), persistent=False)
            factor[_ADAPTER] = nn.Linear(rank, rank, bias=False, device=weight.device, dtype=weight.dtype)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Give the factors of the product, (rank, d_in) and (d_out, rank)."""
        return self.outer_A, self.outer_B @ self.lora_B[_ADAPTER].weight

    def set_outer(self, outer_A: Tensor | None, outer_B: Tensor | None) -> None:
        """Set the fixed factors; without them the layer is that of W."""
        for held, given in ((self.outer_A, outer_A), (self.outer_B, outer_B)):
            held.zero_() if given is None else held.copy_(given)


class DenseLinear(peft_lora.Linear):  # type: ignore[misc]
    """A pair of full rank whose lora_A is the identity: lora_B is the change of the weight."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Compute ``x (W + lora_B)^T + bias`` for x (..., d_in)."""
        base = self.get_base_layer()
        return F.linear(x, base.weight + self.lora_B[_ADAPTER].weight, base.bias)


class AdaptedModel(nn.Module):
    """A frozen backbone with one trainable LoRA pair on each chosen Linear.

    Parameters
    ----------
    backbone
        Changed in place: its chosen layers are wrapped by PEFT.
    rank, alpha
        Of LoRA; scaling = alpha / (rank + shared_rank).
    shared_rank
        Rows of each pair before these, which slots share (see `aggregation.slots`).
    blocks, targets
        The settings ``lora-blocks`` and ``lora-targets`` (see `chosen_blocks`, `chosen_roles`).
    dense
        Whether the pairs are of full rank (see `LoraFactors.dense`), whatever `rank` and `alpha`.
    core
        Whether the pairs are cores between fixed factors, which a state's base gives (see `aggregation.core`).

    Raises
    ------
    PlacementError
        If the settings match nothing, or the rank is above what a layer can have.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        rank: int,
        alpha: float,
        blocks: str,
        targets: str,
        shared_rank: int = 0,
        dense: bool = False,
        core: bool = False,
    ) -> None:
        super().__init__()
        names = _prepare_layers(backbone, blocks=blocks, targets=targets)
        ranks = {name: _width(backbone.model.get_submodule(name)) for name in names} if dense else {}
        for name in () if dense else names:
            _check_rank(name, backbone.model.get_submodule(name), rank, shared_rank)
        if dense and any(backbone.model.get_submodule(name).weight.dtype != torch.float32 for name in names):
            raise PlacementError("a method that trains whole weights needs them in float32: set base-dtype=fp32")
        backbone.requires_grad_(False)
        if names:
            config = LoraConfig(
                r=rank + shared_rank,
                lora_alpha=alpha,
                target_modules=names,
                rank_pattern=ranks,
                alpha_pattern=dict(ranks),
            )
            config._register_custom_module({nn.Linear: DenseLinear if dense else CoreLinear if core else FusedLinear})
            inject_adapter_in_model(config, backbone.model, adapter_name=_ADAPTER)
        self.backbone = backbone
        self.rank = rank + shared_rank
        self.dense, self.core = dense, core
        self.layers: dict[str, LoraLayer] = {
            name: module for name, module in backbone.model.named_modules() if isinstance(module, LoraLayer)
        }
        for layer in self.layers.values():
            if isinstance(layer, CoreLinear):
                layer.shrink()
        self._pristine = {  # W_0, of the layers whose weight is set
            name: weight.detach().clone()
            for name in self.layers
            if (weight := self._weight(name)).dtype == torch.float32
        }

    def train_only(self, factors: frozenset[str]) -> list[nn.Parameter]:
        """Let gradients reach `factors` (of lora_A, lora_B) alone, and list these parameters."""
        for key, parameter in self.named_factors().items():
            parameter.requires_grad_(key.partition("/")[0] in factors)
        return [parameter for parameter in self.named_factors().values() if parameter.requires_grad]

    def named_factors(self) -> dict[str, nn.Parameter]:
        """Give the parameters of all pairs, by ``lora_A/<module>`` and ``lora_B/<module>``."""
        return {
            f"{factor}/{name}": getattr(layer, factor)[_ADAPTER].weight
            for name, layer in self.layers.items()
            for factor in ("lora_A", "lora_B")
        }

    def frozen_weights(self) -> dict[str, Tensor]:
        """Give W_0 (d_out, d_in) of every adapted layer."""
        return {name: self._pristine.get(name, self._weight(name)) for name in self.layers}

    def fixed_shapes(self) -> dict[str, tuple[int, ...]]:
        """Give the shapes of what a base holds beside residuals: the fixed factors around each core."""
        return {
            key: tuple(value.shape)
            for name, layer in self.layers.items()
            if isinstance(layer, CoreLinear)
            for key, value in zip(outer_keys(name), (layer.outer_A, layer.outer_B), strict=True)
        }

    def initial_factors(self, *, seed: int) -> dict[str, LoraFactors]:
        """Draw the start of every pair (see `LoraFactors.initial`), the same for a seed on any machine."""
        if self.dense:
            return {
                name: LoraFactors.dense(d_in=layer.in_features, d_out=layer.out_features)
                for name, layer in self.layers.items()
            }
        if self.core:
            square = LoraFactors.dense(d_in=self.rank, d_out=self.rank)
            return {name: replace(square, scaling=layer.scaling[_ADAPTER]) for name, layer in self.layers.items()}
        generator = torch.Generator().manual_seed(seed)
        return {
            name: LoraFactors.initial(
                rank=self.rank,
                d_in=layer.in_features,
                d_out=layer.out_features,
                scaling=layer.scaling[_ADAPTER],
                generator=generator,
            )
            for name, layer in self.layers.items()
        }

    def factor_shapes(self, rank: int | None = None) -> dict[str, tuple[int, int]]:
        """Give the shape of each factor, by the keys of `named_factors`: of the model's rank, or of a part of it."""
        shapes: dict[str, tuple[int, int]] = {}
        for name, layer in self.layers.items():
            rows = layer.in_features if self.dense else rank or self.rank
            d_in, d_out = (rows, rows) if self.core else (layer.in_features, layer.out_features)
            shapes |= {f"lora_A/{name}": (rows, d_in), f"lora_B/{name}": (d_out, rows)}
        return shapes

    @torch.no_grad()
    def load(self, adapters: Mapping[str, LoraFactors], residual: Mapping[str, Tensor]) -> None:
        """Set the model to a state: ``W = W_0 + residual`` and the LoRA pair; what it was before is gone.

        Parameters
        ----------
        adapters
            A pair for every adapted module, of the model's rank or a lower one.
        residual
            (d_out, d_in) for each module; a module without one gets W_0. Beside them the fixed factors around cores.
        """
        for name, layer in self.layers.items():
            weight, pristine = self._weight(name), self._pristine.get(name)
            if pristine is None:
                layer.beside = residual[name].to(weight.device) if name in residual else None
            elif name in residual:
                torch.add(pristine, residual[name].to(weight.device), out=weight.data)
            else:
                weight.copy_(pristine)
            if isinstance(layer, FusedLinear):
                layer.forget_rounded()
            if isinstance(layer, CoreLinear):
                layer.set_outer(*(residual.get(key) for key in outer_keys(name)))
            _set(layer.lora_A[_ADAPTER].weight, adapters[name].lora_A)
            _set(layer.lora_B[_ADAPTER].weight, adapters[name].lora_B)

    def factors(self) -> dict[str, LoraFactors]:
        """Copy the current pairs to the CPU."""
        return {
            name: LoraFactors(
                layer.lora_A[_ADAPTER].weight.detach().float().cpu().clone(),
                layer.lora_B[_ADAPTER].weight.detach().float().cpu().clone(),
                layer.scaling[_ADAPTER],
            )
            for name, layer in self.layers.items()
        }

    def _weight(self, name: str) -> nn.Parameter:
        weight = self.layers[name].get_base_layer().weight
        assert isinstance(weight, nn.Parameter)
        return weight


def _set(factor: nn.Parameter, value: Tensor) -> None:
    """Set a factor of a pair, which may get another rank by it."""
    if factor.shape != value.shape:
        factor.data, factor.grad = factor.new_empty(value.shape), None
    factor.copy_(value)


def chosen_blocks(setting: str, num_blocks: int) -> list[int]:
    """Resolve ``lora-blocks``: ``all``, ``none``, ``0-3``, ``0,2,5``, ``first:3`` or ``last:2``.

    Parameters
    ----------
    setting
        Numbers count from 0, the block next to the input; ranges include both ends.
    num_blocks
        Blocks of the backbone.

    Raises
    ------
    PlacementError
        If the setting cannot be read or names a block that is not there.
    """
    everything = list(range(num_blocks))
    if setting in ("all", "none"):
        return everything if setting == "all" else []
    if ends := re.fullmatch(r"(first|last):(\d+)", setting):
        count = int(ends[2])
        if not 1 <= count <= num_blocks:
            raise PlacementError(f"lora-blocks {setting!r}: the backbone has {num_blocks} blocks")
        return everything[:count] if ends[1] == "first" else everything[-count:]
    chosen: set[int] = set()
    for part in setting.split(","):
        span = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if span is None:
            raise PlacementError(
                f"lora-blocks {setting!r} cannot be read; write all, none, 0-3, 0,2,5, first:3 or last:2"
            )
        low, high = int(span[1]), int(span[2] or span[1])
        if not low <= high < num_blocks:
            raise PlacementError(
                f"lora-blocks {setting!r}: {part.strip()} is out of range, blocks are 0-{num_blocks - 1}"
            )
        chosen |= set(range(low, high + 1))
    return sorted(chosen)


def chosen_roles(setting: str, placement: Placement) -> list[str]:
    """Resolve ``lora-targets``: groups (attn, mlp) and roles (q, k, v, qkv, proj, fc1, fc2) joined by + or ``,``.

    A fused qkv also answers to q, k and v, one by one. A group takes it whole. DeBERTa v1's in_proj is only had whole.

    Raises
    ------
    PlacementError
        If a part names nothing in this backbone.
    """
    there = set(placement.roles) | (set(_PARTS_OF_QKV) if "qkv" in placement.roles else set())
    roles: list[str] = []
    for part in re.split(r"[+,]", setting):
        name = part.strip()
        wanted = [role for role in _GROUPS[name] if role in placement.roles] if name in _GROUPS else [name]
        if not wanted or not set(wanted) <= there:
            raise PlacementError(
                f"lora-targets {setting!r}: {name!r} matches nothing here; this backbone has attn, mlp and "
                f"{', '.join(sorted(there))}"
            )
        roles += wanted
    if "qkv" in roles and set(roles) & set(_PARTS_OF_QKV) and "qkv" in placement.roles:
        raise PlacementError(f"lora-targets {setting!r}: take the fused qkv or its parts q, k, v, not both")
    return list(dict.fromkeys(roles))


def _prepare_layers(backbone: Backbone, *, blocks: str, targets: str) -> list[str]:
    """Name the chosen Linear layers; a fused qkv of which parts are chosen is split first."""
    placement, names = backbone.placement, []
    roles = chosen_roles(targets, placement)
    for index in chosen_blocks(blocks, len(placement.blocks)):
        block = placement.blocks[index]
        for role in roles:
            if role in placement.roles:
                names += [f"{block}.{name}" for name in placement.roles[role]]
                continue
            (name,) = placement.roles["qkv"]
            fused = f"{block}.{name}"
            layer = backbone.model.get_submodule(fused)
            if isinstance(layer, nn.Linear):
                backbone.model.set_submodule(fused, SplitQKV(layer))
            names.append(f"{fused}.{role}")
    return names


def _check_rank(name: str, layer: nn.Module, rank: int, shared_rank: int) -> None:
    assert isinstance(layer, nn.Linear)
    highest = min(layer.in_features, layer.out_features)
    if rank + shared_rank > highest:
        what = "rank and shared-rank together" if shared_rank else "rank"
        raise PlacementError(
            f"{what} must be in [1, {highest}] for the {layer.in_features}->{layer.out_features} layer {name}, got "
            f"{rank + shared_rank}"
        )


def _width(layer: nn.Module) -> int:
    assert isinstance(layer, nn.Linear)
    return layer.in_features


def count_parameters(factors: Mapping[str, LoraFactors], *, only: Sequence[str] = ("lora_A", "lora_B")) -> int:
    """Count the numbers in the named factors of all layers."""
    return sum(getattr(pair, factor).numel() for pair in factors.values() for factor in only)
