"""A lab in one file: which machines, which data, which devices; and its start, state, logs and stop.

Everything is a `fedtalora` command on the machine that it concerns, over ssh or here: what the lab does can be done
by hand, machine by machine. Each of those commands leaves alone what is done already, and so does the lab.
"""

import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedtalora_flwr.deploy.commands import CONTROL_PORT, LOOPBACK, NODE_PORT
from fedtalora_flwr.deploy.folder import DeployError, checked_name
from fedtalora_flwr.deploy.probe import split_address

LOCAL = "local"
SERVER = "superlink"
_CALL_SECONDS = 300.0
_SERVER_KEYS = {"host", "address", "listen", "control-port", "data"}
_NODE_KEYS = {"name", "host", "partition-id", "data", "data-path", "device", "port", "cold"}
_KEYS = {"folder", "program", "insecure", "server", "nodes"}
_CALL_FAILED = 255  # ssh's own status when it did not reach the machine
_NO_SUCH_COMMAND = {126, 127}  # the shell's, there


@dataclass(frozen=True)
class LabNode:
    """A node and its machine.

    Parameters
    ----------
    host
        What ssh calls, or ``local``.
    partition_id
        Which part of the data it holds.
    data
        Folder of the known data sets on its machine; empty: none.
    data_path
        Folder of the data that it brings itself; empty: none.
    device
        What of its machine's devices it uses; empty: all.
    port
        On its machine's loopback.
    cold
        Load libraries, model and data anew for each message.
    """

    name: str
    host: str
    partition_id: int
    data: str
    data_path: str
    device: str
    port: int
    cold: bool


@dataclass(frozen=True)
class Lab:
    """A federation: its server, its nodes, and where their files are.

    Parameters
    ----------
    folder
        On every machine: each process has a folder of its name in it.
    program
        The command ``fedtalora`` on the machines that ssh calls.
    insecure
        No TLS and no node keys.
    host
        The server's machine: what ssh calls, or ``local``.
    address
        Host and port by which the nodes call the server.
    listen
        Address and port where the server listens.
    control_port
        On the server's loopback.
    data
        Folder of the known data sets on the server's machine, with a run's test data; empty: none.
    """

    folder: str
    program: str
    insecure: bool
    host: str
    address: str
    listen: str
    control_port: int
    data: str
    nodes: tuple[LabNode, ...]

    def node(self, name: str) -> LabNode:
        """Find a node.

        Raises
        ------
        DeployError
            If the lab has none of that name.
        """
        for node in self.nodes:
            if node.name == name:
                return node
        raise DeployError(f"no node {name!r}; there are: {', '.join(node.name for node in self.nodes)}")


@dataclass(frozen=True)
class LabState:
    """What was found of a process of the lab.

    Parameters
    ----------
    process
        ``running 1234``, ``waiting 1234`` (to be started again), ``stopped``, or why its machine did not say.
    seen
        What the SuperLink says of the node: ``online``, ``offline``, ``registered``, ``unknown``; empty for itself, and
        in an insecure lab, whose nodes have no lasting id.
    """

    name: str
    host: str
    process: str
    seen: str


def read_lab(path: Path) -> Lab:
    """Read a lab from its file.

    Raises
    ------
    DeployError
        If the file is not there, or something in it is missing, unknown or given twice.
    """
    try:
        found = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise DeployError(f"{path}: no such file; deploy/lab.yaml is one to start from") from None
    except yaml.YAMLError as error:
        raise DeployError(f"{path}: {error}") from None
    try:
        return _parse(found)
    except DeployError as error:
        raise DeployError(f"{path}: {error}") from None


def up(lab: Lab, say: Callable[[str], None]) -> None:
    """Bring the lab up: certificates, server, keys, registrations, nodes; what is up already stays as it is.

    Raises
    ------
    DeployError
        If a machine refuses; what runs by then goes on, and another `up` takes over from there.
    """
    certificate = b""
    if not lab.insecure:
        say(_server(lab, "certs", split_address(lab.address)[0]).strip())
        certificate = _server(lab, "certs", "--print").encode()
    say(_server(lab, *_superlink_words(lab)).strip())

    def bring(node: LabNode) -> str:
        if not lab.insecure:
            public = _node(lab, node, "node", "key", node.name, "--ca", "-", stdin=certificate)
            _server(lab, "node", "add", node.name, "-", stdin=public.encode())
        return _node(lab, node, *_supernode_words(lab, node)).strip()

    _of_each(lab.nodes, bring, say)


