"""A residual with the hash of its content, and what takes a client from one to the next.

Server and clients name a base by its SHA-256: what was added up in another order, on another timeline or from a
damaged file has another name. Steps are added one by one, each rounded once (see `Step`), so all who walk the
same chain arrive at the same bits.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from fedtalora_flwr.aggregation.factors import Step


@dataclass(frozen=True)
class ResidualVersion:
    """What is added to the frozen weights: ``W = W_0 + residual``.

    Parameters
    ----------
    residual
        (d_out, d_in) float32 of each module; none before the first aggregation.
    """

    residual: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, shapes and bits, in order of name."""
        content = hashlib.sha256()
        for name in sorted(self.residual):
            value = self.residual[name].contiguous()
            content.update(f"{name} {tuple(value.shape)}\n".encode())
            content.update(value.numpy().data)
        return content.hexdigest()


ZERO = ResidualVersion()  # where every run begins: known to everyone, so it is never sent


@dataclass(frozen=True)
class Patch:
    """What a client needs to reach the server's base.

    Parameters
    ----------
    chain
        Digests of bases, one step apart, of which the client is thought to hold the first; the last is the
        server's. Alone, it says that the client needs no other base to start from.
    steps
        ``steps[i]`` leads from ``chain[i]`` to ``chain[i + 1]``.
    dense
        Modules whose residual is set rather than stepped to.
    """

    chain: tuple[str, ...]
    steps: tuple[Mapping[str, Step], ...] = ()
    dense: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def target(self) -> str:
        """Digest of the server's base."""
        return self.chain[-1]

    def applied_to(self, start: ResidualVersion) -> ResidualVersion:
        """Walk the rest of the chain from `start`, one of its bases; the argument is not changed.

        Raises
        ------
        ValueError
            If `start` is not on the chain, where there is one.
        """
        residual = dict(start.residual) if self.steps else {}
        for step in self.steps[self.chain.index(start.digest) :] if self.steps else ():
            residual |= {name: change.added_to(residual.get(name)) for name, change in step.items()}
        return ResidualVersion({**residual, **self.dense})
