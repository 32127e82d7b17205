"""Private steps: each example's own gradient, the bound on it, the noise, and what opacus says that they cost."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from encoders import WIDTH, encoder, save_encoder
from local_grid import defaults
from torch import Tensor

from fedtalora_flwr import aggregation
from fedtalora_flwr.config import ConfigError, RunConfig
from fedtalora_flwr.model import heads, penalties
from fedtalora_flwr.model.backbones import resolve
from fedtalora_flwr.model.lora import AdaptedModel
from fedtalora_flwr.model.private import (
    Privacy,
    _clipped_sum,
    _recorded,
    example_gradients,
    fit_privately,
    require_possible,
    sample_rate,
    secret_uniform,
    steps_of_round,
)
from fedtalora_flwr.model.train import Examples, fit

NUM_CLASSES, CLASSES, FEATURE_DIM = 6, [1, 2, 4], 192
COMPARED = torch.tensor(CLASSES)
SETTINGS = {
    "dp-epsilon": 8.0,
    "head": "linear",
    "device": "cpu",
    "precision": "fp32",
    "lr-schedule": "constant",
    "warmup": 0.0,
    "clip-norm": 0.0,
    "learning-rate": 0.01,
    "head-learning-rate": 0.01,
}
BOTH = frozenset({"lora_A", "lora_B"})


def configured(**changes) -> RunConfig:
    return replace(RunConfig.parse(defaults() | SETTINGS), **changes)


@pytest.fixture(scope="module")
def model() -> AdaptedModel:
    built = AdaptedModel(resolve("vit_mini", {}), rank=3, alpha=6, blocks="last:2", targets="attn+mlp")
    return built.eval()


@pytest.fixture(autouse=True)
def drawn(model):
    """Pairs whose lora_B is not zero: else lora_A would have no gradient."""
    generator = torch.Generator().manual_seed(3)
    pairs = {
        name: replace(pair, lora_B=0.1 * torch.randn(pair.lora_B.shape, generator=generator))
        for name, pair in model.initial_factors(seed=0).items()
    }
    model.load(pairs, {})


@pytest.fixture(scope="module")
def examples() -> Examples:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([1, 4, 4, 2, 1, 4, 2])
    return Examples(torch.randint(0, 256, (7, 3, 16, 16), generator=generator, dtype=torch.uint8), labels)


@pytest.fixture(scope="module")
def rows() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = {"weight": torch.randn(NUM_CLASSES, FEATURE_DIM, generator=generator), "bias": torch.randn(NUM_CLASSES)}
    return {name: torch.nn.Parameter(value) for name, value in rows.items()}


def alone(model, rows, examples, row) -> dict[str, Tensor]:
    """The gradients of one example by autograd, all else out of the batch."""
    for parameter in rows.values():
        parameter.grad = None
    factors = {key: factor for key, factor in model.named_factors().items() if factor.requires_grad}
    scores = heads.logits(rows, model.backbone(examples.inputs[row : row + 1]).float(), COMPARED)
    loss = F.cross_entropy(scores, torch.searchsorted(COMPARED, examples.labels[row : row + 1]))
    gradients = torch.autograd.grad(loss, [*factors.values(), *rows.values()])
    found = dict(zip([*factors, *(f"head/{name}" for name in rows)], gradients, strict=True))
    return {key: value[COMPARED] if key.startswith("head/") else value for key, value in found.items()}


def norm(gradients: dict[str, Tensor]) -> float:
    return float(sum(value.double().square().sum() for value in gradients.values())) ** 0.5


def clipped(model, rows, examples, kept, clip) -> dict[str, Tensor]:
    targets = torch.searchsorted(COMPARED, examples.labels)
    return _clipped_sum(model, rows, examples.inputs[kept], targets[kept], COMPARED, config=configured(), clip=clip)


def assert_each_has_its_own(model, rows, examples):
    targets = torch.searchsorted(COMPARED, examples.labels)
    of_pairs, of_scores, features = example_gradients(
        model, rows, examples.inputs, targets, COMPARED, config=configured()
    )
    trained = {key for key, factor in model.named_factors().items() if factor.requires_grad}
    assert of_pairs.keys() == trained
    for row in range(len(examples)):
        wanted = alone(model, rows, examples, row)
        got = {key: value[row] for key, value in of_pairs.items()} | {
            "head/weight": torch.outer(of_scores[row], features[row]),
            "head/bias": of_scores[row],
        }
        for key, value in wanted.items():
            assert value.abs().max() > 0
            torch.testing.assert_close(got[key], value, rtol=1e-3, atol=1e-5 * float(value.abs().max()))


@pytest.mark.parametrize("trainable", [BOTH, frozenset({"lora_B"})])
def test_gradients_of_an_example_are_those_of_it_alone(model, rows, examples, trainable):
    model.train_only(trainable)
    assert_each_has_its_own(model, rows, examples)


@pytest.mark.parametrize("family", ["albert", "modernbert"])
def test_gradients_of_a_text_are_those_of_it_alone_in_a_layer_that_is_used_twice_too(tmp_path, family):
    """ALBERT's blocks are one and the same."""
    backbone = encoder(save_encoder(tmp_path, family))
    texts = AdaptedModel(backbone, rank=3, alpha=6.0, blocks="all", targets="attn+mlp").eval()
    generator = torch.Generator().manual_seed(3)
    for factor in texts.named_factors().values():
        factor.data = 0.3 * torch.randn(factor.shape, generator=generator)
    tokens = torch.randint(1, 1000, (4, 9), generator=generator).int()
    tokens[1, 5:] = tokens[2, 3:] = 0  # shorter ones
    rows = {"weight": torch.randn(NUM_CLASSES, WIDTH, generator=generator), "bias": torch.zeros(NUM_CLASSES)}
    rows = {name: torch.nn.Parameter(value) for name, value in rows.items()}
    assert_each_has_its_own(texts, rows, Examples(tokens, torch.tensor([1, 4, 4, 2])))


