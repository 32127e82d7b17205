"""The run's settings: parsed once, from Flower's flat kebab-case run-config, into a frozen `RunConfig`.

Defaults live in ``pyproject.toml`` alone; here are the types and what makes a value impossible.
"""

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache, cached_property
from typing import Annotated, Any, get_type_hints

from fedtalora_flwr.config import registry
from fedtalora_flwr.config.joined import parts_of

# Settings that say where and how a run is carried out. A resumed run may change them; the others define the run.
MAY_CHANGE_ON_RESUME = frozenset(
    {
        *("out", "resume", "resume-from", "keep-checkpoints", "device", "data-root"),
        *("cache-gb", "base-cache-gb", "check-data", "norm-limit", "round-timeout", "close-after", "node-timeout"),
    }
)

Scalar = str | int | float | bool


class ConfigError(ValueError):
    """A setting that cannot be; the message names the key, the value and the fix."""


@dataclass(frozen=True)
class Rule:
    """What a setting's value must be; beside its field in `RunConfig`.

    Parameters
    ----------
    holds
        Tells whether a value is possible.
    wanted
        Ends the sentence "<key> must be ...".
    """

    holds: Callable[[Any], bool]
    wanted: str


def one_of(*choices: str) -> Rule:
    """Allow these texts."""
    return Rule(lambda value: value in choices, "one of " + ", ".join(choices))


def at_least(low: int) -> Rule:
    """Allow numbers from `low` on."""
    return Rule(lambda value: value >= low, f"at least {low}")


def between(low: int, high: int) -> Rule:
    """Bound what a client would set memory aside for because a server says so, far above what is of use."""
    return Rule(lambda value: low <= value <= high, f"from {low} to {high}")


def _is_ranks(value: str) -> bool:
    return not value or all(part.strip().isdecimal() and int(part) > 0 for part in value.split(","))


