"""What averaging the factors loses in a round, its bound and the round's step: the measurements of docs/THEORY.md.

The module is a method, Fed-TaLoRA (or FedIT) that notes four numbers of every round, and a program that plays it on
the demo's first task (digits, 20 a class, `vit_mini`, five clients) over learning rates and local epochs. Over all
layers l,

    lost^2   =  sum_l ||s sum_k p_k (B_k - Bbar)(A_k - Abar)||^2
    bound^2  =  sum_l (s spread_B spread_A)^2,   spread_B^2 = sum_k p_k ||B_k - Bbar||^2, spread_A the same of A
    step^2   =  sum_l ||sum_k p_k s B_k A_k - s B A||^2,   what the round changed
    spread^2 =  sum_l sum_k p_k ||s B_k A_k - mean||^2,   how far the clients' models lie apart

with Frobenius norms, from the broadcast B, A and the clients' B_k, A_k.

Usage: PYTHONPATH=. python -m experiments.spreads OUT [--jobs grid residual] [--seeds 0 1 2]
"""

import argparse
import csv
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter
from torch import Tensor

import fedtalora_flwr as fedtalora
from fedtalora_flwr.aggregation.averaging import average_factors
from fedtalora_flwr.aggregation.factors import LoraFactors, Step
from fedtalora_flwr.aggregation.methods.fedtalora import FedTaLoRA, Residual
from fedtalora_flwr.aggregation.types import ClientUpdate, GlobalState, example_weights, in_summation_order
from fedtalora_flwr.report.figures import Figure, to_file
from fedtalora_flwr.run_folder import checkpoint

NOTED = ("lost", "bound", "step", "spread")
RATES = (0.0005, 0.001, 0.002, 0.004, 0.008)
EPOCHS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Noting(FedTaLoRA):
    """Fed-TaLoRA that keeps a row of `NOTED` for every round in the state."""

    def aggregate(self, state: GlobalState, updates: Sequence[ClientUpdate]) -> GlobalState:
        """Fold the updates (see `FedTaLoRA.aggregate`), and note what the round did."""
        row = torch.stack([noted(pair, updates, name) for name, pair in state.adapters.items()]).sum(0).sqrt()
        before = state.extra.get("noted", torch.zeros(0, len(NOTED), dtype=torch.float64))
        return replace(super().aggregate(state, updates), extra={"noted": torch.cat([before, row[None]])})


def create(*, residual: Residual) -> Noting:
    """Build the method from the setting ``residual``."""
    return Noting(residual=residual)


def noted(broadcast: LoraFactors, updates: Sequence[ClientUpdate], name: str) -> Tensor:
    """Give the squares of `NOTED` for one layer: (4,) float64."""
    updates = in_summation_order(updates)
    weights, pairs = example_weights(updates), [update.adapters[name] for update in updates]
    mean, lost = average_factors(pairs, weights, like=broadcast)
    lost = lost.added_to(None) if isinstance(lost, Step) else lost
    apart_A, apart_B, apart = (
        sum(p * float((of(pair) - of(mean)).square().sum()) for p, pair in zip(weights, pairs, strict=True))
        for of in (_lora_A, _lora_B, LoraFactors.delta)
    )
    step = mean.delta() + lost - broadcast.delta()
    # The mean of the products lies `lost` away from the product of the means, from which `apart` is measured.
    lost_2 = float(lost.square().sum())
    bound_2 = broadcast.scaling**2 * apart_A * apart_B
    return torch.tensor([lost_2, bound_2, float(step.square().sum()), apart - lost_2], dtype=torch.float64)


def _lora_A(pair: LoraFactors) -> Tensor:
    return pair.lora_A


def _lora_B(pair: LoraFactors) -> Tensor:
    return pair.lora_B


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the runs and spreads.csv")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="0 1 2 by default")
    parser.add_argument("--jobs", nargs="*", choices=sorted(JOBS), default=sorted(JOBS), help="which runs; all")
    arguments = parser.parse_args()
    lines: list[dict[str, Any]] = []
    for seed, job in itertools.product(arguments.seeds, arguments.jobs):
        for settings in JOBS[job]():
            lines += played(arguments.out, job, {**settings, "seed": seed})
            write(arguments.out / "spreads.csv", lines)
    print(slopes(lines))
    to_file(drawn(lines), arguments.out / "spreads.svg", "svg")


def slopes(lines: Sequence[Mapping[str, Any]]) -> str:
    """Say by which power of the learning rate, and of the round's step, what is lost grows in the runs of `grid`."""
    said = []
    for number in (1, 3):
        here = [line for line in lines if line["job"] == "grid" and line["round"] == number]
        by_rate = [line for line in here if line["local-epochs"] == EPOCHS[1]]
        for name, some, against in (("learning rate", by_rate, "learning-rate"), ("step", here, "step")):
            powers = ", ".join(f"{what} {_power(some, what, against):.2f}" for what in ("lost", "bound", "step"))
            said.append(f"round {number}, powers of the {name}: {powers}")
    return "\n".join(said)


