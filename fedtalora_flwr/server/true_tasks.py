"""Which task each slot is really about: what a run over slots is checked and judged by."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedtalora_flwr.aggregation import Slot
from fedtalora_flwr.server.roster import Roster


@dataclass(frozen=True)
class TrueTasks:
    """Which task each slot is about: what updates are checked and a clustering is judged by. No method sees it.

    Parameters
    ----------
    by_partition
        Partition id -> its task ids by slot number.
    roster
        What each partition holds of each task.
    """

    by_partition: Mapping[int, tuple[int, ...]]
    roster: Roster

    def slots_of(self, partition: int) -> list[Slot]:
        """List a partition's slots."""
        return [Slot(partition, number) for number in range(len(self.by_partition[partition]))]

    def task_of(self, slot: Slot) -> int:
        """Give the task that a slot is about."""
        return self.by_partition[slot.partition_id][slot.number]

    def num_examples(self, slot: Slot) -> int:
        """Count the training examples of a slot."""
        return int(self.roster.holdings.counts[self.task_of(slot), slot.partition_id].sum())

    def holders(self) -> list[int]:
        """List the partitions that have a slot."""
        return [partition for partition, tasks in sorted(self.by_partition.items()) if tasks]
