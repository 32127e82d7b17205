"""Pictures of a sweep's cases side by side."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedtalora_flwr.report.figures.style import SERIES, WIDE, shorten, styled

_GAP = 0.7  # of a row, between groups


@dataclass(frozen=True)
class CaseRow:
    """A case's row.

    Parameters
    ----------
    name
        Stands before it.
    block
        Cases of one block share their scales; blocks stand below one another.
    group
        Cases of one group stand together, with a gap to the next.
    values
        Mean and standard deviation of each quantity; a NaN deviation draws no bar.
    """

    name: str
    block: str
    group: Hashable
    values: Sequence[tuple[float, float]]


@styled
def cases(rows: Sequence[CaseRow], labels: Sequence[str]) -> Figure:
    """Draw a row a case and a column of panels a quantity: dots for means, bars for the spread.

    Parameters
    ----------
    rows
        From top to bottom.
    labels
        Of the quantities.
    """
    blocks = [[row for row in rows if row.block == block] for block in dict.fromkeys(row.block for row in rows)]
    places = [_places([row.group for row in block]) for block in blocks]
    heights = [place[-1] + 1.5 for place in places]
    figure = Figure(figsize=(WIDE, 0.6 + 0.45 * len(blocks) + 0.22 * sum(heights)))
    panels = figure.subplots(len(blocks), len(labels), sharey="row", squeeze=False, height_ratios=heights)
    for block, place, line in zip(blocks, places, panels, strict=True):
        for index, axes in enumerate(line):
            mean, deviation = np.array([row.values[index] for row in block], dtype=np.float64).T
            axes.errorbar(mean, place, xerr=np.nan_to_num(deviation), fmt="o", color=SERIES[index], capsize=2, lw=1.2)
            axes.xaxis.set_major_locator(MaxNLocator(6))
            axes.grid(True, axis="x")
            axes.grid(False, axis="y")
            axes.set_yticks(place, [shorten(row.name, width=56) for row in block])
            axes.set_ylim(place[-1] + 0.6, -0.6)
    for axes, label in zip(panels[-1], labels, strict=True):
        axes.set_xlabel(label)
    return figure


def _places(groups: Sequence[Hashable]) -> list[float]:
    """Give the height of each row, with a gap where another group begins."""
    gaps = [0, *(before != after for before, after in pairwise(groups))]
    return [index + _GAP * sum(gaps[: index + 1]) for index in range(len(groups))]
