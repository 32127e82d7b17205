"""The command ``fedtalora``. Each command imports what it needs when it runs, so that ``--help`` is quick."""

import os
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from fedtalora_flwr.deploy.cli import add_to as add_deployment

if TYPE_CHECKING:
    from fedtalora_flwr.aggregation import Place
    from fedtalora_flwr.sweep import Outcome, Plan

cli = typer.Typer(
    name="fedtalora",
    help="Federated continual fine-tuning of pre-trained transformers with exact LoRA aggregation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()
errors = Console(stderr=True)

Preset = Annotated[str, typer.Option(help="Settings from experiments/NAME.toml; fedtalora presets lists them.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="Settings from a flat TOML or JSON file.")]
Engine = Annotated[str, typer.Option(metavar="ray|process", help="process: clients take turns in one process.")]
Cluster = Annotated[int | None, typer.Option(metavar="N", help="Of a run of fl-tac: the model of this cluster.")]
SlotName = Annotated[
    str, typer.Option("--slot", metavar="CLIENT:NUMBER", help="Of local-only, or a stray of fl-tac: this slot's model.")
]
Assignments = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; repeatable.")]


@cli.command()
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
    from fedtalora_flwr.config import RunConfig
    from fedtalora_flwr.engine import Order, Playing, follow, gpu_share, prepare
    from fedtalora_flwr.keeper import LaunchError
    from fedtalora_flwr.launch import LaunchResult, launch, sigterm_as_exit
    from fedtalora_flwr.progress import RunProgress
    from fedtalora_flwr.settings import app_folder, gather, preset_file, resumed

    app = app_folder()
    if list_settings:
        _print_settings(app / "pyproject.toml")
        return
    _check_engine(engine)
    if engine == "process" and (ray_address or cpus or client_gpus >= 0):
        _fail("--engine process has no Ray: --ray-address, --cpus and --client-gpus say nothing to it")
    if ray_address:
        _check_cluster(ray_address, cpus)
    if resume is not None:
        if preset or config or out or nodes:
            _fail("--resume goes on with the run's own settings; give no --preset, --config, --out or --nodes")
        folder = resume.resolve()
        settings = resumed(app, folder, assignments=assignments)
    else:
        if preset and config:
            _fail("give --preset or --config, not both")
        file = preset_file(app, preset) if preset else config
        settings = gather(app, file=file, assignments=assignments)
        settings |= {"num-clients": nodes} if nodes else {}
        name = preset or (config.stem if config else str(settings["dataset"]).partition(":")[0].replace("/", "-"))
        by_default = f"runs/{name}-{datetime.now():%Y%m%d-%H%M%S}"
        folder = (out or Path(str(settings["out"]) or by_default)).resolve()
        if (folder / "config.json").exists():
            _fail(f"{folder} holds a run already; choose another --out, or go on with it by --resume")
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
            _fail(str(error), code=1)
        except KeyboardInterrupt:
            _fail(f"stopped; go on with: fedtalora run --resume {_short(folder)}", code=130)
    if not result.ok:
        _explain_failure(folder, result.details)
    _show_result(folder)


@cli.command()
def sweep(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A sweep file, or a name in experiments/sweeps.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the runs and the table; by default runs/<name>.")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Runs side by side; 0: the file's, else as the machine allows.")] = 0,
    assignments: Assignments = [],  # noqa: B006
    only: Annotated[
        list[str], typer.Option(metavar="AXIS=VALUE", help="Only the runs with this value on this axis; repeatable.")
    ] = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs, and stop.")] = False,
) -> None:
    """Run every combination of a grid of settings, for every seed, and set them side by side.

    Finished runs are left alone and stopped ones go on, so the same command goes on with a sweep; a run that stands
    there with other settings is moved to set-aside/. A run that fails is named at the end and stops no other one.

    Prints a table of mean and spread over the seeds, and writes it as results.md, results.csv, runs.csv and index.html,
    and its plot as cases.svg.
    The exit status is 0 when every run is finished, 1 when one failed, 130 after Ctrl-C.
    """
    from dataclasses import replace

    from fedtalora_flwr.launch import sigterm_as_exit
    from fedtalora_flwr.progress import SweepProgress
    from fedtalora_flwr.settings import app_folder, sweeps
    from fedtalora_flwr.sweep import Outcome, narrowed, play_all, read_plan, side_by_side, standing

    app = app_folder()
    known = sweeps(app)
    if file not in known and not Path(file).is_file():
        _fail(f"no sweep {file!r}: it is no file, and experiments/sweeps has: {', '.join(known) or 'none'}")
    whole = read_plan(app, known.get(file) or Path(file), assignments=assignments)
    plan = narrowed(whole, only)
    plan = replace(plan, jobs=jobs) if jobs else plan
    folder = (out or Path("runs") / plan.name).resolve()
    found = standing(whole, folder)
    if dry_run:
        words = {"nothing": "", "other": "  other settings, to be set aside"}
        for run in plan.runs:
            word = words.get(found[run.name], f"  {found[run.name]}")
            console.print(f"{run.name}{word}", highlight=False, markup=False)
        return
    jobs = side_by_side(plan)
    done, other = (sum(found[run.name] == state for run in plan.runs) for state in ("finished", "other"))
    aside = f"{other} of other settings to be set aside, " if other else ""
    console.print(
        f"{len(plan.runs)} runs, {done} finished before, {aside}{jobs} at a time, in {folder}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    progress = SweepProgress(console, num_runs=len(plan.runs), num_finished=done)
    try:
        with sigterm_as_exit(), progress:
            outcomes = play_all(plan, folder, app=app, jobs=jobs, watch=progress)
    except KeyboardInterrupt:
        _fail("stopped; the same command goes on with it", code=130)
    played = {run.name for run in plan.runs}
    before = [run for run in whole.runs if run.name not in played and found[run.name] == "finished"]
    if broken := [run.name for run in before if not _can_be_read(folder / run.name)]:
        errors.print(f"[yellow]note:[/yellow] left out, as they cannot be read: {', '.join(broken)}", highlight=False)
    before = [run for run in before if run.name not in broken]
    _show_study(whole, [*outcomes, *(Outcome(run, folder / run.name) for run in before)], folder)
    if failed := [outcome for outcome in outcomes if outcome.failure]:
        lines = [f"{_short(outcome.folder)}: {outcome.failure}" for outcome in failed]
        _fail("\n".join([f"{len(failed)} of {len(outcomes)} runs failed:", *lines]), code=1)


@cli.command()
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    pictures: Annotated[Path | None, typer.Option(help="Folder for each picture as an .svg file of its own.")] = None,
) -> None:
    """Write RUN/report.html, one file that opens offline; an unfinished run is reported as far as it is."""
    from fedtalora_flwr.report import print_table, read_run, write_report

    print_table(read_run(run_folder), console)
    console.print(
        f"report {write_report(run_folder, pictures=pictures)}", highlight=False, markup=False, soft_wrap=True
    )


@cli.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Two or more run folders.")],
    allow_different_partitions: Annotated[
        bool, typer.Option(help="Compare runs whose clients hold different data.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Also write an HTML page.")] = None,
) -> None:
    """Set runs side by side: what differs in their settings, accuracy, forgetting, bytes, time.

    Refuses runs whose clients hold different data, since then a difference says nothing of the method.
    """
    from fedtalora_flwr.report import compare as compare_runs

    comparison = compare_runs(runs, allow_different_partitions=allow_different_partitions, out=out)
    console.print(comparison.table())
    if out:
        console.print(f"comparison {out.resolve()}", highlight=False, markup=False, soft_wrap=True)


