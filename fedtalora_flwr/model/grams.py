"""The second moments of what adapted layers are given on a client's examples, which LoRM merges by."""

from typing import Any

import torch
from torch import Tensor, nn

from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.model.backbones.lm import LanguageBackbone
from fedtalora_flwr.model.lora import AdaptedModel
from fedtalora_flwr.model.train import Examples, autocast


@torch.inference_mode()
def input_grams(model: AdaptedModel, examples: Examples, *, config: RunConfig, inner: bool) -> dict[str, Tensor]:
    """Sum ``x x^T`` over the inputs x of every adapted layer, all tokens counted, by example.

    Parameters
    ----------
    model
        Loaded with the state under which the inputs are taken.
    examples, config
        The client's data, precision and batch size.
    inner
        Take ``lora_A x`` (rank,) in place of x (d_in,).

    Returns
    -------
    By module, the mean over examples, (m, m) float32 on the CPU, m being the rank or d_in.
    """
    sums: dict[str, Tensor] = {}

    def watch(name: str, lora_A: Tensor) -> Any:
        def add(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            rows = arguments[0].flatten(0, -2).float()  # (N, d_in)
            rows = rows @ lora_A.T if inner else rows
            sums[name] = (rows.T @ rows).double().cpu() + sums.get(name, 0)

        return add

    factors, device = model.named_factors(), next(model.parameters()).device
    hooks = [
        layer.register_forward_pre_hook(watch(name, factors[f"lora_A/{name}"])) for name, layer in model.layers.items()
    ]
    model.eval()
    order: Tensor = model.backbone.batch_order(examples.inputs)
    try:
        for part in order.split(config.eval_batch_size):  # type: ignore[no-untyped-call]
            inputs = examples.inputs[part].to(device)
            with autocast(device, config.precision):
                if isinstance(model.backbone, LanguageBackbone):
                    model.backbone.answer_logits(inputs)
                else:
                    model.backbone(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / len(examples)).float() for name, total in sums.items()}
