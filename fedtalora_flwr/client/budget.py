"""What the examples of a task on this node have spent of their privacy, in a ledger on this machine's disk.

An example takes part in all rounds of its task, and in no other. The noise is such that these rounds together cost
``dp-epsilon``. Each is written down before its answer leaves, so that one that is repeated, for whatever reason, counts
again, and none is answered that would cost more. But what has been answered once may be answered again: the last answer
is kept, and where the same order comes once more, as it does after a kill, nothing is trained and nothing is spent.

The ledger is of one run, by the name that its server gives it and keeps when it is resumed. Two runs on the same data
cost what both spend.
"""

import fcntl
import hashlib
import hmac
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from fedtalora_flwr import wire
from fedtalora_flwr.aggregation import GlobalState
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.config.sources import cache_folder
from fedtalora_flwr.config.whole import whole_file, write_text
from fedtalora_flwr.model.accountant import Spending, epsilon_of, noise_multiplier
from fedtalora_flwr.model.private import sample_rate, steps_of_round

_DIGEST = 64  # characters of a SHA-256


class BudgetSpent(ValueError):
    """What is asked would cost more than the budget; the text may travel."""


class LedgerError(ValueError):
    """A ledger that cannot be read or written; nothing is answered then."""


@dataclass(frozen=True)
class Spent:
    """A part of the budget that has been taken.

    Parameters
    ----------
    noise_multiplier
        With which its steps are to be taken.
    epsilon
        Of all that has been taken so far, this part with it.
    """

    noise_multiplier: float
    epsilon: float


@dataclass(frozen=True)
class Plan:
    """How the budget of a task's examples is parted: ``dp-sums-share`` for feature sums, the rest for training.

    Parameters
    ----------
    config
        The run's settings.
    sums
        Whether the head takes feature sums.
    """

    config: RunConfig
    sums: bool

    def noise_of_sums(self) -> float:
        """Find the noise multiplier of a task's sums; without training they have all."""
        share = self.config.dp_sums_share if self.config.rounds_per_task else 1.0
        return self._noise(share * self.config.dp_epsilon, 1.0, self.config.evaluations_per_task)

    def noise_of_training(self, num_examples: int) -> float:
        """Find the noise multiplier of a task's steps, beside its sums."""
        beside = Spending(self.noise_of_sums(), 1.0, self.config.evaluations_per_task) if self.sums else None
        rate, num_steps = sample_rate(self.config, num_examples), steps_of_round(self.config, num_examples)
        num_steps *= self.config.rounds_per_task
        return self._noise(self.config.dp_epsilon, rate, num_steps, beside=() if beside is None else (beside,))

    def noise_of_hits(self, task_id: int) -> float:
        """Find the noise multiplier of the hits on what is held out of a task, from its end to that of the run."""
        num_evaluations = self.config.evaluations_per_task * (self.config.last_task - task_id)
        return self._noise(self.config.dp_epsilon, 1.0, num_evaluations)

    def _noise(self, epsilon: float, rate: float, num_steps: int, beside: tuple[Spending, ...] = ()) -> float:
        return noise_multiplier(
            epsilon=epsilon, delta=self.config.dp_delta, sample_rate=rate, num_steps=num_steps, beside=beside
        )


