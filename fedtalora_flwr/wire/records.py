"""The records of a message by name, and tensors to and from them, which are checked before they are read.

Flower moves every array of a record by calls of its own, on either side of the SuperLink and of the SuperNode, and
each call waits for the SuperLink's database. So the tensors of a record travel as one array, in safetensors' format.
"""

from collections.abc import Mapping, Set

import torch
from flwr.app import Array, ArrayRecord
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

ARRAYS, ORDER, METRICS, HELLO, BASE, BASE_ARRAYS = "arrays", "order", "metrics", "hello", "base", "base-arrays"
CLASSES, HELD, DRIFT = "classes", "held", "drift"
TENSORS = "tensors"  # the one array of a record
_FORMAT = "safetensors"
_LENGTH_BYTES = 8  # of the header, before it
_ENTRY_BYTES = 160  # what the header says of a tensor beside its key, with room to spare


def array_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Put tensors into a record, by key."""
    content = save({key: value.contiguous().numpy() for key, value in tensors.items()})
    return ArrayRecord({TENSORS: Array("uint8", (len(content),), _FORMAT, content)})


def read_arrays(record: ArrayRecord, *, only: Set[str] | None = None) -> dict[str, dict[str, Tensor]]:
    """Read the tensors of a record: part -> place -> tensor. They own their memory.

    Parameters
    ----------
    record
        From the other side.
    only
        The keys that it must hold, and no others; None where any may be there.

    Raises
    ------
    ValueError
        If a key is missing or unknown, or the bytes are not what they declare.
    """
    if record.keys() != {TENSORS} or record[TENSORS].stype != _FORMAT:
        raise ValueError(f"not a record of one array {TENSORS!r} in the format {_FORMAT!r}")
    content = record[TENSORS].data
    if only is not None:
        longest = _LENGTH_BYTES + sum(len(key) + _ENTRY_BYTES for key in only)
        if (header := int.from_bytes(content[:_LENGTH_BYTES], "little")) > longest:
            raise ValueError(f"a header of {header} bytes is too long for {len(only)} tensors")
    try:
        tensors = load(content)
    except (SafetensorError, KeyError) as error:  # KeyError: a type that NumPy does not have
        raise ValueError(f"the tensors are cut short, too long or of another format ({error})") from None
    if only is not None and tensors.keys() != only:
        missing, unknown = sorted(only - tensors.keys())[:3], sorted(tensors.keys() - only)[:3]
        raise ValueError(f"arrays: missing {missing}, unknown {unknown}")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = torch.from_numpy(value)
    return parts
