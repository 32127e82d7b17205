"""The app as it is deployed: a SuperLink and SuperNodes of their own, gRPC between them, one process a message.

Flower starts processes that outlive the ones we start: the SuperLink's SuperExec has a session of its own, and every
message has a ``flwr-clientapp``. All of them inherit ``FLWR_HOME``, which lies in the deployment's folder. So no
process is chosen by its name, and none is overlooked.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sysconfig
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fedtalora_flwr.launch.supervisor import claim_port
from fedtalora_flwr.model.precision import on_cpu, verdict_file

CONNECTION = "lab"
COMPLETED = "finished:completed"
START_SECONDS = 120.0  # on a loaded machine; unloaded a SuperLink takes 2
STOP_SECONDS = 10.0


class DeploymentError(AssertionError):
    """The deployment did not do what it was asked to; the message ends with the tails of its logs."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended, in the words and numbers of ``flwr list``.

    Parameters
    ----------
    status, details
        ``finished:completed``, ``finished:failed`` or ``finished:stopped``, and why.
    bytes_up, bytes_down
        What the SuperLink counted from the nodes and to them.
    seconds
        From the ServerApp's start to its end.
    client_seconds
        Of all messages together, from the node's having it to its having the reply.
    log
        What the ServerApp printed.
    """

    run_id: int
    status: str
    details: str
    bytes_up: int
    bytes_down: int
    seconds: float
    client_seconds: float
    log: str


class Part:
    """One long-lived process of a deployment; started again, it has the same command, home and log."""

    def __init__(self, command: list[str], *, env: Mapping[str, str], log_path: Path) -> None:
        self.name, self.log_path = log_path.stem, log_path
        self.command, self.env = command, dict(env)
        self.process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def log(self) -> str:
        """What it has printed since its last start."""
        return self.log_path.read_bytes()[self._log_start :].decode(errors="replace")

    def start(self) -> None:
        assert not self.alive, f"{self.name} runs already"
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            self.process = subprocess.Popen(
                # Should pytest be killed, the kernel ends its deployments. (It watches the thread that starts this.)
                ["setpriv", "--pdeathsig", "TERM", *self.command],
                env=self.env,
                cwd=self.log_path.parent / "cwd",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def send_signal(self, number: signal.Signals) -> None:
        if self.alive:
            os.kill(self.pid, number)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> int:
        """End this process alone, by SIGTERM in an orderly way, and return its exit status.

        What Flower started for it may outlive it: a ServerApp whose SuperLink was killed still runs.
        """
        self.send_signal(number)
        assert self.process is not None
        return self.process.wait(STOP_SECONDS)

    def crash(self) -> None:
        """End it and everything that Flower started for it at once, as a power failure does."""
        _kill_all(self.processes)
        self.kill()

    def processes(self) -> dict[int, str]:
        """Find it and everything that Flower started for it: id -> command line."""
        return _processes_of(Path(self.env["FLWR_HOME"]))


class Deployment:
    """A SuperLink and its SuperNodes on free ports of this machine, for as long as the context is open.

    Parameters
    ----------
    folder
        Not there yet; everything goes here: logs, keys, each process's FLWR_HOME.
    num_nodes
        SuperNodes, with the partitions 0 to num_nodes - 1.
    secure
        TLS, and only nodes whose key the SuperLink knows.
    host
        IP address of the SuperLink's Fleet API: it listens there, and the nodes call it.
    prefix
        Name of a process (``superlink``, ``node0``, ..., ``flwr``) -> words before its command, such as
        ``["ip", "netns", "exec", name]``.
    node_config
        Of every node, beside its partition: TOML values in one string.
    env
        For all processes, beside what `environment` sets.
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_nodes: int,
        secure: bool = False,
        host: str = "127.0.0.1",
        prefix: Callable[[str], list[str]] = lambda name: [],
        node_config: str = "",
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.num_nodes = folder.resolve(), num_nodes
        self.secure, self.host, self.prefix = secure, host, prefix
        self.node_config, self.extra_env = node_config, dict(env or {})
        self.keys = self.folder / "keys"
        self._claims = contextlib.ExitStack()
        self.fleet_port, self.control_port = self._port(), self._port()
        self.node_ports = [self._port() for _ in range(num_nodes)]
        self.superlink = self._part("superlink", self._superlink_command())
        self.nodes = [self._part(f"node{p}", self._node_command(p)) for p in range(num_nodes)]
        self._streams: dict[int, Part] = {}  # run id -> `flwr run --stream`

    def __enter__(self) -> "Deployment":
        (self.folder / "cwd").mkdir(parents=True)  # empty: Python imports from it first
        try:
            if self.secure:
                _make_certificates(self.keys, self.host)
            self._write_connection()
            self.start_superlink()
            for node in self.nodes:
                if self.secure:
                    self._register(node)
                node.start()
            for node in self.nodes:
                self.await_online(node)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close()
        if error is not None and not isinstance(error, DeploymentError):
            error.add_note(self.tails())

    # --- Runs ---

    def run(self, app_dir: Path, settings: Mapping[str, Any], *, seconds: float) -> Outcome:
        """Submit a run and wait for its end."""
        return self.outcome(self.submit(app_dir, settings), seconds=seconds)

    def submit(self, app_dir: Path, settings: Mapping[str, Any]) -> int:
        """Hand the app to the SuperLink and return the run's id; the ServerApp's log goes to a file."""
        name = f"run{len(self._streams)}"
        config = self.folder / f"{name}.toml"
        config.write_text(tomli_w.dumps(dict(settings)))
        words = ("run", str(app_dir), CONNECTION, "--stream", "--run-config", str(config))
        stream = self._part(name, self._command("flwr", "flwr", *words), home="flwr")
        stream.start()
        self._await(lambda: "Successfully started run" in stream.log, START_SECONDS, "the run's id", needs=stream)
        run_id = int(re.findall(r"Successfully started run (\d+)", stream.log)[0])
        self._streams[run_id] = stream
        return run_id

    def running(self, run_id: int) -> bool:
        """Say whether a run still goes on, as far as its log tells."""
        return self._streams[run_id].alive

    def outcome(self, run_id: int, *, seconds: float) -> Outcome:
        """Wait for a run's end."""
        deadline, stream = time.monotonic() + seconds, self._streams[run_id]
        # The stream ends with the run or breaks off with the SuperLink; asking costs a second of CPU.
        self._await(lambda: not stream.alive, seconds, f"the end of run {run_id}")
        while not (row := self.row(run_id)).get("status", "").startswith("finished"):
            if time.monotonic() > deadline:
                raise DeploymentError(f"run {run_id} has not ended within {seconds:.0f} s: {row}\n{self.tails()}")
            time.sleep(1.0)
        return Outcome(
            run_id=run_id,
            status=row["status"],
            details=row["status-details"],
            bytes_up=row["network-traffic"]["inbound-bytes"],
            bytes_down=row["network-traffic"]["outbound-bytes"],
            seconds=row["elapsed"],
            client_seconds=row["compute-time"]["clientapp-seconds"],
            log=stream.log,
        )

    def row(self, run_id: int) -> dict[str, Any]:
        """Read what ``flwr list`` says of a run now; nothing if the SuperLink does not answer."""
        try:
            rows = json.loads(self.flwr("list", CONNECTION, "--run-id", str(run_id), "--format", "json"))["runs"]
        except (ValueError, LookupError):
            return {}
        return dict(rows[0])

    def flwr(self, *words: str) -> str:
        """Run Flower's command on the SuperLink's host and return what it prints."""
        command, env, cwd = self._command("flwr", "flwr", *words), self.environment("flwr"), self.folder / "cwd"
        return subprocess.run(
            command, env=env, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60
        ).stdout

    # --- Processes ---

    def start_superlink(self) -> None:
        """Start the SuperLink; after a kill it goes on from its database."""
        self.superlink.start()
        self._await(lambda: "Uvicorn running" in self.superlink.log, START_SECONDS, "its API", needs=self.superlink)

    def await_online(self, node: Part) -> None:
        """Wait until a node that was started has its id from the SuperLink."""
        self._await(lambda: "SuperNode ID:" in node.log, START_SECONDS, "its id", needs=node)

    def guest(self, partition_id: int) -> Part:
        """Build another SuperNode that says it holds a partition; no key of it is registered, it is not started."""
        command = self._node_command(partition_id)
        command[command.index("--port") + 1] = str(self._port())
        self.nodes.append(self._part("guest", command))
        return self.nodes[-1]

    def close(self) -> None:
        """End every process of the deployment, those that Flower started included."""
        parts = [*self.nodes, *self._streams.values(), self.superlink]
        for part in parts:
            part.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        _kill_all(self.processes)
        for part in parts:
            if part.process is not None:
                part.process.wait()
        self._claims.close()

    def processes(self) -> dict[int, str]:
        """Find every live process of this deployment: id -> command line."""
        return _processes_of(self.folder)

    def tails(self, *, num_lines: int = 25) -> str:
        """Return the last lines of every log."""
        logs = {path.name: path.read_text(errors="replace").splitlines() for path in sorted(self.folder.glob("*.log"))}
        return "\n".join("\n".join([f"--- {name}", *lines[-num_lines:]]) for name, lines in logs.items())

    def environment(self, home: str) -> dict[str, str]:
        """Return the environment of a process whose FLWR_HOME is `home` in the folder."""
        env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        cache = self.folder / home / "cache"  # each process is a machine of its own, but of one and the same CPU
        cache.mkdir(parents=True, exist_ok=True)
        on_cpu()
        shutil.copy(verdict_file(), cache)
        env |= {
            "FLWR_HOME": str(self.folder / home),
            "FEDTALORA_CACHE": str(cache),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "HF_HUB_OFFLINE": "1",
            "PATH": os.pathsep.join(
                [sysconfig.get_path("scripts"), os.environ["PATH"]]
            ),  # Flower starts Flower by name
            "PYTHONUNBUFFERED": "1",  # the logs are files: without it they lag behind
        }
        return env | self.extra_env

    def _await(self, condition: Callable[[], bool], seconds: float, what: str, *, needs: Part | None = None) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if needs is not None and not needs.alive and not condition():
                raise DeploymentError(f"{needs.name} ended before {what}\n{self.tails()}")
            if time.monotonic() > deadline:
                raise DeploymentError(f"waited {seconds:.0f} s in vain for {what}\n{self.tails()}")
            time.sleep(0.1)

    def _part(self, name: str, command: list[str], *, home: str = "") -> Part:
        return Part(command, env=self.environment(home or name), log_path=self.folder / f"{name}.log")

    def _port(self) -> int:
        port, claim = claim_port()
        self._claims.enter_context(claim)
        return port

    def _command(self, name: str, program: str, *words: str) -> list[str]:
        return [*self.prefix(name), str(Path(sysconfig.get_path("scripts"), program)), *words]

    def _superlink_command(self) -> list[str]:
        words = ["--fleet-api-address", f"{self.host}:{self.fleet_port}", "--database", str(self.folder / "state.db")]
        words += ["--host", "127.0.0.1", "--port", str(self.control_port), "--disable-runtime-dependency-installation"]
        if self.secure:
            words += ["--enable-supernode-auth", "--ssl-ca-certfile", str(self.keys / "ca.crt")]
            words += ["--ssl-certfile", str(self.keys / "server.pem"), "--ssl-keyfile", str(self.keys / "server.key")]
        else:
            words += ["--insecure"]
        return self._command("superlink", "flower-superlink", *words)

    def _node_command(self, partition_id: int) -> list[str]:
        name = f"node{partition_id}"
        config = f"partition-id={partition_id} num-partitions={self.num_nodes} {self.node_config}".strip()
        words = ["--superlink", f"{self.host}:{self.fleet_port}", "--node-config", config]
        words += ["--port", str(self.node_ports[partition_id])]
        if self.secure:
            words += ["--root-certificates", str(self.keys / "ca.crt")]
            words += ["--auth-supernode-private-key", str(self.keys / name)]
        else:
            words += ["--insecure"]
        return self._command(name, "flower-supernode", *words)

    def _write_connection(self) -> None:
        """Write down how Flower's command reaches the SuperLink."""
        trust = {"root-certificates": str(self.keys / "ca.crt")} if self.secure else {"insecure": True}
        connection = {"address": f"127.0.0.1:{self.control_port}", **trust}
        home = self.folder / "flwr"
        home.mkdir()
        (home / "config.toml").write_text(tomli_w.dumps({"superlink": {"default": CONNECTION, CONNECTION: connection}}))

    def _register(self, node: Part) -> None:
        """Make a node's key and make it known to the SuperLink."""
        key = self.keys / node.name
        _tool("ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-C", node.name, "-f", str(key))
        said = self.flwr("supernode", "register", f"{key}.pub", CONNECTION, "--name", node.name, "--format", "json")
        if '"success": true' not in said:
            raise DeploymentError(f"{node.name} was not registered: {said}\n{self.tails()}")


