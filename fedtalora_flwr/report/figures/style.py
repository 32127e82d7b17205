"""The look that all figures share."""

import json
import math
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with every common colour blindness, and by lightness in print.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
YELLOW, SKY, BLACK, GREY = "#E69F00", "#56B4E9", "#222222", "#8A919B"
ON_LIGHT, ON_DARK = "#212121", "#FDFDFD"  # text on a tone, which a dark page leaves as it is
TIPS = "tips "  # how the id of an artist begins that has words for each of its points, bars or cells
SERIES = (BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, BLACK, GREY)

# Its lightest tone differs from the white of an empty cell; few enough tones for a colour bar in vectors.
TONES: Colormap = ListedColormap(mpl.colormaps["Blues"](np.linspace(0.1, 0.95, 32)))

WIDE, HALF = 11.0, 5.4  # inches; a page shows a figure at 96 px an inch, or less on a small screen
STYLE: Any = {
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
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # measures the text; a reader without it gets another sans-serif
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
P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Make a figure be drawn in the style of this package."""

    @wraps(draw)
    def in_style(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return in_style


def shorten(name: str, *, width: int) -> str:
    """Cut the middle out of an untrusted name that is too long, and what XML cannot hold."""
    printable = "".join(c if c.isprintable() else "·" for c in name)
    if len(printable) <= width:
        return printable
    tail = width // 3  # names of a family often differ at their end
    return f"{printable[: width - tail - 1]}…{printable[-tail:]}"


def evenly(count: int, *, at_most: int) -> list[int]:
    """Return indices below `count`, evenly spaced, so that at most `at_most` labels are drawn."""
    return list(range(0, count, math.ceil(count / at_most)))


def dots(count: int) -> str:
    """Return the marker of a line of `count` points: none where they would run together."""
    return "o" if count <= 40 else ""


def text_color(share: float) -> str:
    """Return the colour in which text is best read on the tone of `share`, in [0, 1]."""
    rgb = np.asarray(TONES(share)[:3])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ (0.2126, 0.7152, 0.0722))  # as WCAG defines it, with its contrast ratios
    return ON_DARK if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.066 else ON_LIGHT


def tips(artist: Artist, texts: Iterable[str]) -> None:
    """Give each point, bar or cell of an artist, in order, the words that a page shows where a pointer rests on it."""
    artist.set_gid(TIPS + json.dumps([shorten(text, width=200) for text in texts]))


def roomy(low: float, high: float) -> tuple[float, float]:
    """Choose the limits of an axis of shares for values from `low` to `high`: ten points at least, with some room."""
    span = max(high - low, 0.1)
    middle = (low + high) / 2
    return max(0.0, middle - 0.62 * span), min(1.0, middle + 0.62 * span) + 0.03 * span


def tidy(bar: Colorbar) -> None:
    """Take the frame and the seams off a colour bar."""
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2)
    if bar.solids is not None:
        bar.solids.set_edgecolor("face")  # closes the seams between the tones


def frameless(axes: Axes) -> None:
    """Take grid, ticks and frame off."""
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
