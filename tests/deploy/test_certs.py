"""The authority and the server's certificate: made once, renewed by the same authority, never written over silently."""

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedtalora_flwr.deploy.certs import make_certificates
from fedtalora_flwr.deploy.folder import DeployError, FederationFolder


@pytest.fixture
def folder(tmp_path: Path) -> FederationFolder:
    return FederationFolder(tmp_path / "federation")


def test_names_of_the_server_and_its_own_loopback_stand_in_the_certificate(folder):
    made = make_certificates(folder, ["superlink.lab", "10.0.0.5"], days=90)
    assert made.made == ("authority", "server")
    assert made.names == ("superlink.lab", "10.0.0.5", "localhost", "127.0.0.1")
    assert abs(made.expires - datetime.now(UTC) - timedelta(days=90)) < timedelta(minutes=5)


def test_private_keys_can_be_read_by_their_owner_alone(folder):
    make_certificates(folder, ["superlink.lab"])
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.root.iterdir() if path.is_file()}
    private = {"ca.key", "server.key", "superexec.secret"}
    assert modes == dict.fromkeys(private, 0o600) | dict.fromkeys(("ca.crt", "server.crt"), 0o644)
    assert stat.S_IMODE(folder.root.stat().st_mode) == 0o700


def contents(folder: FederationFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.root.iterdir() if path.is_file()}


def test_a_second_time_changes_nothing_with_or_without_names(folder):
    make_certificates(folder, ["superlink.lab"])
    before = contents(folder)
    assert make_certificates(folder, ["superlink.lab"]).made == ()
    assert make_certificates(folder).made == ()
    assert contents(folder) == before


@pytest.mark.parametrize("cause", ["another name", "soon over", "asked for", "key of another certificate", "key lost"])
def test_the_certificate_is_renewed_by_the_same_authority(folder, cause):
    make_certificates(folder, ["superlink.lab"], days=29 if cause == "soon over" else 397)
    if cause == "key of another certificate":
        other = FederationFolder(folder.root.parent / "other")
        make_certificates(other, ["other.lab"])
        folder.server_key.write_bytes(other.server_key.read_bytes())
    if cause == "key lost":
        folder.server_key.unlink()
    before = contents(folder)
    names = ["superlink.lab", "10.0.0.5"] if cause == "another name" else []
    renewed = make_certificates(folder, names, renew=cause == "asked for")
    assert renewed.made == ("server",) and "superlink.lab" in renewed.names
    changed = {name for name, content in contents(folder).items() if content != before.get(name)}
    assert changed == {"server.crt", "server.key"}


def test_the_authoritys_key_may_be_away_until_it_is_needed(folder):
    make_certificates(folder, ["superlink.lab"])
    key = folder.ca_key.read_bytes()
    folder.ca_key.unlink()
    assert make_certificates(folder).made == ()
    with pytest.raises(DeployError, match=r"ca\.key is needed to sign a certificate; bring it back"):
        make_certificates(folder, renew=True)
    folder.ca_key.write_bytes(key)
    assert make_certificates(folder, renew=True).made == ("server",)


def test_a_lost_authority_is_an_error_and_not_a_new_authority(folder):
    make_certificates(folder, ["superlink.lab"])
    folder.ca_certificate.unlink()
    before = contents(folder)
    with pytest.raises(DeployError, match="copy it back from any node"):
        make_certificates(folder, ["superlink.lab"])
    assert contents(folder) == before


def test_another_authoritys_key_signs_nothing(folder):
    make_certificates(folder, ["superlink.lab"])
    other = FederationFolder(folder.root.parent / "other")
    make_certificates(other, ["superlink.lab"])
    folder.ca_key.write_bytes(other.ca_key.read_bytes())
    with pytest.raises(DeployError, match=r"is not the key of .*ca\.crt"):
        make_certificates(folder, renew=True)


@pytest.mark.parametrize("names", [[], ["superlink.lab:9092"], ["https://superlink.lab"], ["ümlaut.lab"]])
def test_names_that_no_node_can_call_are_refused(folder, names):
    with pytest.raises(DeployError, match=r"name the server as nodes call it|a name of the server is a host name"):
        make_certificates(folder, names)
    assert not folder.server_certificate.exists()
