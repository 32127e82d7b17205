"""The server's state on disk after every round: one safetensors file, and a JSON file that points to it.

Each write goes to a new file that replaces the old by ``os.replace``, so that a kill at any moment leaves a
whole checkpoint, the last or the one before.
"""

import hashlib
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import Tensor

from fedtalora_flwr.aggregation import ClusteredState, GlobalState, LoraFactors, Slot, Step
from fedtalora_flwr.config.whole import whole_file, write_text
from fedtalora_flwr.data import ClassList
from fedtalora_flwr.metrics import Judged, TaskMatrix
from fedtalora_flwr.model.heads import FeatureSums
from fedtalora_flwr.model.penalties import Memory
from fedtalora_flwr.run_folder import names

_POINTER, _BEFORE, _SHARED = names.LATEST, "before ", "shared/"
_CHECKSUM = "crc32"  # of the facts, as they are written, without it
_OURS = re.compile(r"round-(\d{6,})\.(json|safetensors)")
_INSTEAD = "go on from an earlier round that was kept (resume-from), or start the run anew"


class CheckpointError(ValueError):
    """A checkpoint that is not there or cannot be read."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything the server needs to go on after `server_round`.

    Parameters
    ----------
    server_round
        The last finished round.
    state, sums, matrix
        The model, the head's sums over finished tasks, the hits counted so far.
    bytes_up, bytes_down
        Over all finished rounds.
    wall_seconds
        Of all finished rounds, over all processes that ran them.
    partition_hashes
        Of the clients, by partition id: the resumed run must meet the same data, unless the nodes bring their own.
    classes
        Names and tasks of the classes known so far; the rows of the head are theirs.
    memory
        What a penalty that remembers has gathered of finished tasks.
    clustered
        The states of a method over slots, which begin with `state`; None for any other method.
    routes
        What tells the cluster of an input (see `routing`), once it has been summed.
    before
        The state that the current task began with, where the sums follow the features.
    run
        The name under which clients keep a ledger of their privacy; empty where they keep none.
    judged
        What the last task's end showed of each class, where the server has test data.
    hits_of_clients
        Hits and examples of each client then, by partition id, where each has its own.
    """

    server_round: int
    state: GlobalState
    sums: FeatureSums
    matrix: TaskMatrix
    bytes_up: int
    bytes_down: int
    wall_seconds: float
    partition_hashes: tuple[str, ...]
    classes: ClassList = field(default_factory=ClassList)
    memory: Memory = field(default_factory=Memory)
    clustered: ClusteredState | None = None
    routes: FeatureSums | None = None
    before: GlobalState | None = None
    run: str = ""
    judged: Judged | None = None
    hits_of_clients: Mapping[int, tuple[int, int]] = field(default_factory=dict)


