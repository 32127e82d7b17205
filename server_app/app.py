"""Flower's entry to the server: read the settings, and run a federation into its folder."""

import logging
import sys
from datetime import datetime
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.run_folder.writer import RunFolder
from fedtalora_flwr.server.failures import RunFailed
from fedtalora_flwr.server.run import ServerRun

app = ServerApp()
log = logging.getLogger("fedtalora.server")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the settings describe, and leave its folder behind."""
    _log_to_stream()
    config = RunConfig.parse(context.run_config)
    out = Path(config.out or f"runs/{datetime.now():%Y%m%d-%H%M%S}").resolve()
    folder = RunFolder(out)
    with folder.only_ours():
        if folder.holds_rounds and not config.resume:
            raise RunFailed(f"{out} holds a run already; choose another out, or go on with it by resume=true")
        try:
            ServerRun(grid, config, folder).play()
        except Exception as error:
            folder.write_status(phase="failed", message=f"{error}" or type(error).__name__)
            raise
    log.info("run folder: %s", out)


def _log_to_stream() -> None:
    """Print our log on stdout, where ``flwr run --stream`` shows it."""
    ours = logging.getLogger("fedtalora")
    ours.setLevel(logging.INFO)
    if not ours.handlers:
        ours.addHandler(logging.StreamHandler(sys.stdout))
        ours.propagate = False
