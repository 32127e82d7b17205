"""Fed-SB: only a rank x rank core between two fixed factors is trained and averaged (arXiv 2502.15436, 2411.19557).

    W_k  =  W_0 + s B_0 R_k A_0,        sum_k p_k s B_0 R_k A_0  =  s B_0 (sum_k p_k R_k) A_0

so averaging is exact, and rank^2 numbers of a layer travel in a round, either way. B_0 and A_0 go down once, with the
base (see `aggregation.core`). What is learned stays between their columns and rows.

Decided here. The source takes B_0 and A_0 from the SVD of a first gradient of the full weights, from some examples, and
has R begin at its singular values. There is none to be had here: class rows begin at zero, and then the first gradient
of every weight is zero. So ``core-start`` says what they are, and R begins at zero:

- ``random``: orthonormal, drawn from the run's seed;
- ``weights``: the strongest singular vectors of W_0, as LoRA-XS has them (arXiv 2405.17604), without their values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from fedtalora_flwr.aggregation.core import outer_keys
from fedtalora_flwr.aggregation.methods.fedtalora import FedTaLoRA
from fedtalora_flwr.aggregation.types import ClientUpdate, GlobalState

Start = Literal["random", "weights"]


@dataclass(frozen=True)
class FedSB(FedTaLoRA):
    """Plain averages of the core.

    Parameters
    ----------
    core_start
        What the fixed factors are (see the module's first lines).
    seed
        Of random ones.
    """

    core_start: Start = "random"
    seed: int = 0
    core: bool = True

    def start(self, state: GlobalState, weights: Mapping[str, Tensor]) -> GlobalState:
        """Begin with the fixed factors in the base."""
        generator = torch.Generator().manual_seed(self.seed)
        base: dict[str, Tensor] = {}
        for name, pair in state.adapters.items():
            weight = weights[name].double().cpu()
            if self.core_start == "random":
                left, right = (_orthonormal(size, pair.rank, generator=generator) for size in weight.shape)
            else:
                u, _, vh = torch.linalg.svd(weight, full_matrices=False)
                left, right = u[:, : pair.rank], vh[: pair.rank].T
            base |= dict(zip(outer_keys(name), (right.T.float(), left.float()), strict=True))
        return replace(state, residual=base)

    def aggregate(self, state: GlobalState, updates: Sequence[ClientUpdate]) -> GlobalState:
        """Average the cores; the base stays as it is (see `FedTaLoRA.aggregate`)."""
        return replace(super().aggregate(state, updates), residual=state.residual)


def _orthonormal(size: int, rank: int, *, generator: torch.Generator) -> Tensor:
    """Draw `rank` orthonormal columns, (size, rank) float64."""
    q: Tensor = torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64)).Q
    return q


def create(*, core_start: str = "random", seed: int = 0) -> FedSB:
    """Build the method from the settings ``core-start`` and ``seed``.

    Raises
    ------
    ValueError
        If `core_start` is none of random, weights.
    """
    if core_start not in get_args(Start):
        raise ValueError(f"core-start must be one of {', '.join(get_args(Start))}, got {core_start!r}")
    return FedSB(
        residual="off",
        trainable=frozenset({"lora_B"}),
        core_start=core_start,  # type: ignore[arg-type]
        seed=seed,
    )
