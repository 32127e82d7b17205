"""A program of Flower that ends when it has stopped working: then what keeps it starts it again.

Left to themselves, Flower's programs live on without the part that matters. A SuperNode that the server has answered
with an error leaves its loop, but a thread of its own keeps the process. A SuperLink or SuperNode whose SuperExec has
ended starts no app any more, and says nothing. A SuperExec calls for ever where no SuperLink is any more.

``python -m fedtalora_flwr.deploy.watched flower-supernode ...`` is ``flower-supernode ...`` in the same process, and
ends with an error in each of these cases. It also notes each heartbeat of a node that the server has answered.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import NoReturn

from flwr.client.grpc_rere_client import connection
from flwr.supercore.heartbeat import HeartbeatSender

from fedtalora_flwr.deploy.commands import LOOPBACK
from fedtalora_flwr.deploy.folder import FederationFolder
from fedtalora_flwr.deploy.probe import STOPPED_WORKING, healthy, split_address
from fedtalora_flwr.deploy.processes import MARK, superexec_lives

LOOK_SECONDS = 2.0
SILENCE_SECONDS = 90.0  # of the SuperLink: longer than a restart, and than the 60 s after which Flower gives a run up
_END_SECONDS = 15.0  # for an end in order
_SUPEREXEC, _SUPERNODE = "flower-superexec", "flower-supernode"

_ends = threading.Event()


def main(program: str, words: Sequence[str], *, folder: FederationFolder, name: str) -> NoReturn:
    """Be the program, until it ends or has stopped working."""
    sys.argv = [program, *words]
    _note_heartbeats(folder.seen(name))
    threading.excepthook = _end_with_thread
    ails = _server_is_silent(folder, words) if program == _SUPEREXEC else _superexec_has_ended()
    threading.Thread(target=_watch, args=(ails,), daemon=True).start()
    (script,) = entry_points(group="console_scripts", name=program)
    status: object = None
    try:
        script.load()()
        if program == _SUPERNODE:  # of the others, the SuperLink alone returns: when it is asked to end
            _say("its connection to the server has ended, see the lines above")
    except SystemExit as end:  # Flower's own way to end: in order, or with a reason that it has printed
        status = end.code
    except Exception:  # whatever it is, no thread may keep this process
        traceback.print_exc()
        _say("it has ended with the error above")
    sys.stdout.flush()
    os._exit(1 if _ends.is_set() or status not in (None, 0) else 0)


def _note_heartbeats(seen: Path) -> None:
    """Touch a file whenever the server has answered a heartbeat of this node."""

    class Noted(HeartbeatSender):
        def _heartbeat(self) -> None:
            super()._heartbeat()
            with contextlib.suppress(OSError):  # of a disk that fails: the heartbeat matters more than its note
                seen.touch()

    connection.HeartbeatSender = Noted  # type: ignore[attr-defined]  # Flower has no other way to hear of it


def _superexec_has_ended() -> Callable[[], str]:
    """Give what tells whether the SuperExec that this process has started has ended."""
    lived = False

    def ails() -> str:
        nonlocal lived
        lives = superexec_lives(os.getpid())
        lived = lived or lives is not None
        return "its SuperExec has ended, so it starts no app any more" if lived and not lives else ""

    return ails


def _server_is_silent(folder: FederationFolder, words: Sequence[str]) -> Callable[[], str]:
    """Give what tells whether the SuperLink that a SuperExec calls has been silent for too long."""
    port = split_address(words[words.index("--runtime-api-address") + 1])[1]
    heard = time.monotonic()

    def ails() -> str:
        nonlocal heard
        if healthy(folder, port=port, insecure="--insecure" in words):
            heard = time.monotonic()
        silent = time.monotonic() - heard > SILENCE_SECONDS
        return f"no SuperLink has answered at {LOOPBACK}:{port} for {SILENCE_SECONDS:.0f} s" if silent else ""

    return ails


def _watch(ails: Callable[[], str]) -> None:
    """End this process when it ails twice in a row: one that ends in order may have lost its SuperExec already."""
    before = ""
    while True:
        time.sleep(LOOK_SECONDS)
        now = ails()
        if now and now == before:
            _end(now)
        before = now


def _end_with_thread(found: threading.ExceptHookArgs) -> None:
    if found.exc_type is SystemExit:
        return
    threading.__excepthook__(found)
    _end(f"its thread {found.thread.name if found.thread else ''} has ended with the error above")


def _end(reason: str) -> NoReturn:
    """End this process from a thread: in order, so that a node is let in again at once, or else by force."""
    _say(reason)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_END_SECONDS)
    os._exit(1)


def _say(reason: str) -> None:
    _ends.set()
    print(f"{STOPPED_WORKING}{reason}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    lock = Path(os.environ[MARK])
    main(sys.argv[1], sys.argv[2:], folder=FederationFolder(lock.parent), name=lock.stem)