def _make_certificates(folder: Path, host: str) -> None:
    """Make a CA and a certificate of the SuperLink, valid for `host` and on its own machine."""
    folder.mkdir(mode=0o700)
    names = ",".join(sorted({f"IP:{host}", "IP:127.0.0.1", "DNS:localhost"}))
    (folder / "ext").write_text(f"subjectAltName={names}\nextendedKeyUsage=serverAuth\nbasicConstraints=CA:FALSE\n")
    for line in (
        "ecparam -name prime256v1 -genkey -noout -out ca.key",
        "req -x509 -new -key ca.key -sha256 -days 2 -subj /CN=ca -out ca.crt"
        " -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign",
        "ecparam -name prime256v1 -genkey -noout -out server.key",
        "req -new -key server.key -subj /CN=superlink -out server.csr",
        "x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out server.pem",
    ):
        _tool("openssl", *line.split(), cwd=folder)


def _tool(*command: str, cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise DeploymentError(f"{' '.join(command)} failed: {done.stdout}")


def _processes_of(home: Path) -> dict[int, str]:
    """Find the live processes whose FLWR_HOME is `home` or in it; an ended one has no environment."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended while we looked, or is another user's
                variables = dict(line.partition("=")[::2] for line in _words(entry / "environ"))
                if "FLWR_HOME" in variables and Path(variables["FLWR_HOME"]).is_relative_to(home):
                    found[int(entry.name)] = " ".join(_words(entry / "cmdline"))
    return found


def _words(path: Path) -> list[str]:
    return path.read_text(errors="replace").rstrip("\0").split("\0")


def _kill_all(processes: Callable[[], Mapping[int, str]]) -> None:
    """Kill until none is left: one of them may have started another meanwhile."""
    deadline = time.monotonic() + STOP_SECONDS
    while left := processes():
        if time.monotonic() > deadline:
            raise DeploymentError(f"cannot be killed: {left}")
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
