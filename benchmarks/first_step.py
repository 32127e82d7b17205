"""Measure where the time goes from ``fedtalora run`` to the first round of local training.

Starts the run as a user does, follows it from outside and stops it as soon as the first round's orders are out: the
first local step begins within 0.2 s of them. No mark costs the run anything: they are the times at which its processes
started, what the SuperLink logs, and when the run folder's files were written. The ServerApp and Ray start side by side
in one process, so a step of the table is the time since the mark above it, whatever that mark was of.

Usage: python benchmarks/first_step.py [--repeat 3] [--cpus N] [--set KEY=VALUE ...] [--json FILE]
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import psutil

TIMEOUT_SECONDS = 300
COMMAND, KEEPER, FIRST_ROUND = "command", "keeper starts", "first round's orders are out"
PROCESSES = {  # a word of the command line, and what its start marks
    "supervisor.py": KEEPER,
    "flower-superlink": "SuperLink's process starts",
    "flwr-simulation": "simulation's process starts",
    "gcs_server": "ClientApp is imported, Ray starts",
    "raylet/raylet": "Ray's node starts",
    "ray::ClientAppActor": "first actor's process starts",
}
LOG_LINES = {"Uvicorn running": "SuperLink listens", "control/start-run": "run is submitted"}
PHASES = {
    "loading data and model": "ServerApp is imported",
    "waiting for nodes": "server has data and model",
    "meeting the clients": "clients are asked",
    "training": FIRST_ROUND,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3, help="runs; the table shows the medians")
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--set", dest="assignments", metavar="KEY=VALUE", action="append", default=[])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    settings = ["num-tasks=1", "rounds-per-task=1", *arguments.assignments]
    runs = [seconds_to_marks(settings, cpus=arguments.cpus) for _ in range(arguments.repeat)]
    medians = {mark: statistics.median(run[mark] for run in runs if mark in run) for mark in runs[0]}
    print(f"{'mark (median of ' + str(len(runs)) + ' runs)':42}    at (s)  step (s)")
    previous = 0.0
    for mark, at in sorted(medians.items(), key=lambda pair: pair[1]):
        print(f"{mark:42}{at:10.2f}{at - previous:10.2f}")
        previous = at
    print(f"all runs: {'  '.join(f'{run[FIRST_ROUND]:.2f}' for run in runs)}   load {os.getloadavg()[0]:.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"cpus": arguments.cpus, "medians": medians, "runs": runs}, indent=1))


def seconds_to_marks(settings: list[str], *, cpus: int) -> dict[str, float]:
    """Play one run up to its first round; gives each mark's seconds since the command was started."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        command = [str(Path(sys.executable).with_name("fedtalora")), "run", "--out", str(folder), "--cpus", str(cpus)]
        command += [word for setting in settings for word in ("--set", setting)]
        began = time.time()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        marks = {COMMAND: began}
        try:
            while FIRST_ROUND not in marks:
                if process.poll() is not None or time.time() - began > TIMEOUT_SECONDS:
                    raise SystemExit(f"the run came to no first round:\n{_output(process)}")
                _look_at_processes(psutil.Process(process.pid), marks)
                _look_at_folder(folder, marks)
                time.sleep(0.05)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.communicate()
    return {mark: at - began for mark, at in marks.items()}


def _look_at_processes(root: psutil.Process, marks: dict[str, float]) -> None:
    """Mark each kind of process at the start of its first one."""
    for process in root.children(recursive=True):
        try:
            command, created = " ".join(process.cmdline()), process.create_time()
            # psutil knows the time of boot in whole seconds; the command's own start gives the error
            created += marks[COMMAND] - root.create_time()
        except psutil.Error:  # it ended while we looked
            continue
        for word, mark in PROCESSES.items():
            if word in command and created < marks.get(mark, float("inf")):
                marks[mark] = created


def _look_at_folder(folder: Path, marks: dict[str, float]) -> None:
    """Mark the phases that the server tells, and what the SuperLink logs with the time."""
    try:
        status = folder / "status.json"
        phase, at = json.loads(status.read_text())["phase"], status.stat().st_mtime
        if phase in PHASES:
            marks.setdefault(PHASES[phase], at)
        for line in (folder / "logs" / "superlink.log").read_text(errors="replace").splitlines():
            for word, mark in LOG_LINES.items():
                if word in line and (stamp := re.match(r"\S+Z", line)):
                    marks.setdefault(mark, datetime.fromisoformat(stamp[0]).timestamp())
    except (FileNotFoundError, ValueError):
        pass  # not written yet


def _output(process: "subprocess.Popen[bytes]") -> str:
    process.kill()
    return process.communicate()[0].decode(errors="replace")


if __name__ == "__main__":
    main()
