"""The command ``fedtalora``. Each command imports what it needs when it runs, so that ``--help`` is quick."""

import os
import sys
from typing import Annotated

import typer

from fedtalora_flwr.cli import check, deploy, results, run, serve, settings, sweep
from fedtalora_flwr.cli.console import console, errors, escaped

cli = typer.Typer(
    name="fedtalora",
    help="Federated continual fine-tuning of pre-trained transformers with exact LoRA aggregation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for commands in (run, sweep, results, serve, settings, check):
    commands.add_to(cli)


@cli.command()
def doctor() -> None:
    """Check this machine: libraries, Flower's programs, devices, data, a free port. Exit status 1 if it cannot run."""
    from fedtalora_flwr.cli.doctor import examine

    findings = examine()
    for finding in findings:
        mark = {"ok": "[green]ok[/green]  ", "note": "[yellow]note[/yellow]", "bad": "[red]bad[/red] "}[finding.level]
        console.print(f"{mark} {escaped(f'{finding.subject}: {finding.text}')}", highlight=False, soft_wrap=True)
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


deploy.add_to(cli)


def main() -> None:
    """Run the command line; an error of the user's ends in one line and status 2."""
    try:
        cli()
    except (ValueError, OSError) as error:
        if os.environ.get("FEDTALORA_TRACEBACK"):
            raise
        errors.print(f"[red]error:[/red] {escaped(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
