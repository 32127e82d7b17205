"""The long-lived processes of a folder: start in the foreground, find, stop. In the background: see `background`.

A process holds a lock on its ``<name>.pid`` for as long as it lives: the kernel drops the lock however it ends. So
nothing is ever started twice, and no number of an ended process is taken for a living one. Who looks takes the lock for
a moment, and shares it with others who look.
What Flower starts for it has sessions of its own, but is below it, or inherits the variable `MARK`: so it is found.
"""

import contextlib
import fcntl
import json
import os
import shlex
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedtalora_flwr.deploy.folder import DeployError, FederationFolder, write_private

STOP_SECONDS = 20.0
_MOMENT = 0.01  # seconds
MARK = "FEDTALORA_PROCESS"
RUNNING, WAITING = "running", "waiting"
_ENDED = "ZX"  # the states of what has ended, and was not collected yet
_SUPEREXEC = "flower-superexec"[:15]  # as the kernel has its name


def pid_of(folder: FederationFolder, name: str) -> int | None:
    """Return the number of a live process, None if it does not run."""
    return _holder(folder, name)[0]


def state_of(folder: FederationFolder, name: str) -> str:
    """Say ``running 1234``, ``waiting 1234`` (it has ended, and is about to be started again) or ``stopped``."""
    pid, state = _holder(folder, name)
    return f"{state} {pid}" if pid else "stopped"


def become(folder: FederationFolder, name: str, command: Sequence[str], env: Mapping[str, str]) -> None:
    """Turn this process into the command; it returns only by an error.

    Raises
    ------
    DeployError
        If it runs already.
    """
    handle = claim(folder, name, os.getpid())
    os.set_inheritable(handle, True)
    folder.seen(name).unlink(missing_ok=True)  # it is that of the process before
    os.chdir(folder.working_directory)
    os.execvpe(command[0], [*command], {**env, MARK: str(folder.lock(name))})


def stop(folder: FederationFolder, name: str, *, seconds: float = STOP_SECONDS) -> bool:
    """Stop a process and everything that Flower started for it; False if none of it lived.

    SIGTERM goes to the process alone, which ends the others in order; what is left after `seconds` is killed.
    """
    pid = pid_of(folder, name)
    born = descendants(pid) if pid else {}
    found = _left(born, folder, name)
    folder.kept(name).unlink(missing_ok=True)
    if not found:
        return False
    if pid is not None:
        send(pid, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while left := _left(born, folder, name):
        if time.monotonic() > deadline:
            for number in left:
                send(number, signal.SIGKILL)
        time.sleep(0.1)
    return True


def note_line(folder: FederationFolder, name: str, line: Sequence[str]) -> None:
    """Keep the command line by which a process is started."""
    write_private(folder.line(name), json.dumps([*line]).encode())


def other_line(folder: FederationFolder, name: str, line: Sequence[str]) -> str:
    """Say in what a command line differs from the one by which a process was started; empty where in nothing.

    Of a process that was started by an earlier version nobody knows.
    """
    path = folder.line(name)
    before = json.loads(path.read_text()) if path.exists() else [*line]
    gone, new = ([word for word in one if word not in other] for one, other in ((before, line), (line, before)))
    if not gone and not new:
        return ""
    return f"{shlex.join(gone) or 'nothing'} is now {shlex.join(new) or 'left out'}"


def note(folder: FederationFolder, name: str, text: str) -> None:
    """Add a line of our own to a process's log."""
    with folder.log(name).open("a") as file:
        file.write(f"fedtalora: {text}\n")


def tail(folder: FederationFolder, name: str, *, num_lines: int) -> str:
    """Return the last lines of a process's log, empty if there is none."""
    path = folder.log(name)
    return "\n".join(path.read_text(errors="replace").splitlines()[-num_lines:]) if path.exists() else ""


def claim(folder: FederationFolder, name: str, pid: int) -> int:
    """Take a process's lock, and return its handle.

    Raises
    ------
    DeployError
        If the process runs already.
    """
    handle = os.open(folder.lock(name), os.O_RDWR | os.O_CREAT, 0o600)
    while not _locked(handle, fcntl.LOCK_EX):
        if holder := pid_of(folder, name):
            os.close(handle)
            raise DeployError(f"{name} runs already, as process {holder}")
        time.sleep(_MOMENT)  # somebody looks
    write_pid(handle, pid)
    return handle


def write_pid(lock: int, pid: int, *, state: str = RUNNING) -> None:
    """Say, in the lock of this handle, which process it is; of one width, so that no reader finds half of it."""
    os.pwrite(lock, f"{pid:<20} {state:<10}\n".encode(), 0)


def descendants(pid: int) -> dict[int, str]:
    """Find a process and all below it: number -> when it started, since numbers are used again."""
    alive = _table()
    found = {pid} & alive.keys()
    while more := {child for child, (parent, _) in alive.items() if parent in found} - found:
        found |= more
    return {number: alive[number][1] for number in found}


def superexec_lives(pid: int) -> bool | None:
    """Tell whether the SuperExec that a SuperLink or SuperNode has started lives; None if there is none.

    Flower leaves one that has ended as a zombie, but may collect it when it starts a process, or ends itself.
    """
    states = [state for name, state, parent, _ in _everything().values() if (name, parent) == (_SUPEREXEC, pid)]
    return any(state not in _ENDED for state in states) if states else None


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _holder(folder: FederationFolder, name: str) -> tuple[int | None, str]:
    path = folder.lock(name)
    if not path.exists():
        return None, ""
    with path.open() as file:
        while not _locked(file.fileno(), fcntl.LOCK_SH):
            file.seek(0)
            if words := file.read().split():
                return int(words[0]), words[1]
            time.sleep(_MOMENT)  # the file was made just now
    return None, ""


def _locked(handle: int, how: int) -> bool:
    """Take a lock on a file if that can be done at once."""
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _left(born: Mapping[int, str], folder: FederationFolder, name: str) -> set[int]:
    """Find what lives of the processes that were there, and of those that carry the mark."""
    alive = _table()
    return {pid for pid, start in born.items() if pid in alive and alive[pid][1] == start} | _marked(folder, name)


def _marked(folder: FederationFolder, name: str) -> set[int]:
    """Find the live processes that carry the mark; Flower hides the environment of some of its own from their user."""
    mark = f"{MARK}={folder.lock(name)}".encode()
    found = set()
    for pid in _table():
        with contextlib.suppress(OSError):  # it ended while we looked, or is hidden
            if mark in Path("/proc", str(pid), "environ").read_bytes().split(b"\0"):
                found.add(pid)
    return found


def _table() -> dict[int, tuple[int, str]]:
    """List all live processes: number -> parent and start."""
    return {pid: (parent, start) for pid, (_, state, parent, start) in _everything().items() if state not in _ENDED}


def _everything() -> dict[int, tuple[str, str, int, str]]:
    """List all processes, zombies too: number -> name, state, parent and start, as /proc/PID/stat has them."""
    table = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended while we looked
                # "pid (name) state parent ... start ...", where the name may hold blanks and brackets
                before, _, after = (entry / "stat").read_text(errors="replace").rpartition(")")
                words = after.split()
                table[int(entry.name)] = before.partition("(")[2], words[0], int(words[1]), words[19]
    return table
