"""The tensors of a record, as a test sees and changes them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from safetensors.numpy import load, save

from fedtalora_flwr.wire.records import ARRAYS, TENSORS


def tensors_of(content: RecordDict, record: str = ARRAYS) -> dict[str, np.ndarray]:
    return load(content[record][TENSORS].data)


def packed(tensors: Mapping[str, np.ndarray]) -> ArrayRecord:
    data = save({key: np.ascontiguousarray(value) for key, value in tensors.items()})
    return ArrayRecord({TENSORS: Array("uint8", (len(data),), "safetensors", data)})


@contextmanager
def opened(content: RecordDict, record: str = ARRAYS) -> Iterator[dict[str, np.ndarray]]:
    """Give a record's tensors, to be changed, and put them back at the end."""
    tensors = tensors_of(content, record)
    yield tensors
    content[record] = packed(tensors)
