"""Local training and counting on the shipped ViT with a few random images."""

import math
from dataclasses import replace

import pytest
import torch
from local_grid import defaults
from torch import nn

from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.model import heads, penalties, train
from fedtalora_flwr.model.backbones import Backbone, resolve
from fedtalora_flwr.model.heads import Classifier, FeatureSums, init_rows
from fedtalora_flwr.model.lora import AdaptedModel
from fedtalora_flwr.model.precision import Verdict
from fedtalora_flwr.model.session import build_model
from fedtalora_flwr.model.train import Examples, autocast, compared_classes, count_correct, fit, sum_features

NUM_CLASSES, CLASSES = 6, [1, 4]  # the task's classes, not in a row and not from 0
NONE = penalties.resolve("none", {})
LINEAR = heads.resolve("linear", {})
SETTINGS = {"lora-blocks": "last:1", "lora-targets": "proj", "device": "cpu", "batch-size": 8, "eval-batch-size": 5}
STEADY = {"lr_schedule": "constant", "warmup": 0.0}
PLAIN = {**STEADY, "clip_norm": 0.0}
BOTH = frozenset({"lora_A", "lora_B"})


def configured(**changes) -> RunConfig:
    return replace(RunConfig.parse(defaults() | SETTINGS), **changes)


@pytest.fixture(scope="module")
def built() -> AdaptedModel:
    config = configured()
    return AdaptedModel(
        resolve("vit_mini", {}), rank=config.rank, alpha=config.alpha, blocks="last:1", targets=config.lora_targets
    )


@pytest.fixture
def model(built) -> AdaptedModel:
    built.load(built.initial_factors(seed=0), {})
    return built


