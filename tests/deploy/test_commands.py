"""The command lines are safe by default, and Flower's own parsers take them."""

from pathlib import Path

import pytest
from click.testing import Result
from flwr.common.config import parse_config_args
from flwr.supercore.cli.flower_superexec import _parse_args as superexec_parser
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink as superlink_parser
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode as supernode_parser
from typer.testing import CliRunner

from fedtalora_flwr.cli.app import cli
from fedtalora_flwr.deploy.commands import environment, superexec_command, superlink_command, supernode_command
from fedtalora_flwr.deploy.folder import DeployError, FederationFolder
from fedtalora_flwr.deploy.processes import note_line, other_line

FOLDER = FederationFolder(Path("/srv/fl"))
NODE = {"superlink": "superlink.lab:9092", "partition_id": 3}


def test_the_superlink_speaks_tls_knows_its_nodes_and_opens_the_fleet_port_alone():
    parsed = superlink_parser().parse_args(superlink_command(FOLDER)[1:])
    assert parsed.enable_supernode_auth and not parsed.insecure
    assert parsed.ssl_keyfile == "/srv/fl/server.key" and parsed.ssl_certfile == "/srv/fl/server.crt"
    assert (parsed.fleet_api_address, parsed.host, parsed.port) == ("0.0.0.0:9092", "127.0.0.1", 8000)
    assert parsed.database == "/srv/fl/state.db" and parsed.isolation == "subprocess"
    assert not parsed.runtime_dependency_install


def test_a_superexec_of_its_own_shares_the_secret_with_the_superlink():
    superlink = superlink_parser().parse_args(superlink_command(FOLDER, separate_superexec=True)[1:])
    superexec = superexec_parser().parse_args(superexec_command(FOLDER)[1:])
    assert superlink.isolation == "process"
    assert superlink.superexec_auth_secret_file == superexec.superexec_auth_secret_file == "/srv/fl/superexec.secret"
    assert superexec.runtime_api_address == "127.0.0.1:8000" and not superexec.insecure


def test_a_node_checks_the_server_shows_its_key_and_tells_its_partition():
    parsed = supernode_parser().parse_args(supernode_command("site0", FOLDER, **NODE)[1:])
    assert parsed.root_certificates == "/srv/fl/ca.crt" and not parsed.insecure
    assert parsed.auth_supernode_private_key == "/srv/fl/site0.key"
    assert (parsed.superlink, parsed.host, parsed.port) == ("superlink.lab:9092", "127.0.0.1", 9094)
    assert parse_config_args([parsed.node_config]) == {"partition-id": 3, "name": "site0", "warm": True}


def test_a_cold_node_says_so_in_its_config():
    parsed = supernode_parser().parse_args(supernode_command("site0", FOLDER, **NODE, warm=False)[1:])
    assert parse_config_args([parsed.node_config])["warm"] is False


def test_a_node_s_own_folder_goes_into_its_node_config():
    command = supernode_command("site0", FOLDER, **NODE, data_path="/mnt/my scans")
    config = supernode_parser().parse_args(command[1:]).node_config
    assert parse_config_args([config]) == {
        "partition-id": 3,
        "name": "site0",
        "warm": True,
        "data-path": "/mnt/my scans",
    }
    with pytest.raises(DeployError, match="holds a quote or backslash"):
        supernode_command("site0", FOLDER, **NODE, data_path='/mnt/"scans"')


def test_insecure_turns_off_certificates_and_keys_together():
    superlink = superlink_parser().parse_args(superlink_command(FOLDER, insecure=True)[1:])
    supernode = supernode_parser().parse_args(supernode_command("site0", FOLDER, **NODE, insecure=True)[1:])
    assert superlink.insecure and not superlink.enable_supernode_auth and superlink.ssl_keyfile is None
    assert supernode.insecure and supernode.auth_supernode_private_key is None
    assert superlink.host == supernode.host == "127.0.0.1"


@pytest.mark.parametrize(
    ("device", "visible"), [("", "7"), ("cuda", "7"), ("cpu", ""), ("cuda:1", "1"), ("cuda:0,3", "0,3")]
)
def test_a_node_sees_the_devices_that_it_was_given(monkeypatch, device, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert environment(FOLDER, device=device)["CUDA_VISIBLE_DEVICES"] == visible


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:0", "0"])
def test_an_unknown_device_is_refused(device):
    with pytest.raises(DeployError, match="device is cpu, cuda, cuda:1 or cuda:0,1"):
        environment(FOLDER, device=device)


def test_no_proxy_comes_between_a_node_and_its_server(monkeypatch):
    monkeypatch.setenv("no_proxy", "intranet")
    env = environment(FOLDER, superlink="superlink.lab:9092", data="/data")
    assert env["no_proxy"] == env["NO_PROXY"] == "intranet,127.0.0.1,localhost,superlink.lab"
    assert env["FLWR_HOME"] == "/srv/fl/flwr" and env["FEDTALORA_DATA"] == "/data"


def asked(*words: str) -> Result:
    return CliRunner().invoke(cli, [*words])


NODE_WORDS = ("supernode", "site0", "--superlink", "localhost:9092", "--partition-id", "0", "--insecure")


@pytest.mark.parametrize("option", ["--data", "--data-path"])
def test_a_folder_that_is_not_there_or_is_a_file_is_refused_before_a_node_starts(tmp_path, option):
    (tmp_path / "a.csv").touch()
    found = asked(*NODE_WORDS, "--dir", str(tmp_path / "fl"), option, str(tmp_path / "nowhere"))
    assert isinstance(found.exception, DeployError)
    assert str(found.exception).startswith(f"{option} {tmp_path}/nowhere: there is no folder {tmp_path}/nowhere here;")
    found = asked(*NODE_WORDS, "--dir", str(tmp_path / "fl"), option, str(tmp_path / "a.csv"))
    assert f"{option} {tmp_path}/a.csv is a file; give the folder" in str(found.exception)
    assert not (tmp_path / "fl").exists()


def test_a_server_s_data_that_are_not_there_are_refused_before_it_starts(tmp_path):
    found = asked("superlink", "--insecure", "--dir", str(tmp_path / "fl"), "--data", str(tmp_path / "nowhere"))
    assert isinstance(found.exception, DeployError) and "--data" in str(found.exception)


def test_a_command_line_is_told_by_what_differs_from_the_one_before(tmp_path):
    folder = FederationFolder(tmp_path)
    line = supernode_command("site0", folder, **NODE, insecure=True)
    assert other_line(folder, "site0", line) == ""  # nobody knows
    note_line(folder, "site0", line)
    assert other_line(folder, "site0", line) == ""
    another = supernode_command("site0", folder, **NODE, data_path="/mnt/scans", insecure=True)
    was, _, now = other_line(folder, "site0", another).partition(" is now ")
    assert "partition-id=3" in was and "scans" not in was and 'data-path="/mnt/scans"' in now
    assert other_line(folder, "site0", [*line, "--verbose"]) == "nothing is now --verbose"
