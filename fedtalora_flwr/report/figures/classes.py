"""The map of who holds which classes of which task."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike, NDArray

from fedtalora_flwr.report.figures.style import TONES, WIDE, evenly, frameless, shorten, styled, text_color, tidy, tips

_GAP = 0.5  # columns between two tasks of a class map


@styled
def class_map(class_counts: ArrayLike, *, tasks: Sequence[Sequence[int]], class_names: Sequence[str]) -> Figure:
    """Draw who holds which classes of which task, coloured by the number of training examples.

    Parameters
    ----------
    class_counts
        (num_partitions, num_classes), training examples.
    tasks
        Class ids of each task, in training order.
    class_names
        (num_classes,), untrusted text.

    Notes
    -----
    Tasks stand as groups of columns and go on in a new band where a line is full. A stream of too many
    classes for that (see `shows_classes`) is drawn with one column a task.
    """
    counts = np.asarray(class_counts, dtype=np.int64)
    if not shows_classes(counts, tasks=tasks):
        return _task_map(counts, tasks=tasks)
    bands = _bands(tasks)
    row = _row_height(len(counts))
    width = max(sum(len(tasks[t]) + _GAP for t in band) - _GAP for band in bands)
    # Names are turned where they would run into each other.
    longest = max((min(len(class_names[c]), 22) for task in tasks for c in task), default=1)
    turned = longest * 0.068 > 0.9 * (WIDE - 1) / width
    footer = longest * 0.065 if turned else 0.15
    heights = [len(counts) * row + footer + 0.45] * len(bands)
    figure = Figure(figsize=(WIDE, sum(heights) + 0.75))
    norm = PowerNorm(0.5, vmin=0, vmax=max(1, int(counts.max())))
    axes_of_bands = figure.subplots(len(bands), 1, squeeze=False)[:, 0]
    for axes, band in zip(axes_of_bands, bands, strict=True):
        _draw_band(axes, counts, band=band, tasks=tasks, class_names=class_names, norm=norm, turned=turned)
        axes.set_xlim(-0.1, width + 0.1)
    _examples_bar(figure, axes_of_bands, norm, height=sum(heights))
    return figure


def shows_classes(class_counts: ArrayLike, *, tasks: Sequence[Sequence[int]]) -> bool:
    """Tell whether `class_map` draws each class, or, for lack of room, each task as a whole."""
    num_partitions = len(np.asarray(class_counts))
    widest = max(len(task) for task in tasks)
    return widest <= 50 and len(_bands(tasks)) * (num_partitions * _row_height(num_partitions) + 1) <= 24


def _row_height(num_partitions: int) -> float:
    return 0.3 if num_partitions <= 6 else 0.2 if num_partitions <= 40 else 0.08  # inches


def _bands(tasks: Sequence[Sequence[int]]) -> list[list[int]]:
    """Cut the tasks into lines of at most 50 columns and 16 tasks, as even as possible."""
    per_line = max(1, min(16, 50 // max(len(task) for task in tasks)))
    lines = math.ceil(len(tasks) / per_line)
    per_line = math.ceil(len(tasks) / lines)
    return [list(range(start, min(start + per_line, len(tasks)))) for start in range(0, len(tasks), per_line)]


def _draw_band(
    axes: Axes,
    counts: NDArray[np.int64],
    *,
    band: Sequence[int],
    tasks: Sequence[Sequence[int]],
    class_names: Sequence[str],
    norm: PowerNorm,
    turned: bool,
) -> None:
    num_partitions = len(counts)
    centres, labels, left = [], [], 0.0
    for task_id in band:
        held = counts[:, tasks[task_id]]  # (num_partitions, classes of the task)
        num_classes = held.shape[1]
        edges = left + np.arange(num_classes + 1)
        mesh = axes.pcolormesh(
            edges,
            np.arange(num_partitions + 1),
            np.ma.masked_equal(held, 0),
            cmap=TONES,
            norm=norm,
            edgecolors="white",
            lw=0.8 if num_partitions <= 40 else 0,
        )
        named = [shorten(class_names[c], width=80) for c in tasks[task_id]]
        tips(mesh, [f"client {k}, {named[j]}: {n} examples" for (k, j), n in np.ndenumerate(held)])
        axes.add_patch(_frame(left, num_classes, num_partitions))
        axes.text(left + num_classes / 2, -0.15, f"task {task_id + 1}", ha="center", va="bottom", weight="bold")
        if num_partitions <= 40 and held.max(initial=0) < 1000:
            for i, j in np.argwhere(held):
                shade = text_color(float(norm(held[i, j])))
                axes.text(
                    left + j + 0.5,
                    i + 0.5,
                    f"{held[i, j]}",
                    ha="center",
                    va="center_baseline",
                    fontsize=6.5 if turned else 8,
                    color=shade,
                )
        centres += [left + j + 0.5 for j in range(num_classes)]
        labels += [shorten(class_names[c], width=22) for c in tasks[task_id]]
        left += num_classes + _GAP
    axes.set_ylim(num_partitions, 0)
    axes.set_xticks(centres, labels, rotation=90 if turned else 0, fontsize=7)
    _name_clients(axes, num_partitions)


def _frame(left: float, width: float, height: float) -> Rectangle:
    return Rectangle((left, 0), width, height, fill=False, edgecolor="#B5BCC6", linewidth=0.8, clip_on=False)


def _name_clients(axes: Axes, num_partitions: int) -> None:
    rows = evenly(num_partitions, at_most=40)
    axes.set_yticks([i + 0.5 for i in rows], [f"client {i}" for i in rows], fontsize=7.5)
    frameless(axes)


def _examples_bar(figure: Figure, axes: Any, norm: PowerNorm, *, height: float) -> None:
    scale = ScalarMappable(norm=norm, cmap=TONES)
    bar = figure.colorbar(
        scale,
        ax=list(axes),
        orientation="horizontal",
        location="bottom",
        fraction=0.12 / height,
        aspect=40,
        shrink=0.4,
        pad=0.1 / height,
    )
    bar.set_label("training examples (colour grows with the square root)", fontsize=8)
    tidy(bar)


def _task_map(counts: NDArray[np.int64], *, tasks: Sequence[Sequence[int]]) -> Figure:
    """Draw one column a task: its examples and, in brackets, how many of its classes a client holds."""
    held = np.stack([counts[:, list(task)].sum(axis=1) for task in tasks], axis=1)  # (num_partitions, T)
    classes = np.stack([(counts[:, list(task)] > 0).sum(axis=1) for task in tasks], axis=1)
    num_partitions, num_tasks = held.shape
    height = num_partitions * _row_height(num_partitions)
    figure = Figure(figsize=(WIDE, height + 1.3))
    axes = figure.add_subplot()
    norm = PowerNorm(0.5, vmin=0, vmax=max(1, int(held.max())))
    axes.pcolormesh(np.ma.masked_equal(held, 0), cmap=TONES, norm=norm, edgecolors="white", lw=0.8)
    if num_partitions <= 40 and num_tasks <= 14:
        for i, j in np.argwhere(held):
            axes.text(
                j + 0.5,
                i + 0.5,
                f"{held[i, j]} ({classes[i, j]})",
                ha="center",
                va="center_baseline",
                fontsize=7,
                color=text_color(float(norm(held[i, j]))),
            )
    columns = evenly(num_tasks, at_most=25)
    axes.set_xticks([j + 0.5 for j in columns], [f"task {j + 1}" for j in columns], weight="bold")
    axes.xaxis.tick_top()
    axes.set_ylim(num_partitions, 0)
    _name_clients(axes, num_partitions)
    _examples_bar(figure, [axes], norm, height=height)
    return figure
