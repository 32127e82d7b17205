"""What of a node's disk a server may name: the folders that the node was started with, and nothing else.

A link that lies in such a folder is followed when the folder is read: only who may write there can have laid it, and
then it is that one's way to say what belongs to the data. What the server names is resolved first, so that neither
``..`` nor a link leads out by its word.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedtalora_flwr.config import ConfigError, RunConfig, kebab, registry
from fedtalora_flwr.config.joined import parts_of

_OF_A_SIMULATION = {"partition-id", "num-partitions"}  # all that Flower tells a simulated node
_FOLDER_WORDS = ("hf", "lm", "timm:local-dir")  # of a backbone, before what may be a folder
_HUB_WORDS = ("hf", "lm")  # of these, those that may name something on the hub instead


def require_within_reach(config: RunConfig, node_config: Mapping[str, Any], *, partition_id: int) -> None:
    """Refuse settings that name what is not in the node's own folders, before anything is read.

    The folders are ``data-path`` of the node config and the environment's ``FEDTALORA_DATA``. A simulated node has no
    config of its own: there the server is the user who started it, and may name what that user can read.

    Parameters
    ----------
    config
        From the server.
    node_config, partition_id
        The node's own.

    Raises
    ------
    ConfigError
        If a path lies outside, or a data set is to come from the hub by a name that the server gives: its files may
        name others on this machine.
    """
    if node_config.keys() <= _OF_A_SIMULATION:
        return
    for part in parts_of(config.dataset):
        kind, name = registry.parted(part.dataset)
        if kind == "hub" and not _is_path(name):
            raise ConfigError(
                f"dataset {config.dataset}: a node takes no data set of the hub by the name that a server gives; put "
                "it below the node's --data and name that folder, hub:<folder>"
            )
    own = [str(node_config.get("data-path", "")), os.environ.get("FEDTALORA_DATA", "")]
    folders = [_resolved(folder) for folder in own if folder]
    for key, path in _named(config, partition_id):
        place = _resolved(path)
        if not any(place.is_relative_to(folder) for folder in folders):
            raise ConfigError(
                f"{key} {path!r} lies outside the folders that this node was started with, its --data-path and --data; "
                "a server may name nothing else"
            )


def _named(config: RunConfig, partition_id: int) -> Iterator[tuple[str, str]]:
    """Give each path that the settings name, with its key."""
    for field in ("data_path", "test_path", "data_root", "backbone_checkpoint"):
        if path := getattr(config, field):
            yield kebab(field), path.replace("{partition-id}", str(partition_id))
    for part in parts_of(config.dataset):
        kind, name = registry.parted(part.dataset)
        if kind == "hub":
            yield "dataset", name.partition("#")[0]
        if part.path:
            yield "dataset", part.path
    kind, name = registry.parted(config.backbone)
    if kind == "timm":
        sort, _, name = name.partition(":")
        kind = f"{kind}:{sort}"
    if kind in _FOLDER_WORDS and (kind not in _HUB_WORDS or _is_path(name)):
        yield "backbone", name


def _is_path(name: str) -> bool:
    """Tell a path from a name on the hub, as those who load them do."""
    return name.startswith((".", "/", "~")) or Path(name).exists()


def _resolved(path: str) -> Path:
    return Path(path).expanduser().resolve()
