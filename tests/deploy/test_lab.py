"""What a lab's file may say, and the command lines that it leads to."""

from pathlib import Path

import pytest
import yaml

from fedtalora_flwr.deploy.folder import DeployError
from fedtalora_flwr.deploy.lab import Lab, read_lab

ROOT = Path(__file__).parents[2]
SERVER = {"host": "local", "address": "superlink.lab:9092"}
NODES = [{"name": "site0", "host": "gpu0"}, {"name": "site1", "host": "gpu0"}, {"name": "site2", "host": "gpu1"}]


def lab(tmp_path: Path, **changes: object) -> Lab:
    file = tmp_path / "lab.yaml"
    file.write_text(yaml.safe_dump({"folder": "/srv/fl", "server": SERVER, "nodes": NODES} | changes))
    return read_lab(file)


def test_the_example_is_a_lab_of_two_machines():
    found = read_lab(ROOT / "deploy" / "lab.yaml")
    assert (found.host, found.address, found.listen) == ("superlink.lab", "superlink.lab:9092", "0.0.0.0:9092")
    assert [(node.host, node.device, node.port) for node in found.nodes] == [
        ("gpu0.lab", "cuda:0", 9094),
        ("gpu0.lab", "cuda:1", 9095),
        ("me@gpu1.lab", "", 9094),
    ]
    assert found.data == "/data/fedtalora" and not found.insecure


def test_nodes_of_one_machine_get_ports_of_their_own_and_partitions_follow_the_list(tmp_path):
    found = lab(tmp_path)
    assert [(node.partition_id, node.port) for node in found.nodes] == [(0, 9094), (1, 9095), (2, 9094)]


def test_a_lab_that_is_called_on_loopback_listens_there_alone(tmp_path):
    assert lab(tmp_path, server={"host": "local", "address": "127.0.0.1:9092"}).listen == "127.0.0.1:9092"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folder": "fl"}, "folder must be an absolute path"),
        ({"color": "red"}, "the lab has unknown keys color"),
        ({"server": {"host": "local"}}, "server lacks address"),
        ({"server": {"host": "local", "address": "superlink.lab"}}, "an address is host:port"),
        ({"nodes": []}, "nodes must be a list with at least one node"),
        ({"nodes": ["site0"]}, "node 0 must be keys with values, got 'site0'"),
        ({"nodes": [{"name": "site0"}]}, "node 0 lacks host"),
        ({"nodes": [NODES[0], NODES[0]]}, "two nodes have the same name: site0"),
        ({"nodes": [NODES[0] | {"partition-id": 1}, NODES[1]]}, "two nodes have the same partition-id: 1"),
        ({"nodes": [NODES[0] | {"port": 9095}, NODES[1]]}, "two nodes have the same port of one machine"),
        ({"nodes": [NODES[0] | {"name": "superlink"}]}, "superlink is the server's name"),
        ({"nodes": [NODES[0] | {"port": "high"}]}, "port must be a whole number from 0, got 'high'"),
        ({"nodes": [NODES[0] | {"name": "../x"}]}, "a node's name is up to 32"),
        ({"insecure": "yes"}, "insecure must be true or false, got 'yes'"),
    ],
)
def test_a_file_that_makes_no_lab_is_refused_with_its_name(tmp_path, changes, message):
    with pytest.raises(DeployError, match=r"lab\.yaml: ") as refusal:
        lab(tmp_path, **changes)
    assert message in str(refusal.value)


def test_a_file_that_is_not_there_and_one_that_is_no_yaml_are_refused(tmp_path):
    with pytest.raises(DeployError, match=r"no such file; deploy/lab\.yaml is one to start from"):
        read_lab(tmp_path / "lab.yaml")
    (tmp_path / "lab.yaml").write_text("a: [")
    with pytest.raises(DeployError, match=r"lab\.yaml: "):
        read_lab(tmp_path / "lab.yaml")
