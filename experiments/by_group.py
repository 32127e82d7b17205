"""Score finished runs by the groups of their data's classes, as CLINC150's ten domains, and set them side by side.

A run with one model for all classes is scored on its test data: of each group among all classes, and among the
group's own. A run with a model for each task (fl-tac, local-only) has written the accuracy of every task among the
task's classes, which stands in the second column where its tasks are the groups; the first is what comes of routing the
inputs, where the run has learned to. A group is left out of a run that has not learned all of its classes.

Usage: python experiments/by_group.py RUN... [--device cpu] [--json FILE]
"""

import argparse
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.data import Source
from fedtalora_flwr.inference.model import open_trained
from fedtalora_flwr.model.session import data_of
from fedtalora_flwr.report import RunRecord, read_run
from fedtalora_flwr.run_folder.reader import number

Accuracies = list[float | None]  # in [0, 1], a group each; None where the run has none


@dataclass(frozen=True)
class Scores:
    """A run's accuracies, in the order of its data's groups.

    Parameters
    ----------
    run
        Its folder.
    groups
        Names of each group's classes.
    num_examples
        Test examples of each group.
    among_all, among_group
        Accuracy among all classes that the run has learned, and among those of the group.
    """

    run: str
    groups: list[list[str]]
    num_examples: list[int]
    among_all: Accuracies
    among_group: Accuracies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of finished runs")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    try:
        found = [scores(run, device=arguments.device) for run in arguments.runs]
        require_same_groups(found)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    Console().print(table(found))
    if arguments.json:
        lines = [
            asdict(one) | {"mean_among_all": mean(one.among_all), "mean_among_group": mean(one.among_group)}
            for one in found
        ]
        arguments.json.write_text(json.dumps(lines, indent=1) + "\n")


def scores(run: Path, *, device: str) -> Scores:
    """Score a run by the groups of its data.

    Raises
    ------
    ValueError
        If the run is not finished, its data has no groups or no test data, or it has a model for each task and these
        are not the groups.
    """
    record = read_run(run)
    if record.state != "complete":
        raise ValueError(f"{run} is not finished; go on with: fedtalora run --resume {run}")
    source = data_of(RunConfig.parse(record.config)).source
    if not source.groups or not len(source.test):
        raise ValueError(f"{run}: {source.name} has no {'test data' if source.groups else 'groups of classes'}")
    has_slots = bool(record.manifest.get("slots"))
    among_all: Accuracies = [None] * len(source.groups)
    among_group = among_all
    if not has_slots or not np.isnan(number(record.rounds[-1].get("accuracy_routed"))):
        among_all, among_group = scored(record, source, device=device)
    return Scores(
        run=str(run),
        groups=[[source.class_names[class_id] for class_id in group] for group in source.groups],
        num_examples=[int(np.isin(source.test.labels, group).sum()) for group in source.groups],
        among_all=among_all,
        among_group=written(record, source) if has_slots else among_group,
    )


def scored(record: RunRecord, source: Source, *, device: str) -> tuple[Accuracies, Accuracies]:
    """Let the run's model classify each group's test data: among all classes, and among the group's."""
    trained = open_trained(record.path, device=device)
    classes = np.array(trained.classes)  # (C,)
    among_all: Accuracies = []
    among_group: Accuracies = []
    for group in source.groups:
        rows = np.flatnonzero(np.isin(source.test.labels, group))
        if not len(rows) or not set(group) <= set(trained.classes):
            among_all.append(None)
            among_group.append(None)
            continue
        labels = source.test.labels[rows]
        logits = trained.logits(trained.model.backbone.encode(source.test, rows, source=source)).numpy()  # (n, C)
        of_group = np.isin(classes, group)  # (C,)
        among_all.append(float((classes[logits.argmax(1)] == labels).mean()))
        among_group.append(float((classes[of_group][logits[:, of_group].argmax(1)] == labels).mean()))
    return among_all, among_group


def written(record: RunRecord, source: Source) -> Accuracies:
    """Read the accuracy of each group from the metrics of a run whose tasks are the groups."""
    accuracy = record.accuracy()  # (T, T)
    row = accuracy[np.isfinite(accuracy).any(1)][-1]  # all tasks are trained at once
    of_task = {frozenset(task): a for task, a in zip(record.manifest["tasks"], row.tolist(), strict=True)}
    if of_task.keys() != {frozenset(group) for group in source.groups}:
        raise ValueError(
            f"{record.path} has a model for each of {len(row)} tasks, which are not the {len(source.groups)} groups of "
            f"{source.name}; run it with task-order=domain and num-tasks={len(source.groups)}"
        )
    return [None if np.isnan(of_task[frozenset(group)]) else of_task[frozenset(group)] for group in source.groups]


def require_same_groups(found: list[Scores]) -> None:
    """Refuse runs that were not tested on as many examples of the same groups.

    Raises
    ------
    ValueError
        If two differ.
    """
    for one in found[1:]:
        if (one.groups, one.num_examples) != (found[0].groups, found[0].num_examples):
            raise ValueError(
                f"{found[0].run} and {one.run} were not tested on the same groups: {sum(found[0].num_examples)} "
                f"examples of {len(found[0].groups)} groups, and {sum(one.num_examples)} of {len(one.groups)}"
            )


def mean(accuracies: Accuracies) -> float | None:
    """Average over the groups that have one."""
    there = [a for a in accuracies if a is not None]
    return statistics.mean(there) if there else None


def table(found: list[Scores]) -> Table:
    """Return a row a group, and of each run two columns: among all classes, among the group's."""
    shown = Table(title="accuracy (%) on the test data of each group: among all classes | among its own")
    shown.add_column("group")
    for one in found:
        shown.add_column(f"{Path(one.run).name}", justify="right", overflow="fold")
    for index, (names, num) in enumerate(zip(found[0].groups, found[0].num_examples, strict=True)):
        cells = [f"{percent(one.among_all[index])} | {percent(one.among_group[index])}" for one in found]
        shown.add_row(f"{', '.join(names[:2])}{', …' if len(names) > 2 else ''} ({num})", *cells)
    means = [f"{percent(mean(one.among_all))} | {percent(mean(one.among_group))}" for one in found]
    shown.add_section()
    shown.add_row("mean of the groups", *means)
    return shown


def percent(accuracy: float | None) -> str:
    """Word an accuracy in [0, 1]."""
    return "–" if accuracy is None else f"{100 * accuracy:.1f}"


if __name__ == "__main__":
    main()
