"""Local training that is differentially private for each example (DP-SGD, Abadi et al., arXiv 1607.00133).

Every step draws a Poisson batch, which each of N examples joins with probability ``q = batch-size / N``, and follows

    g = ( sum_i g_i min(1, C / |g_i|) + sigma C z ) / (q N),   z ~ N(0, I)

where g_i is the gradient of example i's own loss for all that is trained, pairs and class rows together, C is
``dp-clip`` and sigma the noise multiplier (see `accountant`). What an optimiser makes of g costs nothing more.

An example's gradients of a pair are rank (d_in + d_out) numbers, and come from what its layer read and what came back:
with the rows x (T, d_in) of its tokens, the gradients y (T, d_out) of the layer's output and the scaling s,

    d lora_A = s (y lora_B)^T x,   d lora_B = s y^T (x lora_A^T)

so that no gradient of a frozen weight is ever formed. Batches and noise come from the operating system's secret
numbers, not from the run's seed: whoever knows the noise can take it off again.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtalora_flwr.aggregation import Method, SlotAggregator
from fedtalora_flwr.config import ConfigError, RunConfig
from fedtalora_flwr.model.backbones.lm import LanguageBackbone
from fedtalora_flwr.model.heads import Head, logits
from fedtalora_flwr.model.lora import AdaptedModel, FusedLinear
from fedtalora_flwr.model.recipe import Recipe
from fedtalora_flwr.model.train import Examples, FitResult, autocast

Uniform = Callable[[int], Tensor]  # so many numbers in (0, 1), float64

_PAIR = "default"  # PEFT's name of it


@dataclass(frozen=True)
class Privacy:
    """How private steps are taken.

    Parameters
    ----------
    noise_multiplier
        sigma: the noise's standard deviation over `clip`.
    clip
        C: the norm to which the gradient of an example is scaled down.
    """

    noise_multiplier: float
    clip: float


def privacy_of(config: RunConfig) -> str:
    """Say in a word or a line what privacy the examples of a run have, for its manifest, report and card."""
    if not config.dp_epsilon:
        return "none"
    return (
        f"differential privacy of each training example at its client: epsilon {config.dp_epsilon:g} at most, delta "
        f"{config.dp_delta:g}, gradients clipped at {config.dp_clip:g}; numbers of examples are public"
    )


def sample_rate(config: RunConfig, num_examples: int) -> float:
    """Give q, the chance of an example to be in a batch."""
    return min(1.0, config.batch_size / num_examples)


def steps_of_round(config: RunConfig, num_examples: int) -> int:
    """Count the steps of a round: as many as without privacy."""
    return config.local_epochs * math.ceil(num_examples / config.batch_size)


def secret_uniform(size: int) -> Tensor:
    """Draw numbers in (0, 1), float64, from the operating system.

    PyTorch's own generator on a CPU starts from 32 bits, which can all be tried.
    """
    words = torch.frombuffer(bytearray(os.urandom(8 * size)), dtype=torch.int64) if size else torch.zeros(0).long()
    return ((words & (2**53 - 1)).double() + 0.5) * 2.0**-53


def secret_normal(size: int, *, uniform: Uniform = secret_uniform) -> Tensor:
    """Draw numbers of N(0, 1), float64."""
    normal: Tensor = torch.special.ndtri(uniform(size))
    return normal


def fit_privately(
    model: AdaptedModel,
    head: Mapping[str, Tensor],
    examples: Examples,
    *,
    classes: Sequence[int],
    trainable: frozenset[str],
    config: RunConfig,
    task_id: int,
    round_in_task: int,
    privacy: Privacy,
    uniform: Uniform = secret_uniform,
) -> FitResult:
    """Train a loaded model as `train.fit` does, by private steps.

    Parameters
    ----------
    model, head, examples, classes, trainable, config, task_id, round_in_task
        As of `train.fit`.
    privacy
        The bound on an example's gradient, and the noise.
    uniform
        Draws batches and noise; any other than the default is for tests.

    Returns
    -------
    As of `train.fit`, with a mean loss of NaN: it would tell of the examples.

    Raises
    ------
    ConfigError
        If the backbone mixes examples, so that none has a gradient of its own.
    """
    device = next(model.parameters()).device
    inputs, labels = examples.inputs.to(device), examples.labels.to(device)
    compared = torch.tensor(sorted(classes), device=device)
    targets = torch.searchsorted(compared, labels)
    rows = {name: nn.Parameter(value.to(device, copy=True)) for name, value in head.items()}
    num_steps, rate = steps_of_round(config, len(examples)), sample_rate(config, len(examples))
    recipe = Recipe(
        model.train_only(trainable),
        list(rows.values()),
        config=config,
        task_id=task_id,
        round_in_task=round_in_task,
        num_steps=num_steps,
    )
    model.eval()
    for _ in range(num_steps):
        batch = (uniform(len(examples)) < rate).nonzero().flatten().to(device)
        total = _clipped_sum(model, rows, inputs[batch], targets[batch], compared, config=config, clip=privacy.clip)
        noisy = {
            key: (value + privacy.noise_multiplier * privacy.clip * _normal(value, uniform)) / (rate * len(examples))
            for key, value in total.items()
        }
        for key, factor in model.named_factors().items():
            factor.grad = noisy.get(key)
        for name, row in rows.items():  # of the others nothing is asked
            row.grad = torch.zeros_like(row).index_copy_(0, compared, noisy[f"head/{name}"])
        recipe.follow()
    return FitResult(
        adapters=model.factors(),
        head={name: value.detach().cpu() for name, value in rows.items()},
        mean_loss=math.nan,
    )


def example_gradients(
    model: AdaptedModel,
    rows: Mapping[str, Tensor],
    inputs: Tensor,
    targets: Tensor,
    compared: Tensor,
    *,
    config: RunConfig,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Give the gradients of each example's own cross-entropy.

    Parameters
    ----------
    model, rows
        The model, and the class rows (C, ...).
    inputs, targets
        n examples, and the place of each one's class in `compared`.
    compared
        (k,) the classes that the loss compares.
    config
        Precision and augmentation.

    Returns
    -------
    By ``lora_A/<module>`` and ``lora_B/<module>`` (n, ...), float32, of the factors that are trained; and of the rows
    what theirs are the products of: that of each score (n, k), and the features (n, d). An example's gradient of the
    weight is (k, d), their outer product, that of the bias is the first alone.
    """
    with _recorded(model, len(targets)) as of_pairs:
        with autocast(inputs.device, config.precision):
            features = model.backbone(inputs, augment=config.augment).float()
        scores = logits(rows, features, compared)
        scores.retain_grad()
        F.cross_entropy(scores, targets, reduction="sum").backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    return of_pairs, scores.grad, features.detach()


