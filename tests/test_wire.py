"""What goes onto the wire comes off it bit for bit, and what cannot be read is refused and not guessed."""

import pickle
import re

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from local_grid import defaults
from tensors import opened, tensors_of

import fedtalora_flwr
from fedtalora_flwr import wire
from fedtalora_flwr.aggregation import BadUpdate, ClientUpdate, GlobalState, LoraFactors, Step
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.data import HeldClass
from fedtalora_flwr.model.heads import FeatureRoot, FeatureSums
from fedtalora_flwr.residual import ZERO, Patch
from fedtalora_flwr.wire import ARRAYS, HELLO, METRICS, ORDER, RoundOrder, WireError
from fedtalora_flwr.wire.records import TENSORS

D_OUT, D_IN, RANK, SCALING = 7, 5, 2, 1.5
LAYER = "blocks.0.attn.qkv"
AT_ZERO = Patch((ZERO.digest,))


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


def make_root(num_examples: int = 9) -> FeatureRoot:
    return FeatureRoot.of(torch.randn(num_examples, 6), torch.randint(0, 4, (num_examples,)), num_classes=4)


def make_sums() -> FeatureSums:
    return make_root().sums()


def make_state(num_classes: int = 4) -> GlobalState:
    return GlobalState(make_pairs(), head={"weight": torch.randn(num_classes, 6), "bias": torch.randn(num_classes)})


def update_message() -> Message:
    return message(wire.update_reply(make_update(), like=make_state(), mean_loss=0.25, scaling=SCALING))


def state_message(state: GlobalState, patch: Patch = AT_ZERO, *, classes=range(4)) -> Message:
    content = wire.state_message(
        wire.pack_state(state, classes=classes), RoundOrder(9, 2, 1), scaling=SCALING, version=4, num_classes=4
    )
    return message(wire.add_patch(content, patch, wire.pack_patch(patch)))


def assert_same_pairs(got, wanted):
    assert got.keys() == wanted.keys()
    for name, pair in wanted.items():
        assert torch.equal(got[name].lora_A, pair.lora_A)
        assert torch.equal(got[name].lora_B, pair.lora_B)
        assert got[name].scaling == pair.scaling


def assert_same_tensors(got, wanted):
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_state_and_clock_come_off_the_wire_as_they_went_on():
    state = GlobalState(make_pairs(), head=make_head(), version=4)
    got, patch, order = wire.read_state(state_message(state))
    assert_same_pairs(got.adapters, state.adapters)
    assert_same_tensors(got.head, state.head)
    assert (got.version, order) == (4, RoundOrder(server_round=9, task_id=2, round_in_task=1))
    assert (patch.chain, patch.steps, patch.dense) == ((ZERO.digest,), (), {})


def test_a_run_has_a_name_that_no_path_can_be():
    sent = state_message(make_state())
    sent.content.config_records[ORDER]["run"] = "0123456789abcdef"
    assert (
        wire.read_state(sent)[2].run == "0123456789abcdef" and wire.read_state(state_message(make_state()))[2].run == ""
    )
    sent.content.config_records[ORDER]["run"] = "../../0123456789"
    with pytest.raises(WireError, match=r"a run is named by 16 hexadecimal digits, not '\.\./"):
        wire.read_state(sent)


def test_a_private_reply_tells_what_is_spent_in_place_of_its_loss():
    told = {"like": make_state(), "mean_loss": 0.25, "scaling": SCALING}
    private = message(wire.update_reply(make_update(), **told, epsilon_spent=3.5))
    _, mean_loss = wire.read_update(private, like=make_state(), private=True)
    assert mean_loss != mean_loss and wire.read_epsilon(private, budget=8.0) == 3.5
    with pytest.raises(BadUpdate, match="mean-loss"):
        wire.read_update(private, like=make_state())
    with pytest.raises(BadUpdate, match=r"spent an epsilon of 3\.5, dp-epsilon is 3"):
        wire.read_epsilon(private, budget=3.0)
    with pytest.raises(BadUpdate, match="says not what it has spent"):
        wire.read_epsilon(update_message(), budget=8.0)


