"""A node's key pair, made where the node is, and its registration with the SuperLink.

The private key never leaves the node. Flower's node id belongs to the key: a node that restarts keeps its id, and a
machine that takes another's place gets a key of its own.
"""

import json
import subprocess
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedtalora_flwr.deploy.commands import CONNECTION, environment
from fedtalora_flwr.deploy.folder import DeployError, FederationFolder, checked_name, write_private, write_public

_CALL_SECONDS = 120.0
_KEY_IN_USE = "[code: 23]"  # Flower's, also for a key whose node was removed


@dataclass(frozen=True)
class Node:
    """A node as the SuperLink knows it.

    Parameters
    ----------
    name
        Its name; empty if it was not registered from this folder.
    node_id
        Flower's number of its key.
    status
        ``registered`` (never seen), ``online`` or ``offline``.
    """

    name: str
    node_id: int
    status: str


def make_node_key(folder: FederationFolder, name: str) -> bool:
    """Make a node's key pair where it is absent; True if it was.

    Raises
    ------
    DeployError
        If the public key is there without the private one, which another machine may be using.
    """
    folder.make()
    private, public = folder.node_key(name), folder.node_public_key(name)
    if private.exists():
        write_public(public, _public_line(load_node_key(folder, name), name))
        return False
    if public.exists() and public.stat().st_size:  # empty: a shell made it, to write there what this prints
        raise DeployError(f"{public} is there without {private.name}: the key of {name} is on another machine")
    key = ec.generate_private_key(ec.SECP384R1())
    no_password = serialization.NoEncryption()
    encoded = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, no_password)
    write_private(private, encoded)
    write_public(public, _public_line(key, name))
    return True


