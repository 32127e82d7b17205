"""The run's settings: parsed once, from Flower's flat kebab-case run-config, into a frozen `RunConfig`.

Defaults live in ``pyproject.toml`` alone; here are the types and what makes a value impossible.
"""

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fedtalora_flwr import registry

# Where and how a run is carried out, which a resumed run may do otherwise; all else is what the run is.
MAY_CHANGE_ON_RESUME = frozenset(
    {
        *(
            "out",
            "resume",
            "resume-from",
            "keep-checkpoints",
            "device",
            "cache-gb",
            "base-cache-gb",
            "check-data",
            "data-root",
        ),
        *("norm-limit", "round-timeout", "close-after", "node-timeout"),
    }
)

Scalar = str | int | float | bool


class ConfigError(ValueError):
    """A setting that cannot be; the message names the key, the value and the fix."""


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run; ``pyproject.toml`` explains each and holds its default."""

    method: str
    residual: str
    residual_energy: float
    clusters: int
    signature: str
    stray_share: float
    min_slot_share: float
    verify: bool
    dataset: str
    data_path: str
    test_path: str
    data_root: str
    input_column: str
    label_column: str
    test_fraction: float
    max_per_class: int
    max_test_per_class: int
    check_data: bool
    cache_gb: float
    base_cache_gb: float
    num_tasks: int
    stop_after_task: int
    task_order: str
    partition: str
    classes_per_client: int
    dirichlet_beta: float
    num_clients: int
    fraction_train: float
    min_replies: int
    norm_limit: float
    outlier_limit: float
    aggregation_weights: str
    suspects: float
    max_weight: float
    max_change: float
    wire_dtype: str
    round_timeout: float
    close_after: float
    node_timeout: float
    rounds_per_task: int
    task_average: bool
    local_epochs: int
    batch_size: int
    optimizer: str
    learning_rate: float
    head_learning_rate: float
    later_learning_rate: float
    momentum: float
    weight_decay: float
    lr_schedule: str
    warmup: float
    clip_norm: float
    loss_classes: str
    rows_start: str
    penalty: str
    penalty_weight: float
    augment: str
    backbone: str
    backbone_checkpoint: str
    image_size: int
    max_length: int
    feature_norm: str
    rank: int
    alpha: float
    lora_blocks: str
    lora_targets: str
    head: str
    ridge_lambda: float
    ridge_features: int
    lda_shrinkage: float
    follow_drift: bool
    drift_views: int
    min_class_examples: int
    eval_every: int
    eval_batch_size: int
    device: str
    precision: str
    threads: int
    seed: int
    out: str
    resume: bool
    resume_from: int
    keep_checkpoints: int

    @classmethod
    def parse(cls, run_config: Mapping[str, Any]) -> "RunConfig":
        """Parse Flower's run-config.

        Parameters
        ----------
        run_config
            Every key of ``[tool.flwr.app.config]``, kebab-case; an int does for a float.

        Raises
        ------
        ConfigError
            If a key is unknown or missing, or a value has another type or is impossible.
        """
        known = {kebab(f.name): f.type for f in fields(cls)}
        for key in run_config:
            if key not in known:
                raise ConfigError(unknown_key(key, known))
        missing = [key for key in known if key not in run_config]
        if missing:
            raise ConfigError(f"settings are missing: {', '.join(missing)}")
        config = cls(**{snake(k): _typed(k, v, known[k]) for k, v in run_config.items()})  # type: ignore[arg-type]
        for key, (holds, wanted) in _RULES.items():
            value = getattr(config, snake(key))
            if not holds(value):
                raise ConfigError(f"{key} must be {wanted}, got {value!r}")
        _check_choices(config)
        _check_together(config)
        return config

    def flat(self) -> dict[str, Scalar]:
        """Give the settings back under their kebab-case keys."""
        return {kebab(key): value for key, value in asdict(self).items()}

    @property
    def last_task(self) -> int:
        """Number of tasks that are run: `stop_after_task`, or all of them."""
        return self.stop_after_task or self.num_tasks


def kebab(name: str) -> str:
    """Turn a field's name into its key."""
    return name.replace("_", "-")


def snake(key: str) -> str:
    """Turn a key into its field's name."""
    return key.replace("-", "_")


def unknown_key(key: str, known: Mapping[str, Any]) -> str:
    """Word the error for a key that is not known, with the nearest one that is."""
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "fedtalora run --list-settings lists what there is"
    return f"unknown setting {key!r}; {hint}"


def parse_assignment(text: str, defaults: Mapping[str, Scalar]) -> tuple[str, Scalar]:
    """Parse ``key=value`` of the command line by the type of the key's default.

    Raises
    ------
    ConfigError
        If there is no ``=``, the key is unknown, or the value is not of the key's type.
    """
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        raise ConfigError(f"--set takes key=value, got {text!r}")
    if key not in defaults:
        raise ConfigError(unknown_key(key, defaults))
    kind = type(defaults[key])
    if kind is str:
        return key, value.strip("'\"")
    try:
        return key, _typed(key, json.loads(value), kind)
    except json.JSONDecodeError:
        raise ConfigError(f"{key} takes {_KINDS[kind]}, got {value!r}") from None


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _typed(key: str, value: Any, kind: Any) -> Scalar:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{key} takes {_KINDS[kind]}, got {value!r}")
    checked: Scalar = value
    return checked


