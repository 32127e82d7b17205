"""What a model does with data in memory: train its LoRA and class rows, count hits, sum features."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtalora_flwr.aggregation.factors import LoraFactors
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.model import precision
from fedtalora_flwr.model.backbones.lm import LanguageBackbone
from fedtalora_flwr.model.heads import Classifier, FeatureRoot, Head, logits
from fedtalora_flwr.model.lora import AdaptedModel
from fedtalora_flwr.model.penalties import Memory, Penalty, Start
from fedtalora_flwr.model.recipe import Recipe


@dataclass(frozen=True)
class Examples:
    """Encoded examples in memory.

    Parameters
    ----------
    inputs
        uint8 (N, 3, H, W) images, int32 (N, L) tokens, or (N, 2, L) with those to learn.
    labels
        (N,) int64.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def without_rare(self, least: int) -> "Examples":
        """Leave out the classes of which there are fewer examples than `least`."""
        common = torch.bincount(self.labels)[self.labels] >= least
        return self if common.all() else Examples(self.inputs[common], self.labels[common])


@dataclass(frozen=True)
class FitResult:
    """What local training gives: the trained pairs and rows, on the CPU, and the mean loss over all steps."""

    adapters: dict[str, LoraFactors]
    head: dict[str, Tensor]
    mean_loss: float


def fit(
    model: AdaptedModel,
    head: Mapping[str, Tensor],
    examples: Examples,
    *,
    classes: Sequence[int],
    trainable: frozenset[str],
    penalty: Penalty,
    old_classes: Sequence[int],
    config: RunConfig,
    task_id: int,
    round_in_task: int,
    seed: Sequence[int],
    memory: Memory | None = None,
) -> FitResult:
    """Train a loaded model for ``local-epochs`` on one client's data of a task.

    Parameters
    ----------
    model
        Loaded with the server's state.
    head
        The broadcast class rows, (C, ...) each.
    examples
        The client's data, whose labels are all in `classes`.
    classes
        The classes that the cross-entropy compares, sorted.
    trainable
        The LoRA factors to train.
    penalty, old_classes
        What is added to the loss, and the classes of earlier tasks for it.
    config
        Optimiser, schedule, batch size, augmentation.
    task_id, round_in_task
        The server's clock; the schedule and ``later-learning-rate`` follow it.
    seed
        Of the order of examples and of augmentation.
    memory
        Of finished tasks, for a penalty that remembers.
    """
    device = next(model.parameters()).device
    rows = {name: nn.Parameter(value.to(device, copy=True)) for name, value in head.items()}
    inputs, labels = examples.inputs.to(device), examples.labels.to(device)
    compared = torch.tensor(sorted(classes), device=device)
    targets = torch.searchsorted(compared, labels)
    rng, generator = np.random.default_rng(list(seed)), torch.Generator()
    generator.manual_seed(int(rng.integers(2**62)))
    num_steps = config.local_epochs * math.ceil(len(examples) / config.batch_size)
    recipe = Recipe(
        model.train_only(trainable),
        list(rows.values()),
        config=config,
        task_id=task_id,
        round_in_task=round_in_task,
        num_steps=num_steps,
    )
    model.eval()  # no dropout: the loss is that of the weights which are averaged, and a step is repeatable
    term = penalty.begin(
        Start(
            features=lambda: _features_in_order(model, examples, config=config),
            rows={name: row.detach().clone() for name, row in rows.items()},
            old_classes=torch.tensor(sorted(old_classes), dtype=torch.int64, device=device),
            factors={key: factor for key, factor in model.named_factors().items() if factor.requires_grad},
            memory=_on_device(memory or Memory(), device),
        )
    )
    total_loss = torch.zeros((), device=device)
    for batch in _batches(model, inputs, config=config, rng=rng):
        with autocast(device, config.precision):
            if isinstance(model.backbone, LanguageBackbone):
                features, scores, wanted = None, *model.backbone.answer_logits(inputs[batch])
            else:
                features = model.backbone(inputs[batch], augment=config.augment, generator=generator).float()
        if features is not None:
            scores, wanted = logits(rows, features, compared), targets[batch]
        loss = F.cross_entropy(scores, wanted)
        if term is not None and features is not None:
            loss = loss + term(batch, features)
        recipe.step(loss)
        total_loss += loss.detach()
    return FitResult(
        adapters=model.factors(),
        head={name: value.detach().cpu() for name, value in rows.items()},
        mean_loss=total_loss.item() / num_steps,
    )


