"""The compose file and the image: valid, secure, made of our own commands, and a federation that runs."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import network
import pytest
import yaml
from containers import Containers, Image
from local_grid import defaults, run_server
from typer.testing import CliRunner

from fedtalora_flwr.cli.app import cli

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PARTS = ("superlink", "superexec", "node0", "node1", "node2")
DOCKERFILE = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")


def command_of(service: str) -> list[str]:
    """Give Flower's command line that a service comes down to, in its container."""
    shown = CliRunner().invoke(cli, [*SERVICES[service]["command"], "--print", "--dir", "/federation"])
    assert shown.exit_code == 0, shown.output
    return shlex.split(shown.stdout)


def shell_lines(service: str) -> list[list[str]]:
    """Give the commands of ours that a service's script runs, for the node ``node0``."""
    (script,) = SERVICES[service]["command"]
    lines = [line.strip() for line in script.splitlines() if line.strip().startswith("fedtalora ")]
    return [shlex.split(line.replace("$$name", "node0").partition(" > ")[0])[1:] for line in lines]


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_the_file_follows_the_compose_specification(name):
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_part_is_there_and_starts_flower_with_tls_and_keys():
    programs = {part: command_of(part)[0] for part in PARTS}
    assert programs == {
        "superlink": "flower-superlink",
        "superexec": "flower-superexec",
        **dict.fromkeys(("node0", "node1", "node2"), "flower-supernode"),
    }
    assert not any("--insecure" in command_of(part) for part in PARTS)
    assert "--enable-supernode-auth" in command_of("superlink")


def test_nodes_differ_in_name_partition_key_and_volume():
    for k in range(3):
        command, service = command_of(f"node{k}"), SERVICES[f"node{k}"]
        assert f'partition-id={k} name="node{k}" warm=true' in command and f"/federation/node{k}.key" in command
        assert service["volumes"][0] == f"node{k}:/federation"
        assert not any(volume.startswith("server:") for volume in service["volumes"])


def test_superlink_is_called_by_the_name_in_its_certificate():
    called = {command_of(f"node{k}")[command_of(f"node{k}").index("--superlink") + 1] for k in range(3)}
    assert called == {"superlink:9092"}
    assert SERVICES["authority"]["command"] == ["certs", "superlink"]


def test_no_port_is_published_and_only_the_server_s_own_share_its_loopback():
    assert not any("ports" in service for service in SERVICES.values())
    assert COMPOSE["networks"] == {"fleet": {"internal": True}}
    beside = {name for name, service in SERVICES.items() if service.get("network_mode") == "service:superlink"}
    assert beside == {"superexec", "admission"}


def test_parts_restart_always_have_an_init_no_capability_and_a_health_check():
    for part in PARTS:
        service = SERVICES[part]
        assert service["restart"] == "always" and service["init"] and service["cap_drop"] == ["ALL"]
        assert service["healthcheck"]["test"] == ["CMD", "fedtalora", "health", part]


@pytest.mark.parametrize("service", ["keys", "admission"])
def test_what_runs_once_calls_commands_that_exist_with_arguments_that_they_take(service):
    for words in shell_lines(service):
        helped = CliRunner().invoke(cli, [*words, "--help"])
        assert helped.exit_code == 0, helped.output
    assert SERVICES[service]["restart"] == "no"


def test_volumes_that_are_mounted_are_declared_and_nothing_waits_for_a_service_that_is_not_there():
    for name, service in SERVICES.items():
        named = [volume.partition(":")[0] for volume in service.get("volumes", ()) if volume[0].isalpha()]
        assert set(named) <= COMPOSE["volumes"].keys(), name
        assert set(service.get("depends_on", ())) <= SERVICES.keys(), name


def test_the_gpu_variant_changes_services_that_exist():
    gpu = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())["services"]
    assert {"superexec", "node0", "node1", "node2"} <= gpu.keys() <= SERVICES.keys()


# --- The image ---