def _one_of(*choices: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in choices, "one of " + ", ".join(choices)


def _at_least(low: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value >= low, f"at least {low}"


def _between(low: int, high: int) -> tuple[Callable[[Any], bool], str]:
    """Bound what a client would set memory aside for because a server says so, far above what is of use."""
    return lambda value: low <= value <= high, f"from {low} to {high}"


_POSITIVE: tuple[Callable[[Any], bool], str] = (lambda value: 0 < value < float("inf"), "above 0")
_NOT_NEGATIVE: tuple[Callable[[Any], bool], str] = (lambda value: 0 <= value < float("inf"), "at least 0")

_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "residual": _one_of("accumulate", "replace", "off"),
    "residual-energy": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "clusters": _at_least(0),
    "signature": _one_of("product", "lora_B", "raw"),
    "stray-share": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "min-slot-share": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "test-fraction": (lambda value: 0 < value < 1, "between 0 and 1"),
    "max-per-class": _at_least(0),
    "max-test-per-class": _at_least(0),
    "cache-gb": _POSITIVE,
    "base-cache-gb": _NOT_NEGATIVE,
    "num-tasks": _between(1, 10_000),
    "stop-after-task": _at_least(0),
    "task-order": _one_of("seeded", "given", "domain"),
    "classes-per-client": _at_least(1),
    "dirichlet-beta": _POSITIVE,
    "num-clients": _between(1, 10_000),
    "fraction-train": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "min-replies": _at_least(1),
    "norm-limit": _POSITIVE,
    "outlier-limit": _NOT_NEGATIVE,
    "aggregation-weights": _one_of("examples", "equal", "geometric-median", "multi-krum", "trimmed"),
    "suspects": (lambda value: 0 <= value < 0.5, "at least 0 and below 0.5"),
    "max-weight": (lambda value: value == 0 or 1 <= value < float("inf"), "0, or at least 1"),
    "max-change": _NOT_NEGATIVE,
    "wire-dtype": _one_of("fp32", "fp16"),
    "round-timeout": _POSITIVE,
    "close-after": _NOT_NEGATIVE,
    "node-timeout": _POSITIVE,
    "rounds-per-task": _at_least(0),
    "local-epochs": _at_least(1),
    "batch-size": _between(1, 4096),
    "optimizer": _one_of("adamw", "sgd"),
    "learning-rate": _NOT_NEGATIVE,
    "head-learning-rate": _NOT_NEGATIVE,
    "later-learning-rate": _NOT_NEGATIVE,
    "momentum": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "weight-decay": _NOT_NEGATIVE,
    "lr-schedule": _one_of("constant", "cosine"),
    "warmup": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "clip-norm": _NOT_NEGATIVE,
    "loss-classes": _one_of("task", "present", "seen"),
    "rows-start": _one_of("zero", "means"),
    "augment": _one_of("none", "flip", "crop-flip"),
    "image-size": _between(0, 2048),
    "max-length": _between(2, 8192),
    "feature-norm": _one_of("rms", "none"),
    "rank": _at_least(1),
    "alpha": _POSITIVE,
    "penalty-weight": _NOT_NEGATIVE,
    "ridge-lambda": _NOT_NEGATIVE,
    "ridge-features": _between(0, 10_000),
    "lda-shrinkage": _POSITIVE,
    "drift-views": _between(0, 64),
    "min-class-examples": _at_least(1),
    "eval-every": _at_least(0),
    "eval-batch-size": _between(1, 4096),
    "precision": _one_of("auto", "fp32", "bf16"),
    "threads": _between(1, 1024),
    "resume-from": _at_least(0),
    "keep-checkpoints": _at_least(1),
    "seed": (lambda value: 0 <= value < 2**63, "at least 0 and below 2^63"),
}


def _check_choices(config: RunConfig) -> None:
    """Check that there is a file for each setting whose value names one."""
    for key, package in registry.PACKAGES.items():
        try:
            registry.require(package, getattr(config, key))
        except ValueError as unknown:
            raise ConfigError(f"{key}: {unknown}") from None


def _check_together(config: RunConfig) -> None:
    """Check settings that bind each other; what needs the data or the model is checked where that is known."""
    if config.stop_after_task > config.num_tasks:
        raise ConfigError(
            f"stop-after-task {config.stop_after_task} is beyond num-tasks {config.num_tasks}; 0 runs all tasks"
        )
    if config.min_replies > config.num_clients:
        raise ConfigError(
            f"min-replies {config.min_replies} can never be met by num-clients {config.num_clients}; lower it"
        )
    if config.rounds_per_task == 0 and config.head == "linear":
        raise ConfigError("rounds-per-task 0 trains nothing; head = ridge and head = lda learn without training rounds")
