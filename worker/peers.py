"""Whom we call: destinations, senders that are asked for counts and the audit repository, as the network part takes them.

Not here: who calls us (intake/negotiation.py), certificates (tls.py).
"""

from __future__ import annotations

import base64
import socket
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from worker.config import Config, Destination, Sender
from worker.tls import client_context

if TYPE_CHECKING:
    from worker.deliver.cstore import Peer
    from worker.store.studies import Line, Pending

#: A sender that is asked for a count has this long; the quiet period comes anyway.
ASK_S: Final = 10.0
NO_SYSTEMS: Final[Mapping[str, str]] = {}


def peer_of(destination: Destination, *, own_ae_title: str, systems: Mapping[str, str] = NO_SYSTEMS) -> Peer:
    """A destination as the network part takes it; `systems` as of `systems_of`."""
    from worker.deliver.cstore import Peer

    url = urlsplit(destination.url)
    secret = destination.stow_secret or destination.fhir_secret
    return Peer(
        name=destination.name,
        ae_title=destination.ae_title,
        host=url.hostname or destination.host or destination.hl7_host or destination.smtp_host,
        port=url.port or {"https": 443, "http": 80}.get(url.scheme, 0) or destination.own_port,
        own_ae_title=destination.own_ae_title or own_ae_title,
        timeout_s=destination.timeout_s,
        read_back=destination.read_back,
        tls=client_context(destination),
        tls_server_name=destination.tls_server_name,
        stow_url=destination.stow_url,
        url=destination.url,
        door=destination.door,
        authorization=_authorization(secret),
        systems=systems,
        secret=destination.webhook_secret or destination.smtp_secret,
        mail_from=destination.mail_from,
        mail_to=destination.mail_to,
    )


def systems_of(config: Config) -> dict[str, str]:
    """Issuer of patient IDs → Identifier.system: what `[fhir] issuer_system` and `[records] issuers` say, the other way round."""
    named = {config.fhir.issuer_system: config.site.issuer} if config.fhir.issuer_system else {}
    # Of the names of an issuer one with a colon is a URI, as a system must be; the others are HL7's.
    return {issuer: system for system, issuer in reversed([*named.items(), *config.records.issuers.items()]) if ":" in system}


def _authorization(secret: str) -> str:
    """Basic of ``user:password`` (RFC 7617), else Bearer: a token has no colon (RFC 6750 §2.1)."""
    if ":" in secret:
        return f"Basic {base64.b64encode(secret.encode()).decode()}"
    return f"Bearer {secret}" if secret else ""


def peer_to_ask(sender: Sender, *, host: str, own_ae_title: str) -> Peer:
    """A sender as we ask it for counts; `host` is where its study came from, unless the configuration says another."""
    from worker.deliver.cstore import Peer

    return Peer(
        name=sender.ae_title,
        ae_title=sender.ae_title,
        host=sender.query_host or host,
        port=sender.query_port,
        own_ae_title=own_ae_title,
        timeout_s=ASK_S,
        tls=client_context(sender),
        tls_server_name=sender.tls_server_name,
    )


def repository_of(config: Config) -> Callable[[], socket.socket] | None:
    """What connects to the Audit Record Repository, by TLS always; None where there is none."""
    from worker.deliver.association import Peer, connect

    settings = config.audit
    if not settings.syslog_host:
        return None
    peer = Peer(
        name="The audit repository",
        ae_title="",
        host=settings.syslog_host,
        port=settings.syslog_port,
        own_ae_title="",
        timeout_s=ASK_S,
        tls=client_context(settings),
        tls_server_name=settings.tls_server_name,
    )
    return lambda: connect(peer)


def count_of(config: Config, one: Pending | Line) -> int | None:
    """Ask a study's sender how many instances it has; None if it is not one that may be asked, or does not know.

    Raises
    ------
    PeerUnavailable
        No association, or no answer in time.
    """
    from worker.deliver import cstore

    for sender in config.senders:
        if sender.ae_title == one.calling_ae and sender.query_port:
            peer = peer_to_ask(sender, host=one.address, own_ae_title=config.receive.ae_title)
            return cstore.count_instances(peer, study_instance_uid=one.study_instance_uid)
    return None


def peer_to_report(config: Config, calling_ae: str, address: str) -> Peer | None:
    """A sender as we report to it what we commit to; None where nobody by that title may ask."""
    for sender in config.senders:
        if sender.commitment_port and sender.ae_title in (calling_ae, "*"):
            peer = peer_to_ask(sender, host=address, own_ae_title=config.receive.ae_title)
            return replace(peer, name=calling_ae, ae_title=calling_ae, port=sender.commitment_port)
    return None


def peers_of(config: Config) -> list[Peer]:
    """All that we call: destinations, and senders that are asked for counts."""
    own = config.receive.ae_title
    asked = [sender for sender in config.senders if sender.query_port]
    return [
        *(peer_of(one, own_ae_title=own, systems=systems_of(config)) for one in config.destinations),
        *(peer_to_ask(one, host=one.addresses[0], own_ae_title=own) for one in asked),
    ]
