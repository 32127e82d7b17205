"""The directory is the registry: a file in a package is a choice that its name selects.

A plug-in file (a method, dataset, backbone, head, partition) has one function ``create``. Its keyword
parameters are named as fields of `RunConfig`, and `build` passes exactly those, so a new plug-in takes the
settings it needs without an edit elsewhere; to one that takes ``**settings`` it passes all. A choice may carry an
argument after a colon or slash (``timm:vit_base_patch16_224.dino``, ``glue/rte``), which reaches ``create`` as
``argument``.
"""

import inspect
import pkgutil
import re
import traceback
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGES = {
    "method": "fedtalora_flwr.aggregation.methods",
    "dataset": "fedtalora_flwr.data.sources",
    "partition": "fedtalora_flwr.data.partitions",
    "penalty": "fedtalora_flwr.model.penalties",
    "backbone": "fedtalora_flwr.model.backbones",
    "head": "fedtalora_flwr.model.heads",
}  # setting -> the package whose files are its choices


def available(package: str) -> tuple[str, ...]:
    """List the choices a package offers, in alphabetical order, in kebab-case where files use underscores.

    Parameters
    ----------
    package
        Dotted name, e.g. ``fedtalora_flwr.aggregation.methods``.
    """
    modules = pkgutil.iter_modules(import_module(package).__path__)
    choices = (m.name for m in modules if hasattr(import_module(f"{package}.{m.name}"), "create"))
    return tuple(sorted(name.replace("_", "-") for name in choices))


def resolve(package: str, name: str) -> ModuleType:
    """Import the file that `name` selects (kebab-case and snake_case both do), or the module ``package.module``.

    Raises
    ------
    ValueError
        If the package has no such choice; the message lists what there is. If there is no such module, it has no
        ``create`` or cannot be imported; the message names the file and line.
    """
    choice = _module_name(name)
    if _is_dotted(choice):
        return _own(package, choice)
    module = f"{package}.{choice}"
    # Only the chosen file is imported: listing all would import every plug-in's libraries.
    if not choice.isidentifier() or find_spec(module) is None or not hasattr(import_module(module), "create"):
        raise ValueError(
            f"there is no {_kind(package)} {name!r}; choose one of: {', '.join(available(package))}, or name a file "
            "of your own as package.module"
        )
    return import_module(module)


def _own(package: str, name: str) -> ModuleType:
    """Import a plug-in that lies outside this package, by its dotted name."""
    kind = _kind(package)
    try:
        module = import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and name.startswith(error.name or "?"):
            raise ValueError(
                f"{kind}: there is no module {name!r}; install it, or put the folder that holds it on PYTHONPATH, on "
                "the server and on every node"
            ) from None
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = error if isinstance(error, SyntaxError) else frame
        where = f"{place.filename}:{place.lineno}"
        raise ValueError(f"{kind} {name}: {where}: {type(error).__name__}: {error}") from error
    if not hasattr(module, "create"):
        raise ValueError(f"{kind} {name}: {module.__file__} has no function create; see docs/EXTEND.md")
    return module


def _is_dotted(choice: str) -> bool:
    return "." in choice and all(part.isidentifier() for part in choice.split("."))


def _kind(package: str) -> str:
    """Name the setting that a package's files are the choices of."""
    return next((setting for setting, home in PACKAGES.items() if home == package), package.rpartition(".")[2])


def require(package: str, name: str) -> None:
    """Raise the error of `resolve` for a choice that is not there; one of ours that is there is not imported.

    Raises
    ------
    ValueError
        As in `resolve`.
    """
    choice = _module_name(name)
    file = Path(__file__).parents[2].joinpath(*package.split("."), f"{choice}.py")
    if _is_dotted(choice) or not file.is_file():
        resolve(package, name)


def parameters(package: str, name: str) -> frozenset[str]:
    """Name the settings, in snake_case, that ``create`` of the file that `name` selects names; a rest has no names.

    Raises
    ------
    ValueError
        As in `resolve`.
    """
    taken = inspect.signature(resolve(package, name).create).parameters.values()
    return frozenset(parameter.name for parameter in taken if parameter.kind is not inspect.Parameter.VAR_KEYWORD)


def build(package: str, name: str, settings: Mapping[str, Any]) -> Any:
    """Call ``create`` of the file that `name` selects with the settings its parameters name.

    Parameters
    ----------
    package, name
        As in `resolve`; `name` may carry an argument after a colon or slash.
    settings
        Settings by snake_case name, e.g. ``config.settings``; those that ``create`` does not
        name are left out, unless it takes a rest.

    Raises
    ------
    ValueError
        If the choice is unknown, needs an argument and got none, or takes none and got one.
    """
    create = resolve(package, name).create
    wanted = parameters(package, name)
    choice, argument = parted(name)
    if ("argument" in wanted) != bool(argument):
        raise ValueError(
            f"{name!r}: write {choice}:<name>" if "argument" in wanted else f"{name!r}: {choice} takes no argument"
        )
    values = {**settings, "argument": argument} if argument else settings
    takes_all = inspect.getfullargspec(create).varkw is not None
    return create(**{key: value for key, value in values.items() if takes_all or key in wanted})


def parted(name: str) -> tuple[str, str]:
    """Part a choice from its argument, which is empty where there is none."""
    choice, *argument = re.split("[:/]", name, maxsplit=1)
    return choice, "".join(argument)


def _module_name(name: str) -> str:
    return parted(name)[0].replace("-", "_")
