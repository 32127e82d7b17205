"""Matrices in factors: a layer's pair, and what one aggregation adds to the residual, the same bits on every machine.

The server adds a step to its residual, and so does every client; both must end with the same base, bit for bit,
whatever their BLAS, threads or device. So the factors lie on a grid: integers of at most 24 bits times one power
of two, with rows of `left` and columns of `right` no longer than 2^26 of their units. By Cauchy and Schwarz every
partial sum of ``left @ right`` in float64 is then an integer below 2^53, exact in any order, and rounding it to
float32 gives one answer. The grid changes a step by about 1e-7 of its norm.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FACTORS = frozenset({"lora_A", "lora_B"})


@dataclass(frozen=True)
class LoraFactors:
    """One layer's low-rank pair (LoRA, arXiv 2106.09685): it adds ``scaling * lora_B @ lora_A``.

    Parameters
    ----------
    lora_A
        (rank, d_in).
    lora_B
        (d_out, rank).
    scaling
        alpha / rank.
    """

    lora_A: Tensor  # (rank, d_in)
    lora_B: Tensor  # (d_out, rank)
    scaling: float

    @classmethod
    def initial(cls, *, rank: int, d_in: int, d_out: int, scaling: float, generator: torch.Generator) -> "LoraFactors":
        """Draw LoRA's usual start, which adds nothing yet: lora_A Kaiming-uniform, lora_B zero."""
        lora_A = nn.init.kaiming_uniform_(torch.empty(rank, d_in), a=math.sqrt(5), generator=generator)
        return cls(lora_A, torch.zeros(d_out, rank), scaling)

    @classmethod
    def dense(cls, *, d_in: int, d_out: int) -> "LoraFactors":
        """Give the pair of full rank that adds nothing yet: lora_A the identity, lora_B zero, scaling 1."""
        return cls(torch.eye(d_in), torch.zeros(d_out, d_in), 1.0)

    @property
    def rank(self) -> int:
        """Number of rows of lora_A."""
        return self.lora_A.shape[0]

    @property
    def is_dense(self) -> bool:
        """Whether lora_A is the identity, as `dense` makes it, so that lora_B is the weight's change itself."""
        rank, d_in = self.lora_A.shape
        return rank == d_in and torch.equal(self.lora_A, torch.eye(d_in, dtype=self.lora_A.dtype))

    def parted(self, rank: int) -> tuple["LoraFactors", "LoraFactors"]:
        """Take the pair apart into its first `rank` rows and the rest; the sum of their products is this pair's."""
        sizes = [rank, self.rank - rank]
        first_A, rest_A = self.lora_A.split(sizes)  # type: ignore[no-untyped-call]
        first_B, rest_B = self.lora_B.split(sizes, dim=1)  # type: ignore[no-untyped-call]
        return LoraFactors(first_A, first_B, self.scaling), LoraFactors(rest_A, rest_B, self.scaling)

    def beside(self, first: "LoraFactors") -> "LoraFactors":
        """Put the rows of a pair of the same scaling before these: what `parted` took apart."""
        assert first.scaling == self.scaling
        return LoraFactors(
            torch.cat([first.lora_A, self.lora_A]), torch.cat([first.lora_B, self.lora_B], 1), self.scaling
        )

    def delta(self) -> Tensor:
        """Form the dense product ``scaling * lora_B @ lora_A``, shape (d_out, d_in): the one place that does."""
        if self.is_dense:
            return self.scaling * self.lora_B
        return self.scaling * (self.lora_B @ self.lora_A)


@dataclass(frozen=True)
class Step:
    """A change ``left @ right`` of one layer's residual.

    Parameters
    ----------
    left
        (d_out, m) float32.
    right
        (m, d_in) float32.
    """

    left: Tensor  # (d_out, m)
    right: Tensor  # (m, d_in)

    @property
    def numel(self) -> int:
        """Numbers in both factors: m (d_out + d_in)."""
        return self.left.numel() + self.right.numel()

    @property
    def shape(self) -> tuple[int, int]:
        """The layer's (d_out, d_in)."""
        return self.left.shape[0], self.right.shape[1]

    def added_to(self, residual: Tensor | None) -> Tensor:
        """Add the step to a (d_out, d_in) float32 residual, or to zero; the argument is not changed."""
        dense = (self.left.double() @ self.right.double()).float()
        return dense if residual is None else dense.add_(residual)

    def energy(self) -> float:
        """Squared Frobenius norm of the product, from the factors alone."""
        left, right = self.left.double(), self.right.double()
        return float(((left.T @ left) * (right @ right.T)).sum())


