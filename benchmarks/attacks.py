"""Measure what hostile clients can do: each attack against each rule of weights, on the digits demo with ten clients.

A hostile client runs the real ClientApp and changes what it sends. Beside the final accuracy stands what became of it:
how often it was refused, or the smallest share of its examples that it counted for.

Usage: python benchmarks/attacks.py [--rules examples ...] [--attacks flip-10 ...] [--hostile 1] [--json FILE]
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message, RecordDict
from safetensors.numpy import load, save
from torch import Tensor

from fedtalora_flwr.aggregation.weights import RULES
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.config.sources import app_folder, gather
from fedtalora_flwr.launch.in_process import LocalGrid
from fedtalora_flwr.wire.records import ARRAYS, METRICS, TENSORS

_MOST = 2**31 - 1
Tensors = dict[str, Tensor]
Attack = Callable[[str, Tensors, Tensors, RecordDict], None]
"""Changes a reply in place, by its kind: the tensors of the message, those of the reply, and the reply's records."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", default=["examples"], choices=RULES)
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=ATTACKS)
    parser.add_argument("--hostile", type=int, default=1, help="of ten clients")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    rows = []
    print(f"{'attack':28}{'rule':18}{'accuracy':>9}{'first tasks':>12}   what became of it")
    for name in arguments.attacks:
        attack, settings = ATTACKS[name]
        for rule in arguments.rules:
            began = time.perf_counter()
            own = [f"{key}={value}" for key, value in settings.items()]
            result = play(attack, rule=rule, num_hostile=arguments.hostile, assignments=[*own, *arguments.set])
            rows.append({"attack": name, "rule": rule, **result, "seconds": time.perf_counter() - began})
            routed = "" if result.get("routed") is None else f"routed {result['routed']:.3f}, "
            print(
                f"{name:28}{rule:18}{result['accuracy']:9.3f}{result['first']:12.3f}   {routed}{result['became']}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def play(attack: Attack | None, *, rule: str, num_hostile: int, assignments: list[str]) -> dict[str, Any]:
    """Play one run, in which the first partitions are hostile."""
    if str(app_folder()) not in sys.path:
        sys.path.insert(0, str(app_folder()))
    from client_app.app import app as client_app
    from server_app.app import app as server_app

    hostile = range(num_hostile if attack else 0)

    def client(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if attack and context.node_config["partition-id"] in hostile and not reply.has_error():
            kind = _KINDS.get(message.metadata.message_type, message.metadata.message_type)
            for record in [name for name in reply.content if name.partition(".")[0] == ARRAYS] or [ARRAYS]:
                sent, answered = _tensors(message.content, record), _tensors(reply.content, record)
                attack(kind, sent, answered, reply.content)
                if answered:
                    content = save({key: value.contiguous().numpy() for key, value in answered.items()})
                    reply.content[record][TENSORS].data = content
                    reply.content[record][TENSORS].shape = (len(content),)
        return reply

    with tempfile.TemporaryDirectory() as out:
        settings = gather(
            app_folder(),
            file=None,
            assignments=["num-clients=10", f"aggregation-weights={rule}", f"out={out}", *assignments],
        )
        config = RunConfig.parse(settings)
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(settings))
        try:
            server_app(LocalGrid(client, settings), context)
        except Exception as error:  # a run that an attack ends is a result of the attack
            return {"accuracy": float("nan"), "first": float("nan"), "became": f"ended the run: {error}"[:200]}
        metrics = json.loads((Path(out) / "metrics.json").read_text())
        rounds = [json.loads(line) for line in (Path(out) / "rounds.jsonl").read_text().splitlines()]
    refused = [
        failure["reason"] for line in rounds for failure in line["failures"] if failure["partition_id"] in hostile
    ]
    weights = [line.get("weights", {}).get(str(partition), 1.0) for line in rounds for partition in hostile]
    became = f"refused {len(refused)} times: {refused[0]}" if refused else "" if attack is None else "taken"
    if weights and min(weights) < 1:
        became += f", counted {min(weights):.3g} of its examples at least"
    return {
        "accuracy": metrics["faa"],
        "first": metrics["accuracy_matrix"][config.num_tasks - 1][0],
        "routed": rounds[-1].get("accuracy_routed"),
        "became": became,
    }


def _tensors(content: RecordDict, record: str) -> Tensors:
    if record not in content:
        return {}
    return {key: torch.from_numpy(value.copy()) for key, value in load(content[record][TENSORS].data).items()}


def _flip(factor: float) -> Attack:
    """Turn a training reply's change around, `factor` times as far."""

    def attack(kind: str, sent: Tensors, answered: Tensors, content: RecordDict) -> None:
        if kind != "train":
            return
        for key, value in answered.items():
            if key.startswith("lora_"):
                answered[key] = sent[key] - factor * (value - sent[key])

    return attack


def _rows(factor: float) -> Attack:
    """Turn the change of the class rows around, `factor` times as far."""

    def attack(kind: str, sent: Tensors, answered: Tensors, content: RecordDict) -> None:
        if kind != "train":
            return
        there = sent["rows/class"].tolist()
        for key in [key for key in answered if key.startswith("head/")]:
            before = torch.zeros_like(answered[key])
            for row, number in enumerate(answered["counts/class"].tolist()):
                if number in there:
                    before[row] = sent[key][there.index(number)]
            answered[key] = before - factor * (answered[key] - before)

    return attack


def _sums(scale: float) -> Attack:
    """Swap the rows of the classes, and make all features longer, so that G and M still go together."""

    def attack(kind: str, sent: Tensors, answered: Tensors, content: RecordDict) -> None:
        if kind != "train.sums":
            return
        moment, width = answered["sums/moment"], answered["sums/moment"].shape[1]
        features, counts = scale * moment[:, :-1], moment[:, -1:]
        answered["sums/moment"] = torch.cat([(features / counts).roll(1, 0) * counts, counts], 1)
        num_rows = _num_rows(len(answered["sums/root"]), width)
        columns = torch.triu_indices(num_rows, width)[1]
        answered["sums/root"] = torch.where(columns < width - 1, scale, 1.0) * answered["sums/root"]

    return attack


def _num_rows(numbers: int, width: int) -> int:
    """Give the rows of an upper trapezoid of so many numbers."""
    return next(k for k in range(width + 1) if k * width - k * (k - 1) // 2 == numbers)


def _rows_of_others(kind: str, sent: Tensors, answered: Tensors, content: RecordDict) -> None:
    """Write moment rows of classes that are not held, which count nothing."""
    if kind != "train.sums":
        return
    held, moment = answered["sums/class"], answered["sums/moment"]
    others = torch.tensor([c for c in range(10) if c not in held.tolist()], dtype=held.dtype)
    classes = torch.cat([held, others]).sort()
    foreign = torch.cat([moment, -1e3 * moment[:1].repeat(len(others), 1)])
    foreign[len(held) :, -1] = 0
    answered["sums/class"], answered["sums/moment"] = classes.values, foreign[classes.indices]


def _claims_many(kind: str, sent: Tensors, answered: Tensors, content: RecordDict) -> None:
    """Say, from the first reply on, that there are 2^31-1 examples of a class, and turn the change around."""
    _flip(1.0)(kind, sent, answered, content)
    if kind == "train":
        answered["counts/examples"][0] = _MOST
        content[METRICS]["num-examples"] = int(answered["counts/examples"].sum())
    elif kind == "train.sums":
        answered["sums/moment"] = answered["sums/moment"] * (_MOST / answered["sums/moment"][0, -1])
    elif kind == "query":
        answered["counts/class"][answered["counts/class"].argmax()] = _MOST


def _gauge(factor: float) -> Attack:
    """Send the honest product in other factors."""

    def attack(kind: str, sent: Tensors, answered: Tensors, content: RecordDict) -> None:
        if kind == "train":
            for key, value in answered.items():
                if key.startswith("lora_"):
                    answered[key] = value * (factor if key.startswith("lora_A") else 1 / factor)

    return attack


def _fisher(kind: str, sent: Tensors, answered: Tensors, content: RecordDict) -> None:
    """Say that every number of every factor matters alike, and as much as `norm-limit` lets through."""
    if kind == "train.fisher":
        keys = [key for key in answered if key.startswith("fisher/")]
        numbers = sum(answered[key].numel() for key in keys)
        each = (0.99 * _FISHER_LIMIT) ** 2 * int(answered["counts/examples"].sum()) / numbers
        answered.update({key: torch.full_like(answered[key], each) for key in keys})


def _rank(rank: int) -> Attack:
    """Send factors of a rank that nobody agreed to, the same product."""

    def attack(kind: str, sent: Tensors, answered: Tensors, content: RecordDict) -> None:
        if kind != "train":
            return
        for key, value in answered.items():
            if key.startswith("lora_"):
                inner = 0 if key.startswith("lora_A") else 1
                padding = [0, 0, 0, rank - value.shape[0]] if inner == 0 else [0, rank - value.shape[1]]
                answered[key] = torch.nn.functional.pad(value, padding)

    return attack


_FISHER_LIMIT = 1000.0
_KINDS = {"train.slots": "train", "train.slot_sums": "train.sums"}  # what is asked of slots, as of one adapter
_SLOTS = {"method": "fl-tac", "clusters": 5, "head": "linear", "lora-targets": "q,v", "lora-blocks": "last:2"}
_SLOTS |= {"max-per-class": 24, "rounds-per-task": 3, "partition": "iid"}
_LINEAR = {"head": "linear", "max-per-class": 40}
ATTACKS: Mapping[str, tuple[Attack | None, Mapping[str, Any]]] = {
    "none": (None, {}),
    "flip-1": (_flip(1.0), {}),
    "flip-10": (_flip(10.0), {}),
    "flip-100": (_flip(100.0), {}),
    "sums-swapped": (_sums(1.0), {}),
    "sums-swapped-55": (_sums(55.0), {}),
    "sums-of-others": (_rows_of_others, {}),
    "claims-2^31": (_claims_many, {}),
    "gauge-1e3": (_gauge(1e3), {}),
    "gauge-1e6": (_gauge(1e6), {}),
    "rank-768": (_rank(768), {}),
    "none-ewc": (None, {"penalty": "ewc", "penalty-weight": 10.0}),
    "fisher": (_fisher, {"penalty": "ewc", "penalty-weight": 10.0}),
    "none-linear": (None, _LINEAR),
    "rows-9-linear": (_rows(9.0), _LINEAR),
    "none-slots": (None, _SLOTS),
    "flip-9-slots": (_flip(9.0), _SLOTS),
    "rows-9-slots": (_rows(9.0), _SLOTS),
    "gauge-1e6-slots": (_gauge(1e6), _SLOTS),
    "sums-55-slots": (_sums(55.0), _SLOTS),
}


if __name__ == "__main__":
    main()
