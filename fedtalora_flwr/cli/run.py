"""``fedtalora run``."""

import os
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from fedtalora_flwr.cli.console import Assignments, ConfigFile, Preset, console, fail, short
from fedtalora_flwr.run_folder import names

Engine = Annotated[str, typer.Option(metavar="ray|process", help="process: clients take turns in one process.")]


def add_to(cli: typer.Typer) -> None:
    """Add the command."""
    cli.command()(run)


def run(
    preset: Preset = "",
    config: ConfigFile = None,
    assignments: Assignments = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Run folder; by default runs/<name>-<time>.")] = None,
    nodes: Annotated[int, typer.Option(min=0, help="Number of clients, one SuperNode each (num-clients).")] = 0,
    resume: Annotated[Path | None, typer.Option(help="Go on with a run that was stopped, from its folder.")] = None,
    cpus: Annotated[int, typer.Option(min=0, help="CPUs for the clients together; 0 = all.")] = 0,
    client_gpus: Annotated[
        float,
        typer.Option(min=-1, help="GPU share of a client; -1: 0.2 where there is a GPU."),
    ] = -1.0,
    ray_address: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="Run the clients on this Ray cluster, of which this machine is a node; docs/CLUSTER.md. "
            "By default the run starts a Ray of its own.",
        ),
    ] = "",
    engine: Engine = "ray",
    list_settings: Annotated[bool, typer.Option(help="Print all settings with their defaults, and stop.")] = False,
) -> None:
    """Run a federation in simulation: without options the demo, scikit-learn's digits over five clients.

    Starts Flower and Ray for this run alone and leaves no process behind; a cluster given by --ray-address was
    there before and stays. With --engine process the same apps run in one process, without Ray and its start, to the
    same numbers: the quicker way for small runs.

    The exit status is 0 for a completed run, 1 for a failed one, 130 after Ctrl-C; fedtalora run --resume goes on with
    a stopped run.
    """
    from fedtalora_flwr.cli.progress import RunProgress
    from fedtalora_flwr.config import RunConfig
    from fedtalora_flwr.config.sources import app_folder, gather, preset_file
    from fedtalora_flwr.launch.engine import Order, Playing, follow, gpu_share, prepare
    from fedtalora_flwr.launch.simulation import LaunchResult, launch, sigterm_as_exit
    from fedtalora_flwr.launch.supervisor import LaunchError
    from fedtalora_flwr.run_folder.resumed import resumed

    app = app_folder()
    if list_settings:
        _print_settings(app / "pyproject.toml")
        return
    _check_engine(engine)
    if engine == "process" and (ray_address or cpus or client_gpus >= 0):
        fail("--engine process has no Ray: --ray-address, --cpus and --client-gpus say nothing to it")
    if ray_address:
        _check_cluster(ray_address, cpus)
    if resume is not None:
        if preset or config or out or nodes:
            fail("--resume goes on with the run's own settings; give no --preset, --config, --out or --nodes")
        folder = resume.resolve()
        settings = resumed(app, folder, assignments=assignments)
    else:
        if preset and config:
            fail("give --preset or --config, not both")
        file = preset_file(app, preset) if preset else config
        settings = gather(app, file=file, assignments=assignments)
        settings |= {"num-clients": nodes} if nodes else {}
        name = preset or (config.stem if config else str(settings["dataset"]).partition(":")[0].replace("/", "-"))
        by_default = f"runs/{name}-{datetime.now():%Y%m%d-%H%M%S}"
        folder = (out or Path(str(settings["out"]) or by_default)).resolve()
        if names.standing(folder) != "nothing":
            fail(f"{folder} holds a run already; choose another --out, or go on with it by --resume")
    parsed = RunConfig.parse(settings | {"out": str(folder)})
    run_config = prepare(parsed)
    console.print(f"run folder {folder}", highlight=False, markup=False, soft_wrap=True)
    with RunProgress(folder, console) as progress:
        try:
            if engine == "process":
                with sigterm_as_exit():
                    result: Playing | LaunchResult = follow(Order(app, run_config, folder / "logs"), progress.tick)
            else:
                result = launch(
                    app,
                    run_config=run_config,
                    num_supernodes=parsed.num_clients,
                    client_cpus=parsed.threads if ray_address else min(parsed.threads, cpus or os.cpu_count() or 1),
                    client_gpus=gpu_share(client_gpus, device=parsed.device),
                    ray_cpus=None if ray_address else cpus or os.cpu_count(),
                    ray_address=ray_address or None,
                    work_dir=folder / "logs",
                    on_tick=progress.tick,
                )
        except LaunchError as error:
            fail(str(error), code=1)
        except KeyboardInterrupt:
            if names.standing(folder) == "nothing":
                fail("stopped before the run had begun; start it again as before", code=130)
            fail(f"stopped; go on with: fedtalora run --resume {short(folder)}", code=130)
    if not result.ok:
        _explain_failure(folder, result.details)
    _show_result(folder)


def _check_engine(engine: str) -> None:
    from fedtalora_flwr.launch.engine import ENGINES

    if engine not in ENGINES:
        fail(f"--engine is one of {', '.join(ENGINES)}, got {engine!r}")


def _check_cluster(ray_address: str, cpus: int) -> None:
    from fedtalora_flwr.launch.simulation import check_ray_address
    from fedtalora_flwr.launch.supervisor import LaunchError

    if cpus:
        fail("--cpus sizes a Ray of the run's own; the clients take all CPUs of the cluster at --ray-address")
    try:
        check_ray_address(ray_address)
    except LaunchError as error:
        fail(str(error), code=1)


def _show_result(folder: Path) -> None:
    from fedtalora_flwr.report import print_table, read_run, write_report

    print_table(read_run(folder), console)
    console.print(f"report {write_report(folder)}", highlight=False, markup=False, soft_wrap=True)


def _explain_failure(folder: Path, details: str) -> None:
    """Say why a run failed, write its report as far as it is, and exit with 1."""
    import json

    from fedtalora_flwr.report import write_report

    path = folder / names.STATUS
    status = json.loads(path.read_text()) if path.exists() else {}
    message = status.get("message") if status.get("phase") == "failed" else ""
    if (folder / names.CONFIG).exists():
        with suppress(OSError, ValueError):  # a full disk fails the run and its report alike
            write_report(folder)
    fail(f"the run failed: {message or details}\nlogs are in {short(folder / 'logs')}", code=1)


def _print_settings(pyproject: Path) -> None:
    """Print the settings as they stand in ``pyproject.toml``, where each is explained beside its default."""
    text = pyproject.read_text().split("[tool.flwr.app.config]")[1].split("\n[")[0]
    console.print(text.strip(), highlight=False, markup=False, soft_wrap=True)
