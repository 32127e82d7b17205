"""A Grid that runs the ClientApp in this process: real messages and records, no Ray and no SuperLink."""

import tomllib
import uuid
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.config import flatten_dict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

ROOT = Path(__file__).parents[1]
ClientCall = Callable[[Message, Context], Message]


def defaults() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return flatten_dict(tomllib.load(file)["tool"]["flwr"]["app"]["config"])


class LocalGrid(Grid):
    """`client` is a ClientApp or any function of message and context; raising in it is a client that fails.

    With `data_paths` every node has a folder of its own.
    """

    def __init__(
        self,
        client: ClientCall,
        run_config: dict[str, Any],
        num_nodes: int | None = None,
        data_paths: Sequence[Path] = (),
    ):
        self.client = client
        count = num_nodes or run_config["num-clients"]
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # else Message() raises
        self.contexts = {
            100 + p: Context(
                run_id=1,
                node_id=100 + p,
                state=RecordDict(),
                run_config=dict(run_config),
                node_config={"partition-id": p, "num-partitions": count}
                | ({"data-path": str(data_paths[p])} if data_paths else {}),
            )
            for p in range(count)
        }
        self._replies: dict[str, Message] = {}

    def set_run(self, run): ...

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            message_id = str(uuid.uuid4())
            message.metadata.__dict__["_message_id"] = message_id
            inner = deepcopy(message)  # clients must not alias server memory
            try:
                reply = self.client(inner, self.contexts[message.metadata.dst_node_id])
            except Exception as error:
                reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, repr(error)), reply_to=message)
            if reply is None:  # what the SuperLink answers for a client when the message's time is over
                reply = Message(Error(ErrorCode.MESSAGE_UNAVAILABLE, "no reply in time"), reply_to=message)
            self._replies[message_id] = reply
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids):
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))


def run_server(
    run_config: dict[str, Any],
    client: ClientCall | None = None,
    num_nodes: int | None = None,
    data_paths: Sequence[Path] = (),
) -> None:
    from client_app.app import app as client_app
    from server_app.app import app as server_app

    grid = LocalGrid(client or client_app, run_config, num_nodes, data_paths)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(run_config))
    server_app(grid, context)


TINY = {
    "num-tasks": 2,
    "max-per-class": 6,
    "num-clients": 3,
    "rounds-per-task": 2,
    "test-fraction": 0.2,
    "lora-blocks": "last:1",
    "batch-size": 8,
    "device": "cpu",
    "partition": "iid",
    "learning-rate": 0.01,
    "ridge-features": 30,
}


def tiny_run(out: Path, client: ClientCall | None = None, **changes: Any) -> Path:
    """Play a whole run of a few examples in this process, and give its folder."""
    settings = {key.replace("_", "-"): value for key, value in changes.items()}
    run_server(defaults() | TINY | {"out": str(out)} | settings, client)
    return out