def save(folder: Path, checkpoint: Checkpoint, *, keep: int = 1) -> None:
    """Write a checkpoint and drop old ones, so that `keep` of them stay, and those of later rounds.

    Raises
    ------
    CheckpointError, OSError
        If it cannot be written; the one before is whole then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state, clustered = checkpoint.state, checkpoint.clustered
    tensors = _tensors(state)
    for prefix, one in _places(clustered):
        tensors |= _tensors(one, prefix=prefix)
    if clustered is not None and clustered.changes is not None:
        tensors["slots/changes"] = clustered.changes
    tensors |= {f"anchor/{name}": value for name, value in checkpoint.memory.anchor.items()}
    tensors |= {f"fisher/{name}": value for name, value in checkpoint.memory.fisher.items()}
    tensors |= {"sums/gram": checkpoint.sums.gram, "sums/moment": checkpoint.sums.moment}
    if checkpoint.before is not None:
        tensors |= _tensors(checkpoint.before, prefix=_BEFORE)
    if checkpoint.routes is not None:
        tensors |= {"routes/gram": checkpoint.routes.gram, "routes/moment": checkpoint.routes.moment}
    if (judged := checkpoint.judged) is not None:
        tensors |= {"judged/cells": torch.from_numpy(judged.cells()), "judged/bins": torch.from_numpy(judged.bins)}
    name = _tensors_of(checkpoint.server_round)
    with whole_file(folder / name) as part:
        try:
            # NumPy's, for it writes a tensor twice that two states share, which PyTorch's refuses.
            save_file({key: value.contiguous().numpy() for key, value in tensors.items()}, part)
        except SafetensorError as error:  # so it words a full disk
            raise CheckpointError(f"{folder / name} cannot be written: {error}") from error
    facts: dict[str, Any] = {
        "tensors": name,
        "sha256": _digest(folder / name),
        "server_round": checkpoint.server_round,
        "version": state.version,
        "version_before": None if checkpoint.before is None else checkpoint.before.version,
        "scaling": {module: pair.scaling for module, pair in state.adapters.items()},
        "matrix": checkpoint.matrix.to_json(),
        "bytes_up": checkpoint.bytes_up,
        "bytes_down": checkpoint.bytes_down,
        "wall_seconds": checkpoint.wall_seconds,
        "partition_hashes": list(checkpoint.partition_hashes),
        "classes": asdict(checkpoint.classes),
        "hits_of_clients": {str(partition): list(hits) for partition, hits in checkpoint.hits_of_clients.items()},
    }
    if checkpoint.run:
        facts["run"] = checkpoint.run
    if clustered is not None:
        facts["clustered"] = {
            "version": clustered.version,
            "shared": clustered.shared is not None,
            "versions": {prefix: one.version for prefix, one in _places(clustered)},
            "clusters": sorted(clustered.clusters),
            "own": sorted(clustered.own),
            "assigned": [[*slot, cluster] for slot, cluster in sorted(clustered.assigned.items())],
        }
    facts[_CHECKSUM] = _checksum(facts)
    write_text(folder / _facts_of(checkpoint.server_round), json.dumps(facts))
    write_text(folder / _POINTER, json.dumps(facts))
    last = checkpoint.server_round
    kept = sorted(n for n in rounds(folder) if n <= last)[-keep:]
    names = {path for n in kept for path in (_facts_of(n), _tensors_of(n))}
    for old in folder.glob("round-*"):
        if _OURS.fullmatch(old.name) and old.name not in names:
            old.unlink(missing_ok=True)


def rounds(folder: Path) -> list[int]:
    """List the rounds of which a checkpoint is kept."""
    found = (_OURS.fullmatch(path.name) for path in folder.glob("round-*.json"))
    return sorted(int(name[1]) for name in found if name)


def _facts_of(server_round: int) -> str:
    return f"round-{server_round:06d}.json"


def _tensors_of(server_round: int) -> str:
    return f"round-{server_round:06d}.safetensors"


def _checksum(facts: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(facts).encode())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(folder: Path, server_round: int = 0) -> Checkpoint:
    """Read the last whole checkpoint, or that of a round.

    Raises
    ------
    CheckpointError
        If there is none, or its files cannot be read or are not what was written.
    """
    pointer = folder / (_facts_of(server_round) if server_round else _POINTER)
    if server_round and not pointer.is_file():
        kept = ", ".join(map(str, rounds(folder))) or "none"
        raise CheckpointError(f"{folder} keeps no checkpoint of round {server_round}; those kept: {kept}")
    if not pointer.is_file():
        raise CheckpointError(f"{folder} holds no checkpoint ({_POINTER}); the run ended before its first round did")
    try:
        facts = json.loads(pointer.read_text())
        checksum = facts.pop(_CHECKSUM, None)  # an earlier version wrote none
        path = folder / facts["tensors"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{pointer} cannot be read; {_INSTEAD}") from error
    if checksum not in (None, _checksum(facts)):
        raise CheckpointError(f"{pointer} is not what was written: its checksum is another; {_INSTEAD}")
    try:
        if _digest(path) != facts.get("sha256"):
            raise CheckpointError(f"{path} is not what was written: its SHA-256 is another; {_INSTEAD}")
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}, to which {pointer.name} points, cannot be read; {_INSTEAD}") from error
    state = _state(tensors, facts["scaling"], version=facts["version"])
    before = None
    if (version := facts["version_before"]) is not None:
        before = _state(tensors, facts["scaling"], version=version, prefix=_BEFORE)
    return Checkpoint(
        server_round=facts["server_round"],
        state=state,
        sums=FeatureSums(tensors["sums/gram"], tensors["sums/moment"]),
        matrix=TaskMatrix.from_json(facts["matrix"]),
        bytes_up=facts["bytes_up"],
        bytes_down=facts["bytes_down"],
        wall_seconds=facts["wall_seconds"],
        partition_hashes=tuple(facts["partition_hashes"]),
        classes=_class_list(facts["classes"]),
        memory=Memory(_part(tensors, "anchor"), _part(tensors, "fisher")),
        clustered=_clustered(tensors, facts, start=state) if "clustered" in facts else None,
        routes=FeatureSums(tensors["routes/gram"], tensors["routes/moment"]) if "routes/gram" in tensors else None,
        before=before,
        run=facts.get("run", ""),
        judged=_judged(tensors, num_classes=len(facts["classes"]["names"])),
        hits_of_clients={int(p): (hits[0], hits[1]) for p, hits in facts.get("hits_of_clients", {}).items()},
    )


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{part}/"): value for key, value in tensors.items() if key.startswith(f"{part}/")}


def _tensors(state: GlobalState, *, prefix: str = "") -> dict[str, Tensor]:
    """Name all tensors of a state, but for its step."""
    parts: dict[str, Mapping[str, Tensor]] = {
        "lora_A": {name: pair.lora_A for name, pair in state.adapters.items()},
        "lora_B": {name: pair.lora_B for name, pair in state.adapters.items()},
        "residual": state.residual,
        "head": state.head,
        "extra": state.extra,
        "owed_left": {name: step.left for name, step in state.owed.items()},
        "owed_right": {name: step.right for name, step in state.owed.items()},
    }
    return {f"{prefix}{part}/{name}": value for part, values in parts.items() for name, value in values.items()}


def _state(
    tensors: Mapping[str, Tensor], scaling: Mapping[str, float], *, version: int, prefix: str = ""
) -> GlobalState:
    """Give the state back of which `_tensors` named the tensors; `scaling` is that of each module."""
    parts: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        if key.startswith(prefix):
            part, _, name = key.removeprefix(prefix).partition("/")
            parts[part][name] = value
    adapters = {
        name: LoraFactors(parts["lora_A"][name], parts["lora_B"][name], factor) for name, factor in scaling.items()
    }
    owed = {name: Step(left, parts["owed_right"][name]) for name, left in parts["owed_left"].items()}
    return GlobalState(adapters, parts["residual"], parts["head"], version, owed=owed, extra=parts["extra"])


def _places(clustered: ClusteredState | None) -> list[tuple[str, GlobalState]]:
    """Give a prefix for each state of a method over slots, and the state."""
    if clustered is None:
        return []
    clusters = [(_prefix(cluster), one) for cluster, one in sorted(clustered.clusters.items())]
    shared = [] if clustered.shared is None else [(_SHARED, clustered.shared)]
    return shared + clusters + [(_prefix(*slot), one) for slot, one in sorted(clustered.own.items())]


def _prefix(*place: int) -> str:
    """Name a cluster, or a slot's own place."""
    return f"{'cluster' if len(place) == 1 else 'own'} {' '.join(map(str, place))}/"