def compared_classes(
    loss_classes: str, *, task_classes: Sequence[int], present: Sequence[int], seen: Sequence[int]
) -> list[int]:
    """Choose the classes of the local cross-entropy: all of the task, those the client holds, or all seen so far."""
    return sorted({"task": task_classes, "present": present, "seen": seen}[loss_classes])


@torch.inference_mode()
def count_correct(
    model: AdaptedModel,
    classifiers: Sequence[Classifier],
    examples: Examples,
    *,
    classes: Sequence[int],
    config: RunConfig,
) -> list[int]:
    """Count, for each classifier, the examples whose class scores highest among `classes`."""
    verdicts = judge(model, classifiers, examples, classes=classes, config=config)
    return [int((verdict.said == examples.labels).sum()) for verdict in verdicts]


@dataclass(frozen=True)
class Verdicts:
    """What a classifier says of some examples, on the CPU.

    Parameters
    ----------
    said
        (N,) int64, the class that scores highest.
    confidence
        (N,) float32, its probability in [0, 1].
    """

    said: Tensor
    confidence: Tensor


@torch.inference_mode()
def judge(
    model: AdaptedModel,
    classifiers: Sequence[Classifier],
    examples: Examples,
    *,
    classes: Sequence[int],
    config: RunConfig,
) -> list[Verdicts]:
    """Let each classifier say the class of each example, among `classes`; the features are computed once."""
    device = next(model.parameters()).device
    on_device = [classifier.to(device) for classifier in classifiers]
    compared = torch.tensor(sorted(classes), device=device)
    verdicts = [Verdicts(torch.empty(len(examples), dtype=torch.int64), torch.empty(len(examples))) for _ in on_device]
    for features, _, rows in _features(model, examples, config=config):
        for classifier, verdict in zip(on_device, verdicts, strict=True):
            scores = classifier.logits(features, compared)
            best = scores.argmax(1, keepdim=True)  # (n, 1)
            verdict.said[rows.cpu()] = compared[best[:, 0]].cpu()
            verdict.confidence[rows.cpu()] = classifier.probabilities(scores).gather(1, best)[:, 0].cpu()
    return verdicts


@dataclass(frozen=True)
class Score:
    """How good a model is on some examples.

    Parameters
    ----------
    correct
        Hits of each classifier: examples, or of a language model the answers' tokens that it finds likeliest.
    total
        What was judged: examples, or tokens of answers.
    loss_sum
        Of a language model: the cross-entropy, summed over these tokens, in nats.
    verdicts
        Of each classifier, on every example; none of a language model.
    """

    correct: tuple[int, ...]
    total: int
    loss_sum: float | None = None
    verdicts: Sequence[Verdicts] = ()


def score(
    model: AdaptedModel,
    classifiers: Sequence[Classifier],
    examples: Examples,
    *,
    classes: Sequence[int],
    config: RunConfig,
) -> Score:
    """Judge a loaded model as `count_correct` does, or a language model by the answers of the examples."""
    if isinstance(model.backbone, LanguageBackbone):
        return _score_answers(model, model.backbone, examples, config=config)
    verdicts = judge(model, classifiers, examples, classes=classes, config=config)
    hits = [int((verdict.said == examples.labels).sum()) for verdict in verdicts]
    return Score(tuple(hits), len(examples), verdicts=verdicts)


