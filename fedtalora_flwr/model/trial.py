"""A program that tries out bf16 on this CPU: the training step of one transformer block, in float32 and in bf16.

It prints ``{"speedup": ..., "error": ...}``: how many times faster bf16 is, and how far its numbers are off, in parts
of a tensor's norm. The sizes are those of ``vit_mini``, the smallest backbone that ships; wider layers gain more. It
computes as a run does: with `AdaptedProduct`, and attention in each precision's way (`Backbone.unfuse_attention`).

It runs in a process of its own (see `precision`), which may fault: virtual machines announce bf16 that they lack.
"""

import json
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtalora_flwr.model.lora import AdaptedProduct

IMAGES, TOKENS, HEADS, WIDTH, RANK = 32, 65, 3, 192, 8
REPEATS = 7


class Layer:
    """A frozen Linear with a LoRA pair, and its weight rounded to bf16."""

    def __init__(self, d_in: int, d_out: int) -> None:
        self.weight = torch.randn(d_out, d_in) * d_in**-0.5
        self.rounded = self.weight.bfloat16()
        self.lora_A = (torch.randn(RANK, d_in) * d_in**-0.5).requires_grad_()
        self.lora_B = (torch.randn(d_out, RANK) * RANK**-0.5).requires_grad_()

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the product for x (..., d_in)."""
        weight = self.rounded if torch.is_autocast_enabled("cpu") else self.weight
        return AdaptedProduct.apply(x, weight, None, self.lora_A, self.lora_B, 1.0)  # type: ignore[no-any-return]


class Block:
    """A transformer block without biases."""

    def __init__(self) -> None:
        self.qkv, self.proj = Layer(WIDTH, 3 * WIDTH), Layer(WIDTH, WIDTH)
        self.fc1, self.fc2 = Layer(WIDTH, 4 * WIDTH), Layer(4 * WIDTH, WIDTH)
        self.factors = [
            factor for layer in (self.qkv, self.proj, self.fc1, self.fc2) for factor in (layer.lora_A, layer.lora_B)
        ]

    def step(self, x: Tensor, *, half: bool) -> list[Tensor]:
        """Encode tokens x (n, T, d); give the output and the gradients of x and all factors for the mean square."""
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = x + self._attended(F.layer_norm(x, (WIDTH,)))
            y = y + self.fc2(F.gelu(self.fc1(F.layer_norm(y, (WIDTH,)))))
        return [y.detach(), *torch.autograd.grad(y.square().mean(), [x, *self.factors])]

    def _attended(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(IMAGES, TOKENS, 3, HEADS, -1).permute(2, 0, 3, 1, 4)  # (n, h, T, d / h) each
        if torch.is_autocast_enabled("cpu"):
            mixed = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(x.shape))


def main() -> None:
    """Try bf16 out and print what was found."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    block, x = Block(), torch.randn(IMAGES, TOKENS, WIDTH, requires_grad=True)
    exact, rounded = block.step(x, half=False), block.step(x, half=True)  # which also warms both up
    error = max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in zip(rounded, exact, strict=True))
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(REPEATS):
        for half, taken in seconds.items():
            began = time.process_time()  # not the clock: other programs may want the same cores
            block.step(x, half=half)
            taken.append(time.process_time() - began)
    print(json.dumps({"speedup": min(seconds[False]) / min(seconds[True]), "error": error}))


if __name__ == "__main__":
    main()
