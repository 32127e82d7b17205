"""How many bytes messages take, and which replies are not even looked at."""

from collections.abc import Iterable

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)

from fedtalora_flwr.config.units import human_bytes
from fedtalora_flwr.wire.records import ARRAYS, BASE, DRIFT, HELD, HELLO, METRICS

_MOST_REST = 2**24  # bytes of what is not a tensor: names of classes, numbers
_RECORD_BYTES = 2**10  # what a record counts for, whatever it holds: each is an object that Flower moves by itself


def message_bytes(messages: Iterable[Message]) -> int:
    """Count the bytes that Flower moves for messages, whether or not a network is between the two sides.

    Flower takes a message's content apart into objects, named by the hash of what they hold, and moves a tree of the
    names and every object once. Messages may share records: these are taken apart once, and count for each.
    """
    total = 0
    sizes: dict[str, int] = {}  # object id -> bytes
    apart: dict[int, ArrayRecord] = {}  # id of a record -> its copy
    with no_object_id_recompute():
        for message in messages:
            if not message.has_content():
                continue
            for record in message.content.array_records.values():
                if id(record) not in apart:
                    apart[id(record)] = _same_arrays(record)
            content = RecordDict(
                {name: apart[id(r)] if isinstance(r, ArrayRecord) else r for name, r in message.content.items()}
            )
            objects = get_all_nested_objects(content)
            sizes |= {name: len(objects[name].deflate()) for name in objects.keys() - sizes.keys()}
            total += get_object_tree(content).ByteSize() + sum(sizes[name] for name in objects)
    return total


def odd_reply(reply: Message, *, most_bytes: int) -> str | None:
    """Say what is wrong with a reply as a whole, before anything in it is read: foreign records, or too many bytes.

    Parameters
    ----------
    reply
        With content.
    most_bytes
        That its tensors may take.
    """
    known = {ARRAYS, METRICS, HELLO, HELD, BASE, DRIFT}
    for name in reply.content:
        if name not in known and name.rpartition(".")[0] not in known:  # of a slot
            return f"holds a record {name[:40]!r}, which nobody asked for"
    if any(len(record) > 1 for record in reply.content.array_records.values()):
        return "holds a record of several arrays, which nobody asked for"
    tensors = sum(len(array.data) for record in reply.content.array_records.values() for array in record.values())
    rest = _RECORD_BYTES * len(reply.content)
    rest += sum(_length([*record, *record.values()]) for record in reply.content.config_records.values())
    rest += sum(_length([*record, *record.values()]) for record in reply.content.metric_records.values())
    if tensors > most_bytes or rest > _MOST_REST:
        return f"holds {human_bytes(tensors + rest)}, at most {human_bytes(most_bytes)} can be of use"
    return None


def _length(value: object) -> int:
    if isinstance(value, list):
        return sum(map(_length, value))
    return len(value) if isinstance(value, str | bytes) else 8


def _same_arrays(record: ArrayRecord) -> ArrayRecord:
    """Copy a record but not its bytes: an array that was taken apart holds views, and cannot be pickled any more."""
    return ArrayRecord({name: Array(a.dtype, a.shape, a.stype, a.data) for name, a in record.items()})
