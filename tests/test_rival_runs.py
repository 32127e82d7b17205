"""Whole runs of rivals: what travels is what each says, to the number; they are exact, and go on to the same bits."""

import json
from collections import defaultdict

import pytest
import torch
from local_grid import TINY, defaults, tiny_run
from tensors import tensors_of
from torch import nn

from client_app.app import app as client_app
from fedtalora_flwr import wire
from fedtalora_flwr.aggregation import Step
from fedtalora_flwr.aggregation.core import outer_keys
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.model import session
from fedtalora_flwr.model.grams import input_grams
from fedtalora_flwr.model.lora import CoreLinear
from fedtalora_flwr.model.train import Examples
from fedtalora_flwr.residual import Patch
from fedtalora_flwr.run_folder import checkpoint
from fedtalora_flwr.wire.records import BASE_ARRAYS

LAYER, D_OUT, D_IN = "blocks.5.mlp.fc1", 768, 192
RANK, NUM_CLIENTS, NUM_ROUNDS = 4, 3, 4
SETTINGS = {"lora_targets": "fc1", "head": "linear", "verify": True, "rank": RANK}
A, B, CORE = RANK * D_IN, RANK * D_OUT, RANK * RANK

# Of the layer, in each round: the numbers that go down and up.
TRAVELS = {
    "fedit": [(A + B, A + B)] * NUM_ROUNDS,
    "rolora": [(A + B, B), (A + B, A)] * (NUM_ROUNDS // 2),
    "fedsvd": [(A + B, B)] * NUM_ROUNDS,
    "fed-sb": [(CORE, CORE)] * NUM_ROUNDS,
    "lorm": [(A + B, B + RANK * (RANK + 1) // 2), (A + B, A + D_IN * (D_IN + 1) // 2)] * (NUM_ROUNDS // 2),
}
EXACT = {"rolora", "fedsvd", "fed-sb"}


class Killed(BaseException):
    """The process ends here."""


def lines_of(run):
    return [json.loads(text) for text in (run / "rounds.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", params=TRAVELS)
def watched(request, tmp_path_factory):
    """A run of a method, with all orders to train and the replies to them, by round."""
    messages = defaultdict(list)

    def witness(message, context):
        reply = client_app(message, context)
        if message.metadata.message_type == "train":
            messages[int(message.metadata.group_id)].append((message.content, reply.content))
        return reply

    folder = tiny_run(tmp_path_factory.mktemp("runs") / "run", witness, **SETTINGS, method=request.param)
    return request.param, folder, messages


def numbers(tensors, parts=("lora_A", "lora_B", "gram")):
    return sum(value.size for key, value in tensors.items() if key.partition("/")[0] in parts)


def test_each_round_sends_the_numbers_that_the_method_says_and_no_others(watched):
    method, folder, messages = watched
    counted = {n: {(numbers(tensors_of(o)), numbers(tensors_of(r))) for o, r in pairs} for n, pairs in messages.items()}
    assert counted == {n: {travels} for n, travels in enumerate(TRAVELS[method], 1)}
    for line, (_, up) in zip(lines_of(folder), TRAVELS[method], strict=True):
        rest = line["bytes_up"] - 4 * NUM_CLIENTS * up  # class rows of 193 numbers, 5 a task; Flower's own
        assert 0 < rest < NUM_CLIENTS * (4 * 5 * 193 + 4000)


def test_runs_are_exact_in_every_round_and_train_what_they_say(watched):
    method, folder, _ = watched
    errors = [line["exactness_error"] for line in lines_of(folder)]
    assert (max(errors) < 1e-6) == (method in EXACT)
    pair = checkpoint.load(folder / "checkpoint").state.adapters[LAYER]
    assert pair.lora_B.norm() > 0
    counts = json.loads((folder / "manifest.json").read_text())
    assert counts["parameters"]["transmitted"] == TRAVELS[method][0][1] + counts["parameters"]["head"]
    assert counts["adapted_modules"] == {LAYER: [D_OUT, D_IN]}
    residual_norms = {line["residual_norm"] for line in lines_of(folder)}
    assert residual_norms == {0.0}


def test_fixed_factors_of_a_core_go_down_once_and_never_up(watched):
    method, _, messages = watched
    fixed = {f"dense/{key}" for key in outer_keys(LAYER)} if method == "fed-sb" else set()
    for server_round, pairs in messages.items():
        for order, reply in pairs:
            assert tensors_of(order, BASE_ARRAYS).keys() == (fixed if server_round == 1 else set())
            assert {key.partition("/")[0] for key in tensors_of(reply)} <= {
                "lora_A",
                "lora_B",
                "gram",
                "head",
                "counts",
            }


def test_a_killed_run_goes_on_to_the_same_bits(watched, tmp_path):
    method, folder, _ = watched

    def dies(message, context):
        if (message.metadata.message_type, message.metadata.group_id) == ("train", "2"):
            raise Killed
        return client_app(message, context)

    with pytest.raises(Killed):
        tiny_run(tmp_path / "run", dies, **SETTINGS, method=method)
    tiny_run(tmp_path / "run", **SETTINGS, method=method, resume=True)
    one, other = (checkpoint.load(run / "checkpoint") for run in (folder, tmp_path / "run"))
    for part in ("adapters", "residual", "head"):
        for key, value in getattr(one.state, part).items():
            again = getattr(other.state, part)[key]
            if part == "adapters":
                assert torch.equal(value.lora_A, again.lora_A) and torch.equal(value.lora_B, again.lora_B)
            else:
                assert torch.equal(value, again)
    assert one.matrix.to_json() == other.matrix.to_json()
    assert [line["bytes_up"] for line in lines_of(folder)] == [line["bytes_up"] for line in lines_of(tmp_path / "run")]


def test_a_core_between_its_factors_computes_as_the_plain_layer_of_that_weight_does():
    config = RunConfig.parse(defaults() | TINY | {"lora-targets": "fc1", "method": "fed-sb"})
    model = session.build_model(config)
    layer = model.backbone.model.get_submodule(LAYER)
    assert isinstance(layer, CoreLinear)
    start = model.initial_factors(seed=0)
    outer_A, outer_B, core = torch.randn(RANK, D_IN), torch.randn(D_OUT, RANK), torch.randn(RANK, RANK) * 0.1
    pair = start[LAYER]
    base = dict(zip(outer_keys(LAYER), (outer_A, outer_B), strict=True))
    model.load({LAYER: type(pair)(pair.lora_A, core, pair.scaling)}, base)
    (trained,) = model.train_only(frozenset({"lora_B"}))
    plain = nn.Linear(D_IN, D_OUT)
    weight = layer.base_layer.weight + pair.scaling * outer_B @ core @ outer_A
    plain.load_state_dict({"weight": weight, "bias": layer.base_layer.bias})
    x = torch.randn(5, 3, D_IN)
    layer(x).square().sum().backward()
    plain(x).square().sum().backward()
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-4)
    assert trained.shape == (RANK, RANK)
    wanted = pair.scaling * outer_B.T @ plain.weight.grad @ outer_A.T
    torch.testing.assert_close(trained.grad, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    model.load(start, {})  # a state without them: W_0
    assert torch.equal(layer(x), nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias))


def test_a_base_that_is_not_of_the_nodes_cores_is_refused():
    fixed = {"outer_A/fc": (2, 5), "outer_B/fc": (7, 2)}
    square = {"lora_A/fc": (2, 2), "lora_B/fc": (2, 2)}
    room = wire.Room(num_classes=2, num_tasks=1, widths=frozenset({6}), factors=square, fixed=fixed)
    good = {key: torch.zeros(shape) for key, shape in fixed.items()}
    room.require_patch(Patch(("0" * 64,), dense=good))
    for other in ({"outer_A/fc": torch.zeros(1, 5)}, {"fc": torch.zeros(2, 2)}, {"outer_A/x": torch.zeros(2, 5)}):
        with pytest.raises(wire.WireError, match="has shape"):
            room.require_patch(Patch(("0" * 64,), dense=good | other))
    step = {"fc": Step(torch.zeros(2, 0), torch.zeros(0, 2))}
    with pytest.raises(wire.WireError, match="a step's left factor of fc"):
        room.require_patch(Patch(("0" * 64, "1" * 64), steps=(step,)))


def test_grams_are_the_mean_over_examples_of_what_a_layer_is_given():
    first = {"lora-blocks": "0", "lora-targets": "fc1"}  # of the last block one token alone is computed
    config = RunConfig.parse(defaults() | TINY | first | {"method": "lorm", "eval-batch-size": 4})
    model = session.build_model(config)
    model.load(model.initial_factors(seed=0), {})
    (layer,) = model.layers
    images = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    examples, inputs = Examples(images, torch.zeros(7, dtype=torch.int64)), []
    grams = {inner: input_grams(model, examples, config=config, inner=inner)[layer] for inner in (False, True)}
    model.layers[layer].register_forward_hook(lambda module, given, output: inputs.append(given[0].detach()))
    model.backbone(images)
    rows = inputs[0].flatten(0, 1).double()  # tokens of all images
    assert len(inputs) == 1 and len(rows) > 7
    torch.testing.assert_close(grams[False].double(), rows.T @ rows / 7, rtol=1e-4, atol=1e-4)
    lora_A = model.factors()[layer].lora_A.double()
    torch.testing.assert_close(grams[True].double(), lora_A @ (rows.T @ rows / 7) @ lora_A.T, rtol=1e-4, atol=1e-4)