@cli.command()
def export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, finished or not.")],
    to: Annotated[str, typer.Option(metavar="merged|peft", help="Plain weights, or an adapter for peft.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; by default RUN/export/merged or /peft.")] = None,
    force: Annotated[bool, typer.Option(help="Replace an earlier export in that folder.")] = False,
    cluster: Cluster = None,
    slot: SlotName = "",
) -> None:
    """Write a run's model for use without fedtalora.

    merged: one model with everything in its weights, which timm or transformers loads.

    peft: an adapter that peft loads onto the untouched backbone; the residual is carried as extra rank.

    The folder says in its README.md what it holds, and its load.py classifies files without fedtalora. It is put in
    place only when that program gives the run's logits on 200 random inputs, to 1e-5, or 1e-5 of the largest logit
    where that is above 1.
    """
    from fedtalora_flwr.export import export as export_model

    done = export_model(run_folder, to=to, target=out, force=force, place=_place(cluster, slot))
    console.print(f"model {done.standing}", highlight=False, markup=False, soft_wrap=True)
    measured = f"at most {done.logit_difference:.1e}, the largest of them is {done.largest_logit:.1f}"
    console.print(f"logits differ from the run's by {measured}", highlight=False)
    console.print(f"{to} {done.folder}", highlight=False, markup=False, soft_wrap=True)


