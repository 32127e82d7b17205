"""Pictures of a run: each a pure function of arrays to a matplotlib figure, and `to_svg` to put it in a page.

Only this file imports matplotlib, and it never touches pyplot, so nothing global is left behind. The same
arrays give the same bytes. Text stays text: a reader can search it, and a browser sets it in its own font.
"""

import io
import math
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, ListedColormap, PowerNorm
from matplotlib.figure import Figure as Figure  # report.py names the type
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray

# Okabe and Ito's palette: told apart with every common colour blindness, and by lightness in print.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
YELLOW, SKY, BLACK, GREY = "#E69F00", "#56B4E9", "#222222", "#8A919B"
SERIES = (BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, BLACK, GREY)

# Its lightest tone differs from the white of an empty cell; few enough tones for a colour bar in vectors.
TONES: Colormap = ListedColormap(mpl.colormaps["Blues"](np.linspace(0.1, 0.95, 32)))

WIDE, HALF = 11.0, 5.4  # inches; a page shows a figure at 96 px an inch, or less on a small screen
_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#9AA3AE",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": "#3A424D",
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "grid.color": "#E4E8ED",
    "grid.linewidth": 0.7,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "lines.markersize": 4,
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "fedtalora",
    "text.color": BLACK,
    "text.parse_math": False,  # a class may be called "$5 bill"
    "xtick.color": "#5B6470",
    "xtick.labelsize": 8,
    "ytick.color": "#5B6470",
    "ytick.labelsize": 8,
}
_GAP = 0.5  # columns between two tasks of a class map
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "{http://www.w3.org/1999/xlink}href"
P = ParamSpec("P")


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


def _save(figure: Figure, target: Path | io.BytesIO, file_format: str) -> None:
    metadata = {"Date": None} if file_format == "svg" else {}
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # A class name in Chinese: matplotlib cannot measure it, the browser that shows the text can.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(target, format=file_format, metadata=metadata, dpi=150)


def to_file(figure: Figure, path: Path, file_format: str) -> None:
    """Write a figure to a file; `file_format` is "png" or "svg"."""
    _save(figure, path, file_format)


def to_svg(figure: Figure, *, name: str, title: str) -> str:
    """Return a figure as an ``<svg>`` element to stand inside an HTML page.

    Parameters
    ----------
    figure
        What one of the functions below drew.
    name
        Prefix of every id in it; give each figure of a page another.
    title
        What a screen reader says for the picture.
    """
    buffer = io.BytesIO()
    _save(figure, buffer, "svg")
    root = ET.fromstring(buffer.getvalue())
    width, height = (float(length) for length in root.attrib["viewBox"].split()[2:])
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.attrib |= {
        "role": "img",
        "aria-label": title,
        "style": f"max-width:{width * 96 / 72:.0f}px;aspect-ratio:{width:g}/{height:g}",
    }
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    _own_ids(root, name)
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    return ET.tostring(root, encoding="unicode")


def _own_ids(root: ET.Element, prefix: str) -> None:
    """Prefix the ids that something refers to and drop the rest: ids must be unique in the page."""
    reference = re.compile(r"url\(#([^)]+)\)")
    used = set()
    for element in root.iter():
        used |= {target for value in element.attrib.values() for target in reference.findall(value)}
        used.add(element.get(_XLINK, "").removeprefix("#"))
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                if value in used:
                    element.set(key, f"{prefix}-{value}")
                else:
                    del element.attrib[key]
            elif key == _XLINK and value.startswith("#"):
                element.set(key, f"#{prefix}-{value[1:]}")
            elif "url(#" in value:
                element.set(key, reference.sub(rf"url(#{prefix}-\1)", value))


