"""Have a task done by the warm process of this node, or in this process where that does not work.

A node has one warm process. It belongs to the process that starts the node's messages, whose number is in the names
of its files, and to a run and its code: for another run it is replaced, so that data and code that were changed
between runs are seen. Two runs that take turns on a node so replace each other's: each message then costs what it costs
on a cold node, but one model at a time is in the node's memory, and neither run sees what the other left there. It is
never replaced in the midst of a message: one of another run that comes meanwhile has a process of its own, as any
second message has. Both files are in ``$FLWR_HOME/warm``, a folder of this user alone.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fedtalora_flwr import __version__
from fedtalora_flwr.client.warm.task import Outcome, Task

IDLE_SECONDS = 1800.0  # then a warm process ends, and gives its memory back
SILENT_SECONDS = 60.0  # a warm process says each second that it lives
log = logging.getLogger("fedtalora.warm")


class Unanswered(Exception):
    """Why the warm process did not do a task."""


def call(task: Task, *, run_id: int) -> Any:
    """Have a task done by the warm process of this node, and return or raise what its function does.

    If there is none and none can be started, if it has another message, ends or falls silent, the task is done here.

    Parameters
    ----------
    task
        Its module is in a package that is imported here already.
    run_id
        What a warm process has in memory is of one run.
    """
    try:
        outcome = _ask(task, run_id)
    except Unanswered as reason:
        log.warning("%s; this message is handled in a process of its own", reason)
        return task.run()
    return outcome.get()


@dataclass(frozen=True)
class _Worker:
    """A warm process: its number, and the run and the code that it is for."""

    pid: int
    run_id: int
    code: str


def _ask(task: Task, run_id: int) -> Outcome:
    package = Path(str(sys.modules[task.module.partition(".")[0]].__file__)).parent
    try:
        folder = _private_folder()
        with _sole_use(folder / f"{os.getppid()}.json") as record:
            path, code = folder / f"{os.getppid()}.socket", _code_of(package)
            connection = _connect(path)
            worker = _read(record) if connection else None
            if worker and (worker.run_id, worker.code) != (run_id, code):
                os.kill(worker.pid, signal.SIGKILL)
                connection = worker = None
            if not (connection and worker):
                _write(record, None)
                worker = _Worker(_start(path, package.parent), run_id, code)
                _write(record, worker)
                connection = _connect(path)
            return _conversation(connection, worker, task)
    except OSError as error:
        raise Unanswered(f"the warm process cannot be reached ({error})") from None


def _conversation(connection: Connection | None, worker: _Worker, task: Task) -> Outcome:
    if connection is None:
        raise Unanswered("the warm process ended at its start")
    with connection:
        try:
            connection.send(task)
            while (said := connection.recv()) is None:
                pass  # a sign of life
        except BlockingIOError:
            os.kill(worker.pid, signal.SIGKILL)
            raise Unanswered(f"the warm process was silent for {SILENT_SECONDS:.0f} s, and was ended") from None
        except (OSError, EOFError):
            raise Unanswered("the warm process ended over this message") from None
    assert isinstance(said, Outcome)
    return said


# --- Its files ---


def _private_folder() -> Path:
    folder = Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr") / "warm"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise Unanswered(f"{folder} must be this user's alone; chmod 700 makes it so")
    return folder


@contextlib.contextmanager
def _sole_use(path: Path) -> Iterator[int]:
    """Hold the record of the node's warm process: who holds it may talk to that one, start it or end it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unanswered("the warm process has another message") from None
        yield handle
    finally:
        os.close(handle)


def _read(record: int) -> _Worker | None:
    text = os.pread(record, 4096, 0)
    return _Worker(**json.loads(text)) if text else None


def _write(record: int, worker: _Worker | None) -> None:
    os.ftruncate(record, 0)
    if worker is not None:
        os.pwrite(record, json.dumps(asdict(worker)).encode(), 0)


def _code_of(package: Path) -> str:
    """Give a digest of the state of the app's and the library's files."""
    library = Path(__file__).parents[2]
    files = [path for folder in (library, package) for path in sorted(folder.rglob("*.py"))]
    states = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return hashlib.sha256("\n".join([__version__, *states]).encode()).hexdigest()


# --- Its process and its socket ---


def _connect(path: Path) -> Connection | None:
    """Reach the process that listens; None if none does."""
    client = socket.socket(socket.AF_UNIX)
    try:
        with _short(path) as address:
            client.connect(address)
    except (FileNotFoundError, ConnectionRefusedError):
        client.close()
        return None
    limit = struct.pack("ll", int(SILENT_SECONDS), 0)  # a struct timeval; an operation that lasts longer fails
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    return Connection(client.detach())


def _start(path: Path, app_folder: Path) -> int:
    """Start a warm process and return its number.

    It inherits a socket that listens already, so it can be called at once, and handles of the processes that it
    belongs to.
    """
    path.unlink(missing_ok=True)
    with contextlib.ExitStack() as handles:
        listener = handles.enter_context(socket.socket(socket.AF_UNIX))
        with _short(path) as address:
            listener.bind(address)
        listener.listen()
        owners = _owners()
        for owner in owners:
            handles.callback(os.close, owner)
        command = [sys.executable, "-P", "-m", "fedtalora_flwr.client.warm.worker", str(path), str(app_folder)]
        command += [str(IDLE_SECONDS), str(listener.fileno()), *map(str, owners)]
        inherited = [listener.fileno(), *owners]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=inherited).pid


def _owners() -> list[int]:
    """Open handles of the process that starts the node's messages, and of the one that started it: the SuperNode.

    A handle, unlike a number, stays that of the one process, and shows its end however it ends.
    """
    if not hasattr(os, "pidfd_open"):
        raise Unanswered("a warm process needs Linux")
    parent = os.getppid()
    words = Path("/proc", str(parent), "stat").read_text().rpartition(")")[2].split()  # state, parent, ...
    return [os.pidfd_open(pid) for pid in (parent, int(words[1])) if pid > 0]


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """Give another name of a path: the kernel takes at most 107 bytes for a socket's."""
    handle = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{handle}/{path.name}"
    finally:
        os.close(handle)
