"""The warm process of a node: does one task after the other, and keeps what they loaded.

It ends with the process that it belongs to, however that ends; when it had no task for long; and when nobody waits
for the task that it is doing. Its log is the node's.
"""

import contextlib
import os
import select
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from fedtalora_flwr.client.warm.task import Outcome, Task

_BEAT_SECONDS = 1.0


def serve(listener: socket.socket, path: Path, *, idle_seconds: float) -> None:
    """Do the tasks of those who call, until none has for `idle_seconds`."""
    listener.settimeout(idle_seconds)
    while True:
        try:
            client, _ = listener.accept()
        except TimeoutError:
            return
        client.setblocking(True)
        with Connection(client.detach()) as connection:
            try:
                with _beating(connection, path):
                    outcome = _outcome(connection.recv())
                connection.send(outcome)
            except (EOFError, OSError):
                return  # the caller is gone


def end_with(owners: Sequence[int], path: Path) -> None:
    """Wait for the end of one of the owners, and end this process."""
    poll = select.poll()
    for owner in owners:
        poll.register(owner, select.POLLIN)
    poll.poll()
    _end(path)


def _outcome(task: Task) -> Outcome:
    try:
        return Outcome(value=task.run())
    except Exception as error:
        return Outcome(error=error)


@contextlib.contextmanager
def _beating(connection: Connection, path: Path) -> Iterator[None]:
    """Tell the caller each second that we live; end this process if the caller does not."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(_BEAT_SECONDS):
            try:
                connection.send(None)
            except OSError:
                _end(path)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _end(path: Path) -> None:
    """End at once, in the midst of a task or not; our name goes first, while we listen, so that nobody else's does."""
    path.unlink(missing_ok=True)
    os._exit(0)


def main() -> None:
    """Serve until the end; the arguments are those of `fedtalora_flwr.client.warm.caller`."""
    path, app_folder, idle_seconds, listener, *owners = sys.argv[1:]
    sys.path.insert(0, app_folder)  # as Flower does for the process of a message
    watch = threading.Thread(target=end_with, args=([int(owner) for owner in owners], Path(path)), daemon=True)
    watch.start()
    serve(socket.socket(fileno=int(listener)), Path(path), idle_seconds=float(idle_seconds))
    _end(Path(path))


if __name__ == "__main__":
    main()