def down(lab: Lab, say: Callable[[str], None]) -> None:
    """Stop the nodes, then the server.

    Raises
    ------
    DeployError
        If a machine does not answer; the others are stopped.
    """
    try:
        _of_each(lab.nodes, lambda node: _node(lab, node, "stop", node.name).strip(), say)
    finally:
        say(_server(lab, "stop", SERVER).strip())


def state(lab: Lab) -> list[LabState]:
    """Ask every machine for its process, and the server for its nodes."""
    server = _answer(lambda: _server(lab, "status", SERVER))
    seen = {}
    if server.startswith("running") and not lab.insecure:
        listed = _answer(lambda: _server(lab, "node", "list"))
        seen = {line.split()[0]: line.split()[-1] for line in listed.splitlines() if line}
    with ThreadPoolExecutor(max_workers=16) as pool:
        found = pool.map(lambda node: _answer(lambda: _node(lab, node, "status", node.name)), lab.nodes)
        states = [
            LabState(node.name, node.host, process, seen.get(node.name, "" if lab.insecure else "unknown"))
            for node, process in zip(lab.nodes, found, strict=True)
        ]
    return [LabState(SERVER, lab.host, server, ""), *states]


def logs(lab: Lab, name: str, *, num_lines: int) -> str:
    """Return the last lines of the log of a node, or of the server under the name ``superlink``."""
    words = ("logs", name, "--lines", str(num_lines))
    return _server(lab, *words) if name == SERVER else _node(lab, lab.node(name), *words)


def _superlink_words(lab: Lab) -> list[str]:
    words = ["superlink", "--fleet", lab.listen, "--control-port", str(lab.control_port), "--background"]
    words += ["--data", lab.data] if lab.data else []
    return [*words, *(["--insecure"] if lab.insecure else [])]


def _supernode_words(lab: Lab, node: LabNode) -> list[str]:
    words = ["supernode", node.name, "--superlink", lab.address, "--partition-id", str(node.partition_id)]
    words += ["--port", str(node.port), "--background"]
    words += ["--data", node.data] if node.data else []
    words += ["--data-path", node.data_path] if node.data_path else []
    words += ["--device", node.device] if node.device else []
    words += ["--cold"] if node.cold else []
    return [*words, *(["--insecure"] if lab.insecure else [])]


def _server(lab: Lab, *words: str, stdin: bytes = b"") -> str:
    return _call(lab, lab.host, SERVER, words, stdin)


def _node(lab: Lab, node: LabNode, *words: str, stdin: bytes = b"") -> str:
    return _call(lab, node.host, node.name, words, stdin)


