"""What is exported gives the run's logits, says what it is, and appears whole or not at all."""

import json
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from encoders import encoder, save_encoder
from local_grid import defaults, run_server, tiny_run
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import register_model

from client_app.app import app as run_client
from fedtalora_flwr import aggregation
from fedtalora_flwr.aggregation import SlotAggregator
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.data.images import CONVERTIBLE
from fedtalora_flwr.inference.export import Exported, ExportError, export
from fedtalora_flwr.inference.model import open_trained
from fedtalora_flwr.inference.predict import items_of, predict
from fedtalora_flwr.inference.weight_delta import Change
from fedtalora_flwr.model import heads
from fedtalora_flwr.model.backbones.images import ImageBackbone
from fedtalora_flwr.model.session import build_model, data_of, model_of
from fedtalora_flwr.run_folder import checkpoint
from fedtalora_flwr.server.failures import RunFailed

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def exported(request, tmp_path_factory):
    """Export a run, named by its fixture, once for all tests that only look at the folder."""

    @cache
    def once(name: str, to: str) -> Exported:
        return export(request.getfixturevalue(name), to=to, target=tmp_path_factory.mktemp("exports") / to)

    return once


def logits_of_run(folder: Path, num_samples: int = 200) -> tuple[list, torch.Tensor]:
    """Give real inputs, and their logits by the parts that the server evaluates with."""
    config = RunConfig.parse(json.loads((folder / "config.json").read_text()))
    data, model, point = data_of(config), model_of(config), checkpoint.load(folder / "checkpoint")
    model.load(point.state.adapters, point.state.residual)
    classifier = heads.resolve(config.head, config.settings).classifier(point.state.head, point.sums)
    seen = sorted(c for task in data.stream.tasks[: config.last_task] for c in task)
    split = data.source.train
    rows = np.arange(num_samples) % len(split)
    inputs = model.backbone.encode(split, rows, source=data.source)
    with torch.inference_mode():
        return list(split.read(rows)), classifier.logits(model.eval().backbone(inputs), torch.tensor(seen))


@pytest.mark.parametrize("to", ["merged", "peft"])
@pytest.mark.parametrize("name", ["digits_run", "text_run", "timm_run"])
def test_an_export_gives_the_logits_of_its_run_on_two_hundred_samples(name, to, exported, request):
    raw, wanted = logits_of_run(request.getfixturevalue(name))
    done = exported(name, to)
    found = runpy.run_path(str(done.folder / "load.py"))["logits"](raw)
    assert done.logit_difference < 1e-5
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert wanted.std() > 1e-3  # a model that says nothing would pass


@pytest.fixture
def few_probes(monkeypatch):
    """Compare fewer random inputs than an export does, for tests that compare inputs of their own."""
    monkeypatch.setattr("fedtalora_flwr.inference.export.NUM_PROBES", 10)


@pytest.mark.parametrize("method", aggregation.available())
def test_the_model_of_every_method_is_exported_as_both_kinds(method, timm_run, few_probes, tmp_path):
    vit = {key: json.loads((timm_run / "config.json").read_text())[key] for key in ("backbone", "backbone-checkpoint")}
    aggregator = aggregation.resolve(method)
    tasks = 0 if isinstance(aggregator, SlotAggregator) else 1  # over slots, all of them at once
    small = {"num_clients": 2, "max_per_class": 4, "stop_after_task": tasks, "rounds_per_task": 2, "head": "linear"}
    run = tiny_run(tmp_path / "run", method=method, lora_targets="v,fc2", **small, **vit)
    clustered = checkpoint.load(run / "checkpoint").clustered
    place = None if clustered is None else next(iter(clustered.states()))
    trained = open_trained(run, device="cpu", place=place)
    data, untouched = data_of(trained.config), build_model(trained.config).eval()
    rows = np.arange(12)
    inputs = trained.model.backbone.encode(data.source.train, rows, source=data.source)
    wanted = trained.logits(inputs)
    with torch.inference_mode():
        still = trained.classifier.logits(untouched.backbone(inputs), torch.tensor(trained.classes))
    assert (still - wanted).abs().max() > 1e-3  # what was trained matters for what is compared
    for to in ("merged", "peft"):
        folder = export(run, to=to, place=place).folder
        found = runpy.run_path(str(folder / "load.py"))["logits"](data.source.train.read(rows))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max())))
    facts, card = json.loads((folder / "fedtalora.json").read_text()), (folder / "README.md").read_text()
    ranks = (64, 192) if aggregator.dense else (4, 4)  # of `full`: d_in
    assert facts["trained_ranks"] == {"blocks.5.attn.qkv": ranks[0], "blocks.5.mlp.fc2": ranks[1]}
    assert f"the first\n{'64 or 192' if aggregator.dense else 4} rows are the run's own" in card


