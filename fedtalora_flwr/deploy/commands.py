"""The command lines of Flower's programs, and what their environment holds: the one home of both.

TLS and node keys are on; `insecure` turns both off together. Only the Fleet API of the SuperLink listens to other
machines. The Control and Runtime APIs, by which anyone could run code on every node, have no option to leave loopback.
"""

import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import tomli_w

from fedtalora_flwr.deploy.folder import DeployError, FederationFolder, write_public

CONNECTION = "lab"  # a named connection: Flower's default one starts a simulation that stays
LOOPBACK = "127.0.0.1"
FLEET_PORT = 9092
CONTROL_PORT = 8000
NODE_PORT = 9094


def superlink_command(
    folder: FederationFolder,
    *,
    fleet_address: str = f"0.0.0.0:{FLEET_PORT}",
    control_port: int = CONTROL_PORT,
    separate_superexec: bool = False,
    insecure: bool = False,
) -> list[str]:
    """Give the command of the server.

    Parameters
    ----------
    fleet_address
        Address and port where nodes call.
    control_port
        Port on loopback, for ``flwr`` and the SuperExec.
    separate_superexec
        Let a SuperExec of its own run the ServerApp, so that a run survives a restart of the SuperLink.
    insecure
        No TLS and no node keys.
    """
    command = [
        "flower-superlink",
        "--fleet-api-address",
        fleet_address,
        "--host",
        LOOPBACK,
        "--port",
        str(control_port),
    ]
    command += ["--database", str(folder.database), "--disable-runtime-dependency-installation"]
    if separate_superexec:
        command += ["--isolation", "process", "--superexec-auth-secret-file", str(folder.superexec_secret)]
    if insecure:
        return [*command, "--insecure"]
    command += ["--enable-supernode-auth", "--ssl-ca-certfile", str(folder.ca_certificate)]
    return [*command, "--ssl-certfile", str(folder.server_certificate), "--ssl-keyfile", str(folder.server_key)]


def supernode_command(
    name: str,
    folder: FederationFolder,
    *,
    superlink: str,
    partition_id: int,
    data_path: str = "",
    port: int = NODE_PORT,
    insecure: bool = False,
    warm: bool = True,
) -> list[str]:
    """Give the command of a node.

    Parameters
    ----------
    superlink
        Host and port of the server's Fleet API; the host is a name in the server's certificate.
    partition_id
        Which part of the data the node holds, from 0 to num-clients - 1.
    data_path
        Folder of the data that the node brings itself (``dataset = "nodes"``); empty: it brings none.
    port
        Port on loopback, for the node's own ClientApps; each node of a machine needs another.
    warm
        Keep libraries, model and data in memory between messages (see `fedtalora_flwr.client.warm`).

    Raises
    ------
    DeployError
        If the folder's name cannot stand in a node config.
    """
    command = ["flower-supernode", "--superlink", superlink, "--host", LOOPBACK, "--port", str(port)]
    node_config = f'partition-id={partition_id} name="{name}" warm={str(warm).lower()}{_own_data(data_path)}'
    command += ["--node-config", node_config]
    if insecure:
        return [*command, "--insecure"]
    command += ["--root-certificates", str(folder.ca_certificate)]
    return [*command, "--auth-supernode-private-key", str(folder.node_key(name))]


def superexec_command(
    folder: FederationFolder, *, control_port: int = CONTROL_PORT, insecure: bool = False
) -> list[str]:
    """Give the command of a SuperExec beside a SuperLink with ``separate_superexec``."""
    command = ["flower-superexec", "--runtime-api-address", f"{LOOPBACK}:{control_port}"]
    command += ["--superexec-auth-secret-file", str(folder.superexec_secret)]
    return [*command, *(["--insecure"] if insecure else ["--root-certificates", str(folder.ca_certificate)])]


def watched(command: Sequence[str]) -> list[str]:
    """Give the command that runs a command of Flower's, and ends when that has stopped working."""
    return [sys.executable, "-m", "fedtalora_flwr.deploy.watched", *command]


def environment(folder: FederationFolder, *, superlink: str = "", data: str = "", device: str = "") -> dict[str, str]:
    """Give the environment of a process that is started from this folder.

    Parameters
    ----------
    superlink
        Server that no proxy may stand before; gRPC obeys the variables for proxies.
    data
        Folder of the known data sets on this machine; empty: as FEDTALORA_DATA has it.
    device
        ``cpu``, ``cuda``, ``cuda:1`` or ``cuda:0,1``: what of the machine's devices the process sees; empty: all.

    Raises
    ------
    DeployError
        If the device is none of these.
    """
    env = dict(os.environ)
    spared = [env.get("no_proxy") or env.get("NO_PROXY"), LOOPBACK, "localhost", superlink.rpartition(":")[0]]
    env["no_proxy"] = env["NO_PROXY"] = ",".join(dict.fromkeys(filter(None, spared)))
    env |= {
        "FLWR_HOME": str(folder.flower_home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), env.get("PATH", os.defpath)]),  # starts others by name
        "PYTHONUNBUFFERED": "1",  # the log is a file: without it, it lags behind
    }
    env.setdefault("FEDTALORA_CACHE", str(folder.root / "cache"))
    if data:
        env["FEDTALORA_DATA"] = str(Path(data).expanduser().resolve())
    if device:
        env |= _visible(device)
    return env


def write_connection(folder: FederationFolder, *, control_port: int = CONTROL_PORT, insecure: bool = False) -> None:
    """Write down how ``flwr`` reaches the SuperLink of this folder: as the connection `CONNECTION`."""
    trust = {"insecure": True} if insecure else {"root-certificates": str(folder.ca_certificate)}
    connection = {"address": f"{LOOPBACK}:{control_port}", **trust}
    settings = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
    write_public(folder.flower_home / "config.toml", tomli_w.dumps(settings).encode())


def _own_data(data_path: str) -> str:
    if not data_path:
        return ""
    path = str(Path(data_path).expanduser().resolve())
    if set(path) & set('"\\\n'):
        raise DeployError(f"data-path {path!r} holds a quote or backslash, which a node config cannot; rename it")
    return f' data-path="{path}"'


def _visible(device: str) -> dict[str, str]:
    kind, _, numbers = device.partition(":")
    if kind == "cpu" and not numbers:
        return {"CUDA_VISIBLE_DEVICES": ""}
    if kind == "cuda" and all(number.isdigit() for number in numbers.split(",") if numbers):
        return {"CUDA_VISIBLE_DEVICES": numbers} if numbers else {}
    raise DeployError(f"device is cpu, cuda, cuda:1 or cuda:0,1, got {device!r}")
