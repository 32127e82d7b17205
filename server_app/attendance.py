"""Who is there: nodes are asked what they hold, and waited for where too few of them are connected."""

import time
from collections.abc import Callable, Collection, Iterable
from logging import getLogger
from typing import TypeVar

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedtalora_flwr import wire
from fedtalora_flwr.config import RunConfig
from server_app.strategy import AdapterStrategy, RunFailed, TooFewReplies

log = getLogger("fedtalora.server")

_LOOK_SECONDS = 1.0  # between two looks for nodes that are missed
_Given = TypeVar("_Given")


class Attendance:
    """The nodes of a run, as they come and go.

    Parameters
    ----------
    grid
        Flower's way to the nodes.
    config
        The settings: ``min-replies``, and how long is waited.
    strategy
        Knows which node holds which partition.
    show
        Tells the progress display a phase and a round.
    """

    def __init__(
        self, grid: Grid, config: RunConfig, strategy: AdapterStrategy, show: Callable[[str, int], None]
    ) -> None:
        self.grid, self.config, self.strategy, self.show = grid, config, strategy, show
        self._asked: set[int] = set()

    def gather(self) -> list[int]:
        """Wait until as many nodes are connected as the settings say, and list them.

        Raises
        ------
        RunFailed
            If they are more, or not there within ``node-timeout``.
        """
        wanted, deadline = self.config.num_clients, time.monotonic() + self.config.node_timeout
        while len(nodes := list(self.grid.get_node_ids())) != wanted:
            if time.monotonic() > deadline or len(nodes) > wanted:
                raise RunFailed(
                    f"num-clients is {wanted}, but {len(nodes)} SuperNodes are connected. In simulation pass "
                    f'--federation-config "num-supernodes={wanted}" to flwr run (its default is 2), or use '
                    f"fedtalora run, which does; or set num-clients={len(nodes)}"
                )
            time.sleep(0.2)
        return sorted(nodes)

    def hellos(self, nodes: Iterable[int]) -> tuple[dict[int, wire.Hello], dict[int, str]]:
        """Ask nodes what they hold: what they say, and why others say nothing, by node id."""
        hellos: dict[int, wire.Hello] = {}
        reasons = dict.fromkeys(nodes, "no reply in time")
        for node, reply in self.ask(list(reasons)).items():
            if reply.has_error():
                reasons[node] = wire.error_text(reply.error)
            else:
                hellos[node] = wire.read_hello(reply)
                del reasons[node]
        return hellos, reasons

    def ask(self, nodes: Iterable[int]) -> dict[int, Message]:
        """Ask nodes what they hold: node id -> its reply, as far as there is one."""
        partition_of = {node: partition for partition, node in self.strategy.node_of.items()}
        told = self.strategy.census.told
        messages = [
            Message(
                wire.tell_classes(told.get(partition_of.get(node, -1))),
                dst_node_id=node,
                message_type=MessageType.QUERY,
                ttl=self.config.round_timeout,
            )
            for node in nodes
        ]
        self._asked.update(message.metadata.dst_node_id for message in messages)
        replies = list(self.grid.send_and_receive(messages, timeout=self.config.round_timeout + 15)) if messages else []
        asked = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
        # An error of the server's own side names no node, so replies are tied to messages.
        return {asked[reply.metadata.reply_to_message_id]: reply for reply in replies}

    def insist(self, exchange: Callable[[wire.RoundOrder], _Given], order: wire.RoundOrder) -> _Given:
        """Do an exchange; where so many nodes are gone that it has too few replies, do it again when they are back.

        An exchange changes nothing unless it succeeds, and what is drawn in it depends on the round alone: done again,
        it gives what it would have given.

        Raises
        ------
        RunFailed
            If the nodes are not back within ``node-timeout``, or are there and their replies are too few.
        """
        while True:
            self._await(order)
            try:
                return exchange(order)
            except TooFewReplies as shortage:
                if len(self._present(order.task_id)) >= self.config.min_replies:
                    raise  # the nodes are there: waiting would mend nothing
                log.warning("%s; it is repeated when they are back", shortage)

    def _await(self, order: wire.RoundOrder) -> None:
        """Wait until ``min-replies`` nodes that hold data of the task are connected, and say so."""
        wanted, began = self.config.min_replies, time.monotonic()
        present = self._present(order.task_id)
        if len(present) >= wanted:
            return
        log.warning("round %d waits: %d nodes, min-replies is %d", order.server_round, len(present), wanted)
        self.show("waiting for nodes", order.server_round)
        while len(present) < wanted:
            if time.monotonic() > began + self.config.node_timeout:
                raise RunFailed(
                    f"round {order.server_round} has waited {self.config.node_timeout:g} s for nodes: {len(present)} "
                    f"are connected, min-replies is {wanted}. Start the others, and go on with resume=true"
                )
            time.sleep(_LOOK_SECONDS)
            present = self._present(order.task_id)
        waited = time.monotonic() - began
        self.strategy.tally.wait_seconds += waited
        log.info("round %d goes on with %d nodes after %.0f s", order.server_round, len(present), waited)
        self.show("training", order.server_round)

    def _present(self, task_id: int) -> list[int]:
        """List the partitions with data of a task whose node is connected; a node that is new is asked first."""
        connected = set(self.grid.get_node_ids())
        self._greet(sorted(connected - self._asked))
        return [p for p in self.strategy.holds_task[task_id] if self.strategy.node_of[p] in connected]

    def _greet(self, newcomers: list[int]) -> None:
        """Give its partition back to a node that was started anew: without node keys it has another id then."""
        for node, reply in self.ask(newcomers).items():
            try:
                if reply.has_error():
                    raise wire.WireError(wire.error_text(reply.error))
                hello = wire.read_hello(reply)
                self.strategy.rejoin(node, hello)
            except wire.WireError as refusal:
                log.warning("node %d cannot take part: %s", node, refusal)
            else:
                log.info("node %d is back with partition %d", node, hello.partition_id)


def check_partitions(hellos: Collection[wire.Hello], *, num_clients: int, num_classes: int | None) -> None:
    """Refuse nodes that do not hold the partitions of the run between them, each one of its own.

    Parameters
    ----------
    hellos
        What the nodes say.
    num_clients
        Partitions of the run.
    num_classes
        Of the data set that all read; None where every node brings its own.

    Raises
    ------
    RunFailed
        If they do not, or read another data set.
    """
    found = sorted(hello.partition_id for hello in hellos)
    if found != list(range(num_clients)):
        missing = sorted(set(range(num_clients)) - set(found))
        raise RunFailed(
            f"partitions {missing} are held by no node that replied (held: {found}); give every node its own "
            "partition-id in its node config"
        )
    counts = {hello.num_partitions for hello in hellos}
    if counts != {num_clients}:
        raise RunFailed(f"nodes say num-partitions {sorted(counts)}, the run has num-clients {num_clients}")
    for hello in hellos:
        if num_classes is not None and hello.class_counts.shape != (num_classes,):
            raise RunFailed(
                f"partition {hello.partition_id} knows {len(hello.class_counts)} classes, the server {num_classes}; "
                "both must read the same data set"
            )
