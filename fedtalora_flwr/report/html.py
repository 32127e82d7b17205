"""Fill in and write the pages, each one file that opens offline."""

import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedtalora_flwr.config.whole import write_text
from fedtalora_flwr.report import figures


@dataclass(frozen=True)
class Picture:
    """Hold a figure of a page with its words."""

    name: str
    figure: figures.Figure
    title: str
    caption: str
    svg: Markup
    wide: bool


def picture(figure: figures.Figure, *, name: str, title: str, caption: str, wide: bool = False) -> Picture:
    """Put a matplotlib figure into words and SVG."""
    return Picture(name, figure, title, caption, Markup(figures.to_svg(figure, name=name, title=title)), wide)


def save(drawn: Picture, folder: Path) -> Path:
    """Write a picture as ``<name>.svg``, a file of its own on white ground, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{drawn.name}.svg"
    figures.to_file(drawn.figure, path, "svg")
    return path


def render(template: str, **values: Any) -> str:
    """Fill in a template of this package."""
    # Class names, failure reasons and settings come from other machines: everything is escaped but our SVGs.
    environment = Environment(
        loader=PackageLoader("fedtalora_flwr.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def template_text(name: str) -> str:
    """Give a file of this package's templates as it stands."""
    return importlib.resources.files("fedtalora_flwr.report").joinpath("templates", name).read_text(encoding="utf-8")


def write_whole(path: Path, content: str) -> Path:
    """Write a file whole or not at all, in a folder that is made where it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, content)
    return path
