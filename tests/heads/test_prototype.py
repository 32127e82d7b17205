"""PILoRA's prototypes: the weights of a class's means, the nearest one, and whole runs with them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from hypothesis import given
from hypothesis import strategies as st
from local_grid import tiny_run
from sklearn.neighbors import NearestCentroid

from client_app.app import app as run_client
from fedtalora_flwr.inference.export import export
from fedtalora_flwr.inference.model import open_trained
from fedtalora_flwr.model import heads
from fedtalora_flwr.model.heads import FeatureSums, logits
from fedtalora_flwr.run_folder import checkpoint

NUM_CLASSES, DIM = 4, 5
HEAD = heads.resolve("prototype", {})
QUICK = {"head": "prototype", "rounds_per_task": 1, "lora_targets": "proj"}


def moment(*means: tuple[int, int, list[float]]) -> torch.Tensor:
    """Sums by class of examples: the class, how many there are, and their mean."""
    sums = torch.zeros(NUM_CLASSES, len(means[0][2]) + 1, dtype=torch.float64)
    for c, n, mean in means:
        sums[c] = n * torch.tensor([*mean, 1.0], dtype=torch.float64)
    return sums


def sums_with(joined: torch.Tensor) -> FeatureSums:
    size = joined.shape[1]
    return FeatureSums(torch.zeros(size, size, dtype=torch.float64), joined)


@given(seed=st.integers(0, 2**31))
def test_one_holder_of_all_gives_scikit_learns_nearest_centroid(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(NUM_CLASSES).repeat(6)
    features = 2 + torch.randn(len(labels), DIM, generator=generator, dtype=torch.float64)
    sums = FeatureSums.of(features, labels, num_classes=NUM_CLASSES)
    rows = HEAD.classifier({}, sums_with(HEAD.joined([sums.moment]))).rows
    wanted = NearestCentroid().fit(features.numpy(), labels.numpy()).predict(features.numpy())
    found = logits(rows, features.float(), torch.arange(NUM_CLASSES)).argmax(1)
    distances = torch.cdist(features, torch.stack([features[labels == c].mean(0) for c in range(NUM_CLASSES)]))
    two = distances.sort(1).values
    clear = two[:, 1] - two[:, 0] > 1e-5  # float32 may take the other side of a tie
    np.testing.assert_array_equal(found[clear].numpy(), wanted[clear.numpy()])


def test_means_weigh_by_how_near_they_are_to_the_others_and_not_by_their_examples():
    points, examples = ([0.0], [1.0], [5.0]), (1, 40, 7)
    away = np.array([6.0, 5.0, 9.0])  # summed distances
    near = (1 / away - 1 / 9) / (1 / 5 - 1 / 9)
    weights = np.exp(near / 0.2) / np.exp(near / 0.2).sum()
    joined = HEAD.joined([moment((2, n, point)) for n, point in zip(examples, points, strict=True)])
    assert float(joined[2, 0] / joined[2, 1]) == pytest.approx(weights @ [0, 1, 5])
    assert joined[2, 1] == sum(examples) and not joined[[0, 1, 3]].any()


@given(points=st.lists(st.floats(-9, 9), min_size=1, max_size=6), n=st.integers(1, 9))
def test_a_prototype_lies_among_its_means_whatever_they_are(points, n):
    joined = HEAD.joined([moment((1, n, [point])) for point in points])
    prototype = float(joined[1, 0] / joined[1, 1])
    assert min(points) - 1e-9 <= prototype <= max(points) + 1e-9


def test_two_holders_count_the_same():
    joined = HEAD.joined([moment((0, 1, [0.0])), moment((0, 99, [4.0]))])
    assert float(joined[0, 0] / joined[0, 1]) == pytest.approx(2.0)


def test_class_without_an_example_has_rows_of_zeros_and_one_class_alone_too():
    two = HEAD.classifier({}, sums_with(moment((0, 2, [1.0, 0.0]), (3, 5, [0.0, 1.0])))).rows
    assert two["weight"][[0, 3]].any(1).all() and not two["weight"][[1, 2]].any() and not two["bias"][[1, 2]].any()
    for alone in (moment((2, 3, [1.0])), moment((0, 1, [1.0]), (2, 3, [1.0]))):
        assert not any(value.any() for value in HEAD.classifier({}, sums_with(alone)).rows.values())


class Witness:
    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, message: Message, context: Context) -> Message:
        self.asked.append(message.metadata.message_type)
        return run_client(message, context)


def read(out: Path, name: str = "metrics.json"):
    return json.loads((out / name).read_text())


@pytest.fixture(scope="module")
def played(tmp_path_factory) -> tuple[Path, Witness]:
    witness = Witness()
    out = tmp_path_factory.mktemp("prototype") / "run"
    return tiny_run(out, witness, num_tasks=3, max_per_class=20, keep_checkpoints=9, **QUICK), witness


def test_clients_send_sums_by_class_and_no_second_moments(played):
    out, witness = played
    assert set(witness.asked) == {"query.hello", "train", "train.means"} or "train.sums" not in witness.asked
    assert "train.sums" not in witness.asked and witness.asked.count("train.means") == 3 * 3
    assert not checkpoint.load(out / "checkpoint").sums.gram.any()
    assert read(out)["faa"] > 0.5


def test_prototypes_of_finished_tasks_stay_to_the_bit(played):
    out, _ = played
    tasks = read(out, "manifest.json")["tasks"]
    first, last = (checkpoint.load(out / "checkpoint", n).sums.moment for n in (1, 3))
    assert torch.equal(first[tasks[0]], last[tasks[0]]) and first[tasks[0]].any(1).all()
    assert not first[tasks[2]].any() and last[tasks[2]].any(1).all()


def test_resumed_run_ends_as_the_whole_one(played, tmp_path):
    out, _ = played
    stopped = shutil.copytree(out, tmp_path / "stopped")
    (stopped / "metrics.json").unlink()
    same = {"num_tasks": 3, "max_per_class": 20, "keep_checkpoints": 9}
    tiny_run(stopped, **same, **QUICK, resume=True, resume_from=1)
    assert read(stopped)["accuracy_matrix"] == read(out)["accuracy_matrix"]
    a, b = (checkpoint.load(folder / "checkpoint").sums.moment for folder in (out, stopped))
    assert torch.equal(a, b)


def test_exported_rows_and_predictions_are_those_of_the_prototypes(played):
    out, _ = played
    trained = open_trained(out, device="cpu")
    sums = checkpoint.load(out / "checkpoint").sums
    prototypes = (sums.moment[:, :-1] / sums.moment[:, -1:]).float()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 8, 8), generator=generator, dtype=torch.uint8)
    with torch.inference_mode():
        features = trained.model.backbone(images)
    nearest = torch.cdist(features, prototypes).argmin(1)
    assert torch.equal(trained.logits(images).argmax(1), nearest)
    assert (export(out, to="merged").folder / "model.safetensors").exists()


def test_prototypes_of_a_frozen_backbone_need_no_training_round(tmp_path):
    out = tiny_run(tmp_path / "run", head="prototype", rounds_per_task=0, lora_blocks="none", max_per_class=20)
    assert read(out)["faa"] > 0.5 and len(read(out)["accuracy_matrix"]) == 2
