"""Vision transformers of timm: where LoRA reaches, checkpoints, sizes."""

import numpy as np
import PIL.Image
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fedtalora_flwr.backbones import BackboneError, resolve
from fedtalora_flwr.backbones.images import ImageBackbone
from fedtalora_flwr.data import Source, Split
from fedtalora_flwr.lora import AdaptedModel

SMALL = "test_vit"
VIT = {"img_size": 32, "embed_dim": 12, "depth": 2, "num_heads": 3}
SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 12, "depths": (2, 1), "num_heads": (2, 3)}


def build(name: str, **arguments: object) -> ImageBackbone:
    torch.manual_seed(3)
    return ImageBackbone(timm.create_model(name, pretrained=False, num_classes=0, **arguments))


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


def load(path, name=SMALL) -> ImageBackbone:
    return resolve(f"timm:{name}", {"backbone_checkpoint": str(path)})


@pytest.mark.parametrize(
    ("name", "arguments", "targets", "num_layers"),
    [
        ("vit_tiny_patch16_224", VIT, "attn+mlp", 2 * 4),
        ("vit_tiny_patch16_224", VIT, "q,v", 2 * 2),
        ("deit_tiny_distilled_patch16_224", VIT, "attn+mlp", 2 * 4),
        ("swin_tiny_patch4_window7_224", SWIN, "attn+mlp", 3 * 4),
        ("swin_tiny_patch4_window7_224", SWIN, "q,k", 3 * 2),
    ],
)
def test_lora_on_every_chosen_layer_takes_part_in_the_function(name, arguments, targets, num_layers):
    backbone = build(name, **arguments)
    model = AdaptedModel(backbone, rank=2, alpha=2.0, blocks="all", targets=targets)
    model.train_only(frozenset({"lora_A", "lora_B"}))
    features = backbone(pictures())
    assert features.shape == (3, backbone.feature_dim)
    features.square().sum().backward()
    assert len(model.layers) == num_layers
    assert all(layer.lora_B["default"].weight.grad.any() for layer in model.layers.values())


@torch.no_grad()
@pytest.mark.parametrize(("name", "arguments"), [("vit_tiny_patch16_224", VIT), ("swin_tiny_patch4_window7_224", SWIN)])
def test_splitting_the_fused_qkv_leaves_the_features_unchanged(name, arguments):
    backbone = build(name, **arguments).eval()
    before = backbone(pictures())
    model = AdaptedModel(backbone, rank=2, alpha=2.0, blocks="all", targets="q,v").eval()
    model.load(model.initial_factors(seed=0), {})
    torch.testing.assert_close(backbone(pictures()), before, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("name", "arguments"), [("vit_tiny_patch16_224", VIT), ("swin_tiny_patch4_window7_224", SWIN)])
def test_attention_in_steps_gives_the_same_features_without_the_fused_kernel(monkeypatch, name, arguments):
    backbone = build(name, **arguments).eval()
    before = backbone(pictures())
    backbone.unfuse_attention()
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_, **__: pytest.fail("the fused kernel was called"))
    torch.testing.assert_close(backbone(pictures()), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("beit_base_patch16_224", VIT),
        ("swinv2_tiny_window8_256", SWIN),
        ("eva02_tiny_patch14_224", {**VIT, "img_size": 28}),
    ],
)
def test_attention_that_never_calls_its_qkv_layer_is_refused(name, arguments):
    with pytest.raises(BackboneError, match="LoRA could not reach; use a ViT, DeiT or Swin"):
        build(name, **arguments)


def test_a_network_without_transformer_blocks_is_refused():
    with pytest.raises(BackboneError, match="ResNet has no transformer blocks"):
        build("test_resnet")


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

    for augment in ("flip", "crop-flip"):
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
