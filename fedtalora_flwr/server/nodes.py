"""Who is there: nodes are asked what they hold, and waited for where too few of them are connected."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import getLogger
from typing import NoReturn, TypeVar

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedtalora_flwr import wire
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.config.units import one_line
from fedtalora_flwr.data import Share
from fedtalora_flwr.server.exchange import Exchange
from fedtalora_flwr.server.failures import LONGEST_REASON, RunFailed, Tally, TooFewReplies
from fedtalora_flwr.server.roster import Roster

log = getLogger("fedtalora.server")

_LOOK_SECONDS = 1.0  # between two looks for nodes that are missed
_Given = TypeVar("_Given")

_MOST_BYTES = 2**22  # of tensors in a first reply: numbers of examples by class


class Nodes:
    """The nodes of a run, as they come and go.

    Parameters
    ----------
    grid
        Flower's way to the nodes.
    config
        The settings: ``min-replies``, and how long is waited.
    roster
        Which node holds which partition.
    exchange
        Welcomes nodes that are back, and says whether a round was closed early.
    tally
        Takes the time that is waited.
    show
        Tells the progress display a phase and a round.
    shares
        What every partition holds of the data set that all read; None where every node brings its own.
    """

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        *,
        roster: Roster,
        exchange: Exchange,
        tally: Tally,
        show: Callable[[str, int], None],
        shares: Sequence[Share] | None,
    ) -> None:
        self.grid, self.config, self.show = grid, config, show
        self.roster, self.exchange, self.tally = roster, exchange, tally
        self._shares = shares
        self._names: dict[int, str] = {}  # node id -> the name that its key was registered under, where it has one
        self._called: dict[int, str] = {}  # node id -> the name that it says itself, for people to read
        self._since: dict[int, str] = {}  # node id -> since when it is connected, as of the last look
        self._heard: dict[int, str] = {}  # node id -> the same, as it said what it holds, or why it cannot
        self._holder: dict[int, int] = {}  # partition id -> the node that it belongs to, connected or not
        self._behind: dict[int, int] = {}  # node that was refused -> the connected node whose partition it claims
        self._claims: dict[int, int] = {}  # node id -> the partition that it says it is
        self._given_up: set[int] = set()  # partitions that were waited for in vain and not seen since

    def _look(self) -> dict[int, str]:
        """Give the nodes that are connected, each with the time since when: another one after it was gone."""
        nodes = list(self.grid.get_nodes())
        self._names |= {node.node_id: node.name for node in nodes if node.name}
        self._since = {node.node_id: node.last_activated_at for node in nodes}
        return self._since

    def gather(self, server_round: int) -> tuple[dict[int, wire.Hello], dict[int, str]]:
        """Wait until every partition has a node, and hear what each holds.

        A node that cannot take part is refused by name, and the run begins with the others. A run that goes on does so
        also without nodes that are not there, once ``node-timeout`` is over.

        Returns
        -------
        What nodes say, by node id; and why the others do not take part, by partition id.

        Raises
        ------
        RunFailed
            If a node is missing, unless the run goes on; if fewer than ``min-replies`` are left; or if the federation
            is of another size than the run.
        """
        wanted, began, said = self.config.num_clients, time.monotonic(), ""
        hellos: dict[int, wire.Hello] = {}
        reasons: dict[int, str] = {}
        while True:
            connected = self._look()
            if new := sorted(connected.keys() - hellos.keys() - reasons.keys()):
                self.show("meeting the clients", server_round)
                found, refused = self.hellos(new)
                hellos, reasons = hellos | found, reasons | refused
            hellos = {node: hello for node, hello in hellos.items() if node in connected}
            _check_size(hellos, num_clients=wanted, num_nodes=len(connected))
            odd = self._odd(hellos)
            hellos = {node: hello for node, hello in hellos.items() if node not in odd}
            reasons = {node: why for node, why in (reasons | odd).items() if self._stays_refused(node)}
            lacking = sorted(set(range(wanted)) - {hello.partition_id for hello in hellos.values()})
            waited = time.monotonic() - began
            # Nodes that are refused are those of partitions that are lacking, as far as they say which.
            nameless = [node for node in reasons if node not in self._claims]
            unclaimed = set(lacking) - {self._claims.get(node) for node in reasons}
            if len(unclaimed) <= len(nameless) or waited > self.config.node_timeout:
                break
            if (line := f"waiting: {len(hellos)} of {wanted} nodes are here, {_partitions(lacking)} not") != said:
                log.info("%s", said := line)
                self.show("waiting for nodes", server_round)
            time.sleep(_LOOK_SECONDS)
        refusals = {node: f"{self._name(node)} cannot take part: {why}" for node, why in reasons.items()}
        have_come = len(lacking) <= len(reasons)
        if lacking and not (len(hellos) >= self.config.min_replies and (have_come or self.config.resume)):
            self._fail_to_begin(lacking, len(hellos), list(refusals.values()), waited, have_come=have_come)
        for refusal in refusals.values():
            log.warning("%s", refusal)
        if lacking:
            log.warning("goes on after %.0f s, but %s not here", waited, _partitions(lacking))
        self._given_up = set(lacking)
        self._holder = {hello.partition_id: node for node, hello in hellos.items()}
        of_claimed = {self._claims[node]: why for node, why in reasons.items() if node in self._claims}
        otherwise = "; ".join(refusals[node] for node in nameless) or "no node has come for it"
        return hellos, {partition: of_claimed.get(partition, otherwise) for partition in lacking}

    def _odd(self, hellos: Mapping[int, wire.Hello]) -> dict[int, str]:
        """Find the nodes that do not go with the others: of another federation, or with a partition that is taken."""
        odd: dict[int, str] = {}
        node_of: dict[int, int] = {}
        for node, hello in hellos.items():
            if hello.num_partitions != self.config.num_clients:
                odd[node] = f"it says num-partitions {hello.num_partitions}, num-clients is {self.config.num_clients}"
            elif (other := node_of.setdefault(hello.partition_id, node)) != node:
                self._behind[node] = other
                odd[node] = (
                    f"partition {hello.partition_id} is held by {self.called(other)}, which is connected; give every "
                    "node its own partition-id in its node config"
                )
        return odd

    def _stays_refused(self, node: int) -> bool:
        """Say whether a node that was refused is still there, and so is the one whose partition it claims."""
        return node in self._since and self._behind.get(node, node) in self._since

    def _fail_to_begin(
        self, lacking: Sequence[int], num_here: int, refusals: Sequence[str], waited: float, *, have_come: bool
    ) -> NoReturn:
        """End a run that lacks nodes: all have come, and too few can take part; or some have not come."""
        wanted, again = self.config.num_clients, "go on with resume=true" if self.config.resume else "run again"
        because = "; ".join(refusals)
        if have_come:
            raise RunFailed(
                f"{because}. {num_here} of {wanted} nodes can take part, min-replies is {self.config.min_replies}: "
                f"mend that, then {again}"
            )
        raise RunFailed(
            f"{num_here} of {wanted} nodes are here after {waited:.1f} s, {_partitions(lacking)} not"
            f"{because and f' ({because})'}. Start every node with its own partition-id, then {again}; node-timeout, "
            f"now {self.config.node_timeout:g} s, is how long they are waited for"
        )

    def roll_call(self, order: wire.RoundOrder) -> tuple[list[wire.Hello], dict[int, str]]:
        """Before a task, hear what every partition holds by now; those whose node is gone are waited for.

        One that was waited for in vain is not waited for again before it was seen, unless too few are there. One that
        was refused may have been mended and is asked again.

        Returns
        -------
        What partitions say, in order of partition id; and why others say nothing, by partition id.
        """
        everyone, began, deadline = range(self.config.num_clients), time.monotonic(), 0.0
        holders = set(self.roster.node_of.values())
        self._heard = {node: since for node, since in self._heard.items() if node in holders}
        hellos: dict[int, wire.Hello] = {}
        reasons: dict[int, str] = {}
        while True:
            here = self._present([p for p in everyone if p not in hellos and p not in reasons])
            node_of = {partition: self.roster.node_of[partition] for partition in here}
            found, refused = self.hellos(node_of.values())
            for partition, node in node_of.items():
                if node in refused:
                    reasons[partition] = refused[node]
                elif node in found and found[node].partition_id != partition:
                    reasons[partition] = f"it is partition {found[node].partition_id} now"
                elif node in found:
                    hellos[partition] = found[node]
                    self.roster.hashes[partition] = found[node].partition_hash
            self._given_up -= hellos.keys() | reasons.keys()
            gone = [p for p in everyone if p not in hellos and p not in reasons]
            if not gone or (self._given_up.issuperset(gone) and len(hellos) >= self.config.min_replies):
                break
            if not deadline:
                deadline = time.monotonic() + self.config.node_timeout
                log.warning("task %d waits: %s not here", order.task_id + 1, _partitions(gone))
                self.show("waiting for nodes", order.server_round)
            if time.monotonic() > deadline:
                break
            time.sleep(_LOOK_SECONDS)
        waited = time.monotonic() - began
        self.tally.wait_seconds += waited
        if deadline:
            log.info("task %d goes on with %d nodes after %.0f s", order.task_id + 1, len(hellos), waited)
        self._given_up.update(gone)
        for partition, reason in reasons.items():
            log.warning("%s sits the task out: %s", self._name(self.roster.node_of[partition]), reason)
        reasons |= {partition: self.roster.absent.get(partition, "its node is not connected") for partition in gone}
        return [hellos[partition] for partition in sorted(hellos)], reasons

    def hellos(self, nodes: Iterable[int]) -> tuple[dict[int, wire.Hello], dict[int, str]]:
        """Ask nodes what they hold: what they say, and why others cannot, by node id.

        A node that is gone is in neither.
        """
        hellos: dict[int, wire.Hello] = {}
        reasons: dict[int, str] = {}
        nodes = list(nodes)
        self._behind = {node: other for node, other in self._behind.items() if node not in nodes}
        replies = self.ask(nodes)
        for node in nodes:
            try:
                if (reply := replies.get(node)) is None:
                    if node in self.grid.get_node_ids():
                        reasons[node] = "no reply in time"
                elif not reply.has_error():
                    self._called[node] = wire.claimed_name(reply)
                    if odd := wire.odd_reply(reply, most_bytes=_MOST_BYTES):
                        raise wire.WireError(f"its first reply {odd}")
                    if (claimed := wire.claimed_partition(reply)) is not None:
                        self._claims[node] = claimed
                    hello = wire.read_hello(reply)
                    self._check(hello)
                    hellos[node] = hello
                elif not wire.node_is_gone(reply.error) and node in self.grid.get_node_ids():
                    reasons[node] = wire.error_text(reply.error)
            except wire.WireError as refusal:
                reasons[node] = str(refusal)
        self._heard |= {node: self._since.get(node, "") for node in hellos.keys() | reasons.keys()}
        return hellos, {node: one_line(reason, most=LONGEST_REASON) for node, reason in reasons.items()}

    def _check(self, hello: wire.Hello) -> None:
        """Refuse a hello that fits no partition of this run, or that is of other data than the partition's."""
        if hello.partition_id >= self.config.num_clients:
            raise wire.WireError(
                f"partition-id {hello.partition_id} is not among the {self.config.num_clients} of num-clients"
            )
        num_classes = len(self._shares[hello.partition_id].class_counts) if self._shares else 0  # own ones have names
        if hello.class_counts.shape != (num_classes,):
            raise wire.WireError(
                f"it knows {len(hello.class_counts)} classes, the server {num_classes}; "
                "both must read the same data set"
            )
        if self._shares and not _same_data(hello, self._shares[hello.partition_id]):
            raise wire.WireError(f"it holds other data than partition {hello.partition_id} of this run")

    def ask(self, nodes: Iterable[int]) -> dict[int, Message]:
        """Ask nodes what they hold: node id -> its reply, as far as there is one."""
        partition_of = self.roster.partition_of
        told = self.roster.holdings.told
        messages = [
            Message(
                wire.tell_classes(told.get(partition_of.get(node, -1))),
                dst_node_id=node,
                message_type=MessageType.QUERY,
                ttl=self.config.round_timeout,
            )
            for node in nodes
        ]
        replies = list(self.grid.send_and_receive(messages, timeout=self.config.round_timeout + 15)) if messages else []
        asked = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
        # An error of the server's own side names no node, so replies are tied to messages. A message to a node that
        # was removed is not taken, and the error that comes for it names no message.
        answers = ((asked.get(reply.metadata.reply_to_message_id), reply) for reply in replies)
        return {node: reply for node, reply in answers if node is not None}

    def called(self, node: int) -> str:
        """Name a node as people do: as it is registered, else as it calls itself, else by its number."""
        return self._names.get(node) or self._called.get(node) or f"node {node}"

    def _name(self, node: int) -> str:
        """Name a node, and its partition as far as it is known."""
        partition_of = self.roster.partition_of
        partition = partition_of.get(node, self._claims.get(node))
        return self.called(node) if partition is None else f"{self.called(node)} (partition {partition})"

    def insist(self, exchange: Callable[[wire.RoundOrder], _Given], order: wire.RoundOrder) -> _Given:
        """Do an exchange; where so many nodes are gone that it has too few replies, do it again when they are back.

        Where it was closed without late ones, it is done again with them.

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
                if self.exchange.closed_early:  # what came in time was not all good
                    self.exchange.patient = True
                    log.warning("%s; it is repeated, and waits for those that were late", shortage)
                    continue
                if len(self._holders(order.task_id)) >= self.config.min_replies:
                    raise  # the nodes are there: waiting would mend nothing
                log.warning("%s; it is repeated when they are back", shortage)

    def _await(self, order: wire.RoundOrder) -> None:
        """Wait until ``min-replies`` nodes that hold data of the task are connected, and say so."""
        wanted, began = self.config.min_replies, time.monotonic()
        present = self._holders(order.task_id)
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
            present = self._holders(order.task_id)
        waited = time.monotonic() - began
        self.tally.wait_seconds += waited
        log.info("round %d goes on with %d nodes after %.0f s", order.server_round, len(present), waited)
        self.show("training", order.server_round)

    def _holders(self, task_id: int) -> list[int]:
        """List the partitions with data of a task whose node is connected."""
        return self._present(self.roster.holds_task[task_id])

    def _present(self, partitions: Iterable[int]) -> list[int]:
        """List those of the partitions whose node is connected; a node that is new, or was gone, is asked first."""
        connected = self._look()
        self._heard = {
            node: since
            for node, since in self._heard.items()
            if connected.get(node) == since and self._stays_refused(node)
        }
        self._greet(sorted(connected.keys() - self._heard.keys()))
        return [partition for partition in partitions if self.roster.node_of.get(partition) in connected]

    def _greet(self, nodes: list[int]) -> None:
        """Take in nodes that are back, and such as were started anew: without node keys these have another id then."""
        hellos, reasons = self.hellos(nodes)
        for node, hello in hellos.items():
            try:
                self._recognise(node, hello)
                self.exchange.welcome(node, hello)
            except wire.WireError as refusal:
                reasons[node] = str(refusal)
            else:
                self._holder[hello.partition_id] = node
                log.info("%s is back with partition %d", self.called(node), hello.partition_id)
        for node, reason in reasons.items():
            log.warning("%s cannot take part: %s", self._name(node), reason)
            self.roster.dismiss(node, reason)

    def _recognise(self, node: int, hello: wire.Hello) -> None:
        """Refuse a node that is not the one to which the partition that it claims belongs.

        A node with a key has one id for ever, and the name under which the key is registered. One without has another
        id each time that it is started: nothing but its data tell that it is the same, once the one before is gone.
        """
        claimed = hello.partition_id
        before = next((partition for partition, holder in self._holder.items() if holder == node), claimed)
        if before != claimed:
            raise wire.WireError(f"it was partition {before} of this run, and says {claimed} now")
        holder = self._holder.get(claimed, node)
        if holder == node:
            return
        if holder in self._since:
            self._behind[node] = holder
            raise wire.WireError(f"partition {claimed} is held by {self.called(holder)}, which is connected")
        if name := self._names.get(holder):
            if self._names.get(node) == name:  # whoever registers keys has put this one in its place
                return
            raise wire.WireError(f"partition {claimed} belongs to the node that is registered as {name!r}, in this run")
        known = self.roster.hashes.get(claimed)
        if known and hello.partition_hash != known:  # data of a node's own: `_check` knows the others
            raise wire.WireError(
                f"it holds other data than partition {claimed} showed last, and without a node key nothing else says "
                "that it is the same node"
            )


def _same_data(hello: wire.Hello, share: Share) -> bool:
    """Tell whether a node says to hold what its partition is: it counts by these examples, so they are no claim."""
    return hello.partition_hash == share.partition_hash and hello.class_counts.tolist() == share.class_counts.tolist()


def _check_size(hellos: Mapping[int, wire.Hello], *, num_clients: int, num_nodes: int) -> None:
    """Refuse a run that is of another size than the federation, as all of its nodes say."""
    if {hello.num_partitions for hello in hellos.values()} == {num_nodes} != {num_clients}:
        raise RunFailed(
            f"num-clients is {num_clients}, but {num_nodes} SuperNodes are connected. In simulation pass "
            f'--federation-config "num-supernodes={num_clients}" to flwr run (its default is 2), or use '
            f"fedtalora run, which does; or set num-clients={num_nodes}"
        )


def _partitions(ids: Sequence[int]) -> str:
    """Word partitions as the subject of a sentence."""
    return f"partition{'s' * (len(ids) > 1)} {', '.join(map(str, ids))} {'are' if len(ids) > 1 else 'is'}"
