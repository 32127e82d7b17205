"""Every preset parses, and the paper's load whole on stand-ins: local data in the hub's layout, a local checkpoint."""

import json
import math
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import timm
import torch
from local_grid import run_server

from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.config.joined import parts_of
from fedtalora_flwr.config.sources import app_folder, gather, preset_file, presets
from fedtalora_flwr.model import heads, penalties
from fedtalora_flwr.model.backbones.images import ImageBackbone
from fedtalora_flwr.model.lora import AdaptedModel, count_parameters
from fedtalora_flwr.model.session import data_of, model_of, test_examples, training_examples
from fedtalora_flwr.model.train import count_correct, fit

test_examples.__test__ = False  # type: ignore[attr-defined]

APP = app_folder()
FL_TAC = [name for name in presets(APP) if "fl-tac" in name]
PAPER = [name for name in presets(APP) if name.startswith("paper-") and name not in FL_TAC]
MOST_NUMBERS = 360_000  # LoRA numbers that a client transmits a round, by the paper


def configured(name: str, *assignments: str) -> RunConfig:
    return RunConfig.parse(gather(APP, file=preset_file(APP, name), assignments=assignments))


@pytest.mark.parametrize("name", presets(APP))
def test_every_preset_parses_and_says_what_it_is_on_its_first_line(name):
    configured(name)
    assert preset_file(APP, name).read_text().splitlines()[0].startswith("# ")


def test_the_papers_grid_is_whole():
    def skew(name: str) -> tuple[str, float]:
        config = configured(name)
        alpha = config.partition == "quantity"
        return config.dataset, config.classes_per_client if alpha else config.dirichlet_beta

    cifar, tiny, imagenet = "hub:uoft-cs/cifar100", "hub:zh-plus/tiny-imagenet", "hub:ILSVRC/imagenet-1k"
    assert {skew(name) for name in PAPER} == {
        *((cifar, value) for value in (2, 4, 6, 0.05, 0.1, 0.5)),
        *((tiny, value) for value in (4, 8, 12, 0.05, 0.1, 0.5)),
        *((imagenet, value) for value in (60, 0.5)),
    }


@pytest.mark.parametrize("name", PAPER)
def test_paper_presets_follow_the_protocol(name):
    config = configured(name)
    assert (config.num_tasks, config.num_clients, config.local_epochs) == (10, 30, 5)
    assert math.ceil(config.fraction_train * config.num_clients) == 10  # as the server draws them
    assert (config.optimizer, config.momentum, config.lr_schedule) == ("sgd", 0.9, "cosine")
    assert (config.method, config.residual, config.head) == ("fedtalora", "accumulate", "linear")


@pytest.fixture(scope="module")
def vit_base():
    """The paper's ViT-B/16, all shapes and no weights."""

    def build(name: str) -> ImageBackbone:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, num_classes=0)
        return ImageBackbone(model)

    return build


@pytest.mark.parametrize("name", PAPER)
def test_paper_presets_transmit_no_more_lora_numbers_than_the_paper(name, vit_base):
    config = configured(name)
    model = AdaptedModel(
        vit_base(config.backbone.removeprefix("timm:")),
        rank=config.rank,
        alpha=config.alpha,
        blocks=config.lora_blocks,
        targets=config.lora_targets,
    )
    assert count_parameters(model.initial_factors(seed=0)) == 294_912 <= MOST_NUMBERS
    assert "294,912" in preset_file(APP, "paper-cifar100-q6").read_text()


# The whole loading path

SIDE, SMALL_MODEL = 6, "test_vit"


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    yield
    for cached in (data_of, model_of):
        cached.cache_clear()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("timm") / "test_vit.pth"
    torch.save(timm.create_model(SMALL_MODEL, pretrained=False).state_dict(), path)
    return path


def picture(label: int, number: int) -> PIL.Image.Image:
    rng = np.random.default_rng([label, number])
    return PIL.Image.fromarray(rng.integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8))


