"""Several hosts on this machine: network namespaces on one switch, whose cables can be cut. Needs root."""

import contextlib
import os
import shutil
import subprocess

HOSTS = ("srv", "c0", "c1", "c2")
SERVER = "10.77.0.1"
_FORWARDING, _DROPPING = "3", "0"


def missing() -> str:
    """Say why there can be no network here; empty if there can."""
    if os.geteuid() or not (shutil.which("ip") and shutil.which("bridge")):
        return "network namespaces need root, ip and bridge"
    name = f"fl{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return made.stderr.strip()


class Network:
    """A server ``srv`` and nodes ``c0`` to ``c2``, every one with a loopback of its own, for as long as it is open."""

    def __init__(self) -> None:
        self._name = f"f{os.getpid() % 100_000}"  # a device's name has 15 characters at most
        self._made: list[str] = []

    def __enter__(self) -> "Network":
        try:
            self._add("sw")
            self._ip("sw", "link", "add", "br0", "type", "bridge")
            self._ip("sw", "link", "set", "br0", "up")
            for number, host in enumerate(HOSTS):
                self._plug(host, SERVER if host == "srv" else f"10.77.0.{9 + number}")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the hosts away; a process that still runs in one keeps its own view of it."""
        for space in self._made:
            with contextlib.suppress(subprocess.CalledProcessError):
                _run("ip", "netns", "del", space)
        self._made.clear()

    def on(self, host: str) -> list[str]:
        """Give the words before a command that run it on a host."""
        return ["ip", "netns", "exec", f"{self._name}-{host}"]

    def prefix(self, process: str) -> list[str]:
        """Give the words before a deployment's command: ``node1`` runs on ``c1``, what is no node on ``srv``."""
        return self.on(f"c{process.removeprefix('node')}" if process.startswith("node") else "srv")

    def unplug(self, host: str) -> None:
        """Pull the cable: the host sees that it is gone."""
        self._ip("sw", "link", "set", f"p-{host}", "down")

    def plug_in(self, host: str) -> None:
        """Put the cable back."""
        self._ip("sw", "link", "set", f"p-{host}", "up")

    def swallow(self, host: str, *, packets: bool) -> None:
        """Drop what goes to a host and comes from it without a word, as a router far away does; or no longer."""
        state = _DROPPING if packets else _FORWARDING
        _run(*self.on("sw"), "bridge", "link", "set", "dev", f"p-{host}", "state", state)

    def _plug(self, host: str, address: str) -> None:
        self._add(host)
        ours, theirs = f"{self._name}-{host}h", f"{self._name}-{host}s"
        _run("ip", "link", "add", ours, "type", "veth", "peer", "name", theirs)
        for end, place, name in ((ours, host, "eth0"), (theirs, "sw", f"p-{host}")):
            _run("ip", "link", "set", end, "netns", f"{self._name}-{place}", "name", name)
        self._ip("sw", "link", "set", f"p-{host}", "master", "br0")
        self._ip(host, "addr", "add", f"{address}/24", "dev", "eth0")
        self._ip(host, "link", "set", "eth0", "up")
        self.plug_in(host)

    def _add(self, host: str) -> None:
        _run("ip", "netns", "add", f"{self._name}-{host}")
        self._made.append(f"{self._name}-{host}")
        self._ip(host, "link", "set", "lo", "up")

    def _ip(self, host: str, *words: str) -> None:
        _run("ip", "-n", f"{self._name}-{host}", *words)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
