"""The product of a frozen weight with a LoRA pair beside it, as one node of autograd's graph.

With s the scaling and rows x of the input,

    y = x W^T + b + s (x A^T) B^T

W, frozen, gives the precision of all products; A and B stay as the optimiser holds them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


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
