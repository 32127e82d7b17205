"""Pictures of accuracy by task."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

from fedtalora_flwr.report.figures.style import (
    HALF,
    SERIES,
    TONES,
    WIDE,
    dots,
    evenly,
    frameless,
    roomy,
    shorten,
    styled,
    text_color,
    tidy,
    tips,
)


@styled
def accuracy_matrix(accuracy: ArrayLike) -> Figure:
    """Draw a_ij as a heat map.

    Parameters
    ----------
    accuracy
        (T, T), in [0, 1]; NaN where nothing was measured.
    """
    a = np.asarray(accuracy, dtype=np.float64)
    size = len(a)
    figure = Figure(figsize=(HALF, min(HALF, 1.4 + 0.46 * size) if size < 9 else HALF - 0.6))
    axes = figure.add_subplot()
    norm = PowerNorm(2, vmin=0, vmax=1)  # most tones where good models differ
    mesh = axes.pcolormesh(np.ma.masked_invalid(a), cmap=TONES, norm=norm, edgecolors="white", lw=1)
    tips(
        mesh,
        [
            "not measured" if math.isnan(value) else f"task {j + 1} after task {i + 1}: {100 * value:.2f} %"
            for (i, j), value in np.ndenumerate(a)
        ],
    )
    axes.invert_yaxis()
    frameless(axes)
    labels = evenly(size, at_most=20)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator([i + 0.5 for i in labels]))
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{int(x) + 1}"))
    axes.set_xlabel("test data of task")
    axes.set_ylabel("after training task")
    if size <= 20:
        digits = 1 if size <= 8 else 0
        for i, j in np.argwhere(~np.isnan(a)):
            axes.text(
                j + 0.5,
                i + 0.5,
                f"{100 * a[i, j]:.{digits}f}",
                ha="center",
                va="center",
                fontsize=8.5 if size <= 12 else 6.5,
                color=text_color(float(norm(a[i, j]))),
            )
    bar = figure.colorbar(mesh, ax=axes, format=PercentFormatter(1), ticks=[0, 0.25, 0.5, 0.75, 1], pad=0.02, aspect=30)
    tidy(bar)
    return figure


@styled
def accuracy_over_tasks(curves: Mapping[str, Sequence[float]], *, num_tasks: int) -> Figure:
    """Draw A_i over the tasks, a line a run.

    Parameters
    ----------
    curves
        By the run's name (one run: no legend), [A_1, A_2, ...] in [0, 1]; NaN where nothing was measured.
    num_tasks
        T, the length of the stream: a run that stopped early leaves room.
    """
    figure = Figure(figsize=(HALF, 3.9) if len(curves) == 1 else (WIDE, 3.8))
    axes = figure.add_subplot()
    dashes = ("-", "--", "-.", ":")
    for n, (name, values) in enumerate(curves.items()):
        tasks = np.arange(1, len(values) + 1)
        style = dashes[n // len(SERIES) % len(dashes)]
        (line,) = axes.plot(
            tasks, values, style, marker=dots(num_tasks), color=SERIES[n % 8], label=shorten(name, width=48)
        )
        known = [(task, value) for task, value in zip(tasks, values, strict=True) if not math.isnan(value)]
        tips(line, [f"{name}, after task {task}: {100 * value:.2f} %" for task, value in known])
        if len(curves) == 1 and num_tasks <= 12:
            for task, value in known:
                axes.annotate(
                    f"{100 * value:.1f}",
                    (task, value),
                    xytext=(0, 6),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8},
                )
    axes.set_xlim(0.6, num_tasks + 0.4)
    measured = [value for values in curves.values() for value in values if not math.isnan(value)]
    axes.set_ylim(*(roomy(min(measured), max(measured)) if measured else (0, 1)))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=15, min_n_ticks=1))
    axes.set_xlabel("tasks trained")
    axes.set_ylabel("accuracy, all classes seen")
    if len(curves) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
