"""Vision transformers of timm: where LoRA reaches, checkpoints, sizes."""

import numpy as np
import PIL.Image
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fedtalora_flwr.aggregation import LoraFactors
from fedtalora_flwr.data import Source, Split
from fedtalora_flwr.model.backbones import BackboneError, resolve
from fedtalora_flwr.model.backbones.images import ImageBackbone
from fedtalora_flwr.model.lora import AdaptedModel

SMALL = "test_vit"
VIT = {"img_size": 32, "embed_dim": 12, "depth": 2, "num_heads": 3}
SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 12, "depths": (2, 1), "num_heads": (2, 3)}
BY_14 = {**VIT, "img_size": 28}
HIERA = {"img_size": 64, "embed_dim": 6, "stages": (1, 2, 1), "q_pool": 2, "mask_unit_attn": (True, True, False)}
FLEX = {"embed_dim": 12, "depth": 2, "num_heads": 3, "img_size": 48}
BIASES_APART = [
    ("beit_base_patch16_224", VIT),
    ("swinv2_tiny_window8_256", SWIN),
    ("eva02_tiny_patch14_224", BY_14),
]
# Architecture, sizes, its blocks and how many Linear layers attn+mlp means in each.
FAMILIES = [
    ("vit_tiny_patch16_224", VIT, 2, 4),
    ("deit_tiny_distilled_patch16_224", VIT, 2, 4),
    ("deit3_small_patch16_224", VIT, 2, 4),
    ("vit_small_patch14_dinov2", BY_14, 2, 4),
    ("vit_small_patch14_reg4_dinov2", BY_14, 2, 4),
    ("vit_giant_patch14_dinov2", BY_14, 2, 4),  # SwiGLU whose two inputs are one layer
    ("vit_small_patch16_dinov3", VIT, 2, 4),
    ("vit_small_plus_patch16_dinov3", VIT, 2, 5),  # SwiGLU whose two inputs are two layers
    ("eva02_base_patch14_224", BY_14, 2, 7),  # and q, k, v apart
    *((name, arguments, 3 if arguments is SWIN else 2, 4) for name, arguments in BIASES_APART),
    ("swin_tiny_patch4_window7_224", SWIN, 3, 4),
    ("hiera_tiny_224", HIERA, 4, 4),
    ("naflexvit_base_patch16_gap", FLEX, 2, 4),
    ("vit_base_patch16_siglip_224", VIT, 2, 4),
    ("vit_relpos_small_patch16_224", VIT, 2, 4),
    ("vit_medium_patch16_rope_reg1_gap_256", VIT, 2, 4),
    ("samvit_base_patch16_224", VIT, 2, 4),
    ("cait_xxs24_224", VIT, 2, 4),
    ("xcit_nano_12_p16_224", VIT, 2, 4),
]


@pytest.fixture(autouse=True)
def features_as_timm_gives_them(monkeypatch):
    monkeypatch.setattr(ImageBackbone, "feature_norm", "none")


def build(name: str, **arguments: object) -> ImageBackbone:
    torch.manual_seed(3)
    return ImageBackbone(timm.create_model(name, pretrained=False, num_classes=0, **arguments))


def with_random_B(pair: LoraFactors) -> LoraFactors:
    return LoraFactors(pair.lora_A, torch.randn_like(pair.lora_B), pair.scaling)