def test_a_swin_with_lora_is_exported_as_both_kinds(few_probes, tmp_path):
    @register_model
    def small_swin(**arguments):
        sizes = {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2), "img_size": 56}
        return timm.create_model("swin_tiny_patch4_window7_224", **sizes, **arguments)

    torch.manual_seed(2)
    save_file(timm.create_model("small_swin", num_classes=0).state_dict(), tmp_path / "weights.safetensors")
    run = tiny_run(
        tmp_path / "run",
        backbone="timm:small_swin",
        backbone_checkpoint=str(tmp_path / "weights.safetensors"),
        lora_blocks="all",
        head="linear",
        stop_after_task=1,
    )
    raw, wanted = logits_of_run(run, 12)
    for to in ("merged", "peft"):
        found = runpy.run_path(str(export(run, to=to).folder / "load.py"))["logits"](raw)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max())))
    assert (
        len(load_file(run / "export" / "peft" / "adapter_model.safetensors")) == 2 * 2 * 4
    )  # blocks, qkv proj fc1 fc2


@pytest.mark.parametrize("family", ["modernbert", "deberta", "deberta-v2", "albert", "t5", "t5-gated"])
def test_a_text_encoder_of_every_architecture_is_exported_as_both_kinds(family, text_run, few_probes, tmp_path):
    untouched = save_encoder(tmp_path / family, family)
    run = tiny_run(
        tmp_path / "run",
        dataset="text",
        data_path=json.loads((text_run / "config.json").read_text())["data-path"],
        backbone=f"hf:{untouched}",
        lora_targets="in_proj,mlp" if family == "deberta" else "q,v,mlp",
        max_length=14,
        learning_rate=0.1,
        head="linear",
        num_clients=2,
        stop_after_task=1,
    )
    trained = open_trained(run, device="cpu")
    texts = ["is the lamp off by now", "door", "please move my oven a little"]
    inputs = trained.encode(texts)
    wanted = trained.logits(inputs)
    with torch.inference_mode():
        assert (encoder(untouched)(inputs) - trained.model.backbone(inputs)).abs().max() > 1e-3
    for to in ("merged", "peft"):
        folder = export(run, to=to).folder
        found = runpy.run_path(str(folder / "load.py"))["logits"](texts)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max())))
        by_another_class = "`AutoModelForTextEncoding`; `AutoModel` would add" in (folder / "README.md").read_text()
        assert by_another_class == ("t5" in family)


@pytest.mark.parametrize(
    ("name", "own", "asked"), [("vit_small_plus_patch16_dinov3", 32, 48), ("eva02_tiny_patch14_224", 28, 42)]
)
def test_a_model_at_another_image_size_is_exported_as_both_kinds(name, own, asked, few_probes, tmp_path):
    @register_model
    def small_resized(**arguments):
        return timm.create_model(name, **{"embed_dim": 12, "depth": 2, "num_heads": 3, **arguments})

    torch.manual_seed(2)
    source = timm.create_model("small_resized", num_classes=0, img_size=own)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    run = tiny_run(
        tmp_path / "run",
        backbone="timm:small_resized",
        backbone_checkpoint=str(tmp_path / "weights.safetensors"),
        image_size=asked,
        lora_blocks="all",
        head="linear",
        stop_after_task=1,
    )
    raw, wanted = logits_of_run(run, 12)
    for to in ("merged", "peft"):
        folder = export(run, to=to).folder
        assert json.loads((folder / "fedtalora.json").read_text())["image_size"] == asked
        found = runpy.run_path(str(folder / "load.py"))["logits"](raw)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max())))


