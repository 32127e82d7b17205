"""Write a figure to a file or into a page.

The same figure gives the same bytes. Text stays text: a reader can search it, and a browser sets it in its own font.
"""

import io
import re
import warnings
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from fedtalora_flwr.report.figures.style import STYLE

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "{http://www.w3.org/1999/xlink}href"


def _save(figure: Figure, target: Path | io.BytesIO, file_format: str) -> None:
    metadata = {"Date": None} if file_format == "svg" else {}
    with mpl.rc_context(STYLE), warnings.catch_warnings():
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
        What one of the functions of this package drew.
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