def _clustered(tensors: Mapping[str, Tensor], facts: Mapping[str, Any], *, start: GlobalState) -> ClusteredState:
    told = facts["clustered"]

    def read(prefix: str) -> GlobalState:
        return _state(tensors, facts["scaling"], version=told["versions"][prefix], prefix=prefix)

    shared = read(_SHARED) if told["shared"] else None
    shared_rank = next(pair.rank for pair in shared.adapters.values()) if shared else 0
    return ClusteredState(
        start=ClusteredState.begin(start, shared_rank=shared_rank).start,
        clusters={cluster: read(_prefix(cluster)) for cluster in told["clusters"]},
        assigned={Slot(partition, number): cluster for partition, number, cluster in told["assigned"]},
        own={Slot(*slot): read(_prefix(*slot)) for slot in told["own"]},
        version=told["version"],
        shared=shared,
        changes=tensors.get("slots/changes"),
    )


def _judged(tensors: Mapping[str, Tensor], *, num_classes: int) -> Judged | None:
    if "judged/cells" not in tensors:
        return None
    cells, bins = tensors["judged/cells"].numpy(), tensors["judged/bins"].numpy()
    return Judged.from_cells(cells, bins, num_classes=num_classes)


def _class_list(facts: dict[str, Any]) -> ClassList:
    tasks = tuple(tuple(rows) for rows in facts["tasks"])
    return ClassList(tuple(facts["names"]), tasks, tuple(facts["task_names"]))
