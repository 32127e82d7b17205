"""Tasks of GLUE with classes: ``glue/sst2`` and so on, from the data root or else the hub.

Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding", 2018. Its own test
labels are withheld: the test split is its development set (of MRPC the original corpus's test set).
"""

from dataclasses import replace

from fedtalora_flwr.data.hf_known import known_source
from fedtalora_flwr.data.source import DataError, Source

_HUB = "nyu-mll/glue"
_CLASSES = {  # by the number that stands for them
    "cola": ("unacceptable", "acceptable"),
    "mrpc": ("not_equivalent", "equivalent"),
    "qnli": ("entailment", "not_entailment"),
    "qqp": ("not_duplicate", "duplicate"),
    "rte": ("entailment", "not_entailment"),
    "sst2": ("negative", "positive"),
}


def create(*, argument: str, data_root: str) -> Source:
    """Read a task from ``<data-root>/glue/<task>`` or the hub; classes are words, whatever the files call them.

    Parameters
    ----------
    argument
        The task.
    data_root
        As of `known_source`.

    Raises
    ------
    DataError
        If there is no such task, a label is neither a word nor its number, or as in `known_source`.
    """
    if argument not in _CLASSES:
        raise DataError(f"there is no glue/{argument}; choose one of: {', '.join(f'glue/{task}' for task in _CLASSES)}")
    source = known_source(f"glue/{argument}", hub=_HUB, config=argument, data_root=data_root)
    words = dict(enumerate(_CLASSES[argument]))
    names = tuple(words.get(int(name), name) if name.isdecimal() else name for name in source.class_names)
    if odd := set(names) - set(words.values()):
        known = ", ".join(f"{number} or {word}" for number, word in words.items())
        raise DataError(f"labels of {source.name} must be {known}, got {sorted(odd)[0]}; correct the files")
    return replace(source, class_names=names)