def test_patch_comes_off_the_wire_as_it_went_on():
    steps = tuple({LAYER: Step(torch.randn(D_OUT, m), torch.randn(m, D_IN))} for m in (2, 3))
    dense = {"blocks.0.mlp.fc1": torch.randn(4, 3)}
    chain = ("a" * 64, "b" * 64, "c" * 64)
    _, got, _ = wire.read_state(state_message(make_state(), Patch(chain, steps, dense)))
    assert got.chain == chain
    assert_same_tensors(got.dense, dense)
    for mine, theirs in zip(steps, got.steps, strict=True):
        assert torch.equal(mine[LAYER].left, theirs[LAYER].left)
        assert torch.equal(mine[LAYER].right, theirs[LAYER].right)


def test_only_the_class_rows_that_are_needed_travel_down():
    state = GlobalState(make_pairs(), head=make_head())
    content = state_message(state, classes=[3, 1])
    assert tensors_of(content.content)["head/weight"].shape == (2, 6)
    got, _, _ = wire.read_state(content)
    assert torch.equal(got.head["weight"][[1, 3]], state.head["weight"][[1, 3]])
    assert got.head["weight"].shape == (4, 6) and not got.head["weight"][[0, 2]].any()


def test_state_without_adapters_comes_off_the_wire_as_it_went_on():
    state = GlobalState({}, head=make_head())
    got, _, _ = wire.read_state(state_message(state))
    assert got.adapters == {}
    assert_same_tensors(got.head, state.head)


def test_client_that_cannot_reach_the_base_says_which_it_holds():
    assert wire.read_version_missing(message(wire.version_missing_reply(["a", "b"]))) == ["a", "b"]
    assert wire.read_version_missing(update_message()) is None


@pytest.mark.parametrize("wire_dtype", ["fp32", "fp16"])
def test_update_comes_off_the_wire_with_the_rows_of_the_classes_it_was_trained_on(wire_dtype):
    update, state = make_update(), make_state()
    reply = wire.update_reply(update, like=state, mean_loss=0.25, scaling=SCALING, wire_dtype=wire_dtype)
    assert tensors_of(reply)["head/weight"].shape == (3, 6)
    got, mean_loss = wire.read_update(message(reply), like=state)
    close = {"rtol": 0, "atol": 0} if wire_dtype == "fp32" else {"rtol": 0, "atol": 5e-3}
    torch.testing.assert_close(got.adapters[LAYER].lora_A, update.adapters[LAYER].lora_A, **close)
    torch.testing.assert_close(got.adapters[LAYER].lora_B, update.adapters[LAYER].lora_B, **close)
    trained = [0, 2, 3]
    for name in update.head:
        torch.testing.assert_close(got.head[name][trained], update.head[name][trained], **close)
        assert torch.equal(got.head[name][1], state.head[name][1])
    assert torch.equal(got.class_counts, update.class_counts) and got.class_counts.dtype == torch.int64
    assert (got.partition_id, got.num_examples, got.base_version, mean_loss) == (3, 7, 5, 0.25)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e30])
def test_half_precision_keeps_eleven_bits_of_a_change_of_any_size(scale):
    state, change = make_state(), scale * torch.randn(RANK, D_IN)
    pair = state.adapters[LAYER]
    state = GlobalState({LAYER: LoraFactors(torch.zeros(RANK, D_IN), pair.lora_B, SCALING)}, head=state.head)
    moved = {LAYER: LoraFactors(change, pair.lora_B, SCALING)}
    update = ClientUpdate(3, 7, moved, dict(state.head), torch.tensor([7, 0, 0, 0]), base_version=0)
    reply = wire.update_reply(update, like=state, mean_loss=0.0, scaling=SCALING, wire_dtype="fp16")
    got, _ = wire.read_update(message(reply), like=state)
    error = (got.adapters[LAYER].lora_A - change).double().norm() / change.double().norm()
    assert error < 2**-11
    assert torch.equal(got.adapters[LAYER].lora_B, pair.lora_B)  # what did not move stays as it was, bit for bit


@pytest.mark.parametrize("wire_dtype", ["fp32", "fp16"])
def test_factor_that_is_not_trained_stays_at_home_and_is_the_servers_own(wire_dtype):
    state, only_B = make_state(), frozenset({"lora_B"})
    settings = {"like": state, "mean_loss": 0.0, "scaling": SCALING, "wire_dtype": wire_dtype}
    reply = wire.update_reply(make_update(), trainable=only_B, **settings)
    assert f"lora_B/{LAYER}" in tensors_of(reply) and f"lora_A/{LAYER}" not in tensors_of(reply)
    got, _ = wire.read_update(message(reply), like=state, trainable=only_B)
    assert torch.equal(got.adapters[LAYER].lora_A, state.adapters[LAYER].lora_A)
    with pytest.raises(BadUpdate, match=r"missing \['lora_A/blocks.0.attn.qkv'\]"):
        wire.read_update(message(wire.update_reply(make_update(), trainable=only_B, **settings)), like=state)