RANKS = Rule(_is_ranks, "whole numbers from 1 on with commas between them, as in 2,4,8, or empty")
POSITIVE = Rule(lambda value: 0 < value < float("inf"), "above 0")
NOT_NEGATIVE = Rule(lambda value: 0 <= value < float("inf"), "at least 0")


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run; ``pyproject.toml`` explains each and holds its default."""

    method: str
    residual: Annotated[str, one_of("accumulate", "replace", "off")]
    residual_energy: Annotated[float, Rule(lambda value: 0 < value <= 1, "above 0 and at most 1")]
    server_learning_rate: Annotated[float, POSITIVE]
    core_start: Annotated[str, one_of("random", "weights")]
    clusters: Annotated[int, at_least(0)]
    signature: Annotated[str, one_of("product", "changes", "moments", "lora_B", "raw")]
    stray_share: Annotated[float, Rule(lambda value: 0 <= value < 1, "at least 0 and below 1")]
    shared_rank: Annotated[int, at_least(0)]
    min_slot_share: Annotated[float, Rule(lambda value: 0 <= value < 1, "at least 0 and below 1")]
    verify: bool
    dataset: str
    data_path: str
    test_path: str
    data_root: str
    input_column: str
    label_column: str
    answer_column: str
    test_fraction: Annotated[float, Rule(lambda value: 0 < value < 1, "between 0 and 1")]
    max_per_class: Annotated[int, at_least(0)]
    max_test_per_class: Annotated[int, at_least(0)]
    bad_files: Annotated[str, one_of("error", "skip")]
    folder_layout: Annotated[str, one_of("auto", "class", "task")]
    check_data: bool
    cache_gb: Annotated[float, POSITIVE]
    base_cache_gb: Annotated[float, NOT_NEGATIVE]
    num_tasks: Annotated[int, between(1, 10_000)]
    stop_after_task: Annotated[int, at_least(0)]
    task_order: Annotated[str, one_of("seeded", "given", "domain")]
    partition: str
    classes_per_client: Annotated[int, at_least(1)]
    dirichlet_beta: Annotated[float, POSITIVE]
    num_clients: Annotated[int, between(1, 10_000)]
    fraction_train: Annotated[float, Rule(lambda value: 0 < value <= 1, "above 0 and at most 1")]
    min_replies: Annotated[int, at_least(1)]
    norm_limit: Annotated[float, POSITIVE]
    outlier_limit: Annotated[float, NOT_NEGATIVE]
    aggregation_weights: Annotated[str, one_of("examples", "equal", "geometric-median", "multi-krum", "trimmed")]
    suspects: Annotated[float, Rule(lambda value: 0 <= value < 0.5, "at least 0 and below 0.5")]
    max_weight: Annotated[float, Rule(lambda value: value == 0 or 1 <= value < float("inf"), "0, or at least 1")]
    max_change: Annotated[float, NOT_NEGATIVE]
    wire_dtype: Annotated[str, one_of("fp32", "fp16")]
    round_timeout: Annotated[float, POSITIVE]
    close_after: Annotated[float, NOT_NEGATIVE]
    node_timeout: Annotated[float, POSITIVE]
    rounds_per_task: Annotated[int, at_least(0)]
    task_average: bool
    local_epochs: Annotated[int, at_least(1)]
    batch_size: Annotated[int, between(1, 4096)]
    optimizer: Annotated[str, one_of("adamw", "sgd")]
    learning_rate: Annotated[float, NOT_NEGATIVE]
    head_learning_rate: Annotated[float, NOT_NEGATIVE]
    later_learning_rate: Annotated[float, NOT_NEGATIVE]
    momentum: Annotated[float, Rule(lambda value: 0 <= value < 1, "at least 0 and below 1")]
    weight_decay: Annotated[float, NOT_NEGATIVE]
    lr_schedule: Annotated[str, one_of("constant", "cosine")]
    warmup: Annotated[float, Rule(lambda value: 0 <= value < 1, "at least 0 and below 1")]
    clip_norm: Annotated[float, NOT_NEGATIVE]
    loss_classes: Annotated[str, one_of("task", "present", "seen")]
    rows_start: Annotated[str, one_of("zero", "means")]
    penalty: str
    penalty_weight: Annotated[float, NOT_NEGATIVE]
    augment: Annotated[str, one_of("none", "flip", "crop-flip")]
    dp_epsilon: Annotated[float, Rule(lambda value: value == 0 or 0.1 <= value <= 100, "0, or from 0.1 to 100")]
    dp_delta: Annotated[float, Rule(lambda value: 0 < value < 0.1, "above 0 and below 0.1")]
    dp_clip: Annotated[float, POSITIVE]
    dp_sums_share: Annotated[float, Rule(lambda value: 0 < value < 1, "between 0 and 1")]
    backbone: str
    backbone_checkpoint: str
    image_size: Annotated[int, between(0, 2048)]
    max_length: Annotated[int, between(2, 8192)]
    base_dtype: Annotated[str, one_of("fp32", "bf16")]
    gradient_checkpointing: bool
    feature_norm: Annotated[str, one_of("rms", "none")]
    rank: Annotated[int, at_least(1)]
    ranks: Annotated[str, RANKS]
    alpha: Annotated[float, POSITIVE]
    lora_blocks: str
    lora_targets: str
    head: str
    ridge_lambda: Annotated[float, NOT_NEGATIVE]
    ridge_features: Annotated[int, between(0, 10_000)]
    lda_shrinkage: Annotated[float, POSITIVE]
    follow_drift: bool
    drift_views: Annotated[int, between(0, 64)]
    min_class_examples: Annotated[int, at_least(1)]
    eval_every: Annotated[int, at_least(0)]
    eval_batch_size: Annotated[int, between(1, 4096)]
    device: str
    precision: Annotated[str, one_of("auto", "fp32", "bf16")]
    threads: Annotated[int, between(1, 1024)]
    seed: Annotated[int, Rule(lambda value: 0 <= value < 2**63, "at least 0 and below 2^63")]
    out: str
    resume: bool
    resume_from: Annotated[int, at_least(0)]
    keep_checkpoints: Annotated[int, at_least(1)]

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
        known = _fields()
        for key in run_config:
            if key not in known:
                raise ConfigError(unknown_key(key, known))
        missing = [key for key in known if key not in run_config]
        if missing:
            raise ConfigError(f"settings are missing: {', '.join(missing)}")
        config = cls(**{snake(k): _typed(k, v, known[k][0]) for k, v in run_config.items()})  # type: ignore[arg-type]
        for key, (_, rule) in known.items():
            value = getattr(config, snake(key))
            if rule and not rule.holds(value):
                raise ConfigError(f"{key} must be {rule.wanted}, got {value!r}")
        _check_choices(config)
        _check_together(config)
        return config

    @cached_property
    def settings(self) -> Mapping[str, Scalar]:
        """The settings under the names of their fields, as `create` of a plug-in takes them."""
        return asdict(self)

    def flat(self) -> dict[str, Scalar]:
        """Give the settings back under their kebab-case keys."""
        return {kebab(key): value for key, value in self.settings.items()}

    @property
    def dealt_ranks(self) -> list[int]:
        """Those of `ranks`; none where all clients have the server's."""
        return [int(part) for part in self.ranks.split(",")] if self.ranks else []

    @property
    def largest_rank(self) -> int:
        """That of the server's pairs: the largest of `ranks`, or `rank`."""
        return max(self.dealt_ranks, default=self.rank)

    def rank_of(self, partition_id: int) -> int | None:
        """Give the rank that was agreed with a client; None: the server's, as all have it."""
        dealt = self.dealt_ranks
        return dealt[partition_id % len(dealt)] if dealt else None

    @property
    def last_task(self) -> int:
        """Number of tasks that are run: `stop_after_task`, or all of them."""
        return self.stop_after_task or self.num_tasks

    def evaluates(self, round_in_task: int) -> bool:
        """Tell whether a round, from 0, ends with an evaluation: every `eval_every`, and the last of a task."""
        ends = round_in_task + 1 == max(1, self.rounds_per_task)
        return ends or bool(self.eval_every and (round_in_task + 1) % self.eval_every == 0)

    @property
    def evaluations_per_task(self) -> int:
        """Number of rounds of a task that end with an evaluation, and with feature sums where the head takes them."""
        return sum(self.evaluates(number) for number in range(max(1, self.rounds_per_task)))


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


