"""Ten thousand bad replies against the server's intake: each is refused with a reason, none leaves a trace."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from local_grid import defaults
from tensors import opened, tensors_of

from fedtalora_flwr import wire
from fedtalora_flwr.aggregation import ClientUpdate, GlobalState, LoraFactors, resolve
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.data import ClassList, HeldClass, Share
from fedtalora_flwr.launch.in_process import LocalGrid
from fedtalora_flwr.model.heads import FeatureRoot, FeatureSums
from fedtalora_flwr.residual import Patch
from fedtalora_flwr.server.failures import RunFailed, Tally
from fedtalora_flwr.server.federation import Federation
from fedtalora_flwr.server.holdings import Holdings
from fedtalora_flwr.server.intake import Intake
from fedtalora_flwr.server.residuals import SharedResidual
from fedtalora_flwr.server.roster import Roster
from fedtalora_flwr.wire import ARRAYS, HELLO, METRICS
from fedtalora_flwr.wire.records import HELD, TENSORS

LAYERS = {"blocks.0.attn.qkv": (7, 5), "blocks.1.mlp.fc2": (3, 11)}  # (d_out, d_in)
RANK, NUM_CLASSES, FEATURE_DIM, SCALING = 2, 4, 6, 2.0
COUNTS = torch.tensor([4, 0, 2, 1])
NUM_UPDATES, NUM_SUMS, NUM_HITS, NUM_HELLOS, BATCH = 10_000, 2_000, 600, 600, 250
MEMORY_LIMIT = 100e6  # bytes beyond what the process held before

Change = Callable[[RecordDict, np.random.Generator], None]


def make_state(generator: torch.Generator) -> GlobalState:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return GlobalState(
        {name: LoraFactors(randn(RANK, d_in), randn(d_out, RANK), SCALING) for name, (d_out, d_in) in LAYERS.items()},
        head={"weight": randn(NUM_CLASSES, FEATURE_DIM), "bias": randn(NUM_CLASSES)},
        version=3,
    )


def make_reply(state: GlobalState, generator: torch.Generator, *, wire_dtype: str = "fp32") -> RecordDict:
    def moved(value: torch.Tensor) -> torch.Tensor:
        return value + 0.1 * torch.randn(value.shape, generator=generator)

    update = ClientUpdate(
        partition_id=0,
        num_examples=int(COUNTS.sum()),
        adapters={
            name: LoraFactors(moved(pair.lora_A), moved(pair.lora_B), SCALING) for name, pair in state.adapters.items()
        },
        head={name: moved(value) for name, value in state.head.items()},
        class_counts=COUNTS,
        base_version=state.version,
    )
    return wire.update_reply(update, like=state, mean_loss=0.5, scaling=SCALING, wire_dtype=wire_dtype)


METHOD = resolve("fedtalora")


def make_intake() -> tuple[Intake, Tally]:
    config, tally = RunConfig.parse(defaults() | {"num-clients": 1}), Tally()
    roster = Roster(config, tally)
    tests = {0: {0: 4, 1: 4}, 1: {0: 2, 1: 2}}
    roster.holdings = Holdings(counts={(0, 0): COUNTS}, tests=tests)
    return Intake(config, roster, tally), tally


# --- What can be wrong with a reply ---


def pick(tensors: dict[str, np.ndarray], rng: np.random.Generator, *, among: str = "") -> str:
    return str(rng.choice(sorted(key for key in tensors if key.startswith(among))))


def replace_array(reply: RecordDict, rng: np.random.Generator, *, change: Callable[..., np.ndarray], among: str = ""):
    with opened(reply) as tensors:
        key = pick(tensors, rng, among=among)
        tensors[key] = np.asarray(change(tensors[key], rng))


def replace_bytes(reply: RecordDict, rng: np.random.Generator, *, change: Callable[[bytes, Any], bytes]) -> None:
    data = change(reply[ARRAYS][TENSORS].data, rng)
    reply[ARRAYS] = ArrayRecord({TENSORS: Array("uint8", (len(data),), "safetensors", data)})


def declare(reply: RecordDict, rng: np.random.Generator) -> None:
    array = reply[ARRAYS][TENSORS]
    plain = np.frombuffer(array.data, np.uint8)
    wrong = [
        {TENSORS: Array(array.dtype, array.shape, "pickle", array.data)},
        {TENSORS: Array(array.dtype, array.shape, "numpy.ndarray", array.data)},
        {TENSORS: Array(plain)},
        {"arrays": array},
        {TENSORS: array, "more": Array(plain[:9])},
        {key: Array(value) for key, value in tensors_of(reply).items()},
    ]
    reply[ARRAYS] = ArrayRecord(wrong[rng.integers(len(wrong))])


def redescribe(data: bytes, rng: np.random.Generator, *, change: Callable[[dict[str, Any], Any], None]) -> bytes:
    """Change what the header says of the tensors, and leave their bytes."""
    length = int.from_bytes(data[:8], "little")
    described = json.loads(data[8 : 8 + length])
    change(described, rng)
    header = json.dumps(described).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def claim_more(described: dict[str, Any], rng: np.random.Generator) -> None:
    entry = described[str(rng.choice(sorted(described)))]
    sizes = [[10**12], [2**32, 2**32], [2**64 - 1, 2], [-1, -5], [2.5], "a", [], [0, 10**12], [1] * 3_000, None]
    ends = [[0, 10**12], [0, 2**64 - 1], [-4, 4], [8, 4], [0], "0", None, [10**12, 10**12 + 4]]
    kinds = ["F99", "O", "f4", "", None, "BF16", "F8_E4M3", "C64"]
    wrong = [("shape", sizes), ("data_offsets", ends), ("dtype", kinds)]
    key, values = wrong[rng.integers(len(wrong))]
    entry[key] = values[rng.integers(len(values))]


def claim_length(data: bytes, rng: np.random.Generator) -> bytes:
    length = [0, 1, 2**20, 10**12, 2**63, 2**64 - 1, len(data), len(data) - 8][rng.integers(8)]
    return length.to_bytes(8, "little") + data[8:]


def foreign(data: bytes, rng: np.random.Generator) -> bytes:
    starts = [b"", b"PK\x03\x04", b"\x80\x04K\x01.", b"\x93NUMPY\x01\x00", b"\x02" + bytes(7) + b"{}", data[:8] + b"[]"]
    return starts[rng.integers(len(starts))] + rng.bytes(rng.integers(0, 200)) * int(rng.integers(0, 2))


def poisoned(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    array = array.copy()
    array.flat[rng.integers(array.size)] = rng.choice([np.nan, np.inf, -np.inf])
    return array


def reshaped(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    padded = np.pad(array, [(0, int(rng.integers(1, 4)))] * array.ndim, constant_values=1)
    choices = [padded, array[None], array[..., None], array[:-1], array[:0], array.flat[0], np.stack([array] * 3)]
    choices += [array.T, array.ravel(), array[:, 1:]] if array.ndim == 2 else []
    return choices[rng.integers(len(choices))]


def retyped(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    types = ["f8", "i2", "u1", "u4", "u8", "?"]
    return array.astype(rng.choice([kind for kind in types if np.dtype(kind) != array.dtype]))


def huge(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return array * np.float32(10.0 ** rng.uniform(5, 35) * rng.choice([-1, 1])) + np.float32(1e5)


def other_counts(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    choices = [array + 1, array[::-1], -array, array * 0, array + 2**20, np.roll(array, 1), np.zeros(0, np.int32)]
    return np.ascontiguousarray(choices[rng.integers(len(choices))])


def rename(reply: RecordDict, rng: np.random.Generator) -> None:
    with opened(reply) as tensors:
        key = pick(tensors, rng)
        names = ["", "/", key.upper(), key + " ", "../" + key, key.replace("/", "."), "lora_C/x", "é" * 5000, key[:-1]]
        tensors[str(rng.choice([name for name in names if name not in tensors]))] = tensors[key]
        if rng.integers(2):
            del tensors[key]


def drop(reply: RecordDict, rng: np.random.Generator) -> None:
    with opened(reply) as tensors:
        del tensors[pick(tensors, rng)]


def crowd(reply: RecordDict, rng: np.random.Generator) -> None:
    with opened(reply) as tensors:
        for index in range(int(rng.integers(1, 60))):
            tensors[f"lora_A/blocks.{index}.more"] = np.ones((2, 5), np.float32)


def drop_number(reply: RecordDict, rng: np.random.Generator) -> None:
    del reply[METRICS][str(rng.choice(sorted({*reply[METRICS]} - {"exponents"})))]


def other_number(reply: RecordDict, rng: np.random.Generator) -> None:
    wrong: dict[str, list[Any]] = {
        "partition-id": [1, -1, 2**62, 0.0, float("nan"), [0], []],
        "num-examples": [0, -7, 8, 2**62, 7.0, float("inf"), [7]],
        "base-version": [2, 4, -3, 2**62, 3.0, [3, 3]],
        "scaling": [0.0, -2.0, float("nan"), float("inf"), 1e9, 1e300, [2.0]],
        "mean-loss": [float("nan"), float("inf"), -float("inf"), [0.5]],
        "exponents": [[0], [10**6] * 8, [-(10**6)] * 8, [0.5] * 8, 3, [], [float("nan")] * 8],
    }
    key = str(rng.choice(sorted(wrong)))
    reply[METRICS][key] = wrong[key][rng.integers(len(wrong[key]))]


def drop_record(reply: RecordDict, rng: np.random.Generator) -> None:
    key = str(rng.choice([ARRAYS, METRICS]))
    other = [None, ConfigRecord({"a": "b"}), MetricRecord({"a": 1}), ArrayRecord({"a": Array(np.ones(3))})]
    del reply[key]
    if (record := other[rng.integers(len(other))]) is not None:
        reply[key] = record


BYTES: dict[str, Change] = {
    "cut short": partial(replace_bytes, change=lambda data, rng: data[: rng.integers(len(data))]),
    "too long": partial(replace_bytes, change=lambda data, rng: data + rng.bytes(rng.integers(1, 99))),
    "claims more than there is": partial(replace_bytes, change=partial(redescribe, change=claim_more)),
    "claims a longer header": partial(replace_bytes, change=claim_length),
    "of another format": partial(replace_bytes, change=foreign),
    "declared otherwise": declare,
}
UPDATES: dict[str, Change] = BYTES | {
    "array missing": drop,
    "array renamed": rename,
    "arrays unknown": crowd,
    "of another type": partial(replace_array, change=retyped),
    "of another shape": partial(replace_array, change=reshaped),
    "not finite": partial(replace_array, change=poisoned, among="lora"),
    "not finite in the head": partial(replace_array, change=poisoned, among="head"),
    "huge": partial(replace_array, change=huge, among="lora"),
    "huge in the head": partial(replace_array, change=huge, among="head"),
    "of other counts": partial(replace_array, change=other_counts, among="counts"),
    "number missing": drop_number,
    "of another number": other_number,
    "record missing": drop_record,
}
SUMS: dict[str, Change] = BYTES | {
    "array missing": drop,
    "array renamed": rename,
    "arrays unknown": crowd,
    "of another type": partial(replace_array, change=retyped),
    "of another shape": partial(replace_array, change=reshaped),
    "not finite": partial(replace_array, change=poisoned, among="sums/root"),
    "huge": partial(replace_array, change=lambda array, rng: array * 10.0 ** rng.uniform(1, 280), among="sums/root"),
    "huge moment": partial(replace_array, change=lambda array, rng: array * 1e9, among="sums/moment"),
    "of other classes": partial(replace_array, change=other_counts, among="sums/class"),
}


def other_hits(reply: RecordDict, rng: np.random.Generator) -> None:
    wrong: dict[str, list[Any]] = {
        "num-correct": [
            [5, 0],
            [-1, 2],
            [3, 3],
            [2**63 - 1, 2],
            [3.0, 2.0],
            [float("nan")] * 2,
            [3],
            [1] * 5_000,
            [],
            3,
        ],
        "num-examples": [
            [2, 2],
            [-4, 2],
            [4, 1],
            [4, 2**31],
            [2**63 - 1, 2],
            [4.0, 2.0],
            [4, 2, 0],
            [9] * 5_000,
            [],
            4,
        ],
    }
    key = str(rng.choice(sorted(wrong)))
    reply[METRICS][key] = wrong[key][rng.integers(len(wrong[key]))]


def more_tasks(reply: RecordDict, rng: np.random.Generator) -> None:
    for key in ("num-correct", "num-examples"):
        reply[METRICS][key] = reply[METRICS][key] * int(rng.integers(2, 5_000))


def drop_setting(reply: RecordDict, rng: np.random.Generator) -> None:
    del reply[HELLO][str(rng.choice(sorted(reply[HELLO])))]


def other_setting(reply: RecordDict, rng: np.random.Generator) -> None:
    wrong: dict[str, list[Any]] = {
        "partition-id": [-1, 3, 2**62, 0.5, "0", True, b"0", [0], []],
        "num-partitions": [-3, 3.0, "3", False, [3]],
        "partition-hash": [3, 1.5, True, b"x", ["x"]],
        "held": [3, b"x", ["x", "y"], []],
        "library": ["9.9.9", "", 3, ["0.1.0"], b"0.1.0"],
    }
    key = str(rng.choice(sorted(wrong)))
    reply[HELLO][key] = wrong[key][rng.integers(len(wrong[key]))]


def other_classes(reply: RecordDict, rng: np.random.Generator) -> None:
    wrong: dict[str, list[Any]] = {
        "task": [["a"], ["a"] * 5, [1, 2], "ab", [], True],
        "name": [["", "b"], [" \t", "b"], [1, 2], ["a"], "ab", [b"a", b"b"]],
        "num-train": [[-1, 2], [2**40, 1], [1.5, 2.0], ["1", "2"], [1], [True, False], 2],
        "num-test": [[-1, 2], [2**62, 2**62], [float("nan"), 1.0], [0, 0, 0], 7],
        "remarks": ["odd", [1, 2], 3, [b"odd"]],
    }
    key = str(rng.choice(sorted(wrong)))
    if rng.integers(6):
        reply[HELD][key] = wrong[key][rng.integers(len(wrong[key]))]
    else:
        del reply[HELD][key]


def name_twice(reply: RecordDict, rng: np.random.Generator) -> None:
    for key in ("task", "name", "num-train", "num-test"):
        reply[HELD][key] = reply[HELD][key] * 2


def other_record(reply: RecordDict, rng: np.random.Generator) -> None:
    key = str(rng.choice(sorted(reply)))
    del reply[key]
    reply[key] = [MetricRecord({"a": 1}), ArrayRecord(), ConfigRecord({"a": [1]})][rng.integers(3)]


HITS: dict[str, Change] = {"number missing": drop_number, "of another number": other_hits, "of more tasks": more_tasks}
HITS |= {"of another record": other_record}
HELLOS: dict[str, Change] = {"setting missing": drop_setting, "of another setting": other_setting}
HELLOS |= {"of another record": other_record}
SHARED: dict[str, Change] = (
    HELLOS
    | BYTES
    | {
        "array missing": drop,
        "array renamed": rename,
        "arrays unknown": crowd,
        "of another type": partial(replace_array, change=retyped),
        "of another shape": partial(replace_array, change=reshaped),
        "of counts below 0": partial(replace_array, change=lambda array, rng: -array - 1),
        "of counts beyond all": partial(replace_array, change=lambda array, rng: array + 2**31),
    }
)
OWN: dict[str, Change] = HELLOS | {"of other classes": other_classes, "of a class twice": name_twice}


def copied(reply: RecordDict) -> RecordDict:
    """Copy the records; the arrays in them are replaced and never changed."""
    return RecordDict({key: type(record)(dict(record)) for key, record in reply.items()})


def bad_replies(
    replies: list[RecordDict], changes: dict[str, Change], *, number: int, kind: str
) -> list[tuple[str, Message]]:
    rng, order = np.random.default_rng(11), Message(RecordDict(), dst_node_id=1, message_type=kind)
    made = []
    for index in range(number):
        name = sorted(changes)[index % len(changes)]
        content = copied(replies[index // len(changes) % len(replies)])
        changes[name](content, rng)
        made.append((name, Message(content, reply_to=order)))
    return made


@pytest.fixture(autouse=True)
def _task_identity():
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # else Message() raises


class PeakMemory:
    """The most that this process holds beyond what it held at the beginning, in bytes."""

    def __enter__(self) -> "PeakMemory":
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        self._before = self._held("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        self.bytes = self._held("VmHWM") - self._before

    @staticmethod
    def _held(what: str) -> int:
        found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found
        return 1024 * int(found[1])


def test_ten_thousand_bad_updates_are_refused_with_a_reason_and_leave_the_state_as_it_was():
    state = make_state(torch.Generator().manual_seed(1))
    replies = [make_reply(state, torch.Generator().manual_seed(2), wire_dtype=kind) for kind in ("fp32", "fp16")]
    intake, tally = make_intake()
    bad = bad_replies(replies, UPDATES, number=NUM_UPDATES, kind="train")
    with PeakMemory() as peak:
        for start in range(0, NUM_UPDATES, BATCH):
            batch = bad[start : start + BATCH]
            tally.begin(1)
            with pytest.raises(RunFailed, match="round 1 has 0 good replies"):
                intake.updates([(0, reply) for _, reply in batch], state=state, method=METHOD, task_id=0)
            assert len(tally.failures) == len(batch)
            for (name, _), failure in zip(batch, tally.failures, strict=True):
                assert re.match("(refused: .{10})", failure.reason) and len(failure.reason) <= 500, name
    assert peak.bytes < MEMORY_LIMIT
    order = Message(RecordDict(), dst_node_id=1, message_type="train")
    good = [(0, Message(copied(replies[0]), reply_to=order))]
    taken, wanted = (
        one.updates(good, state=state, method=METHOD, task_id=0).updates for one in (intake, make_intake()[0])
    )
    new, like = METHOD.aggregate(state, taken), METHOD.aggregate(state, wanted)
    assert new.residual and new.version == like.version == state.version + 1
    for name, residual in like.residual.items():
        assert torch.equal(new.residual[name], residual)


def test_two_thousand_bad_sums_are_refused_with_a_reason_and_none_is_added():
    features = torch.randn(int(COUNTS.sum()), FEATURE_DIM, generator=torch.Generator().manual_seed(3))
    labels = torch.repeat_interleave(torch.arange(NUM_CLASSES), COUNTS)
    root = FeatureRoot.of(features, labels, num_classes=NUM_CLASSES)
    before = FeatureSums.zero(num_classes=NUM_CLASSES, feature_dim=FEATURE_DIM)
    intake, tally = make_intake()
    bad = bad_replies([wire.sums_reply(root)], SUMS, number=NUM_SUMS, kind="train.sums")
    with PeakMemory() as peak:
        for name, reply in bad:
            tally.begin(1)
            with pytest.raises(RunFailed, match="has 0 good replies"):
                intake.sums([(0, reply)], task_id=0, to=before, views=0)
            (failure,) = tally.failures
            assert failure.reason.startswith("refused: "), name
    assert peak.bytes < MEMORY_LIMIT
    order = Message(RecordDict(), dst_node_id=1, message_type="train.sums")
    good = [(0, Message(wire.sums_reply(root), reply_to=order))]
    added = intake.sums(good, task_id=0, to=before, views=0)
    torch.testing.assert_close(added.gram, root.sums().gram, rtol=1e-12, atol=1e-12)  # BLAS goes by its threads
    assert torch.equal(added.moment, root.moment)


def test_bad_hits_are_refused_with_a_reason_and_those_of_the_others_are_counted():
    good = wire.hits_reply([3, 2], [4, 2])
    intake, tally = make_intake()
    order = Message(RecordDict(), dst_node_id=2, message_type="evaluate")
    for name, reply in bad_replies([good], HITS, number=NUM_HITS, kind="evaluate"):
        tally.begin(1)
        replies = [(0, reply), (1, Message(copied(good), reply_to=order))]
        assert intake.hits(replies, num_tasks=2)[:2] == ([3, 2], [4, 2]), name
        (failure,) = tally.failures
        assert re.match("(refused: .{10})", failure.reason) and len(failure.reason) <= 200, name


def own_data_intake(**settings: Any) -> tuple[Intake, Tally]:
    """An intake of three nodes that bring their own data, which may grow."""
    config, tally = RunConfig.parse(defaults() | {"num-clients": 3} | settings), Tally()
    roster = Roster(config, tally)
    names = ClassList(tuple("abcd"), (tuple(range(NUM_CLASSES)),))
    roster.holdings = Holdings(
        names,
        {(0, p): COUNTS for p in range(3)},
        tests={0: dict.fromkeys(range(3), 100)},
        told=dict.fromkeys(range(3), names),
    )
    roster.holds_task = {0: [0, 1, 2]}
    return Intake(config, roster, tally), tally


def answered(content: RecordDict, *, kind: str) -> Message:
    return Message(content, reply_to=Message(RecordDict(), dst_node_id=1, message_type=kind))


@pytest.mark.parametrize("count", [-1.0, -8.0, 0.5, 3.5, 9.0])
@pytest.mark.parametrize("row", [0, 1])  # of a class that is held, and of one that is not
def test_examples_of_a_class_are_a_whole_number_that_can_be_where_data_may_grow(row, count):
    moment = torch.cat([torch.ones(NUM_CLASSES, FEATURE_DIM), COUNTS[:, None]], 1).double()
    odd = moment.clone()
    odd[row, -1] = count
    intake, tally = own_data_intake()
    replies = [(p, answered(wire.means_reply(m), kind="train.means")) for p, m in enumerate((moment, odd))]
    means, _ = intake.class_means(replies, task_id=0, feature_dim=FEATURE_DIM)
    assert means[0].tolist() == [1 / 4] * FEATURE_DIM
    (failure,) = tally.failures
    assert failure.partition_id == 1 and "speaks of other examples than" in failure.reason


def test_squared_gradients_over_fewer_examples_than_none_are_refused_where_data_may_grow():
    state = make_state(torch.Generator().manual_seed(1))
    sums = {key: torch.ones_like(value) for key, value in wire.records.pack_factors(state.adapters).items()}
    content = wire.fisher_reply(sums, class_counts=COUNTS)
    with opened(content) as tensors:
        tensors["counts/examples"] = -tensors["counts/examples"]
    intake, _ = own_data_intake()
    with pytest.raises(RunFailed, match="speaks of other examples than"):
        intake.mean_fisher([(0, answered(content, kind="train.fisher"))], like=state, method=METHOD, task_id=0)


@pytest.mark.parametrize(("max_weight", "wanted"), [(0.0, ([280], [400])), (1.2, ([213], [333]))])
def test_no_node_counts_for_more_of_the_accuracy_than_max_weight(max_weight, wanted):
    intake, _ = own_data_intake(**{"max-weight": max_weight})
    said = [([40], [100]), ([40], [100]), ([200], [200])]
    replies = [(p, answered(wire.hits_reply(*hits), kind="evaluate")) for p, hits in enumerate(said)]
    assert intake.hits(replies, num_tasks=1)[:2] == wanted


@pytest.mark.parametrize(("changes", "num_classes"), [(SHARED, NUM_CLASSES), (OWN, None)], ids=["shared", "own"])
def test_bad_hellos_are_refused_with_a_reason_and_end_nothing(changes, num_classes):
    if num_classes:
        hello = wire.Hello(0, 3, "hash", COUNTS, held=("digest",))
    else:
        own = (HeldClass("task-1", "ant", 5, 2), HeldClass("task-2", "bee", 3, 0))
        hello = wire.Hello(0, 3, "hash", torch.zeros(0, dtype=torch.int64), own=own, remarks=("odd",))
    good = wire.hello_reply(hello)
    bad = bad_replies([good], changes, number=NUM_HELLOS, kind="query")
    config = RunConfig.parse(defaults() | {"num-clients": 3})
    replies = iter([*(reply for _, reply in bad), Message(copied(good), reply_to=bad[0][1])])
    grid = LocalGrid(lambda message, context: Message(next(replies).content, reply_to=message), config.flat(), 1)
    shares = [Share(hello.partition_hash, hello.class_counts.numpy())] * 3 if num_classes else None
    residuals = SharedResidual(make_state(torch.Generator().manual_seed(1)))
    told = {"show": lambda phase, server_round: None, "waits": lambda asked, waiting: None}
    nodes = Federation(grid, config, residuals=residuals, shares=shares, **told).nodes
    (node,) = grid.get_node_ids()
    for name, _ in bad:
        hellos, reasons = nodes.hellos([node])
        assert not hellos and len(reasons[node]) > 10, name
        assert len(reasons[node]) <= 500, name
    hellos, reasons = nodes.hellos([node])
    assert hellos[node].own == hello.own and not reasons


def test_no_order_of_other_sizes_is_followed_by_a_client():
    state, rng = make_state(torch.Generator().manual_seed(3)), np.random.default_rng(5)
    sizes = {
        f"{factor}/{name}": tuple(getattr(pair, factor).shape)
        for name, pair in state.adapters.items()
        for factor in ("lora_A", "lora_B")
    }
    room = wire.Room(num_classes=NUM_CLASSES, num_tasks=3, widths=frozenset({FEATURE_DIM}), factors=sizes)
    clock = wire.RoundOrder(server_round=1, task_id=0, round_in_task=0)
    zero = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

    def order(arrays: ArrayRecord, steps: dict[str, torch.Tensor], **settings: int) -> Message:
        content = wire.state_message(arrays, clock, scaling=SCALING, version=0, num_classes=NUM_CLASSES)
        content[wire.ORDER].update({key.replace("_", "-"): value for key, value in settings.items()})
        chain = Patch((zero, "0" * 64) if steps else (zero,))
        content = wire.add_patch(content, chain, wire.records.array_record(steps))
        return Message(content, dst_node_id=1, message_type="train")

    whole = wire.pack_state(state, classes=[0, 1])
    wire.read_state(order(whole, {}), room=room)
    for index in range(300):
        size, name = int(10 ** rng.uniform(2, 8)), str(rng.choice([*LAYERS, "x"]))
        parts = {f"{part}/{key}": v for part, e in wire.records.read_arrays(whole).items() for key, v in e.items()}
        steps, settings = {}, {}
        if index % 3 == 0:
            settings = {str(rng.choice(["num_classes", "task_id"])): size * int(rng.choice([-1, 1]))}
        elif index % 3 == 1:
            steps = {f"left 0/{name}": torch.zeros(size, 0), f"right 0/{name}": torch.zeros(0, size)}
        else:
            shape = [(0, size), (size % 97 + 9, 1, 1), (1, 1), (0,)][index // 3 % 4]
            parts[str(rng.choice(sorted(parts.keys() - {"rows/class", "head/bias"})))] = torch.zeros(shape)
        with PeakMemory() as peak, pytest.raises(wire.WireError):
            wire.read_state(order(wire.records.array_record(parts), steps, **settings), room=room)
        assert peak.bytes < MEMORY_LIMIT