def _power(lines: Sequence[Mapping[str, Any]], what: str, against: str) -> float:
    """Fit p in ``what ~ against^p``, by least squares over the logarithms."""
    x, y = (np.log([float(line[key]) for line in lines]) for key in (against, what))
    return float(np.polyfit(x, y, 1)[0])


def drawn(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw what is lost against the round's step, and what a whole run drops against the number of its rounds."""
    shows_runs = len({line["rounds-per-task"] for line in lines if line["job"] == "residual"}) > 2
    figure = Figure(figsize=(9 if shows_runs else 5, 3.6), layout="constrained")
    one, *others = figure.subplots(1, 1 + shows_runs, squeeze=False)[0]
    here = [line for line in lines if line["job"] == "grid"]
    for number, marker in ((1, "o"), (2, "s"), (3, "^")):
        some = [line for line in here if line["round"] == number]
        one.loglog([x["step"] for x in some], [x["lost"] for x in some], marker, label=f"lost, round {number}")
    first = sorted((line for line in here if line["round"] == 1), key=lambda line: float(line["step"]))
    one.loglog([x["step"] for x in first], [x["bound"] for x in first], "x", color="gray", label="bound, round 1")
    if first:
        ends = np.array([first[0]["step"], first[-1]["step"]], dtype=float)
        middle = np.exp(np.mean([np.log(float(x["lost"]) / float(x["step"]) ** 2) for x in first]))
        one.loglog(ends, middle * ends**2, "--", color="gray", label="slope 2")
    one.set(xlabel="step of the round", ylabel="lost by averaging the factors")
    one.legend(fontsize=8)
    for run in others:
        _draw_runs(run, [line for line in lines if line["job"] == "residual"])
    for axes in (one, *others):
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
    return figure


def _draw_runs(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    for kind in ("off", "accumulate"):
        some = [line for line in lines if line["residual"] == kind]
        totals: dict[int, list[float]] = {}
        for run, own in itertools.groupby(some, key=lambda line: (line["seed"], line["rounds-per-task"])):
            totals.setdefault(int(run[1]), []).append(sum(float(line["lost"]) for line in own))
        means = [float(np.mean(totals[rounds])) for rounds in sorted(totals)]
        label = "dropped (residual off)" if kind == "off" else "carried (accumulate)"
        axes.loglog(sorted(totals), means, "o-", label=label)
    axes.set(xlabel="rounds in which sixteen epochs are trained", ylabel="lost in all rounds together")
    axes.legend(fontsize=8)


def grid() -> Iterator[Mapping[str, Any]]:
    """Learning rates by local epochs, three rounds each: the first from B = 0, the others from what was learned."""
    for rate, epochs in itertools.product(RATES, EPOCHS):
        if rate == RATES[2] or epochs == EPOCHS[1]:
            yield {"learning-rate": rate, "local-epochs": epochs, "rounds-per-task": 3}


def residual() -> Iterator[Mapping[str, Any]]:
    """Sixteen epochs in 1, 2, 4, 8 or 16 rounds, with the residual and without."""
    for rounds, kind in itertools.product((1, 2, 4, 8, 16), ("accumulate", "off")):
        yield {"local-epochs": 16 // rounds, "rounds-per-task": rounds, "residual": kind}


JOBS = {"grid": grid, "residual": residual}
COMMON = {
    "method": "experiments.spreads",
    "stop-after-task": 1,
    "num-tasks": 1,
    "max-per-class": 20,
    "batch-size": 8,
    "partition": "dirichlet",
    "dirichlet-beta": 0.5,
    "lr-schedule": "constant",
    "warmup": 0.0,
    "clip-norm": 0.0,
    "head": "linear",
    "eval-every": 0,
}


def played(out: Path, job: str, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Play a run, or open the one that is there, and give a line for each of its rounds."""
    folder = out / "_".join([job, *(f"{key}-{value}" for key, value in settings.items())])
    if not (folder / "metrics.json").exists():
        fedtalora.run(settings={**COMMON, **settings}, out=folder)
    run = fedtalora.Run.load(folder)
    rows = checkpoint.load(folder / "checkpoint").state.extra["noted"].tolist()
    return [
        {"job": job, **settings, "round": number, **dict(zip(NOTED, row, strict=True)), "faa": run.metrics["faa"]}
        for number, row in enumerate(rows, 1)
    ]


def write(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write the lines as a table, with a column for whatever any of them has."""
    columns = list(dict.fromkeys(itertools.chain.from_iterable(lines)))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
