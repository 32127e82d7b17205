"""Text encoders of transformers: where LoRA reaches, padding, limits, what is refused, MiniLM's weights."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from encoders import CONFIGS, DEPTH, INNER, MINILM, SIZES, WIDTH, encoder, save_encoder
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from fedtalora_flwr.aggregation import GlobalState, LoraFactors
from fedtalora_flwr.data import Source, Split
from fedtalora_flwr.inference.weight_delta import changes_of
from fedtalora_flwr.model.backbones import BackboneError, resolve
from fedtalora_flwr.model.backbones.architectures import PEFT_NAMES
from fedtalora_flwr.model.lora import AdaptedModel, PlacementError, count_parameters

# Positions that texts can have: RoBERTa counts from behind its padding token, here 0, MPNet always from 2.
POSITIONS = {"bert": 16, "distilbert": 16, "roberta": 15, "electra": 16, "mpnet": 14, "modernbert": 16, "albert": 16}
BLOCKS = {"modernbert": "layers.{}", "distilbert": "transformer.layer.{}"}
BLOCKS |= dict.fromkeys(("t5", "t5-gated", "umt5"), "encoder.block.{}")
BLOCKS |= {"albert": "encoder.albert_layer_groups.0.albert_layers.0"}  # the same for all layers
Q_AND_V = {
    "bert": ("attention.self.query", "attention.self.value"),
    "distilbert": ("attention.q_lin", "attention.v_lin"),
    "mpnet": ("attention.attn.q", "attention.attn.v"),
    "modernbert": ("attn.Wqkv.q", "attn.Wqkv.v"),
    "deberta-v2": ("attention.self.query_proj", "attention.self.value_proj"),
    "albert": ("attention.query", "attention.value"),
}
Q_AND_V |= dict.fromkeys(("t5", "t5-gated", "umt5"), ("layer.0.SelfAttention.q", "layer.0.SelfAttention.v"))
SQUARE, UP, DOWN = (WIDTH, WIDTH), (INNER, WIDTH), (WIDTH, INNER)  # (d_out, d_in)
SHAPES = {
    "modernbert": ((3 * WIDTH, WIDTH), SQUARE, (2 * INNER, WIDTH), DOWN),
    "deberta": ((3 * WIDTH, WIDTH), SQUARE, UP, DOWN),
    "t5": (*[(6, WIDTH)] * 3, (WIDTH, 6), UP, DOWN),  # heads times d_kv is not the width
}
SHAPES |= dict.fromkeys(("t5-gated", "umt5"), (*SHAPES["t5"], UP))  # input and gate
TEXTS = [
    "hi",
    "what is my balance",
    "please book a flight to oslo for two on friday",
    "[PAD] [PAD] [PAD] and then a table",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: save_encoder(tmp_path_factory.mktemp(family), family) for family in CONFIGS}


def encode(backbone, texts):
    split = Split(np.zeros(len(texts), dtype=np.int64), lambda rows: [texts[row] for row in rows])
    return backbone.encode(split, np.arange(len(texts)), source=Source("made", "text", ("a",), split, split))


def some_state(model: AdaptedModel) -> GlobalState:
    generator = torch.Generator().manual_seed(1)
    adapters, residual = {}, {}
    for name, start in model.initial_factors(seed=3).items():
        lora_B = 0.1 * torch.randn(start.lora_B.shape, generator=generator)
        adapters[name] = LoraFactors(start.lora_A, lora_B, start.scaling)
        residual[name] = 0.1 * torch.randn(len(lora_B), start.lora_A.shape[1], generator=generator)
    return GlobalState(adapters, residual)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_gradient_reaches_both_factors_of_every_layer_of_the_family(folders, family):
    backbone = encoder(folders[family])
    model = AdaptedModel(backbone, rank=3, alpha=3.0, blocks="all", targets="attn+mlp")
    state = some_state(model)
    model.load(state.adapters, state.residual)
    trained = model.train_only(frozenset({"lora_A", "lora_B"}))
    features = backbone(encode(backbone, TEXTS))
    assert features.shape == (len(TEXTS), WIDTH) and backbone.feature_dim == WIDTH
    (features @ torch.linspace(-1, 1, WIDTH)).square().sum().backward()
    largest = max(float(parameter.grad.abs().max()) for parameter in trained)
    assert all(parameter.grad.abs().max() > 1e-5 * largest for parameter in trained)
    depth = 1 if family == "albert" else DEPTH
    shapes = [(layer.out_features, layer.in_features) for layer in model.layers.values()]
    assert sorted(shapes) == sorted(SHAPES.get(family, (*[SQUARE] * 4, UP, DOWN)) * depth)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "targets"), [*((family, "attn+mlp") for family in CONFIGS), *((family, "q,v") for family in Q_AND_V)]
)
def test_a_loaded_state_computes_what_the_untouched_encoder_does_with_its_sum_of_weights(folders, family, targets):
    adapted, plain = encoder(folders[family]), encoder(folders[family])
    model = AdaptedModel(adapted, rank=3, alpha=5.0, blocks="last:1", targets=targets)
    state = some_state(model)
    tokens = encode(plain, TEXTS)
    before = plain(tokens)
    for _ in range(2):
        model.load(state.adapters, state.residual)
    for name, change in changes_of(model, state).items():
        weight = plain.model.get_submodule(name).weight
        weight.copy_(weight + change.dense())
    torch.testing.assert_close(adapted(tokens), plain(tokens), rtol=0, atol=2e-5)
    assert (plain(tokens) - before).abs().max() > 1e-3


@pytest.mark.parametrize("family", Q_AND_V)
def test_q_and_v_of_the_first_block_are_the_familys_own_layers_and_a_fused_one_is_split(folders, family):
    model = AdaptedModel(encoder(folders[family]), rank=3, alpha=3.0, blocks="0", targets="q,v")
    block = BLOCKS.get(family, "encoder.layer.{}").format(0)
    assert list(model.layers) == [f"{block}.{name}" for name in Q_AND_V[family]]


def test_albert_has_one_block_whose_adapter_counts_once_and_serves_all_layers(folders):
    backbone = encoder(folders["albert"])
    model = AdaptedModel(backbone, rank=3, alpha=3.0, blocks="all", targets="proj")
    assert backbone.model.config.num_hidden_layers == 2
    assert list(model.layers) == ["encoder.albert_layer_groups.0.albert_layers.0.attention.dense"]
    assert count_parameters(model.factors()) == 3 * (WIDTH + WIDTH)
    calls = []
    next(iter(model.layers.values())).register_forward_hook(lambda *_: calls.append(1))
    backbone(encode(backbone, TEXTS))
    assert len(calls) == 2
    with pytest.raises(PlacementError, match=r"lora-blocks '1': 1 is out of range, blocks are 0-0"):
        AdaptedModel(encoder(folders["albert"]), rank=3, alpha=3.0, blocks="1", targets="proj")


def test_the_fused_layer_of_deberta_v1_is_known_by_pefts_table_and_taken_whole(folders):
    assert PEFT_NAMES["deberta"] == ["in_proj"]
    model = AdaptedModel(encoder(folders["deberta"]), rank=3, alpha=3.0, blocks="last:1", targets="attn")
    layers = ("attention.self.in_proj", "attention.output.dense")
    assert list(model.layers) == [f"encoder.layer.1.{name}" for name in layers]
    with pytest.raises(PlacementError, match=r"'q' matches nothing here; .* fc1, fc2, in_proj, proj$"):
        AdaptedModel(encoder(folders["deberta"]), rank=3, alpha=3.0, blocks="all", targets="q,v")


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


PAIRS = [
    ("hi", "what is my balance"),
    "book a flight to oslo",
    ("a [SEP] of my own", "and one [SEP] here"),  # text that reads like what stands between the two
    ("please book a flight to oslo for two on friday", "no"),  # the longer one is cut first
    ("no", "please book a flight to oslo for two on friday"),
    "hi",
]


@torch.no_grad()
@pytest.mark.parametrize("family", [*CONFIGS, "minilm"])
def test_pairs_and_single_texts_give_what_the_tokenizer_and_the_model_make_of_each(folders, family):
    backbone = resolve("minilm", {"max_length": 10}).eval() if family == "minilm" else encoder(folders[family], 10)
    tokenizer, model = backbone._tokenizer, backbone.model
    tokens = encode(backbone, PAIRS)
    assert tokens.dtype == torch.int32 and tokens.shape == (len(PAIRS), 10)
    found = backbone.pool(tokens, augment="none", generator=None)
    for row, texts in enumerate(PAIRS):
        one = tokenizer(
            *([texts] if isinstance(texts, str) else texts), truncation=True, max_length=10, return_tensors="pt"
        )
        if family in ("distilbert", "mpnet", "modernbert") or "t5" in family:  # these take no types
            one.pop("token_type_ids", None)
        hidden = model(**one).last_hidden_state  # (1, L, d)
        torch.testing.assert_close(found[row], hidden[0].mean(0), rtol=0, atol=2e-5)


@torch.no_grad()
def test_a_model_with_types_is_told_which_text_of_a_pair_a_token_is_of(folders):
    backbone = encoder(folders["bert"])
    tokens = encode(backbone, PAIRS[:1])
    told = backbone(tokens)
    backbone.model.embeddings.token_type_embeddings.weight[1] += torch.linspace(-1, 1, WIDTH)
    assert (backbone(tokens) - told).abs().max() > 1e-2
    torch.testing.assert_close(backbone(encode(backbone, ["hi"])), encoder(folders["bert"])(encode(backbone, ["hi"])))


def test_the_order_for_batches_counts_both_texts_of_a_pair(folders):
    backbone = encoder(folders["bert"])
    tokens = encode(backbone, [("hi", "what is my balance"), "what is my balance", ("hi", "hi"), "hi"])
    assert backbone.batch_order(tokens).tolist() == [3, 2, 1, 0]


@torch.no_grad()
def test_deberta_v1_computes_in_float32_under_autocast_since_its_mask_overflows_bf16(folders):
    backbone = encoder(folders["deberta"])
    tokens = encode(backbone, TEXTS)
    with torch.autocast("cpu", torch.bfloat16):
        found = backbone(tokens)
        with pytest.raises(RuntimeError, match="without overflow"):  # where not: a rule that is no longer needed
            backbone.model(input_ids=tokens.long())
    torch.testing.assert_close(found, backbone(tokens), rtol=0, atol=0)


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


@pytest.mark.parametrize("family", POSITIONS)
def test_max_length_is_limited_by_the_encoders_positions(folders, family):
    longest = POSITIONS[family]
    backbone = encoder(folders[family], max_length=longest)
    tokens = encode(backbone, ["a word " * 40])
    assert tokens.shape == (1, longest) and backbone(tokens).isfinite().all()
    with pytest.raises(BackboneError, match=rf"max-length must be at most {longest} for .*, got {longest + 1}"):
        encoder(folders[family], max_length=longest + 1)


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(CONFIGS.keys() - POSITIONS.keys()))
def test_texts_of_an_encoder_with_relative_positions_may_be_of_any_length(folders, family):
    backbone = encoder(folders[family], max_length=50)
    tokens = encode(backbone, ["a word " * 40])
    assert tokens.shape == (1, 50) and backbone(tokens).isfinite().all()


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
def test_a_language_model_has_no_pooler_and_needs_none(folders, tmp_path, family):
    folder = shutil.copytree(folders[family], tmp_path / family)
    whole = transformers.AutoModelForSeq2SeqLM if "t5" in family else transformers.AutoModelForMaskedLM
    model = whole.from_config(CONFIGS[family])
    unknown = model.base_model.load_state_dict(encoder(folders[family]).model.state_dict(), strict=False)
    assert not unknown.unexpected_keys
    model.save_pretrained(folder)
    tokens = encode(encoder(folder), TEXTS)
    torch.testing.assert_close(encoder(folder)(tokens), encoder(folders[family])(tokens), rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
def test_a_saved_encoder_loads_again_by_the_class_that_it_names(folders, tmp_path, family):
    backbone = encoder(folders[family])
    assert backbone.save(tmp_path, class_names=("a", "b")) is False
    tokens = encode(backbone, TEXTS)
    torch.testing.assert_close(encoder(tmp_path)(tokens), backbone(tokens), rtol=0, atol=0)
    loaded = getattr(transformers, backbone.auto_class).from_pretrained(tmp_path)
    assert type(loaded) is type(backbone.model) and not any("decoder" in name for name in loaded.state_dict())
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(loaded).__name__]


# what is refused


GPT2 = transformers.GPT2Config(n_embd=12, n_layer=1, n_head=3, vocab_size=30522)
REFUSED = {
    "a causal language model": (GPT2, r"gpt2 is a decoder, for the next token; encoders that work: BERT, .* and UMT5$"),
    "an encoder used as decoder": (transformers.BertConfig(**SIZES, is_decoder=True), r"bert is a decoder, for the"),
    "encoder and decoder": (
        transformers.BartConfig(vocab_size=30522, d_model=12),
        r"bart is an encoder that does not come without its decoder; encoders that work: BERT, ",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_decoder_is_refused_by_its_configuration_alone(tmp_path, case):
    config, message = REFUSED[case]
    config.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=rf"text encoder '{re.escape(str(tmp_path))}' cannot be used: {message}"):
        encoder(tmp_path)


def test_an_architecture_that_is_not_known_is_refused_with_those_that_are_and_its_own_layers(tmp_path):
    config = transformers.SqueezeBertConfig(**SIZES | {"hidden_size": 12}, embedding_size=12, q_groups=1)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(MINILM).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=r"the layers of SqueezeBertModel are not known here; .* DeBERTa") as error:
        encoder(tmp_path)
    assert "Its Linear layers: " in str(error.value) and "\\" not in str(error.value)


def test_an_encoder_of_a_t5_that_lacks_weights_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders["t5"], tmp_path / "t5")
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"lacks 1 weights of T5EncoderModel, .*block\.1\.layer\.1\.DenseReluDense"):
        encoder(folder)


def test_no_text_at_all_encodes_to_no_row_for_a_client_that_sits_a_task_out(folders):
    backbone = encoder(next(iter(folders.values())))
    split = Split(np.zeros(2, dtype=np.int64), lambda rows: ["never read"] * len(rows))
    none = np.zeros(0, dtype=np.int64)
    assert backbone.encode(split, none, source=Source("made", "text", ("a",), split, split)).shape == (0, 1)
