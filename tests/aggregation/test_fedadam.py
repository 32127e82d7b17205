"""A method with a state of its own: Adam on the server, step by step by hand, and through a stopped run."""

import json
import shutil

import pytest
import torch
from local_grid import tiny_run
from made_updates import draw, make_state, make_updates

from fedtalora_flwr.aggregation import resolve
from fedtalora_flwr.run_folder import checkpoint

LAYER = "blocks.0.attn.qkv"


def test_factors_move_by_adam_and_the_residual_is_that_of_the_exact_mean():
    generator, method = draw(0), resolve("fedadam", {"server_learning_rate": 0.5})
    state = make_state(generator)
    first, second = 0.0, 0.0
    for _ in range(3):
        updates = make_updates(state, [0, 1, 4], generator=generator)
        new, mean = method.aggregate(state, updates), resolve("fedtalora").aggregate(state, updates)
        change = mean.adapters[LAYER].lora_A - state.adapters[LAYER].lora_A
        first, second = 0.9 * first + 0.1 * change, 0.99 * second + 0.01 * change**2
        wanted = state.adapters[LAYER].lora_A + 0.5 * first / (second**0.5 + 1e-3)
        torch.testing.assert_close(new.adapters[LAYER].lora_A, wanted)
        assert torch.equal(new.residual[LAYER], mean.residual[LAYER])
        state = new


def test_own_state_of_a_method_is_in_the_checkpoint_and_a_resumed_run_goes_on_with_it(tmp_path):
    changes = {
        "method": "fedadam",
        "rounds_per_task": 1,
        "num_tasks": 3,
        "keep_checkpoints": 9,
        "max_test_per_class": 4,
    }
    whole = tiny_run(tmp_path / "whole", **changes)
    point = checkpoint.load(whole / "checkpoint", 1)
    assert {key.split("/")[0] for key in point.state.extra} == {"m", "v"}
    stopped = shutil.copytree(whole, tmp_path / "stopped")
    (stopped / "metrics.json").unlink()
    tiny_run(stopped, **changes, resume=True, resume_from=1)
    one, other = (checkpoint.load(folder / "checkpoint") for folder in (whole, stopped))
    assert one.state.extra.keys() == other.state.extra.keys() and one.server_round == 3
    assert all(torch.equal(one.state.extra[key], other.state.extra[key]) for key in one.state.extra)
    got, wanted = (json.loads((folder / "metrics.json").read_text()) for folder in (stopped, whole))
    assert got["accuracy_matrix"] == wanted["accuracy_matrix"]


def test_a_rate_of_nothing_is_refused():
    from local_grid import defaults

    from fedtalora_flwr.config import ConfigError, RunConfig

    with pytest.raises(ConfigError, match=r"server-learning-rate must be above 0, got 0\.0"):
        RunConfig.parse(defaults() | {"server-learning-rate": 0})
