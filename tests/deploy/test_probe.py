"""What a node says of a server that it cannot use, before Flower would retry in silence."""

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtalora_flwr.deploy.certs import make_certificates
from fedtalora_flwr.deploy.folder import DeployError, FederationFolder
from fedtalora_flwr.deploy.probe import check_superlink, explain_end, split_address


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> FederationFolder:
    folder = FederationFolder(tmp_path_factory.mktemp("server"))
    make_certificates(folder, ["superlink.lab"])
    return folder


@contextlib.contextmanager
def listening(context: ssl.SSLContext | None, *, host: str = "127.0.0.1") -> Iterator[int]:
    """Answer calls with TLS as the context has it, without TLS for None; gives the port."""
    with socket.create_server((host, 0)) as listener:

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    with listener.accept()[0] as plain, contextlib.suppress(OSError):
                        if context is None:
                            plain.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                        else:
                            context.wrap_socket(plain, server_side=True).close()

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def tls(folder: FederationFolder, *protocols: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder.server_certificate, folder.server_key)
    context.set_alpn_protocols(list(protocols))
    return context


def node_of(server: FederationFolder, root: Path) -> FederationFolder:
    folder = FederationFolder(root)
    folder.make()
    folder.ca_certificate.write_bytes(server.ca_certificate.read_bytes())
    return folder


def test_a_server_with_its_own_certificate_passes_by_name_and_by_address(server, tmp_path):
    with listening(tls(server, "h2")) as port:
        check_superlink(f"127.0.0.1:{port}", node_of(server, tmp_path))
        check_superlink(f"localhost:{port}", node_of(server, tmp_path))


def test_a_certificate_for_another_name_is_refused_with_the_command_that_adds_it(server, tmp_path):
    told = r"not for 127\.0\.0\.2; on the server: fedtalora certs 127\.0\.0\.2"
    with listening(tls(server, "h2"), host="127.0.0.2") as port, pytest.raises(DeployError, match=told):
        check_superlink(f"127.0.0.2:{port}", node_of(server, tmp_path))


def test_another_authoritys_server_is_refused(server, tmp_path):
    other = FederationFolder(tmp_path / "other")
    make_certificates(other, ["superlink.lab"])
    with listening(tls(other, "h2")) as port, pytest.raises(DeployError, match="a certificate of another authority"):
        check_superlink(f"127.0.0.1:{port}", node_of(server, tmp_path))


def test_a_node_without_the_authoritys_certificate_calls_nobody(tmp_path):
    with pytest.raises(DeployError, match=r"ca\.crt is missing: copy the server's"):
        check_superlink("127.0.0.1:9", FederationFolder(tmp_path))
    (tmp_path / "ca.crt").write_text("garbage")
    with pytest.raises(DeployError, match="is not a certificate in PEM"):
        check_superlink("127.0.0.1:9", FederationFolder(tmp_path))


def test_a_server_without_tls_a_wrong_port_and_nobody_at_all_are_told_apart(server, tmp_path):
    node = node_of(server, tmp_path)
    with listening(None) as port, pytest.raises(DeployError, match="answers without TLS"):
        check_superlink(f"127.0.0.1:{port}", node)
    with listening(tls(server, "http/1.1")) as port, pytest.raises(DeployError, match="another TLS port"):
        check_superlink(f"127.0.0.1:{port}", node)
    with pytest.raises(DeployError, match=r"cannot be reached .*is fedtalora superlink running there"):
        check_superlink(f"127.0.0.1:{port}", node)
    with pytest.raises(DeployError, match=r"the name no-such-host\.invalid is not known here"):
        check_superlink("no-such-host.invalid:9092", node)


def test_an_end_without_a_reason_points_at_the_clock():
    assert "clock" in explain_end("site0", "INFO: Starting Flower SuperNode\n")
    assert "does not accept this node's key" in explain_end("site0", "[code: 2004] Failed to activate SuperNode")


@pytest.mark.parametrize("address", ["superlink.lab", "superlink.lab:", ":9092", "superlink.lab:port"])
def test_an_address_without_host_or_port_is_refused(address):
    with pytest.raises(DeployError, match="an address is host:port"):
        split_address(address)