def test_lora_and_residual_matter_for_the_logits_that_are_compared(timm_run, exported, tmp_path):
    raw, wanted = logits_of_run(timm_run, 20)
    shutil.copytree(exported("timm_run", "peft").folder, tmp_path / "model")
    adapter = tmp_path / "model" / "adapter_model.safetensors"
    save_file({name: 0 * value for name, value in load_file(adapter).items()}, adapter)
    found = runpy.run_path(str(tmp_path / "model" / "load.py"))["logits"](raw)
    assert (found - wanted).abs().max() > 1e-3


def test_a_linear_head_is_the_timm_models_own_classifier_with_the_class_names(exported):
    folder = exported("timm_run", "merged").folder
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert model.num_classes == 10
    assert model.pretrained_cfg["label_names"] == [str(digit) for digit in range(10)]
    assert {path.name for path in folder.iterdir()} == {
        *("model.safetensors", "config.json", "fedtalora.json", "load.py", "README.md")
    }


def test_class_names_stand_in_the_configuration_of_transformers(exported):
    config = json.loads((exported("text_run", "merged").folder / "config.json").read_text())
    assert config["id2label"] == {"0": "door", "1": "lamp", "2": "oven", "3": "radio"}


def test_peft_loads_the_adapter_onto_the_public_architecture_with_its_fused_qkv(exported):
    folder = exported("digits_run", "peft").folder
    base = timm.create_model(f"local-dir:{folder / 'base'}", pretrained=True)
    model = PeftModel.from_pretrained(base, folder)
    layer = model.base_model.model.blocks[5].attn.qkv
    lora_B = layer.lora_B["default"].weight
    assert lora_B.shape[0] == 3 * 192 and lora_B[:192].any() and not lora_B[192:384].any()  # q, but not k
    assert layer.scaling["default"] == 8.0 / 4


@pytest.mark.parametrize("name", ["test_vit", "swin_tiny_patch4_window7_224", "deit_tiny_distilled_patch16_224"])
def test_a_saved_image_backbone_holds_the_classifier_where_the_architecture_has_one(name, tmp_path):
    sizes = {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2), "img_size": 56} if "swin" in name else {}
    sizes |= {"embed_dim": 12, "depth": 1, "img_size": 32} if "deit" in name else {}
    backbone = ImageBackbone(timm.create_model(name, num_classes=0, **sizes)).eval()
    backbone.feature_norm = "none"
    rows = {"weight": torch.randn(3, backbone.feature_dim), "bias": torch.randn(3)}
    inside = backbone.save(tmp_path, class_names=("a", "b", "c"), rows=rows)
    assert inside == ("deit" not in name)  # a distilled DeiT has two
    saved = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.rand(2, 3, backbone.image_size, backbone.image_size)
    pixels = (images * 255).byte()
    with torch.no_grad():
        features = backbone(pixels)
        wanted = features @ rows["weight"].T + rows["bias"] if inside else features
        found = saved((pixels.float() / 255 - backbone.mean) / backbone.std)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# what the folder says, and who can read it


def test_the_card_tells_the_residual_the_measured_difference_and_the_head(exported):
    done = exported("digits_run", "peft")
    card = (done.folder / "README.md").read_text()
    assert f"differ from the run's by at most {done.logit_difference:.1e}" in card
    assert "after all 4 rounds" in card and "as extra rank" in card and "`base/`" in card
    assert "30 random features" in card and "do not take a softmax" in card
    assert "Privacy: none." in card and "has spent" not in card
    facts = json.loads((done.folder / "fedtalora.json").read_text())
    assert facts["finished"] and facts["logit_difference"] == done.logit_difference
    config = json.loads((done.folder / "adapter_config.json").read_text())
    assert config["rank_pattern"] == facts["ranks"] and min(facts["extra_ranks"]) > 0
    assert (
        set(facts["trained_ranks"].values()) == {2 * 4} and "the first\n8 rows are the run's own pair" in card
    )  # q, v
    assert str(ROOT) not in card + json.dumps(config)


WITHOUT_FEDTALORA = "import sys; sys.modules['fedtalora_flwr'] = None; sys.modules['peft'] = None\n"


