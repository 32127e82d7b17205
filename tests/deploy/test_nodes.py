"""Node keys and the authority's certificate on a node, before any server is called."""

import socket
import stat

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from flwr.cli.supernode.register import try_load_public_key

from fedtalora_flwr.deploy import nodes
from fedtalora_flwr.deploy.certs import make_certificates
from fedtalora_flwr.deploy.commands import write_connection
from fedtalora_flwr.deploy.folder import DeployError, FederationFolder
from fedtalora_flwr.deploy.nodes import list_nodes, make_node_key, register, trust


@pytest.fixture
def folder(tmp_path):
    return FederationFolder(tmp_path / "federation")


def test_a_key_pair_is_of_the_kind_that_flower_takes_and_is_made_once(folder):
    assert make_node_key(folder, "site0")
    private = folder.node_key("site0")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    key = serialization.load_ssh_private_key(private.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name == "secp384r1"
    assert try_load_public_key(folder.node_public_key("site0"))
    before = private.read_bytes()
    folder.node_public_key("site0").unlink()
    assert not make_node_key(folder, "site0")
    assert private.read_bytes() == before and folder.node_public_key("site0").read_text().endswith(" site0\n")


def test_no_new_key_takes_the_place_of_one_that_is_on_another_machine(folder):
    make_node_key(folder, "site0")
    folder.node_key("site0").unlink()
    with pytest.raises(DeployError, match="the key of site0 is on another machine"):
        make_node_key(folder, "site0")


def test_an_empty_public_key_is_the_shell_s_that_is_about_to_write_it(folder):
    folder.make()
    folder.node_public_key("site0").touch()  # fedtalora node key site0 > site0.pub, given in that folder
    assert make_node_key(folder, "site0")


@pytest.mark.parametrize("made", ["rsa", "nonsense"])
def test_a_key_that_flower_does_not_take_is_refused_with_the_way_to_another(folder, made):
    folder.make()
    encoding = (serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    content = rsa.generate_private_key(65537, 2048).private_bytes(*encoding) if made == "rsa" else b"nonsense"
    folder.node_key("site0").write_bytes(content)
    with pytest.raises(DeployError, match=r"(of an elliptic curve|cannot be read).*fedtalora node key site0 --new"):
        make_node_key(folder, "site0")


def test_a_node_does_not_change_its_authority_silently(folder, tmp_path):
    servers = [FederationFolder(tmp_path / name) for name in ("one", "two")]
    for server in servers:
        make_certificates(server, ["superlink.lab"])
    trust(folder, servers[0].ca_certificate.read_bytes())
    trust(folder, servers[0].ca_certificate.read_bytes())
    with pytest.raises(DeployError, match="is of another authority"):
        trust(folder, servers[1].ca_certificate.read_bytes())
    with pytest.raises(DeployError, match="not a certificate in PEM"):
        trust(folder, servers[0].ca_key.read_bytes())


@pytest.mark.parametrize("name", ["", "../site0", "site 0", "-site", "site0.pub", "s" * 33])
def test_names_that_are_no_file_names_are_refused(folder, name):
    with pytest.raises(DeployError, match="a node's name is up to 32 letters"):
        make_node_key(folder, name)


def test_one_key_has_one_name_and_one_name_one_key(folder, tmp_path):
    node = FederationFolder(tmp_path / "node")
    for name in ("site0", "site1"):
        make_node_key(node, name)
    keys = {name: node.node_public_key(name).read_bytes() for name in ("site0", "site1")}
    folder.make()
    folder.node_public_key("site0").write_bytes(keys["site0"])
    with pytest.raises(DeployError, match=r"site0 has another key here; .*fedtalora node replace"):
        register(folder, "site0", keys["site1"])
    with pytest.raises(DeployError, match="that is the key of site0; every node has a key of its own"):
        register(folder, "site1", keys["site0"])
    with pytest.raises(DeployError, match="a node's public key is one line"):
        register(folder, "site1", b"ssh-rsa AAAA me\n")
    with pytest.raises(DeployError, match="no public key of site1"):
        register(folder, "site1")


def test_a_folder_that_cannot_be_made_is_told_with_the_command_that_makes_it(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DeployError, match=r"cannot be made \(Not a directory\).*sudo install --directory"):
        make_node_key(FederationFolder(tmp_path / "file" / "federation"), "site0")


def test_nodes_of_a_folder_without_a_server_are_not_listed_and_the_way_out_is_told(folder):
    with pytest.raises(DeployError, match=r"no server was ever started from .*FEDTALORA_DIR"):
        list_nodes(folder)


def test_a_server_that_accepts_a_call_and_never_answers_is_an_error_that_says_so(folder, monkeypatch):
    make_node_key(folder, "site0")
    monkeypatch.setattr(nodes, "_CALL_SECONDS", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        write_connection(folder, control_port=server.getsockname()[1], insecure=True)
        with pytest.raises(DeployError, match=r"did not register site0: no answer within 3 s; see .*superlink.log"):
            register(folder, "site0")
