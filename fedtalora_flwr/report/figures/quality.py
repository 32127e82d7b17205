"""Pictures of what was said of each class: accuracy, mix-ups, how sure the model was; and accuracy by client."""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

from fedtalora_flwr.report.figures.style import (
    BLUE,
    GREY,
    HALF,
    ORANGE,
    TONES,
    WIDE,
    frameless,
    shorten,
    styled,
    text_color,
    tips,
)


@styled
def class_accuracy(accuracy: ArrayLike, *, names: Sequence[str]) -> Figure:
    """Draw a bar a class, from 0 to 100 %.

    Parameters
    ----------
    accuracy
        (n,) in [0, 1], in the order in which they are to stand, the first on top.
    names
        (n,) of the classes, untrusted text.
    """
    values = np.asarray(accuracy, dtype=np.float64)
    figure = Figure(figsize=(HALF, 0.8 + 0.22 * max(4, len(values))))
    axes = figure.add_subplot()
    places = np.arange(len(values))
    for bar, name, value in zip(axes.barh(places, values, height=0.7, color=BLUE), names, values, strict=True):
        tips(bar, [f"{name}: {100 * value:.2f} %"])
    for place, value in enumerate(values.tolist()):
        axes.text(value + 0.01, place, f"{100 * value:.1f}", va="center", fontsize=7.5)
    axes.set_yticks(places, [shorten(name, width=26) for name in names])
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_xlim(0, 1.12)
    axes.grid(False)
    axes.xaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("accuracy on the class")
    return figure


@styled
def confusion_matrix(confusion: ArrayLike, *, names: Sequence[str]) -> Figure:
    """Draw which classes are taken for which, each row as shares of its class.

    Parameters
    ----------
    confusion
        (n, n) examples; a row is a true class, a column what was said.
    names
        (n,) of the classes, untrusted text.
    """
    counts = np.asarray(confusion, dtype=np.float64)
    size = len(counts)
    rows = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, rows, out=np.full_like(counts, np.nan), where=rows > 0)
    cell = 0.36 if size <= 20 else 0.24  # inches
    figure = Figure(figsize=(max(HALF, 1.9 + cell * size), max(3.0, 1.6 + cell * size)))
    axes = figure.add_subplot()
    norm = PowerNorm(0.5, vmin=0, vmax=1)  # a mix-up of a few per cent is seen
    shown = np.ma.masked_where((counts == 0) | np.isnan(shares), shares)
    mesh = axes.pcolormesh(shown, cmap=TONES, norm=norm, edgecolors="white", lw=0.6)
    tips(mesh, [f"{names[i]}, taken for {names[j]}: {count:.0f}" for (i, j), count in np.ndenumerate(counts)])
    axes.set_ylim(size, 0)
    axes.set_aspect("equal")
    frameless(axes)
    labels = [shorten(name, width=20) for name in names]
    axes.set_xticks(np.arange(size) + 0.5, labels, rotation=90)
    axes.set_yticks(np.arange(size) + 0.5, labels)
    axes.set_xlabel("the model said")
    axes.set_ylabel("it is")
    if size <= 30:
        for i, j in np.argwhere(counts):
            axes.text(
                *(j + 0.5, i + 0.5, f"{counts[i, j]:.0f}"),
                ha="center",
                va="center",
                fontsize=7.5 if size <= 20 else 5.5,
                color=text_color(float(norm(shares[i, j]))),
            )
    return figure


@styled
def calibration(confidence: ArrayLike, accuracy: ArrayLike, *, num_examples: ArrayLike) -> Figure:
    """Draw how often the model is right against how sure it was, a dot a bin, as large as the bin.

    Parameters
    ----------
    confidence, accuracy
        (n,) in [0, 1], means of each bin that has examples.
    num_examples
        (n,) of each bin.
    """
    sizes = np.asarray(num_examples, dtype=np.float64)
    figure = Figure(figsize=(HALF, 3.9))
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], "--", color=GREY, lw=1)
    axes.plot(confidence, accuracy, color=BLUE, lw=1)
    area = 14 + 140 * sizes / max(1.0, float(sizes.max(initial=0)))
    bins = zip(np.asarray(confidence), np.asarray(accuracy), sizes, strict=True)
    tips(
        axes.scatter(confidence, accuracy, s=area, color=BLUE),
        [f"{n:.0f} examples: confidence {100 * sure:.1f} %, accuracy {100 * right:.1f} %" for sure, right, n in bins],
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    axes.set_xlim(-0.02, 1.04)
    axes.set_ylim(-0.02, 1.04)
    axes.set_xlabel("mean confidence")
    axes.set_ylabel("accuracy")
    return figure


@styled
def client_accuracy(accuracy: ArrayLike, *, partitions: Sequence[int], overall: float) -> Figure:
    """Draw a dot a client, and a line at the accuracy over all.

    Parameters
    ----------
    accuracy
        (K,) in [0, 1], NaN where a client has none.
    partitions
        (K,) their numbers.
    overall
        Over all examples.
    """
    figure = Figure(figsize=(WIDE if len(partitions) > 30 else HALF, 3.0))
    axes = figure.add_subplot()
    axes.axhline(overall, color=ORANGE, lw=1, ls="--")
    values = np.asarray(accuracy, dtype=np.float64)
    (dots,) = axes.plot(partitions, values, "o", color=BLUE, markersize=5)
    known = [(k, value) for k, value in zip(partitions, values, strict=True) if np.isfinite(value)]
    tips(dots, [f"client {k}: {100 * value:.2f} %" for k, value in known])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=15, min_n_ticks=1))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axes.margins(y=0.15)
    axes.set_xlabel("client")
    axes.set_ylabel("accuracy")
    return figure