def test_one_example_more_changes_the_clipped_sum_by_the_clip_at_most(model, rows, examples):
    model.train_only(BOTH)
    norms = [norm(alone(model, rows, examples, row)) for row in range(len(examples))]
    clip = sorted(norms)[3]  # some are above it, some below
    everything = clipped(model, rows, examples, torch.arange(7), clip)
    for row in range(len(examples)):
        others = clipped(model, rows, examples, torch.tensor([r for r in range(7) if r != row]), clip)
        change = norm({key: value - others[key] for key, value in everything.items()})
        assert change == pytest.approx(min(clip, norms[row]), rel=1e-3)


def test_an_example_with_a_gradient_that_is_no_number_takes_no_part(model, rows, examples):
    model.train_only(BOTH)
    broken = {name: value.detach().clone() for name, value in rows.items()}
    broken["weight"][4] = float("nan")  # of class 4 alone, but every example compares with it
    total = clipped(model, {n: torch.nn.Parameter(v) for n, v in broken.items()}, examples, torch.arange(7), 1.0)
    assert norm(total) == 0


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_without_noise_and_bound_private_steps_are_the_plain_ones(model, rows, examples, optimizer):
    config = configured(batch_size=7, local_epochs=3, optimizer=optimizer)
    head, start = {name: value.detach() for name, value in rows.items()}, model.factors()
    told = {"classes": CLASSES, "trainable": BOTH, "config": config, "task_id": 0, "round_in_task": 0}
    plain = fit(model, head, examples, penalty=penalties.resolve("none", {}), old_classes=(), seed=[0], **told)
    model.load(start, {})
    private = fit_privately(model, head, examples, privacy=Privacy(0.0, 1e9), **told)
    for name, pair in plain.adapters.items():
        assert (pair.lora_B - start[name].lora_B).abs().max() > 1e-5
        torch.testing.assert_close(private.adapters[name].lora_A, pair.lora_A, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(private.adapters[name].lora_B, pair.lora_B, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(private.head, plain.head, rtol=1e-3, atol=1e-4)


def test_noise_has_the_deviation_that_it_should_and_spares_rows_of_other_classes(model, rows, examples):
    """One step of SGD at rate 1, with noise beside which the gradients vanish."""
    config = configured(batch_size=2, optimizer="sgd", learning_rate=1.0, head_learning_rate=1.0, momentum=0.0)
    head, start = {name: value.detach() for name, value in rows.items()}, model.factors()
    privacy = Privacy(noise_multiplier=500.0, clip=0.25)
    few = Examples(examples.inputs[:2], examples.labels[:2])
    result = fit_privately(
        model, head, few, classes=CLASSES, trainable=BOTH, config=config, task_id=0, round_in_task=0, privacy=privacy
    )
    moved = torch.cat([(pair.lora_A - start[name].lora_A).flatten() for name, pair in result.adapters.items()])
    expected = 500.0 * 0.25 / 2  # over the batch that is expected
    assert float(moved.std()) == pytest.approx(expected, rel=0.05)
    change = result.head["weight"] - head["weight"]
    assert float(change[COMPARED].std()) == pytest.approx(expected, rel=0.15)
    assert not change[[0, 3, 5]].any()


def test_batches_are_poisson_and_an_empty_one_is_a_step_of_noise(model, rows, examples):
    """What is drawn for the batches is told; what is drawn for the noise is the middle, which is none."""
    head = {name: value.detach() for name, value in rows.items()}
    start, config = model.factors(), configured(batch_size=2, optimizer="sgd", momentum=0.0)
    assert (sample_rate(config, 7), steps_of_round(config, 7), sample_rate(config, 1)) == (2 / 7, 4, 1.0)
    empty = fit_privately(
        model,
        head,
        examples,
        classes=CLASSES,
        trainable=BOTH,
        config=config,
        task_id=0,
        round_in_task=0,
        privacy=Privacy(1.0, 1.0),
        uniform=lambda size: torch.full((size,), 0.5, dtype=torch.float64),  # none is below 2 / 7
    )
    assert all(torch.equal(pair.lora_A, start[name].lora_A) for name, pair in empty.adapters.items())
    assert torch.equal(empty.head["weight"], head["weight"])


def test_secret_numbers_are_uniform_and_never_the_same():
    first, second = secret_uniform(20_000), secret_uniform(20_000)
    assert 0 < float(first.min()) < 1e-3 and 1 - 1e-3 < float(first.max()) < 1
    assert float(first.mean()) == pytest.approx(0.5, abs=0.02) and not torch.equal(first, second)
    assert len(secret_uniform(0)) == 0


def test_a_layer_that_mixes_examples_is_refused(model):
    name, layer = next(iter(model.layers.items()))
    with _recorded(model, 2), pytest.raises(ConfigError, match=f"{name} reads 3 rows for 2 examples"):
        layer(torch.zeros(3, 5, layer.in_features))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head": "ridge"}, "follow-drift sends sums over how features have moved; set follow-drift=false"),
        (
            {"head": "lda", "feature_norm": "none", "follow_drift": False},
            "head=lda sums features, which feature-norm=none",
        ),
        ({"rows_start": "means"}, "rows-start=means sends class means; set rows-start=zero"),
        ({"penalty": "lwf"}, "penalty=lwf has no part in an example's own gradient; set penalty=none"),
        ({"method": "fl-tac"}, "method=fl-tac trains slots; take one that trains one adapter"),
    ],
)
def test_what_private_steps_do_not_cover_is_refused_by_name(model, changes, reason):
    config = configured(**changes)
    with pytest.raises(ConfigError, match=f"dp-epsilon 8: {reason}"):
        require_possible(
            config,
            model,
            method=aggregation.resolve(config.method, config.settings),
            head=heads.resolve(config.head, config.settings),
        )
