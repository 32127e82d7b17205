"""Federated continual fine-tuning of pre-trained transformers with LoRA (Fed-TaLoRA, arXiv 2505.12318)."""

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

__version__ = version("fedtalora")


@cache
def build() -> str:
    """Name the version and the code itself, as ``0.1.0+1a2b3c4d``: two commits of one version are not the same."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)} ".encode() + path.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:8]}"
