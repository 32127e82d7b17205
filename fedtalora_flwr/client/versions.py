"""The residuals that this machine's clients keep on its disk from message to message."""

from functools import lru_cache
from pathlib import Path

from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.config.sources import cache_folder
from fedtalora_flwr.residual import VersionStore


def version_store(config: RunConfig) -> VersionStore:
    """Open the bases that this machine's clients hold, in its cache folder."""
    return _version_store(cache_folder() / "bases", int(config.base_cache_gb * 2**30))


@lru_cache(maxsize=1)
def _version_store(folder: Path, limit_bytes: int) -> VersionStore:
    return VersionStore(folder, limit_bytes=limit_bytes)
