"""What there is before anything is trained: ``fedtalora data`` and ``fedtalora presets``."""

from pathlib import Path
from typing import Annotated

import typer

from fedtalora_flwr.cli.console import Assignments, ConfigFile, Preset, console, fail


def add_to(cli: typer.Typer) -> None:
    """Add the commands."""
    for command in (data, presets):
        cli.command()(command)


def data(
    preset: Preset = "",
    config: ConfigFile = None,
    assignments: Assignments = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Picture or page to write: .png, .svg or .html.")] = None,
) -> None:
    """Show who holds which classes in which task, before any training."""
    import hashlib

    from fedtalora_flwr.config import RunConfig
    from fedtalora_flwr.config.sources import app_folder, gather, preset_file
    from fedtalora_flwr.data.remarks import on_shared
    from fedtalora_flwr.model.session import data_of
    from fedtalora_flwr.report import data_table, write_data_page

    if preset and config:
        fail("give --preset or --config, not both")
    app = app_folder()
    file = preset_file(app, preset) if preset else config
    parsed = RunConfig.parse(gather(app, file=file, assignments=assignments))
    found = data_of(parsed)
    labels, stream = found.source.train.labels, found.stream
    counts = stream.class_counts(labels)
    console.print(data_table(counts, tasks=stream.tasks, title=f"{found.source.name}: training examples (classes)"))
    for remark in on_shared(found.source, stream):
        console.print(f"note: {remark}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    hashes = [stream.partition_hash(labels, k) for k in range(parsed.num_clients)]
    console.print(f"partition hash {hashlib.sha256(''.join(hashes).encode()).hexdigest()}", highlight=False)
    target = out or Path(f"{preset or found.source.name.replace(':', '-').replace('/', '-')}-data.html")
    write_data_page(
        target,
        class_counts=counts,
        tasks=stream.tasks,
        class_names=found.source.class_names,
        partition_hashes=hashes,
    )
    console.print(f"picture {target.resolve()}", highlight=False, markup=False, soft_wrap=True)


def presets(name: Annotated[str, typer.Argument(help="Print this preset's settings instead.")] = "") -> None:
    """List the presets and what each is, or print the settings of one, a flat TOML file for flwr run --run-config."""
    import tomli_w

    from fedtalora_flwr.config.sources import app_folder, defaults, preset_file, read_file
    from fedtalora_flwr.config.sources import presets as known

    app = app_folder()
    if name:
        print(tomli_w.dumps(read_file(preset_file(app, name), defaults(app))), end="")
        return
    for name, path in known(app).items():
        first = path.read_text().splitlines()[0]
        console.print(f"{name:26} {first.lstrip('# ')}", highlight=False, markup=False, soft_wrap=True)
