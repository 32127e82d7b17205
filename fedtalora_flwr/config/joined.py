"""The grammar of a data set that is joined of others: ``join:cifar10+hub:owner/name+text=path/a.csv``."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

JOIN, _BETWEEN = "join:", "+"
_WITH_PATH = re.compile(r"([\w.-]+)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """One of the data sets that are joined.

    Parameters
    ----------
    dataset
        A value of the setting of that name.
    path
        Its ``data-path``; empty where it has its own place.
    """

    dataset: str
    path: str = ""

    def __str__(self) -> str:
        return f"{self.dataset}={self.path}" if self.path else self.dataset


def parts_of(dataset: str) -> tuple[Part, ...]:
    """Take a value of ``dataset`` apart; one that is not joined is its only part."""
    if not dataset.startswith(JOIN):
        return (Part(dataset),)
    found = []
    for text in dataset.removeprefix(JOIN).split(_BETWEEN):
        named = _WITH_PATH.fullmatch(text)
        found.append(Part(*named.groups()) if named else Part(text))
    return tuple(found)


def without_folders(dataset: str) -> str:
    """Name a data set for others to read: of the paths of its parts the last name alone."""
    if not dataset.startswith(JOIN):
        return dataset
    return joined(Part(part.dataset, Path(part.path).name) for part in parts_of(dataset))


def joined(parts: Iterable[Part]) -> str:
    """Put parts together again, in the order given.

    Raises
    ------
    ValueError
        If a part holds the sign that stands between two.
    """
    texts = [str(part) for part in parts]
    if odd := next((text for text in texts if _BETWEEN in text), None):
        raise ValueError(f"{odd!r} holds a {_BETWEEN}, which parts one data set from the next; rename its folder")
    return JOIN + _BETWEEN.join(texts)
