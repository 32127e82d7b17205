"""Why a run cannot go on, and what a round has cost so far and who failed in it."""

from dataclasses import dataclass, field
from typing import Any

from fedtalora_flwr.config.units import one_line
from fedtalora_flwr.run_folder.writer import Failure

LONGEST_REASON = 500  # characters


class RunFailed(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


class TooFewReplies(RunFailed):
    """A round has fewer than ``min-replies`` good replies; the message names everyone's reason."""


@dataclass
class Tally:
    """What a round has cost so far and who failed in it, over all its exchanges.

    Parameters
    ----------
    server_round
        The round.
    participants
        Partitions that were asked to train or to sum.
    failures
        Those that gave no usable reply, and why.
    bytes_up, bytes_down
        Of the replies received and of the messages sent.
    wait_seconds
        Spent waiting for replies.
    resent
        Partitions that had lost the base and were sent it once more.
    weights
        Partitions that counted less than their examples say, relative to the one that counted most, and how much.
    epsilon_spent
        What the task has cost each partition of its privacy so far, where the run is private.
    """

    server_round: int = 0
    participants: set[int] = field(default_factory=set)
    failures: list[Failure] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    wait_seconds: float = 0.0
    resent: set[int] = field(default_factory=set)
    weights: dict[int, float] = field(default_factory=dict)
    epsilon_spent: dict[int, float] = field(default_factory=dict)

    def begin(self, server_round: int, *, keep_failures: bool = False) -> None:
        """Begin a round with nothing in it, but for failures that were found before the first one."""
        failures = self.failures if keep_failures else []
        vars(self).update(vars(Tally(server_round=server_round, failures=failures)))

    def fail(self, partition: int, reason: str) -> None:
        """Note a failure on one line and not for ever long: a client may have written the reason."""
        self.failures.append(Failure(partition, one_line(reason, most=LONGEST_REASON)))

    def miss(self, partition: int, reason: str) -> None:
        """Note that a partition was not asked; once, however many exchanges the round has."""
        if partition not in {failure.partition_id for failure in self.failures}:
            self.fail(partition, reason)

    def require(self, num_good: int, *, at_least: int) -> None:
        """Check that a round has as many good replies as ``min-replies`` says.

        Raises
        ------
        TooFewReplies
            If it has fewer.
        """
        if num_good < at_least:
            reasons = "; ".join(f"partition {f.partition_id}: {f.reason}" for f in self.failures) or "no client replied"
            raise TooFewReplies(
                f"round {self.server_round} has {num_good} good replies, min-replies is {at_least}: {reasons}"
            )

    def told(self) -> dict[str, Any]:
        """Give what a line of ``rounds.jsonl`` says of it."""
        return {
            "participants": sorted(self.participants),
            "failures": sorted(self.failures, key=lambda failure: failure.partition_id),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "resent": sorted(self.resent),
            "weights": self.weights,
            "epsilon_spent": dict(sorted(self.epsilon_spent.items())),
        }
