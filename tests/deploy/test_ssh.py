"""`fedtalora lab` over ssh: an sshd of the test's own on loopback, with its own host key and user key.

``gpu0.lab`` and ``gpu1.lab`` are names of this machine in the test's own ssh configuration, ``away.lab`` of none.
"""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from fedtalora_flwr.deploy.folder import FederationFolder
from fedtalora_flwr.deploy.processes import pid_of
from fedtalora_flwr.launch.supervisor import claim_port

ROOT = Path(__file__).parents[2]
SSHD = shutil.which("sshd", path=os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"]))
SECONDS = 400  # of patience on a loaded machine

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(900),
    pytest.mark.skipif(SSHD is None, reason="no sshd here (the package openssh-server has it)"),
    pytest.mark.skipif(shutil.which("ssh") is None, reason="no ssh here (the package openssh-client has it)"),
]

SERVER_CONFIG = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
SetEnv PYTHONPATH={root} HF_HUB_OFFLINE=1
"""

CLIENT_CONFIG = """
Host gpu0.lab gpu1.lab
  Port {port}
Host away.lab
  Port 1
Host *
  HostName 127.0.0.1
  User {user}
  IdentityFile {folder}/user_key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking yes
"""


@pytest.fixture(scope="module")
def ports() -> Iterator[list[int]]:
    with contextlib.ExitStack() as claims:
        found = []
        for _ in range(5):
            port, claim = claim_port()
            claims.enter_context(claim)
            found.append(port)
        yield found


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory, ports: list[int]) -> Iterator[Path]:
    """Start sshd, and give a folder with an ``ssh`` that calls it by the names above."""
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    values = {"port": ports[0], "folder": folder, "root": ROOT, "user": getpass.getuser()}
    (folder / "sshd_config").write_text(SERVER_CONFIG.format(**values))
    (folder / "ssh_config").write_text(CLIENT_CONFIG.format(**values))
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{ports[0]} {(folder / 'host_key.pub').read_text()}")
    client = folder / "bin" / "ssh"
    client.parent.mkdir()
    client.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    client.chmod(0o755)
    words = [str(SSHD), "-f", str(folder / "sshd_config")]
    checked = subprocess.run([*words, "-t"], capture_output=True, text=True)
    if checked.returncode:
        pytest.skip(f"sshd does not start here: {checked.stderr.strip()}")
    with (folder / "sshd.log").open("wb") as log:
        daemon = subprocess.Popen([*words, "-D", "-e"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 30
        while not answers(ports[0]):
            assert daemon.poll() is None and time.monotonic() < deadline, (folder / "sshd.log").read_text()
            time.sleep(0.1)
        yield client.parent
    finally:
        daemon.terminate()
        daemon.wait()


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, ssh: Path, ports: list[int]) -> Iterator[Path]:
    """Write the file of a lab on two machines, in a folder with a blank in its name; not up yet."""
    folder = tmp_path_factory.mktemp("lab") / "my lab"
    (folder / "data").mkdir(parents=True)
    server = {"host": "gpu0.lab", "address": f"127.0.0.1:{ports[1]}", "control-port": ports[2]}
    server |= {"data": f"{folder}/data"}
    nodes = [
        {"name": f"site{k}", "host": f"gpu{k}.lab", "port": ports[3 + k], "device": "cpu", "data": f"{folder}/data"}
        for k in range(2)
    ]
    program = str(Path(sysconfig.get_path("scripts"), "fedtalora"))
    found = {"folder": str(folder), "program": program, "server": server, "nodes": nodes}
    file = folder / "lab.yaml"
    file.write_text(yaml.safe_dump(found))
    try:
        yield file
    finally:
        fedtalora(ssh, "down", file)
        assert naming(folder) == []


def fedtalora(ssh: Path, command: str, file: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """Give a command of the lab, on a machine whose ``ssh`` is the test's."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": os.pathsep.join([str(ssh), os.environ["PATH"]])}
    called = [sys.executable, "-m", "fedtalora_flwr.cli.app", "lab", command, str(file), *words]
    return subprocess.run(called, capture_output=True, text=True, env=env, timeout=SECONDS)