@cache
def _fields() -> dict[str, tuple[type, Rule | None]]:
    """Give the type and the rule of each setting, by key."""
    hints = get_type_hints(RunConfig, include_extras=True)
    bare = get_type_hints(RunConfig)
    return {
        kebab(f.name): (bare[f.name], next(iter(getattr(hints[f.name], "__metadata__", ())), None))
        for f in fields(RunConfig)
    }


def _typed(key: str, value: Any, kind: Any) -> Scalar:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{key} takes {_KINDS[kind]}, got {value!r}")
    checked: Scalar = value
    return checked


def _check_choices(config: RunConfig) -> None:
    """Check that there is a file for each setting whose value names one."""
    chosen = [(package, str(getattr(config, key))) for key, package in registry.PACKAGES.items()]
    chosen += [(registry.PACKAGES["dataset"], part.dataset) for part in parts_of(config.dataset)]
    for package, name in chosen:
        try:
            registry.require(package, name)
        except ValueError as unknown:
            raise ConfigError(str(unknown)) from unknown.__cause__


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
    if config.head == "lm" and (config.rows_start != "zero" or config.penalty != "none"):
        raise ConfigError(
            f"head lm has no class rows and no features: set rows-start=zero and penalty=none, got "
            f"{config.rows_start} and {config.penalty}"
        )
    if config.rounds_per_task == 0 and config.head in ("linear", "lm"):
        raise ConfigError(
            "rounds-per-task 0 trains nothing; head = ridge, lda and prototype learn without training rounds"
        )
