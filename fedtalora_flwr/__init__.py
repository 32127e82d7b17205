"""Federated continual fine-tuning of pre-trained transformers with LoRA (Fed-TaLoRA, arXiv 2505.12318).

The public names, for programs: `run` plays a run, `Run` is one that was played; docs/API.md shows them at work.
"""

import hashlib
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtalora_flwr.config import ConfigError as ConfigError
    from fedtalora_flwr.launch.api import Run as Run
    from fedtalora_flwr.launch.api import RunError as RunError
    from fedtalora_flwr.launch.api import run as run

__version__ = version("fedtalora")
__all__ = ["ConfigError", "Run", "RunError", "__version__", "run"]

_HOME_OF = {"ConfigError": "config", "Run": "launch.api", "RunError": "launch.api", "run": "launch.api"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: the thin processes of a node import this package too."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


@cache
def build() -> str:
    """Name the version and the code itself, as ``0.1.0+1a2b3c4d``: two commits of one version are not the same."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)} ".encode() + path.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:8]}"