@torch.inference_mode()
def _score_answers(model: AdaptedModel, backbone: LanguageBackbone, examples: Examples, *, config: RunConfig) -> Score:
    device = next(model.parameters()).device
    correct, total, loss_sum = 0, 0, 0.0
    model.eval()
    order = backbone.batch_order(examples.inputs)
    for part in order.split(config.batch_size):  # type: ignore[no-untyped-call]  # the scores of a token are V numbers
        with autocast(device, config.precision):
            scores, wanted = backbone.answer_logits(examples.inputs[part].to(device))
        correct += int((scores.argmax(1) == wanted).sum())
        total += len(wanted)
        loss_sum += float(F.cross_entropy(scores, wanted, reduction="sum"))
    return Score((correct,), total, loss_sum)


@torch.inference_mode()
def classify(
    model: AdaptedModel, classifier: Classifier, examples: Examples, *, classes: Sequence[int], config: RunConfig
) -> Tensor:
    """Give the class of `classes` that scores highest for each example: (N,) int64 on the CPU."""
    (verdict,) = judge(model, [classifier], examples, classes=classes, config=config)
    return verdict.said


@torch.inference_mode()
def sum_features(
    model: AdaptedModel,
    examples: Examples,
    *,
    head: Head,
    num_classes: int,
    config: RunConfig,
) -> FeatureRoot:
    """Sum a client's features of its data, lifted by `head`, on the CPU.

    Parameters
    ----------
    model
        Loaded with the state whose features are summed.
    examples, head, num_classes, config
        The client's data, what lifts the features, the rows of the sums.
    """
    sums = FeatureRoot.zero(num_classes=num_classes, feature_dim=head.lifted_dim(model.backbone.feature_dim))
    for features, labels, _ in _features(model, examples, config=config):
        sums = sums + FeatureRoot.of(head.lift(features).cpu(), labels.cpu(), num_classes=num_classes)
    return sums


def num_views(model: AdaptedModel, config: RunConfig) -> int:
    """Give the views of an example that show how features have moved: it itself, and ``drift-views`` of an image."""
    return 1 + (config.drift_views if model.backbone.modality == "image" else 0)


@torch.inference_mode()
def lifted_views(
    model: AdaptedModel, examples: Examples, *, head: Head, config: RunConfig, seed: Sequence[int]
) -> Tensor:
    """Give the features of all views of a client's data (see `num_views`), lifted by `head`.

    Parameters
    ----------
    model
        Loaded with the state whose features these are.
    examples, head, config
        The client's data, what lifts the features, how many views.
    seed
        Of the views: the same seed gives the same, under whatever state.

    Returns
    -------
    (views N, m) on the CPU, the examples themselves in front.
    """
    generator = torch.Generator()
    generator.manual_seed(int(np.random.default_rng(list(seed)).integers(2**62)))
    views = [_features_in_order(model, examples, config=config)]
    for _ in range(1, num_views(model, config)):
        views.append(_features_in_order(model, examples, config=config, augment="remix", generator=generator))
    return head.lift(torch.cat(views)).cpu()


def sum_drift(before: Tensor, now: Tensor) -> Tensor:
    """Sum the pairs of lifted features (n, m) of the same views under two states: a root, (k, 2 m + 1) float64."""
    pairs = torch.cat([before, now], dim=1)
    sums = FeatureRoot.zero(num_classes=1, feature_dim=pairs.shape[1])
    for part in pairs.split(pairs.shape[1] + 1):  # type: ignore[no-untyped-call]
        sums = sums + FeatureRoot.of(part, torch.zeros(len(part), dtype=torch.int64), num_classes=1)
    return sums.root


