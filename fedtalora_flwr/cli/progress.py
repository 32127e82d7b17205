"""Show a run as it goes, from the files it writes: a live bar on a terminal, a line a round elsewhere."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fedtalora_flwr.config.units import human_bytes, human_time
from fedtalora_flwr.launch.sweep.play import Outcome
from fedtalora_flwr.run_folder import names, round_lines


class RunProgress:
    """Follow ``status.json`` and ``rounds.jsonl`` of a run folder.

    Parameters
    ----------
    folder
        The run folder.
    console
        Where to show it.
    """

    def __init__(self, folder: Path, console: Console) -> None:
        self._folder = folder
        self._console = console
        lines, self._damages = round_lines.read(folder / names.ROUNDS)
        self._seen = len(lines)
        self._stamp: int | None = None
        self._introduced = False
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._line: TaskID = self._bar.add_task("starting", total=None, facts="")

    def __enter__(self) -> "RunProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def tick(self) -> None:
        """Look at the files and show what is new."""
        path = self._folder / names.STATUS
        try:
            stamp = path.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if stamp == self._stamp:
            return
        self._stamp = stamp
        status = json.loads(path.read_text())
        self._introduce()
        self._show_rounds(status.get("num_rounds", 0))
        total, done = status.get("num_rounds"), status.get("rounds_done", 0)
        self._bar.update(self._line, description=_where(status), total=total, completed=done, facts=_facts(status))

    def _introduce(self) -> None:
        """Say once, before the first round, what is trained and sent."""
        path = self._folder / names.MANIFEST
        if self._introduced or not path.exists():
            return
        self._introduced = True
        count = json.loads(path.read_text())["parameters"]
        self._console.print(
            f"each client trains {count['trainable']:,} of {count['total']:,} parameters "
            f"(LoRA {count['lora']:,}, head {count['head']:,}) and sends {count['transmitted']:,} a round"
            + (f", at most {count['sums']:,} sums at a task's end" if count.get("sums") else ""),
            highlight=False,
            soft_wrap=True,
        )

    def _show_rounds(self, num_rounds: int) -> None:
        lines, damages = round_lines.read(self._folder / names.ROUNDS)
        for line in lines[self._seen :]:
            self._console.print(_round_line(line.values, num_rounds), highlight=False, soft_wrap=True)
        for damage in damages:
            if not damage.cut and damage not in self._damages:  # a line that is cut may just be written
                self._console.print(escape(f"{damage}"), highlight=False, soft_wrap=True)
        self._seen, self._damages = len(lines), damages


class SweepProgress:
    """Follow the runs of a sweep: a bar for all and a line for each that is at work; elsewhere a line at either end.

    Parameters
    ----------
    console
        Where to show it.
    num_runs, num_finished
        Of the sweep, and how many were finished before it began.
    """

    def __init__(self, console: Console, *, num_runs: int, num_finished: int) -> None:
        self._console = console
        self._num_runs, self._num_ended = num_runs, num_finished
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._all = self._bar.add_task("runs", total=num_runs, completed=num_finished, facts=self._count())
        self._lines: dict[str, tuple[TaskID, Path]] = {}

    def __enter__(self) -> "SweepProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begins(self, name: str, folder: Path, *, resumed: bool) -> None:
        """Show that a run begins or goes on."""
        self._lines[name] = self._bar.add_task(escape(name), total=None, facts="starting"), folder
        self._say(f"{name} {'goes on' if resumed else 'begins'}")

    def ends(self, outcome: Outcome) -> None:
        """Show how a run ended."""
        line, _ = self._lines.pop(outcome.run.name)
        self._bar.remove_task(line)
        self._num_ended += 1
        self._bar.update(self._all, completed=self._num_ended, facts=self._count())
        ending = f"[red]failed[/red]: {escape(outcome.failure)}" if outcome.failure else "is finished"
        self._say(f"{self._count()}  {escape(outcome.run.name)} {ending}")

    def tick(self) -> None:
        """Show where each run is."""
        for line, folder in self._lines.values():
            path = folder / names.STATUS
            if path.exists():
                status = json.loads(path.read_text())
                facts = f"{_where(status)}  {_facts(status)}"
                self._bar.update(
                    line, total=status.get("num_rounds"), completed=status.get("rounds_done", 0), facts=facts
                )

    def _count(self) -> str:
        return f"{self._num_ended}/{self._num_runs}"

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


def _where(status: dict[str, Any]) -> str:
    if not status.get("server_round"):
        return str(status["phase"])
    return (
        f"task {status['task_id'] + 1}/{status['num_tasks']} round {status['server_round']}/{status['num_rounds']} "
        f"{status['phase']}"
    )


def _facts(status: dict[str, Any]) -> str:
    facts = []
    if status.get("mean_loss") is not None:
        facts.append(f"loss {status['mean_loss']:.3f}")
    if status.get("accuracy_seen") is not None:
        facts.append(f"accuracy {status['accuracy_seen']:.3f}")
    if status.get("bytes_down_total"):
        facts.append(f"up {human_bytes(status['bytes_up_total'])} down {human_bytes(status['bytes_down_total'])}")
    if status.get("remaining_seconds"):
        facts.append(f"about {human_time(status['remaining_seconds'])} left")
    return "  ".join(facts)


def _round_line(line: Mapping[str, Any], num_rounds: int) -> str:
    loss = "" if line["mean_loss"] is None else f"  loss {line['mean_loss']:.4f}"
    accuracy = "" if line["accuracy_seen"] is None else f"  [bold]accuracy {line['accuracy_seen']:.4f}[/bold]"
    traffic = f"  up {human_bytes(line['bytes_up'])} down {human_bytes(line['bytes_down'])}"
    failed = "".join(f"\n    partition {f['partition_id']}: {escape(f['reason'])}" for f in line["failures"])
    return (
        f"task {line['task_id'] + 1} round {line['server_round']}/{num_rounds}{loss}{accuracy}"
        f"  {len(line['participants'])} clients{traffic}  {line['seconds']['total']:.1f} s{failed}"
    )
