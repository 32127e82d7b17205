"""Where a run's settings come from: the app's defaults, a preset or file, the command line."""

import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedtalora_flwr.config import MAY_CHANGE_ON_RESUME, ConfigError, Scalar, parse_assignment, unknown_key

_PATHS = ("data-path", "test-path", "data-root", "backbone-checkpoint")
_BASE = "base"  # of a settings file alone: the file it builds on


def app_folder() -> Path:
    """Find the Flower app: the checkout that this library is installed from, else the current folder.

    Raises
    ------
    ConfigError
        If neither holds it.
    """
    for folder in (Path(__file__).parents[1], Path.cwd()):
        if (folder / "pyproject.toml").is_file() and (folder / "server_app" / "app.py").is_file():
            return folder
    raise ConfigError(
        "the Flower app (pyproject.toml, server_app/, client_app/) is not beside the installed library; run this in "
        "a checkout of fedtalora, installed with make install"
    )


def cache_folder() -> Path:
    """Name the folder of what this machine keeps between runs: ``$FEDTALORA_CACHE``, else ``~/.cache/fedtalora``."""
    return Path(os.environ.get("FEDTALORA_CACHE") or Path.home() / ".cache" / "fedtalora")


def defaults(app: Path) -> dict[str, Scalar]:
    """Read all settings' defaults from the app's ``pyproject.toml``."""
    with (app / "pyproject.toml").open("rb") as file:
        settings: dict[str, Scalar] = tomllib.load(file)["tool"]["flwr"]["app"]["config"]
    return settings


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
    settings = _with_absolute_paths(settings)
    for key in ("dataset", "backbone"):  # hub:<name>, hf:<name> and timm:local-dir:<name> may name a local folder
        choice, colon, argument = str(settings[key]).rpartition(":")
        if colon and choice != "timm:hf-hub" and Path(argument).expanduser().exists():
            settings[key] = f"{choice}:{_absolute(argument)}"
    return settings


def resumed(app: Path, folder: Path, *, assignments: Iterable[str]) -> dict[str, Scalar]:
    """Give the settings with which a stopped run goes on: its own, but for what may change.

    Raises
    ------
    ConfigError
        If the folder holds no run or a finished one, or an assignment changes what the run is.
    """
    known = defaults(app)
    changes = dict(parse_assignment(text, known) for text in assignments)
    if not changes.keys() <= MAY_CHANGE_ON_RESUME:
        allowed = ", ".join(sorted(MAY_CHANGE_ON_RESUME - {"out", "resume"}))
        raise ConfigError(f"--resume goes on with the run's own settings; --set may change only {allowed}")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is no run folder: it has no config.json")
    if (folder / "metrics.json").is_file():
        raise ConfigError(f"{folder} is finished: it has metrics.json; fedtalora report {folder} shows it")
    # A run that was stopped before its first checkpoint begins anew.
    started = (folder / "checkpoint" / "latest.json").is_file()
    return {**read_file(folder / "config.json", known), "resume": started, **_with_absolute_paths(changes)}


def _with_absolute_paths(settings: Mapping[str, Scalar]) -> dict[str, Scalar]:
    paths = {key: _absolute(str(settings[key])) for key in _PATHS if settings.get(key)}
    return {**settings, **paths}


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())