def run_alone(code: str, *arguments: str, folder: Path) -> str:
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_FEDTALORA + code, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def snippet_of_docs(word: str) -> str:
    """Give the Python example of docs/EXPORT.md in which a word stands."""
    section = (ROOT / "docs" / "EXPORT.md").read_text()
    (found,) = (code for code in re.findall(r" *```python\n(.*?)```", section, re.S) if word in code)
    return textwrap.dedent(found)


def in_place_of(name: str, folder: Path, tmp_path: Path) -> Path:
    """Put an export where the documented examples look for one, below the folder that is given back."""
    shutil.copytree(folder, tmp_path / "runs" / name / "export" / "merged")
    return tmp_path


@pytest.fixture(scope="session")
def default_run(tmp_path_factory):
    """The demo's run, but for fewer examples and tasks: its model has every default."""
    out = tmp_path_factory.mktemp("default") / "run"
    run_server(defaults() | {"out": str(out), "max-per-class": 8, "stop-after-task": 1})
    return out


def test_the_documented_load_py_snippet_fits_the_export_of_the_default_model(default_run, exported, tmp_path):
    folder = exported("default_run", "merged").folder
    assert "label_names" not in json.loads((folder / "config.json").read_text())  # its outputs are no classes
    (image, *_), wanted = logits_of_run(default_run, 1)
    image.save(tmp_path / "scan.png")
    printed = run_alone(snippet_of_docs("runpy"), folder=in_place_of("digits", folder, tmp_path))
    assert printed.strip() == json.loads((folder / "fedtalora.json").read_text())["class_names"][int(wanted.argmax())]


def test_the_documented_timm_snippet_classifies_by_a_linear_head(timm_run, exported, tmp_path):
    folder = exported("timm_run", "merged").folder
    code = snippet_of_docs("label_names") + "assert model(images).shape == (1, 10)"
    printed = run_alone(code, folder=in_place_of("digits", folder, tmp_path))
    assert printed.strip() in [str(digit) for digit in range(10)]


def test_the_documented_transformers_snippet_gives_the_runs_own_logits(small_bert, text_run, tmp_path):
    settings = json.loads((text_run / "config.json").read_text())
    same = {"dataset": "text", "data_path": settings["data-path"], "backbone": f"hf:{small_bert}"}
    run = tiny_run(tmp_path / "run", **same, head="ridge", stop_after_task=1, rounds_per_task=1)
    trained = open_trained(run, device="cpu")
    wanted = trained.logits(trained.encode(["what is my balance"]))
    folder = export(run, to="merged").folder
    code = snippet_of_docs("transformers")
    code += 'print(F.linear(features, head["weight"], head["bias"]).tolist())'
    name, found = run_alone(code, folder=in_place_of("clinc150", folder, tmp_path)).splitlines()
    assert name == trained.class_names[int(wanted.argmax())]
    torch.testing.assert_close(torch.tensor(json.loads(found)), wanted, rtol=0, atol=1e-5)


def test_load_py_classifies_texts_without_fedtalora_and_peft(exported):
    code = "import runpy; runpy.run_path('load.py', run_name='__main__')"
    printed = run_alone(code, "is the lamp off by now", folder=exported("text_run", "merged").folder)
    label, text = printed.strip().split("\t")
    assert label in ("door", "lamp", "oven", "radio") and text == "is the lamp off by now"


def test_load_py_refuses_an_image_that_8_bits_cannot_hold(exported):
    logits = runpy.run_path(str(exported("digits_run", "merged").folder / "load.py"))["logits"]
    for mode in ("I;16", "I", "F"):
        with pytest.raises(ValueError, match=f"8-bit RGB cannot hold an image of mode {mode}; scale its values"):
            logits([Image.new("L", (8, 8)), Image.new(mode, (8, 8))])
    for mode in CONVERTIBLE:  # those that fedtalora takes
        assert logits([Image.new(mode, (8, 8))]).isfinite().all()


def test_load_py_sees_a_shape_that_is_in_the_transparency_alone_as_the_run_does(exported, request):
    shape = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    shape.paste((0, 0, 0, 255), (2, 0, 5, 8))
    on_grey = Image.new("RGB", (8, 8), (128, 128, 128))
    on_grey.paste((0, 0, 0), (2, 0, 5, 8))
    logits = runpy.run_path(str(exported("digits_run", "merged").folder / "load.py"))["logits"]
    assert torch.equal(logits([shape]), logits([on_grey]))
    trained = open_trained(request.getfixturevalue("digits_run"), device="cpu")
    found = predict(trained, items_of([shape, on_grey], modality="image"), top=2)
    assert len({prediction.ranking for prediction in found}) == 1


