"""A small order cannot make a client set much memory aside: it is refused with what it says and what there is."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from local_grid import TINY, defaults

from fedtalora_flwr import wire
from fedtalora_flwr.aggregation import GlobalState
from fedtalora_flwr.client import handlers
from fedtalora_flwr.client.redact import ClientError
from fedtalora_flwr.config import ConfigError, RunConfig
from fedtalora_flwr.data import ClassList
from fedtalora_flwr.model.heads import init_rows
from fedtalora_flwr.model.session import model_of
from fedtalora_flwr.residual import Patch
from fedtalora_flwr.wire import ARRAYS, ORDER
from fedtalora_flwr.wire.down import RoundOrder, pack_state
from fedtalora_flwr.wire.records import BASE, BASE_ARRAYS, CLASSES, array_record

SETTINGS = defaults() | TINY | {"num-clients": 1, "penalty": "ewc"}
NODE = {"partition-id": 0, "num-partitions": 1}
ZERO = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
LAYER = "blocks.5.attn.proj"
LIMIT = 500e6  # bytes more than the libraries and the model take, where the orders below are about 8 GB and more


def order() -> RecordDict:
    """Give the server's first order of a run, whose factors are left out so that it is small."""
    config = RunConfig.parse(SETTINGS)
    adapters = model_of(config).initial_factors(seed=0)
    state = GlobalState(adapters=adapters, head=init_rows(num_classes=10, feature_dim=192))
    arrays, clock = pack_state(state, classes=[0, 1]), RoundOrder(server_round=1, task_id=0, round_in_task=0)
    scaling = next(iter(adapters.values())).scaling
    content = wire.state_message(arrays, clock, scaling=scaling, version=0, num_classes=10)
    return wire.add_patch(content, Patch((ZERO,)), array_record({}))


def handle(content: RecordDict, name: str = "train") -> RecordDict:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    reply: RecordDict = getattr(handlers, name)(Message(content, dst_node_id=1, message_type="train"), SETTINGS, NODE)
    return reply


def add(content: RecordDict, key: str, value: torch.Tensor) -> None:
    parts = wire.records.read_arrays(content[ARRAYS])
    flat = {f"{part}/{name}": each for part, named in parts.items() for name, each in named.items()}
    content[ARRAYS] = array_record(flat | {key: value})


def step(left: torch.Tensor, right: torch.Tensor, name: str = LAYER) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        content[BASE]["chain"] = f"{ZERO} {'0' * 64}"
        content[BASE_ARRAYS] = array_record({f"left 0/{name}": left, f"right 0/{name}": right})

    return change


def dense(content: RecordDict) -> None:
    content[BASE_ARRAYS] = array_record({f"dense/{LAYER}": torch.zeros(3, 3)})


def told(content: RecordDict) -> None:
    content[CLASSES] = wire.tell_classes(ClassList(("ant",), ((10**9,),)))[CLASSES]


def told_many(content: RecordDict) -> None:
    content[CLASSES] = wire.tell_classes(ClassList(("",) * 10**6, ()))[CLASSES]


ORDERS: dict[str, tuple[Callable[[RecordDict], object], str]] = {
    "ten million classes": (
        lambda content: content[ORDER].update({"num-classes": 10**7}),
        "num-classes is 10000000, this node knows 10 classes",
    ),
    "fewer classes than none": (lambda content: content[ORDER].update({"num-classes": -1}), "num-classes is -1"),
    "rows of a giant width, none of them sent": (
        lambda content: add(content, "head/weight", torch.zeros(0, 2 * 10**9)),
        r"head weight has rows of shape \(2000000000,\), this node's are a weight of 30 or 192 numbers",
    ),
    "rows that the head does not have": (lambda content: add(content, "head/x", torch.zeros(2)), "head x has rows"),
    "a step without numbers, whose product is giant": (
        step(torch.zeros(10**5, 0), torch.zeros(0, 10**5)),
        rf"a step's left factor of {LAYER} has shape \(100000, 0\), this node's is \(192, 0\)",
    ),
    "a step that is too wide": (
        step(torch.zeros(192, 0), torch.zeros(0, 10**8)),
        rf"a step's right factor of {LAYER} has shape \(0, 100000000\), this node's is \(0, 192\)",
    ),
    "a step of a layer that is not adapted": (step(torch.zeros(9, 1), torch.zeros(1, 9), "x"), "model has none"),
    "a residual of another shape": (dense, rf"the residual of {LAYER} has shape \(3, 3\), this node's is \(192, 192\)"),
    "memories that broadcast": (
        lambda content: add(content, f"fisher/lora_A/{LAYER}", torch.zeros(500, 1, 1)),
        rf"squared gradients of lora_A of {LAYER} has shape \(500, 1, 1\), this node's is \(4, 192\)",
    ),
    "a pair of another rank": (
        lambda content: add(content, f"lora_A/{LAYER}", torch.zeros(1, 192)),
        rf"the pair's factor lora_A of {LAYER} has shape \(1, 192\), this node's is \(4, 192\)",
    ),
    "a task beyond all": (
        lambda content: content[ORDER].update({"task-id": 10**9}),
        "task-id is 1000000000, the run has 2 tasks",
    ),
    "a million classes of no name": (told_many, "the server told 1000000 classes, a run has at most 50000"),
    "a class beyond all": (told, "a task has class 1000000000, the server told 1 classes"),
}


def test_order_as_the_server_gives_it_is_followed() -> None:
    assert "metrics" in handle(order())


@pytest.mark.parametrize("what", ORDERS)
def test_order_is_refused_that_speaks_of(what: str) -> None:
    change, message = ORDERS[what]
    content = order()
    change(content)
    with pytest.raises(ClientError, match=message):
        handle(content)


def test_refused_orders_take_no_memory() -> None:
    """Follow all of them in a process that may have little more memory than it has."""
    code = f"""
import resource, test_room
from fedtalora_flwr.client.redact import ClientError
test_room.handle(test_room.order())
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + int({LIMIT})
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for change, message in test_room.ORDERS.values():
    content = test_room.order()
    change(content)
    try:
        test_room.handle(content)
    except ClientError as error:
        assert "see the node's log" not in str(error), error
"""
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]


BEYOND = {
    "num-tasks": 10**7,
    "num-clients": 10**8,
    "batch-size": 10**9,
    "eval-batch-size": 10**9,
    "image-size": 10**6,
    "max-length": 10**9,
    "ridge-features": 30_000,
    "drift-views": 10**6,
    "threads": 10**6,
}


@pytest.mark.parametrize("key", BEYOND)
def test_setting_that_would_take_all_memory_is_refused_with_its_limit(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} must be from \d to \d+, got {BEYOND[key]}$"):
        RunConfig.parse(SETTINGS | {key: BEYOND[key]})
