"""What a run adds to its backbone, whole and as factors."""

import pytest
import timm
import torch

from fedtalora_flwr.aggregation import GlobalState, LoraFactors
from fedtalora_flwr.inference.weight_delta import Change, changes_of
from fedtalora_flwr.model.backbones.images import ImageBackbone
from fedtalora_flwr.model.lora import AdaptedModel

D_OUT, D_IN, RANK = 7, 5, 2


def change(rank_of_residual: int) -> Change:
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    residual = draw(D_OUT, rank_of_residual) @ draw(rank_of_residual, D_IN)
    return Change(LoraFactors(draw(RANK, D_IN), draw(D_OUT, RANK), scaling=2.5), residual)


@pytest.mark.parametrize("rank_of_residual", [0, 1, 3, 5])
def test_a_residual_becomes_as_much_extra_rank_as_it_has_behind_the_trained_pair(rank_of_residual):
    given = change(rank_of_residual)
    carried = given.as_factors()
    assert carried.rank == RANK + rank_of_residual and carried.scaling == 2.5
    assert torch.equal(carried.lora_A[:RANK], given.factors.lora_A)
    assert torch.equal(carried.lora_B[:, :RANK], given.factors.lora_B)
    torch.testing.assert_close(carried.delta().double(), given.dense(), rtol=1e-5, atol=1e-5)


def small_vit() -> ImageBackbone:
    torch.manual_seed(7)
    sizes = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 12, "num_heads": 3, "num_classes": 0}
    return ImageBackbone(timm.create_model("vit_tiny_patch16_224", **sizes))


@pytest.mark.parametrize("targets", ["q,v", "k", "qkv", "q,k,v+proj", "mlp"])
def test_changes_added_to_the_untouched_layers_give_the_adapted_models_features(targets):
    adapted = AdaptedModel(small_vit(), rank=RANK, alpha=5.0, blocks="all", targets=targets).eval()
    torch.manual_seed(1)
    adapters = {
        name: LoraFactors(pair.lora_A, torch.randn_like(pair.lora_B), pair.scaling)
        for name, pair in adapted.initial_factors(seed=0).items()
    }
    residual = {name: torch.randn_like(pair.delta()) for name, pair in adapters.items()}
    adapted.load(adapters, residual)
    plain = small_vit().eval()
    with torch.no_grad():
        for name, what in changes_of(adapted, GlobalState(adapters, residual)).items():
            plain.model.get_submodule(name).weight.add_(what.dense().float())
        images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
        torch.testing.assert_close(plain(images), adapted.backbone(images), rtol=0, atol=1e-5)
