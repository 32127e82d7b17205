"""Write the page of one run."""

import shlex
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fedtalora_flwr.config.sources import app_folder, defaults
from fedtalora_flwr.config.units import human_bytes
from fedtalora_flwr.report import figures
from fedtalora_flwr.report.holdings import class_picture
from fedtalora_flwr.report.html import Picture, picture, render, save, write_whole
from fedtalora_flwr.report.measures import count, duration, percent, points
from fedtalora_flwr.report.quality import quality_in_words, quality_pictures
from fedtalora_flwr.run_folder.reader import NOT_A_SETTING_OF_THE_METHOD, RunRecord, number, read_run, setting_text

_LONGEST_ON_A_COMMAND_LINE = 80
_MOST_FAILURES_SHOWN = 200
_BY_CLASS = "By class and client"


def write_report(path: Path | str, *, pictures: Path | None = None) -> Path:
    """Write ``report.html`` into a run folder and return its path.

    Parameters
    ----------
    path
        The run folder.
    pictures
        Folder for each picture as an SVG file of its own too; None: the page alone.

    Raises
    ------
    FileNotFoundError, ValueError
        As `read_run`.
    """
    run = read_run(path)
    sections = _sections(run)
    if pictures:
        for drawn in chain.from_iterable(sections.values()):
            save(drawn, pictures)
    return write_whole(run.path / "report.html", _page(run, sections))


def report_page(run: RunRecord) -> str:
    """Give the page of a run as HTML."""
    return _page(run, _sections(run))


def _sections(run: RunRecord) -> dict[str, list[Picture]]:
    return {
        "Accuracy": _accuracy_pictures(run),
        _BY_CLASS: quality_pictures(_evaluation(run)),
        "Answers": _answer_pictures(run),
        "Training": _training_pictures(run),
        "Clusters": _cluster_pictures(run),
        "Who held which classes": _class_pictures(run),
        "Communication and time": _cost_pictures(run),
    }


def _evaluation(run: RunRecord) -> dict[str, Any]:
    return (run.metrics or {}).get("evaluation") or {}


def _page(run: RunRecord, sections: Mapping[str, Sequence[Picture]]) -> str:
    failures = _failures(run)
    command, left_out = _command(run)
    return render(
        "report.html.j2",
        title=f"{run.name} · fedtalora",
        run=run,
        subtitle=_subtitle(run),
        cards=_cards(run),
        sections=[{"title": title, "pictures": drawn} for title, drawn in sections.items()],
        quality=quality_in_words(_evaluation(run)),
        by_class=_BY_CLASS,
        answers=_answers(run),
        privacy=_privacy(run),
        failures=failures[:_MOST_FAILURES_SHOWN],
        num_failures=len(failures),
        parameters=_parameters(run),
        modules=[
            {"name": name, "shape": " × ".join(str(size) for size in shape)}
            for name, shape in (run.manifest.get("adapted_modules") or {}).items()
        ],
        settings=_settings(run),
        command=command,
        left_out=left_out,
        provenance=_provenance(run),
        partition_hashes=run.manifest.get("partition_hashes") or [],
    )


def _subtitle(run: RunRecord) -> str:
    config = run.config
    stream = f"{run.num_tasks} task{'' if run.num_tasks == 1 else 's'}"
    parts = [config.get("method"), config.get("dataset"), config.get("backbone"), stream]
    if "num-clients" in config:
        parts.append(f"{config['num-clients']} clients")
    if "partition" in config:
        parts.append(f"{config['partition']} partition")
    return " · ".join(str(part) for part in parts if part)


def _cards(run: RunRecord) -> list[dict[str, str]]:
    complete = run.state == "complete"
    seen = run.accuracy_seen()
    trained = f"after task {len(seen)} of {run.num_tasks}" if seen else "not measured yet"
    up, down = run.metric("bytes_up_total"), run.metric("bytes_down_total")
    participants = {p for line in run.rounds for p in line.get("participants") or ()}
    return [
        _card(
            "Final accuracy" if complete else "Accuracy so far",
            percent(run.metric("faa")),
            f"{'FAA: ' if complete else ''}all classes seen, {trained}",
        ),
        _card(
            "Average accuracy",
            percent(run.metric("aia")),
            "AIA: mean over the tasks of the accuracy after each",
        ),
        _card(
            "Forgetting",
            points(run.metric("forgetting")),
            "points lost since a task's best; lower is better",
        ),
        _card("Traffic", human_bytes(up + down), f"{human_bytes(up)} up, {human_bytes(down)} down"),
        _card(
            "Time",
            duration(run.metric("wall_seconds")),
            "wall clock, whole run" if complete else "the recorded rounds together",
        ),
        _card("Rounds", count(run.metric("num_rounds")), f"{len(participants)} clients took part"),
    ]


def _card(label: str, value: str, hint: str) -> dict[str, str]:
    return {"label": label, "value": value, "hint": hint}


