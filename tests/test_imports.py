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


TORCH = {"torch", "numpy"}
HEADS = ours("model.heads", "model.penalties")
# What a room may import beside Python's own modules and itself, from the ground up; see docs/ARCHITECTURE.md.
# A longer name stands before the shorter one that holds it, and a file is of the first that fits.
ALLOWED = {
    "__init__.py": ours("config", "launch"),  # the public names, when they are asked for
    "config": set(),
    "metrics": {"numpy"} | ours("config.registry"),
    "aggregation": TORCH | {"scipy", "sklearn", "threadpoolctl"} | ours("config.registry"),
    "residual": {"torch", "safetensors"} | ours("aggregation", "config.whole"),
    "data": TORCH | {"PIL", "datasets", "sklearn", "huggingface_hub"} | ours("config"),
    "model/heads": TORCH | {"scipy"} | ours("aggregation.class_rows", "config.registry"),
    "model/penalties": {"torch"} | ours("config.registry", "model.heads"),
    "model/backbones": TORCH | {"timm", "transformers", "peft", "safetensors"} | ours("config.registry", "data"),
    "model": TORCH | {"peft", "cachetools", "opacus", "scipy"} | ours("aggregation", "config", "data"),
    "wire": {"flwr", "torch", "safetensors"} | ours("__version__", "aggregation", "config", "data", "residual") | HEADS,
    "run_folder": TORCH | {"safetensors"} | ours("aggregation", "config", "data", "metrics") | HEADS,
    "report/live": {"numpy", "starlette"} | ours("report", "run_folder"),
    "report": {"jinja2", "markupsafe", "numpy", "rich", "matplotlib"}
    | ours("config.sources", "config.units", "config.whole", "run_folder"),
    "inference": TORCH
    | {"PIL", "peft", "safetensors", "jinja2", "rouge_score"}
    | ours("__version__", "aggregation", "config", "data", "metrics", "model", "run_folder"),
    "client/warm": ours("__version__"),
    "client": TORCH | {"flwr"} | ours("aggregation", "config", "data", "model", "residual", "wire"),
    "server": TORCH
    | {"flwr"}
    | ours("aggregation", "config", "data", "metrics", "model", "residual", "run_folder", "wire"),
    "strategy": {"flwr", "torch", "peft"} | ours("aggregation"),
    "launch/supervisor.py": set(),  # a program that runs with python -I, without the package's own folder
    "launch/ray_probe.py": {"ray"},  # a program likewise
    "launch": {"flwr", "torch", "tomli_w", "pandas"} | ours("config", "inference", "report", "run_folder"),
    "deploy": {"cryptography", "grpc", "flwr", "yaml", "tomli_w"} | ours("config.whole"),
    "cli": {
        "rich",
        "typer",
        "uvicorn",
        "tomli_w",
        "torch",
        "torchvision",
        "packaging",
        "fedtalora_flwr",
    },  # the outermost room
}
# Beyond Flower's two apps and the wire, those that stand in for Flower's grid, its probe of the clock and its watch.
KNOW_FLOWER = {"wire", "server", "client", "strategy", "launch/in_process.py", "deploy/probe.py", "deploy/watched.py"}
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "managers"}


def room_of(path: Path) -> str:
    name = path.relative_to(LIBRARY).as_posix()
    return next(room for room in ALLOWED if name == room or name.startswith(f"{room}/"))


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


def test_every_part_of_the_library_has_its_place_and_every_place_a_part():
    assert {room_of(path) for path in LIBRARY.rglob("*.py")} == ALLOWED.keys()


def test_top_of_the_library_shows_at_most_eighteen_entries():
    assert len([path for path in LIBRARY.iterdir() if path.name != "__pycache__"]) <= 18


@pytest.mark.parametrize("room", ALLOWED)
def test_part_of_the_library_imports_only_what_its_place_allows(room):
    itself = f"fedtalora_flwr.{room.removesuffix('.py').replace('/', '.')}"
    allowed = ALLOWED[room] | {itself} | set(sys.stdlib_module_names)
    # the package itself holds its version alone
    bare = set() if room in ("launch/supervisor.py", "launch/ray_probe.py") else {LIBRARY.name}
    outward = {
        path.name: [name for name in imports_of(path) if name not in bare and not within(name, allowed)]
        for path in LIBRARY.rglob("*.py")
        if room_of(path) == room
    }
    assert {name: found for name, found in outward.items() if found} == {}


def test_only_the_rooms_around_the_wire_import_flwr():
    importers = {
        path.relative_to(LIBRARY).as_posix()
        for path in LIBRARY.rglob("*.py")
        for name in imports_of(path)
        if within(name, {"flwr"})
    }
    assert {name if name in KNOW_FLOWER else name.partition("/")[0] for name in importers} == KNOW_FLOWER


def test_server_and_client_never_import_each_other():
    """The library's two sides, and Flower's two apps, each of which may import its own side alone."""
    for path in our_files():
        sides = {"server", "client"} & {part.removesuffix("_app") for part in path.relative_to(ROOT).parts}
        for side in sides:
            other = "client" if side == "server" else "server"
            foreign = {f"{other}_app", f"fedtalora_flwr.{other}"}
            assert not [name for name in imports_of(path) if within(name, foreign)], path


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
