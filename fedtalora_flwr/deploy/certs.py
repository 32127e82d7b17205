"""The federation's own certificate authority, and the one certificate that it signs: the SuperLink's.

Nodes trust the authority, not the certificate. So the certificate can be renewed, or be given another name, without
a visit to any node; a new authority would lock all of them out, which is why nothing here ever replaces one.
"""

import ipaddress
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedtalora_flwr.deploy.folder import DeployError, FederationFolder, write_private, write_public

AUTHORITY_DAYS = 3650
RENEW_DAYS = 30  # a certificate with less left than this is renewed
_OWN_NAMES = ("localhost", "127.0.0.1")  # by which the SuperExec and `flwr` call the SuperLink on its own machine
_BACKDATED = timedelta(hours=1)  # a node's clock may be behind


@dataclass(frozen=True)
class Certificates:
    """What was found or made.

    Parameters
    ----------
    made
        What was written this time: ``authority``, ``server``; empty if all was there and good.
    names
        Names and addresses in the server's certificate.
    expires
        When the server's certificate ends.
    """

    made: tuple[str, ...]
    names: tuple[str, ...]
    expires: datetime


def make_certificates(
    folder: FederationFolder, names: Iterable[str] = (), *, days: int = 397, renew: bool = False
) -> Certificates:
    """Make what is missing of the authority and the server's certificate; what is there and good stays.

    The server's certificate is made anew, by the same authority, when it ends within `RENEW_DAYS` days, lacks one of
    `names`, or is not the authority's.

    Parameters
    ----------
    names
        Host names and IP addresses by which nodes call the server; none: those of the present certificate.
    days
        Days that the server's certificate is valid.
    renew
        Make the server's certificate anew in any case.

    Raises
    ------
    DeployError
        If no name is known, the authority's key is needed and away, or a file is not what its name says.
    """
    folder.make()
    made = []
    if not folder.ca_certificate.exists():
        for path in (folder.ca_key, folder.server_certificate):
            if path.exists():
                raise DeployError(
                    f"{path} is there but {folder.ca_certificate} is not: copy it back from any node, or move "
                    f"{folder.root} away to begin anew, with new certificates for every node"
                )
        _make_authority(folder)
        made.append("authority")
    if not folder.superexec_secret.exists():
        write_private(folder.superexec_secret, secrets.token_hex(32).encode())
    authority, present = _certificate(folder.ca_certificate.read_bytes()), _present(folder)
    wanted = _with_own_names(names or (names_of(present) if present else ()))
    if present is None or renew or _lacks(present, wanted, authority) or not _has_key(folder, present):
        if set(wanted) == set(_OWN_NAMES) and not names:
            raise DeployError("name the server as nodes call it: fedtalora certs superlink.lab 10.0.0.5")
        _make_server(folder, authority, wanted, days=days)
        made.append("server")
        present = _present(folder)
    assert present is not None
    return Certificates(tuple(made), names_of(present), present.not_valid_after_utc)


def names_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """List the host names and addresses that a certificate is for."""
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return tuple(str(entry.value) for entry in found)


def _with_own_names(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*names, *_OWN_NAMES]))


def _lacks(certificate: x509.Certificate, names: Iterable[str], authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except Exception:  # of a wrong name ValueError, of a wrong signature InvalidSignature, of a wrong key TypeError
        return True
    left = certificate.not_valid_after_utc - datetime.now(UTC)
    return left < timedelta(days=RENEW_DAYS) or not set(names) <= set(names_of(certificate))


def _has_key(folder: FederationFolder, certificate: x509.Certificate) -> bool:
    """Tell whether the key beside a certificate is its own; a renewal that was cut short leaves another."""
    if not folder.server_key.exists():
        return False
    key = serialization.load_pem_private_key(folder.server_key.read_bytes(), None)
    return key.public_key() == certificate.public_key()


def _make_authority(folder: FederationFolder) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _subject(f"fedtalora CA {datetime.now(UTC):%Y-%m-%d}")
    usage = x509.KeyUsage(
        key_cert_sign=True,
        crl_sign=True,
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        _valid(x509.CertificateBuilder(), AUTHORITY_DAYS)
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    write_private(folder.ca_key, _pem(key))  # the key first: a certificate without one could sign nothing
    write_public(folder.ca_certificate, certificate.public_bytes(serialization.Encoding.PEM))


def _make_server(folder: FederationFolder, authority: x509.Certificate, names: Iterable[str], *, days: int) -> None:
    if not folder.ca_key.exists():
        raise DeployError(f"{folder.ca_key} is needed to sign a certificate; bring it back for this command")
    ca_key = serialization.load_pem_private_key(folder.ca_key.read_bytes(), None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    if ca_key.public_key() != authority.public_key():
        raise DeployError(f"{folder.ca_key} is not the key of {folder.ca_certificate}; bring back the right one")
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _valid(x509.CertificateBuilder(), days)
        .subject_name(_subject("superlink"))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    write_private(folder.server_key, _pem(key))
    write_public(folder.server_certificate, certificate.public_bytes(serialization.Encoding.PEM))


def _valid(builder: x509.CertificateBuilder, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    dated = builder.not_valid_before(now - _BACKDATED).not_valid_after(now + timedelta(days=days))
    return dated.serial_number(x509.random_serial_number())


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        if ":" in name or "/" in name or not name.isascii():
            raise DeployError(
                f"a name of the server is a host name or an IP address, without port, got {name!r}"
            ) from None
        return x509.DNSName(name)


def _present(folder: FederationFolder) -> x509.Certificate | None:
    path = folder.server_certificate
    return _certificate(path.read_bytes()) if path.exists() else None


def _certificate(content: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(content)
    except ValueError as error:
        raise DeployError(f"not a certificate in PEM: {error}") from None


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
