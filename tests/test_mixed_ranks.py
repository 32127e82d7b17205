"""Whole runs in which clients have ranks of their own: what travels, what is refused, and that they can be resumed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from local_grid import defaults, tiny_run
from safetensors.torch import load_file

from client_app.app import app as run_client
from fedtalora_flwr.aggregation import Aggregator, ClientUpdate, GlobalState
from fedtalora_flwr.aggregation.methods.fedtalora import FedTaLoRA
from fedtalora_flwr.aggregation.methods.flexlora import FlexLoRA
from fedtalora_flwr.aggregation.methods.hetlora import HetLoRA
from fedtalora_flwr.config import ConfigError, RunConfig
from fedtalora_flwr.inference.export import export
from fedtalora_flwr.inference.model import open_trained
from fedtalora_flwr.run_folder import checkpoint
from fedtalora_flwr.server.failures import RunFailed
from fedtalora_flwr.wire.records import ARRAYS, array_record, read_arrays

RANKS = "1,3,2"
QUICK: dict[str, Any] = {"lora_targets": "proj", "verify": True, "max_test_per_class": 4, "ranks": RANKS}
LAYER = "blocks.5.attn.proj"


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


class Witness:
    """Notes the rank of every pair that goes down and up in training, by partition."""

    def __init__(self) -> None:
        self.down: dict[int, set[int]] = {}
        self.up: dict[int, set[int]] = {}

    def __call__(self, message: Message, context: Context) -> Message:
        reply = run_client(message, context)
        if message.metadata.message_type == "train":
            partition = int(context.node_config["partition-id"])
            for seen, record in ((self.down, message), (self.up, reply)):
                parts = read_arrays(record.content.array_records[ARRAYS])
                seen.setdefault(partition, set()).add(len(parts["lora_A"][LAYER]) if "lora_A" in parts else 0)
                assert parts["lora_B"][LAYER].shape[1] == (len(parts["lora_A"][LAYER]) if "lora_A" in parts else 3)
        return reply


@pytest.mark.parametrize(
    ("method", "down"),
    [("fedtalora", [3, 3, 3]), ("flora", [1, 3, 2]), ("flexlora", [1, 3, 2]), ("hetlora", [1, 3, 2])],
)
def test_clients_train_the_ranks_that_were_dealt_out_and_are_sent_the_rest_where_they_hold_it(method, down, tmp_path):
    witness = Witness()
    out = tiny_run(tmp_path / "run", witness, method=method, **QUICK)
    assert witness.up == {0: {1}, 1: {3}, 2: {2}}
    assert witness.down == {partition: {rank} for partition, rank in enumerate(down)}
    exact = method in ("fedtalora", "flora")
    assert all(not line["failures"] for line in lines(out))
    assert (max(line["exactness_error"] for line in lines(out)) < 1e-6) == exact
    pair = checkpoint.load(out / "checkpoint").state.adapters[LAYER]
    assert pair.rank == 3 and pair.scaling == pytest.approx(8 / 3)
    assert pair.lora_B.any(0).all() or method == "flora"  # every row has learned


@pytest.mark.parametrize(("method", "ranks"), [(FedTaLoRA, [3, 3, 3]), (FlexLoRA, [1, 3, 2]), (HetLoRA, [1, 3, 2])])
def test_methods_that_truncate_are_given_what_was_trained_and_others_the_whole_pairs(
    method, ranks, tmp_path, monkeypatch
):
    given, aggregate = [], method.aggregate

    def heard(self: Aggregator, state: GlobalState, updates: list[ClientUpdate]) -> GlobalState:
        given.append([update.adapters[LAYER].rank for update in updates])
        return aggregate(self, state, updates)

    monkeypatch.setattr(method, "aggregate", heard)
    tiny_run(tmp_path / "run", method=method.__name__.lower(), rounds_per_task=1, stop_after_task=1, **QUICK)
    assert given == [ranks]


def test_a_frozen_factor_stays_so_for_all_ranks(tmp_path):
    out = tiny_run(tmp_path / "run", method="ffa-lora", **QUICK)
    assert all(not line["failures"] and line["exactness_error"] < 1e-6 for line in lines(out))


def test_one_rank_for_all_is_the_run_of_that_rank_bit_for_bit(tmp_path):
    one = tiny_run(tmp_path / "one", **QUICK | {"ranks": "", "rank": 3})
    same = tiny_run(tmp_path / "same", **QUICK | {"ranks": "3"})
    a, b = (checkpoint.load(out / "checkpoint").state for out in (one, same))
    for name, pair in a.adapters.items():
        assert torch.equal(pair.lora_A, b.adapters[name].lora_A) and torch.equal(pair.lora_B, b.adapters[name].lora_B)
        assert torch.equal(a.residual[name], b.residual[name])


@pytest.mark.parametrize("method", ["fedtalora", "flexlora", "hetlora", "lora-fair"])
def test_resumed_run_of_mixed_ranks_ends_as_the_whole_one_bit_for_bit(method, tmp_path):
    changes = {"method": method, "num_tasks": 3, "rounds_per_task": 1, "keep_checkpoints": 9, **QUICK}
    whole = tiny_run(tmp_path / "whole", **changes)
    stopped = shutil.copytree(whole, tmp_path / "stopped")
    (stopped / "metrics.json").unlink()
    tiny_run(stopped, **changes, resume=True, resume_from=1)
    one, other = (checkpoint.load(folder / "checkpoint").state for folder in (whole, stopped))
    for name, pair in one.adapters.items():
        assert torch.equal(pair.lora_A, other.adapters[name].lora_A)
        assert torch.equal(pair.lora_B, other.adapters[name].lora_B)
    assert lines(whole)[-1]["mean_loss"] == lines(stopped)[-1]["mean_loss"]
    matrices = [json.loads((folder / "metrics.json").read_text())["accuracy_matrix"] for folder in (whole, stopped)]
    assert matrices[0] == matrices[1]


@pytest.mark.parametrize("method", ["fedtalora", "flexlora"])
def test_reply_of_another_rank_than_was_agreed_is_refused_by_name(method, tmp_path):
    def narrow(message: Message, context: Context) -> Message:
        reply = run_client(message, context)
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 1:
            parts = read_arrays(reply.content[ARRAYS])
            flat = {f"{part}/{key}": value for part, named in parts.items() for key, value in named.items()}
            for key, value in flat.items():
                if key.startswith("lora_A/"):
                    flat[key] = value[:2].clone()
                if key.startswith("lora_B/"):
                    flat[key] = value[:, :2].clone()
            reply.content[ARRAYS] = array_record(flat)
        return reply

    out = tiny_run(tmp_path / "run", narrow, method=method, rounds_per_task=1, **QUICK)
    reason = f"refused: {LAYER}: rank 2, 3 was agreed with this client (ranks)"
    assert [line["failures"] for line in lines(out)] == [[{"partition_id": 1, "reason": reason}]] * 2


def test_order_of_another_rank_than_was_agreed_is_refused_by_the_client(tmp_path):
    def widened(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 0:
            wide = read_arrays(message.content[ARRAYS])
            flat = {f"{part}/{key}": value for part, named in wide.items() for key, value in named.items()}
            flat = {k: torch.cat([v, v]) if k.startswith("lora_A/") else v for k, v in flat.items()}
            flat = {k: torch.cat([v, v], 1) if k.startswith("lora_B/") else v for k, v in flat.items()}
            message.content[ARRAYS] = array_record(flat)
        return run_client(message, context)

    out = tiny_run(tmp_path / "run", widened, method="flexlora", rounds_per_task=1, stop_after_task=1, **QUICK)
    (failure,) = lines(out)[0]["failures"]
    assert failure["partition_id"] == 0 and "has shape (2, 192), this node's is (1, 192)" in failure["reason"]


def test_model_of_mixed_ranks_is_opened_and_exported_with_the_largest(tmp_path):
    out = tiny_run(tmp_path / "run", method="flexlora", **QUICK)
    trained = open_trained(out, device="cpu")
    images = torch.randint(0, 256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.isfinite(trained.logits(images)).all()
    adapter = load_file(export(out, to="peft").folder / "adapter_model.safetensors")
    assert {len(value) for key, value in adapter.items() if "lora_A" in key} == {3}


@pytest.mark.parametrize(
    ("ranks", "agreed"), [("", [None, None, None]), ("2", [2, 2, 2]), ("2,4", [2, 4, 2]), (" 2, 4 ,8", [2, 4, 8])]
)
def test_ranks_are_dealt_out_by_partition_in_turn(ranks, agreed):
    config = RunConfig.parse(defaults() | {"ranks": ranks})
    assert [config.rank_of(partition) for partition in range(3)] == agreed
    assert config.largest_rank == max(filter(None, agreed), default=4)


@pytest.mark.parametrize("ranks", ["0", "2,,4", "2,", "four", "-1", "1.5", "2;4"])
def test_ranks_that_cannot_be_are_refused(ranks):
    with pytest.raises(
        ConfigError, match="ranks must be whole numbers from 1 on with commas between them, as in 2,4,8"
    ):
        RunConfig.parse(defaults() | {"ranks": ranks})


@pytest.mark.parametrize("method", ["full", "fed-sb", "lorm", "fl-tac", "local-only"])
def test_ranks_are_refused_where_a_method_has_no_pairs_of_several(method, tmp_path):
    head = {"head": "linear"} if method in ("fl-tac", "local-only") else {}
    with pytest.raises(ConfigError, match=f"method {method} has no pairs of several ranks; leave ranks empty"):
        tiny_run(tmp_path / "run", method=method, **QUICK, **head)


def test_ranks_are_refused_beside_a_penalty_that_remembers_all_rows(tmp_path):
    with pytest.raises(RunFailed, match=f"clients with ranks {RANKS} train some; choose another penalty"):
        tiny_run(tmp_path / "run", penalty="ewc", **QUICK)


def test_half_precision_goes_up_by_the_rows_that_are_trained(tmp_path):
    out = tiny_run(tmp_path / "run", wire_dtype="fp16", **QUICK)
    assert all(not line["failures"] and line["exactness_error"] < 1e-6 for line in lines(out))
