"""A process in the background, under a supervisor that starts it again when it ends, as systemd would.

Flower's SuperNode ends, with status 0, whenever the SuperLink answers what it does not expect. Such an end is noted in
the process's log with what it means, and the process starts again after `Patience.pause` seconds: not at once, for the
SuperLink must see the node leave. One that does not stay up ends for good, for somebody has something to mend; that
takes more than the 60 seconds for which a SuperLink counts a killed node as online, and refuses it.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from fedtalora_flwr.deploy.folder import DeployError, FederationFolder
from fedtalora_flwr.deploy.probe import explain_end
from fedtalora_flwr.deploy.processes import MARK, claim, descendants, note, pid_of, send, stop, tail, write_pid

START_SECONDS = 120.0  # on a loaded machine; else a SuperLink takes 2
_LOOK_SECONDS = 0.2
_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>: what an ended process leaves behind becomes its supervisor's


@dataclass(frozen=True)
class Patience:
    """With a process that ends.

    Parameters
    ----------
    pause
        Seconds from its end to its next start.
    total
        Seconds, from its first end on, in which it may end again and again.
    steady
        Seconds up, after which an end counts as a first one.
    """

    pause: float = 10.0
    total: float = 120.0
    steady: float = 60.0


USUAL = Patience()


def start(
    folder: FederationFolder,
    name: str,
    command: Sequence[str],
    env: Mapping[str, str],
    *,
    ready: Callable[[], bool],
    seconds: float = START_SECONDS,
    patience: Patience = USUAL,
) -> None:
    """Start the command with a log of its own, and wait until it is ready.

    Only what has been ready is started again. The file ``<name>.kept`` says so; `stop` removes it.

    Raises
    ------
    DeployError
        If it runs already, ends before it is ready, or is not ready in time: then it is stopped. The message has the
        end of its log. Why it ended is added to the log.
    """
    lock = claim(folder, name, os.getpid())
    folder.kept(name).unlink(missing_ok=True)
    words = [sys.executable, "-m", __name__, str(folder.root), name, str(lock), *map(str, astuple(patience)), *command]
    try:
        with folder.log(name).open("ab") as log:  # to append: the node's own processes write there, and so do we
            log.truncate(0)
            subprocess.Popen(
                words,
                cwd=folder.working_directory,
                env={**env, MARK: str(folder.lock(name))},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock],
            )
    finally:
        os.close(lock)
    deadline = time.monotonic() + seconds
    while not ready():
        if pid_of(folder, name) is None:
            said = tail(folder, name, num_lines=15)
            meaning = explain_end(name, said)
            note(folder, name, meaning)
            raise DeployError(f"{name} did not come up: {meaning}\n{said}")
        if time.monotonic() > deadline:
            stop(folder, name)
            said = tail(folder, name, num_lines=15)
            raise DeployError(f"{name} was not up within {seconds:.0f} s and was stopped; its log ends:\n{said}")
        time.sleep(_LOOK_SECONDS)
    folder.kept(name).touch()


def supervise(folder: FederationFolder, name: str, command: Sequence[str], *, lock: int, patience: Patience) -> None:
    """Run the command again and again, until it is not wanted any more, or does not stay up.

    Parameters
    ----------
    lock
        Handle of the process's lock, which the process inherits; the lock's file always names the live one of the two.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    first_end = None
    while True:
        already_said = folder.log(name).stat().st_size
        began = time.monotonic()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[lock])
        write_pid(lock, process.pid)
        status = process.wait()
        write_pid(lock, os.getpid())
        _end_what_it_left()
        if not folder.kept(name).exists():
            return
        now = time.monotonic()
        if first_end is None or now - began > patience.steady:
            first_end = now
        ended = f"it was killed by {signal.Signals(-status).name}" if status < 0 else f"it ended with status {status}"
        with folder.log(name).open("rb") as log:
            log.seek(already_said)
            ended += f": {explain_end(name, log.read().decode(errors='replace'))}"
        if now - first_end > patience.total:
            note(folder, name, f"{ended}. It does not stay up; mend the cause, and start it again")
            folder.kept(name).unlink(missing_ok=True)
            return
        note(folder, name, f"{ended}. It starts again in {patience.pause:.0f} s")
        while time.monotonic() < now + patience.pause:
            if not folder.kept(name).exists():
                return
            time.sleep(_LOOK_SECONDS)


def _end_what_it_left() -> None:
    """Kill all that is left below this process: the next start would find ports and files in use."""
    while left := descendants(os.getpid()).keys() - {os.getpid()}:
        for pid in left:
            send(pid, signal.SIGKILL)
        os.waitpid(-1, 0)


if __name__ == "__main__":
    root, its_name, its_lock, *limits = sys.argv[1:7]
    supervise(
        FederationFolder(Path(root)), its_name, sys.argv[7:], lock=int(its_lock), patience=Patience(*map(float, limits))
    )
