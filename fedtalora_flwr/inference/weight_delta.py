"""What a run adds to the layers of the untouched backbone: ``W - W_0 = R + s B A``, whole or as LoRA factors.

As factors, the residual R = U V is extra rank behind the trained pair,

    s [B  U/s] [A; V] = s B A + U V

LoRA on a part of a fused qkv goes back into the rows of that part.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtalora_flwr.aggregation import GlobalState, LoraFactors
from fedtalora_flwr.aggregation.core import on_layer
from fedtalora_flwr.model.lora import AdaptedModel, SplitQKV

_LEFT_OUT = 1e-6  # share of a residual's norm below which its directions are float32's rounding


@dataclass(frozen=True)
class Change:
    """What a run adds to one Linear of the untouched backbone.

    Parameters
    ----------
    factors
        The trained pair.
    residual
        (d_out, d_in).
    """

    factors: LoraFactors
    residual: Tensor  # (d_out, d_in)

    def dense(self) -> Tensor:
        """Add both up: (d_out, d_in) float64."""
        return self.residual.double() + self.factors.delta().double()

    def as_factors(self) -> LoraFactors:
        """Carry the residual as extra rank: the first rows of lora_A are the trained ones, bit for bit."""
        left, right = _factored(self.residual)
        pair = self.factors
        return LoraFactors(
            lora_A=torch.cat([pair.lora_A, right]),
            lora_B=torch.cat([pair.lora_B, left / pair.scaling], dim=1),
            scaling=pair.scaling,
        )


def changes_of(model: AdaptedModel, state: GlobalState) -> dict[str, Change]:
    """Gather what a state adds to each layer, by the layer's name in the untouched backbone.

    Parameters
    ----------
    model
        The adapted model that the state's keys belong to; parts of a fused qkv become rows of it.
    state
        Its adapters and residual.
    """
    changes: dict[str, Change] = {}
    for name, pair in state.adapters.items():
        factors = on_layer(name, pair, state.residual)
        d_out, d_in = factors.lora_B.shape[0], factors.lora_A.shape[1]
        change = Change(factors, state.residual.get(name, torch.zeros(d_out, d_in)))
        parent, _, part = name.rpartition(".")
        layer = model.backbone.model.get_submodule(parent)
        if isinstance(layer, SplitQKV):
            change = _in_rows_of(change, index=list(dict(layer.named_children())).index(part))
            changes[parent] = _joined(changes[parent], change) if parent in changes else change
        else:
            changes[name] = change
    return changes


def _in_rows_of(change: Change, *, index: int) -> Change:
    """Put the change of q, k or v, of which `index` counts, into its third of the fused layer's rows."""
    d_out = change.residual.shape[0]
    rows = (0, 0, index * d_out, (2 - index) * d_out)
    pair = change.factors
    return Change(LoraFactors(pair.lora_A, F.pad(pair.lora_B, rows), pair.scaling), F.pad(change.residual, rows))


def _joined(first: Change, second: Change) -> Change:
    """Add two changes of one layer; their pairs stand side by side."""
    a, b = first.factors, second.factors
    assert a.scaling == b.scaling, "one alpha and rank for all layers"
    pair = LoraFactors(torch.cat([a.lora_A, b.lora_A]), torch.cat([a.lora_B, b.lora_B], dim=1), a.scaling)
    return Change(pair, first.residual + second.residual)


def _factored(residual: Tensor) -> tuple[Tensor, Tensor]:
    """Factor a residual into (d_out, m) and (m, d_in) float32, m its rank."""
    left, values, right = torch.linalg.svd(residual.double(), full_matrices=False)
    left_out = values.square().flip(0).cumsum(0).flip(0).sqrt()  # (min(d_out, d_in),) norm of the rest from here on
    rank = int((left_out > _LEFT_OUT * left_out[0]).sum())
    root = values[:rank].sqrt()
    return (left[:, :rank] * root).float(), (root.unsqueeze(1) * right[:rank]).float()
