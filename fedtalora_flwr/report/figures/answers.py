"""A picture of a language model's loss by task."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from fedtalora_flwr.report.figures.style import SERIES, WIDE, shorten, styled


@styled
def answer_losses(losses: ArrayLike, *, rounds: Sequence[int], names: Sequence[str]) -> Figure:
    """Draw the mean loss of an answer's token over the rounds that evaluated, a line a task.

    Parameters
    ----------
    losses
        (num_evaluations, T) nats, NaN where a task was not measured.
    rounds
        The round of each row.
    names
        Of the tasks.
    """
    values = np.asarray(losses, dtype=np.float64)
    figure = Figure(figsize=(WIDE, 3.6))
    axes = figure.add_subplot()
    for task, name in enumerate(names):
        style = ("-", "--", "-.", ":")[task // len(SERIES) % 4]
        axes.plot(
            rounds, values[:, task], style, marker="o", color=SERIES[task % len(SERIES)], label=shorten(name, width=32)
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
    axes.set_xlabel("round")
    axes.set_ylabel("loss of a token (nats)")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