def naming(folder: Path) -> list[str]:
    """Find the processes whose command names the folder."""
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return [command for command in commands if str(folder) in command]


def shown(status: "subprocess.CompletedProcess[str]") -> list[tuple[str, ...]]:
    """Give name, machine, state of the process, and what the server says of each line of a status."""
    lines = [line.split() for line in status.stdout.splitlines()]
    return [(words[0], words[1], words[2], words[-1]) for words in lines]


def test_a_lab_comes_up_is_looked_at_and_goes_down_over_ssh(ssh: Path, lab: Path) -> None:
    up = fedtalora(ssh, "up", lab)
    assert up.returncode == 0, up.stdout + up.stderr
    pids = {name: pid_of(FederationFolder(lab.parent / name), name) for name in ("superlink", "site0", "site1")}
    assert all(f"as process {pid}" in up.stdout for pid in pids.values()), up.stdout
    assert not any("sshd" in parent.name() for parent in psutil.Process(pids["site0"]).parents())
    data = {name: psutil.Process(pids[name]).environ()["FEDTALORA_DATA"] for name in ("superlink", "site1")}
    assert data == dict.fromkeys(data, f"{lab.parent}/data")
    status = fedtalora(ssh, "status", lab)
    assert status.returncode == 0, status.stdout + status.stderr
    assert shown(status)[1:] == [("site0", "gpu0.lab", "running", "online"), ("site1", "gpu1.lab", "running", "online")]
    again = fedtalora(ssh, "up", lab)
    assert again.returncode == 0 and again.stdout.count("runs already") == 3, again.stdout + again.stderr
    assert "SuperNode ID:" in fedtalora(ssh, "logs", lab, "site1").stdout
    assert "Fleet API" in fedtalora(ssh, "logs", lab, "superlink", "--lines", "200").stdout
    down = fedtalora(ssh, "down", lab)
    assert down.returncode == 0 and down.stdout.count("stopped") == 3, down.stdout + down.stderr
    assert naming(lab.parent) == []
    status = fedtalora(ssh, "status", lab)
    assert status.returncode == 1 and [words[2] for words in shown(status)] == ["stopped"] * 3
    assert fedtalora(ssh, "down", lab).stdout.count("was not running") == 3


def test_a_machine_that_cannot_be_reached_is_named_and_the_others_come_up(ssh: Path, lab: Path) -> None:
    found = yaml.safe_load(lab.read_text())
    found["nodes"] = [found["nodes"][0], found["nodes"][1] | {"host": "away.lab"}]
    broken = lab.with_name("broken.yaml")
    broken.write_text(yaml.safe_dump(found))
    up = fedtalora(ssh, "up", broken)
    assert up.returncode == 2 and "site0 is online" in up.stdout, up.stdout + up.stderr
    assert (
        "away.lab cannot be reached: " in up.stderr
        and "`ssh away.lab true` must work without a password or" in up.stderr
    )
    status = fedtalora(ssh, "status", broken)
    assert status.returncode == 1 and "away.lab cannot be reached" in status.stdout
    assert shown(status)[1] == ("site0", "gpu0.lab", "running", "online")
    down = fedtalora(ssh, "down", broken)
    assert down.returncode == 2 and "superlink stopped" in down.stdout and "away.lab cannot be reached" in down.stderr


def test_a_machine_without_the_command_is_told_where_it_was_looked_for(ssh: Path, lab: Path) -> None:
    elsewhere = lab.with_name("elsewhere.yaml")
    elsewhere.write_text(yaml.safe_dump(yaml.safe_load(lab.read_text()) | {"program": "/no/such/fedtalora"}))
    up = fedtalora(ssh, "up", elsewhere)
    assert up.returncode == 2 and "gpu0.lab has no /no/such/fedtalora" in up.stderr and "step 1" in up.stderr
