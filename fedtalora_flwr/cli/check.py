"""Look data through before any run: ``fedtalora check``."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtalora_flwr.cli.console import Assignments, ConfigFile, Preset, console, fail

if TYPE_CHECKING:
    from rich.table import Table

    from fedtalora_flwr.data.check import Checked

_MOST_CLASSES = 40  # in the table; the small ones come first where there are more
_READ_AS = {
    "nodes": "a node's folder (dataset=nodes)",
    "text": "a table of texts (dataset=text)",
    "parquet": "a Parquet table (dataset=parquet)",
    "imagefolder": "a folder of images (dataset=imagefolder)",
}
_INSTEAD = {  # of formats that no reader is for
    ".heic": "save them as JPEG or PNG",
    ".heif": "save them as JPEG or PNG",
    ".dcm": "export the slices as 8-bit PNG, at the window that is to be seen",
    ".nii": "export the slices as 8-bit PNG",
    ".gz": "unpack them",
    ".zip": "unpack them",
    ".svg": "render them as PNG",
    ".pdf": "export the pages as PNG",
    ".xlsx": "save the sheet as CSV UTF-8",
    ".xls": "save the sheet as CSV UTF-8",
}


def add_to(cli: typer.Typer) -> None:
    """Add the command."""
    cli.command()(check)


def check(
    path: Annotated[str, typer.Argument(metavar="FOLDER|TABLE", help="A node's folder of its own data, or a table.")],
    preset: Preset = "",
    config: ConfigFile = None,
    assignments: Assignments = [],  # noqa: B006
) -> None:
    """Look data through before any run: what they are taken for, and all that is wrong with them, at once.

    fedtalora check /mnt/scans

    Reads everything, decodes every image, changes nothing and calls nobody. Give it the settings of the run that
    the data are for: --set test-fraction=0.3, --set bad-files=skip. Exit status 1 if a run would refuse the data.
    """
    from fedtalora_flwr.config import RunConfig
    from fedtalora_flwr.config.sources import app_folder, gather, preset_file
    from fedtalora_flwr.data.check import check_data

    if preset and config:
        fail("give --preset or --config, not both")
    app = app_folder()
    file = preset_file(app, preset) if preset else config
    settings = RunConfig.parse(gather(app, file=file, assignments=assignments)).settings
    checked = check_data(path, settings, watch=_watched)
    skips = settings["bad_files"] == "skip"
    _show(checked, skips=skips)
    if not checked.classes or (checked.faults and not skips):
        raise typer.Exit(1)


def _watched(things: Sequence[Any]) -> Iterable[Any]:
    """Go through them, with a bar on a terminal."""
    from rich.progress import track

    return track(things, "looking", console=console, transient=True, disable=not console.is_terminal)


def _show(checked: "Checked", *, skips: bool) -> None:
    from rich.text import Text

    from fedtalora_flwr.data.hf_labels import LEAVE_OUT

    def say(text: str, style: str = "") -> None:
        printable = text.encode(errors="backslashreplace").decode()  # the name of a file need be no UTF-8
        console.print(Text(printable, style=style), highlight=False, soft_wrap=True)

    say(f"{checked.path}, read as {_READ_AS.get(checked.dataset, checked.dataset)}")
    say(_layout(checked), "bold")
    if checked.classes:
        console.print(_class_table(checked), highlight=False)
    if checked.faults:
        files = "1 fault" if len(checked.faults) == 1 else f"{len(checked.faults)} faults"
        say(f"\n{files}", "bold red")
        for reason in dict.fromkeys(fault.reason for fault in checked.faults):
            say(f"  {reason.removesuffix(LEAVE_OUT) if skips else reason}")
            for fault in checked.faults:
                if fault.reason == reason:
                    say(f"      {fault.file}", "red")
    if checked.passed_over:
        number = sum(checked.passed_over.values())
        say(f"\nPassed over: {number} file{'s' * (number > 1)}", "bold yellow")
        for kind, count in checked.passed_over.items():
            say(f"  {count:>6}  {kind:10} {_INSTEAD.get(kind, '')}".rstrip())
    if checked.frames:
        say("\nOf these files the first frame or page is used, the others are not", "bold yellow")
        for kind, numbers in checked.frames.items():
            fewest, most = min(numbers), max(numbers)
            held = f"{fewest}" if fewest == most else f"{fewest} to {most}"
            say(f"  {len(numbers):>6}  {kind:10} of {held} frames")
    if checked.remarks:
        say("\nNote", "bold yellow")
        for remark in checked.remarks:
            say(f"  {remark}")
    say("")
    _conclude(checked, skips=skips, say=say)


def _conclude(checked: "Checked", *, skips: bool, say: Any) -> None:
    if not checked.classes:
        say("There is nothing to learn from.", "bold red")
    elif checked.faults and skips:
        say("Can be used. What is at fault is left out, and named in the report (bad-files=skip).", "bold green")
    elif checked.faults:
        say("A run refuses these data. Mend or remove what is at fault, or leave it out: bad-files=skip.", "bold red")
    else:
        say("Can be used.", "bold green")


def _layout(checked: "Checked") -> str:
    """Say in one line what the data were taken for."""
    if not checked.classes:
        return "no examples"
    tasks = dict.fromkeys(one.task for one in checked.classes if one.task)
    names = {one.name for one in checked.classes}
    train, test = (sum(getattr(one, part) for one in checked.classes) for part in ("num_train", "num_test"))
    kind = f"{checked.modality}s"
    classes = f"{len(names)} class{'es' * (len(names) != 1)}"
    if tasks:
        order = f"{len(tasks)} task folder{'s' * (len(tasks) > 1)}"
        return f"{train + test} {kind}: {order}, {classes}; {train} to train on, {test} held out to test on"
    return f"{train + test} {kind} in {classes}; {train} to train on, {test} held out to test on"


def _class_table(checked: "Checked") -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    has_tasks = any(one.task for one in checked.classes)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ["task"] * has_tasks + ["class"]:
        table.add_column(column, overflow="fold")
    for column in ("train", "test"):
        table.add_column(column, justify="right")
    table.add_column("")
    shown = list(checked.classes)
    if len(shown) > _MOST_CLASSES:
        shown = sorted(shown, key=lambda one: one.num_train + one.num_test)[:_MOST_CLASSES]
    before = None
    for one in shown:
        odd = ["one example to train on"] * (one.num_train == 1) + ["never tested"] * (one.num_test == 0)
        task = [Text(one.task if one.task != before else "")] * has_tasks
        table.add_row(
            *task, Text(one.name), str(one.num_train), str(one.num_test), Text(", ".join(odd), style="yellow")
        )
        before = one.task
    if more := len(checked.classes) - len(shown):
        table.add_row(*[""] * has_tasks, Text(f"and {more} larger ones", style="dim"), "", "", "")
    return table
