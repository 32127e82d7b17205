"""The direction of imports, and names that say what a file is about."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "fedtalora_flwr"
APPS = ("server_app", "client_app")


def ours(*parts: str) -> set[str]:
    return {f"fedtalora_flwr.{part}" for part in parts}


# What a part of the library may import beside Python's own modules and itself: the inner parts know no outer one.
ALLOWED = {
    "aggregation": {"torch", "numpy", "fedtalora_flwr.registry", "fedtalora_flwr.clustering"},
    "clustering": {"numpy", "scipy", "sklearn", "threadpoolctl"},
    "metrics": {"torch", "numpy", "fedtalora_flwr.registry"},
    "penalties": {"torch", "numpy", "fedtalora_flwr.registry", "fedtalora_flwr.heads"},
    "heads": {"torch", "numpy", "scipy", "fedtalora_flwr.registry"},
    "data": {"torch", "numpy", "PIL", "datasets", "sklearn", "huggingface_hub", "fedtalora_flwr.registry"},
    "backbones": {
        *("torch", "numpy", "timm", "transformers", "peft", "safetensors"),
        *("fedtalora_flwr.registry", "fedtalora_flwr.data"),
    },
    "registry.py": set(),
    "deploy": {"cryptography", "grpc", "flwr", "yaml", "tomli_w", "typer"},
    "warm": {"fedtalora_flwr.__version__"},
    "product.py": {"torch"},
    "trial.py": {"torch", *ours("product")},
    "precision.py": ours("settings"),
    "recipe.py": {"torch", *ours("config")},
    "lora.py": {"torch", "peft", *ours("aggregation", "backbones", "product")},
    "train.py": {
        *("torch", "numpy"),
        *ours("aggregation", "config", "heads", "lora", "penalties", "precision", "recipe"),
    },
    "change.py": {"torch", "fedtalora_flwr.aggregation", "fedtalora_flwr.lora"},
    "predict.py": {"fedtalora_flwr.data", "fedtalora_flwr.trained"},
    "export.py": {
        *("torch", "numpy", "PIL", "peft", "safetensors", "jinja2"),
        *ours("__version__", "aggregation", "backbones", "change", "checkpoint", "trained", "words"),
    },
    "residual": {"torch", "safetensors", *ours("aggregation")},
    "strategy": {"flwr", "torch", "peft", *ours("aggregation")},
    "wire": {
        *("flwr", "torch", "safetensors"),
        *ours("aggregation", "config", "data", "heads", "penalties", "residual", "words"),
    },
    "config.py": ours("registry"),
    "settings.py": ours("config"),
    "words.py": set(),
    "checkpoint.py": {"torch", "safetensors", *ours("aggregation", "data", "heads", "metrics", "penalties")},
    "roundlines.py": set(),
    "runlog.py": ours("checkpoint", "config", "metrics", "roundlines"),
    "routing.py": {"torch", *ours("aggregation", "config", "heads", "lora", "train")},
    "resident.py": {
        *("torch", "numpy", "cachetools"),
        *ours("aggregation", "backbones", "config", "data", "lora", "residual", "settings", "train"),
    },
    "holding.py": {"torch", "numpy", *ours("config", "data", "resident", "train", "wire")},
    "trained.py": {
        *("torch", "numpy", "PIL"),
        *ours("aggregation", "checkpoint", "config", "data", "heads", "lora", "report", "resident", "routing"),
    },
    "figures": {"matplotlib", "numpy", *ours("words")},
    "report": {"jinja2", "markupsafe", "numpy", "rich", *ours("figures", "roundlines", "words")},
    "keeper.py": set(),  # a program that runs with python -I, without the package's own folder
    "launch.py": ours("keeper"),
    "cluster.py": {"ray"},  # a program likewise
    "inprocess.py": {"flwr", "torch"},
    "engine.py": {"tomli_w", *ours("config", "inprocess", "keeper", "launch")},
    "sweep": ours("config", "engine", "settings"),
    "progress.py": {"rich", *ours("roundlines", "sweep", "words")},
    "doctor.py": {"torch", "torchvision", "packaging", *ours("config", "precision", "settings")},
    "cli.py": {
        *("rich", "tomli_w", "typer", "fedtalora_flwr"),  # the outermost part: it may import all others
    },
    "__init__.py": set(),
}
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "managers"}


def files_of(part: str) -> list[Path]:
    place = LIBRARY / part
    found = [place] if place.is_file() else sorted(place.rglob("*.py"))
    assert found, f"{place} holds no Python file"
    return found


def our_files() -> list[Path]:
    return [path for folder in (LIBRARY, *(ROOT / app for app in APPS)) for path in sorted(folder.rglob("*.py"))]


def imports_of(path: Path) -> Iterator[str]:
    """Full dotted names of what a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, modules: set[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def test_every_part_of_the_library_has_its_place():
    parts = {path for path in LIBRARY.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert {path.name for path in parts} == ALLOWED.keys()


@pytest.mark.parametrize("part", ALLOWED)
def test_part_of_the_library_imports_only_what_its_place_allows(part):
    allowed = ALLOWED[part] | {f"fedtalora_flwr.{part.removesuffix('.py')}"} | set(sys.stdlib_module_names)
    bare = (
        set() if part in ("keeper.py", "cluster.py") else {LIBRARY.name}
    )  # the package itself holds its version alone
    outward = {
        path.name: [name for name in imports_of(path) if name not in bare and not within(name, allowed)]
        for path in files_of(part)
    }
    assert {name: found for name, found in outward.items() if found} == {}


def test_only_wire_strategy_the_grid_in_one_process_the_probe_of_the_clock_and_the_watch_import_flwr():
    importers = {path for path in LIBRARY.rglob("*.py") for name in imports_of(path) if within(name, {"flwr"})}
    of_flower = {*files_of("wire"), *files_of("strategy")}
    outside = {path.relative_to(LIBRARY).as_posix() for path in importers - of_flower}
    assert outside == {"inprocess.py", "deploy/probe.py", "deploy/watched.py"}
    assert importers & of_flower


def test_server_and_client_never_import_each_other_and_the_library_imports_neither():
    for path in our_files():
        own = {path.relative_to(ROOT).parts[0]}
        assert not [name for name in imports_of(path) if within(name, set(APPS) - own)], path


def test_no_module_has_a_name_that_says_nothing():
    assert not [path for path in our_files() if VAGUE & {*path.relative_to(ROOT).parts, path.stem}]


def test_what_is_loaded_by_name_never_brings_code_that_runs():
    """Whoever may write to a folder or a repository of a hub could run code on every node that loads it."""
    silent = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in our_files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and getattr(node.func, "attr", "") in ("from_pretrained", "load_dataset")
        and "trust_remote_code=False" not in {ast.unparse(keyword) for keyword in node.keywords}
    ]
    assert silent == []