def _call(lab: Lab, host: str, name: str, words: tuple[str, ...], stdin: bytes) -> str:
    """Run a command of ours on a machine, for the folder of one process, and return what it prints."""
    arguments = [*words, "--dir", f"{lab.folder}/{name}"]
    if host == LOCAL:
        command = [sys.executable, "-m", "fedtalora_flwr.cli.app", *arguments]
    else:
        command = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", host, "--"]
        command.append(shlex.join([lab.program, *arguments]))  # ssh hands one string to the shell there
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, timeout=_CALL_SECONDS)
    except subprocess.TimeoutExpired:
        raise DeployError(f"{host}: no answer within {_CALL_SECONDS:.0f} s to: {shlex.join(arguments)}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        if host != LOCAL and done.returncode == _CALL_FAILED:
            raise DeployError(
                f"{host} cannot be reached: {said}; `ssh {host} true` must work without a password or a question"
            )
        if host != LOCAL and done.returncode in _NO_SUCH_COMMAND:
            raise DeployError(
                f"{host} has no {lab.program} ({said}): install fedtalora there (deploy/README.md, step 1), or say in "
                "the lab's file where it is (program)"
            )
        raise DeployError(f"{name} on {host}: {said.removeprefix('error: ')}")
    return done.stdout.decode(errors="replace")


def _answer(ask: Callable[[], str]) -> str:
    try:
        return ask().strip()
    except DeployError as error:
        return str(error)


def _of_each(nodes: tuple[LabNode, ...], work: Callable[[LabNode], str], say: Callable[[str], None]) -> None:
    """Do it for all nodes side by side, and raise the failures together at the end."""
    failures = []
    with ThreadPoolExecutor(max_workers=16) as pool:
        for job in [pool.submit(work, node) for node in nodes]:
            try:
                say(job.result())
            except DeployError as error:
                failures.append(str(error))
    if failures:
        raise DeployError("\n".join(failures))


# --- Reading the file ---


def _parse(found: object) -> Lab:
    top = _mapping(found, "the lab", allowed=_KEYS, needed={"folder", "server", "nodes"})
    server = _mapping(top["server"], "server", allowed=_SERVER_KEYS, needed={"host", "address"})
    host, port = split_address(str(server["address"]))
    folder = str(top["folder"])
    if not folder.startswith("/"):
        raise DeployError(f"folder must be an absolute path, the same on every machine, got {folder!r}")
    return Lab(
        folder=folder,
        program=str(top.get("program", "fedtalora")),
        insecure=_boolean("insecure", top.get("insecure", False)),
        host=str(server["host"]),
        address=str(server["address"]),
        listen=str(server.get("listen", f"{LOOPBACK if host in (LOOPBACK, 'localhost') else '0.0.0.0'}:{port}")),
        control_port=_whole(server, "control-port", CONTROL_PORT),
        data=str(server.get("data", "")),
        nodes=_nodes(top["nodes"]),
    )


def _nodes(found: object) -> tuple[LabNode, ...]:
    if not isinstance(found, list) or not found:
        raise DeployError("nodes must be a list with at least one node")
    nodes: list[LabNode] = []
    for position, entry in enumerate(found):
        values = _mapping(entry, f"node {position}", allowed=_NODE_KEYS, needed={"name", "host"})
        host = str(values["host"])
        beside = sum(node.host == host for node in nodes)
        node = LabNode(
            name=checked_name(str(values["name"])),
            host=host,
            partition_id=_whole(values, "partition-id", position),
            data=str(values.get("data", "")),
            data_path=str(values.get("data-path", "")),
            device=str(values.get("device", "")),
            port=_whole(values, "port", NODE_PORT + beside),
            cold=_boolean("cold", values.get("cold", False)),
        )
        if node.name == SERVER:
            raise DeployError(f"{SERVER} is the server's name; give the node another")
        nodes.append(node)
    _refuse_twice("name", [node.name for node in nodes])
    _refuse_twice("partition-id", [node.partition_id for node in nodes])
    _refuse_twice("port of one machine", [(node.host, node.port) for node in nodes])
    return tuple(nodes)


def _refuse_twice(what: str, values: Sequence[object]) -> None:
    twice = {str(value) for value in values if values.count(value) > 1}
    if twice:
        raise DeployError(f"two nodes have the same {what}: {', '.join(sorted(twice))}")


def _mapping(found: object, what: str, *, allowed: set[str], needed: set[str]) -> Mapping[str, Any]:
    if not isinstance(found, dict):
        raise DeployError(f"{what} must be keys with values, got {found!r}")
    unknown, missing = found.keys() - allowed, needed - found.keys()
    if unknown:
        raise DeployError(
            f"{what} has unknown keys {', '.join(sorted(unknown))}; it may have {', '.join(sorted(allowed))}"
        )
    if missing:
        raise DeployError(f"{what} lacks {', '.join(sorted(missing))}")
    return found


def _whole(values: Mapping[str, Any], key: str, default: int) -> int:
    value = values.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise DeployError(f"{key} must be a whole number from 0, got {value!r}")
    return value


def _boolean(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise DeployError(f"{key} must be true or false, got {value!r}")
    return value