@pytest.fixture(scope="module")
def examples() -> Examples:
    """Dark images of class 1 and bright ones of class 4."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor(CLASSES * 6)
    noise = torch.randint(0, 100, (len(labels), 3, 16, 16), generator=generator)
    return Examples((noise + 100 * (labels == 4).view(-1, 1, 1, 1)).to(torch.uint8), labels)


@pytest.fixture
def head() -> dict[str, torch.Tensor]:
    return init_rows(num_classes=NUM_CLASSES, feature_dim=192)


def run_fit(
    model,
    head,
    examples,
    *,
    config=None,
    classes=CLASSES,
    trainable=BOTH,
    penalty=NONE,
    old_classes=(),
    task_id=0,
    round_in_task=0,
    seed=0,
):
    return fit(
        model,
        head,
        examples,
        classes=classes,
        trainable=trainable,
        penalty=penalty,
        old_classes=old_classes,
        config=config or configured(),
        task_id=task_id,
        round_in_task=round_in_task,
        seed=[seed, 1, 2],
    )


def same(first, second) -> bool:
    pairs = zip(first.adapters.values(), second.adapters.values(), strict=True)
    rows = zip(first.head.values(), second.head.values(), strict=True)
    return (
        all(torch.equal(a.lora_A, b.lora_A) and torch.equal(a.lora_B, b.lora_B) for a, b in pairs)
        and all(torch.equal(a, b) for a, b in rows)
        and first.mean_loss == second.mean_loss
    )


@pytest.fixture
def rates(monkeypatch) -> list[list[float]]:
    """The learning rates of every step, one a group, as the optimiser had them."""
    seen: list[list[float]] = []
    for kind in (torch.optim.AdamW, torch.optim.SGD):
        step = kind.step

        def spied(self, *arguments, step=step, **options):
            seen.append([group["lr"] for group in self.param_groups])
            return step(self, *arguments, **options)

        monkeypatch.setattr(kind, "step", spied)
    return seen


@pytest.mark.parametrize(("optimizer", "rate"), [("adamw", 0.01), ("sgd", 0.02)])
def test_loss_falls_with_either_optimiser(model, head, examples, optimizer, rate):
    config = configured(optimizer=optimizer, learning_rate=rate, head_learning_rate=rate)
    first = run_fit(model, head, examples, config=config)
    last = run_fit(model, first.head, examples, config=replace(config, local_epochs=4))
    assert last.mean_loss < 0.5 * first.mean_loss


def test_lwf_keeps_what_the_model_says_of_old_classes_nearer_to_what_it_said(model, examples):
    rows = torch.randn(NUM_CLASSES, 192, generator=torch.Generator().manual_seed(0))
    head, old = {"weight": rows, "bias": torch.zeros(NUM_CLASSES)}, torch.tensor([0, 2, 5])
    adapters = model.initial_factors(seed=0)

    def said(pairs):
        model.load(pairs, {})
        with torch.no_grad():
            return heads.logits(head, model.backbone(examples.inputs), old).log_softmax(1)

    before, drift = said(adapters), {}
    for name in ("none", "lwf"):
        model.load(adapters, {})
        penalty = penalties.resolve(name, {"penalty_weight": 30.0})
        result = run_fit(
            model, head, examples, penalty=penalty, old_classes=old.tolist(), config=configured(local_epochs=3, **PLAIN)
        )
        drift[name] = float(nn.functional.kl_div(said(result.adapters), before, log_target=True, reduction="batchmean"))
    assert 0 < drift["lwf"] < 0.5 * drift["none"]


def test_first_loss_is_that_of_a_guess_among_the_compared_classes(model, head, examples):
    config = configured(learning_rate=0.0, head_learning_rate=0.0)
    assert run_fit(model, head, examples, config=config).mean_loss == pytest.approx(math.log(2))
    everything = range(NUM_CLASSES)
    assert run_fit(model, head, examples, config=config, classes=everything).mean_loss == pytest.approx(math.log(6))


@pytest.mark.parametrize("augment", ["none", "flip", "crop-flip"])
def test_same_seed_gives_the_same_bits_and_another_seed_does_not(model, head, examples, augment):
    config, results = configured(augment=augment), []
    for seed in (7, 7, 8):
        model.load(model.initial_factors(seed=0), {})
        torch.rand(3)  # what others drew from the global generator does not matter
        results.append(run_fit(model, head, examples, config=config, seed=seed))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_augmentations_differ_from_each_other_and_from_none(model, head, examples):
    losses = set()
    for augment in ("none", "flip", "crop-flip"):
        model.load(model.initial_factors(seed=0), {})
        losses.add(run_fit(model, head, examples, config=configured(augment=augment)).mean_loss)
    assert len(losses) == 3


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_rows_of_classes_that_are_not_compared_stay_equal_to_the_bit(model, examples, optimizer):
    head = {"weight": torch.randn(NUM_CLASSES, 192), "bias": torch.randn(NUM_CLASSES)}
    before = {name: value.clone() for name, value in head.items()}
    result = run_fit(model, head, examples, config=configured(optimizer=optimizer, local_epochs=2))
    for name, value in head.items():
        assert torch.equal(value, before[name]), "the broadcast rows were trained in place"
        changed = (result.head[name] != value).view(NUM_CLASSES, -1).any(1)
        assert changed.nonzero().flatten().tolist() == CLASSES


@pytest.mark.parametrize("trainable", [{"lora_A", "lora_B"}, {"lora_B"}, set()])
def test_only_the_methods_trainable_factors_change(model, head, examples, trainable):
    factors = model.initial_factors(seed=0)
    # lora_A gets a gradient only where lora_B is not zero
    factors = {name: replace(pair, lora_B=torch.randn_like(pair.lora_B) / 9) for name, pair in factors.items()}
    model.load(factors, {})
    head = {name: torch.randn_like(value) for name, value in head.items()}
    result = run_fit(model, head, examples, trainable=frozenset(trainable))
    for name, pair in result.adapters.items():
        changed = {f for f in ("lora_A", "lora_B") if not torch.equal(getattr(pair, f), getattr(factors[name], f))}
        assert changed == trainable


def test_frozen_weights_of_the_backbone_never_change(model, head, examples):
    before = {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}
    run_fit(model, head, examples)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(("setting", "wanted"), [("task", [1, 4]), ("present", [4]), ("seen", [0, 1, 4])])
def test_loss_compares_the_classes_that_the_setting_names(setting, wanted):
    assert compared_classes(setting, task_classes=[4, 1], present=[4], seen=[0, 4, 1]) == wanted


def test_learning_rates_reach_the_optimiser(model, head, examples, rates):
    run_fit(model, head, examples, config=configured(learning_rate=0.25, head_learning_rate=0.5, **PLAIN))
    assert rates == [[0.25, 0.5]] * 2  # 12 examples in batches of 8


@pytest.mark.parametrize(("task_id", "factor"), [(0, 1.0), (1, 0.1), (3, 0.1)])
def test_later_learning_rate_slows_lora_after_the_first_task_and_leaves_the_head(
    model, head, examples, rates, task_id, factor
):
    config = configured(learning_rate=0.25, head_learning_rate=0.5, later_learning_rate=0.1, **PLAIN)
    run_fit(model, head, examples, config=config, task_id=task_id)
    assert rates == [[0.25 * factor, 0.5]] * 2


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_cosine_falls_from_step_to_step_over_the_rounds_of_a_task(model, head, examples, rates, optimizer):
    config = configured(
        optimizer=optimizer,
        learning_rate=0.25,
        head_learning_rate=0.5,
        lr_schedule="cosine",
        warmup=0.0,
        rounds_per_task=2,
    )
    for round_in_task in (0, 1):
        run_fit(model, head, examples, config=config, round_in_task=round_in_task)
    factors = [0.5 * (1 + math.cos(math.pi * progress / 2)) for progress in (0.25, 0.75, 1.25, 1.75)]
    assert [rate for pair in rates for rate in pair] == pytest.approx([r * f for f in factors for r in (0.25, 0.5)])


def test_rates_rise_over_the_first_share_of_a_tasks_steps_and_not_again_in_its_second_round(
    model, head, examples, rates
):
    config = configured(
        learning_rate=0.2, head_learning_rate=0.4, lr_schedule="constant", warmup=0.5, rounds_per_task=2, batch_size=3
    )
    for round_in_task in (0, 1):  # of four steps each
        run_fit(model, head, examples, config=config, round_in_task=round_in_task)
    factors = [0.125, 0.375, 0.625, 0.875, 1, 1, 1, 1]
    assert [rate for pair in rates for rate in pair] == pytest.approx([r * f for f in factors for r in (0.2, 0.4)])


@pytest.mark.parametrize(("bound", "largest"), [(0.0, 1e-3), (1e-3, 1.001e-3), (1e-4, 1.001e-4)])
def test_a_gradient_of_the_pairs_beyond_the_bound_is_scaled_down_to_it(model, head, examples, bound, largest):
    config = configured(optimizer="sgd", momentum=0.0, learning_rate=1.0, batch_size=99, clip_norm=bound, **STEADY)
    head = {name: torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) for name, value in head.items()}
    start = model.initial_factors(seed=0)
    result = run_fit(model, head, examples, config=config)  # one step of size gradient
    moved = [pair.lora_B - start[name].lora_B for name, pair in result.adapters.items()]
    moved += [pair.lora_A - start[name].lora_A for name, pair in result.adapters.items()]
    norm = math.sqrt(sum(float(change.square().sum()) for change in moved))
    assert norm > largest if bound == 0 else norm == pytest.approx(bound, rel=1e-3)


def test_every_epoch_visits_every_example_once(model, head, examples, monkeypatch):
    visited = []
    real = model.backbone.forward

    def spy(batch, **options):
        visited.extend(int(image.sum()) for image in batch)
        return real(batch, **options)

    monkeypatch.setattr(model.backbone, "forward", spy)
    run_fit(model, head, examples, config=configured(local_epochs=3))
    once = sorted(int(image.sum()) for image in examples.inputs)
    epochs = [visited[i : i + len(once)] for i in range(0, len(visited), len(once))]
    assert [sorted(epoch) for epoch in epochs] == [once] * 3
    assert epochs[0] != epochs[1]


def test_linear_probe_without_lora_trains_the_head(head, examples):
    probe = AdaptedModel(resolve("vit_mini", {}), rank=4, alpha=8.0, blocks="none", targets="proj")
    result = run_fit(probe, head, examples, config=configured(local_epochs=2))
    assert result.adapters == {}
    assert torch.count_nonzero(result.head["weight"]) > 0


class OneNumber(nn.Module):
    """Stands for an adapted model: the feature of an example is its only number."""

    class Identity(Backbone):
        feature_dim = 1

        def encode(self, split, rows, *, source):
            raise NotImplementedError

        feature_norm = "none"

        def pool(self, batch, *, augment, generator):
            return batch.float()

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1))
        self.backbone = self.Identity()


def count(rows, examples, *, classes, config=None, model=None) -> int:
    return count_correct(
        model or OneNumber(), [Classifier(rows)], examples, classes=classes, config=config or configured()
    )[0]


def test_hits_are_counted_among_the_allowed_classes_only():
    rows = {"weight": torch.zeros(4, 1), "bias": torch.tensor([1.0, 9.0, 3.0, 2.0])}  # 1 would win, then 2, 3, 0
    examples = Examples(torch.zeros(7, 1), torch.tensor([0, 1, 1, 2, 3, 3, 3]))
    choices = [(0, 1, 2, 3), (3, 2, 0), (0, 3), (3, 0), (0,)]
    assert [count(rows, examples, classes=classes) for classes in choices] == [2, 1, 3, 3, 1]


def test_each_of_several_classifiers_is_counted_by_itself():
    examples = Examples(torch.zeros(3, 1), torch.tensor([0, 1, 1]))
    rows = [{"weight": torch.zeros(2, 1), "bias": torch.tensor(bias)} for bias in ([1.0, 0.0], [0.0, 1.0])]
    classifiers = [Classifier(one) for one in rows]
    assert count_correct(OneNumber(), classifiers, examples, classes=[0, 1], config=configured()) == [1, 2]


def test_counting_nothing_counts_no_hit():
    rows = {"weight": torch.zeros(4, 1), "bias": torch.zeros(4)}
    assert count(rows, Examples(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64)), classes=[0]) == 0


def test_batches_of_evaluation_do_not_change_the_count_or_the_sums(model, examples):
    rows = {"weight": torch.randn(NUM_CLASSES, 192), "bias": torch.zeros(NUM_CLASSES)}
    both = configured(eval_batch_size=5), configured(eval_batch_size=100)
    small, large = (count(rows, examples, classes=CLASSES, config=config, model=model) for config in both)
    assert small == large
    small, large = (
        sum_features(model, examples, head=LINEAR, num_classes=NUM_CLASSES, config=config) for config in both
    )
    torch.testing.assert_close(small.sums().gram, large.sums().gram, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(small.moment, large.moment, rtol=1e-5, atol=1e-5)


def test_sums_of_features_are_those_of_the_features_themselves():
    examples = Examples(torch.arange(7.0).unsqueeze(1), torch.tensor([0, 1, 1, 2, 3, 3, 3]))
    got = sum_features(OneNumber(), examples, head=LINEAR, num_classes=4, config=configured())
    wanted = FeatureSums.of(examples.inputs, examples.labels, num_classes=4)
    torch.testing.assert_close(got.sums().gram, wanted.gram)
    assert torch.equal(got.moment, wanted.moment)


def test_views_are_in_the_order_of_the_examples_whatever_that_of_batches():
    class Backwards(OneNumber.Identity):
        modality = "text"

        def batch_order(self, inputs):
            return torch.arange(len(inputs)).flip(0)

    model = OneNumber()
    model.backbone = Backwards()
    examples = Examples(torch.arange(7.0).unsqueeze(1), torch.tensor([0, 1, 1, 2, 3, 3, 3]))
    views = train.lifted_views(model, examples, head=LINEAR, config=configured(drift_views=2), seed=[0])
    assert torch.equal(views, examples.inputs)  # of a text there is but one


def test_views_of_images_are_the_same_under_any_state(model, examples):
    config, head, size = configured(drift_views=2), LINEAR, len(examples)
    before, again, others = (
        train.lifted_views(model, examples, head=head, config=config, seed=[seed]) for seed in (0, 0, 1)
    )
    assert before.shape == (3 * size, 192) and torch.equal(before, again)
    assert torch.equal(before[:size], others[:size])  # the images themselves
    for view in range(1, 3):
        mine = slice(view * size, (view + 1) * size)
        assert not torch.isclose(before[mine], others[mine]).all(1).any()
    assert not torch.isclose(before[size : 2 * size], before[2 * size :]).all(1).any()


def test_drift_is_summed_over_pairs_of_views():
    before, now = torch.randn(30, 3), torch.randn(30, 3)
    wanted = FeatureSums.of(torch.cat([before, now], 1), torch.zeros(30, dtype=torch.int64), num_classes=1).gram
    root = train.sum_drift(before, now)
    assert root.shape == (7, 7)
    torch.testing.assert_close(root.T @ root, wanted)


@pytest.mark.parametrize(("precision", "fused"), [("bf16", False), ("fp32", True)])
def test_model_is_built_without_fused_attention_for_bf16_on_a_cpu(precision, fused):
    model = build_model(configured(precision=precision))
    attention = [module for module in model.backbone.modules() if hasattr(module, "fused_attn")]
    assert attention and {module.fused_attn for module in attention} == {fused}


def test_training_in_bf16_follows_that_in_float32(examples, head):
    results = []
    for precision in ("fp32", "bf16"):
        model = build_model(configured(precision=precision))
        model.load(model.initial_factors(seed=0), {})
        results.append(run_fit(model, head, examples, config=configured(precision=precision)))
    single, half = results
    assert half.mean_loss == pytest.approx(single.mean_loss, rel=0.02)
    for name, pair in single.adapters.items():
        assert half.adapters[name].lora_B.dtype == torch.float32
        assert (half.adapters[name].lora_B - pair.lora_B).norm() < 0.2 * pair.lora_B.norm()


@pytest.mark.parametrize(
    ("device", "precision", "gains", "enabled"),
    [
        ("cpu", "auto", {"cpu"}, True),
        ("cpu", "auto", {"cuda"}, False),
        ("cpu", "fp32", {"cpu"}, False),
        ("cpu", "bf16", set(), True),
        ("cuda", "auto", {"cuda"}, True),
        ("cuda", "auto", {"cpu"}, False),
        ("cuda", "fp32", {"cuda"}, False),
        ("cuda", "bf16", set(), True),
    ],
)
def test_auto_precision_is_bf16_only_on_a_device_that_gains_by_it(monkeypatch, device, precision, gains, enabled):
    asked = {}
    monkeypatch.setattr(train.torch.cuda, "is_bf16_supported", lambda: "cuda" in gains)
    monkeypatch.setattr(train.precision, "on_cpu", lambda: Verdict("cpu" in gains, ""))
    monkeypatch.setattr(
        train.torch, "autocast", lambda kind, dtype, enabled: asked.update(kind=kind, dtype=dtype, enabled=enabled)
    )
    autocast(torch.device(device), precision)
    assert asked == {"kind": device, "dtype": torch.bfloat16, "enabled": enabled}
