"""The server's memory of who holds which base, and the cheapest way to bring everyone to the newest."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from fedtalora_flwr.aggregation.factors import Step, num_sent
from fedtalora_flwr.residual.version import ZERO, Patch, ResidualVersion


class Ledger:
    """The bases of a run, newest last, with the steps between them as long as these are worth sending.

    Parameters
    ----------
    residual
        The server's, where the run begins or goes on from.

    Attributes
    ----------
    base
        The newest, which everyone must reach.
    held
        Partition id -> digest of the base that the client last showed to hold. A partition that is not here is
        taken to hold `ZERO`, which needs no memory; `None` stands for nothing at all.
    """

    def __init__(self, residual: Mapping[str, Tensor]) -> None:
        self.base = ResidualVersion(residual)
        self.held: dict[int, str | None] = {}
        self._chain = [self.base.digest]
        self._steps: list[Mapping[str, Step]] = []  # _steps[i] leads from _chain[i] to _chain[i + 1]
        self._patches: dict[str | None, Patch] = {}

    def advance(self, residual: Mapping[str, Tensor], step: Mapping[str, Step]) -> None:
        """Take in the residual of a new state, and the step that led there where it has one."""
        self.base = ResidualVersion(residual)
        self._patches.clear()
        if self.base.digest == self._chain[-1]:
            return
        self._chain.append(self.base.digest)
        self._steps.append(step)
        dense = sum(value.numel() for value in residual.values())
        while self._steps and sum(num_sent(step, residual) for step in self._steps) >= dense:
            del self._steps[0], self._chain[0]  # whoever holds that base is better served with the dense one

    def acknowledge(self, partition_id: int) -> None:
        """Note that a client has reached the newest base."""
        self.held[partition_id] = self.base.digest

    def report(self, partition_id: int, digests: Iterable[str]) -> None:
        """Note which bases a client says it holds: the newest that is on our chain counts."""
        there = set(digests)
        self.held[partition_id] = next((digest for digest in reversed(self._chain) if digest in there), None)

    def patch(self, partition_id: int) -> Patch:
        """Give what a client needs, each module in steps or dense, whichever holds fewer numbers.

        Clients that hold the same base share one object.
        """
        held = self.held.get(partition_id, ZERO.digest)
        if held not in self._patches:
            self._patches[held] = self._packed(held)
        return self._patches[held]

    def _packed(self, held: str | None) -> Patch:
        residual, target = self.base.residual, self.base.digest
        if held == target:
            return Patch((target,))
        if held not in self._chain:
            return Patch((target,), dense=residual)
        steps = self._steps[self._chain.index(held) :]
        dense = {
            name: value
            for name, value in residual.items()
            if sum(step[name].numel if name in step else value.numel() for step in steps) >= value.numel()
        }
        if len(dense) == len(residual):
            return Patch((target,), dense=residual)
        rest = tuple({name: change for name, change in step.items() if name not in dense} for step in steps)
        return Patch(tuple(self._chain[self._chain.index(held) :]), rest, dense)
