"""Say how the numbers of a run are named, written and judged."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedtalora_flwr.config.units import human_bytes, human_time


def percent(share: float) -> str:
    """Word a share in [0, 1] as per cent."""
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"


def points(share: float) -> str:
    """Word a share in [0, 1] as percentage points."""
    return "–" if math.isnan(share) else f"{100 * share:.1f}"


def duration(seconds: float) -> str:
    """Word a duration, to a tenth of a second below a minute."""
    return human_time(seconds, digits=1)


def count(number: float) -> str:
    """Word a whole number."""
    return "–" if math.isnan(number) else f"{number:,.0f}"


def finite(number: float) -> float | None:
    """Give a number as JSON has it: None for NaN."""
    return None if math.isnan(number) else number


@dataclass(frozen=True)
class Measure:
    """Say how a number of a run is named, written and judged."""

    key: str
    label: str
    text: Callable[[float], str]
    best: Callable[[Sequence[float]], float] | None


MEASURES = (
    Measure("faa", "FAA", percent, max),
    Measure("aia", "AIA", percent, max),
    Measure("forgetting", "forgetting (points)", points, min),
    Measure("bytes_up_total", "bytes up", human_bytes, min),
    Measure("bytes_down_total", "bytes down", human_bytes, min),
    Measure("wall_seconds", "time", duration, min),
    Measure("num_rounds", "rounds", count, None),
)
