"""The services of a compose file without a container engine: each in namespaces and a root of its own.

A service here is what the file says it is: the command or entrypoint, the volumes, the network, the user and the
variables of the image, the order of the start, the health check. What stands in for the image is the Python that
runs this, with the checkout as ``/app``. Needs root.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from local_grid import ROOT
from network import SERVER, Network

STOP_SECONDS = 20.0
STARTED, HEALTHY, COMPLETED = "service_started", "service_healthy", "service_completed_successfully"
_HOST_FOLDERS = ("bin", "sbin", "lib", "lib64", "usr", "etc", "dev", "sys")  # of the image, as far as it is Debian
_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")  # should pytest be killed, the kernel ends its containers
# The first process of a container with `init: true`: passes SIGTERM on, and collects ended processes.
_INIT = """
"$@" & child=$!
trap 'kill -TERM $child' TERM
while kill -0 $child 2>/dev/null; do wait $child; status=$?; done
exit $status
"""


@dataclass(frozen=True)
class Image:
    """What the image says of its containers.

    Parameters
    ----------
    user, uid
        Whose processes they are.
    env
        Their variables.
    entrypoint
        What a service's command follows, if it has no entrypoint of its own.
    """

    user: str
    uid: int
    env: Mapping[str, str]
    entrypoint: tuple[str, ...]

    @classmethod
    def read(cls, dockerfile: str) -> "Image":
        lines = re.sub(r"\\\n", " ", dockerfile)
        (uid,) = re.findall(r"^USER (\d+)", lines, flags=re.MULTILINE)
        (user,) = re.findall(rf"useradd .*--uid {uid} (\S+)", lines)
        (entrypoint,) = re.findall(r"^ENTRYPOINT \[(.*)\]", lines, flags=re.MULTILINE)
        settings = " ".join(re.findall(r"^ENV (.*)", lines, flags=re.MULTILINE))
        env = dict(word.split("=", 1) for word in shlex.split(settings))
        return cls(user, int(uid), env, tuple(shlex.split(entrypoint.replace(",", " "))))


@dataclass
class Containers:
    """The services, from `up` to the end of the context.

    Parameters
    ----------
    services
        As the file has them.
    image
        What all of them run.
    folder
        Not there yet: volumes, roots and logs.
    hosts
        Networks: ``superlink`` is its server.
    variables
        What ``${NAME}`` stands for in the file.
    """

    services: Mapping[str, Mapping[str, Any]]
    image: Image
    folder: Path
    hosts: Network
    variables: Mapping[str, str]
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    _well: set[str] = field(default_factory=set)

    def __enter__(self) -> "Containers":
        self.folder.mkdir()
        names = f"127.0.0.1 localhost\n{SERVER} superlink\n"
        users = f"root:x:0:0:root:/root:/bin/sh\n{self.image.user}:x:{self.image.uid}:{self.image.uid}::/home:/bin/sh\n"
        (self.folder / "hosts").write_text(names)
        (self.folder / "passwd").write_text(users)
        return self

    def __exit__(self, *error: object) -> None:
        self.down()

    def up(self, *, seconds: float) -> None:
        """Start every service when what it depends on is as it should be, and wait until all are well."""
        deadline = time.monotonic() + seconds
        wanted = {name: HEALTHY if "healthcheck" in self.services[name] else COMPLETED for name in self.services}
        while not all(self.reached(name, condition) for name, condition in wanted.items()):
            for name in self.services:
                needed = self.services[name].get("depends_on", {})
                ready = all(self.reached(other, how["condition"]) for other, how in needed.items())
                if name not in self.processes and ready:
                    self._start(name)
            for name, process in self.processes.items():
                status = process.poll()
                assert status in (None, 0), f"{name} ended with {status}\n{self.tails()}"
            assert time.monotonic() < deadline, f"not up within {seconds:.0f} s: {wanted}\n{self.tails()}"
            time.sleep(1.0)

    def reached(self, name: str, condition: str) -> bool:
        """Say whether a service is as another needs it."""
        process = self.processes.get(name)
        if process is None:
            return False
        if condition == COMPLETED:
            return process.poll() == 0
        if condition == HEALTHY:
            kind, *words = self.services[name]["healthcheck"]["test"]
            assert kind == "CMD", "only the form with a list of words is run here"
            if name not in self._well and process.poll() is None and self.execute(name, *words).returncode == 0:
                self._well.add(name)
            return name in self._well
        assert condition == STARTED, condition
        return process.poll() is None

    def execute(self, name: str, *words: str, seconds: float = 60) -> "subprocess.CompletedProcess[str]":
        """Run a command in a container that runs, as ``docker compose exec`` does."""
        first = self._first(name)
        if first is None:
            return subprocess.CompletedProcess(words, 1, f"{name} does not run")
        enter = ["nsenter", "--target", str(first), "--mount", "--pid", "--net", "--root", "--wd"]
        command = [*enter, *self._as_user(), *words]
        return subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds)

    def volume(self, name: str) -> Path:
        """Give the folder of a volume."""
        return self.folder / "volumes" / name

    def down(self) -> None:
        """Stop the services; a container's processes end with its first one."""
        for name in self.processes:
            if first := self._first(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(first, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for process in self.processes.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()  # its child, the container's first process, goes with it, and all others with that
                process.wait()

    def tails(self, *, num_lines: int = 20) -> str:
        """Return the last lines of every service's output."""
        logs = {path.stem: path.read_text(errors="replace").splitlines() for path in sorted(self.folder.glob("*.log"))}
        return "\n".join("\n".join([f"--- {name}", *lines[-num_lines:]]) for name, lines in logs.items())

    def _start(self, name: str) -> None:
        service = self.services[name]
        isolated = ["unshare", "--mount", "--pid", "--fork", "--propagation", "private"]
        network = service.get("network_mode", name).removeprefix("service:")
        isolated = [*isolated, "--net"] if network == "none" else [*self.hosts.prefix(network), *isolated]
        words = [
            self._filled(word) for word in (*service.get("entrypoint", self.image.entrypoint), *service["command"])
        ]
        first = ["sh", "-c", _INIT, "init", *words] if service.get("init") else words
        inside = [*self._as_user(capabilities=service.get("cap_drop") != ["ALL"]), *_WITH_PARENT, *first]
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [*_WITH_PARENT, *isolated, "sh", "-euc", self._mounts(name), "sh", *inside],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _first(self, name: str) -> int | None:
        """Find the first process of a container, the child of the one that made its namespaces; None if it is over."""
        process = self.processes[name]
        if process.poll() is not None:
            return None
        found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return int(found[0]) if found else None

    def _as_user(self, *, capabilities: bool = False) -> list[str]:
        paths = [Path(sys.prefix, "bin"), "/usr/local/bin", "/usr/bin", "/bin"]
        env = {"PATH": ":".join(map(str, paths)), "HOME": "/home", "PYTHONPATH": "/app", **self.image.env}
        words = ["setpriv", "--reuid", str(self.image.uid), "--regid", str(self.image.uid), "--clear-groups"]
        words += [] if capabilities else ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
        return [*words, "env", "-i", "-C", "/app", *(f"{key}={value}" for key, value in env.items())]

    def _mounts(self, name: str) -> str:
        """Give the script that builds the container's root, and goes on in it with its arguments."""
        root = self.folder / "roots" / name
        root.mkdir(parents=True)
        lines = [f"mount -t tmpfs -o mode=0755 tmpfs {shlex.quote(str(root))}", f"cd {shlex.quote(str(root))}"]
        for folder in _HOST_FOLDERS:
            host = Path("/", folder)
            if host.is_symlink():
                lines.append(f"ln -s {shlex.quote(str(host.readlink()))} {folder}")
            elif host.is_dir():
                lines.append(f"mkdir {folder} && mount --rbind {host} {folder}")
        lines += ["mkdir -m 1777 tmp", "mkdir proc && mount -t proc proc proc", f"install -d -o {self.image.uid} home"]
        lines += [f"mount --bind {shlex.quote(str(self.folder / file))} etc/{file}" for file in ("hosts", "passwd")]
        for python in dict.fromkeys([Path(sys.prefix), Path(sys.prefix).resolve(), Path(sys.base_prefix)]):
            if not python.is_relative_to("/usr"):
                lines.append(_bind(python, str(python), read_only=True))
        lines.append(_bind(ROOT, "/app", read_only=True))
        for volume in map(self._filled, self.services[name].get("volumes", ())):
            source, target, *mode = volume.split(":")
            lines.append(_bind(self._source(source), target, read_only=mode == ["ro"]))
        return "\n".join([*lines, 'exec chroot . "$@"'])

    def _source(self, source: str) -> Path:
        if source.startswith(("/", ".")):
            return Path(source)
        path = self.volume(source)
        if not path.exists():  # as the image has the folders that volumes are mounted on
            path.mkdir(parents=True)
            path.chmod(0o700)
            os.chown(path, self.image.uid, self.image.uid)
        return path

    def _filled(self, text: str) -> str:
        """Put in the variables of the file; ``$$`` stands for one ``$``."""
        fill = re.compile(r"\$(?:(\$)|\{(\w+)(?::-([^}]*))?\})")
        return fill.sub(lambda m: "$" if m[1] else self.variables.get(m[2], m[3] or ""), text)


def _bind(source: Path, target: str, *, read_only: bool) -> str:
    inside, outside = shlex.quote(target.lstrip("/")), shlex.quote(str(source))
    line = f"mkdir -p {inside} && mount --bind {outside} {inside}"
    return f"{line} && mount -o remount,bind,ro {inside}" if read_only else line
