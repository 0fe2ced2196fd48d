"""TLS in and out: C-STORE and HL7 to us, C-STORE and C-FIND from us (PS3.15 §B.12), by BCP 195 (RFC 9325).

::

    PEM files ──▶ Credentials ──at each connection──▶ context: TLS 1.2 with ECDHE and AEAD, or TLS 1.3
                     │  files changed: made anew; a file that cannot be used: the context before stays, event certificate.unusable
                     └── once a day ──▶ who expires within 30 days? ──▶ event certificate.expires

Not here: the handshakes (intake/, deliver/association.py), the FHIR client's context (intake/fhir_http.py).
"""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from pathlib import Path
from typing import Final

from worker import events
from worker.config import Audit, Config, ConfigError, Destination, Receive, Records, Sender, Web
from worker.deliver.association import Peer, connect
from worker.errors import PeerRefused, WorkerError, cause_of

#: RFC 9325 §4.2 of TLS 1.2: forward secrecy and AEAD, nothing else; keys of 2048 bits and no SHA-1 are level 2.
#: The suites of TLS 1.3 are all of this kind and are not listed here.
SUITES: Final = "ECDHE+AESGCM:ECDHE+CHACHA20:@SECLEVEL=2"
#: A certificate that ends within this time is spoken of.
WARN: Final = timedelta(days=30)


