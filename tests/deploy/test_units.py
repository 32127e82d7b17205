"""The systemd units: they start our commands, never give up, and are what systemd takes."""

import shlex
import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedtalora_flwr.cli.app import cli

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
FILLED = {"%i": "site0", "${SUPERLINK}": "superlink.lab:9092", "${PARTITION_ID}": "2", "${DEVICE}": "cuda:1"}
FILLED |= {"${PORT}": "9095", "${FLEET}": "10.0.0.5:9092", "${DATA_PATH}": "/mnt/scans"}


class _Sections(ConfigParser):
    optionxform = staticmethod(str)  # type: ignore[assignment]


def unit(name: str) -> ConfigParser:
    found = _Sections(interpolation=None, strict=False)
    found.read(UNITS / name)
    return found


def command_of(name: str) -> list[str]:
    """Give Flower's command line that the unit comes down to."""
    line = unit(name)["Service"]["ExecStart"]
    for variable, value in FILLED.items():
        line = line.replace(variable, value)
    program, *words = shlex.split(line)
    assert program.endswith("/bin/fedtalora") and "$" not in line
    shown = CliRunner().invoke(cli, [*words, "--print", "--dir", "/var/lib/fedtalora"])
    assert shown.exit_code == 0, shown.output
    return shlex.split(shown.stdout)


def test_the_server_s_unit_starts_a_superlink_with_tls_and_node_keys():
    command = command_of("fedtalora-superlink.service")
    assert command[:3] == ["flower-superlink", "--fleet-api-address", "10.0.0.5:9092"]
    assert "--enable-supernode-auth" in command and "--insecure" not in command


def test_a_node_s_unit_starts_the_node_of_its_name():
    command = command_of("fedtalora-supernode@.service")
    assert command[:3] == ["flower-supernode", "--superlink", "superlink.lab:9092"]
    assert command[-1] == "/var/lib/fedtalora/site0.key" and "--insecure" not in command
    assert (
        'partition-id=2 name="site0" warm=true data-path="/mnt/scans"' in command
        and command[command.index("--port") + 1] == "9095"
    )


@pytest.mark.parametrize("name", ["fedtalora-superlink.service", "fedtalora-supernode@.service"])
def test_a_unit_starts_again_whatever_the_exit_status_and_never_gives_up(name):
    found = unit(name)
    assert found["Service"]["Restart"] == "always" and float(found["Service"]["RestartSec"]) >= 5
    assert found["Unit"]["StartLimitIntervalSec"] == "0" and "time-sync.target" in found["Unit"]["After"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_the_units(tmp_path):
    for path in UNITS.glob("*.service"):
        name = path.name.replace("@", "@site0")
        text = path.read_text().replace("/opt/fedtalora/bin/fedtalora", "/bin/true")
        (tmp_path / name).write_text(text)
        done = subprocess.run(["systemd-analyze", "verify", tmp_path / name], capture_output=True, text=True)
        assert done.returncode == 0 and name not in done.stderr, done.stderr
