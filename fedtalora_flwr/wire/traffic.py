"""How many bytes messages take."""

from collections.abc import Iterable

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)


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


def _same_arrays(record: ArrayRecord) -> ArrayRecord:
    """Copy a record but not its bytes: an array that was taken apart holds views, and cannot be pickled any more."""
    return ArrayRecord({name: Array(a.dtype, a.shape, a.stype, a.data) for name, a in record.items()})
