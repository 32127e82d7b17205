"""Pictures of what each round measured, sent and took."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

from fedtalora_flwr.config.units import byte_unit
from fedtalora_flwr.report.figures.style import BLUE, GREEN, HALF, ORANGE, SKY, WIDE, YELLOW, dots, evenly, styled, tips


def _mark_tasks(axes: Axes, task_ids: Sequence[int], rounds: Sequence[int]) -> None:
    """Shade every other task and name it at the top; x is the round."""
    axes.set_xlim(rounds[0] - 0.5, rounds[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
    starts = [i for i in range(len(rounds)) if i == 0 or task_ids[i] != task_ids[i - 1]]
    edges = [*(rounds[i] - 0.5 for i in starts), rounds[-1] + 0.5]
    labelled = set(evenly(len(starts), at_most=10))
    for n, start in enumerate(starts):
        if n % 2:
            axes.axvspan(edges[n], edges[n + 1], color="#F1F4F7", lw=0, zorder=0)
        if n in labelled:
            axes.text(
                (edges[n] + edges[n + 1]) / 2,
                1.01,
                f"task {task_ids[start] + 1}" if len(starts) <= 6 else f"T{task_ids[start] + 1}",
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize=7.5,
                color="#5B6470",
            )


def _over_rounds(
    values: ArrayLike,
    *,
    label: str,
    color: str,
    rounds: Sequence[int],
    task_ids: Sequence[int],
    size: tuple[float, float] = (HALF, 3.0),
) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size)
    axes = figure.add_subplot()
    (line,) = axes.plot(rounds, np.asarray(values, dtype=np.float64), marker=dots(len(rounds)), color=color)
    known = [(n, value) for n, value in zip(rounds, np.asarray(values), strict=True) if np.isfinite(value)]
    tips(line, [f"round {server_round}: {value:.4g}" for server_round, value in known])
    _mark_tasks(axes, task_ids, rounds)
    axes.set_xlabel("round")
    axes.set_ylabel(label)
    return figure, axes


@styled
def loss(mean_loss: ArrayLike, *, rounds: Sequence[int], task_ids: Sequence[int]) -> Figure:
    """Draw the clients' mean training loss, (num_rounds,), NaN where a round has none."""
    figure, axes = _over_rounds(
        mean_loss, label="mean training loss (nats)", color=BLUE, rounds=rounds, task_ids=task_ids
    )
    axes.set_ylim(bottom=0)
    return figure


@styled
def residual_norm(norm: ArrayLike, *, rounds: Sequence[int], task_ids: Sequence[int]) -> Figure:
    """Draw the Frobenius norm of the cumulative residual, (num_rounds,), NaN where a round has none."""
    figure, axes = _over_rounds(norm, label="residual norm (Frobenius)", color=GREEN, rounds=rounds, task_ids=task_ids)
    axes.set_ylim(bottom=0)
    return figure


@styled
def exactness_error(error: ArrayLike, *, rounds: Sequence[int], task_ids: Sequence[int]) -> Figure:
    """Draw the distance to FedAvg of the full weights, (num_rounds,), on a log scale.

    An error of exactly 0 has no place on a log scale: it stands as a hollow dot on the lower edge.
    """
    e = np.asarray(error, dtype=np.float64)
    positive = e[e > 0]
    low = 10 ** (math.floor(math.log10(positive.min())) - 1) if len(positive) else 1e-16
    high = 10 ** (math.ceil(math.log10(positive.max())) + 1) if len(positive) else 1e-6
    figure, axes = _over_rounds(
        np.where(e > 0, e, np.nan),
        label="exactness error",
        color=ORANGE,
        rounds=rounds,
        task_ids=task_ids,
        size=(WIDE, 2.5),
    )
    zero = np.flatnonzero(e == 0)
    if len(zero):
        axes.plot(np.asarray(rounds)[zero], np.full(len(zero), low), "o", mfc="white", color=ORANGE, clip_on=False)
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0e}"))
    axes.yaxis.set_minor_locator(NullLocator())
    return figure


def _bars(axes: Axes, parts: Mapping[str, NDArray[np.float64]], colors: Sequence[str], rounds: Sequence[int]) -> None:
    bottom = np.zeros(len(rounds))
    for (name, height), color in zip(parts.items(), colors, strict=True):
        # Many thin bars would leave white seams between them; an outline in their own colour closes these.
        seam = {"linewidth": 0} if len(rounds) <= 80 else {"linewidth": 0.6, "edgecolor": color}
        width = 0.8 if len(rounds) <= 80 else 1.0
        drawn = axes.bar(rounds, height, width, bottom=bottom, color=color, label=name, **seam)
        for bar, server_round, value in zip(drawn, rounds, height, strict=True):
            tips(bar, [f"round {server_round}, {name}: {value:.4g}"])
        bottom += height


def _legend_above(axes: Axes, columns: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.06), ncols=columns, borderaxespad=0)


@styled
def bytes_per_round(up: ArrayLike, down: ArrayLike, *, rounds: Sequence[int], task_ids: Sequence[int]) -> Figure:
    """Draw the bytes of each round, stacked, beside their sums so far; `up` and `down` are (num_rounds,)."""
    parts = {
        "up (clients to server)": np.nan_to_num(np.asarray(up, dtype=np.float64)),
        "down (server to clients)": np.nan_to_num(np.asarray(down, dtype=np.float64)),
    }
    figure = Figure(figsize=(WIDE, 3.2))
    each, summed = figure.subplots(1, 2)
    unit, name = byte_unit(max(up + down for up, down in zip(*parts.values(), strict=True)))
    _bars(each, {k: v / unit for k, v in parts.items()}, (BLUE, SKY), rounds)
    each.set_ylabel(f"{name} in the round")
    _legend_above(each, 2)
    unit, name = byte_unit(float(max(v.sum() for v in parts.values())))
    for (_, values), color in zip(parts.items(), (BLUE, SKY), strict=True):
        summed.plot(rounds, np.cumsum(values) / unit, marker=dots(len(rounds)), color=color)
    summed.set_ylabel(f"{name} since the start")
    summed.set_ylim(bottom=0)
    for axes in (each, summed):
        _mark_tasks(axes, task_ids, rounds)
        axes.set_xlabel("round")
    return figure


@styled
def seconds_per_round(seconds: Mapping[str, ArrayLike], *, rounds: Sequence[int], task_ids: Sequence[int]) -> Figure:
    """Draw where the time of each round went, stacked; each part of `seconds` is (num_rounds,)."""
    parts = {name: np.nan_to_num(np.asarray(s, dtype=np.float64)) for name, s in seconds.items()}
    figure = Figure(figsize=(WIDE, 3.0))
    axes = figure.add_subplot()
    _bars(axes, parts, (BLUE, YELLOW, GREEN, "#C3C9D1")[: len(parts)], rounds)
    _mark_tasks(axes, task_ids, rounds)
    axes.set_xlabel("round")
    axes.set_ylabel("seconds in the round")
    _legend_above(axes, len(parts))
    return figure
