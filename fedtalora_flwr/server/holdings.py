"""Who holds what: from what the nodes say of themselves to counts by task, partition and class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.data import ClassList, DataError, HeldClass, Share, TooFewClasses
from fedtalora_flwr.data.remarks import on_sizes, on_tasks
from fedtalora_flwr.wire import Hello


@dataclass(frozen=True)
class Holdings:
    """The classes, and who holds which of them.

    Parameters
    ----------
    classes
        All classes known so far.
    counts
        Training examples of each class, (C,) int64, by task id and partition id.
    tests
        Task id -> partition id -> how many examples of it are held out; none where the server has the test data.
    told
        Partition id -> the classes under the names that it has said itself; none where all read one data set.
    remarks
        What is odd about the data, a line for each oddity.
    """

    classes: ClassList = field(default_factory=ClassList)
    counts: Mapping[tuple[int, int], Tensor] = field(default_factory=dict)
    tests: Mapping[int, Mapping[int, int]] = field(default_factory=dict)
    told: Mapping[int, ClassList] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def of_partition(self, partition_id: int) -> list[int]:
        """Count what a partition holds of each class, over all tasks."""
        held = [counts for (_, partition), counts in self.counts.items() if partition == partition_id]
        return torch.stack(held).sum(0).tolist() if held else [0] * len(self.classes.names)


def of_shared(shares: Sequence[Share], classes: ClassList, *, remarks: Sequence[str] = ()) -> Holdings:
    """Count who holds what of a data set that all processes read; the shares are in order of partition id."""
    counts = {}
    for partition, share in enumerate(shares):
        held = torch.from_numpy(share.class_counts)
        for task_id, rows in enumerate(classes.tasks):
            counts[task_id, partition] = of_task = torch.zeros_like(held)
            of_task[list(rows)] = held[list(rows)]
    return Holdings(classes, counts, remarks=tuple(remarks))


def of_own(hellos: Sequence[Hello], classes: ClassList, *, next_task: int, config: RunConfig) -> Holdings:
    """Take in the classes that nodes bring, and count who holds what of them.

    Parameters
    ----------
    hellos
        Of the nodes that take part in the next task.
    classes
        What was known before.
    next_task
        The first task that has not begun.
    config
        The run's settings.

    Raises
    ------
    DataError
        If the names or the layout of the nodes do not go together.
    """
    held = [one for hello in hellos for one in hello.own]
    seed = None if config.task_order == "given" else config.seed
    classes = classes.grown(held, next_task=next_task, num_tasks=config.num_tasks, seed=seed)
    counts = {
        (task_id, hello.partition_id): torch.zeros(len(classes.names), dtype=torch.int64)
        for hello in hellos
        for task_id in range(len(classes.tasks))
    }
    tests: dict[int, dict[int, int]] = {}
    remarks = []
    for hello in hellos:
        remarks += [f"partition {hello.partition_id}: {remark}" for remark in hello.remarks]
        for one in hello.own:
            place = classes.place(one.task, one.name)
            if place is None:
                named = "/".join(filter(None, (one.task, one.name)))
                remarks.append(f"partition {hello.partition_id}: {named} came after its task had begun, it is left out")
                continue
            task_id, row = place
            counts[task_id, hello.partition_id][row] += one.num_train
            if one.num_test:
                of_task = tests.setdefault(task_id, {})
                of_task[hello.partition_id] = of_task.get(hello.partition_id, 0) + one.num_test
    remarks += on_tasks(classes.names, classes.tasks) + _on_sizes(held)
    return Holdings(
        classes,
        counts,
        tests=tests,
        told={hello.partition_id: classes.only(hello.own) for hello in hellos},
        remarks=tuple(remarks),
    )


def _on_sizes(held: Sequence[HeldClass]) -> list[str]:
    """Say which classes are too small on all nodes together."""
    sums: dict[str, list[int]] = {}
    for one in held:
        of_class = sums.setdefault("/".join(filter(None, (one.task, one.name))), [0, 0])
        of_class[0] += one.num_train
        of_class[1] += one.num_test
    counts = np.array([*sums.values()], dtype=np.int64).reshape(-1, 2)
    return on_sizes([*sums], num_train=counts[:, 0], num_test=counts[:, 1])


def compatible(
    hellos: Sequence[Hello], classes: ClassList, *, next_task: int, config: RunConfig
) -> tuple[list[Hello], dict[int, str]]:
    """Leave out the nodes whose names or layout do not go with what is known, or with the other nodes.

    The odd ones are those that do not go with most, and at a later task too, of those that go with what is known: each
    node in turn is taken for the first, until more than half go together.

    Returns
    -------
    The others, which `of_own` takes; and why the rest is left out, by partition id.
    """
    try:
        of_own(hellos, classes, next_task=next_task, config=config)
        return list(hellos), {}
    except DataError:  # somebody is odd, or there is too little of all
        good, reasons = _going_with(hellos, classes, next_task=next_task, config=config)
    for first in range(1, len(hellos)):
        if 2 * len(good) > len(hellos):
            break
        turned = [hellos[first], *hellos[:first], *hellos[first + 1 :]]
        others, left_out = _going_with(turned, classes, next_task=next_task, config=config)
        if len(others) > len(good):
            good, reasons = others, left_out
    return sorted(good, key=lambda hello: hello.partition_id), reasons


def _going_with(
    hellos: Sequence[Hello], classes: ClassList, *, next_task: int, config: RunConfig
) -> tuple[list[Hello], dict[int, str]]:
    """Leave out the nodes that do not go with what is known and with those before them."""
    good: list[Hello] = []
    reasons: dict[int, str] = {}
    for hello in hellos:
        try:
            of_own([*good, hello], classes, next_task=next_task, config=config)
        except TooFewClasses:  # so far: no fault of this node
            good.append(hello)
        except DataError as error:
            reasons[hello.partition_id] = str(error)
        else:
            good.append(hello)
    return good, reasons
