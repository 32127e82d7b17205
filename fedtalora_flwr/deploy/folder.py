"""The folder that a machine keeps of a federation, and how private files are written there."""

import os
import pwd
import re
from dataclasses import dataclass
from pathlib import Path

from fedtalora_flwr.config.whole import whole_file

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_-]{0,30}[A-Za-z0-9])?")


class DeployError(ValueError):
    """What was asked of the deployment cannot be done; the message says why and what to do."""


@dataclass(frozen=True)
class FederationFolder:
    """Where a machine's files of the federation are.

    The server's folder and a node's have the same layout; what belongs to the other side is absent.

    Parameters
    ----------
    root
        The folder; absolute, for Flower reads some of the paths in it from elsewhere.
    """

    root: Path

    @property
    def ca_certificate(self) -> Path:
        """What every machine trusts; public."""
        return self.root / "ca.crt"

    @property
    def ca_key(self) -> Path:
        """What signs the server's certificate; on the server alone, or away from it between two renewals."""
        return self.root / "ca.key"

    @property
    def server_certificate(self) -> Path:
        """The SuperLink's certificate, with the names that nodes call it by; public."""
        return self.root / "server.crt"

    @property
    def server_key(self) -> Path:
        """The SuperLink's private key."""
        return self.root / "server.key"

    @property
    def superexec_secret(self) -> Path:
        """What a SuperExec in a container of its own shows to the SuperLink."""
        return self.root / "superexec.secret"

    @property
    def database(self) -> Path:
        """What the SuperLink knows of nodes and runs."""
        return self.root / "state.db"

    @property
    def flower_home(self) -> Path:
        """FLWR_HOME of everything that is started from this folder."""
        return self.root / "flwr"

    @property
    def working_directory(self) -> Path:
        """An empty folder: Python imports from the working directory first."""
        return self.root / "cwd"

    def node_key(self, name: str) -> Path:
        """Give the path of a node's private key, on the node alone."""
        return self.root / f"{checked_name(name)}.key"

    def node_public_key(self, name: str) -> Path:
        """Give the path of a node's public key, on the node and on the server."""
        return self.root / f"{checked_name(name)}.pub"

    def node_id(self, name: str) -> Path:
        """Give the path of the file that holds a registered node's id, on the server."""
        return self.root / f"{checked_name(name)}.id"

    def log(self, name: str) -> Path:
        """Give the path of a process's log."""
        return self.root / f"{checked_name(name)}.log"

    def lock(self, name: str) -> Path:
        """Give the path of the file that a process keeps locked while it lives."""
        return self.root / f"{checked_name(name)}.pid"

    def kept(self, name: str) -> Path:
        """Give the path of the file that says: this process came up, and is to be started again if it ends."""
        return self.root / f"{checked_name(name)}.kept"

    def line(self, name: str) -> Path:
        """Give the path of the file that holds the command line by which a process was started."""
        return self.root / f"{checked_name(name)}.line"

    def seen(self, name: str) -> Path:
        """Give the path of the file whose time is that of a node's last heartbeat that the server has answered."""
        return self.root / f"{checked_name(name)}.seen"

    def make(self) -> None:
        """Make the folder where it is absent, readable for its owner alone.

        Raises
        ------
        DeployError
            If this user may not.
        """
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.flower_home.mkdir(mode=0o700, exist_ok=True)
            self.working_directory.mkdir(exist_ok=True)
        except OSError as error:
            raise DeployError(
                f"{self.root} cannot be made ({error.strerror}): give another folder, or make one that is yours, once: "
                f"sudo install --directory --mode=0700 --owner=$USER {self.root}"
            ) from None


def checked_name(name: str) -> str:
    """Return the name of a node if it can be one.

    Raises
    ------
    DeployError
        If it could not be a file's name on every machine.
    """
    if not _NAME.fullmatch(name):
        raise DeployError(f"a node's name is up to 32 letters, digits, - and _, got {name!r}")
    return name


def require_folders(**options: str) -> None:
    """Refuse a folder that is not there, or that this user cannot look into; an empty name is none.

    Parameters
    ----------
    options
        The folders, by the options that name them (``data_path`` for ``--data-path``).

    Raises
    ------
    DeployError
        If there is such a folder.
    """
    for key, value in options.items():
        folder, option = Path(value).expanduser(), f"--{key.replace('_', '-')}"
        if not value:
            continue
        if not folder.exists():
            raise DeployError(f"{option} {value}: there is no folder {folder.absolute()} here; is it mounted?")
        if not folder.is_dir():
            raise DeployError(f"{option} {value} is a file; give the folder that it is in")
        if not os.access(folder, os.R_OK | os.X_OK):
            user = pwd.getpwuid(os.geteuid()).pw_name
            raise DeployError(f"{option} {value} cannot be read by the user {user}; give {user} the right to read it")


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read; whole or not at all, and never readable on the way."""
    _write(path, content, mode=0o600)


def write_public(path: Path, content: bytes) -> None:
    """Write a file that everybody may read; whole or not at all."""
    _write(path, content, mode=0o644)


def _write(path: Path, content: bytes, *, mode: int) -> None:
    with whole_file(path, mode=mode) as part:
        part.write_bytes(content)
