"""The directory is the registry: a file in a package is a choice that its name selects.

A plug-in file (a method, dataset, backbone, head, partition) has one function ``create``. Its keyword
parameters are named as fields of `RunConfig`, and `build` passes exactly those, so a new plug-in takes the
settings it needs without an edit elsewhere. A choice may carry an argument after a colon
(``timm:vit_base_patch16_224.dino``); it reaches ``create`` as ``argument``.
"""

import inspect
import pkgutil
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGES = {
    "method": "fedtalora_flwr.aggregation",
    "dataset": "fedtalora_flwr.data.sources",
    "partition": "fedtalora_flwr.data.partitions",
    "penalty": "fedtalora_flwr.penalties",
    "backbone": "fedtalora_flwr.backbones",
    "head": "fedtalora_flwr.heads",
}  # setting -> the package whose files are its choices


def available(package: str) -> tuple[str, ...]:
    """List the choices a package offers, in alphabetical order, in kebab-case where files use underscores.

    Parameters
    ----------
    package
        Dotted name, e.g. ``fedtalora_flwr.aggregation``.
    """
    modules = pkgutil.iter_modules(import_module(package).__path__)
    choices = (m.name for m in modules if hasattr(import_module(f"{package}.{m.name}"), "create"))
    return tuple(sorted(name.replace("_", "-") for name in choices))


def resolve(package: str, name: str) -> ModuleType:
    """Import the file that `name` selects (kebab-case and snake_case both do).

    Raises
    ------
    ValueError
        If the package has no such choice; the message lists what there is.
    """
    choice = _module_name(name)
    module = f"{package}.{choice}"
    # Only the chosen file is imported: listing all would import every plug-in's libraries.
    if not choice.isidentifier() or find_spec(module) is None or not hasattr(import_module(module), "create"):
        kind = package.rpartition(".")[2]
        raise ValueError(f"{kind} has no {name!r}; choose one of: {', '.join(available(package))}")
    return import_module(module)


def require(package: str, name: str) -> None:
    """Raise the error of `resolve` for a choice that is not there; one that is there is not imported.

    Raises
    ------
    ValueError
        As in `resolve`.
    """
    file = Path(__file__).parents[1].joinpath(*package.split("."), f"{_module_name(name)}.py")
    if not file.is_file():
        resolve(package, name)


def parameters(package: str, name: str) -> frozenset[str]:
    """Name the settings, in snake_case, that ``create`` of the file that `name` selects takes.

    Raises
    ------
    ValueError
        As in `resolve`.
    """
    return frozenset(inspect.signature(resolve(package, name).create).parameters)


def build(package: str, name: str, settings: Mapping[str, Any]) -> Any:
    """Call ``create`` of the file that `name` selects with the settings its parameters name.

    Parameters
    ----------
    package, name
        As in `resolve`; `name` may carry an argument after a colon.
    settings
        Settings by snake_case name, e.g. ``dataclasses.asdict(config)``; those that ``create`` does not
        name are left out.

    Raises
    ------
    ValueError
        If the choice is unknown, needs an argument and got none, or takes none and got one.
    """
    create = resolve(package, name).create
    wanted = parameters(package, name)
    choice, colon, argument = name.partition(":")
    if ("argument" in wanted) != bool(argument):
        raise ValueError(
            f"{name!r}: write {choice}:<name>" if "argument" in wanted else f"{name!r}: {choice} takes no argument"
        )
    values = {**settings, "argument": argument} if colon else settings
    return create(**{key: values[key] for key in wanted if key in values})


def _module_name(name: str) -> str:
    return name.partition(":")[0].replace("-", "_")
