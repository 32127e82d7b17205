"""Read a sweep file: which runs it asks for.

A sweep file is TOML. Its first lines, comments, say what it answers. Then, all of it optional::

    preset = "clinc150"              # or config = "file.toml"; else the defaults
    seeds = [0, 1, 2]                # the table gives mean and spread over them
    engine = "process"               # or ray, as fedtalora run --engine
    jobs = 2                         # runs side by side; by default as many as the machine carries
    compare = "residual"             # the axis whose values are set against its first one, by default the first axis

    [settings]                       # of every run
    max-per-class = 20

    [grid]                           # an axis: a setting and its values
    residual = ["accumulate", "off"]

    [grid.data]                      # or named sets of settings
    alpha-2 = { partition = "quantity", classes-per-client = 2 }
    beta-0.1 = { partition = "dirichlet", dirichlet-beta = 0.1 }

Every combination of the axes is a case, and is run once a seed.
"""

import itertools
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedtalora_flwr.config import ConfigError, RunConfig, Scalar
from fedtalora_flwr.config.sources import gather, preset_file
from fedtalora_flwr.launch.engine import ENGINES

_KEYS = ("preset", "config", "seeds", "engine", "jobs", "compare", "settings", "grid")
_TAKEN = ("set-aside", "index.html", "results.md", "results.csv", "runs.csv", "cases.svg")  # of the sweep's folder


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    Parameters
    ----------
    name
        Of its folder.
    labels
        Its value on each axis, worded.
    config
        Its settings; ``out`` is not set yet.
    """

    name: str
    labels: tuple[str, ...]
    config: RunConfig


@dataclass(frozen=True)
class Plan:
    """A sweep.

    Parameters
    ----------
    name, about
        The file's name and the comment at its head.
    axes
        Name and worded values of each axis.
    compare
        Number of the axis whose values are compared; None without axes.
    runs
        Case by case, a case's seeds together.
    engine
        How a run is played.
    jobs
        Runs side by side; 0 leaves it to the machine.
    """

    name: str
    about: str
    axes: Mapping[str, tuple[str, ...]]
    compare: int | None
    runs: tuple[PlannedRun, ...]
    engine: str
    jobs: int


def read_plan(app: Path, file: Path, *, assignments: Sequence[str] = ()) -> Plan:
    """Read a sweep file; `assignments` (``key=value``) win over it in every run.

    Raises
    ------
    ConfigError
        If the file cannot be read, or a run's settings cannot be; the message names the run.
    """
    content, about = _read(file)
    axes = {name: _axis(file, name, values) for name, values in content.get("grid", {}).items()}
    varied = [(name, key) for name, choices in axes.items() for key in set().union(*choices.values())]
    varied += [("seeds", "seed")] if "seeds" in content else []
    assigned = {text.partition("=")[0].strip() for text in assignments}
    for index, (name, key) in enumerate(varied):
        if key in assigned:
            raise ConfigError(f"{file}: --set {key} would undo the axis {name!r}; leave one of the two out")
        if other := next((before for before, same in varied[:index] if same == key), ""):
            raise ConfigError(f"{file}: {other!r} and {name!r} both set {key}; one would undo the other")
    compared = str(content.get("compare", next(iter(axes), "")))
    if compared and compared not in axes:
        raise ConfigError(f"{file}: compare = {compared!r} names no axis; there are: {', '.join(axes) or 'none'}")
    base = _base_file(app, file, content)
    common, seeds = content.get("settings", {}), content.get("seeds")
    if seeds is not None and not (_are_seeds(seeds) and len(set(seeds)) == len(seeds)):
        raise ConfigError(f"{file}: seeds must be a list of different whole numbers, got {seeds!r}")
    runs = []
    for labels in itertools.product(*axes.values()):
        chosen = [axes[name][label] for name, label in zip(axes, labels, strict=True)]
        for seed in seeds or [None]:
            values: dict[str, Scalar] = dict(common)
            for one in chosen:
                values |= one
            values |= {} if seed is None else {"seed": seed}
            name = _folder_name(labels, axes, seed)
            try:
                config = RunConfig.parse(gather(app, file=base, values=values, assignments=assignments))
            except ConfigError as error:
                raise ConfigError(f"{file}, run {name}: {error}") from None
            runs.append(PlannedRun(name, labels, config))
    names = [run.name for run in runs]
    if taken := next((name for name in names if name in _TAKEN or name.startswith(".")), ""):
        raise ConfigError(f"{file}: a run cannot have the folder {taken}; give the value another name")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{file}: two runs would share the folder {twice[0]}; give the values other names")
    return Plan(
        name=file.stem,
        about=about,
        axes={name: tuple(values) for name, values in axes.items()},
        compare=list(axes).index(compared) if compared else None,
        runs=tuple(runs),
        engine=content.get("engine", "process"),
        jobs=content.get("jobs", 0),
    )


def narrowed(plan: Plan, only: Sequence[str]) -> Plan:
    """Keep the runs that have the given values (``axis=value``); several values of an axis are alternatives.

    Raises
    ------
    ConfigError
        If the sweep has no such axis, or that axis no such value.
    """
    wanted: dict[str, set[str]] = {}
    for text in only:
        name, _, value = text.partition("=")
        if name not in plan.axes:
            raise ConfigError(f"--only {text}: the sweep has no axis {name!r}; it has {', '.join(plan.axes) or 'none'}")
        if value not in plan.axes[name]:
            raise ConfigError(f"--only {text}: {name} has no {value!r}; it has {', '.join(plan.axes[name])}")
        wanted.setdefault(name, set()).add(value)
    axes = {
        name: tuple(value for value in values if value in wanted.get(name, values))
        for name, values in plan.axes.items()
    }
    kept = (run for run in plan.runs if all(label in axes[name] for name, label in zip(axes, run.labels, strict=True)))
    return replace(plan, axes=axes, runs=tuple(kept))


def _read(file: Path) -> tuple[dict[str, Any], str]:
    try:
        text = file.read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: {error}") from None
    for key in content:
        if key not in _KEYS:
            raise ConfigError(f"{file}: a sweep knows no {key!r}; it has {', '.join(_KEYS)}; settings go in [settings]")
    if content.get("engine", "process") not in ENGINES:
        raise ConfigError(f"{file}: engine must be one of {', '.join(ENGINES)}, got {content['engine']!r}")
    for key in ("settings", "grid"):
        if not isinstance(content.get(key, {}), dict):
            raise ConfigError(
                f"{file}: {key} must be a table, [{key}] with a line for each entry, got {content[key]!r}"
            )
    if type(jobs := content.get("jobs", 0)) is not int or jobs < 0:
        raise ConfigError(f"{file}: jobs must be a whole number, 0 for as many as the machine carries, got {jobs!r}")
    if "preset" in content and "config" in content:
        raise ConfigError(f"{file}: give preset or config, not both")
    head = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return content, " ".join(line.lstrip("# ") for line in head).strip()


def _are_seeds(seeds: Any) -> bool:
    return isinstance(seeds, list) and bool(seeds) and all(type(seed) is int for seed in seeds)


def _base_file(app: Path, file: Path, content: Mapping[str, Any]) -> Path | None:
    if "preset" in content:
        return preset_file(app, str(content["preset"]))
    return file.parent / str(content["config"]) if "config" in content else None


def _axis(file: Path, name: str, values: Any) -> dict[str, Mapping[str, Scalar]]:
    """Give the settings of each value of an axis by its word."""
    if isinstance(values, list) and values:
        words = [_word(value) for value in values]
        if twice := next((word for word in words if words.count(word) > 1), ""):
            raise ConfigError(f"{file}: axis {name!r} has {twice} twice")
        return {word: {name: value} for word, value in zip(words, values, strict=True)}
    if isinstance(values, dict) and values and all(isinstance(one, dict) for one in values.values()):
        return dict(values)
    raise ConfigError(
        f"{file}: axis {name!r} must be a list of values of that setting, or a table of named sets of settings "
        f"(name = {{ key = value }}), got {values!r}"
    )


def _word(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _folder_name(labels: tuple[str, ...], axes: Mapping[str, Mapping[str, Mapping[str, Scalar]]], seed: Any) -> str:
    parts = []
    for (name, values), label in zip(axes.items(), labels, strict=True):
        parts.append(f"{name}-{label}" if values[label].keys() == {name} else label)
    parts += [] if seed is None else [f"seed-{seed}"]
    return re.sub(r"[^\w.+-]+", "-", "_".join(parts)) or "run"