def test_half_precision_halves_the_message():
    pairs = {LAYER: LoraFactors(torch.randn(64, 192), torch.randn(576, 64), SCALING)}
    state = GlobalState(pairs, head=make_head())
    update = ClientUpdate(3, 7, pairs, make_head(), torch.tensor([7, 0, 0, 0]), base_version=0)
    full, half = (
        wire.message_bytes(
            [message(wire.update_reply(update, like=state, mean_loss=0.0, scaling=1.0, wire_dtype=dtype))]
        )
        for dtype in ("fp32", "fp16")
    )
    assert half < 0.55 * full


def test_hello_comes_off_the_wire_as_it_went_on():
    hello = wire.Hello(2, 5, "abc123", torch.tensor([1, 0, 7]), ("d1", "d2"))
    got = wire.read_hello(message(wire.hello_reply(hello)))
    assert torch.equal(got.class_counts, hello.class_counts)
    assert (got.partition_id, got.num_partitions, got.partition_hash) == (2, 5, "abc123")
    assert got.held == ("d1", "d2")


def own_hello(name: str = "ant", *, task: str = "", number: int = 1, remark: str = "odd") -> Message:
    own = tuple(HeldClass(task, name if number == 1 else f"{name} {k}", 3, 1) for k in range(number))
    return message(wire.hello_reply(wire.Hello(0, 1, "", torch.zeros(0, dtype=torch.int64), (), own, (remark,))))


@pytest.mark.parametrize(
    ("spoiled", "reason"),
    [
        ({"name": "a" * 10_000_000}, "a name has 10000000 characters, at most 200 are taken: 'aaaa"),
        ({"name": "ant\x1b[31m"}, r"the name 'ant\\x1b\[31m' has characters that cannot be printed"),
        ({"task": "task\n1"}, r"the name 'task\\n1' has characters"),
        ({"name": "  "}, "a class has no name"),
        ({"number": 10_001}, "a list of 10001 is too long, at most 10000 are taken"),
    ],
    ids=["long", "escape code", "line break", "blank", "many"],
)
def test_names_that_no_page_or_log_could_bear_are_refused(spoiled, reason):
    with pytest.raises(WireError, match=reason) as refusal:
        wire.read_hello(own_hello(**spoiled))
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        (wire.Hello(0, 1, "f" * 10_000_000, torch.zeros(1, dtype=torch.int64)), "a name has 10000000 characters"),
        (wire.Hello(0, 1, "\x1b[31m", torch.zeros(1, dtype=torch.int64)), "cannot be printed"),
        (wire.Hello(0, 1, "f", torch.zeros(1, dtype=torch.int64), ("ab",) * 10_001), "a list of 10001 is too long"),
    ],
    ids=["long hash", "escape code", "many bases"],
)
def test_a_first_reply_without_end_is_refused_in_a_line(hello, reason):
    with pytest.raises(WireError, match=reason) as refusal:
        wire.read_hello(message(wire.hello_reply(hello)))
    assert len(str(refusal.value)) < 300


def test_names_of_any_script_are_taken_and_remarks_are_cut_to_a_line():
    got = wire.read_hello(own_hello("méningiome 髄膜腫", remark="two\nlines \x1b[31m" + 1000 * "x"))
    assert got.own[0].name == "méningiome 髄膜腫"
    assert got.remarks[0].startswith("two lines [31mxxx") and len(got.remarks[0]) < 500


def test_sums_come_off_the_wire_in_float64():
    root = make_root()
    got = wire.read_sums(message(wire.sums_reply(root)), like=root.sums())
    assert torch.equal(got.moment, root.moment)
    torch.testing.assert_close(got.gram, root.sums().gram, rtol=1e-12, atol=1e-12)  # BLAS goes by its threads
    assert got.gram.dtype == got.moment.dtype == torch.float64