_TASK_BY_TASK = (
    "Per cent of a task's test data (column) that the model gets right after training up to a task (row), with all "
    "classes seen so far to choose from. Down a column: how a task fares as others follow. The diagonal: how well "
    "each task was learned at first. Darker is better; most tones lie near 100 %."
)
_TOKENS = (
    "Per cent of the tokens of a task's test answers (column) that are the likeliest to the model, given all before "
    "them, after training up to a task (row). Darker is better; most tones lie near 100 %."
)
_AT_ONCE = (
    "Per cent of a task's test data (column) that the clients' models for it get right, with the classes of the task "
    "to choose from. All tasks are trained at once, so there is one row. Most tones lie near 100 %."
)


def _accuracy_pictures(run: RunRecord) -> list[Picture]:
    pictures = []
    accuracy = run.accuracy()
    if np.isfinite(accuracy).any():
        pictures.append(
            picture(
                figures.accuracy_matrix(accuracy),
                name="matrix",
                title="Accuracy on each task after each task",
                caption=_TOKENS if run.writes else _AT_ONCE if run.manifest.get("slots") else _TASK_BY_TASK,
            )
        )
    if seen := run.accuracy_seen():
        pictures.append(
            picture(
                figures.accuracy_over_tasks({run.name: seen}, num_tasks=run.num_tasks),
                name="seen",
                title="Accuracy over the stream",
                caption=f"Per cent of the {'tokens of test answers' if run.writes else 'test data'} of all "
                f"{'tasks' if run.writes else 'classes'} seen so far that the model gets right after each task. The "
                "last point is FAA, the mean of the points AIA. The axis shows the part of the scale where they are.",
            )
        )
    return pictures


_MOST_ANSWERS_SHOWN = 3  # of a task


def _answer_pictures(run: RunRecord) -> list[Picture]:
    lines = [line for line in run.rounds if line.get("answer_losses")]
    if not lines:
        return []
    names, tasks = run.manifest.get("class_names") or [], run.manifest.get("tasks") or []
    losses = np.full((len(lines), len(tasks)), np.nan)
    for row, line in enumerate(lines):
        found = [number(loss) for loss in line["answer_losses"]]
        losses[row, : len(found)] = found
    return [
        picture(
            figures.answer_losses(
                losses,
                rounds=[line["server_round"] for line in lines],
                names=[", ".join(names[class_id] for class_id in task) for task in tasks],
            ),
            name="answer-losses",
            title="Loss on each task's answers",
            caption="Mean cross-entropy of a token of a task's test answers, in nats, after the rounds that evaluated; "
            "its exponential is the perplexity. Lower is better.",
            wide=True,
        )
    ]


def _answers(run: RunRecord) -> dict[str, Any]:
    """Give the scores by task and the first answers of each, of a run whose model was let answer."""
    tasks, shown = run.answers.get("tasks") or [], []
    for task in tasks:
        here = [one for one in run.answers["answers"] if one["task_id"] == task["task_id"]]
        shown += here[:_MOST_ANSWERS_SHOWN]
    return {"tasks": tasks, "shown": shown, "scored": any("score" in task for task in tasks)}


def _privacy(run: RunRecord) -> dict[str, Any]:
    """Say what privacy examples have, and what each client has spent of it on each task."""
    spent = run.epsilon_spent
    clients = sorted({int(client) for task in spent.values() for client in task})
    tasks = sorted(spent, key=int)
    return {
        "what": run.manifest.get("privacy") or "none",
        "tasks": [f"task {int(task) + 1}" for task in tasks],
        "clients": [
            (client, [f"{number(spent[task].get(str(client))):.2f}".replace("nan", "–") for task in tasks])
            for client in clients
        ],
    }


def _clock(run: RunRecord) -> dict[str, Any]:
    return {
        "rounds": [line["server_round"] for line in run.rounds],
        "task_ids": [line["task_id"] for line in run.rounds],
    }


def _training_pictures(run: RunRecord) -> list[Picture]:
    described = (
        (
            "mean_loss",
            figures.loss,
            "Training loss",
            "Mean loss of the participants' training steps in each round: the cross-entropy (nats), and the "
            "penalty where there is one. Shaded bands are tasks; it jumps where new classes arrive.",
        ),
        (
            "residual_norm",
            figures.residual_norm,
            "Aggregation residual",
            "Frobenius norm of the cumulative residual (no unit), over all adapted modules: what averaging "
            "the factors alone would have lost of the mean of the clients' products so far.",
        ),
        (
            "exactness_error",
            figures.exactness_error,
            "Exactness error",
            "Relative Frobenius distance, in the worst layer, of what the new global model has learned to "
            "the weighted mean of the clients' full weights (no unit, log scale). Rounding alone leaves "
            "about 1e-7. A hollow dot at the lower edge is exactly 0.",
        ),
    )
    return [
        picture(
            draw(run.column(key), **_clock(run)),
            name=key,
            title=title,
            caption=caption,
            wide=key == "exactness_error",
        )
        for key, draw, title, caption in described
        if np.isfinite(run.column(key)).any()
    ]


