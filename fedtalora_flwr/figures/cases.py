"""Pictures of a sweep's cases side by side."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from fedtalora_flwr.figures.style import SERIES, WIDE, shorten, styled


@styled
def cases(names: Sequence[str], panels: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Draw a row a case and a panel a quantity: dots for means, bars for the spread.

    Parameters
    ----------
    names
        (n,), from top to bottom.
    panels
        By the quantity's label, (n,) pairs of mean and standard deviation; a NaN deviation draws no bar.
    """
    figure = Figure(figsize=(WIDE, 1.1 + 0.24 * len(names)))
    rows = np.arange(len(names))
    for index, (axes, (label, values)) in enumerate(
        zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(), strict=True)
    ):
        mean, deviation = np.asarray(values, dtype=np.float64).T
        axes.errorbar(mean, rows, xerr=np.nan_to_num(deviation), fmt="o", color=SERIES[index], capsize=2, lw=1.2)
        axes.grid(True, axis="x")
        axes.set_xlabel(label)
        axes.set_yticks(rows, [shorten(name, width=56) for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
    return figure
