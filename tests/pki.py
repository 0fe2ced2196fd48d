"""A hospital's certificate authority in a folder, for one test: it issues whatever a test needs to be wrong."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from worker.config import Destination, Receive

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as files."""

    certificate: Path
    key: Path


@dataclass
class Authority:
    """Issues certificates into `folder`; its own is `certificate`."""

    folder: Path
    name: str = "authority"
    certificate: Path = field(init=False)
    _key: PrivateKey = field(init=False, default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def __post_init__(self) -> None:
        """Make the authority's own certificate."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.certificate = self.folder / f"{self.name}.pem"
        self.certificate.write_bytes(self._signed(self.name, self._key, days=365, hosts=(), is_authority=True))

    def issue(self, name: str, *, days: float = 365, hosts: tuple[str, ...] = ("127.0.0.1", "localhost"), is_rsa: bool = False) -> Pair:
        """Issue a certificate for `hosts` that ends in `days`; a negative number has ended."""
        key: PrivateKey = rsa.generate_private_key(65537, 2048) if is_rsa else ec.generate_private_key(ec.SECP256R1())
        pair = Pair(self.folder / f"{name}.pem", self.folder / f"{name}.key")
        pair.certificate.write_bytes(self._signed(name, key, days=days, hosts=hosts, is_authority=False))
        plain = serialization.NoEncryption()
        pair.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
        return pair

    def _signed(self, name: str, key: PrivateKey, *, days: float, hosts: tuple[str, ...], is_authority: bool) -> bytes:
        def named(text: str) -> x509.Name:
            return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

        end = datetime.now(UTC) + timedelta(days=days)
        builder = x509.CertificateBuilder(named(self.name), named(name), key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(min(datetime.now(UTC), end) - timedelta(days=10)).not_valid_after(end)
        builder = builder.add_extension(x509.BasicConstraints(is_authority, None), critical=True)
        if hosts:
            names = [x509.IPAddress(ipaddress.ip_address(host)) if host[0].isdigit() else x509.DNSName(host) for host in hosts]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def served(pair: Pair, *, trusted: Authority | None = None) -> ssl.SSLContext:
    """A peer that shows `pair`, and that wants a certificate of `trusted`, if any."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    if trusted:
        context.load_verify_locations(trusted.certificate)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def listening(pair: Pair, *, trusted: Authority | None) -> Receive:
    """The section of a listener that shows `pair` and asks for certificates of `trusted`."""
    return Receive(tls_certificate=str(pair.certificate), tls_key=str(pair.key), tls_client_ca=str(trusted.certificate) if trusted else "")


def calling(pair: Pair | None, *, trusted: Authority, port: int = 104, server_name: str = "", host: str = "127.0.0.1") -> Destination:
    """The section of a destination that is shown `pair` and must have a certificate of `trusted`."""
    return Destination(
        name="pacs",
        ae_title="SYNOPTIC",
        host=host,
        port=port,
        own_ae_title="SENDER",
        timeout_s=5.0,
        tls=True,
        tls_ca=str(trusted.certificate),
        tls_certificate=str(pair.certificate) if pair else "",
        tls_key=str(pair.key) if pair else "",
        tls_server_name=server_name,
    )
