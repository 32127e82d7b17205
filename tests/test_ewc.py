"""EWC in real runs: what the server gathers at a task's end, sends from then on, and refuses."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from local_grid import TINY, defaults, tiny_run
from tensors import opened

from client_app.app import app as client_app
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.model import session
from fedtalora_flwr.model.heads import logits
from fedtalora_flwr.model.train import sum_fisher
from fedtalora_flwr.run_folder import checkpoint
from fedtalora_flwr.server.failures import RunFailed

SETTINGS = {"task_average": False, "lora_targets": "proj", "head": "linear", "later_learning_rate": 1.0}
BOTH = frozenset({"lora_A", "lora_B"})


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ewc") / "run"
    return tiny_run(out, **SETTINGS, penalty="ewc", penalty_weight=1e6)


def distance_from_anchor(run: Path, anchor) -> float:
    """How far the pairs have moved since the first task ended."""
    adapters = checkpoint.load(run / "checkpoint").state.adapters
    now = {f"{factor}/{name}": getattr(pair, factor) for name, pair in adapters.items() for factor in BOTH}
    return sum(float((now[key] - value).norm()) for key, value in anchor.items())


def test_the_server_remembers_the_first_task_and_pairs_stay_near_it(held, tmp_path):
    memory = checkpoint.load(held / "checkpoint").memory
    assert memory.anchor.keys() == memory.fisher.keys() == {f"{f}/blocks.5.attn.proj" for f in BOTH}
    assert all((value >= 0).all() for value in memory.fisher.values())
    assert float(memory.fisher["lora_B/blocks.5.attn.proj"].sum()) > 0
    free = tiny_run(tmp_path / "free", **SETTINGS)
    assert not checkpoint.load(free / "checkpoint").memory.fisher
    assert distance_from_anchor(held, memory.anchor) < 0.5 * distance_from_anchor(free, memory.anchor)


def test_what_is_remembered_is_counted_on_the_wire(held):
    lines = [json.loads(text) for text in (held / "rounds.jsonl").read_text().splitlines()]
    numbers = 2 * 4 * 192  # of one 192->192 layer's pair of rank 4
    first, _, third, _ = lines  # in the third the anchor is the pair itself, and Flower moves equal arrays once
    assert third["bytes_down"] - first["bytes_down"] > 3 * 4 * numbers


def test_fisher_of_an_example_is_the_squared_gradient_of_a_class_drawn_for_it():
    config = RunConfig.parse(defaults() | TINY | {"lora-targets": "proj"})
    model = session.model_of(config)
    factors = model.initial_factors(seed=0)
    torch.manual_seed(4)
    model.load({name: replace(pair, lora_B=torch.randn_like(pair.lora_B)) for name, pair in factors.items()}, {})
    examples = session.training_examples(config, partition_id=0, task_id=0)
    one = type(examples)(examples.inputs[:1], examples.labels[:1])
    head = {"weight": torch.randn(10, 192), "bias": torch.zeros(10)}
    got = sum_fisher(model, head, one, classes=[2, 7], trainable=BOTH, config=config, seed=[1])
    parameters = model.named_factors()
    log_p = torch.log_softmax(logits(head, model.backbone(one.inputs).float(), torch.tensor([2, 7])), 1)[0]
    wanted = [torch.autograd.grad(value, list(parameters.values()), retain_graph=True) for value in log_p]
    fits = [
        all(torch.allclose(got[key], grad**2, rtol=1e-4) for key, grad in zip(parameters, grads, strict=True))
        for grads in wanted
    ]
    assert any(fits)


def test_squared_gradients_that_cannot_be_are_refused_by_name(tmp_path):
    bad = {0: -1.0, 1: np.nan, 3: 1e12}  # by partition

    def meddling(message, context):
        reply, partition = client_app(message, context), context.node_config["partition-id"]
        if message.metadata.message_type == "train.fisher" and partition in bad:
            key = "fisher/lora_B/blocks.5.attn.proj"
            with opened(reply.content) as tensors:
                tensors[key] = np.full_like(tensors[key], bad[partition])
        return reply

    run = tiny_run(tmp_path / "run", meddling, **SETTINGS, penalty="ewc", num_clients=4, rounds_per_task=1)
    first, last = (json.loads(text)["failures"] for text in (run / "rounds.jsonl").read_text().splitlines())
    reasons = {failure["partition_id"]: failure["reason"] for failure in first}
    assert reasons.keys() == bad.keys() and not last
    assert "negative or not finite" in reasons[0] and "negative or not finite" in reasons[1]
    assert "norm-limit is 1000" in reasons[3]


@pytest.mark.parametrize("method", ["flora", "fedsvd"])
def test_ewc_is_refused_with_a_method_that_makes_the_pair_anew(method, tmp_path):
    with pytest.raises(RunFailed, match=f"penalty ewc remembers the pair, which method {method} makes anew"):
        tiny_run(tmp_path / "run", penalty="ewc", method=method)


def test_ewc_holds_the_factor_whose_turn_it_is_and_remembers_both(tmp_path):
    # A first step moves no pair, for class rows begin at zero: turns need more than one.
    turns = SETTINGS | {"method": "rolora", "rounds_per_task": 1, "local_epochs": 4, "penalty_weight": 1e6}
    point = checkpoint.load(tiny_run(tmp_path / "run", **turns, penalty="ewc") / "checkpoint")  # lora_A's turn was last
    assert {key.partition("/")[0] for key in point.memory.fisher} == {"lora_A", "lora_B"}
    plain = checkpoint.load(tiny_run(tmp_path / "none", **turns) / "checkpoint")
    for name, pair in point.state.adapters.items():
        assert torch.equal(pair.lora_B, plain.state.adapters[name].lora_B)
        assert not torch.equal(pair.lora_A, plain.state.adapters[name].lora_A)


def test_ewc_remembers_only_what_is_trained(tmp_path):
    run = tiny_run(tmp_path / "run", **SETTINGS, penalty="ewc", method="full", rounds_per_task=1)
    assert {key.partition("/")[0] for key in checkpoint.load(run / "checkpoint").memory.fisher} == {"lora_B"}
