"""Words for people: numbers of bytes and seconds, and what strangers wrote."""

import math


def one_line(text: str, *, most: int) -> str:
    """Give the first characters of a stranger's text on one line, without those that steer a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:most]).split())


def byte_unit(num_bytes: float) -> tuple[float, str]:
    """Return the decimal unit in which `num_bytes` reads best: its size in bytes and its name."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(num_bytes) >= unit:
            return unit, name
    return 1.0, "B"


def human_bytes(num_bytes: float) -> str:
    """Word a number of bytes with a decimal unit, e.g. ``12.3 MB``; a dash for NaN."""
    if math.isnan(num_bytes):
        return "–"
    unit, name = byte_unit(num_bytes)
    return f"{num_bytes / unit:.{0 if unit == 1 else 1}f} {name}"


def human_time(seconds: float, *, digits: int = 0) -> str:
    """Word a duration, e.g. ``3 min 20 s``, below a minute with `digits` decimals; a dash for NaN."""
    if math.isnan(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.{digits}f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
