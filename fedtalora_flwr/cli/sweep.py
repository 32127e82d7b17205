"""``fedtalora sweep``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtalora_flwr.cli.console import Assignments, console, errors, fail, short

if TYPE_CHECKING:
    from fedtalora_flwr.launch.sweep import Outcome, Plan


def add_to(cli: typer.Typer) -> None:
    """Add the command."""
    cli.command()(sweep)


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

    from fedtalora_flwr.cli.progress import SweepProgress
    from fedtalora_flwr.config.sources import app_folder, sweeps
    from fedtalora_flwr.launch.simulation import sigterm_as_exit
    from fedtalora_flwr.launch.sweep import Outcome, narrowed, play_all, read_plan, side_by_side, standing

    app = app_folder()
    known = sweeps(app)
    if file not in known and not Path(file).is_file():
        fail(f"no sweep {file!r}: it is no file, and experiments/sweeps has: {', '.join(known) or 'none'}")
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
        fail("stopped; the same command goes on with it", code=130)
    played = {run.name for run in plan.runs}
    before = [run for run in whole.runs if run.name not in played and found[run.name] == "finished"]
    if broken := [run.name for run in before if not _can_be_read(folder / run.name)]:
        errors.print(f"[yellow]note:[/yellow] left out, as they cannot be read: {', '.join(broken)}", highlight=False)
    before = [run for run in before if run.name not in broken]
    _show_study(whole, [*outcomes, *(Outcome(run, folder / run.name) for run in before)], folder)
    if failed := [outcome for outcome in outcomes if outcome.failure]:
        lines = [f"{short(outcome.folder)}: {outcome.failure}" for outcome in failed]
        fail("\n".join([f"{len(failed)} of {len(outcomes)} runs failed:", *lines]), code=1)


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