@cli.command()
def predict(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, finished or not.")],
    inputs: Annotated[list[str], typer.Argument(metavar="FILES...", help="Files and folders; - is standard input.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array instead of lines.")] = False,
    top: Annotated[int, typer.Option(min=1, help="Classes to name for each input.")] = 3,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    cluster: Cluster = None,
    slot: SlotName = "",
) -> None:
    """Classify files with a run's model: a line for each input, the likeliest classes and their probabilities.

    Images: files, folders of them at any depth, or one image on standard input.

    Texts: .txt (a text a line), .csv, .tsv, .json, .jsonl (a column text, or the run's input-column), folders of
    these, or lines on standard input: echo "what is my balance" | fedtalora predict RUN -

    An input that cannot be read is named on standard error, or is an entry with "error" in the JSON array; the others
    are classified all the same, and the exit status is 1.
    """
    import json

    from fedtalora_flwr.predict import predict as classify
    from fedtalora_flwr.predict import read_items
    from fedtalora_flwr.trained import open_trained

    # The name of a file may be no Unicode; a question mark stands for what cannot be printed.
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    trained = open_trained(run_folder, device=device, place=_place(cluster, slot))
    if trained.server_round < trained.num_rounds:
        errors.print(f"[yellow]note:[/yellow] the run is {trained.standing}", highlight=False, soft_wrap=True)
    items = read_items(
        inputs,
        modality=trained.model.backbone.modality,
        stdin=sys.stdin.buffer,
        column=trained.config.input_column,
    )
    predictions = classify(trained, items, top=top)
    if as_json:
        found = [prediction.to_json() for prediction in predictions]
        print(json.dumps(found, indent=1, ensure_ascii=sys.stdout.encoding.lower() not in ("utf-8", "utf8")))
        if any("error" in entry for entry in found):
            raise typer.Exit(1)
        return
    failed = False
    for prediction in predictions:
        if prediction.item.error:
            failed = True
            errors.print(f"[red]error:[/red] {_escaped(prediction.item.error)}", highlight=False, soft_wrap=True)
            continue
        ranking = [f"{name} {probability:.3f}" for name, probability in prediction.ranking]
        text = [" ".join(prediction.item.raw.split())] if isinstance(prediction.item.raw, str) else []
        print(prediction.item.name, *ranking, *text, sep="\t")
    if failed:
        raise typer.Exit(1)


@cli.command()
def data(
    preset: Preset = "",
    config: ConfigFile = None,
    assignments: Assignments = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Picture or page to write: .png, .svg or .html.")] = None,
) -> None:
    """Show who holds which classes in which task, before any training."""
    import hashlib

    from fedtalora_flwr.config import RunConfig
    from fedtalora_flwr.report import data_table, write_data_page
    from fedtalora_flwr.resident import data_of
    from fedtalora_flwr.settings import app_folder, gather, preset_file

    if preset and config:
        _fail("give --preset or --config, not both")
    app = app_folder()
    file = preset_file(app, preset) if preset else config
    parsed = RunConfig.parse(gather(app, file=file, assignments=assignments))
    found = data_of(parsed)
    labels, stream = found.source.train.labels, found.stream
    counts = stream.class_counts(labels)
    console.print(data_table(counts, tasks=stream.tasks, title=f"{found.source.name}: training examples (classes)"))
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


@cli.command()
def presets(name: Annotated[str, typer.Argument(help="Print this preset's settings instead.")] = "") -> None:
    """List the presets and what each is, or print the settings of one, a flat TOML file for flwr run --run-config."""
    import tomli_w

    from fedtalora_flwr.settings import app_folder, defaults, preset_file, read_file
    from fedtalora_flwr.settings import presets as known

    app = app_folder()
    if name:
        print(tomli_w.dumps(read_file(preset_file(app, name), defaults(app))), end="")
        return
    for name, path in known(app).items():
        first = path.read_text().splitlines()[0]
        console.print(f"{name:26} {first.lstrip('# ')}", highlight=False, markup=False, soft_wrap=True)


@cli.command()
def doctor() -> None:
    """Check this machine: libraries, Flower's programs, devices, data, a free port. Exit status 1 if it cannot run."""
    from fedtalora_flwr.doctor import examine

    findings = examine()
    for finding in findings:
        mark = {"ok": "[green]ok[/green]  ", "note": "[yellow]note[/yellow]", "bad": "[red]bad[/red] "}[finding.level]
        console.print(f"{mark} {_escaped(f'{finding.subject}: {finding.text}')}", highlight=False, soft_wrap=True)
    if any(finding.level == "bad" for finding in findings):
        raise typer.Exit(1)


