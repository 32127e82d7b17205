"""Messages to the clients and their replies: addressed, sent, waited for, sent once more."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedtalora_flwr import wire
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.server.failures import Tally
from fedtalora_flwr.server.residuals import Residuals
from fedtalora_flwr.server.roster import Roster
from fedtalora_flwr.server.stragglers import Stragglers

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0  # seconds between two looks for replies, a twentieth of the wait so far
_GRACE = 15.0  # seconds beyond a message's time to live, so that its expiry is reported and not just silence
Waits = Callable[[Sequence[int], Sequence[int]], None]  # partitions asked, and those of them that have not answered


class Exchange:
    """Asks clients, and gives their replies.

    Parameters
    ----------
    grid
        Flower's way to the nodes.
    config
        The run's settings.
    roster
        Which node holds which partition.
    tally
        Takes the cost of the round and the failures in it.
    residuals
        What brings a client to the residual that a message builds on.
    waits
        Is told again and again whose replies are waited for, out of those that were asked.
    """

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        *,
        roster: Roster,
        tally: Tally,
        residuals: Residuals,
        waits: Waits = lambda asked, waiting: None,
    ) -> None:
        self._grid, self._config, self._roster, self._tally, self._residuals = grid, config, roster, tally, residuals
        self._waits = waits
        self._stragglers = Stragglers()
        self.patient = False  # whether the next exchange waits for all, whatever ``close-after`` says
        self.closed_early = False  # whether the last one did not

    def welcome(self, node: int, hello: wire.Hello) -> None:
        """Take a node for the holder of its partition, with what it says that it still has."""
        self._roster.rejoin(node, hello)
        self._residuals.report(hello.partition_id, hello.held)
        self._stragglers.forget(node)

    def messages(
        self, content: RecordDict, *, partitions: Iterable[int], message_type: str, server_round: int
    ) -> list[Message]:
        """Address a content to the node of each partition, with what it needs to reach the residual."""
        return [
            self._addressed(content, partition, message_type=message_type, group_id=str(server_round))
            for partition in self._roster.reachable(partitions)
        ]

    def _addressed(self, content: RecordDict, partition: int, *, message_type: str, group_id: str) -> Message:
        told = self._roster.holdings.told
        if partition in told:
            content = RecordDict({**content, **wire.tell_classes(told[partition])})
        return Message(
            self._residuals.add_to(content, partition),
            dst_node_id=self._roster.node_of[partition],
            message_type=message_type,
            group_id=group_id,
            ttl=self._config.round_timeout,
        )

    def send(self, messages: Iterable[Message], *, most_bytes: int) -> Iterator[tuple[int, Message]]:
        """Send messages and give the replies with content, while the tally takes the cost and the failures.

        A reply that comes from the server's own side (expired, node gone) names no node, so replies are tied
        to messages and not to senders. A client that has lost the base is sent it once more. After ``close-after`` it
        is enough that ``min-replies`` replies are there.

        Parameters
        ----------
        messages
            From `messages`.
        most_bytes
            Of tensors that a reply can be of use with; a larger one is refused unread.

        Yields
        ------
        Partition id and its reply in order of partition id, each as soon as all before it are settled, so that
        they are read while others still train.
        """
        partition_of = self._roster.partition_of
        patient, self.patient, self.closed_early = self.patient, False, False
        sent = sorted(messages, key=lambda message: partition_of[message.metadata.dst_node_id])
        needed = len(sent) if patient else self._config.min_replies
        sent = self._without_busy(sent, partition_of, needed=needed, most_bytes=most_bytes)
        order = [partition_of[message.metadata.dst_node_id] for message in sent]
        asked = dict(zip(self._push(sent), sent, strict=True))
        if any(message.metadata.message_type != MessageType.EVALUATE for message in sent):
            self._tally.participants.update(order)
        began, num_given = time.monotonic(), 0
        may_close = self._config.close_after > 0 and not patient
        settled: dict[int, Message | None] = {}
        resent: set[int] = set()
        for partition in order:
            while partition not in settled:
                waited = time.monotonic() - began
                if waited > self._config.round_timeout + _GRACE:
                    for message in asked.values():
                        late = partition_of[message.metadata.dst_node_id]
                        self._settle(settled, late, f"no reply within {self._config.round_timeout:g} s")
                    break
                self._pull(asked, partition_of, settled, resent, most_bytes)
                self._waits(order, sorted(partition_of[m.metadata.dst_node_id] for m in asked.values()))
                num_there = num_given + sum(reply is not None for reply in settled.values())
                if may_close and waited > self._config.close_after and num_there >= self._config.min_replies:
                    self._close(asked, partition_of, settled)
                if partition not in settled:
                    time.sleep(min(_LONGEST_PAUSE, max(_SHORTEST_PAUSE, waited / 20)))
                self._tally.wait_seconds += time.monotonic() - began - waited
            if reply := settled.pop(partition):
                num_given += 1
                yield partition, reply

    def _without_busy(
        self, messages: list[Message], partition_of: Mapping[int, int], *, needed: int, most_bytes: int
    ) -> list[Message]:
        """Leave out those to nodes that still work for a round that was closed, unless these are needed."""
        late = self._stragglers.late_replies(self._grid)
        self._tally.bytes_up += wire.message_bytes(reply for reply in late if not _odd(reply, most_bytes))
        busy = self._stragglers.busy(messages)
        free = [message for message in messages if message.metadata.dst_node_id not in busy]
        if len(free) < needed:
            return messages
        for node, server_round in busy.items():
            self._tally.miss(partition_of[node], f"not asked: it is still busy with round {server_round}")
        return free

    def _close(
        self, asked: dict[str, Message], partition_of: Mapping[int, int], settled: dict[int, Message | None]
    ) -> None:
        """Go on without those that have not answered; `asked` loses them."""
        self.closed_early = bool(asked)
        self._stragglers.leave(asked.values())
        for message in asked.values():
            late = partition_of[message.metadata.dst_node_id]
            self._settle(settled, late, f"late: the round was closed without it after {self._config.close_after:g} s")
        asked.clear()

    def _push(self, messages: list[Message]) -> list[str]:
        self._grid.push_messages(messages)
        self._tally.bytes_down += wire.message_bytes(messages)
        return [message.metadata.message_id for message in messages]

    def _pull(
        self,
        asked: dict[str, Message],
        partition_of: Mapping[int, int],
        settled: dict[int, Message | None],
        resent: set[int],
        most_bytes: int,
    ) -> None:
        """Take in the replies that are there; `asked` loses those that are answered, `resent` gains whom it is sent."""
        replies = list(self._grid.pull_messages(list(asked)))
        odd = {reply.metadata.reply_to_message_id: reason for reply in replies if (reason := _odd(reply, most_bytes))}
        self._tally.bytes_up += wire.message_bytes(r for r in replies if r.metadata.reply_to_message_id not in odd)
        for reply in replies:
            message = asked.pop(reply.metadata.reply_to_message_id, None)
            if message is None:  # a node may send what nobody asked for
                continue
            partition = partition_of[message.metadata.dst_node_id]
            if reason := odd.get(reply.metadata.reply_to_message_id):
                self._settle(settled, partition, f"refused: {reason}")
            elif reply.has_error():
                self._settle(settled, partition, f"error {reply.error.code}: {wire.error_text(reply.error)}")
            elif (held := wire.read_version_missing(reply)) is None:
                self._residuals.acknowledge(partition)
                settled[partition] = reply
            elif partition in resent:
                self._settle(settled, partition, "cannot be brought to the server's base")
            else:
                resent.add(partition)
                self._tally.resent.add(partition)
                self._residuals.report(partition, held)
                again = self._addressed(
                    message.content,
                    partition,
                    message_type=message.metadata.message_type,
                    group_id=message.metadata.group_id,
                )
                asked[self._push([again])[0]] = again

    def _settle(self, settled: dict[int, Message | None], partition: int, reason: str) -> None:
        settled[partition] = None
        self._tally.fail(partition, reason)


def _odd(reply: Message, most_bytes: int) -> str | None:
    return wire.odd_reply(reply, most_bytes=most_bytes) if reply.has_content() else None
