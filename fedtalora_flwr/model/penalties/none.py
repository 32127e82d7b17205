"""No penalty: cross-entropy alone."""

from dataclasses import dataclass

from fedtalora_flwr.model.penalties.base import Penalty, Start


@dataclass(frozen=True)
class NoPenalty(Penalty):
    """Add nothing."""

    uses_old_rows: bool = False

    def begin(self, start: Start) -> None:
        """Give no term."""


def create() -> NoPenalty:
    """Build the penalty."""
    return NoPenalty()
