"""The settings with which a stopped run goes on."""

from collections.abc import Iterable
from pathlib import Path

from fedtalora_flwr.config import MAY_CHANGE_ON_RESUME, ConfigError, Scalar, parse_assignment
from fedtalora_flwr.config.sources import defaults, read_file, with_absolute_paths, with_later
from fedtalora_flwr.run_folder import names


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
    if not (folder / names.CONFIG).is_file():
        raise ConfigError(f"{folder} is no run folder: it has no {names.CONFIG}")
    if (folder / names.METRICS).is_file():
        raise ConfigError(f"{folder} is finished: it has metrics.json; fedtalora report {folder} shows it")
    # A run that was stopped before its first checkpoint begins anew.
    started = names.holds_checkpoint(folder)
    return {**with_later(read_file(folder / names.CONFIG, known)), "resume": started, **with_absolute_paths(changes)}