def byte_unit(num_bytes: float) -> tuple[float, str]:
    """Return the decimal unit in which `num_bytes` reads best: its size in bytes and its name."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(num_bytes) >= unit:
            return unit, name
    return 1.0, "B"


def _label(name: str, *, width: int) -> str:
    """Cut the middle out of an untrusted name that is too long, and what XML cannot hold."""
    printable = "".join(c if c.isprintable() else "·" for c in name)
    if len(printable) <= width:
        return printable
    tail = width // 3  # names of a family often differ at their end
    return f"{printable[: width - tail - 1]}…{printable[-tail:]}"


def _every(count: int, *, at_most: int) -> list[int]:
    """Return indices below `count`, evenly spaced, so that at most `at_most` labels are drawn."""
    return list(range(0, count, math.ceil(count / at_most)))


def _mark_tasks(axes: Axes, task_ids: Sequence[int], rounds: Sequence[int]) -> None:
    """Shade every other task and name it at the top; x is the round."""
    axes.set_xlim(rounds[0] - 0.5, rounds[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
    starts = [i for i in range(len(rounds)) if i == 0 or task_ids[i] != task_ids[i - 1]]
    edges = [*(rounds[i] - 0.5 for i in starts), rounds[-1] + 0.5]
    labelled = set(_every(len(starts), at_most=10))
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


def _dots(count: int) -> str:
    return "o" if count <= 40 else ""


def _text_color(share: float) -> str:
    """Return the colour in which text is best read on the tone of `share`, in [0, 1]."""
    rgb = np.asarray(TONES(share)[:3])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ (0.2126, 0.7152, 0.0722))  # as WCAG defines it, with its contrast ratios
    return "white" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.066 else BLACK


def _tidy(bar: Colorbar) -> None:
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2)
    if bar.solids is not None:
        bar.solids.set_edgecolor("face")  # closes the seams between the tones


def _frameless(axes: Axes) -> None:
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


@_styled
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
    axes.invert_yaxis()
    _frameless(axes)
    labels = _every(size, at_most=20)
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
                color=_text_color(float(norm(a[i, j]))),
            )
    bar = figure.colorbar(mesh, ax=axes, format=PercentFormatter(1), ticks=[0, 0.25, 0.5, 0.75, 1], pad=0.02, aspect=30)
    _tidy(bar)
    return figure


@_styled
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
        axes.plot(tasks, values, style, marker=_dots(num_tasks), color=SERIES[n % 8], label=_label(name, width=48))
        if len(curves) == 1 and num_tasks <= 12:
            for task, value in zip(tasks, values, strict=True):
                if not math.isnan(value):
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
    axes.set_ylim(0, 1.06)
    axes.yaxis.set_major_locator(FixedLocator([0, 0.2, 0.4, 0.6, 0.8, 1]))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=15, min_n_ticks=1))
    axes.set_xlabel("tasks trained")
    axes.set_ylabel("accuracy, all classes seen")
    if len(curves) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


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
    axes.plot(rounds, np.asarray(values, dtype=np.float64), marker=_dots(len(rounds)), color=color)
    _mark_tasks(axes, task_ids, rounds)
    axes.set_xlabel("round")
    axes.set_ylabel(label)
    return figure, axes


@_styled
def loss(mean_loss: ArrayLike, *, rounds: Sequence[int], task_ids: Sequence[int]) -> Figure:
    """Draw the clients' mean training loss, (num_rounds,), NaN where a round has none."""
    figure, axes = _over_rounds(
        mean_loss, label="mean training loss (nats)", color=BLUE, rounds=rounds, task_ids=task_ids
    )
    axes.set_ylim(bottom=0)
    return figure


@_styled
def residual_norm(norm: ArrayLike, *, rounds: Sequence[int], task_ids: Sequence[int]) -> Figure:
    """Draw the Frobenius norm of the cumulative residual, (num_rounds,), NaN where a round has none."""
    figure, axes = _over_rounds(norm, label="residual norm (Frobenius)", color=GREEN, rounds=rounds, task_ids=task_ids)
    axes.set_ylim(bottom=0)
    return figure


@_styled
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
        axes.bar(rounds, height, 0.8 if len(rounds) <= 80 else 1.0, bottom=bottom, color=color, label=name, **seam)
        bottom += height


def _legend_above(axes: Axes, columns: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.06), ncols=columns, borderaxespad=0)


@_styled
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
        summed.plot(rounds, np.cumsum(values) / unit, marker=_dots(len(rounds)), color=color)
    summed.set_ylabel(f"{name} since the start")
    summed.set_ylim(bottom=0)
    for axes in (each, summed):
        _mark_tasks(axes, task_ids, rounds)
        axes.set_xlabel("round")
    return figure


@_styled
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


@_styled
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
        axes.pcolormesh(
            edges,
            np.arange(num_partitions + 1),
            np.ma.masked_equal(held, 0),
            cmap=TONES,
            norm=norm,
            edgecolors="white",
            lw=0.8 if num_partitions <= 40 else 0,
        )
        axes.add_patch(_frame(left, num_classes, num_partitions))
        axes.text(left + num_classes / 2, -0.15, f"task {task_id + 1}", ha="center", va="bottom", weight="bold")
        if num_partitions <= 40 and held.max(initial=0) < 1000:
            for i, j in np.argwhere(held):
                shade = _text_color(float(norm(held[i, j])))
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
        labels += [_label(class_names[c], width=22) for c in tasks[task_id]]
        left += num_classes + _GAP
    axes.set_ylim(num_partitions, 0)
    axes.set_xticks(centres, labels, rotation=90 if turned else 0, fontsize=7)
    _name_clients(axes, num_partitions)


def _frame(left: float, width: float, height: float) -> Rectangle:
    return Rectangle((left, 0), width, height, fill=False, edgecolor="#B5BCC6", linewidth=0.8, clip_on=False)


def _name_clients(axes: Axes, num_partitions: int) -> None:
    rows = _every(num_partitions, at_most=40)
    axes.set_yticks([i + 0.5 for i in rows], [f"client {i}" for i in rows], fontsize=7.5)
    _frameless(axes)


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
    _tidy(bar)


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
                color=_text_color(float(norm(held[i, j]))),
            )
    columns = _every(num_tasks, at_most=25)
    axes.set_xticks([j + 0.5 for j in columns], [f"task {j + 1}" for j in columns], weight="bold")
    axes.xaxis.tick_top()
    axes.set_ylim(num_partitions, 0)
    _name_clients(axes, num_partitions)
    _examples_bar(figure, [axes], norm, height=height)
    return figure
