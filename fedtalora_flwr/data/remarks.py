"""What is odd about data though no error: names that look alike, small classes, tasks and clients with too little."""

from collections.abc import Sequence

import numpy as np

from fedtalora_flwr.data.classes import as_read
from fedtalora_flwr.data.source import Ints, Source
from fedtalora_flwr.data.stream import TaskStream

_MOST_NAMED = 8


def on_shared(source: Source, stream: TaskStream) -> list[str]:
    """Say what is odd about a data set that all processes read, and about how it is dealt out."""
    train, test = (np.bincount(split.labels, minlength=source.num_classes) for split in (source.train, source.test))
    held = stream.class_counts(source.train.labels).sum(1)  # (K,)
    return [
        *source.remarks,
        *on_names(source.class_names),
        *on_sizes(source.class_names, num_train=train, num_test=test),
        *on_tasks(source.class_names, stream.tasks),
        *_on_idle(held),
    ]


def on_names(names: Sequence[str]) -> list[str]:
    """Say which names of classes look alike."""
    by_look: dict[str, list[str]] = {}
    for name in names:
        by_look.setdefault(as_read(name), []).append(name)
    return [
        f"classes {' and '.join(map(repr, alike))} differ only by case, space or spelling in Unicode, and are "
        f"{len(alike)} classes"
        for alike in by_look.values()
        if len(alike) > 1
    ]


def on_sizes(names: Sequence[str], *, num_train: Ints, num_test: Ints) -> list[str]:
    """Say which classes are too small to train or to test; `num_train` and `num_test` (C,) are examples of each."""
    single = [name for name, count in zip(names, num_train, strict=True) if count == 1]
    untested = [name for name, count in zip(names, num_test, strict=True) if count == 0]
    remarks = [f"{_classes(single)} one training example"] if single else []
    return remarks + ([f"{_classes(untested)} no test example, and no part in any accuracy"] if untested else [])


def on_tasks(names: Sequence[str], tasks: Sequence[Sequence[int]]) -> list[str]:
    """Say which tasks have one class; the classes' rows are by task."""
    alone = [f"{task_id + 1} ({names[rows[0]]})" for task_id, rows in enumerate(tasks) if len(rows) == 1]
    if not alone:
        return []
    listed = f"task {alone[0]} has" if len(alone) == 1 else f"tasks {_some(alone)} have"
    return [f"{listed} one class: with loss-classes=task there is nothing to tell apart and the loss is 0"]


def _on_idle(held: Ints) -> list[str]:
    idle = int((held == 0).sum())
    return [f"{idle} of {len(held)} clients hold no example and never train"] if idle else []


def _classes(names: Sequence[str]) -> str:
    return f"class {names[0]} has" if len(names) == 1 else f"{len(names)} classes ({_some(names)}) have"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST_NAMED]) + (f" and {len(names) - _MOST_NAMED} more" * (len(names) > _MOST_NAMED))