# runs that are not finished


def stopped_run(out: Path, *, after_messages: int, **settings) -> Path:
    count = 0

    def client(message, context):
        nonlocal count
        count += message.metadata.message_type.startswith("train")
        if count > after_messages:
            raise RuntimeError("the power is out")
        return run_client(message, context)

    with pytest.raises(RunFailed):
        tiny_run(out, client, lora_targets="proj", **settings)
    return out


def test_an_unfinished_run_exports_the_classes_it_knows_and_says_how_far_it_came(tmp_path):
    run = stopped_run(tmp_path / "run", after_messages=6, head="linear")
    done = export(run, to="merged")
    assert done.folder == run / "export" / "merged"
    assert done.standing == "unfinished: after round 2 of 4, 5 of 10 classes"
    facts = json.loads((done.folder / "fedtalora.json").read_text())
    first_task = json.loads((run / "manifest.json").read_text())["tasks"][0]
    assert facts["class_names"] == [str(digit) for digit in sorted(first_task)] and not facts["finished"]
    assert done.standing in (done.folder / "README.md").read_text()


def test_a_ridge_run_that_stopped_within_its_first_task_has_nothing_to_export_and_says_so(tmp_path):
    run = stopped_run(tmp_path / "run", after_messages=3, head="ridge")
    with pytest.raises(ValueError, match=r"stopped after round 1, within its first task, .*fedtalora run --resume"):
        export(run, to="merged")


# refusals


def test_an_existing_target_is_refused_and_force_replaces_an_export_only(timm_run, tmp_path):
    target = tmp_path / "model"
    export(timm_run, to="merged", target=target)
    before = (target / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(ExportError, match=r"model is there already; give another --out, or --force"):
        export(timm_run, to="merged", target=target)
    assert (target / "model.safetensors").stat().st_mtime_ns == before
    export(timm_run, to="peft", target=target, force=True)
    assert (target / "adapter_config.json").is_file() and not (target / "model.safetensors").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(ExportError, match=r"mine is no export .* so --force does not replace it"):
        export(timm_run, to="merged", target=tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "mine"}


def test_an_earlier_export_is_put_back_where_the_new_one_cannot_take_its_place(timm_run, tmp_path, monkeypatch):
    target, rename = tmp_path / "model", Path.rename
    export(timm_run, to="merged", target=target)

    def interrupted(self: Path, to: Path) -> Path:
        if self.suffix == ".part" and self.is_dir():
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(timm_run, to="peft", target=target, force=True)
    assert (target / "model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_an_export_that_does_not_give_the_runs_logits_is_not_put_in_place(timm_run, tmp_path, monkeypatch):
    monkeypatch.setattr(Change, "dense", lambda self: self.factors.delta().double().mul(0.5))
    with pytest.raises(ExportError, match=r"logits differ from the run's by up to .*, allowed is .*; nothing was"):
        export(timm_run, to="merged", target=tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_refused_by_name(timm_run, tmp_path):
    with pytest.raises(ExportError, match="an export is one of merged, peft, got 'onnx'"):
        export(timm_run, to="onnx")
    with pytest.raises(FileNotFoundError, match="nothing is no run folder"):
        export(tmp_path / "nothing", to="merged")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text((timm_run / "config.json").read_text())
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        export(tmp_path / "empty", to="merged")
    (tmp_path / "empty" / "manifest.json").write_text((timm_run / "manifest.json").read_text())
    with pytest.raises(ValueError, match="holds no checkpoint"):
        export(tmp_path / "empty", to="merged")


def test_a_run_without_lora_has_no_adapter_but_merges(tmp_path):
    run = tiny_run(tmp_path / "run", lora_blocks="none", num_tasks=5, stop_after_task=1, rounds_per_task=0)
    with pytest.raises(ExportError, match=r"has no LoRA \(lora-blocks = none\); export it --to merged"):
        export(run, to="peft")
    assert export(run, to="merged").logit_difference < 1e-5