@dataclass(frozen=True)
class Budget:
    """The privacy that some examples of this node may spend in a run.

    Parameters
    ----------
    name
        Of the ledger: the run, the partition and the examples.
    epsilon, delta
        The budget.
    """

    name: str
    epsilon: float
    delta: float

    @classmethod
    def of(cls, config: RunConfig, order: wire.RoundOrder, *, partition_id: int, examples: str) -> "Budget":
        """Open that of some `examples`: ``train-0``, ``held-out-2``; of a part alone to keep the last answer on it."""
        return cls(f"{order.run}-{partition_id}-{examples}", config.dp_epsilon, config.dp_delta)

    def spend(
        self, on: str, *, sample_rate: float, num_steps: int, noise: Callable[[], float], only_ask: bool = False
    ) -> Spent:
        """Write down that steps are taken, before anything that comes of them leaves the node.

        Parameters
        ----------
        on
            What they are for: ``training``, ``sums`` or ``hits``.
        sample_rate
            The chance of an example to be in a step.
        num_steps
            Those of now.
        noise
            Finds the noise multiplier with which all that is planned is within the budget (see `Plan`); asked once.

        only_ask
            Write nothing down yet: long work that is cut off tells nobody anything, and costs nothing.

        Raises
        ------
        BudgetSpent
            If these steps would cost more than is left; nothing is written down then.
        LedgerError
            If the ledger cannot be read or written.
        """
        with _ledgers() as folder:
            path = folder / f"{self.name}.json"
            before = _read(path)
            # As was found for the first round: what a ledger holds of one kind adds up to what was planned.
            alike = (each for what, each in before if what == on and each.sample_rate == sample_rate)
            first = next(alike, None)
            sigma = noise() if first is None else first.noise_multiplier
            taken = [*before, (on, Spending(sigma, sample_rate, num_steps))]
            epsilon = epsilon_of((each for _, each in taken), delta=self.delta)
            if epsilon > self.epsilon:
                spent = epsilon_of((each for _, each in before), delta=self.delta)
                raise BudgetSpent(
                    f"the privacy budget of these examples is spent: epsilon {spent:.3g} of dp-epsilon "
                    f"{self.epsilon:g} at dp-delta {self.delta:g}, with this answer {epsilon:.3g}; this node "
                    "answers for them no more in this run"
                )
            rows = [[what, each.noise_multiplier, each.sample_rate, each.num_steps] for what, each in taken]
            if not only_ask:
                write_text(path, json.dumps(rows))
        return Spent(sigma, epsilon)

    def keep(self, answer: RecordDict, *, to: str) -> None:
        """Keep what is answered to an order, by its digest, in place of the answer before."""
        with _ledgers() as folder, whole_file(folder / f"{self.name}.answer") as part:
            part.write_bytes(to.encode() + recorddict_to_proto(answer).SerializeToString())

    def kept(self, order: str) -> RecordDict | None:
        """Give the answer to an order, if it is the last that was given."""
        with _ledgers() as folder:
            path = folder / f"{self.name}.answer"
            to, content = (raw := path.read_bytes() if path.exists() else b"")[:_DIGEST], raw[_DIGEST:]
        return recorddict_from_proto(ProtoRecordDict.FromString(content)) if to == order.encode() else None


def digest_of(order: wire.RoundOrder, state: GlobalState) -> str:
    """Name what a training order starts from, by its clock, its pairs and its rows."""
    digest = hashlib.sha256(repr((order, state.version)).encode())
    pairs = [factor for _, pair in sorted(state.adapters.items()) for factor in (pair.lora_A, pair.lora_B)]
    for value in [*pairs, *(row for _, row in sorted(state.head.items()))]:
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def sealed(digest: str) -> str:
    """Turn a digest of one's own data into one by which nobody can check a guess at them: by a key of this machine."""
    with _ledgers() as folder:
        path = folder / "key"
        if not path.exists():
            with whole_file(path, mode=0o600) as part:
                part.write_bytes(os.urandom(32))
        return hmac.new(path.read_bytes(), digest.encode(), hashlib.sha256).hexdigest()


def _read(path: Path) -> list[tuple[str, Spending]]:
    try:
        rows = json.loads(path.read_text()) if path.exists() else []
        return [(str(what), Spending(float(sigma), float(rate), int(steps))) for what, sigma, rate, steps in rows]
    except (ValueError, TypeError) as error:
        raise LedgerError(
            f"the privacy ledger {path} cannot be read, so that nobody knows what is left; end the run, and remove the "
            "file only if no other run is to be on these data"
        ) from error


@contextmanager
def _ledgers() -> Iterator[Path]:
    """Give the folder of all ledgers, to one process at a time."""
    folder = cache_folder() / "privacy"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
        finally:
            os.close(lock)
    except OSError as error:
        raise LedgerError(
            f"the privacy ledger in {folder} cannot be written ({error.strerror}), so that nothing may be answered; "
            "make room, or set FEDTALORA_CACHE to a folder that stays"
        ) from error
