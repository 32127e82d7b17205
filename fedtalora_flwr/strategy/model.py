"""A PEFT model to and from what travels: the two calls that a client makes.

A layer computes with ``W + s B A``. Loading **sets** ``W = W_0 + R``; W_0 is kept beside it from the first residual on,
so that what arrives twice, or after rounds that were missed, gives the same weights.

A model whose rank r_k is below the server's r trains the first r_k directions of the pair. The rest of the pair goes
into the frozen weight, so that training starts from the whole model:

    W = W_0 + R + s B[:, r_k:] A[r_k:],   s_k B_k A_k = s B[:, :r_k] A[:r_k]
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import Array, ArrayRecord
from peft import PeftModel, PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn

from fedtalora_flwr.aggregation import LoraFactors, Step
from fedtalora_flwr.strategy.arrays import LORA_A, LORA_B, PeftArrays, tensor_of

_PRISTINE = "fedtalora_pristine"  # buffer of a layer: W_0
_VERSION = "fedtalora_version"  # attribute of a model: of what was loaded last


class NotExact(ValueError):
    """A model whose weights cannot be averaged exactly; the message names the layer and what it uses."""


def get_arrays(model: PeftModel) -> ArrayRecord:
    """Give what a reply holds, and the initial arrays of a run: the pair of the active adapter and all else it trains.

    Parameters
    ----------
    model
        A LoRA model of PEFT's.

    Raises
    ------
    NotExact
        If the model has something that cannot be averaged exactly.
    """
    adapter, layers = _adapted_layers(model)
    state: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=adapter)
    adapters = {
        name: LoraFactors(state.pop(name + LORA_A), state.pop(name + LORA_B), layer.scaling[adapter])
        for name, layer in layers.items()
    }
    others = {key: Array(_as_numpy_can_hold(value)) for key, value in state.items()}
    return PeftArrays(adapters, others, getattr(model, _VERSION, 0)).record()


@torch.no_grad()
def set_arrays(model: PeftModel, arrays: ArrayRecord) -> None:
    """Set a model to what the server sent; what it was before is gone.

    Parameters
    ----------
    model
        A LoRA model of PEFT's, around the same base as everybody's; of the server's rank or a lower one.
    arrays
        What came in the message, or ``Result.arrays``.

    Raises
    ------
    NotExact
        If the model has something that cannot be averaged exactly.
    ValueError
        If the arrays are not those of such a model.
    """
    adapter, layers = _adapted_layers(model)
    sent = PeftArrays.read(arrays)
    state = {key: tensor_of(key, array) for key, array in sent.others.items()}
    ours = get_peft_model_state_dict(model, adapter_name=adapter).keys()
    theirs = state.keys() | {name + factor for name in sent.adapters for factor in (LORA_A, LORA_B)}
    if ours != theirs:
        missing, unknown = sorted(ours - theirs)[:3], sorted(theirs - ours)[:3]
        raise ValueError(f"the arrays are not of this model: missing {missing}, unknown {unknown}")
    for name, layer in layers.items():
        pair, rest = _split(name, sent.adapters[name], rank=layer.r[adapter], scaling=layer.scaling[adapter])
        state |= {name + LORA_A: pair.lora_A, name + LORA_B: pair.lora_B}
        change = sent.residual.get(name)
        if isinstance(change, Step):
            change = change.added_to(None)
        if rest.rank:
            change = rest.delta() if change is None else change + rest.delta()
        _set_weight(layer, change)
    set_peft_model_state_dict(model, state, adapter_name=adapter)
    setattr(model, _VERSION, sent.version)


def _split(name: str, pair: LoraFactors, *, rank: int, scaling: float) -> tuple[LoraFactors, LoraFactors]:
    """Split a pair into the directions that a model of this rank and scaling trains, and the rest."""
    if rank > pair.rank:
        raise ValueError(
            f"{name} has rank {rank}, the server's is {pair.rank}: the server's model has the largest rank"
        )
    lora_B = pair.scaling / scaling * pair.lora_B[:, :rank]
    return (
        LoraFactors(pair.lora_A[:rank], lora_B, scaling),
        LoraFactors(pair.lora_A[rank:], pair.lora_B[:, rank:], pair.scaling),
    )


def _set_weight(layer: Linear, change: Tensor | None) -> None:
    """Set ``W = W_0 + change``, for a change of (d_out, d_in); the weight of a Conv1D lies transposed."""
    weight = layer.get_base_layer().weight
    if not hasattr(layer, _PRISTINE):
        if change is None:
            return
        layer.register_buffer(_PRISTINE, weight.detach().clone(), persistent=False)
    pristine = layer.get_buffer(_PRISTINE)
    if change is None:
        weight.copy_(pristine)
        return
    torch.add(pristine, (change.T if layer.fan_in_fan_out else change).to(weight.device), out=weight.data)


def _adapted_layers(model: PeftModel) -> tuple[str, Mapping[str, Linear]]:
    """Give the active adapter and its layers by name, all of which can be averaged exactly."""
    if not isinstance(model, PeftModel):
        raise NotExact(f"{type(model).__name__} is no PeftModel: make one by peft.get_peft_model")
    if len(model.active_adapters) != 1:
        raise NotExact(f"adapters {', '.join(model.active_adapters)} are active: activate one by set_adapter")
    (adapter,) = model.active_adapters
    if model.peft_config[adapter].peft_type != PeftType.LORA:
        raise NotExact(f"adapter {adapter} is {model.peft_config[adapter].peft_type.value}: it must be LORA")
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    layers = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter not in {*layer.lora_A, *layer.lora_embedding_A}:
            continue
        if reason := _why_not_exact(layer, adapter, uses):
            raise NotExact(f"{name} {reason}")
        layers[name] = layer
    return adapter, layers


def _why_not_exact(layer: Any, adapter: str, uses: Mapping[int, int]) -> str | None:
    """Say what of a LoRA layer cannot be averaged exactly, if anything."""
    if type(layer) is not Linear:
        return (
            f"is LoRA on a layer of the kind {type(layer).__name__}: only Linear and Conv1D have a dense weight to set"
        )
    if adapter in layer.lora_variant:
        return f"uses {type(layer.lora_variant[adapter]).__name__}: its weights are not W_0 + scaling B A"
    if layer.lora_bias[adapter]:
        return "has lora_bias: turn it off, or train biases by bias='lora_only'"
    if layer.merged:
        return "is merged: call unmerge_adapter first"
    weight = layer.get_base_layer().weight
    for part in (weight, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight):
        if not isinstance(part, nn.Parameter) or part.dtype != torch.float32:
            kind = str(part.dtype).removeprefix("torch.")
            return f"holds {kind}, in which a residual is lost: load the model in float32 and train it under autocast"
    if uses[id(weight)] > 1:
        return "shares its weight with another layer, which a residual would change too: untie them first"
    return None


def _as_numpy_can_hold(value: Tensor) -> Tensor:
    """Give half precision as float32: NumPy has no bfloat16, and a sum of float16 may overflow."""
    return value.float() if value.is_floating_point() and value.element_size() < 4 else value