def pictures(n: int = 3, side: int = 20) -> torch.Tensor:
    return torch.randint(256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def checkpoint(tmp_path):
    def write(name=SMALL, *, drop="", suffix=".pth", **arguments):
        torch.manual_seed(11)
        model = timm.create_model(name, pretrained=False, **arguments)
        state = {key: value for key, value in model.state_dict().items() if not (drop and key.startswith(drop))}
        path = tmp_path / f"weights{suffix}"
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
        return model.eval(), path

    return write


def load(path, name=SMALL, *, image_size=0) -> ImageBackbone:
    return resolve(f"timm:{name}", {"backbone_checkpoint": str(path), "image_size": image_size})


@pytest.mark.parametrize(("name", "arguments", "num_blocks", "num_layers"), FAMILIES)
def test_loss_reaches_both_factors_on_every_layer_of_every_block(name, arguments, num_blocks, num_layers):
    backbone = build(name, **arguments)
    for parameter in backbone.parameters():  # SwinV2's branches start at nothing, which pretraining changes
        if not parameter.any():
            torch.nn.init.normal_(parameter)
    model = AdaptedModel(backbone, rank=2, alpha=2.0, blocks="all", targets="attn+mlp").train()
    model.load({key: with_random_B(pair) for key, pair in model.initial_factors(seed=0).items()}, {})
    model.train_only(frozenset({"lora_A", "lora_B"}))
    features = backbone(pictures())
    assert features.shape == (3, backbone.feature_dim)
    (features * torch.randn(backbone.feature_dim)).sum().backward()
    assert len(model.layers) == num_blocks * num_layers
    assert [key for key, factor in model.named_factors().items() if not factor.grad.any()] == []


@pytest.mark.parametrize(
    ("name", "arguments", "targets", "parts"),
    [
        ("vit_tiny_patch16_224", VIT, "q,v", {"attn.qkv.q", "attn.qkv.v"}),
        ("swin_tiny_patch4_window7_224", SWIN, "q,k", {"attn.qkv.q", "attn.qkv.k"}),
        ("swinv2_tiny_window8_256", SWIN, "v", {"attn.qkv.v"}),
        ("eva02_base_patch14_224", BY_14, "q,v", {"attn.q_proj", "attn.v_proj"}),
        ("eva02_base_patch14_224", BY_14, "fc1", {"mlp.fc1_g", "mlp.fc1_x"}),
        ("vitamin_small_224", {}, "mlp", {"mlp.w0", "mlp.w1", "mlp.w2"}),
    ],
)
def test_a_role_names_its_layers_in_each_architecture(name, arguments, targets, parts):
    backbone = build(name, **arguments)
    last = backbone.placement.blocks[-1]
    model = AdaptedModel(backbone, rank=2, alpha=2.0, blocks="last:1", targets=targets)
    assert set(model.layers) == {f"{last}.{part}" for part in parts}


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("vit_tiny_patch16_224", VIT), ("swin_tiny_patch4_window7_224", SWIN), ("hiera_tiny_224", HIERA), *BIASES_APART],
)
def test_splitting_the_fused_qkv_leaves_the_features_unchanged(name, arguments):
    backbone = build(name, **arguments).eval()
    before = backbone(pictures())
    model = AdaptedModel(backbone, rank=2, alpha=2.0, blocks="all", targets="q,v").eval()
    model.load(model.initial_factors(seed=0), {})
    torch.testing.assert_close(backbone(pictures()), before, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("name", "arguments"), BIASES_APART)
def test_attention_that_is_made_to_call_its_qkv_layer_gives_timms_own_feature(name, arguments):
    def randomised(model):
        torch.manual_seed(8)
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
        return model.eval()

    backbone, plain = build(name, **arguments), timm.create_model(name, num_classes=0, **arguments)
    randomised(backbone.model), randomised(plain)
    images = torch.rand(3, 3, arguments["img_size"], arguments["img_size"])
    called = []
    backbone.model.get_submodule(f"{backbone.placement.blocks[0]}.attn.qkv").register_forward_hook(
        lambda *_: called.append(True)
    )
    torch.testing.assert_close(backbone.model(images), plain(images), rtol=1e-4, atol=1e-4)
    assert called


class _Shortcut(torch.nn.Module):
    """Attention as some architectures write it: the weight of a layer is used and the layer is not called."""

    def __init__(self, attention):
        super().__init__()
        self.qkv, self.proj = attention.qkv, attention.proj

    def forward(self, x, **_):
        return torch.nn.functional.linear(self.proj(x), self.qkv.weight[: x.shape[-1]])


def test_attention_that_computes_past_a_layer_is_refused_with_what_to_use_instead():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)
    model.blocks[1].attn = _Shortcut(model.blocks[1].attn)
    with pytest.raises(
        BackboneError, match=r"computes past its layer blocks\.1\.attn\.qkv, .* use a ViT, DeiT, DINOv2"
    ):
        ImageBackbone(model)


