"""The records of a message by name, and tensors to and from Flower's arrays, which are checked before they are read."""

import io
import math
from collections.abc import Mapping, Set

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

ARRAYS, ORDER, METRICS, HELLO, BASE, BASE_ARRAYS = "arrays", "order", "metrics", "hello", "base", "base-arrays"
CLASSES, HELD = "classes", "held"
_LONGEST_HEADER = 256  # characters that describe an array; np.save writes some 60


def array_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Put tensors into a record, by key."""
    return ArrayRecord({key: Array(value.contiguous().numpy()) for key, value in tensors.items()})


def read_arrays(record: ArrayRecord, *, only: Set[str] | None = None) -> dict[str, dict[str, Tensor]]:
    """Read the arrays of a record: part -> place -> tensor.

    Parameters
    ----------
    record
        From the other side.
    only
        The keys that it must hold, and no others; None where any may be there.

    Raises
    ------
    ValueError
        If a key is missing or unknown, or an array holds other than it declares.
    """
    if only is not None and record.keys() != only:
        missing, unknown = sorted(only - record.keys())[:3], sorted(record.keys() - only)[:3]
        raise ValueError(f"arrays: missing {missing}, unknown {unknown}")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, array in record.items():
        part, _, name = key.partition("/")
        _check_bytes(key, array)
        # np.load of the wire's bytes gives arrays that own their memory, so no copy is needed.
        parts.setdefault(part, {})[name] = torch.from_numpy(np.ascontiguousarray(array.numpy()))
    return parts


def _check_bytes(key: str, array: Array) -> None:
    """Refuse an array whose bytes are not what it declares: NumPy would first make room for all that they claim."""
    file = io.BytesIO(array.data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError(f"{key} is not an array as np.save writes it")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=_LONGEST_HEADER)
    if (str(dtype), shape) != (array.dtype, tuple(array.shape)):
        raise ValueError(f"{key} declares {array.dtype} {tuple(array.shape)} and holds {dtype} {shape}")
    if len(array.data) - file.tell() != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{key} is cut short or too long for {dtype} {shape}")
