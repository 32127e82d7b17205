"""Run the Flower app in one process: its real ServerApp and ClientApps, without Ray and without a SuperLink.

The grid hands a message to the ClientApp where Flower's simulation hands it to an actor, and keeps the reply until the
server asks for it. Settings, messages, checks and seeds are the same, so a run has the same numbers, bit for bit. What
is spared is the start of Ray; what is lost is that clients train side by side, which many small runs make up for by
running side by side themselves.
"""

import sys
import tomllib
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

ClientCall = Callable[[Message, Context], Message | None]

_FIRST_NODE = 100


class LocalGrid(Grid):
    """Flower's Grid over clients that are called in this process, one after another.

    Parameters
    ----------
    client
        A ClientApp, or any function of message and context. Raising is a client that fails; None is a message whose
        time is over.
    run_config
        The settings, which every client gets.
    num_nodes
        Clients; by default ``num-clients``.
    data_paths
        A folder for each client, put into its node config; none leaves that to the settings.
    """

    def __init__(
        self,
        client: ClientCall,
        run_config: Mapping[str, Any],
        num_nodes: int | None = None,
        data_paths: Sequence[Path] = (),
    ) -> None:
        self.client = client
        count = num_nodes or run_config["num-clients"]
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # what Message() signs with
        self.contexts = {
            _FIRST_NODE + partition: Context(
                run_id=1,
                node_id=_FIRST_NODE + partition,
                state=RecordDict(),
                run_config=dict(run_config),
                node_config={"partition-id": partition, "num-partitions": count}
                | ({"data-path": str(data_paths[partition])} if data_paths else {}),
            )
            for partition in range(count)
        }
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Any) -> None:
        """Take no run: there is one."""

    @property
    def run(self) -> Any:
        """Refuse: no SuperLink knows this run."""
        raise NotImplementedError("a run in one process has no record on a SuperLink")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Build a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """List the nodes."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have every message answered, and give their ids."""
        ids = []
        for message in messages:
            message_id = str(uuid.uuid4())
            message.metadata.__dict__["_message_id"] = message_id
            self._replies[message_id] = self._answer(message)
            ids.append(message_id)
        return ids

    def _answer(self, message: Message) -> Message:
        threads = torch.get_num_threads()
        try:
            inner = deepcopy(message)  # clients must not alias the server's memory
            reply = self.client(inner, self.contexts[message.metadata.dst_node_id])
        except Exception as error:  # whatever a client trips over is that client's failure, in Flower's words
            reason = f"{type(error)}:<'{error}'>"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
        finally:
            torch.set_num_threads(threads)  # a client takes its own, and the server's sums go by the server's
        return reply or Message(Error(ErrorCode.MESSAGE_UNAVAILABLE, "no reply in time"), reply_to=message)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Give the replies to messages, each once."""
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Have messages answered, and give the replies."""
        return self.pull_messages(self.push_messages(messages))


def play(app_dir: Path, run_config: Mapping[str, Any]) -> None:
    """Run the app in this process to its end; what it raises goes through.

    Parameters
    ----------
    app_dir
        Folder with the app's ``pyproject.toml``, which names its ServerApp and ClientApp.
    run_config
        Every setting.
    """
    with (app_dir / "pyproject.toml").open("rb") as file:
        components = tomllib.load(file)["tool"]["flwr"]["app"]["components"]
    if str(app_dir) not in sys.path:
        sys.path.insert(0, str(app_dir))
    server, client = (_load(components[kind]) for kind in ("serverapp", "clientapp"))
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(run_config))
    server(LocalGrid(client, run_config), context)


def _load(reference: str) -> Callable[..., Any]:
    """Import what a reference such as ``server_app.app:app`` names."""
    module, _, name = reference.partition(":")
    return cast(Callable[..., Any], getattr(import_module(module), name))