def test_a_later_block_of_another_kind_is_refused_by_the_layer_that_it_lacks():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)
    model.blocks[1].mlp.fc2 = torch.nn.Identity()
    with pytest.raises(
        BackboneError, match=r"blocks of different kinds: it has no layer blocks\.1\.mlp\.fc2; use a ViT"
    ):
        ImageBackbone(model)


@torch.no_grad()
@pytest.mark.parametrize(("name", "arguments"), [("vit_tiny_patch16_224", VIT), ("swin_tiny_patch4_window7_224", SWIN)])
def test_attention_in_steps_gives_the_same_features_without_the_fused_kernel(monkeypatch, name, arguments):
    backbone = build(name, **arguments).eval()
    before = backbone(pictures())
    backbone.unfuse_attention()
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_, **__: pytest.fail("the fused kernel was called"))
    torch.testing.assert_close(backbone(pictures()), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("test_resnet", {}, "ResNet has no transformer blocks"),
        ("mixer_s16_224", {}, "blocks.0 of MlpMixer has no layer known"),
        ("crossvit_tiny_240", {}, "blocks.0 of CrossVit has no layer known"),
        ("twins_pcpvt_small", {}, "blocks.0 of Twins has no layer known"),
        ("vit_tiny_patch16_224", VIT | {"in_chans": 1}, "cannot encode RGB images of 32 x 32 pixels"),
        ("vit_tiny_patch16_224", VIT | {"global_pool": ""}, r"gives \(1, 5, 12\) for an image instead of a vector"),
    ],
)
def test_what_cannot_be_adapted_or_encode_is_refused_with_the_reason_and_what_to_use_instead(name, arguments, reason):
    with pytest.raises(BackboneError, match=f"{reason}.*; use a ViT, DeiT, DINOv2"):
        build(name, **arguments)


@torch.no_grad()
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("num_classes", [1000, 7, 0])
def test_a_local_checkpoint_gives_its_features_with_or_without_a_classifier(checkpoint, suffix, num_classes):
    model, path = checkpoint(suffix=suffix, num_classes=num_classes)
    backbone = load(path).eval()
    images = (pictures(side=160).float() / 255 - backbone.mean) / backbone.std
    expected = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(backbone(pictures(side=160)), expected)


