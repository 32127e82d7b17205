"""Show what a model said of each class: the ``evaluation`` of a run's metrics.json, or of data of one's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fedtalora_flwr.report import figures
from fedtalora_flwr.report.html import Picture, picture, render, write_whole
from fedtalora_flwr.report.measures import percent
from fedtalora_flwr.run_folder.reader import number

_MOST_BARS, _LARGEST_PICTURE, _MOST_ROWS = 30, 40, 10
_MEANS = (
    ("accuracy", "Accuracy", "share of the test examples that are classified right"),
    ("balanced_accuracy", "Balanced accuracy", "mean over the classes of the accuracy on each"),
    ("macro_f1", "Macro F1", "mean over the classes of their F1"),
    ("ece", "Calibration error", "ECE: by how much confidence and accuracy differ; 0 is perfect"),
)


@dataclass(frozen=True)
class Quality:
    """What a page or a console says of an evaluation.

    Parameters
    ----------
    cards
        Headline numbers with their words.
    confusions
        The commonest mix-ups: true class, said class, examples.
    notes
        Sentences on what is not there, and why.
    """

    cards: tuple[dict[str, str], ...]
    confusions: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]


def quality_in_words(found: Mapping[str, Any]) -> Quality:
    """Put an evaluation into headline numbers, rows and notes; an empty one gives nothing."""
    means = [one for one in _MEANS if one[0] in found]
    cards = [{"label": label, "value": percent(number(found[key])), "hint": hint} for key, label, hint in means]
    notes = [str(found["remark"])] if "remark" in found else []
    if untested := [one["class"] for one in found.get("classes") or () if not one["num_examples"]]:
        notes.append(f"Without a test example, and in no mean: {', '.join(untested)}.")
    if left_out := found.get("left_out"):
        notes.append(f"Left out, for the model does not know these classes: {_counted(left_out)}.")
    if unread := found.get("unread"):
        notes.append(f"{len(unread)} examples could not be read, the first: {unread[0]}.")
    return Quality(tuple(cards), tuple((found.get("confusions") or [])[:_MOST_ROWS]), tuple(notes))


def evaluation_tables(found: Mapping[str, Any]) -> Group:
    """Return an evaluation for a rich console: the means, the classes that do worst, the commonest mix-ups, notes."""
    shown = quality_in_words(found)
    means = Table.grid(padding=(0, 2))
    for card in shown.cards:
        means.add_row(card["label"], Text(card["value"], style="bold"), Text(card["hint"], style="dim"))
    means.add_row("Examples", Text(f"{found['num_examples']:,}", style="bold"))
    worst = Table(title=f"classes, the {_MOST_ROWS} that do worst first", title_justify="left")
    for heading in ("class", "examples", "accuracy", "precision", "F1"):
        worst.add_column(heading, justify="left" if heading == "class" else "right")
    for one in _worst_first(found)[:_MOST_ROWS]:
        cells = [percent(number(one[key])) for key in ("accuracy", "precision", "f1")]
        worst.add_row(Text(one["class"]), f"{one['num_examples']:,}", *cells)
    mixed = Table(title="taken for each other", title_justify="left")
    for heading in ("is", "was taken for", "examples"):
        mixed.add_column(heading, justify="right" if heading == "examples" else "left")
    for one in shown.confusions:
        mixed.add_row(Text(one["class"]), Text(one["taken_for"]), str(one["num_examples"]))
    notes = [Text(note, style="yellow") for note in shown.notes]
    return Group(means, worst, *([mixed] if shown.confusions else []), *notes)


def write_evaluation(path: Path, found: Mapping[str, Any], *, title: str, subtitle: str) -> Path:
    """Write an evaluation as a page that opens offline."""
    shown = {"quality": quality_in_words(found), "pictures": quality_pictures(found)}
    return write_whole(path, render("evaluation.html.j2", title=title, subtitle=subtitle, **shown))


def _counted(examples: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in examples.items())


def _worst_first(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    tested = [one for one in found.get("classes") or () if one["num_examples"]]
    return sorted(tested, key=lambda one: number(one["accuracy"]))


def quality_pictures(found: Mapping[str, Any]) -> list[Picture]:
    """Draw an evaluation, as many pictures as it has numbers for."""
    drawn = []
    if worst := _worst_first(found):
        shown = worst[:_MOST_BARS]
        which = f"The {_MOST_BARS} lowest of {len(worst)} classes. " if len(worst) > _MOST_BARS else ""
        drawn.append(
            picture(
                figures.class_accuracy(
                    [number(one["accuracy"]) for one in shown], names=[one["class"] for one in shown]
                ),
                name="class-accuracy",
                title="Accuracy on each class",
                caption=f"{which}Per cent of the test examples of a class that the model gets right, with all classes "
                "seen to choose from.",
            )
        )
    confusion = found.get("confusion") or []
    if 0 < len(confusion) <= _LARGEST_PICTURE:
        drawn.append(
            picture(
                figures.confusion_matrix(confusion, names=[one["class"] for one in found["classes"]]),
                name="confusion",
                title="What is taken for what",
                caption="Test examples of the class of the row that the model took for the class of the column; the "
                "tone is their share of the row. Right answers are on the diagonal.",
                wide=len(confusion) > 20,
            )
        )
    if bins := found.get("calibration"):
        columns = {key: [number(one[key]) for one in bins] for key in ("confidence", "accuracy", "num_examples")}
        drawn.append(
            picture(
                figures.calibration(columns["confidence"], columns["accuracy"], num_examples=columns["num_examples"]),
                name="calibration",
                title="How sure, and how often right",
                caption="Test examples in 15 bins of the model's confidence; a dot is a bin, the larger the more "
                "examples are in it. On the dashed line confidence is what it says; below it the model is too sure.",
            )
        )
    clients = found.get("clients") or []
    accuracy = np.array([number(client["accuracy"]) for client in clients])
    if np.isfinite(accuracy).any():
        counted = "num_examples" in clients[0]
        drawn.append(
            picture(
                figures.client_accuracy(
                    accuracy,
                    partitions=[client["partition_id"] for client in clients],
                    overall=number(found["accuracy"]),
                ),
                name="client-accuracy",
                title="Accuracy for each client",
                caption="Per cent of the examples that each client holds out itself which the model gets right. "
                if counted
                else "Accuracy on each class, weighed by how many training examples of it the client holds: what the "
                "client can expect of the model on data like its own. The dashed line is the accuracy over all.",
                wide=len(clients) > _MOST_BARS,
            )
        )
    return drawn
