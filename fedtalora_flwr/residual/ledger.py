"""The server's memory of who holds which base, and the cheapest way to bring everyone to the newest."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from fedtalora_flwr.aggregation.step import Step
from fedtalora_flwr.residual.base import ZERO, Base, Parcel


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
        self.base = Base(residual)
        self.held: dict[int, str | None] = {}
        self._chain = [self.base.digest]
        self._steps: list[Mapping[str, Step]] = []  # _steps[i] leads from _chain[i] to _chain[i + 1]
        self._parcels: dict[str | None, Parcel] = {}

    def advance(self, residual: Mapping[str, Tensor], step: Mapping[str, Step]) -> None:
        """Take in the residual of a new state, and the step that led there where it has one."""
        self.base = Base(residual)
        self._parcels.clear()
        if self.base.digest == self._chain[-1]:
            return
        self._chain.append(self.base.digest)
        self._steps.append(step)
        dense = sum(value.numel() for value in residual.values())
        while self._steps and sum(_numel(step, residual) for step in self._steps) >= dense:
            del self._steps[0], self._chain[0]  # whoever holds that base is better served with the dense one

    def acknowledge(self, partition_id: int) -> None:
        """Note that a client has reached the newest base."""
        self.held[partition_id] = self.base.digest

    def report(self, partition_id: int, digests: Iterable[str]) -> None:
        """Note which bases a client says it holds: the newest that is on our chain counts."""
        there = set(digests)
        self.held[partition_id] = next((digest for digest in reversed(self._chain) if digest in there), None)

    def parcel(self, partition_id: int) -> Parcel:
        """Give what a client needs, each module in steps or dense, whichever holds fewer numbers.

        Clients that hold the same base share one object.
        """
        held = self.held.get(partition_id, ZERO.digest)
        if held not in self._parcels:
            self._parcels[held] = self._packed(held)
        return self._parcels[held]

    def _packed(self, held: str | None) -> Parcel:
        residual, target = self.base.residual, self.base.digest
        if held == target:
            return Parcel((target,))
        if held not in self._chain:
            return Parcel((target,), dense=residual)
        steps = self._steps[self._chain.index(held) :]
        dense = {
            name: value
            for name, value in residual.items()
            if sum(step[name].numel if name in step else value.numel() for step in steps) >= value.numel()
        }
        if len(dense) == len(residual):
            return Parcel((target,), dense=residual)
        rest = tuple({name: change for name, change in step.items() if name not in dense} for step in steps)
        return Parcel(tuple(self._chain[self._chain.index(held) :]), rest, dense)


def _numel(step: Mapping[str, Step], residual: Mapping[str, Tensor]) -> int:
    return sum(step[name].numel if name in step else value.numel() for name, value in residual.items())
