"""Tensors to and from the records of a message, which are checked before they are read; pairs and counts among them.

Flower moves every array of a record by calls of its own, on either side of the SuperLink and of the SuperNode, and
each call waits for the SuperLink's database. So the tensors of a record travel as one array, in safetensors' format.
"""

import hashlib
from collections.abc import Mapping, Set

import torch
from flwr.app import Array, ArrayRecord
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from fedtalora_flwr.aggregation import FACTORS, LoraFactors

ARRAYS, ORDER, METRICS, HELLO, BASE, BASE_ARRAYS = "arrays", "order", "metrics", "hello", "base", "base-arrays"
EPSILON = "epsilon-spent"  # in the metrics of a private answer
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


def pack_factors(adapters: Mapping[str, LoraFactors], factors: frozenset[str] = FACTORS) -> dict[str, Tensor]:
    """Give the factors of all pairs by key, ``<factor>/<module>``."""
    return {f"{factor}/{name}": getattr(pair, factor) for name, pair in adapters.items() for factor in sorted(factors)}


def read_factors(parts: Mapping[str, Mapping[str, Tensor]], *, scaling: float) -> dict[str, LoraFactors]:
    """Give the pairs that the parts of a record hold.

    Raises
    ------
    ValueError
        If a module has only one of the factors.
    """
    lora_A, lora_B = parts.get("lora_A", {}), parts.get("lora_B", {})
    if lora_A.keys() != lora_B.keys():
        raise ValueError("lora_A and lora_B are for different modules")
    return {name: LoraFactors(lora_A[name], lora_B[name], scaling) for name in lora_A}


def frozen_factors(adapters: Mapping[str, LoraFactors], sent: frozenset[str]) -> dict[str, dict[str, Tensor]]:
    """Give the factors that are not sent, as parts of a record."""
    return {factor: {name: getattr(pair, factor) for name, pair in adapters.items()} for factor in FACTORS - sent}


def frozen_digest(adapters: Mapping[str, LoraFactors], changing: frozenset[str]) -> str:
    """Name the factors that never change by their SHA-256; empty where all change."""
    frozen = pack_factors(adapters, FACTORS - changing)
    digest = hashlib.sha256()
    for key in sorted(frozen):
        digest.update(key.encode() + frozen[key].contiguous().numpy().tobytes())
    return digest.hexdigest() if frozen else ""


COUNTS = frozenset({"counts/class", "counts/examples"})
MOST_EXAMPLES = torch.iinfo(torch.int32).max  # that a client can count; sums over clients then stay within int64


def pack_counts(class_counts: Tensor) -> dict[str, Tensor]:
    """Give the classes held, and the examples of each, from the examples of all classes, (C,)."""
    held = class_counts.nonzero().flatten()
    return {"counts/class": held.int(), "counts/examples": class_counts[held].int()}


def read_counts(counted: Mapping[str, Tensor], num_classes: int) -> Tensor:
    """Read the examples of each class held, (C,) int64."""
    held, examples = class_numbers(counted["class"], num_classes), whole_numbers(counted["examples"])
    if examples.shape != held.shape:
        raise ValueError(f"{len(held)} classes have examples of shape {tuple(examples.shape)}")
    return torch.zeros(num_classes, dtype=torch.int64).index_copy_(0, held, examples)


def class_numbers(sent: Tensor, num_classes: int) -> Tensor:
    """Check a list of classes: rising, each in [0, num_classes)."""
    classes = whole_numbers(sent)
    if len(classes) and (classes[0] < 0 or classes[-1] >= num_classes or (classes.diff() <= 0).any()):
        raise ValueError(f"classes must rise within 0-{num_classes - 1}")
    return classes


def whole_numbers(sent: Tensor) -> Tensor:
    """Check a list of whole numbers, (n,), and give it as int64."""
    if sent.dtype not in (torch.int32, torch.int64) or sent.dim() != 1:
        raise ValueError(f"a list of whole numbers was expected, got {sent.dtype} {tuple(sent.shape)}")
    return sent.long()
