"""Why a server cannot be used, before Flower tries: its SuperNode would retry for ever, or end, without the reason."""

import http.client
import socket
import ssl
from datetime import UTC, datetime

from fedtalora_flwr.deploy.commands import LOOPBACK
from fedtalora_flwr.deploy.folder import DeployError, FederationFolder

PROBE_SECONDS = 10.0
STOPPED_WORKING = "fedtalora: it has stopped working: "  # what `watched` prints before it ends a program
_CLOCK_IS_OFF = "Invalid timestamp"  # the SuperLink's answer to a signature of another time

# What Flower prints of a refusal -> what it means; the first that is found explains.
_REFUSALS = {
    "[code: 2004]": (
        "the server does not accept this node's key. It does not know it: fedtalora node add NAME on the server. Or "
        "another machine is using it: every node has a key of its own. Or the node was killed less than 60 s ago and "
        "counts as online: wait a minute"
    ),
    "[code: 2001]": "the server takes only nodes with a key: it was started without --insecure, so start the node so",
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate is not of this node's ca.crt; copy the server's ca.crt",
    "already in use": "its port on 127.0.0.1 is taken; give another by --port",
    "StatusCode.INTERNAL": "the server could not answer, as when its machine or disk is far too busy; see its log",
    "Traceback": "see the end of its log",
}
_SILENT = (
    "it ended without a reason, as Flower does when the node's clock is off by more than seconds or the node "
    "was removed: compare `date` on both machines, switch on NTP (timedatectl set-ntp true), and see "
    "fedtalora node list on the server"
)


def check_superlink(superlink: str, folder: FederationFolder) -> None:
    """Call the Fleet API as a node does, as far as TLS goes.

    Parameters
    ----------
    superlink
        Host and port.

    Raises
    ------
    DeployError
        If it cannot be reached, is not trusted, has another name or does not speak gRPC; the message says which.
    """
    host, port = split_address(superlink)
    if not folder.ca_certificate.exists():
        raise DeployError(f"{folder.ca_certificate} is missing: copy the server's ca.crt there")
    try:
        context = ssl.create_default_context(cafile=str(folder.ca_certificate))
    except ssl.SSLError:
        raise DeployError(f"{folder.ca_certificate} is not a certificate in PEM; copy the server's ca.crt") from None
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), PROBE_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=host) as channel,
        ):
            protocol = channel.selected_alpn_protocol()
    except ssl.SSLCertVerificationError as error:
        raise DeployError(_of_certificate(error, superlink, folder)) from None
    except ssl.SSLError:
        raise DeployError(
            f"{superlink} answers without TLS: it is another port (the Fleet API has 9092), or was started --insecure"
        ) from None
    except socket.gaierror as error:
        raise DeployError(
            f"the name {host} is not known here ({error.strerror}); add it to DNS or /etc/hosts"
        ) from None
    except OSError as error:
        raise DeployError(
            f"{superlink} cannot be reached ({error.strerror or error}): is fedtalora superlink running there, and "
            "does its firewall admit this port?"
        ) from None
    if protocol != "h2":
        raise DeployError(f"{superlink} is not the Fleet API but another TLS port; nodes call port 9092")


def check_clock(superlink: str, folder: FederationFolder, name: str) -> None:
    """Call the Fleet API with this node's signature, in which the time is.

    The call asks for what is no node's, so it changes nothing. Of its answers one alone is of interest, for of that one
    Flower's SuperNode says nothing: it ends as if it had been asked to.

    Parameters
    ----------
    superlink
        Host and port; `check_superlink` has passed.
    name
        The node's, whose key is in the folder.

    Raises
    ------
    DeployError
        If this machine's clock is not the server's, or the node's key cannot be read.
    """
    import grpc
    from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
    from flwr.proto.fleet_pb2 import PullMessagesRequest
    from flwr.proto.fleet_pb2_grpc import FleetStub
    from flwr.proto.node_pb2 import Node
    from flwr.supercore.interceptors import RuntimeVersionClientInterceptor

    from fedtalora_flwr.deploy.nodes import load_node_key

    key = load_node_key(folder, name)
    trust = grpc.ssl_channel_credentials(folder.ca_certificate.read_bytes())
    signed = [RuntimeVersionClientInterceptor("SuperNode"), NodeAuthClientInterceptor(key, key.public_key())]
    with grpc.secure_channel(superlink, trust, options=[("grpc.enable_http_proxy", 0)]) as channel:
        fleet = FleetStub(grpc.intercept_channel(channel, *signed))
        try:
            fleet.PullMessages(PullMessagesRequest(node=Node(node_id=1)), timeout=PROBE_SECONDS)
        except grpc.RpcError as error:
            if _CLOCK_IS_OFF in (error.details() or ""):
                raise DeployError(
                    f"this machine's clock says {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, and {superlink} refuses a "
                    "node whose clock is more than 5 s ahead of its own or 5 minutes behind: compare `date --utc` on "
                    "both machines, and switch on NTP (timedatectl set-ntp true)"
                ) from None


def healthy(folder: FederationFolder, *, port: int, insecure: bool = False) -> bool:
    """Tell whether the process with this port on loopback says that it is well."""
    connection: http.client.HTTPConnection = http.client.HTTPConnection(LOOPBACK, port, timeout=2)
    if not insecure:
        context = ssl.create_default_context(cafile=str(folder.ca_certificate))
        connection = http.client.HTTPSConnection(LOOPBACK, port, timeout=2, context=context)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def online(folder: FederationFolder, name: str) -> bool:
    """Tell whether a SuperNode's log says that the SuperLink has let it in."""
    path = folder.log(name)
    return path.exists() and b"SuperNode ID:" in path.read_bytes()


def explain_end(name: str, log: str) -> str:
    """Say what the log of a SuperNode, or of the SuperLink, means that has ended, and what to do."""
    if STOPPED_WORKING in log:
        return log.rpartition(STOPPED_WORKING)[2].partition("\n")[0]
    if name != "superlink":
        return next((meaning for sign, meaning in _REFUSALS.items() if sign in log), _SILENT)
    if "already in use" in log:
        return "a port is taken, by another SuperLink perhaps; stop that, or give others by --fleet and --control-port"
    return "see the end of its log"


def split_address(address: str) -> tuple[str, int]:
    """Split ``host:port``; an IPv6 host stands in brackets.

    Raises
    ------
    DeployError
        If it is not of that form.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise DeployError(f"an address is host:port, such as superlink.lab:9092, got {address!r}")
    return host.strip("[]"), int(port)


def _of_certificate(error: ssl.SSLCertVerificationError, superlink: str, folder: FederationFolder) -> str:
    reason = error.verify_message.rstrip(".")
    if "mismatch" in reason or "not valid for" in reason:
        host = split_address(superlink)[0]
        return f"the server's certificate is not for {host}; on the server: fedtalora certs {host}, and restart it"
    if "expired" in reason or "not yet valid" in reason:
        return (
            f"the server's certificate is not valid at this time ({reason}): compare the clocks, or on the server: "
            "fedtalora certs --renew, and restart it"
        )
    return f"{superlink} has a certificate of another authority ({reason}): copy the server's ca.crt to {folder.root}"
