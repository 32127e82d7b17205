"""Where a run's settings come from: the app's defaults, a preset or file, the command line."""

import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

from fedtalora_flwr.config import ConfigError, Scalar, parse_assignment, unknown_key
from fedtalora_flwr.config.joined import JOIN, Part, joined, parts_of

_PATHS = ("data-path", "test-path", "data-root", "backbone-checkpoint")
_BASE = "base"  # of a settings file alone: the file it builds on


@cache
def app_folder() -> Path:
    """Find the Flower app, with the presets: the checkout that this library runs from, else what was installed with it.

    Raises
    ------
    ConfigError
        If neither is there.
    """
    checkout = Path(__file__).parents[2]
    if (checkout / "server_app" / "app.py").is_file():
        return checkout
    for file in distribution("fedtalora").files or ():
        if file.parts[-3:] == ("share", "fedtalora", "pyproject.toml"):
            return Path(str(file.locate())).resolve().parent
    raise ConfigError("the Flower app (share/fedtalora) was not installed with the library; install fedtalora anew")


def cache_folder() -> Path:
    """Name the folder of what this machine keeps between runs: ``$FEDTALORA_CACHE``, else ``~/.cache/fedtalora``."""
    return Path(os.environ.get("FEDTALORA_CACHE") or Path.home() / ".cache" / "fedtalora")


def defaults(app: Path) -> dict[str, Scalar]:
    """Read all settings' defaults from the app's ``pyproject.toml``."""
    with (app / "pyproject.toml").open("rb") as file:
        settings: dict[str, Scalar] = tomllib.load(file)["tool"]["flwr"]["app"]["config"]
    return settings


def with_later(settings: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Give a run's settings and, of those that came after it, the defaults: these say what was done before."""
    return {**defaults(app_folder()), **settings}


def presets(app: Path) -> dict[str, Path]:
    """List the presets by name."""
    return {path.stem: path for path in sorted((app / "experiments").glob("*.toml"))}


def sweeps(app: Path) -> dict[str, Path]:
    """List the sweeps by name."""
    return {path.stem: path for path in sorted((app / "experiments" / "sweeps").glob("*.toml"))}


def preset_file(app: Path, name: str) -> Path:
    """Find a preset.

    Raises
    ------
    ConfigError
        If there is none of that name; the message lists what there is.
    """
    known = presets(app)
    if name not in known:
        raise ConfigError(f"no preset {name!r}; there are: {', '.join(known)}")
    return known[name]


def read_file(path: Path, known: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Read settings from a flat TOML or JSON file (a run's ``config.json`` does).

    A file may build on another one: ``base = "name"`` takes the settings of ``name.toml`` beside it, and its own win.

    Raises
    ------
    ConfigError
        If a file is not there, is neither, or holds an unknown key, or a file is its own base.
    """
    settings: dict[str, Scalar] = {}
    chain = [path]
    while True:
        own = _read_flat(chain[-1])
        base = own.pop(_BASE, None)
        for key in own:
            if key not in known:
                raise ConfigError(f"{chain[-1]}: {unknown_key(key, known)}")
        settings = own | settings
        if base is None:
            return settings
        chain.append(_base_file(chain[-1], base))
        if chain[-1] in chain[:-1]:
            raise ConfigError(f"{path}: base goes round in a circle: {' -> '.join(file.stem for file in chain)}")


def _base_file(path: Path, base: Scalar) -> Path:
    file = path.with_name(f"{base}.toml")
    if not file.is_file():
        there = ", ".join(sorted(other.stem for other in path.parent.glob("*.toml") if other != path))
        raise ConfigError(f"{path}: base {base!r} names no file beside it; there are: {there or 'none'}")
    return file


def _read_flat(path: Path) -> dict[str, Scalar]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such settings file")
    try:
        text = path.read_text(encoding="utf-8")
        settings = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: holds {type(settings).__name__}; write a flat object of settings")
    return settings


def gather(
    app: Path, *, file: Path | None, assignments: Iterable[str], values: Mapping[str, Scalar] | None = None
) -> dict[str, Scalar]:
    """Put defaults, a file, values and ``key=value`` assignments together, later ones winning; paths become absolute.

    The app runs in a folder of its own, so a relative path would point elsewhere there.

    Raises
    ------
    ConfigError
        If a file or an assignment cannot be read, or a value has an unknown key.
    """
    known = defaults(app)
    settings = {**known, **(read_file(file, known) if file else {})}
    for key in values or {}:
        if key not in known:
            raise ConfigError(unknown_key(key, known))
    settings |= values or {}
    settings |= dict(parse_assignment(text, known) for text in assignments)
    if not settings["data-root"]:
        settings["data-root"] = os.environ.get("FEDTALORA_DATA", "")
    settings = with_absolute_paths(settings)
    settings["backbone"] = _with_absolute_folder(str(settings["backbone"]))
    settings["dataset"] = _with_absolute_parts(str(settings["dataset"]))
    return settings


def with_absolute_paths(settings: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Give settings whose paths are absolute: the app runs in a folder of its own."""
    paths = {key: _absolute(str(settings[key])) for key in _PATHS if settings.get(key)}
    return {**settings, **paths}


def _with_absolute_folder(choice: str) -> str:
    """Make the folder absolute that hub:<name>, hf:<name> or timm:local-dir:<name> may stand for."""
    kind, colon, argument = choice.rpartition(":")
    if colon and kind != "timm:hf-hub" and Path(argument).expanduser().exists():
        return f"{kind}:{_absolute(argument)}"
    return choice


def _with_absolute_parts(dataset: str) -> str:
    if not dataset.startswith(JOIN):
        return _with_absolute_folder(dataset)
    parts = [
        Part(_with_absolute_folder(part.dataset), part.path and _absolute(part.path)) for part in parts_of(dataset)
    ]
    try:
        return joined(parts)
    except ValueError as error:
        raise ConfigError(f"dataset: {error}") from None


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())
