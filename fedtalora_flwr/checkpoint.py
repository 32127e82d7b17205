"""The server's state on disk after every round: one safetensors file, and a JSON file that points to it.

Each write goes to a new file that replaces the old by ``os.replace``, so that a kill at any moment leaves a
whole checkpoint, the last or the one before.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedtalora_flwr.aggregation import GlobalState, LoraFactors, Step
from fedtalora_flwr.data import ClassList
from fedtalora_flwr.heads import FeatureSums
from fedtalora_flwr.metrics import TaskMatrix
from fedtalora_flwr.penalties import Memory

_POINTER = "latest.json"


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


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint and drop the one before.

    Raises
    ------
    CheckpointError, OSError
        If it cannot be written; the one before is whole then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = checkpoint.state
    tensors = {f"lora_A/{name}": pair.lora_A for name, pair in state.adapters.items()}
    tensors |= {f"lora_B/{name}": pair.lora_B for name, pair in state.adapters.items()}
    tensors |= {f"residual/{name}": value for name, value in state.residual.items()}
    tensors |= {f"head/{name}": value for name, value in state.head.items()}
    tensors |= {f"owed_left/{name}": step.left for name, step in state.owed.items()}
    tensors |= {f"owed_right/{name}": step.right for name, step in state.owed.items()}
    tensors |= {f"anchor/{name}": value for name, value in checkpoint.memory.anchor.items()}
    tensors |= {f"fisher/{name}": value for name, value in checkpoint.memory.fisher.items()}
    tensors |= {"sums/gram": checkpoint.sums.gram, "sums/moment": checkpoint.sums.moment}
    name = f"round-{checkpoint.server_round:06d}.safetensors"
    temporary = folder / f"{name}.part"
    with _whole(temporary, folder / name):
        try:
            save_file({key: value.contiguous() for key, value in tensors.items()}, temporary)
        except SafetensorError as error:  # so it words a full disk
            raise CheckpointError(f"{folder / name} cannot be written: {error}") from error
    facts: dict[str, Any] = {
        "tensors": name,
        "server_round": checkpoint.server_round,
        "version": state.version,
        "scaling": {module: pair.scaling for module, pair in state.adapters.items()},
        "matrix": checkpoint.matrix.to_json(),
        "bytes_up": checkpoint.bytes_up,
        "bytes_down": checkpoint.bytes_down,
        "wall_seconds": checkpoint.wall_seconds,
        "partition_hashes": list(checkpoint.partition_hashes),
        "classes": asdict(checkpoint.classes),
    }
    write_text(folder / _POINTER, json.dumps(facts))
    for old in folder.glob("round-*"):
        if old.name != name:
            old.unlink(missing_ok=True)


def load(folder: Path) -> Checkpoint:
    """Read the last whole checkpoint.

    Raises
    ------
    CheckpointError
        If there is none, or its files cannot be read.
    """
    pointer = folder / _POINTER
    if not pointer.is_file():
        raise CheckpointError(f"{folder} holds no checkpoint ({_POINTER}); the run ended before its first round did")
    try:
        facts = json.loads(pointer.read_text())
        path = folder / facts["tensors"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{pointer} cannot be read; start the run anew") from error
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}, to which {_POINTER} points, cannot be read; start the run anew") from error
    parts: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in tensors.items():
        part, _, name = key.partition("/")
        parts[part][name] = value
    adapters = {
        name: LoraFactors(parts["lora_A"][name], parts["lora_B"][name], scaling)
        for name, scaling in facts["scaling"].items()
    }
    owed = {name: Step(left, parts["owed_right"][name]) for name, left in parts["owed_left"].items()}
    return Checkpoint(
        server_round=facts["server_round"],
        state=GlobalState(adapters, parts["residual"], parts["head"], facts["version"], owed=owed),
        sums=FeatureSums(parts["sums"]["gram"], parts["sums"]["moment"]),
        matrix=TaskMatrix.from_json(facts["matrix"]),
        bytes_up=facts["bytes_up"],
        bytes_down=facts["bytes_down"],
        wall_seconds=facts["wall_seconds"],
        partition_hashes=tuple(facts["partition_hashes"]),
        classes=_class_list(facts.get("classes", {})),
        memory=Memory(parts["anchor"], parts["fisher"]),
    )


def _class_list(facts: dict[str, Any]) -> ClassList:
    tasks = tuple(tuple(rows) for rows in facts.get("tasks", ()))
    return ClassList(tuple(facts.get("names", ())), tasks, tuple(facts.get("task_names", ())))


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _whole(temporary, path):
        temporary.write_text(text)


@contextmanager
def _whole(temporary: Path, path: Path) -> Iterator[None]:
    """Put the file that is written meanwhile in its place, or leave the old one and no rest of the new."""
    try:
        yield
        _flush(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
