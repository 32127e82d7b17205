"""Whether a process of a folder does its work: more than that it lives, or that a port of it answers."""

import contextlib
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedtalora_flwr.deploy.commands import CONNECTION
from fedtalora_flwr.deploy.folder import FederationFolder
from fedtalora_flwr.deploy.nodes import ask_flower, reason_of
from fedtalora_flwr.deploy.processes import RUNNING, pid_of, state_of, superexec_lives

SERVER_SIDE = ("superlink", "superexec")
OFFLINE_SECONDS = 60.0  # after a node's last heartbeat: then it counts as offline on the server
PENDING_SECONDS = 60.0  # a SuperExec that works takes a run within 1 s
_CALL_SECONDS = 15.0


def ailment(folder: FederationFolder, name: str) -> str:
    """Say what is wrong with the SuperLink, the SuperExec or a node; empty if it is well.

    Parameters
    ----------
    name
        ``superlink``, ``superexec``, or the node's.
    """
    pid, state = pid_of(folder, name), state_of(folder, name)
    if pid is None:
        return f"{name} does not run"
    if not state.startswith(RUNNING):
        return f"{name} has ended, and is about to be started again; its log says why: {folder.log(name)}"
    if _has_superexec(name, pid) and not superexec_lives(pid):
        return f"the SuperExec of {name} does not run: it starts no app, and if that lasts it is started again"
    return _of_server(folder) if name in SERVER_SIDE else _of_node(folder, name)


def _has_superexec(name: str, pid: int) -> bool:
    """Tell whether a process starts a SuperExec of its own: a SuperLink with ``--separate-superexec`` does not."""
    with contextlib.suppress(OSError):  # it ended while we looked
        return name != "superexec" and b"--isolation\0process" not in Path("/proc", str(pid), "cmdline").read_bytes()
    return True


def _of_server(folder: FederationFolder) -> str:
    answer = ask_flower(folder, "list", CONNECTION, seconds=_CALL_SECONDS)
    if not answer.get("success"):
        return f"the SuperLink does not list its runs: {reason_of(answer)}"
    waiting = {str(run["run-id"]): _age(run) for run in answer["runs"] if run["status"] == "pending"}
    oldest = max(waiting, key=lambda run: waiting[run], default="")
    if oldest and waiting[oldest] > PENDING_SECONDS:
        return f"run {oldest} has been pending for {waiting[oldest]:.0f} s: no SuperExec takes it; see the server's log"
    return ""


def _age(run: Mapping[str, Any]) -> float:
    """Give the seconds since a run was submitted, on the server's clock, which is this machine's."""
    submitted = datetime.strptime(run["pending-at"], "%Y-%m-%d %H:%M:%SZ").replace(tzinfo=UTC)
    return (datetime.now(UTC) - submitted).total_seconds()


def _of_node(folder: FederationFolder, name: str) -> str:
    seen = folder.seen(name)
    if not seen.exists():
        return f"the server has not let {name} in, or has not answered it yet; see its log"
    silence = time.time() - seen.stat().st_mtime
    if silence > OFFLINE_SECONDS:
        return f"the server has not answered {name} for {silence:.0f} s, and counts it as offline; see its log"
    return ""