def _clipped_sum(
    model: AdaptedModel,
    rows: Mapping[str, Tensor],
    inputs: Tensor,
    targets: Tensor,
    compared: Tensor,
    *,
    config: RunConfig,
    clip: float,
) -> dict[str, Tensor]:
    """Sum the gradients of examples, each scaled down to a norm of `clip` over all that is trained.

    Returns
    -------
    By ``lora_A/<module>`` and ``lora_B/<module>`` of what is trained, ``head/weight`` (k, d) and ``head/bias`` (k,) of
    the rows that are compared.
    """
    if not len(targets):  # Poisson draws that too
        factors = {key: factor for key, factor in model.named_factors().items() if factor.requires_grad}
        return {key: torch.zeros_like(factor) for key, factor in factors.items()} | {
            f"head/{name}": torch.zeros_like(row[compared]) for name, row in rows.items()
        }
    of_pairs, of_scores, features = example_gradients(model, rows, inputs, targets, compared, config=config)
    square = of_scores.square().sum(1) * (features.square().sum(1) + 1)  # (n,) of the rows
    for gradients in of_pairs.values():
        square = square + gradients.flatten(1).square().sum(1)
    finite = square.isfinite()
    share = torch.where(finite, (clip / square.sqrt().clamp(min=1e-30)).clamp(max=1), 0)  # (n,)
    if not finite.all():  # an overflow: the example takes no part
        of_pairs = {key: gradients[finite] for key, gradients in of_pairs.items()}
        of_scores, features, share = of_scores[finite], features[finite], share[finite]
    total = {key: torch.einsum("n,n...->...", share, gradients) for key, gradients in of_pairs.items()}
    scaled = share[:, None] * of_scores  # (n, k)
    return total | {"head/weight": scaled.T @ features, "head/bias": scaled.sum(0)}


