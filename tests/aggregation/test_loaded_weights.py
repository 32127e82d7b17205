"""From a state to the weights of a model: what `AdaptedModel.load` leaves is what the algebra says."""

import re

import pytest
import torch
from made_updates import LAYERS, draw, effective, make_state, make_updates, mean_of_clients, relative_error
from torch import Tensor, nn

from fedtalora_flwr.aggregation import resolve
from fedtalora_flwr.model.backbones.base import Backbone, find_placement
from fedtalora_flwr.model.lora import AdaptedModel

ROLES = {"qkv": ("attn.qkv",), "fc2": ("mlp.fc2",)}


class TwoLayers(Backbone):
    """One block with the two Linear layers of `LAYERS`."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(d_in, d_out) for d_out, d_in in LAYERS.values()]
        block = nn.ModuleDict({"attn": nn.ModuleDict({"qkv": layers[0]}), "mlp": nn.ModuleDict({"fc2": layers[1]})})
        self.model = nn.ModuleDict({"blocks": nn.ModuleList([block])})
        self.modality, self.feature_dim = "image", 3
        self.placement = find_placement(self.model, blocks=re.compile(r"blocks\.\d+"), roles=ROLES)

    def encode(self, split, rows, *, source) -> Tensor:
        raise NotImplementedError

    def forward(self, batch, *, augment="none", generator=None) -> Tensor:
        raise NotImplementedError


@pytest.fixture
def model() -> AdaptedModel:
    torch.manual_seed(0)
    return AdaptedModel(TwoLayers(), rank=2, alpha=4.0, blocks="all", targets="qkv+fc2")


def weights_of(model: AdaptedModel) -> dict[str, Tensor]:
    """Base weight as it stands, plus PEFT's own product of the pair."""
    return {
        name: layer.get_base_layer().weight.detach().double() + layer.get_delta_weight("default").detach().double()
        for name, layer in model.layers.items()
    }


@pytest.fixture
def rounds(model):
    """W_0, the state and updates of a second round, and what comes of it; with the model's own module names."""
    generator, method = draw(0), resolve("fedtalora")
    names = dict(zip(LAYERS, model.layers, strict=True))
    state = make_state(generator)
    state = type(state)({names[n]: pair for n, pair in state.adapters.items()}, head=state.head)
    state = method.aggregate(state, make_updates(state, [0, 1, 2], generator=generator))
    updates = make_updates(state, [1, 3], generator=generator)
    pristine = {n: layer.get_base_layer().weight.detach().clone() for n, layer in model.layers.items()}
    return pristine, state, updates, method.aggregate(state, updates)


def test_loaded_weights_are_the_weighted_mean_of_the_clients_weights(model, rounds):
    pristine, state, updates, new_state = rounds
    model.load(new_state.adapters, new_state.residual)
    assert relative_error(weights_of(model), mean_of_clients(pristine, state, updates)) < 1e-6


def test_loading_a_state_sets_the_weights_and_never_adds_to_them(model, rounds):
    pristine, state, _, new_state = rounds
    model.load(new_state.adapters, new_state.residual)
    once = weights_of(model)
    model.load(new_state.adapters, new_state.residual)
    assert all(torch.equal(value, once[name]) for name, value in weights_of(model).items())
    model.load(state.adapters, state.residual)  # and back to an older one, as after a resume
    assert relative_error(weights_of(model), effective(pristine, state.residual, state.adapters)) < 1e-6


def test_loading_a_state_without_residual_restores_the_pristine_weights(model, rounds):
    pristine, state, _, new_state = rounds
    model.load(new_state.adapters, new_state.residual)
    model.load(state.adapters, {})
    for name, layer in model.layers.items():
        assert torch.equal(layer.get_base_layer().weight, pristine[name])


def test_factors_come_out_of_the_model_as_they_were_loaded(model, rounds):
    _, _, _, new_state = rounds
    model.load(new_state.adapters, new_state.residual)
    for name, pair in model.factors().items():
        assert torch.equal(pair.lora_A, new_state.adapters[name].lora_A)
        assert torch.equal(pair.lora_B, new_state.adapters[name].lora_B)
        assert pair.scaling == new_state.adapters[name].scaling
