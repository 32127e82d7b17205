"""Full fine-tuning: dense updates on the adapter's rails; and frozen factors, which never travel."""

import json

import pytest
import torch
from flwr.app import Message
from local_grid import TINY, defaults, tiny_run
from tensors import tensors_of
from torch import nn

from client_app.app import app as client_app
from fedtalora_flwr.aggregation import LoraFactors
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.model import session
from fedtalora_flwr.model.lora import DenseLinear
from fedtalora_flwr.run_folder import checkpoint

LAYER = "blocks.5.mlp.fc1"
SETTINGS = {"lora_targets": "mlp", "head": "linear"}


def test_a_dense_pair_is_the_weight_itself_forward_and_backward():
    config = RunConfig.parse(defaults() | TINY | {"lora-targets": "fc1", "method": "full"})
    model = session.build_model(config)
    layer = model.backbone.model.get_submodule(LAYER)
    assert isinstance(layer, DenseLinear)
    start = model.initial_factors(seed=0)
    change = torch.randn(start[LAYER].lora_B.shape) * 0.1
    model.load({LAYER: LoraFactors(start[LAYER].lora_A, change, start[LAYER].scaling)}, {})
    (trained,) = model.train_only(frozenset({"lora_B"}))
    plain = nn.Linear(192, 768)
    plain.load_state_dict({"weight": layer.base_layer.weight + change, "bias": layer.base_layer.bias})
    x = torch.randn(5, 3, 192)
    layer(x).square().sum().backward()
    plain(x).square().sum().backward()
    torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(trained.grad, plain.weight.grad)
    assert start[LAYER].delta().shape == (768, 192)
    torch.testing.assert_close(LoraFactors(start[LAYER].lora_A, change, 1.0).delta(), change)


def messages_of(method: str, out) -> list[Message]:
    """The orders to train of a real run, and the replies to them."""
    messages = []

    def witness(message, context):
        reply = client_app(message, context)
        if message.metadata.message_type == "train":
            messages.extend([message, reply])
        return reply

    tiny_run(out, witness, **SETTINGS, method=method, verify=True)
    return messages


@pytest.mark.parametrize("method", ["full", "ffa-lora"])
def test_a_frozen_factor_travels_in_neither_direction_and_averaging_is_exact(tmp_path, method):
    for message in messages_of(method, tmp_path / "run"):
        keys = tensors_of(message.content).keys()
        assert f"lora_B/{LAYER}" in keys and f"lora_A/{LAYER}" not in keys
    lines = [json.loads(text) for text in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert max(line["exactness_error"] for line in lines) < 1e-6
    pairs = checkpoint.load(tmp_path / "run" / "checkpoint").state.adapters
    assert all(pair.lora_B.norm() > 0 for pair in pairs.values())
    counts = json.loads((tmp_path / "run" / "manifest.json").read_text())["parameters"]
    assert counts["transmitted"] == sum(pair.lora_B.numel() for pair in pairs.values()) + counts["head"]


def test_full_fine_tuning_sends_the_dense_weight_and_a_factor_method_the_pair(tmp_path):
    down = {
        method: checkpoint.load(tiny_run(tmp_path / method, **SETTINGS, method=method) / "checkpoint").bytes_up
        for method in ("full", "ffa-lora")
    }
    assert down["full"] > 12 * 4 * 768 * 192 > down["ffa-lora"]  # 3 clients, 4 rounds, float32
