"""A process in the background, under a supervisor that starts it again when it ends, as systemd would.

Flower's SuperNode ends, with status 0, whenever the SuperLink answers what it does not expect. Such an end is noted in
the process's log with what it means, and the process starts again after `Patience.pause` seconds: not at once, for the
SuperLink must see the node leave. The longer it has not stayed up, the longer the pauses are, up to a limit.
"""

import contextlib
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
from fedtalora_flwr.deploy.probe import STOPPED_WORKING, explain_end
from fedtalora_flwr.deploy.processes import (
    MARK,
    RUNNING,
    WAITING,
    claim,
    descendants,
    note,
    pid_of,
    send,
    state_of,
    stop,
    tail,
    write_pid,
)

START_SECONDS = 120.0  # on a loaded machine; else a SuperLink takes 2
_LOOK_SECONDS = 0.2
_LOG_END_BYTES = 20_000
_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>: what an ended process leaves behind becomes its supervisor's


@dataclass(frozen=True)
class Patience:
    """With a process that ends.

    Parameters
    ----------
    pause
        Seconds from its end to its next start, at first: a killed node, which the SuperLink refuses for a minute, is
        tried every 10. Later a sixth of the time in which it has not stayed up.
    longest
        Seconds that no pause exceeds.
    steady
        Seconds after which it has stayed up.
    """

    pause: float = 10.0
    longest: float = 300.0
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
            supervisor = subprocess.Popen(
                words,
                cwd=folder.working_directory,
                env={**env, MARK: str(folder.lock(name))},
                stdin=subprocess.PIPE,  # it waits for the end of this
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock],
            )
        write_pid(lock, supervisor.pid, state=WAITING)
        assert supervisor.stdin is not None
        supervisor.stdin.close()
    finally:
        os.close(lock)
    try:
        _await_ready(folder, name, ready, seconds=seconds)
    except BaseException:
        stop(folder, name)
        raise
    keep(folder, name)


def keep(folder: FederationFolder, name: str) -> None:
    """From now on, start the process again when it ends."""
    folder.kept(name).touch()


def _await_ready(folder: FederationFolder, name: str, ready: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not (ready() and state_of(folder, name).startswith(RUNNING)):  # it may speak before the lock names it
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


def supervise(folder: FederationFolder, name: str, command: Sequence[str], *, lock: int, patience: Patience) -> None:
    """Run the command again and again, until it is not wanted any more.

    Parameters
    ----------
    lock
        Handle of the process's lock, which the process inherits; the lock's file always names the live one of the two.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    os.set_inheritable(lock, True)
    unsteady_since = None
    while True:
        began = time.monotonic()
        ended = _run(folder, name, command, lock=lock)
        write_pid(lock, os.getpid(), state=WAITING)
        if not folder.kept(name).exists():
            return  # what it left behind has its time, see `stop`
        _end_what_it_left()
        now = time.monotonic()
        if unsteady_since is None or now - began > patience.steady:
            unsteady_since = now
        pause = min(max(patience.pause, (now - unsteady_since) / 6), patience.longest)
        with contextlib.suppress(OSError):  # of a full disk: the process matters more than its log
            note(folder, name, f"{ended}. It starts again in {pause:.1f} s")
        while time.monotonic() < now + pause:
            if not folder.kept(name).exists():
                return
            time.sleep(_LOOK_SECONDS)


def _run(folder: FederationFolder, name: str, command: Sequence[str], *, lock: int) -> str:
    """Run the command to its end, and say how it ended and what that means."""
    log = folder.log(name)
    log.touch()  # somebody may have taken it away
    already_said = log.stat().st_size
    folder.seen(name).unlink(missing_ok=True)  # it is that of the process before
    no_input = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
    try:
        pid = os.posix_spawnp(command[0], [*command], os.environ, file_actions=[no_input])
    except OSError as error:
        return f"it could not be started ({error.strerror})"
    write_pid(lock, pid)
    ended = None
    while ended != pid:  # what an ended process leaves behind is collected too, or it would stay as a zombie
        ended, status = os.wait()
    code = os.waitstatus_to_exitcode(status)
    log.touch()
    with log.open("rb") as file:
        file.seek(max(already_said, file.seek(0, os.SEEK_END) - _LOG_END_BYTES))
        said = file.read().decode(errors="replace")
    if code < 0 and STOPPED_WORKING not in said:
        return f"it was killed by signal {-code}"
    return f"it ended with status {code}: {explain_end(name, said)}"


def _end_what_it_left() -> None:
    """Kill all that is left below this process: the next start would find ports and files in use."""
    while left := descendants(os.getpid()).keys() - {os.getpid()}:
        for pid in left:
            send(pid, signal.SIGKILL)
        os.wait()


if __name__ == "__main__":
    sys.stdin.read()  # until the lock names this process
    root, its_name, its_lock, *limits = sys.argv[1:7]
    supervise(
        FederationFolder(Path(root)), its_name, sys.argv[7:], lock=int(its_lock), patience=Patience(*map(float, limits))
    )
