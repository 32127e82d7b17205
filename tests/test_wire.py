"""What goes onto the wire comes off it bit for bit, and what cannot be read is refused and not guessed."""

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from local_grid import defaults

import fedtalora_flwr
from fedtalora_flwr import wire
from fedtalora_flwr.aggregation import BadUpdate, ClientUpdate, GlobalState, LoraFactors
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.heads import FeatureSums
from fedtalora_flwr.wire import ARRAYS, HELLO, METRICS, ORDER, RoundOrder, WireError

D_OUT, D_IN, RANK, SCALING = 7, 5, 2, 1.5
LAYER = "blocks.0.attn.qkv"


@pytest.fixture(autouse=True)
def _task_identity():
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # else Message() raises


def message(content: RecordDict) -> Message:
    return Message(content, dst_node_id=1, message_type="train")


def make_pairs() -> dict[str, LoraFactors]:
    return {LAYER: LoraFactors(torch.randn(RANK, D_IN), torch.randn(D_OUT, RANK), SCALING)}


def make_head() -> dict[str, torch.Tensor]:
    return {"weight": torch.randn(4, 6), "bias": torch.randn(4)}


def make_update() -> ClientUpdate:
    return ClientUpdate(3, 7, make_pairs(), make_head(), torch.tensor([4, 0, 2, 1]), base_version=5)


def make_sums() -> FeatureSums:
    return FeatureSums.of(torch.randn(9, 6), torch.randint(0, 4, (9,)), num_classes=4)


def update_message() -> Message:
    return message(wire.update_reply(make_update(), mean_loss=0.25, scaling=SCALING))


def assert_same_pairs(got, wanted):
    assert got.keys() == wanted.keys()
    for name, pair in wanted.items():
        assert torch.equal(got[name].lora_A, pair.lora_A)
        assert torch.equal(got[name].lora_B, pair.lora_B)
        assert got[name].scaling == pair.scaling


def assert_same_tensors(got, wanted):
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("residual", [{}, {LAYER: torch.randn(D_OUT, D_IN)}], ids=["without residual", "with residual"])
def test_state_and_clock_come_off_the_wire_as_they_went_on(residual):
    state = GlobalState(make_pairs(), residual, make_head(), version=4)
    content = wire.state_message(wire.pack_state(state), RoundOrder(9, 2, 1), scaling=SCALING, version=4)
    got, order = wire.read_state(message(content))
    assert_same_pairs(got.adapters, state.adapters)
    assert_same_tensors(got.residual, residual)
    assert_same_tensors(got.head, state.head)
    assert (got.version, order) == (4, RoundOrder(server_round=9, task_id=2, round_in_task=1))


def test_state_without_adapters_comes_off_the_wire_as_it_went_on():
    state = GlobalState({}, head=make_head())
    content = wire.state_message(wire.pack_state(state), RoundOrder(1, 0, 0), scaling=SCALING, version=0)
    got, _ = wire.read_state(message(content))
    assert got.adapters == got.residual == {}
    assert_same_tensors(got.head, state.head)


def test_update_comes_off_the_wire_as_it_went_on():
    update = make_update()
    got, mean_loss = wire.read_update(message(wire.update_reply(update, mean_loss=0.25, scaling=SCALING)))
    assert_same_pairs(got.adapters, update.adapters)
    assert_same_tensors(got.head, update.head)
    assert torch.equal(got.class_counts, update.class_counts) and got.class_counts.dtype == torch.int64
    assert (got.partition_id, got.num_examples, got.base_version, mean_loss) == (3, 7, 5, 0.25)


def test_hello_comes_off_the_wire_as_it_went_on():
    hello = wire.Hello(2, 5, "abc123", torch.tensor([1, 0, 7]))
    got = wire.read_hello(message(wire.hello_reply(hello)))
    assert torch.equal(got.class_counts, hello.class_counts)
    assert (got.partition_id, got.num_partitions, got.partition_hash) == (2, 5, "abc123")


def test_sums_come_off_the_wire_in_float64():
    sums = make_sums()
    got = wire.read_sums(message(wire.sums_reply(sums)), like=sums)
    assert torch.equal(got.gram, sums.gram) and torch.equal(got.moment, sums.moment)
    assert got.gram.dtype == got.moment.dtype == torch.float64


@pytest.mark.parametrize("part", [ARRAYS, METRICS])
def test_update_that_lacks_a_record_is_refused(part):
    reply = update_message()
    del reply.content[part]
    with pytest.raises(BadUpdate, match=f"reply cannot be read: KeyError .*{part}"):
        wire.read_update(reply)


