"""Messages about several slots in one, and apart again."""

import re
from collections.abc import Mapping
from copy import copy
from typing import Any

from flwr.app import Message, RecordDict

from fedtalora_flwr.wire.errors import WireError


def bundle(parts: Mapping[int, RecordDict]) -> RecordDict:
    """Put the contents of messages about several slots into one: a record ``<key>`` of slot i is ``<key>.<i>``."""
    return RecordDict({f"{key}.{number}": record for number, part in parts.items() for key, record in part.items()})


def unbundle(message: Message) -> dict[int, Message]:
    """Take a message apart again, into one for each slot.

    Raises
    ------
    WireError
        If a record belongs to no slot.
    """
    parts: dict[int, dict[str, Any]] = {}
    for name, record in message.content.items():
        key, dot, number = name.rpartition(".")
        if not (dot and re.fullmatch(r"0|[1-9]\d{0,5}", number, re.ASCII)):
            raise WireError(f"record {name[:40]!r} belongs to no slot")
        parts.setdefault(int(number), {})[key] = record
    messages = {number: copy(message) for number in sorted(parts)}
    for slot, part in messages.items():
        part.content = RecordDict(parts[slot])
    return messages