def test_a_checkpoint_that_lacks_weights_is_an_error_instead_of_random_blocks(checkpoint):
    _, path = checkpoint(drop="blocks.5")
    with pytest.raises(BackboneError, match=r"lacks 12 weights of test_vit, e.g. blocks.5.norm1.weight"):
        load(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_checkpoint_of_another_shape_or_a_broken_file_is_an_error_that_names_it(checkpoint, tmp_path, suffix):
    _, path = checkpoint(suffix=suffix, embed_dim=48)
    with pytest.raises(BackboneError, match=f"test_vit cannot be had from {path}"):
        load(path)
    path.write_bytes(b"no weights")
    with pytest.raises(BackboneError, match=f"test_vit cannot be had from {path}"):
        load(path)


def test_a_missing_checkpoint_and_an_unknown_name_are_errors(tmp_path):
    with pytest.raises(BackboneError, match=r"nothing\.pth: no such file"):
        load(tmp_path / "nothing.pth")
    with pytest.raises(BackboneError, match=r"timm has no model 'vit_base_patch17'; near it: .*vit_base_patch1"):
        load("", name="vit_base_patch17")


# image-size

TABLE = {"embed_dim": 12, "depth": 2, "num_heads": 3}


@torch.no_grad()
def test_half_precision_weights_of_a_larger_table_are_widened_and_resampled(tmp_path, monkeypatch):
    name = "vit_small_patch14_reg4_dinov2"
    small(monkeypatch, name)
    torch.manual_seed(4)
    source = timm.create_model(f"small_{name}", num_classes=0, img_size=98).state_dict()
    half = {key: value.half() for key, value in source.items()}
    save_file(half, tmp_path / "w.safetensors")
    backbone = load(tmp_path / "w.safetensors", f"small_{name}", image_size=42).eval()

    plain = timm.create_model(f"small_{name}", num_classes=0, img_size=42).eval()
    wide = {key: value.float() for key, value in half.items()}
    prefix = 0 if plain.no_embed_class else plain.num_prefix_tokens
    table = timm.layers.resample_abs_pos_embed(wide["pos_embed"], [3, 3], num_prefix_tokens=prefix)
    plain.load_state_dict({**wide, "pos_embed": table})
    assert wide["pos_embed"].shape[1] == prefix + 7 * 7 and backbone.image_size == 42
    assert all(value.dtype == torch.float32 for value in backbone.model.state_dict().values())
    assert torch.equal(backbone.model.pos_embed, plain.pos_embed)
    images = pictures(side=42)
    expected = plain((images.float() / 255 - backbone.mean) / backbone.std)
    torch.testing.assert_close(backbone(images), expected, rtol=0, atol=1e-5)


def small(monkeypatch, name: str, sizes: dict = TABLE) -> None:
    """Register a small model of the architecture with timm, as ``small_<name>``, for the test."""

    def create(**arguments):
        return timm.create_model(name, **{**sizes, **arguments})

    create.__name__ = f"small_{name}"
    create.__module__ = __name__
    monkeypatch.setattr(f"{__name__}.__all__", [], raising=False)
    timm.models.register_model(create)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "sizes", "own", "asked"),
    [
        ("vit_small_patch16_dinov3", TABLE, 64, 96),
        ("eva02_tiny_patch14_224", TABLE, 56, 84),
        ("deit_tiny_distilled_patch16_224", TABLE, 64, 48),
        ("beit_base_patch16_224", TABLE, 64, 96),
        ("swin_tiny_patch4_window7_224", {k: v for k, v in SWIN.items() if k != "img_size"}, 64, 72),
        ("swinv2_tiny_window8_256", {k: v for k, v in SWIN.items() if k != "img_size"}, 64, 100),
        ("naflexvit_base_patch16_gap", TABLE, 64, 96),
    ],
)
def test_a_checkpoint_of_one_size_encodes_images_of_another_and_is_saved_at_that(
    name, sizes, own, asked, tmp_path, monkeypatch
):
    small(monkeypatch, name, sizes)
    torch.manual_seed(6)
    save_file(timm.create_model(f"small_{name}", num_classes=0, img_size=own).state_dict(), tmp_path / "w.safetensors")
    backbone = load(tmp_path / "w.safetensors", f"small_{name}", image_size=asked).eval()
    assert backbone.image_size == asked and backbone.hub_name is None
    features = backbone(pictures(side=asked))
    backbone.save(tmp_path / "saved")
    saved = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    pixels = (pictures(side=asked).float() / 255 - backbone.mean) / backbone.std
    torch.testing.assert_close(saved(pixels), features, rtol=0, atol=1e-5)
    again = load("", f"local-dir:{tmp_path / 'saved'}").eval()
    assert again.image_size == asked and again.hub_name is None
    torch.testing.assert_close(again(pictures(side=asked)), features, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "image_size", "message"),
    [
        ("timm:vit_small_patch14_dinov2", 85, "85 is no multiple of the 14 pixels .* set image-size to 84 or 98"),
        ("timm:vit_small_patch14_dinov2", 5, "5 is no multiple of the 14 pixels .* set image-size to 14$"),
        ("timm:swin_tiny_patch4_window7_224", 90, "90 is no multiple of the 4 pixels .* set image-size to 88 or 92"),
        ("timm:hiera_tiny_224", 100, "100 is no multiple of the 32 pixels .* set image-size to 96 or 128"),
        ("timm:naflexvit_base_patch16_gap", 50, "50 is no multiple of the 16 pixels .* set image-size to 48 or 64"),
        ("timm:resnet18", 96, "96: resnet18 has one size; leave image-size at 0"),
        ("vit_mini", 72, "72: vit_mini was trained at 64 pixels alone; leave image-size at 0"),
        ("minilm", 64, "64: backbone minilm has no images to size; leave image-size at 0"),
        ("hf:some/encoder", 64, "64: backbone hf:some/encoder has no images to size"),
    ],
)
def test_a_size_that_a_backbone_cannot_take_is_refused_before_weights_are_sought(name, image_size, message):
    settings = {"backbone_checkpoint": "", "image_size": image_size, "max_length": 9}
    with pytest.raises(BackboneError, match=f"image-size {message}"):
        resolve(name, settings)