@contextmanager
def _recorded(model: AdaptedModel, num_examples: int) -> Iterator[dict[str, Tensor]]:
    """Fill in, while a backward pass runs, each example's gradients of the factors, by ``lora_A/<module>`` or so."""
    found: dict[str, Tensor] = {}

    def listen(name: str, layer: FusedLinear) -> Callable[..., None]:
        def after_forward(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if len(inputs[0]) != num_examples:
                raise ConfigError(
                    f"dp-epsilon: layer {name} reads {len(inputs[0])} rows for {num_examples} examples, so that no "
                    "example has a gradient of its own; leave the layer out (lora-targets, lora-blocks), or take "
                    "another backbone"
                )

            def after_backward(gradient: Tensor) -> None:
                for factor, value in _of_pair(layer, inputs[0].detach(), gradient).items():
                    key = f"{factor}/{name}"
                    found[key] = found[key] + value if key in found else value  # a layer may be used twice

            if output.requires_grad:
                output.register_hook(after_backward)  # type: ignore[no-untyped-call]

        return after_forward

    handles = [layer.register_forward_hook(listen(name, layer)) for name, layer in model.layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _of_pair(layer: FusedLinear, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """Give the gradients of a layer's trained factors from its input (n, ..., d_in) and y (n, ..., d_out)."""
    lora_A, lora_B = layer.lora_A[_PAIR].weight, layer.lora_B[_PAIR].weight
    scaling = layer.scaling[_PAIR]
    y = gradient.flatten(1, -2) if gradient.dim() > 2 else gradient[:, None]  # (n, T, d_out)
    rows = x.reshape(len(y), -1, x.shape[-1]).to(y.dtype)  # (n, T, d_in)
    found = {}
    if lora_A.requires_grad:
        of_inner = (y @ lora_B.to(y.dtype)).mul_(scaling)  # (n, T, rank)
        found["lora_A"] = (of_inner.mT @ rows).float()
    if lora_B.requires_grad:
        inner = (rows @ lora_A.to(y.dtype).T).mul_(scaling)  # (n, T, rank)
        found["lora_B"] = (inner.mT @ y).mT.float()
    return found


def _normal(like: Tensor, uniform: Uniform) -> Tensor:
    return secret_normal(like.numel(), uniform=uniform).view(like.shape).to(like)


def require_possible(config: RunConfig, model: AdaptedModel, *, method: Method, head: Head) -> None:
    """Refuse settings under which more would leave a client than private steps cover.

    Raises
    ------
    ConfigError
        If there are such; the message names the setting and what to take in its place.
    """
    odd = {
        "follow-drift sends sums over how features have moved; set follow-drift=false": (
            head.collects_sums and config.follow_drift and config.rounds_per_task > 0
        ),
        f"head={config.head} sums features, which feature-norm={config.feature_norm} leaves of any length; set "
        "feature-norm=rms": head.collects_sums and config.feature_norm != "rms",
        f"rows-start={config.rows_start} sends class means; set rows-start=zero": config.rows_start != "zero",
        f"penalty={config.penalty} has no part in an example's own gradient; set penalty=none": (
            config.penalty != "none"
        ),
        f"backbone={config.backbone} is a language model; take one that gives features": isinstance(
            model.backbone, LanguageBackbone
        ),
        f"method={config.method} trains slots; take one that trains one adapter": isinstance(method, SlotAggregator),
        f"method={config.method} sends second moments of the layers' inputs; take another": method.sends_grams,
        f"method={config.method} trains more than pairs of low rank; take another": any(
            type(layer) is not FusedLinear for layer in model.layers.values()
        ),
    }
    if reasons := [reason for reason, is_so in odd.items() if is_so]:
        raise ConfigError(f"dp-epsilon {config.dp_epsilon:g}: {'; '.join(reasons)}")