@pytest.mark.parametrize("key", ["partition-id", "num-examples", "base-version", "scaling", "mean-loss"])
def test_update_that_lacks_a_number_is_refused(key):
    reply = update_message()
    del reply.content[METRICS][key]
    with pytest.raises(BadUpdate, match=f"reply cannot be read: KeyError '{key}'"):
        wire.read_update(reply)


@pytest.mark.parametrize("key", ["counts/class", f"lora_A/{LAYER}", f"lora_B/{LAYER}"])
def test_update_that_lacks_an_array_is_refused(key):
    reply = update_message()
    del reply.content[ARRAYS][key]
    with pytest.raises(BadUpdate, match="reply cannot be read"):
        wire.read_update(reply)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), [1, 2]])
def test_update_whose_number_is_no_number_is_refused(value):
    reply = update_message()
    reply.content[METRICS]["num-examples"] = value
    with pytest.raises(BadUpdate, match="reply cannot be read"):
        wire.read_update(reply)


def test_update_whose_array_is_cut_short_is_refused():
    reply = update_message()
    array = reply.content[ARRAYS][f"lora_A/{LAYER}"]
    array.data = array.data[:-4]
    with pytest.raises(BadUpdate, match="reply cannot be read"):
        wire.read_update(reply)


def test_update_whose_array_has_a_foreign_kind_of_storage_is_refused():
    reply = update_message()
    reply.content[ARRAYS][f"lora_A/{LAYER}"].stype = "pickle"
    with pytest.raises(BadUpdate, match="reply cannot be read"):
        wire.read_update(reply)


def test_empty_reply_is_refused():
    with pytest.raises(BadUpdate, match="reply cannot be read"):
        wire.read_update(message(RecordDict()))


@pytest.mark.parametrize("key", ["sums/gram", "sums/moment"])
def test_sums_that_lack_a_part_are_refused(key):
    reply = message(wire.sums_reply(make_sums()))
    del reply.content[ARRAYS][key]
    with pytest.raises(BadUpdate, match="sums cannot be read"):
        wire.read_sums(reply, like=make_sums())


def test_the_gram_travels_as_the_triangle_that_says_all_of_it():
    sums = make_sums()
    reply = message(wire.sums_reply(sums))
    assert reply.content[ARRAYS]["sums/gram"].shape == (7 * 8 // 2,)
    assert torch.equal(wire.read_sums(reply, like=sums).gram, sums.gram)


def test_sums_of_another_shape_are_refused():
    other = FeatureSums.zero(num_classes=4, feature_dim=9)
    with pytest.raises(BadUpdate, match=r"sums have shapes \(55,\) and \(4, 10\)"):
        wire.read_sums(message(wire.sums_reply(other)), like=make_sums())


def test_sums_that_are_not_finite_are_refused():
    sums = make_sums()
    sums.moment[0, 0] = float("nan")
    with pytest.raises(BadUpdate, match="sums hold a number that is not finite"):
        wire.read_sums(message(wire.sums_reply(sums)), like=make_sums())


def test_client_refuses_a_server_of_another_library_version():
    content = wire.state_message(wire.pack_state(GlobalState({})), RoundOrder(1, 0, 0), scaling=1.0, version=0)
    content[ORDER]["library"] = "9.9"
    ours = fedtalora_flwr.__version__
    with pytest.raises(WireError, match=rf"the server runs fedtalora 9\.9, this side {ours}; install the same version"):
        wire.read_state(message(content))


def test_server_refuses_a_client_of_another_library_version():
    content = wire.hello_reply(wire.Hello(0, 1, "", torch.ones(2, dtype=torch.int64)))
    content[HELLO]["library"] = "9.9"
    with pytest.raises(WireError, match=r"the client runs fedtalora 9\.9"):
        wire.read_hello(message(content))


@pytest.mark.parametrize("content", [{}, {HELLO: ConfigRecord()}], ids=["empty", "empty record"])
def test_first_reply_that_lacks_a_part_is_an_error_that_names_it(content):
    with pytest.raises(WireError, match="the first reply lacks"):
        wire.read_hello(message(RecordDict(content)))


@pytest.mark.parametrize(
    ("node_config", "text"),
    [({}, "this node has no partition-id"), ({"partition-id": 5}, "partition-id 5 is not among the 5 of num-clients")],
)
def test_node_whose_partition_cannot_be_is_told_why(node_config, text):
    with pytest.raises(WireError, match=text):
        wire.partition_of(node_config, RunConfig.parse(defaults()))


def test_bytes_of_a_message_are_those_of_all_its_records():
    arrays, metrics = ArrayRecord([torch.zeros(10).numpy()]), MetricRecord({"n": 3})
    found = wire.message_bytes(message(RecordDict({"a": arrays, "m": metrics})))
    assert found == arrays.count_bytes() + metrics.count_bytes() > 40
