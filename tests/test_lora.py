"""Where LoRA goes, and that loading sets ``W = W_0 + R`` and nothing else."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer

from fedtalora_flwr.aggregation import LoraFactors
from fedtalora_flwr.model.backbones import Placement
from fedtalora_flwr.model.backbones.images import ImageBackbone
from fedtalora_flwr.model.lora import (
    AdaptedModel,
    AdaptedProduct,
    PlacementError,
    chosen_blocks,
    chosen_roles,
    count_parameters,
)

DIM, DEPTH, RANK, ALPHA = 12, 3, 2, 5.0
SHAPES = {"attn.qkv": (36, 12), "attn.proj": (12, 12), "mlp.fc1": (48, 12), "mlp.fc2": (12, 48)}
FUSED = Placement(
    ("blocks.0", "blocks.1"),
    {"qkv": ("attn.qkv",), "proj": ("attn.proj",), "fc1": ("mlp.fc1_g", "mlp.fc1_x"), "fc2": ("mlp.fc2",)},
)
APART = Placement(("layer.0",), {role: (role,) for role in ("q", "k", "v", "proj", "fc1", "fc2")})


def small_vit() -> ImageBackbone:
    torch.manual_seed(7)
    return ImageBackbone(
        timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            depth=DEPTH,
            embed_dim=DIM,
            num_heads=3,
            num_classes=0,
        )
    )


def adapted(blocks: str = "all", targets: str = "attn+mlp", rank: int = RANK) -> AdaptedModel:
    return AdaptedModel(small_vit(), rank=rank, alpha=ALPHA, blocks=blocks, targets=targets).eval()


def some_state(model: AdaptedModel, seed: int = 0) -> tuple[dict[str, LoraFactors], dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    adapters, residual = {}, {}
    for name, start in model.initial_factors(seed=seed).items():
        adapters[name] = LoraFactors(start.lora_A, torch.randn_like(start.lora_B), start.scaling)
        residual[name] = torch.randn(len(start.lora_B), start.lora_A.shape[1])
    return adapters, residual


def base_weight(model: AdaptedModel, name: str) -> torch.Tensor:
    return model.layers[name].get_base_layer().weight.detach()


def pictures(n: int = 5) -> torch.Tensor:
    return torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


# lora-blocks


@pytest.mark.parametrize(
    ("setting", "blocks"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6]),
        ("none", []),
        ("0-3", [0, 1, 2, 3]),
        ("4", [4]),
        ("5, 0,2", [0, 2, 5]),
        ("0-1,3 - 4,4", [0, 1, 3, 4]),
        ("first:3", [0, 1, 2]),
        ("last:2", [5, 6]),
        ("last:7", [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_every_form_of_lora_blocks_names_blocks_from_the_input_up(setting, blocks):
    assert chosen_blocks(setting, 7) == blocks


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("5-7", r"5-7 is out of range, blocks are 0-6"),
        ("0,9", r"9 is out of range, blocks are 0-6"),
        ("3-1", r"3-1 is out of range"),
        ("first:8", r"the backbone has 7 blocks"),
        ("last:0", r"the backbone has 7 blocks"),
        ("lower", r"write all, none, 0-3, 0,2,5, first:3 or last:2"),
        ("0,", r"write all, none"),
        ("", r"write all, none"),
        ("-1", r"write all, none"),
    ],
)
def test_lora_blocks_that_are_not_there_are_an_error_that_says_what_is(setting, message):
    with pytest.raises(PlacementError, match=f"lora-blocks '{setting}'.*{message}"):
        chosen_blocks(setting, 7)


# lora-targets


@pytest.mark.parametrize(
    ("setting", "placement", "roles"),
    [
        ("attn", FUSED, ["qkv", "proj"]),
        ("attn", APART, ["q", "k", "v", "proj"]),
        ("mlp", FUSED, ["fc1", "fc2"]),
        ("mlp+attn", APART, ["fc1", "fc2", "q", "k", "v", "proj"]),
        ("q,v", FUSED, ["q", "v"]),
        ("q + v", APART, ["q", "v"]),
        ("qkv", FUSED, ["qkv"]),
        ("attn,proj", FUSED, ["qkv", "proj"]),
        ("fc2,q", FUSED, ["fc2", "q"]),
    ],
)
def test_every_form_of_lora_targets_names_roles_of_the_backbone(setting, placement, roles):
    assert chosen_roles(setting, placement) == roles


@pytest.mark.parametrize(
    ("setting", "placement", "message"),
    [
        ("ffn", FUSED, "'ffn' matches nothing here; this backbone has attn, mlp and fc1, fc2, k, proj, q, qkv, v"),
        ("qkv", APART, "'qkv' matches nothing here; this backbone has attn, mlp and fc1, fc2, k, proj, q, v"),
        ("attn+", APART, "'' matches nothing here"),
        ("mlp", Placement(("b",), {"q": ("query",)}), "'mlp' matches nothing here; this backbone has .*q$"),
        ("attn,q", FUSED, "take the fused qkv or its parts q, k, v, not both"),
    ],
)
def test_lora_targets_that_match_nothing_are_an_error_that_lists_what_there_is(setting, placement, message):
    with pytest.raises(PlacementError, match=message):
        chosen_roles(setting, placement)


# Placement in a model


@pytest.mark.parametrize(("blocks", "numbers"), [("0-1", (0, 1)), ("last:1", (2,)), ("all", (0, 1, 2))])
def test_lora_sits_on_the_chosen_layers_and_no_other(blocks, numbers):
    model = adapted(blocks)
    expected = {f"blocks.{i}.{layer}" for i in numbers for layer in SHAPES}
    assert set(model.layers) == expected
    assert {n for n, m in model.backbone.model.named_modules() if isinstance(m, LoraLayer)} == expected


def test_factors_have_the_shapes_of_their_layers_and_count_as_rank_times_both_sides():
    factors = adapted("1").initial_factors(seed=0)
    for layer, (d_out, d_in) in SHAPES.items():
        pair = factors[f"blocks.1.{layer}"]
        assert pair.lora_A.shape == (RANK, d_in) and pair.lora_B.shape == (d_out, RANK)
        assert pair.scaling == ALPHA / RANK
    assert count_parameters(factors) == RANK * sum(d_out + d_in for d_out, d_in in SHAPES.values())
    assert count_parameters(factors, only=["lora_B"]) == RANK * sum(d_out for d_out, _ in SHAPES.values())


def test_no_blocks_leave_a_frozen_backbone_without_lora():
    model = adapted("none")
    model.load({}, {})
    assert model.layers == {} and model.factors() == {} and model.train_only(frozenset({"lora_A"})) == []
    assert not any(p.requires_grad for p in model.parameters())


def test_a_rank_above_a_layers_limit_names_the_layer_and_the_limits():
    adapted(rank=DIM)
    message = r"rank must be in \[1, 12\] for the 12->36 layer blocks.0.attn.qkv, got 13"
    with pytest.raises(PlacementError, match=message):
        adapted(rank=DIM + 1)


@torch.no_grad()
def test_splitting_the_fused_qkv_leaves_the_function_unchanged():
    before = small_vit().eval()(pictures())
    model = adapted("0,2", "q,v")
    model.load(model.initial_factors(seed=0), {})
    assert set(model.layers) == {f"blocks.{i}.attn.qkv.{part}" for i in (0, 2) for part in "qv"}
    torch.testing.assert_close(model.backbone(pictures()), before, rtol=0, atol=1e-5)


@torch.no_grad()
def test_residuals_of_the_parts_equal_one_residual_of_the_fused_layer():
    parts, fused = adapted("1", "q,v"), adapted("1", "qkv")
    adapters, residual = some_state(parts)
    parts.load(adapters, residual)
    q, v = (residual[f"blocks.1.attn.qkv.{part}"] + adapters[f"blocks.1.attn.qkv.{part}"].delta() for part in "qv")
    fused.load(fused.initial_factors(seed=0), {"blocks.1.attn.qkv": torch.cat([q, torch.zeros(DIM, DIM), v])})
    torch.testing.assert_close(parts.backbone(pictures()), fused.backbone(pictures()), rtol=0, atol=1e-5)


def test_initial_factors_add_nothing_and_are_the_same_for_a_seed():
    model, plain = adapted(), small_vit().eval()
    first, again, other = (adapted().initial_factors(seed=seed) for seed in (5, 5, 6))
    for name, pair in first.items():
        assert torch.equal(pair.lora_A, again[name].lora_A) and not torch.equal(pair.lora_A, other[name].lora_A)
        assert not pair.delta().any()
    model.load(first, {})
    with torch.no_grad():
        torch.testing.assert_close(model.backbone(pictures()), plain(pictures()))


# Loading


@torch.no_grad()
def test_effective_weight_is_frozen_weight_plus_residual_plus_delta():
    model, plain = adapted(), small_vit().model
    adapters, residual = some_state(model)
    model.load(adapters, residual)
    for name, layer in model.layers.items():
        linear = plain.get_submodule(name)
        x = torch.randn(4, linear.in_features)
        dense = F.linear(x, linear.weight + residual[name] + adapters[name].delta(), linear.bias)
        torch.testing.assert_close(layer(x), dense, rtol=0, atol=2e-5)


def test_loading_sets_so_that_twice_equals_once():
    model = adapted()
    pristine = {name: base_weight(model, name).clone() for name in model.layers}
    adapters, residual = some_state(model)
    model.load(*some_state(model, seed=3))
    for _ in range(2):
        model.load(adapters, residual)
        for name in model.layers:
            assert torch.equal(base_weight(model, name), pristine[name] + residual[name])


def test_a_square_layers_residual_is_added_as_it_is_and_not_transposed():
    model, name = adapted("0", "proj"), "blocks.0.attn.proj"
    pristine = base_weight(model, name).clone()
    residual = torch.zeros(DIM, DIM)
    residual[1, 4] = 3.0
    model.load(model.initial_factors(seed=0), {name: residual})
    assert (base_weight(model, name) - pristine).nonzero().tolist() == [[1, 4]]


@pytest.mark.parametrize("layer", [layer for layer, (d_out, d_in) in SHAPES.items() if d_out != d_in])
def test_a_transposed_residual_does_not_load(layer):
    model = adapted("0")
    adapters, residual = some_state(model)
    name = f"blocks.0.{layer}"
    with pytest.raises(RuntimeError):
        model.load(adapters, {**residual, name: residual[name].T})


def test_a_module_without_residual_goes_back_to_its_frozen_weight():
    model = adapted()
    pristine = {name: base_weight(model, name).clone() for name in model.layers}
    model.load(*some_state(model))
    model.load(model.initial_factors(seed=0), {})
    assert all(torch.equal(base_weight(model, name), pristine[name]) for name in model.layers)


def test_training_moves_the_factors_alone_and_the_frozen_weight_stays_pristine():
    model = adapted()
    frozen = copy.deepcopy({k: v for k, v in model.state_dict().items() if "lora_" not in k})
    adapters, residual = some_state(model)
    model.load(adapters, residual)
    optimizer = torch.optim.SGD(model.train_only(frozenset({"lora_A", "lora_B"})), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.backbone(pictures()).square().sum().backward()
        optimizer.step()
    trained = model.factors()
    for name, pair in adapters.items():
        assert not torch.equal(trained[name].lora_A, pair.lora_A)
        assert not torch.equal(trained[name].lora_B, pair.lora_B)
    model.load(model.initial_factors(seed=0), {})
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in frozen.items())


@pytest.mark.parametrize("factors", [{"lora_B"}, {"lora_A"}, {"lora_A", "lora_B"}])
def test_only_the_named_factors_get_gradients(factors):
    model = adapted("0-1")
    model.load(*some_state(model))
    trained = model.train_only(frozenset({"lora_A", "lora_B"}))
    trained = model.train_only(frozenset(factors))  # an earlier choice leaves nothing behind
    model.backbone(pictures()).sum().backward()
    assert len(trained) == 2 * len(SHAPES) * len(factors)
    with_gradient = {id(p) for p in model.parameters() if p.grad is not None}
    assert with_gradient == {id(p) for p in trained}


def test_factors_are_copies_that_later_training_does_not_touch():
    model = adapted("2", "mlp")
    adapters, _ = some_state(model)
    model.load(adapters, {})
    taken = model.factors()
    model.load(model.initial_factors(seed=9), {})
    for name, pair in adapters.items():
        assert torch.equal(taken[name].lora_A, pair.lora_A) and torch.equal(taken[name].lora_B, pair.lora_B)


# The fused layer

IN = 3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, IN), (2, 3, IN)])
def test_fused_product_has_the_gradients_of_its_formula(bias, shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight, offset = torch.randn(4, IN).double(), torch.randn(4).double() if bias else None
    lora_A, lora_B = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, IN), (4, 2)))
    expected = F.linear(x, weight + 1.5 * lora_B @ lora_A, offset)
    torch.testing.assert_close(AdaptedProduct.apply(x, weight, offset, lora_A, lora_B, 1.5), expected)
    assert torch.autograd.gradcheck(
        lambda x, A, B: AdaptedProduct.apply(x, weight, offset, A, B, 1.5), (x, lora_A, lora_B)
    )


def test_fused_layer_computes_what_pefts_own_does():
    layers = list(adapted().layers.values())
    for layer in layers:
        layer.lora_B["default"].weight.data.normal_()
        x = torch.randn(2, 3, layer.in_features, requires_grad=True)
        found, expected = layer(x), PeftLinear.forward(layer, x)
        wanted = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        towards = torch.randn_like(found)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(
            torch.autograd.grad(found, wanted, towards), torch.autograd.grad(expected, wanted, towards), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_product_in_float32_has_the_bits_of_its_plain_steps():
    torch.manual_seed(0)
    x, weight, offset, lora_A, lora_B = (torch.randn(*s) for s in ((5, IN), (4, IN), (4,), (2, IN), (4, 2)))
    towards = torch.randn(5, 4)
    leaves = [leaf.requires_grad_() for leaf in (x, lora_A, lora_B)]
    found = AdaptedProduct.apply(x, weight, offset, lora_A, lora_B, 1.5)
    gradients = torch.autograd.grad(found, leaves, towards)
    with torch.no_grad():
        inner, of_inner = x @ lora_A.T, (towards @ lora_B).mul_(1.5)
        assert torch.equal(found, F.linear(x, weight, offset).addmm_(inner, lora_B.T, alpha=1.5))
        expected = (towards @ weight).addmm_(of_inner, lora_A), of_inner.T @ x, (inner.T @ towards).mul_(1.5).T
    assert all(map(torch.equal, gradients, expected))


# Under autocast


def half() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def test_layer_under_autocast_computes_what_it_does_in_float32_but_for_rounding():
    model = adapted()
    model.load(*some_state(model))
    for layer in model.layers.values():
        x = torch.randn(2, 3, layer.in_features, requires_grad=True)
        leaves = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        expected = layer(x)
        with half():
            found = layer(x)
        assert found.dtype == torch.bfloat16
        towards = torch.randn_like(expected)
        pairs = [(found, expected)]
        pairs += zip(
            torch.autograd.grad(found, leaves, towards.bfloat16()),
            torch.autograd.grad(expected, leaves, towards),
            strict=True,
        )
        assert {gradient.dtype for gradient, _ in pairs[1:]} == {torch.float32}
        assert all((ours - theirs).norm() < 0.02 * theirs.norm() for ours, theirs in pairs)


@torch.no_grad()
def test_loading_another_state_is_seen_under_autocast():
    model, other = adapted(), adapted()
    first, second = some_state(model), some_state(model, seed=3)
    with half():
        model.load(*first)
        before = model.backbone(pictures())
        model.load(first[0], second[1])  # another residual alone
        other.load(first[0], second[1])
        after = model.backbone(pictures())
        assert not torch.equal(after, before) and torch.equal(after, other.backbone(pictures()))
        model.load(first[0], {})
        other.load(first[0], {})
        assert torch.equal(model.backbone(pictures()), other.backbone(pictures()))


@torch.no_grad()
def test_residual_below_bf16s_step_is_kept_in_the_frozen_weight_under_autocast():
    model, name = adapted("0", "proj"), "blocks.0.attn.proj"
    pristine = base_weight(model, name).clone()
    tiny = pristine * 2**-12
    with half():
        model.load(model.initial_factors(seed=0), {name: tiny})
        model.backbone(pictures())
        assert torch.equal(base_weight(model, name), pristine + tiny)


def test_model_that_first_evaluated_in_inference_mode_trains_under_autocast():
    model = adapted()
    model.load(*some_state(model))
    trained = model.train_only(frozenset({"lora_A", "lora_B"}))
    with torch.inference_mode(), half():
        model.backbone(pictures())
    with half():
        model.backbone(pictures()).float().sum().backward()
    assert all(factor.grad is not None and factor.grad.isfinite().all() for factor in trained)


def test_pairs_of_full_rank_train_under_autocast():
    model = AdaptedModel(small_vit(), rank=RANK, alpha=ALPHA, blocks="0", targets="attn+mlp", dense=True).eval()
    model.load(*some_state(model))
    expected = model.backbone(pictures())
    with half():
        found = model.backbone(pictures())
    assert (found - expected).norm() < 0.05 * expected.norm()
    (trained, *_) = model.train_only(frozenset({"lora_B"}))
    found.float().sum().backward()
    assert trained.grad is not None and trained.grad.dtype == torch.float32


def test_layer_whose_pair_is_frozen_passes_the_gradient_on_without_one_of_its_own():
    model = adapted()
    [*_, layer] = model.layers.values()
    model.train_only(frozenset({"lora_B"}))
    x = torch.randn(3, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and layer.lora_B["default"].weight.grad is not None
    assert layer.lora_A["default"].weight.grad is None
