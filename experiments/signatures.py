"""Cluster the adapters of a `local-only` run by every signature, as it is and in the ways that FL-TAC could take it.

In such a run every slot goes on from its own adapter, so what its checkpoint holds is what a server would have to
cluster: after one round, the first round of FL-TAC. N is the true number of tasks. Each cell is the share of slots in
the group of their task after Hungarian matching:

- as it is: K-means on the signature, as in the paper;
- unit length: each signature scaled to it first;
- directions: what `method = fl-tac` clusters but for `raw` (see `clustering.kernel.directions`).

The last columns are the mean cosine between adapters of one task, and between those of different tasks, and rho, which
says whether the tasks stand out of the noise (docs/THEORY.md): well above 1 they do.

Usage: fedtalora run --preset clinc150-fl-tac --set method=local-only --set rounds-per-task=1 --out RUN
       python experiments/signatures.py RUN
"""

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from fedtalora_flwr.aggregation.clustering import Matrix, cosines, directions, embed, in_matched_group, kmeans
from fedtalora_flwr.aggregation.signature import OF_A_ROUND, SIGNATURES
from fedtalora_flwr.report import read_run
from fedtalora_flwr.run_folder import checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run with method=local-only")
    arguments = parser.parse_args()
    try:
        grams, tasks = grams_and_tasks(arguments.run)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    num_tasks = len(set(tasks))
    title = f"share of {len(tasks)} slots in the group of their task, of {num_tasks}"
    table = Table(
        "signature", "as it is", "unit length", "directions", "cosines, one task | different", "rho", title=title
    )
    for name, gram in grams.items():
        unit = cosines(gram)
        cuts = (embed(gram), embed(unit), directions(gram, num_dims=num_tasks))
        one, different, spread = apart(unit, tasks)
        rho = len(tasks) ** 0.5 * (one - different) / (num_tasks * spread)
        shares = (f"{found(points, tasks):.2f}" for points in cuts)
        table.add_row(name, *shares, f"{one:.3f} | {different:.3f}", f"{rho:.2f}")
    Console().print(table)


def grams_and_tasks(run: Path) -> tuple[dict[str, Matrix], list[int]]:
    """Give the Gram matrix (n, n) of each signature over a run's n slots, and the task of each slot.

    Raises
    ------
    ValueError
        If it is no run in which every slot has trained for itself.
    """
    record = read_run(run)
    clustered = checkpoint.load(record.path / "checkpoint").clustered
    if clustered is None or not clustered.own or clustered.assigned:
        raise ValueError(f"{run} is no run with method=local-only, but with method={record.config.get('method')}")
    slots = sorted(clustered.own)
    start, adapters = clustered.start.adapters, [clustered.own[slot].adapters for slot in slots]
    tasks = [record.manifest["slots"][slot.partition_id][slot.number] for slot in slots]
    grams = {}
    for name, gram_of in SIGNATURES.items():
        of_a_round = OF_A_ROUND.get(name)
        grams[name] = gram_of([of_a_round(start, one) for one in adapters] if of_a_round else adapters).numpy()
    return grams, tasks


def found(points: Matrix, tasks: list[int]) -> float:
    """Cut points (n, m) into as many groups as there are tasks; the share in the group of its task."""
    groups = kmeans(points, num_clusters=len(set(tasks)), seed=0)
    return float(np.mean(in_matched_group(groups.tolist(), tasks)))


def apart(unit: Matrix, tasks: list[int]) -> tuple[float, float, float]:
    """Average the cosines (n, n) of two slots of one task, and of two of different tasks, with these' deviation."""
    same = np.equal.outer(tasks, tasks)
    others = ~np.eye(len(tasks), dtype=bool)
    return float(unit[same & others].mean()), float(unit[~same].mean()), float(unit[~same].std())


if __name__ == "__main__":
    main()
