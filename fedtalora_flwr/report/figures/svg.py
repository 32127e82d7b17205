"""Write a figure to a file or into a page.

The same figure gives the same bytes. Text stays text: a reader can search it, and a browser sets it in its own font.
"""

import io
import json
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from fedtalora_flwr.report.figures.style import STYLE, TIPS

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "{http://www.w3.org/1999/xlink}href"
_HEX = re.compile("#[0-9a-fA-F]{6}")
# What stands for the page itself in the style of the figures, and its name in the page's own style.
_OF_PAGE = {
    "#ffffff": "var(--paper)",
    "#222222": "var(--ink)",
    "#3a424d": "var(--ink)",
    "#5b6470": "var(--soft)",
    "#9aa3ae": "var(--soft)",
    "#e4e8ed": "var(--line)",
    "#f1f4f7": "var(--wash)",
}


def _save(figure: Figure, target: Path | io.BytesIO, file_format: str) -> None:
    metadata = {"Date": None} if file_format == "svg" else {}
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # A class name in Chinese: matplotlib cannot measure it, the browser that shows the text can.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(target, format=file_format, metadata=metadata, dpi=150)


def to_file(figure: Figure, path: Path, file_format: str) -> None:
    """Write a figure to a file; `file_format` is "png" or "svg"."""
    if file_format == "svg":
        ET.ElementTree(_drawn(figure)).write(path, encoding="utf-8", xml_declaration=True)
    else:
        _save(figure, path, file_format)


def _drawn(figure: Figure) -> ET.Element:
    """Draw a figure as SVG, with its tips."""
    buffer = io.BytesIO()
    _save(figure, buffer, "svg")
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK[1:].partition("}")[0])
    root = ET.fromstring(buffer.getvalue())
    for element in root.iter():
        if (told := element.get("id", "")).startswith(TIPS):
            del element.attrib["id"]
            _add_tips(element, json.loads(told.removeprefix(TIPS)))
    return root


def _add_tips(artist: ET.Element, texts: Sequence[str]) -> None:
    """Put a <title> into each shape of an artist: the markers of a line, else its paths."""
    shapes = artist.findall(f".//{{{_SVG}}}use") or artist.findall(f"{{{_SVG}}}path")
    if len(shapes) == len(texts):  # a line without markers has nothing to point at
        for shape, text in zip(shapes, texts, strict=True):
            ET.SubElement(shape, f"{{{_SVG}}}title").text = text


def _on_page(root: ET.Element) -> None:
    """Take ground, text and lines from the page, which may be dark; series and tones stay."""
    for element in root.iter():
        if style := element.get("style"):
            element.set("style", _HEX.sub(lambda found: _OF_PAGE.get(found[0].lower(), found[0]), style))


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
    root = _drawn(figure)
    _on_page(root)
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
