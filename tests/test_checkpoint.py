"""A checkpoint comes back bit for bit, and a kill at any moment leaves a whole one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedtalora_flwr.aggregation import GlobalState, LoraFactors
from fedtalora_flwr.config import whole
from fedtalora_flwr.metrics import TaskMatrix
from fedtalora_flwr.model.heads import FeatureSums
from fedtalora_flwr.run_folder import checkpoint
from fedtalora_flwr.run_folder.checkpoint import Checkpoint, CheckpointError

LAYER = "blocks.0.attn.qkv"


def make_checkpoint(server_round: int = 3, *, residual: bool = True) -> Checkpoint:
    return Checkpoint(
        server_round=server_round,
        state=GlobalState(
            adapters={LAYER: LoraFactors(torch.randn(2, 5), torch.randn(7, 2), 1.5)},
            residual={LAYER: torch.randn(7, 5)} if residual else {},
            head={"weight": torch.randn(4, 6), "bias": torch.randn(4)},
            version=server_round,
        ),
        sums=FeatureSums.of(torch.randn(9, 6), torch.randint(0, 4, (9,)), num_classes=4),
        matrix=TaskMatrix.empty(2).with_row(0, [3], [4]),
        bytes_up=2**40 + 1,
        bytes_down=17,
        wall_seconds=0.1 + 0.2,
        partition_hashes=("ab", "cd"),
    )


def assert_same(got: Checkpoint, wanted: Checkpoint) -> None:
    for name, pair in wanted.state.adapters.items():
        assert torch.equal(got.state.adapters[name].lora_A, pair.lora_A)
        assert torch.equal(got.state.adapters[name].lora_B, pair.lora_B)
        assert got.state.adapters[name].scaling == pair.scaling
    for part in ("residual", "head"):
        ours, theirs = getattr(got.state, part), getattr(wanted.state, part)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert got.state.version == wanted.state.version
    assert torch.equal(got.sums.gram, wanted.sums.gram) and torch.equal(got.sums.moment, wanted.sums.moment)
    assert got.matrix.to_json() == wanted.matrix.to_json()
    for field in ("server_round", "bytes_up", "bytes_down", "wall_seconds", "partition_hashes"):
        assert getattr(got, field) == getattr(wanted, field)


@pytest.mark.parametrize("residual", [True, False])
def test_checkpoint_comes_back_bit_for_bit(tmp_path, residual):
    saved = make_checkpoint(residual=residual)
    checkpoint.save(tmp_path / "checkpoint", saved)
    assert_same(checkpoint.load(tmp_path / "checkpoint"), saved)


def test_a_tensor_that_two_states_share_comes_back_in_both(tmp_path):
    saved = make_checkpoint()
    checkpoint.save(tmp_path, replace(saved, before=saved.state))
    got = checkpoint.load(tmp_path)
    assert_same(got, saved)
    assert got.before is not None
    assert_same(replace(got, state=got.before), saved)


def test_checkpoint_without_adapters_comes_back(tmp_path):
    saved = make_checkpoint()
    saved = replace(saved, state=GlobalState({}, head=saved.state.head))
    checkpoint.save(tmp_path, saved)
    assert_same(checkpoint.load(tmp_path), saved)


def test_only_the_last_checkpoint_is_kept(tmp_path):
    for server_round in (1, 2, 10):
        last = make_checkpoint(server_round)
        checkpoint.save(tmp_path, last)
    kept = ["latest.json", "round-000010.json", "round-000010.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    assert_same(checkpoint.load(tmp_path), last)


def test_as_many_checkpoints_as_asked_for_are_kept_and_can_be_gone_back_to(tmp_path):
    saved = {server_round: make_checkpoint(server_round) for server_round in (1, 2, 3, 4)}
    for each in saved.values():
        checkpoint.save(tmp_path, each, keep=3)
    assert checkpoint.rounds(tmp_path) == [2, 3, 4]
    assert_same(checkpoint.load(tmp_path, 2), saved[2])
    with pytest.raises(CheckpointError, match="keeps no checkpoint of round 1; those kept: 2, 3, 4"):
        checkpoint.load(tmp_path, 1)
    checkpoint.save(tmp_path, saved[3], keep=3)  # a run that went on from round 2: what came after it is of another one
    assert checkpoint.rounds(tmp_path) == [2, 3]


@pytest.mark.parametrize("place", [100, -100])
def test_a_flipped_bit_is_refused_by_the_name_of_the_file(tmp_path, place):
    checkpoint.save(tmp_path, make_checkpoint())
    path = tmp_path / "round-000003.safetensors"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"round-000003\.safetensors is not what was written"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("killed_at", ["save_file", "_flush", "write_text"])
def test_write_that_is_cut_short_leaves_the_checkpoint_before(tmp_path, monkeypatch, killed_at):
    before, after = make_checkpoint(1), make_checkpoint(2)
    checkpoint.save(tmp_path, before)

    def kill(*arguments, **options):
        if killed_at == "save_file":
            Path(arguments[1]).write_bytes(b"half a tensor")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(whole if killed_at == "_flush" else checkpoint, killed_at, kill)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, after)
    assert_same(checkpoint.load(tmp_path), before)
    checkpoint.save(tmp_path, after)
    assert_same(checkpoint.load(tmp_path), after)
    assert not list(tmp_path.glob("*.part"))


def test_folder_without_a_checkpoint_is_an_error_that_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoint.load(tmp_path / "nowhere")


def test_pointer_to_a_file_that_is_gone_is_an_error_that_names_it(tmp_path):
    checkpoint.save(tmp_path, make_checkpoint())
    (tmp_path / "round-000003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"round-000003\.safetensors"):
        checkpoint.load(tmp_path)


def test_file_of_tensors_that_is_cut_short_is_an_error_that_names_it(tmp_path):
    checkpoint.save(tmp_path, make_checkpoint())
    path = tmp_path / "round-000003.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"round-000003\.safetensors"):
        checkpoint.load(tmp_path)


def test_a_changed_number_in_the_pointer_is_refused_by_the_name_of_the_file(tmp_path):
    checkpoint.save(tmp_path, make_checkpoint(3))
    for name in ("latest.json", "round-000003.json"):
        path = tmp_path / name
        text = path.read_text()
        path.write_text(text.replace('"version": 3', '"version": 7'))
        with pytest.raises(CheckpointError, match=f"{name} is not what was written"):
            checkpoint.load(tmp_path, 0 if name == "latest.json" else 3)
        path.write_text(text)
    assert checkpoint.load(tmp_path).state.version == 3


def test_pointer_of_an_earlier_version_that_has_no_checksum_is_read(tmp_path):
    wanted = make_checkpoint()
    checkpoint.save(tmp_path, wanted)
    facts = json.loads((tmp_path / "latest.json").read_text())
    del facts["crc32"]
    (tmp_path / "latest.json").write_text(json.dumps(facts))
    assert_same(checkpoint.load(tmp_path), wanted)


def test_files_of_others_in_the_folder_stay_and_end_no_round(tmp_path):
    others = {"round-000001 (copy).json", "round-final.safetensors", "round-notes.txt"}
    for name in others:
        (tmp_path / name).write_text("mine")
    for server_round in (1, 2):
        checkpoint.save(tmp_path, make_checkpoint(server_round))
    assert checkpoint.rounds(tmp_path) == [2]
    assert all((tmp_path / name).read_text() == "mine" for name in others)
    with pytest.raises(CheckpointError, match="those kept: 2"):
        checkpoint.load(tmp_path, 1)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_pointer_that_cannot_be_read_is_an_error_that_names_it(tmp_path, text):
    checkpoint.save(tmp_path, make_checkpoint())
    (tmp_path / "latest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"latest\.json"):
        checkpoint.load(tmp_path)


def test_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    whole.write_text(path, "before")

    def kill(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(whole, "_flush", kill)
    with pytest.raises(KeyboardInterrupt):
        whole.write_text(path, "after")
    assert path.read_text() == "before"
