"""Nodes that a round was closed without, until they are done with what it asked of them."""

from collections.abc import Iterable, Sequence

from flwr.app import Message
from flwr.serverapp import Grid


class Stragglers:
    """Which nodes still work for a round that is closed.

    They are asked nothing new meanwhile: a node works through its messages one after the other, and would be late for
    ever. What they answer in the end is fetched by the message that it answers, so that no other round can take it.
    """

    def __init__(self) -> None:
        self._busy: dict[int, tuple[str, str]] = {}  # node id -> id and round of the message that it was late with

    def leave(self, late: Iterable[Message]) -> None:
        """Note the messages that a round was closed without an answer to."""
        self._busy |= {m.metadata.dst_node_id: (m.metadata.message_id, m.metadata.group_id) for m in late}

    def late_replies(self, grid: Grid) -> list[Message]:
        """Fetch the replies that have come since, whose nodes are free again; nothing is to be made of them."""
        node_of = {message_id: node for node, (message_id, _) in self._busy.items()}
        replies = list(grid.pull_messages(list(node_of))) if node_of else []
        for reply in replies:
            self._busy.pop(node_of.get(reply.metadata.reply_to_message_id, -1), None)
        return replies

    def busy(self, messages: Sequence[Message]) -> dict[int, str]:
        """Give the nodes among those that are written to that are still busy, each with the round it is busy with."""
        nodes = {message.metadata.dst_node_id for message in messages}
        return {node: server_round for node, (_, server_round) in self._busy.items() if node in nodes}

    def forget(self, node: int) -> None:
        """Take a node for free: it was gone, and may have been started anew."""
        self._busy.pop(node, None)