def test_a_table_that_timm_does_not_resample_is_refused_with_the_way_out(tmp_path, monkeypatch):
    small(monkeypatch, "hiera_tiny_224", {k: v for k, v in HIERA.items() if k != "img_size"})
    save_file(
        timm.create_model("small_hiera_tiny_224", num_classes=0, img_size=64).state_dict(), tmp_path / "w.safetensors"
    )
    with pytest.raises(BackboneError, match=r"size mismatch for pos_embed.*leave image-size at 0"):
        load(tmp_path / "w.safetensors", "small_hiera_tiny_224", image_size=96)


# Where models come from


def test_a_folder_without_a_model_and_a_hub_out_of_reach_are_errors_in_words(tmp_path, monkeypatch):
    with pytest.raises(BackboneError, match=r"that folder has no config\.json; give one that timm's save_for_hf wrote"):
        load("", f"local-dir:{tmp_path}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError, match=r"hf-hub:owner/name cannot be had from the hub: .*set backbone-checkpoint"):
        load("", "hf-hub:owner/name")


def test_a_model_that_only_a_hub_has_is_fetched_and_exported_by_the_name_that_timm_knows(monkeypatch):
    asked = []

    def fetched(name, **arguments):
        asked.append((name, arguments))
        return made("vit_tiny_patch16_224", num_classes=0, **VIT)

    made = timm.create_model
    monkeypatch.setattr(timm, "create_model", fetched)
    assert load("", "hf-hub:owner/name").hub_name == "hf-hub:owner/name"
    assert asked == [("hf-hub:owner/name", {"pretrained": True, "num_classes": 0})]


# Images


def test_images_are_stored_no_larger_than_they_or_the_model_are():
    backbone = build("vit_tiny_patch16_224", **VIT)
    for side, stored in ((9, 9), (40, 32)):
        grey = np.arange(side * side, dtype=np.uint8).reshape(side, side)
        split = Split(np.array([0, 0]), lambda rows, grey=grey: [PIL.Image.fromarray(grey) for _ in rows])
        source = Source("made", "image", ("a",), split, split)
        encoded = backbone.encode(split, np.array([0, 1]), source=source)
        assert encoded.shape == (2, 3, stored, stored) and encoded.dtype == torch.uint8


@torch.no_grad()
def test_augmentation_follows_the_generator_and_none_leaves_the_images():
    backbone = build("vit_tiny_patch16_224", **VIT).eval()

    def features(augment: str, seed: int) -> torch.Tensor:
        return backbone(pictures(8), augment=augment, generator=torch.Generator().manual_seed(seed))

    for augment in ("flip", "crop-flip", "remix"):
        assert torch.equal(features(augment, 4), features(augment, 4))
        assert not torch.equal(features(augment, 4), features(augment, 5))
    assert torch.equal(features("none", 4), features("none", 5))


@pytest.mark.parametrize(
    ("name", "arguments", "spared"),
    [
        ("vit_tiny_patch16_224", VIT, True),
        ("vit_tiny_patch16_224", VIT | {"global_pool": "avg"}, False),
        ("vit_tiny_patch16_224", VIT | {"reg_tokens": 2}, True),
        ("deit_tiny_distilled_patch16_224", VIT, False),  # pools two tokens
        ("swin_tiny_patch4_window7_224", SWIN, False),
    ],
)
def test_feature_and_gradients_are_timms_own_where_the_last_block_spares_tokens(name, arguments, spared):
    backbone = build(name, **arguments).eval()
    torch.manual_seed(3)
    plain = timm.create_model(name, pretrained=False, num_classes=0, **arguments).eval()
    plain.load_state_dict(backbone.model.state_dict())
    tokens = []
    if spared:
        backbone.model.blocks[-1].mlp.register_forward_hook(lambda _, inputs, __: tokens.append(inputs[0].shape[1]))
    images = torch.rand(3, 3, arguments["img_size"], arguments["img_size"])
    found, expected = (
        model.forward_head(model.forward_features(images), pre_logits=True) for model in (backbone.model, plain)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert tokens == ([1] if spared else [])
    found.square().sum().backward(), expected.square().sum().backward()
    for (key, ours), theirs in zip(backbone.model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=key)
