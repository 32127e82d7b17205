"""The picture of slots and their clusters over the rounds."""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from fedtalora_flwr.report.figures.style import BLACK, SERIES, WIDE, evenly, frameless, shorten, styled

_COLUMNS = 5


@dataclass(frozen=True)
class SlotMap:
    """The slots of a round on a plane.

    Parameters
    ----------
    title
        Of its panel.
    places
        (n, 2).
    tasks
        The true task of each slot.
    right
        Whether it is in the cluster of that task.
    """

    title: str
    places: NDArray[np.float64]  # (n, 2)
    tasks: Sequence[int]
    right: Sequence[bool]


@styled
def clusters(maps: Sequence[SlotMap], *, task_names: Sequence[str]) -> Figure:
    """Draw a panel for each map, at most ten, evenly chosen: colour is the true task, a cross is in a wrong cluster."""
    shown = [maps[index] for index in evenly(len(maps), at_most=2 * _COLUMNS)]
    tones = 10 if len(task_names) <= 10 else 20
    colors = SERIES if len(task_names) <= len(SERIES) else [mpl.colormaps[f"tab{tones}"](i) for i in range(tones)]
    rows = -(-len(shown) // _COLUMNS)
    columns = min(len(shown), _COLUMNS)
    figure = Figure(figsize=(WIDE, 0.8 + 2.2 * rows))
    for axes, one in zip(figure.subplots(rows, columns, squeeze=False).flat, shown, strict=False):
        for (x, y), task, right in zip(one.places, one.tasks, one.right, strict=True):
            axes.plot(x, y, "o" if right else "x", color=colors[task % len(colors)], markersize=4 if right else 5)
        axes.set_title(one.title)
        axes.margins(0.1)
    for axes in figure.axes:
        frameless(axes)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_visible(bool(axes.get_title()))  # a last row may not be full
        axes.patch.set(edgecolor="#E4E8ED", linewidth=1)
    kinds = [Line2D([], [], marker="o", ls="", color=colors[i % len(colors)]) for i in range(len(task_names))]
    names = [shorten(name, width=24) for name in task_names]
    wrong = Line2D([], [], marker="x", ls="", color=BLACK)
    words = [*names, "in a wrong cluster or none"]
    figure.legend([*kinds, wrong], words, loc="outside lower center", ncols=11, columnspacing=1.2, handletextpad=0.2)
    return figure
