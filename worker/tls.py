"""TLS of our listeners: DICOM (PS3.15 §B.12) and MLLP, by BCP 195 (RFC 9325)."""

from __future__ import annotations

import ssl

from worker.config import ConfigError, Receive, Records


def server_context(settings: Receive | Records, *, section: str) -> ssl.SSLContext | None:
    """TLS 1.2 or better; clients' certificates are asked for if an authority is given. None where no certificate is configured.

    Raises
    ------
    ConfigError
        A file is missing or is not what it should be.
    """
    if not settings.tls_certificate:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(settings.tls_certificate, settings.tls_key or None)
        if settings.tls_client_ca:
            context.load_verify_locations(settings.tls_client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as exc:  # ssl.SSLError is one
        raise ConfigError(f"[{section}] tls_certificate, tls_key or tls_client_ca cannot be used: {exc.strerror or exc}.") from exc
    return context