def num_sent(step: Mapping[str, Step], residual: Mapping[str, Tensor]) -> int:
    """Count the numbers that are sent of a residual: those of its steps, all of a layer that has none."""
    return sum(step[name].numel if name in step else value.numel() for name, value in residual.items())


def added(change: Step | Tensor, *, to: Tensor | None) -> Tensor:
    """Add a change, in factors or dense, to a (d_out, d_in) residual or to zero."""
    if isinstance(change, Step):
        return change.added_to(to)
    return change if to is None else to + change


def on_grid(left: Tensor, right: Tensor) -> Step:
    """Round factors, in place, to the grid on which their product is exact (see the module's first lines)."""
    return Step(_rounded(left, inner=1), _rounded(right, inner=0))


def pays(inner: int, shape: tuple[int, int]) -> bool:
    """Tell whether factors of this inner size hold fewer numbers than the dense (d_out, d_in) matrix."""
    return inner * sum(shape) < math.prod(shape)


def core_svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Decompose a float64 product (d_out, m) @ (m, d_in) by its small core alone, after a QR of each factor.

    Returns
    -------
    Q_l, U, S, V^T, Q_r with ``left @ right = (Q_l U) diag(S) (V^T Q_r)``, singular values falling; U and V, the columns
    of Q_l and the rows of Q_r are orthonormal.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, singular, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return q_left, u, singular, vh, q_right.T


def by_strength(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Rewrite a float64 product by its SVD: orthogonal columns and rows, the strongest first, zeros left out.

    The singular values are shared out evenly.
    """
    q_left, u, singular, vh, q_right = core_svd(left, right)
    there = int((singular > 1e-12 * singular[:1]).sum())
    root = singular[:there].sqrt()
    return (q_left @ u[:, :there]) * root, root.unsqueeze(1) * (vh[:there] @ q_right)


def strongest(lost: Step | Tensor, *, owed: Step | None, energy: float) -> tuple[Step | Tensor, Step]:
    """Split a change and what is owed from before into what is sent now and what is owed next.

    Parameters
    ----------
    lost
        What the last aggregation lost.
    owed
        What was left out so far.
    energy
        The share of the squared Frobenius norm that is sent at least, in (0, 1).

    Returns
    -------
    What is sent, dense where factors would not be smaller, in which case nothing is owed; and the rest.
    """
    if isinstance(lost, Tensor):
        return (lost if owed is None else owed.added_to(lost)), _nothing(lost.shape[0], lost.shape[1])
    if owed is not None:
        lost = Step(torch.cat([lost.left, owed.left], 1), torch.cat([lost.right, owed.right], 0))
    left, right = by_strength(lost.left.double(), lost.right.double())
    squares = left.square().sum(0) ** 2  # squared singular values, each being shared out evenly
    kept = min(len(squares), int((squares.cumsum(0) < energy * squares.sum()).sum()) + 1)
    if not pays(kept, lost.shape):
        return lost.added_to(None), _nothing(*lost.shape)
    return on_grid(left[:, :kept], right[:kept]), Step(left[:, kept:].float(), right[kept:].float())


def _nothing(d_out: int, d_in: int) -> Step:
    return Step(torch.zeros(d_out, 0), torch.zeros(0, d_in))


def kept_energy(sent: Mapping[str, Step], owed: Mapping[str, Step]) -> float:
    """Give the share of the energy that was sent, over all layers; what is sent and owed is orthogonal."""
    there = sum(step.energy() for step in sent.values())
    missing = sum(step.energy() for step in owed.values())
    return there / (there + missing) if missing else 1.0


def _rounded(factor: Tensor, *, inner: int) -> Tensor:
    """Round in place along the grid, and give the float32 that holds it; `inner` is the dimension summed over."""
    low, high = factor.aminmax() if factor.numel() else (0.0, 0.0)
    largest = max(-float(low), float(high))
    if largest == 0.0:
        return factor.float()
    # The squares of numbers so small or so large are beyond float32.
    wide = None if 2.0**-50 < largest < 2.0**50 else torch.float64
    longest = float(torch.linalg.vector_norm(factor, dim=inner, dtype=wide).max())
    spacing = 2.0 ** max(math.ceil(math.log2(largest)) - 24, math.ceil(math.log2(longest)) - 26)
    if spacing < 2.0**-100:  # its inverse is beyond float32
        factor = factor.double()
    return factor.mul_(1 / spacing).round_().mul_(spacing).float()
