"""Which node holds which partition, and which partitions a round asks."""

from collections.abc import Iterable, Mapping, Sequence
from math import ceil

import numpy as np

from fedtalora_flwr import wire
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.server.failures import RunFailed, Tally
from fedtalora_flwr.server.holdings import Holdings


class Roster:
    """Who takes part in a run: nodes by partition, and what each partition holds of which task.

    Parameters
    ----------
    config
        The run's settings.
    tally
        Takes the partitions that a round cannot ask.
    """

    def __init__(self, config: RunConfig, tally: Tally) -> None:
        self.config, self._tally = config, tally
        self.node_of: dict[int, int] = {}  # partition id -> node id
        self.hashes: dict[int, str] = {}  # partition id -> hash of what it holds
        self.absent: dict[int, str] = {}  # partition id -> why no node has it
        self.holdings = Holdings()
        self.holds_task: dict[int, list[int]] = {}  # task id -> partitions with data of it

    @property
    def partition_of(self) -> dict[int, int]:
        """Partition id by node id."""
        return {node: partition for partition, node in self.node_of.items()}

    def meet(self, hellos: Mapping[int, wire.Hello], *, hashes: Sequence[str], absent: Mapping[int, str]) -> None:
        """Learn from the first exchange who is who.

        Parameters
        ----------
        hellos
            Node id -> what it says.
        hashes
            Of all partitions of the run by their id, those without a node too.
        absent
            Partition id -> why no node has it, in a run that goes on.
        """
        self.node_of = {hello.partition_id: node for node, hello in hellos.items()}
        self.hashes, self.absent = dict(enumerate(hashes)), dict(absent)

    def rejoin(self, node: int, hello: wire.Hello) -> None:
        """Take a node for the holder of its partition from now on."""
        self.node_of[hello.partition_id] = node
        self.absent.pop(hello.partition_id, None)
        self.hashes[hello.partition_id] = hello.partition_hash

    def dismiss(self, node: int, reason: str) -> None:
        """Ask a node nothing any more, until it rejoins."""
        for partition in [partition for partition, holder in self.node_of.items() if holder == node]:
            del self.node_of[partition]
            self.absent[partition] = reason

    def take_stock(self, holdings: Holdings, *, settled: Iterable[int], at_once: Sequence[int] | None = None) -> None:
        """Learn who holds what.

        Parameters
        ----------
        holdings
            Classes and counts.
        settled
            The tasks whose data are there by now.
        at_once
            The partitions that train all tasks at once, as task 0, where a run does so.

        Raises
        ------
        RunFailed
            If a task of these is held by fewer partitions than ``min-replies``.
        """
        self.holdings = holdings
        if at_once is not None:
            self.holds_task = {0: list(at_once)}
            return
        self.holds_task = {task_id: [] for task_id in range(len(holdings.classes.tasks))}
        for (task_id, partition), counts in sorted(holdings.counts.items(), key=lambda item: item[0]):
            if int(counts.sum()):
                self.holds_task[task_id].append(partition)
        for task_id in settled:
            held = self.holds_task[task_id]
            if len(held) < self.config.min_replies:
                absent = "; ".join(f"partition {f.partition_id} {f.reason}" for f in self._tally.failures)
                raise RunFailed(
                    f"task {task_id} is held by {len(held)} partitions, min-replies is {self.config.min_replies}: "
                    + (
                        f"{absent}. Mend that, and go on with resume=true"
                        if absent
                        else "lower min-replies, or spread the data over more partitions"
                    )
                )

    def sample(self, server_round: int, task_id: int) -> list[int]:
        """Draw the partitions of a round, among those that hold data of the task; the rest sit it out."""
        held = self.holds_task[task_id]
        rng = np.random.default_rng([self.config.seed, server_round])
        share = ceil(round(self.config.fraction_train * len(held), 6))  # 0.14 * 50 is 7.000000000000001
        count = min(len(held), max(self.config.min_replies, share))
        return sorted(rng.choice(held, size=count, replace=False).tolist())

    def tellers(self, task_id: int) -> list[int]:
        """List the partitions that hold ``min-class-examples`` of some class of a task, and so have sums to tell.

        Raises
        ------
        RunFailed
            If they are fewer than ``min-replies``.
        """
        least = self.config.min_class_examples
        able = [p for p in self.holds_task[task_id] if int(self.holdings.counts[task_id, p].max()) >= least]
        if len(able) < self.config.min_replies:
            raise RunFailed(
                f"of task {task_id}, {len(able)} partitions hold {least} examples of a class (min-class-examples), and "
                f"min-replies is {self.config.min_replies}: lower one of them, or spread the data over fewer partitions"
            )
        return able

    def testers(self, task_id: int) -> list[int]:
        """List the partitions that have held out examples of a task or of one before it."""
        return sorted({p for earlier, held in self.holdings.tests.items() if earlier <= task_id for p in held})

    def reachable(self, partitions: Iterable[int]) -> list[int]:
        """List those of the partitions that a node holds; a run that goes on may have lost some, which are named."""
        found = []
        for partition in partitions:
            if partition in self.node_of:
                found.append(partition)
            else:
                self._tally.miss(partition, self.absent[partition])
        return found
