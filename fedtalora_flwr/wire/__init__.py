"""Between Flower's records and our types: with `inprocess`, of the library's parts the one that knows Flower.

The tensors of a record travel as one array. A tensor's key is its part and its place: ``lora_A/<module>``,
``lora_B/<module>``, ``head/<parameter>``; of the base (see `Patch`) ``left <i>/<module>`` and ``right <i>/<module>``
for the i-th step, ``dense/<module>``. Scalars travel in config and metric records under kebab-case keys.
"""

from fedtalora_flwr.wire.bundle import SHARED, Part, bundle, unbundle
from fedtalora_flwr.wire.down import (
    RoundOrder,
    add_before,
    add_patch,
    before_of,
    pack_patch,
    pack_state,
    read_memory,
    read_patch,
    read_state,
    read_version_missing,
    state_message,
    tells_before,
    version_missing_reply,
)
from fedtalora_flwr.wire.errors import WireError, error_text, node_is_gone
from fedtalora_flwr.wire.hello import (
    Hello,
    claimed_name,
    claimed_partition,
    hello_reply,
    partition_of,
    read_classes,
    read_hello,
    refusal_reply,
    tell_classes,
)
from fedtalora_flwr.wire.records import ARRAYS, HELLO, METRICS, ORDER, frozen_digest
from fedtalora_flwr.wire.room import Room
from fedtalora_flwr.wire.sums import (
    fisher_reply,
    hits_reply,
    means_reply,
    read_drift,
    read_fisher,
    read_hits,
    read_means,
    read_sums,
    sums_reply,
)
from fedtalora_flwr.wire.traffic import message_bytes, odd_reply
from fedtalora_flwr.wire.update import gram_size, read_epsilon, read_update, update_reply

__all__ = [
    "ARRAYS",
    "HELLO",
    "METRICS",
    "ORDER",
    "SHARED",
    "Hello",
    "Part",
    "Room",
    "RoundOrder",
    "WireError",
    "add_before",
    "add_patch",
    "before_of",
    "bundle",
    "claimed_name",
    "claimed_partition",
    "error_text",
    "fisher_reply",
    "frozen_digest",
    "gram_size",
    "hello_reply",
    "hits_reply",
    "means_reply",
    "message_bytes",
    "node_is_gone",
    "odd_reply",
    "pack_patch",
    "pack_state",
    "partition_of",
    "read_classes",
    "read_drift",
    "read_epsilon",
    "read_fisher",
    "read_hello",
    "read_hits",
    "read_means",
    "read_memory",
    "read_patch",
    "read_state",
    "read_sums",
    "read_update",
    "read_version_missing",
    "refusal_reply",
    "state_message",
    "sums_reply",
    "tell_classes",
    "tells_before",
    "unbundle",
    "update_reply",
    "version_missing_reply",
]
