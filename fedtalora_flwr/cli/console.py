"""What all commands share: where they print, how they fail, the options that several have."""

from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

console = Console()
errors = Console(stderr=True)

Preset = Annotated[str, typer.Option(help="Settings from experiments/NAME.toml; fedtalora presets lists them.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="Settings from a flat TOML or JSON file.")]
Assignments = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; repeatable.")]


def short(path: Path) -> Path:
    """Give a path relative to the current folder where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def escaped(text: str) -> str:
    """Keep rich from taking brackets for markup."""
    return text.replace("[", r"\[")


def fail(message: str, *, code: int = 2) -> NoReturn:
    """Print an error and exit with `code`."""
    errors.print(f"[red]error:[/red] {escaped(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(code)