def write_parquet(path: Path, per_class: int, *, num_classes: int, columns: tuple[str, str], hidden: bool = False):
    """Write a split as the hub has it; a hidden one has -1 for every label, like ImageNet's test."""
    labels = [label for label in range(num_classes) for _ in range(per_class)]
    names = [f"class {label}" for label in range(num_classes)]
    features = {columns[0]: datasets.Image(), columns[1]: datasets.ClassLabel(names=names)}
    rows = {
        columns[0]: [picture(label, number) for number, label in enumerate(labels)],
        columns[1]: [-1] * len(labels) if hidden else labels,
    }
    if columns[1] == "fine_label":
        features["coarse_label"] = datasets.ClassLabel(num_classes=num_classes // 5)
        rows["coarse_label"] = [label // 5 for label in labels]
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path)


def loads_and_trains(config: RunConfig, *, num_classes: int, num_test: int) -> None:
    found = data_of(config)
    assert (found.source.num_classes, len(found.source.test)) == (num_classes, num_test)
    assert found.stream.num_partitions == 30
    model = model_of(config)
    assert len(model.layers) == 6 * 4
    task = found.stream.tasks[0]
    partition_id = max(range(30), key=lambda k: len(found.stream.partitions[0][k]))
    examples = training_examples(config, partition_id=partition_id, task_id=0)
    assert examples.inputs.shape[1:] == (3, SIDE, SIDE)  # stored as they are, enlarged on the device
    model.load(model.initial_factors(seed=config.seed), {})
    result = fit(
        model,
        heads.init_rows(num_classes=num_classes, feature_dim=model.backbone.feature_dim),
        examples,
        classes=task,
        trainable=frozenset({"lora_A", "lora_B"}),
        penalty=penalties.resolve("none", {}),
        old_classes=(),
        config=config,
        task_id=0,
        round_in_task=0,
        seed=[0, 1, partition_id],
    )
    assert 0 < result.mean_loss < 2 * math.log(len(task))
    assert all(pair.delta().any() for pair in result.adapters.values())
    test = test_examples(config, task_id=0)
    (hits,) = count_correct(model, [heads.Classifier(result.head)], test, classes=task, config=config)
    assert 0 <= hits <= len(test) == num_test // 10


@pytest.mark.parametrize("name", ["paper-cifar100-q2", "paper-cifar100-d005"])
def test_cifar_presets_load_and_train_on_a_folder_in_the_hubs_layout(name, checkpoint, tmp_path):
    for split, per_class in (("train", 5), ("test", 1)):
        path = tmp_path / "cifar100" / "cifar100" / f"{split}-00000-of-00001.parquet"
        write_parquet(path, per_class, num_classes=100, columns=("img", "fine_label"))
    config = configured(
        name,
        f"dataset=hub:{tmp_path / 'cifar100'}",
        f"backbone=timm:{SMALL_MODEL}",
        f"backbone-checkpoint={checkpoint}",
    )
    loads_and_trains(config, num_classes=100, num_test=100)


def test_imagenet_presets_test_on_the_validation_split_of_a_folder_in_the_hubs_layout(checkpoint, tmp_path):
    folder = tmp_path / "imagenet-1k" / "data"
    for split, per_class, hidden in (("train", 2, False), ("validation", 1, False), ("test", 2, True)):
        path = folder / f"{split}-00000-of-00001.parquet"
        write_parquet(path, per_class, num_classes=600, columns=("image", "label"), hidden=hidden)
    config = configured(
        "paper-imagenet-q60",
        f"dataset=hub:{folder.parent}",
        f"backbone=timm:{SMALL_MODEL}",
        f"backbone-checkpoint={checkpoint}",
    )
    loads_and_trains(config, num_classes=600, num_test=600)


def test_tiny_imagenet_presets_load_and_train_on_an_image_folder(checkpoint, tmp_path):
    for split, per_class in (("train", 3), ("val", 1)):
        for label in range(200):
            folder = tmp_path / "tiny" / split / f"n{label:08d}" / "images"
            folder.mkdir(parents=True)
            for number in range(per_class):
                picture(label, number).save(folder / f"{number}.png")
    config = configured(
        "paper-tiny-imagenet-q12",
        "dataset=imagefolder",
        f"data-path={tmp_path / 'tiny'}",
        f"backbone=timm:{SMALL_MODEL}",
        f"backbone-checkpoint={checkpoint}",
    )
    loads_and_trains(config, num_classes=200, num_test=200)


# FedRAN: nothing is trained


def test_fedran_preset_trains_nothing_and_learns_from_sums_of_random_features(tmp_path):
    config = configured("fedran")
    assert (config.num_tasks, config.num_clients, config.partition) == (10, 5, "dirichlet")
    assert (config.head, config.ridge_features) == ("ridge", 2048)
    small = {"dataset": "digits", "backbone": "vit_mini", "image-size": 0, "num-tasks": 5, "device": "cpu"}
    small |= {"max-per-class": 10, "ridge-features": 200, "out": str(tmp_path)}
    run_server(config.flat() | small)
    lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [line["mean_loss"] for line in lines] == [None] * 5 and lines[-1]["accuracy_seen"] > 0.6
    assert json.loads((tmp_path / "manifest.json").read_text())["parameters"]["lora"] == 0
    assert sum(line["bytes_up"] for line in lines) < 2 * 8 * 100 * 201  # roots: a row of float64 for each example


# FL-TAC: every task a cluster


@pytest.mark.parametrize("name", FL_TAC)
def test_fl_tac_presets_have_a_cluster_and_a_task_for_each_part_or_domain(name):
    config = configured(name)
    assert (config.method, config.residual, config.rank) == ("fl-tac", "off", 1)
    assert (config.dirichlet_beta, config.num_clients) == (0.5, 5 if name == "fl-tac-dolly" else 10)
    asks = config.dataset == "dolly"  # whose classes are its tasks
    assert (config.head, config.task_order) == (("lm", "seeded") if asks else ("linear", "domain"))
    parts = parts_of(config.dataset)
    assert config.partition == ("dirichlet" if len(parts) == 1 else "dirichlet-sizes")
    assert config.clusters == config.num_tasks == (8 if asks else 10 if len(parts) == 1 else len(parts))


def glue_in_the_hubs_layout(folder: Path, tasks: dict[str, tuple[str, ...]]) -> None:
    for task, columns in tasks.items():
        for split, size in (("train", 80), ("validation", 8), ("test", 4)):
            rows = {column: [f"{task} {column} {n % 2 * 'not '}{n}" for n in range(size)] for column in columns}
            rows["label"] = [-1 if split == "test" else n % 2 for n in range(size)]
            path = folder / "glue" / task / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_dict(rows).to_parquet(path)


@pytest.mark.parametrize("name", ["fl-tac-glue", "paper-fl-tac-glue"])
def test_glue_presets_load_and_train_on_folders_in_the_hubs_layout(name, small_bert, tmp_path):
    pair = ("sentence1", "sentence2")
    columns = {"sst2": ("sentence",), "mrpc": pair, "rte": pair}
    columns |= {"qqp": ("question1", "question2"), "qnli": ("question", "sentence")}
    glue_in_the_hubs_layout(tmp_path, columns)
    config = configured(name, f"data-root={tmp_path}", f"backbone=hf:{small_bert}")
    source = data_of(config).source
    assert (source.num_classes, source.num_texts, len(source.test)) == (10, (1, 2), 5 * 8)
    assert model_of(config).backbone.feature_dim == 12
    tokens = training_examples(config, partition_id=0, task_id=0).inputs
    assert tokens.dtype == torch.int32 and tokens.shape[1] <= config.max_length


@pytest.mark.parametrize("name", ["fl-tac-cifar", "paper-fl-tac-cifar"])
def test_cifar_presets_of_fl_tac_load_two_tasks_from_folders_in_the_hubs_layout(name, checkpoint, tmp_path):
    for folder, num_classes, column in (("cifar10", 10, "label"), ("cifar100", 100, "fine_label")):
        for split, per_class in (("train", 12), ("test", 1)):
            path = tmp_path / folder / f"{split}-00000-of-00001.parquet"
            write_parquet(path, per_class, num_classes=num_classes, columns=("img", column))
    local = (
        f"data-root={tmp_path}",
        f"backbone=timm:{SMALL_MODEL}",
        f"backbone-checkpoint={checkpoint}",
        "image-size=0",
    )
    config = configured(name, *local)
    found = data_of(config)
    assert sorted(map(len, found.stream.tasks)) == [10, 100] and len(found.source.test) == 110
    assert len(model_of(config).layers) == 2 * 6
    assert training_examples(config, partition_id=0, task_id=0).inputs.shape[1:] == (3, SIDE, SIDE)


def test_an_fl_tac_adapter_of_vit_base_has_as_many_numbers_as_the_paper_counts(vit_base):
    model = AdaptedModel(vit_base("vit_base_patch16_224"), rank=1, alpha=2.0, blocks="all", targets="q,v")
    assert count_parameters(model.initial_factors(seed=0)) == 36_864
