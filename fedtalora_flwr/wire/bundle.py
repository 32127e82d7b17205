"""Messages about several slots, and about what they share, in one, and apart again."""

import re
from collections.abc import Mapping
from copy import copy
from typing import Any, Final, Literal

from flwr.app import Message, RecordDict

from fedtalora_flwr.wire.errors import WireError

SHARED: Final = "shared"  # stands in place of a slot's number
Part = int | Literal["shared"]


def bundle(parts: Mapping[Part, RecordDict]) -> RecordDict:
    """Put the contents of messages about several slots into one: a record ``<key>`` of slot i is ``<key>.<i>``.

    Those of the message about what all slots share are ``<key>.shared``.
    """
    return RecordDict({f"{key}.{number}": record for number, part in parts.items() for key, record in part.items()})


def unbundle(message: Message) -> dict[Part, Message]:
    """Take a message apart again, into one for each slot, by number, and last that about what they share.

    Raises
    ------
    WireError
        If a record belongs to no slot.
    """
    parts: dict[Part, dict[str, Any]] = {}
    for name, record in message.content.items():
        key, dot, number = name.rpartition(".")
        if not (dot and re.fullmatch(rf"0|[1-9]\d{{0,5}}|{SHARED}", number, re.ASCII)):
            raise WireError(f"record {name[:40]!r} belongs to no slot")
        parts.setdefault(SHARED if number == SHARED else int(number), {})[key] = record
    messages = {part: copy(message) for part in sorted(parts, key=lambda part: (part == SHARED, part))}
    for slot, part in messages.items():
        part.content = RecordDict(parts[slot])
    return messages
