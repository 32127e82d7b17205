"""The parts through which a server deals with its clients, and what each round of training gives back."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedtalora_flwr import wire
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.data import Share
from fedtalora_flwr.run_folder.checkpoint import Checkpoint
from fedtalora_flwr.run_folder.writer import SlotLog
from fedtalora_flwr.server.exchange import Exchange, Waits
from fedtalora_flwr.server.failures import Tally
from fedtalora_flwr.server.intake import Intake
from fedtalora_flwr.server.nodes import Nodes
from fedtalora_flwr.server.residuals import Residuals
from fedtalora_flwr.server.roster import Roster

_SMALL = 2**22  # bytes that are never too many


class Federation:
    """Who is there (`nodes`), who holds what (`roster`), how they are asked (`exchange`), what they say (`intake`).

    Parameters
    ----------
    grid
        Flower's way to the nodes.
    config
        The run's settings.
    residuals
        What brings a client to the residual that a message builds on.
    show
        Tells the progress display a phase and a round.
    waits
        Tells it who is asked and has not answered, see `Exchange`.
    shares
        What every partition holds of the data set that all read; None where every node brings its own.
    """

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        *,
        residuals: Residuals,
        show: Callable[[str, int], None],
        waits: Waits,
        shares: Sequence[Share] | None,
    ) -> None:
        self.tally = Tally()
        self.roster = Roster(config, self.tally)
        self.exchange = Exchange(grid, config, roster=self.roster, tally=self.tally, residuals=residuals, waits=waits)
        self.intake = Intake(config, self.roster, self.tally)
        self.nodes = Nodes(
            grid, config, roster=self.roster, exchange=self.exchange, tally=self.tally, show=show, shares=shares
        )

    def ask(
        self,
        content: RecordDict,
        order: wire.RoundOrder,
        *,
        partitions: Iterable[int],
        message_type: str,
        most_bytes: int,
    ) -> Iterator[tuple[int, Message]]:
        """Ask partitions the same, and give their replies as `Exchange.send` does."""
        messages = self.exchange.messages(
            content, partitions=partitions, message_type=message_type, server_round=order.server_round
        )
        return self.exchange.send(messages, most_bytes=most_bytes)


def reply_limit(*, num_factors: int, num_sums: int) -> int:
    """Give the bytes of tensors that a reply can be of use with: twice what a client is asked for at most."""
    return 2 * (4 * num_factors + 8 * num_sums) + _SMALL


@dataclass(frozen=True)
class Trained:
    """What a round's training gave: its fields are those of `RoundLog`."""

    mean_loss: float | None = None
    residual_norm: float = 0.0
    kept_energy: float | None = None
    exactness_error: float | None = None
    cluster_accuracy: float | None = None
    slots: Sequence[SlotLog] = ()


@dataclass(frozen=True)
class Scored:
    """What an evaluation showed: its fields are those of `RoundLog`."""

    accuracy_seen: float | None = None
    accuracy_seen_linear: float | None = None
    answer_losses: Sequence[float] = ()
    routing_accuracy: float | None = None
    accuracy_routed: float | None = None


class Training(Protocol):
    """What a run trains: one adapter for all, or one for each slot. Takes the run's point and gives the next."""

    num_rounds: int  # of the whole run
    at_once: Sequence[int] | None  # partitions that train all tasks at once; None: one task after the other

    def begin(self, point: Checkpoint, order: wire.RoundOrder) -> Checkpoint:
        """Do what comes before a round's training."""

    def train(self, point: Checkpoint, order: wire.RoundOrder) -> tuple[Checkpoint, Trained]:
        """Let a sample of the clients train, and fold their updates into the state."""

    def score(self, point: Checkpoint, order: wire.RoundOrder) -> tuple[Checkpoint, Scored]:
        """Evaluate where it is time to."""

    def parameters(self, point: Checkpoint) -> dict[str, int]:
        """Count what the model has, trains and sends."""

    def facts(self) -> dict[str, Any]:
        """Give what the manifest is to say beyond what it says of every run."""