def load_node_key(folder: FederationFolder, name: str) -> ec.EllipticCurvePrivateKey:
    """Read a node's private key.

    Raises
    ------
    DeployError
        If it is none that Flower takes.
    """
    path = folder.node_key(name)
    advice = f"make one by fedtalora node key {name} --new, and let it in by fedtalora node add or replace"
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except (TypeError, ValueError, UnsupportedAlgorithm) as error:
        raise DeployError(f"{path} cannot be read ({error}); {advice}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise DeployError(f"{path} is not of an elliptic curve; {advice}")
    return key


def trust(folder: FederationFolder, certificate: bytes) -> None:
    """Keep the authority's certificate for this node.

    Raises
    ------
    DeployError
        If the node trusts another authority already, or it is not a certificate.
    """
    folder.make()
    if not certificate.lstrip().startswith(b"-----BEGIN CERTIFICATE-----"):
        raise DeployError("not a certificate in PEM; the server's ca.crt is")
    if folder.ca_certificate.exists() and folder.ca_certificate.read_bytes().strip() != certificate.strip():
        raise DeployError(
            f"{folder.ca_certificate} is of another authority; if the federation was made anew, remove it first"
        )
    write_public(folder.ca_certificate, certificate.strip() + b"\n")


def register(folder: FederationFolder, name: str, public_key: bytes | None = None) -> bool:
    """Let a node in, on the server; False if it was in already.

    Parameters
    ----------
    public_key
        The node's public key; None: the one that is in the folder.

    Raises
    ------
    DeployError
        If the name has another key already, the key another name, or the SuperLink does not answer.
    """
    path = folder.node_public_key(name)
    if public_key is not None:
        _check_public_key(public_key)
        if path.exists() and _key_of(path.read_bytes()) != _key_of(public_key):
            raise DeployError(f"{name} has another key here; to put a new machine in its place: fedtalora node replace")
        for other in folder.root.glob("*.pub"):
            if other != path and _key_of(other.read_bytes()) == _key_of(public_key):
                raise DeployError(f"that is the key of {other.stem}; every node has a key of its own")
        write_public(path, public_key.strip() + b"\n")
    if not path.exists():
        raise DeployError(
            f"no public key of {name} in {folder.root}: give the one that fedtalora node key printed there"
        )
    if folder.node_id(name).exists():
        node_id = int(folder.node_id(name).read_text())
        if any(node.node_id == node_id for node in list_nodes(folder)):
            return False
    answer = ask_flower(folder, "supernode", "register", str(path), CONNECTION, "--name", name)
    if answer.get("success"):
        write_public(folder.node_id(name), str(answer["node-id"]).encode())
        return True
    if _KEY_IN_USE in str(answer):
        raise DeployError(
            f"the key of {name} was registered once and removed, or registered from elsewhere: its use is over. Make a "
            f"new one on the node by fedtalora node key {name} --new, and give it to fedtalora node replace {name}"
        )
    raise DeployError(f"the SuperLink did not register {name}: {reason_of(answer)}")


def unregister(folder: FederationFolder, name: str) -> bool:
    """Shut a node out, on the server, and forget its key; False if it was not in. A running one ends in seconds."""
    path = folder.node_id(name)
    if not path.exists():
        folder.node_public_key(name).unlink(missing_ok=True)
        return False
    node_id = int(path.read_text())
    known = any(node.node_id == node_id for node in list_nodes(folder))
    if known:
        answer = ask_flower(folder, "supernode", "unregister", str(node_id), CONNECTION)
        if not answer.get("success"):
            raise DeployError(f"the SuperLink did not remove {name}: {reason_of(answer)}")
    folder.node_public_key(name).unlink(missing_ok=True)
    path.unlink()
    return known


def replace(folder: FederationFolder, name: str, public_key: bytes) -> bool:
    """Let a new key in a node's place, on the server; False if it is the node's key already.

    Raises
    ------
    DeployError
        As `register` does.
    """
    _check_public_key(public_key)
    path = folder.node_public_key(name)
    if path.exists() and _key_of(path.read_bytes()) == _key_of(public_key):
        return register(folder, name)
    unregister(folder, name)
    return register(folder, name, public_key)


def list_nodes(folder: FederationFolder) -> list[Node]:
    """Ask the SuperLink for the nodes that may come in.

    Raises
    ------
    DeployError
        If it does not answer.
    """
    answer = ask_flower(folder, "supernode", "list", CONNECTION)
    if not answer.get("success"):
        raise DeployError(f"the SuperLink does not list its nodes: {reason_of(answer)}")
    names = {int(path.read_text()): path.stem for path in folder.root.glob("*.id")}
    rows = [row for row in answer["nodes"] if row["status"] != "unregistered"]
    nodes = [Node(names.get(int(row["node-id"]), ""), int(row["node-id"]), row["status"]) for row in rows]
    return sorted(nodes, key=lambda node: (node.name, node.node_id))


def ask_flower(folder: FederationFolder, *words: str, seconds: float | None = None) -> dict[str, Any]:
    """Give what ``flwr`` answers of the SuperLink: ``success``, and if that is false ``error-message``.

    Parameters
    ----------
    seconds
        To wait for the answer; None: as long as a loaded machine may need.

    Raises
    ------
    DeployError
        If no SuperLink was ever started from this folder.
    """
    if not (folder.flower_home / "config.toml").exists():
        raise DeployError(
            f"no server was ever started from {folder.root}: fedtalora superlink starts it; if its folder is another, "
            "give that by --dir or FEDTALORA_DIR"
        )
    env, seconds = environment(folder), seconds or _CALL_SECONDS
    try:
        done = subprocess.run(
            ["flwr", *words, "--format", "json"],
            env=env,
            cwd=folder.working_directory,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return {
            "success": False,
            "error-message": f"no answer within {seconds:g} s; see {folder.log('superlink')}",
        }
    start = done.stdout.find("{")
    try:
        return dict(json.loads(done.stdout[start:]))
    except ValueError:
        return {"success": False, "error-message": (done.stdout + done.stderr).strip()}


def reason_of(answer: dict[str, Any]) -> str:
    """Say why `ask_flower` was refused."""
    text = " ".join(str(answer.get("error-message", answer)).split())
    return f"{text}. Is it running here? fedtalora superlink starts it" if "onnect" in text else text


def _public_line(key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    encoding, form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return key.public_key().public_bytes(encoding, form) + f" {checked_name(name)}\n".encode()


def _key_of(line: bytes) -> bytes:
    return b" ".join(line.split()[:2])


def _check_public_key(line: bytes) -> None:
    try:
        key = serialization.load_ssh_public_key(line)
    except Exception:  # the library raises what it likes on a broken line
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise DeployError("a node's public key is one line, ecdsa-sha2-nistp384 ...; fedtalora node key makes it")
