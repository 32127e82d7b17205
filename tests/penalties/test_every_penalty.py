"""Every penalty there is, as the configuration's defaults make it, on a real model: what local training relies on."""

from dataclasses import asdict, replace

import pytest
import torch
from local_grid import defaults

from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.model.backbones import vit_mini
from fedtalora_flwr.model.lora import AdaptedModel
from fedtalora_flwr.model.penalties import Memory, Start, available, resolve

SETTINGS = asdict(RunConfig.parse(defaults()))
NUM_EXAMPLES, NUM_CLASSES = 5, 6
BATCH = torch.tensor([3, 0, 4])


def build(name):
    return resolve(name, SETTINGS)


def leaves(value: torch.Tensor) -> set[torch.Tensor]:
    """All that backward() would give a gradient."""
    found, seen, todo = set(), set(), [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found |= {node.variable} if hasattr(node, "variable") else set()
        todo += [before for before, _ in node.next_functions]
    return found


@pytest.fixture
def model() -> AdaptedModel:
    """Of which lora_B is trained and lora_A is not."""
    adapted = AdaptedModel(vit_mini.create(), rank=2, alpha=4.0, blocks="last:1", targets="q,v").eval()
    adapted.load(adapted.initial_factors(seed=1), {})
    adapted.train_only(frozenset({"lora_B"}))
    return adapted


def play(name, model, *, first_task):
    """Begin a round, let the trained factors move, and give what the term is then with the features it is of."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (NUM_EXAMPLES, 3, 32, 32), dtype=torch.uint8, generator=generator)
    factors = {key: factor for key, factor in model.named_factors().items() if factor.requires_grad}
    dim = model.backbone.feature_dim
    anchor = {key: value.detach() + torch.randn(value.shape, generator=generator) for key, value in factors.items()}
    fisher = {key: torch.rand(value.shape, generator=generator) for key, value in factors.items()}
    start = Start(
        features=torch.no_grad()(lambda: model.backbone(images).float()),
        rows={"weight": torch.randn(NUM_CLASSES, dim, generator=generator), "bias": torch.zeros(NUM_CLASSES)},
        old_classes=torch.arange(0 if first_task else 4),
        factors=factors,
        memory=Memory(),
    )
    if build(name).remembers and not first_task:
        start = replace(start, memory=Memory(anchor, fisher))
    given = [*start.rows.values(), *start.memory.anchor.values(), *start.memory.fisher.values(), *factors.values()]
    before = [value.detach().clone() for value in given]
    term = build(name).begin(start)
    assert all(torch.equal(value, copy) for value, copy in zip(given, before, strict=True)), "changed what it was given"
    with torch.no_grad():
        for value in factors.values():
            value += 0.3 * torch.randn(value.shape, generator=generator)
    features = model.backbone(images[BATCH]).float()
    return factors, None if term is None else term(BATCH, features)


@pytest.mark.parametrize("name", available())
def test_nothing_is_added_in_the_first_task_where_there_is_nothing_to_forget(name, model):
    _, value = play(name, model, first_task=True)
    assert value is None or float(value) == 0


@pytest.mark.parametrize("name", sorted({*available()} - {"none"}))
def test_term_of_a_later_task_is_a_finite_number_that_grows_where_the_model_has_moved(name, model):
    _, value = play(name, model, first_task=False)
    assert value.shape == () and torch.isfinite(value) and float(value.detach()) > 0


@pytest.mark.parametrize("name", sorted({*available()} - {"none"}))
def test_gradients_of_the_term_reach_the_trained_factors_and_nothing_else(name, model):
    factors, value = play(name, model, first_task=False)
    trained = set(factors.values())
    assert leaves(value) <= trained and all(key.startswith("lora_B/") for key in factors)
    value.backward()
    assert all(torch.isfinite(factor.grad).all() for factor in trained)
    assert sum(float(factor.grad.abs().sum()) for factor in trained) > 0
