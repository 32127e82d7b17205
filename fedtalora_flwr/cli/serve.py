"""``fedtalora serve``: the page of all runs below a folder."""

import ipaddress
import secrets
import socket
from pathlib import Path
from typing import Annotated

import typer

from fedtalora_flwr.cli.console import console, fail


def add_to(cli: typer.Typer) -> None:
    """Add the command."""
    cli.command()(serve)


def serve(
    runs: Annotated[Path, typer.Argument(metavar="RUNS", help="The folder that holds the runs, at any depth to 4.")] = (
        Path("runs")
    ),
    host: Annotated[str, typer.Option(help="Address to listen on; any but loopback asks for a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8765,
    token: Annotated[
        str, typer.Option(envvar="FEDTALORA_TOKEN", help="Asked of whoever looks; made up where one is needed.")
    ] = "",
) -> None:
    """Serve a page of all runs below a folder: what runs now, who is late, what ended, comparisons, reports.

    It reads run folders alone and writes nothing, so it is for runs of fedtalora run, Flower's own command, sweeps and
    deployments alike. /metrics has it for Prometheus, /api/runs as JSON. Ctrl-C ends it.

    On loopback everybody with an account on this machine can read it; elsewhere whoever has the token, in clear text:
    put TLS in front, or go through ssh -L.
    """
    import uvicorn

    from fedtalora_flwr.report.live import live_app

    if not runs.is_dir():
        fail(f"{runs} is no folder; give the one that holds the runs, by default runs/")
    if not token and not _is_loopback(host):
        token = secrets.token_urlsafe(18)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        fail(f"cannot listen on {host} port {port}: {error.strerror or error}; choose another by --host or --port")
    with listening:
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listening.getsockname()[1]}/{f'?token={token}' if token else ''}"
        console.print(f"runs below {runs.resolve()}: {address}", highlight=False, markup=False, soft_wrap=True)
        config = uvicorn.Config(live_app(runs, token=token), log_level="warning", access_log=False, lifespan="off")
        uvicorn.Server(config).run(sockets=[listening])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