@pytest.mark.parametrize("part", [ARRAYS, METRICS])
def test_update_that_lacks_a_record_is_refused(part):
    reply = update_message()
    del reply.content[part]
    with pytest.raises(BadUpdate, match=f"reply cannot be read: KeyError .*{part}"):
        wire.read_update(reply, like=make_state())


@pytest.mark.parametrize("key", ["partition-id", "num-examples", "base-version", "scaling", "mean-loss"])
def test_update_that_lacks_a_number_is_refused(key):
    reply = update_message()
    del reply.content[METRICS][key]
    with pytest.raises(BadUpdate, match=f"reply cannot be read: KeyError '{key}'"):
        wire.read_update(reply, like=make_state())


@pytest.mark.parametrize("key", ["counts/class", "counts/examples", f"lora_A/{LAYER}", f"lora_B/{LAYER}"])
def test_update_that_lacks_an_array_is_refused(key):
    reply = update_message()
    with opened(reply.content) as tensors:
        del tensors[key]
    with pytest.raises(BadUpdate, match="reply cannot be read"):
        wire.read_update(reply, like=make_state())


@pytest.mark.parametrize("value", [float("inf"), float("nan"), [1, 2]])
def test_update_whose_number_is_no_number_is_refused(value):
    reply = update_message()
    reply.content[METRICS]["num-examples"] = value
    with pytest.raises(BadUpdate, match="reply cannot be read"):
        wire.read_update(reply, like=make_state())


def test_update_whose_array_is_cut_short_is_refused():
    reply = update_message()
    array = reply.content[ARRAYS][TENSORS]
    array.data = array.data[:-4]
    with pytest.raises(BadUpdate, match="reply cannot be read"):
        wire.read_update(reply, like=make_state())


def test_update_whose_array_has_a_foreign_kind_of_storage_is_refused():
    reply = update_message()
    reply.content[ARRAYS][TENSORS].stype = "pickle"
    with pytest.raises(BadUpdate, match="reply cannot be read"):
        wire.read_update(reply, like=make_state())


def test_empty_reply_is_refused():
    with pytest.raises(BadUpdate, match="reply cannot be read"):
        wire.read_update(message(RecordDict()), like=make_state())


@pytest.mark.parametrize("classes", [[0, 2, 9], [2, 0, 3], [0, 0, 3], [-1, 2, 3]])
def test_update_with_classes_that_cannot_be_is_refused(classes):
    reply = update_message()
    with opened(reply.content) as tensors:
        tensors["counts/class"] = np.array(classes)
    with pytest.raises(BadUpdate, match="classes must rise within 0-3"):
        wire.read_update(reply, like=make_state())


def test_only_the_moment_rows_of_classes_held_travel():
    root = FeatureRoot.of(torch.randn(3, 6), torch.tensor([2, 2, 0]), num_classes=4)
    reply = message(wire.sums_reply(root))
    assert tensors_of(reply.content)["sums/moment"].shape == (2, 7)
    assert torch.equal(wire.read_sums(reply, like=make_sums()).moment, root.moment)


@pytest.mark.parametrize("key", ["sums/root", "sums/moment", "sums/class"])
def test_sums_that_lack_a_part_are_refused(key):
    reply = message(wire.sums_reply(make_root()))
    with opened(reply.content) as tensors:
        del tensors[key]
    with pytest.raises(BadUpdate, match="sums cannot be read"):
        wire.read_sums(reply, like=make_sums())