def test_the_image_runs_as_a_user_of_its_own_and_starts_our_command():
    lines = [line.split(maxsplit=1) for line in DOCKERFILE.splitlines() if line and line[0].isupper()]
    users = [rest for word, rest in lines if word == "USER"]
    assert users == ["10001"] and "--uid 10001 fedtalora" in DOCKERFILE and lines[-2] == ["ENTRYPOINT", '["fedtalora"]']
    (base,) = [rest for word, rest in lines if word == "FROM"]
    assert ":" in base and not base.endswith(":latest")


def test_the_image_s_recipe_is_without_a_finding():
    linter = shutil.which("hadolint", path=sysconfig.get_path("scripts")) or pytest.skip("no hadolint; install .[dev]")
    done = subprocess.run([linter, DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_the_image_copies_is_in_the_checkout_and_not_ignored():
    admitted = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    for line in re.findall(r"^COPY (.*)", DOCKERFILE, flags=re.MULTILINE):
        for source in line.split()[:-1]:
            assert (DEPLOY.parent / source).exists(), source
            assert source.split("/")[0].rstrip("/") in admitted, source


def test_folders_that_volumes_are_mounted_on_are_made_for_the_image_s_user():
    (made,) = re.findall(r"install --directory --owner=fedtalora --mode=0700 (.*)", DOCKERFILE)
    mounted = {
        volume.split(":")[1]
        for service in SERVICES.values()
        for volume in service.get("volumes", ())
        if volume.partition(":")[0] in COMPOSE["volumes"]
    }
    assert mounted == set(made.split())


# --- The run ---

README = (DEPLOY / "README.md").read_text()
# Two rounds of few examples, instead of the demo's ten.
SHORT = {"stop-after-task": 2, "rounds-per-task": 1, "max-per-class": 64, "node-timeout": 120.0}


def submission() -> list[str]:
    """Give the command that the README hands to ``docker compose exec superexec``, for a short run."""
    (line,) = re.findall(r"^docker compose -f deploy/compose\.yaml exec superexec (.*)", README, flags=re.MULTILINE)
    *words, settings = shlex.split(line)
    assert words[-1] == "--run-config"
    return [*words, " ".join([settings, *(f"{key}={value}" for key, value in SHORT.items())])]


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.skipif(bool(network.missing()), reason=network.missing() or "there is a network")
def test_the_services_come_up_in_their_order_and_play_the_run_of_the_readme(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    variables, image = {"FEDTALORA_DATA": str(tmp_path / "data")}, Image.read((DEPLOY / "Dockerfile").read_text())
    with network.Network() as hosts, Containers(SERVICES, image, tmp_path / "stack", hosts, variables) as stack:
        stack.up(seconds=400)
        said = stack.execute("superexec", *submission(), seconds=400).stdout
        listed = stack.execute("superexec", "flwr", "list", "lab", "--format", "json").stdout
        (run,) = json.loads(listed)["runs"]
        assert run["status"] == "finished:completed", f"{said}\n{stack.tails()}"
        assert "in a process of its own" not in stack.tails(num_lines=1000)
        assert "node1" in stack.execute("superexec", "fedtalora", "node", "list").stdout
        # A node is kept from the server's loopback, and a service without a network from everything.
        knock = "import socket; socket.create_connection(('superlink', {}), 5).close()"
        assert stack.execute("node0", "python", "-c", knock.format(9092)).returncode == 0
        assert stack.execute("node0", "python", "-c", knock.format(8000)).returncode != 0
        assert stack.execute("node0", "id", "-un").stdout.split() == ["fedtalora"]
        assert not list(stack.volume("node0").glob("*.id")) and not list(stack.volume("server").glob("node*.key"))
    assert metrics(stack.volume("out") / "first") == metrics(undisturbed(tmp_path / "local"))


def undisturbed(out: Path) -> Path:
    """Play the same run in this process."""
    run_server(defaults() | {"num-clients": 3} | SHORT | {"out": str(out)})
    return out


def metrics(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return {key: value for key, value in values.items() if key != "wall_seconds"}