def _cluster_pictures(run: RunRecord) -> list[Picture]:
    tasks_of = run.manifest.get("slots") or ()
    lines = [line for line in run.rounds if line.get("slots")]
    if not tasks_of or not lines:
        return []
    maps = []
    for line in lines:
        slots, share = line["slots"], percent(number(line.get("cluster_accuracy")))
        maps.append(
            figures.SlotMap(
                title=f"round {line['server_round']}: {share}",
                places=np.array([[slot["x"], slot["y"]] for slot in slots]),
                tasks=[tasks_of[slot["partition_id"]][slot["number"]] for slot in slots],
                right=[slot["right"] for slot in slots],
            )
        )
    names = [f"task {task + 1}" for task in range(max(task for tasks in tasks_of for task in tasks) + 1)]
    return [
        picture(
            figures.clusters(maps, task_names=names),
            name="clusters",
            title="Adapters and their clusters",
            caption="A dot is the adapter of one client's task, neighbours are alike (t-SNE of the signatures, each "
            "round for itself; distances between groups say nothing). Colour is the true task, which the clustering "
            "does not use; a cross is a slot that was put into the cluster of another task or into none. Above each "
            "panel: the share of all slots in the cluster of their task.",
            wide=True,
        )
    ]


def _class_pictures(run: RunRecord) -> list[Picture]:
    manifest = run.manifest
    if not manifest.get("class_counts") or not manifest.get("tasks"):
        return []
    return [class_picture(manifest["class_counts"], manifest["tasks"], manifest.get("class_names") or [])]


def _cost_pictures(run: RunRecord) -> list[Picture]:
    if not run.rounds:
        return []
    parts = {part: np.nan_to_num(run.seconds(part)) for part in ("wait", "aggregate", "evaluate")}
    rest = np.nan_to_num(run.seconds("total")) - sum(parts.values())
    if rest.sum() > 0.01 * sum(part.sum() for part in parts.values()):
        parts["other"] = np.maximum(rest, 0)
    return [
        picture(
            figures.bytes_per_round(run.column("bytes_up"), run.column("bytes_down"), **_clock(run)),
            name="bytes",
            title="Bytes on the wire",
            caption="Left: bytes of all clients in each round, what the server sent stacked on what it got. "
            "Right: the same, summed since the start. Decimal units (1 MB is 1,000,000 bytes).",
            wide=True,
        ),
        picture(
            figures.seconds_per_round(parts, **_clock(run)),
            name="seconds",
            title="Time of a round",
            caption="Seconds at the server: waiting for the clients (their training and the network), adding "
            "up their updates, evaluating. The rounds that evaluate stand out.",
            wide=True,
        ),
    ]


def _failures(run: RunRecord) -> list[dict[str, Any]]:
    return [
        {
            "server_round": line["server_round"],
            "task": line["task_id"] + 1,
            "client": "unknown" if failure.get("partition_id") is None else f"client {failure['partition_id']}",
            "reason": str(failure.get("reason") or "no reason given")[:2000],
        }
        for line in run.rounds
        for failure in line.get("failures") or ()
    ]


def _parameters(run: RunRecord) -> list[dict[str, str]]:
    counts = run.manifest.get("parameters") or {}
    total = number(counts.get("total"))
    return [
        {
            "name": key.replace("_", " ").replace("-", " "),
            "count": count(number(num)),
            "share": "–" if not total > 0 else f"{100 * number(num) / total:.2f} %",
        }
        for key, num in counts.items()
    ]


def _settings(run: RunRecord) -> list[dict[str, Any]]:
    """Give all settings in two parts: those of this run, and those that are as they come."""
    usual = defaults(app_folder())
    pairs = [(key, setting_text(value) or '""') for key, value in sorted(run.config.items())]
    own = [pair for pair in pairs if setting_text(usual.get(pair[0], "")) != setting_text(run.config[pair[0]])]
    return [
        {"title": "Set for this run", "pairs": own, "open": True},
        {"title": "At their defaults", "pairs": [pair for pair in pairs if pair not in own], "open": False},
    ]


def _command(run: RunRecord) -> tuple[str, list[str]]:
    """Return the command that does the run again, and the settings that are too long for it."""
    pairs, left_out = [], []
    for key, value in sorted(run.config.items()):
        pair = f"{key}={setting_text(value)}"
        if key in NOT_A_SETTING_OF_THE_METHOD:
            continue
        if len(pair) > _LONGEST_ON_A_COMMAND_LINE or "\n" in pair:
            left_out.append(key)
        else:
            pairs.append(f"--set {shlex.quote(pair)}")
    lines, line = [], "fedtalora run"
    for pair in pairs:
        if len(line) + len(pair) > 110:
            lines.append(line)
            line = "   "
        line = f"{line} {pair}"
    return " \\\n".join([*lines, line]), left_out


def _provenance(run: RunRecord) -> list[tuple[str, str]]:
    manifest = run.manifest
    named = {
        "run folder": run.path,
        "started at": manifest.get("started_at"),
        "fedtalora": manifest.get("fedtalora_version"),
        "git commit": manifest.get("git_commit"),
        "seed": manifest.get("seed", run.config.get("seed")),
        "partition hash": manifest.get("partition_hash"),
        **(manifest.get("versions") or {}),
    }
    return [(key, "–" if value in (None, "") else str(value)) for key, value in named.items()]