@cli.callback(invoke_without_command=True)
def version_option(
    version: Annotated[bool, typer.Option("--version", help="Print the version, and stop.")] = False,
) -> None:
    """Federated continual fine-tuning of pre-trained transformers with exact LoRA aggregation."""
    if version:
        import fedtalora_flwr

        console.print(f"fedtalora {fedtalora_flwr.__version__}", highlight=False)
        raise typer.Exit


add_deployment(cli)


def main() -> None:
    """Run the command line; an error of the user's ends in one line and status 2."""
    try:
        cli()
    except (ValueError, OSError) as error:
        if os.environ.get("FEDTALORA_TRACEBACK"):
            raise
        errors.print(f"[red]error:[/red] {_escaped(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)


def _place(cluster: int | None, slot: str) -> "Place":
    """Say whose model is wanted of a run over slots."""
    if not slot:
        return cluster
    from fedtalora_flwr.aggregation import Slot

    client, _, number = slot.partition(":")
    if cluster is not None or not (client.isdecimal() and number.isdecimal()):
        _fail(f"--slot takes CLIENT:NUMBER, as 0:1, and no --cluster beside it; got {slot!r}")
    return Slot(int(client), int(number))


def _check_engine(engine: str) -> None:
    from fedtalora_flwr.engine import ENGINES

    if engine not in ENGINES:
        _fail(f"--engine is one of {', '.join(ENGINES)}, got {engine!r}")


def _check_cluster(ray_address: str, cpus: int) -> None:
    from fedtalora_flwr.keeper import LaunchError
    from fedtalora_flwr.launch import check_ray_address

    if cpus:
        _fail("--cpus sizes a Ray of the run's own; the clients take all CPUs of the cluster at --ray-address")
    try:
        check_ray_address(ray_address)
    except LaunchError as error:
        _fail(str(error), code=1)


def _show_result(folder: Path) -> None:
    from fedtalora_flwr.report import print_table, read_run, write_report

    print_table(read_run(folder), console)
    console.print(f"report {write_report(folder)}", highlight=False, markup=False, soft_wrap=True)


def _can_be_read(run_folder: Path) -> bool:
    from fedtalora_flwr.report import read_run

    try:
        return bool(read_run(run_folder).manifest)
    except (ValueError, OSError):
        return False


def _show_study(plan: "Plan", outcomes: "list[Outcome]", folder: Path) -> None:
    """Print what a sweep came to, and write it down."""
    from fedtalora_flwr.report import study, study_table, write_study

    cases: dict[tuple[str, ...], dict[int, Path]] = {run.labels: {} for run in plan.runs}
    for outcome in outcomes:
        runs = cases[outcome.run.labels]
        if not outcome.failure:
            runs[outcome.run.config.seed] = outcome.folder
    found = study(
        plan.name,
        about=plan.about,
        axes=list(plan.axes),
        compare=plan.compare,
        cases=cases,
        failures={outcome.run.name: outcome.failure for outcome in outcomes if outcome.failure},
    )
    console.print(study_table(found, width=console.width))
    for note in found.notes:
        console.print(note, style="yellow", highlight=False, markup=False, soft_wrap=True)
    console.print(f"page {write_study(found, folder)}", highlight=False, markup=False, soft_wrap=True)


def _explain_failure(folder: Path, details: str) -> None:
    """Say why a run failed, write its report as far as it is, and exit with 1."""
    import json

    from fedtalora_flwr.report import write_report

    path = folder / "status.json"
    status = json.loads(path.read_text()) if path.exists() else {}
    message = status.get("message") if status.get("phase") == "failed" else ""
    if (folder / "config.json").exists():
        with suppress(OSError, ValueError):  # a full disk fails the run and its report alike
            write_report(folder)
    _fail(f"the run failed: {message or details}\nlogs are in {_short(folder / 'logs')}", code=1)


def _print_settings(pyproject: Path) -> None:
    """Print the settings as they stand in ``pyproject.toml``, where each is explained beside its default."""
    text = pyproject.read_text().split("[tool.flwr.app.config]")[1].split("\n[")[0]
    console.print(text.strip(), highlight=False, markup=False, soft_wrap=True)


def _short(path: Path) -> Path:
    """Give a path relative to the current folder where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


def _fail(message: str, *, code: int = 2) -> NoReturn:
    errors.print(f"[red]error:[/red] {_escaped(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    main()