class Credentials:
    """Gives the context of PEM files, made anew when they changed. Safe for threads.

    Parameters
    ----------
    where
        Section of the configuration, for errors and events.
    protocol
        ``PROTOCOL_TLS_SERVER`` or ``PROTOCOL_TLS_CLIENT``; the latter verifies the peer's certificate and name always.
    certificate, key
        What we show; an empty key is one in the certificate's file, an empty certificate shows nothing.
    authority
        Whose certificates we accept. Empty: a server asks its clients for none, a client goes by the system's authorities.

    Raises
    ------
    ConfigError
        A file is missing or is not what it should be. Later the context before stays, and ``certificate.unusable`` says so.
    """

    def __init__(self, where: str, *, protocol: ssl._SSLMethod, certificate: str, key: str, authority: str) -> None:
        self._where, self._protocol = where, protocol
        self._certificate, self._key, self._authority = certificate, key, authority
        self._lock = threading.Lock()
        self._seen = self._stamp()
        self._context = self._made()

    def __call__(self) -> ssl.SSLContext:
        """Return the context for one new connection."""
        with self._lock:
            if (stamp := self._stamp()) != self._seen:
                self._seen = stamp
                try:
                    self._context = self._made()
                except ConfigError as exc:
                    reason = str(exc)
                    for name in filter(None, (self._certificate, self._key, self._authority)):
                        reason = reason.replace(f" {name}", "")  # the log names keys, not the host's folders
                    events.emit("certificate.unusable", section=self._where, reason=reason)
                else:
                    events.emit("certificate.reloaded", section=self._where)
            return self._context

    def fresh(self) -> ssl.SSLContext:
        """Return another context of the same files, for who changes it (ConfigError)."""
        return self._made()

    def _stamp(self) -> list[tuple[int, int, int] | None]:
        """What changes when a file does; three stats are microseconds."""
        stamps: list[tuple[int, int, int] | None] = []
        for name in filter(None, (self._certificate, self._key, self._authority)):
            try:
                found = Path(name).stat()
            except OSError:
                stamps.append(None)
            else:
                stamps.append((found.st_mtime_ns, found.st_size, found.st_ino))
        return stamps

    def _made(self) -> ssl.SSLContext:
        context = ssl.SSLContext(self._protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(SUITES)
        context.options |= ssl.OP_NO_RENEGOTIATION
        try:
            if self._certificate:
                # Without a password OpenSSL would ask for one at the terminal, and a daemon would wait for ever.
                context.load_cert_chain(self._certificate, self._key or None, password="")
            if self._authority:
                context.load_verify_locations(self._authority)
                context.verify_mode = ssl.CERT_REQUIRED
            elif self._protocol == ssl.PROTOCOL_TLS_CLIENT:
                context.load_default_certs()
        except OSError as exc:  # ssl.SSLError is one
            # OpenSSL's word for both is "PEM lib".
            reason = "one is no PEM, or the key has a password" if "PEM lib" in str(exc) else cause_of(exc)
            named = {"tls_certificate": self._certificate, "tls_key": self._key, "the authority's file": self._authority}
            unread = [f"{key} {name}" for key, name in named.items() if name and not os.access(name, os.R_OK)]
            files = " and ".join(unread) or "tls_certificate, tls_key or the authority's file"
            raise ConfigError(f"[{self._where}] {files} cannot be used: {reason}.") from exc
        return context


def server_context(settings: Receive | Records | Web, *, section: str) -> Credentials | None:
    """What a listener shows and asks for; None where no certificate is configured, and the port is plain.

    Raises
    ------
    ConfigError
        A file is missing or is not what it should be.
    """
    if not settings.tls_certificate:
        return None
    return Credentials(
        section,
        protocol=ssl.PROTOCOL_TLS_SERVER,
        certificate=settings.tls_certificate,
        key=settings.tls_key,
        authority="" if isinstance(settings, Web) else settings.tls_client_ca,  # people have passwords, not certificates
    )


@cache
def client_context(settings: Destination | Sender | Audit) -> Credentials | None:
    """What we show to a peer that we call and whom we trust there; None where it is called without TLS. One for each, kept.

    Raises
    ------
    ConfigError
        A file is missing or is not what it should be.
    """
    match settings:
        case Destination(is_tls=False) | Sender(query_tls=False) | Audit(syslog_host=""):
            return None
    return Credentials(
        _where(settings),
        protocol=ssl.PROTOCOL_TLS_CLIENT,
        certificate=settings.tls_certificate,
        key=settings.tls_key,
        authority=settings.tls_ca,
    )


def check(config: Config, *, wanted: Sequence[str] = ("receive", "deliver")) -> None:
    """Read each file that the wanted roles need, so that a wrong one is a sentence at the start (ConfigError)."""
    if "receive" in wanted:
        server_context(config.receive, section="receive")
        server_context(config.records, section="records")
    if "serve" in wanted:
        server_context(config.web, section="web")
    called = [*(config.senders if "receive" in wanted else ()), *(config.destinations if "deliver" in wanted else ()), config.audit]
    for settings in called:
        client_context(settings)


def ends(config: Config, peers: list[Peer]) -> Iterator[tuple[str, Callable[[], datetime]]]:
    """Every certificate that we show or trust and those that `peers` show: what it is called, and what tells its end.

    The latter raises ConfigError where a file cannot be read, and PeerUnavailable where a peer cannot be asked.
    """
    for where, names, authority in _shown(config):
        if names.tls_certificate:
            yield f"[{where}] tls_certificate", partial(_end_of_file, names.tls_certificate, pick=min)
        if authority:
            yield f"[{where}] authority", partial(_end_of_file, authority, pick=max)
    for peer in peers:
        if peer.tls is not None:
            yield f"certificate of {peer.name}", partial(_end_of_peer, peer)


def _shown(config: Config) -> Iterator[tuple[str, Receive | Records | Web | Destination | Sender | Audit, str]]:
    """Each section that has TLS, and its file of authorities."""
    yield "receive", config.receive, config.receive.tls_client_ca
    yield "records", config.records, config.records.tls_client_ca
    yield "web", config.web, ""
    called: list[Destination | Sender | Audit] = [*config.destinations, *config.senders, config.audit]
    for one in called:
        if client_context(one) is not None:
            yield _where(one), one, one.tls_ca


def _where(settings: Destination | Sender | Audit) -> str:
    if isinstance(settings, Audit):
        return "audit"
    return f"destinations {settings.name}" if isinstance(settings, Destination) else f"senders {settings.ae_title}"


def _end_of_file(name: str, *, pick: Callable[[Iterator[datetime]], datetime]) -> datetime:
    """Of a chain the first end counts (`min`); of authorities the last (`max`), for any of them may be the one in use."""
    from cryptography import x509

    try:
        return pick(one.not_valid_after_utc for one in x509.load_pem_x509_certificates(Path(name).read_bytes()))
    except OSError as exc:
        raise ConfigError(f"The file cannot be read: {cause_of(exc)}.") from exc
    except ValueError as exc:
        raise ConfigError("The file holds no certificate in PEM.") from exc


def _end_of_peer(peer: Peer) -> datetime:
    with connect(peer) as sock:
        shown = sock.getpeercert() if isinstance(sock, ssl.SSLSocket) else None
    if not shown:
        raise PeerRefused(f"{peer.name} showed no certificate.")
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(str(shown["notAfter"])), UTC)


def lifetime(end: datetime, *, now: datetime) -> tuple[str, bool]:
    """Say how long a certificate lasts, and whether that is long enough."""
    days = (end - now) // timedelta(days=1)
    if end <= now:
        return f"expired on {end:%Y-%m-%d}, {-days} days ago, and is refused: put a new one into its place, no restart is needed", False
    if end - now <= WARN:
        return f"expires on {end:%Y-%m-%d}, in {days} days: put a new one into its place, no restart is needed", False
    return f"until {end:%Y-%m-%d}, {days} days", True


def warn(config: Config, peers: list[Peer], *, now: datetime) -> None:
    """Emit ``certificate.expires`` for each certificate that ends within 30 days or has ended, and say which file cannot be read.

    A peer that cannot be asked now is silent here: what is to be sent there says why it cannot.
    """
    for what, end_of in ends(config, peers):
        try:
            end = end_of()
        except ConfigError as exc:
            events.emit("certificate.unusable", section=what, reason=str(exc))
        except WorkerError:
            continue
        else:
            words, is_well = lifetime(end, now=now)
            if not is_well:
                events.emit("certificate.expires", certificate=what, days=(end - now) // timedelta(days=1), reason=words)