@pytest.mark.parametrize(("num_examples", "numbers"), [(1, 7), (3, 3 * 7 - 3), (7, 7 * 8 // 2), (9, 7 * 8 // 2)])
def test_sums_over_few_examples_travel_in_fewer_numbers_and_say_the_same_gram(num_examples, numbers):
    features, labels = torch.randn(num_examples, 6), torch.randint(0, 4, (num_examples,))
    reply = message(wire.sums_reply(FeatureRoot.of(features, labels, num_classes=4)))
    wanted = FeatureSums.of(features, labels, num_classes=4)
    assert tensors_of(reply.content)["sums/root"].shape == (numbers,)
    gram = wire.read_sums(reply, like=wanted).gram
    torch.testing.assert_close(gram, wanted.gram, rtol=0, atol=1e-13 * float(wanted.gram.abs().max()))
    torch.testing.assert_close(gram, gram.T, rtol=0, atol=1e-13 * float(gram.abs().max()))


@pytest.mark.parametrize("count", [1.0, 4.0, -2.0, 1e300])
def test_a_root_of_other_examples_than_the_moment_counts_is_refused(count):
    reply = message(wire.sums_reply(FeatureRoot.of(torch.randn(3, 6), torch.tensor([2, 2, 2]), num_classes=4)))
    with opened(reply.content) as tensors:
        tensors["sums/moment"][0, -1] = count
    with pytest.raises(BadUpdate, match=r"sums have a root of \(18,\) numbers, expected"):
        wire.read_sums(reply, like=make_sums())


def test_sums_of_another_shape_are_refused():
    other = FeatureRoot.of(torch.randn(5, 9), torch.randint(0, 4, (5,)), num_classes=4)
    with pytest.raises(BadUpdate, match=r"sums have a moment of shape \(\d, 10\)"):
        wire.read_sums(message(wire.sums_reply(other)), like=make_sums())


@pytest.mark.parametrize("part", ["root", "moment"])
def test_sums_that_are_not_finite_are_refused(part):
    root = make_root()
    (root.moment if part == "moment" else root.root)[root.moment[:, -1] > 0 if part == "moment" else 0, 0] = float(
        "nan"
    )
    with pytest.raises(BadUpdate, match="sums hold a number that is not finite"):
        wire.read_sums(message(wire.sums_reply(root)), like=make_sums())


@pytest.mark.parametrize("name", ["/etc/passwd", "../../" + "a" * 58, "A" * 64, "a" * 63, "a" * 65])
def test_a_base_whose_name_is_no_digest_is_refused_before_any_file_is_looked_for(name):
    content = state_message(make_state(), Patch((ZERO.digest, name)))
    with pytest.raises(WireError, match="a base is named by 64 hexadecimal digits, not"):
        wire.read_state(content)


def drift_reply(num_vectors: int = 3) -> Message:
    root = torch.linalg.qr(torch.randn(num_vectors, 13, dtype=torch.float64), mode="r").R
    return message(wire.sums_reply(make_root(), root))


def test_a_drift_comes_off_the_wire_and_the_sums_beside_it():
    root = torch.linalg.qr(torch.randn(5, 13, dtype=torch.float64), mode="r").R
    reply = message(wire.sums_reply(make_root(), root))
    assert torch.equal(wire.read_drift(reply, num_vectors=5, feature_dim=6), root.triu())
    wire.read_sums(reply, like=make_sums())


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda content: content.pop("drift"), "the drift cannot be read: KeyError"),
        (lambda content: content["drift"].clear(), "the drift cannot be read: ValueError"),
        (lambda content: None, r"sums have a root of \(36,\) numbers, expected 46 in 4 rows"),
    ],
    ids=["no record", "no array", "other views"],
)
def test_a_drift_that_is_not_there_or_over_other_views_is_refused(spoil, reason):
    reply = drift_reply()
    spoil(reply.content)
    with pytest.raises(BadUpdate, match=reason):
        wire.read_drift(reply, num_vectors=4, feature_dim=6)


def test_a_drift_that_is_not_finite_is_refused():
    root = torch.full((3, 13), float("nan"), dtype=torch.float64)
    with pytest.raises(BadUpdate, match="not finite"):
        wire.read_drift(message(wire.sums_reply(make_root(), root)), num_vectors=3, feature_dim=6)


def test_client_refuses_a_server_of_another_library_version():
    content = state_message(make_state())
    content.content[ORDER]["library"] = "9.9"
    ours = re.escape(fedtalora_flwr.build())
    with pytest.raises(WireError, match=rf"the server runs fedtalora 9\.9, this side {ours}; install the same commit"):
        wire.read_state(content)


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


def test_bytes_of_messages_are_those_of_their_objects_and_count_for_each_message():
    arrays, metrics = ArrayRecord([torch.randn(10_000).numpy()]), MetricRecord({"n": 3})
    one, other = (message(RecordDict({"a": arrays, "m": metrics})) for _ in range(2))
    found = wire.message_bytes([one])
    assert 40_000 < found < 42_000
    assert wire.message_bytes([one, other]) == 2 * found


def test_array_that_a_message_holds_twice_travels_once():
    values = torch.randn(10_000).numpy()
    once, twice = (message(RecordDict({"a": ArrayRecord([values] * times)})) for times in (1, 2))
    assert wire.message_bytes([twice]) < 1.01 * wire.message_bytes([once])