def sum_fisher(
    model: AdaptedModel,
    head: Mapping[str, Tensor],
    examples: Examples,
    *,
    classes: Sequence[int],
    trainable: frozenset[str],
    config: RunConfig,
    seed: Sequence[int],
) -> dict[str, Tensor]:
    """Sum ``(d log p(y | x) / d theta)^2`` over a client's examples, with y drawn from the loaded model's own p.

    Parameters
    ----------
    model, head, examples, classes, trainable, config
        As of `fit`.
    seed
        Of the draws.

    Returns
    -------
    By ``lora_A/<module>`` and ``lora_B/<module>``, of the trainable factors, float32 on the CPU.
    """
    device = next(model.parameters()).device
    trained = model.train_only(trainable)
    keys = [key for key, factor in model.named_factors().items() if factor.requires_grad]
    sums = [torch.zeros_like(factor) for factor in trained]
    rows = {name: value.to(device) for name, value in head.items()}
    compared = torch.tensor(sorted(classes), device=device)
    generator = torch.Generator().manual_seed(int(np.random.default_rng(list(seed)).integers(2**62)))
    model.eval()
    for row in range(len(examples) if trained else 0):  # one by one: a square of a sum is no sum of squares
        with autocast(device, config.precision):
            features = model.backbone(examples.inputs[row : row + 1].to(device)).float()
        log_p = F.log_softmax(logits(rows, features, compared), 1)[0]
        drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator)
        gradients = torch.autograd.grad(log_p[drawn.to(device)].sum(), trained)
        for total, gradient in zip(sums, gradients, strict=True):
            total.addcmul_(gradient, gradient)
    return {key: total.float().cpu() for key, total in zip(keys, sums, strict=True)}


def autocast(device: torch.device, setting: str) -> AbstractContextManager[object]:
    """Run the forward pass in the precision that a setting gives on a device."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision_of(device, setting) == "bf16")


def precision_of(device: torch.device, setting: str) -> str:
    """Resolve ``precision`` into ``fp32`` or ``bf16``: ``auto`` is bf16 on a GPU or CPU that gains by it."""
    if setting != "auto":
        return setting
    gains = torch.cuda.is_bf16_supported() if device.type == "cuda" else precision.on_cpu().takes_bf16
    return "bf16" if gains else "fp32"


def _features(
    model: AdaptedModel,
    examples: Examples,
    *,
    config: RunConfig,
    augment: str = "none",
    generator: torch.Generator | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Give features, labels and row numbers, batch by batch."""
    device = next(model.parameters()).device
    model.eval()
    order: Tensor = model.backbone.batch_order(examples.inputs)
    for part in order.split(config.eval_batch_size):  # type: ignore[no-untyped-call]
        with autocast(device, config.precision):
            features = model.backbone(examples.inputs[part].to(device), augment=augment, generator=generator)
        yield features.float(), examples.labels[part].to(device), part.to(device)


def _on_device(memory: Memory, device: torch.device) -> Memory:
    anchor, fisher = ({k: v.to(device) for k, v in part.items()} for part in (memory.anchor, memory.fisher))
    return Memory(anchor, fisher)


@torch.no_grad()
def _features_in_order(
    model: AdaptedModel,
    examples: Examples,
    *,
    config: RunConfig,
    augment: str = "none",
    generator: torch.Generator | None = None,
) -> Tensor:
    batches = _features(model, examples, config=config, augment=augment, generator=generator)
    features, _, rows = zip(*batches, strict=True)
    return torch.cat(features)[torch.cat(rows).argsort()]  # (N, d)


def _batches(model: AdaptedModel, inputs: Tensor, *, config: RunConfig, rng: np.random.Generator) -> Iterator[Tensor]:
    """Draw the row numbers of each step; every epoch visits all examples once, those of like cost together."""
    for _ in range(config.local_epochs):
        shuffled = torch.from_numpy(rng.permutation(len(inputs))).to(inputs.device)
        order = shuffled[model.backbone.batch_order(inputs[shuffled])]
        batches = order.split(config.batch_size)  # type: ignore[no-untyped-call]
        yield from (batches[index] for index in rng.permutation(len(batches)))