def test_message_without_content_has_no_bytes():
    failed = Message(Error(code=0, reason="no content"), reply_to=message(RecordDict({})))
    assert wire.message_bytes([failed]) == 0


def test_counting_leaves_a_message_that_can_be_sent_to_another_process():
    counted = message(RecordDict({"a": ArrayRecord([torch.randn(10).numpy()])}))
    wire.message_bytes([counted])
    assert pickle.loads(pickle.dumps(counted)).content == counted.content


@pytest.mark.parametrize(
    "reason",
    [
        "image 'x.png' is broken",
        "<class 'fedtalora_flwr.client.redact.ClientError'>:<'image 'x.png' is broken'>",
        "<class 'ray.exceptions.RayTaskError(ClientAppException)'>:<'ray::ClientAppActor.run()\n  File \"/home\"\n"
        "\nException ClientAppException occurred. Message: image 'x.png' is broken'>",
    ],
)
def test_text_of_a_clients_error_is_read_without_what_flower_and_ray_put_around_it(reason):
    assert wire.error_text(Error(2, reason)) == "image 'x.png' is broken"


def test_error_without_a_text_is_told_by_its_number():
    assert wire.error_text(Error(8)) == "error 8"


def without_frozen(state: GlobalState, trainable: frozenset[str]) -> Message:
    content = wire.state_message(
        wire.pack_state(state, changing=trainable),
        RoundOrder(1, 0, 0),
        scaling=SCALING,
        version=0,
        num_classes=4,
        frozen=wire.frozen_digest(state.adapters, trainable),
    )
    return message(wire.add_patch(content, AT_ZERO, wire.pack_patch(AT_ZERO)))


def test_frozen_factors_are_left_out_and_taken_from_the_client_s_own_start():
    state, trainable = make_state(), frozenset({"lora_B"})
    sent = without_frozen(state, trainable)
    assert f"lora_A/{LAYER}" not in sent.content.array_records[wire.ARRAYS]
    started = {LAYER: LoraFactors(state.adapters[LAYER].lora_A, torch.zeros(D_OUT, RANK), SCALING)}
    got, _, _ = wire.read_state(sent, initial=lambda: started)
    assert_same_pairs(got.adapters, state.adapters)


def test_a_node_whose_pairs_start_otherwise_refuses_to_train():
    sent = without_frozen(make_state(), frozenset({"lora_B"}))
    with pytest.raises(wire.WireError, match="started from other numbers"):
        wire.read_state(sent, initial=make_pairs)


def test_bundle_gives_each_slots_message_back_under_its_number():
    first, second = state_message(make_state(), classes=[1]), state_message(make_state(), classes=())
    bundled = message(wire.bundle({10: second.content, 2: first.content}))
    parts = wire.unbundle(bundled)
    assert list(parts) == [2, 10]
    for part, wanted in ((parts[2], first), (parts[10], second)):
        assert part.content == wanted.content and part.metadata.message_type == "train"
        wire.read_state(part)
    assert bundled.content.keys() == {
        f"{key}.{i}" for i in (2, 10) for key in ("arrays", "order", "base", "base-arrays")
    }


def test_what_slots_share_comes_last_in_a_bundle_under_its_own_name():
    first, shared = state_message(make_state(), classes=[1]), state_message(make_state(), classes=None)
    parts = wire.unbundle(message(wire.bundle({wire.SHARED: shared.content, 4: first.content})))
    assert list(parts) == [4, wire.SHARED]
    assert parts[4].content == first.content and parts[wire.SHARED].content == shared.content


def test_state_without_any_trained_row_still_says_which_rows_a_head_has():
    got, _, _ = wire.read_state(state_message(make_state(), classes=()))
    assert {name: value.shape for name, value in got.head.items()} == {
        name: value.shape for name, value in make_state().head.items()
    }
    assert not any(value.any() for value in got.head.values())


@pytest.mark.parametrize("name", ["arrays", "arrays.", "arrays.-1", "arrays.1.5x", "arrays.007", "arrays.1000000", "."])
def test_record_of_no_slot_is_refused_by_name(name):
    with pytest.raises(WireError, match="belongs to no slot"):
        wire.unbundle(message(RecordDict({name: wire.pack_state(make_state())})))
