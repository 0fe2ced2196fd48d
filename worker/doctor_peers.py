"""The part of `synoptic doctor` that asks others: destinations, senders, certificates, the FHIR server.

Each is asked what changes nothing there. Not here: what is checked on this host (doctor.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Final

from pydicom.uid import UID

from worker import peers, tls
from worker.config import Config, ConfigError, Destination
from worker.errors import PeerRefused, PeerUnavailable, WorkerError
from worker.record_feeds import clock
from worker.store.database import Store
from worker.store.spool import SpoolError

if TYPE_CHECKING:
    from worker.deliver.cstore import Peer
    from worker.intake import fhir_http

#: So long and so much a FHIR server may take to say what it is; a large one's statement is a few megabytes.
FHIR_S: Final = 5.0
_FHIR_BYTES: Final = 32 * 2**20

#: (what, found, is it well)
Check = tuple[str, str, bool]


def checks(config: Config) -> Iterator[Check]:
    """Every one whom we call."""
    yield from _peers(config)
    yield from _certificates(config)
    if config.fhir.url:
        yield tried("FHIR server", lambda: _fhir(config))


def tried(what: str, check: Callable[[], str]) -> Check:
    """One line of the table; what can go wrong is what it found."""
    try:
        return what, check(), True
    except (WorkerError, ConfigError, SpoolError, OSError, ValueError, RuntimeError) as exc:  # RuntimeError: torch, a device that is full
        return what, str(exc), False


def _peers(config: Config) -> Iterator[Check]:
    own = config.receive.ae_title
    if not config.destinations:
        yield "destinations", "none is configured: reports stay in the database. Add [[destinations]].", False
    for one in config.destinations:
        peer = partial(peers.peer_of, one, own_ae_title=own)
        said = tried(f"{_QUESTIONS[one.door]} {one.name}", partial(_echo, peer))
        yield said
        if said[2] and one.door == "dicom":
            yield tried(f"documents for {one.name}", partial(_accepted, peer, one))
    for sender in config.senders:
        if sender.query_port:
            peer = partial(peers.peer_to_ask, sender, host=sender.addresses[0], own_ae_title=own)
            yield tried(f"C-ECHO {sender.ae_title}", partial(_echo, peer))
    if not config.senders:
        yield "senders", "none is configured: nobody may store. Add [[senders]].", False


#: What each door is asked; HL7 and webhooks have no question without consequences, and are only connected to.
_QUESTIONS: Final = {"dicom": "C-ECHO", "stow": "DICOMweb", "hl7": "HL7", "fhir": "FHIR", "webhook": "webhook", "mail": "mail"}


def _echo(peer_of: Callable[[], Peer]) -> str:
    from worker.deliver import cstore, fhir, mllp, notice, stow

    peer = peer_of()
    if peer.stow_url:
        return f"{peer.stow_url} answers QIDO-RS, {stow.ask(peer) * 1000:.0f} ms"
    ask = {"hl7": mllp.reach, "fhir": fhir.ask, "webhook": mllp.reach, "mail": notice.ask}.get(peer.door, cstore.echo)
    who = f"{peer.ae_title} at " if peer.ae_title else ""
    return f"{who}{peer.address}{', by TLS' if peer.tls else ''}, {ask(peer) * 1000:.0f} ms"


def _accepted(peer_of: Callable[[], Peer], destination: Destination) -> str:
    """Whether an archive would take each kind of document that it is to get: what it does not take becomes dead letters."""
    from worker.deliver import commitment, cstore
    from worker.report.forms import SOP_CLASSES

    kinds: dict[str, list[str]] = {}
    for kind in destination.wanted:
        kinds.setdefault(SOP_CLASSES[kind], []).append(kind)
    asked = [*kinds, *([commitment.STORAGE_COMMITMENT] if destination.commitment else [])]
    refused = cstore.unaccepted(peer_of(), asked)
    lacking = [f"{UID(uid).name} ({', '.join(of)})" for uid, of in kinds.items() if uid in refused]
    if lacking:
        instead = 'send "basic" instead of it' if lacking[0].endswith("(sr)") else "take it out of `documents`"
        raise PeerRefused(f"it accepts no {', no '.join(lacking)}: let it, or {instead}.")
    if commitment.STORAGE_COMMITMENT in refused:
        raise PeerRefused("it does not accept Storage Commitment: let it, or set commitment = false.")
    if refused:  # the query
        raise PeerRefused("it does not accept C-FIND, by which we see that it has what it took: let it, or set read_back = false.")
    return f"it accepts {', '.join(destination.wanted)}"


def _certificates(config: Config) -> Iterator[Check]:
    """Whether each certificate can be used and lasts; of a peer that is away its C-ECHO has told."""
    try:
        tls.check(config)
        named = list(tls.ends(config, peers.peers_of(config)))
    except ConfigError as exc:
        yield "certificates", str(exc), False
        return
    for what, end_of in named:
        try:
            yield what, *tls.lifetime(end_of(), now=clock())
        except PeerUnavailable:
            continue
        except (WorkerError, ConfigError) as exc:
            yield what, str(exc), False


def _fhir(config: Config) -> str:
    """Ask the FHIR server what it is (R4 §3.1.0.9), without a token, which that may not need; no patient is asked for."""
    from worker.fhir_feed import Puller
    from worker.intake import fhir_http

    Puller(config, Store(config.database_url))  # reads keys and certificates, connects to nothing
    url = fhir_http.checked_url(f"{config.fhir.url.rstrip('/')}/metadata", "fhir.url")
    transport = fhir_http.Transport(fhir_http.tls_context(config.fhir.ca), FHIR_S, attempts=1)
    budget = fhir_http.Budget(_FHIR_BYTES, time.monotonic() + FHIR_S)
    try:
        answer = transport.ask("GET", url, budget=budget, headers={"Accept": "application/fhir+json"})
    except WorkerError as exc:
        raise PeerUnavailable(f"{exc} Check fhir.url and fhir.ca, and that this host may reach {url.host}.") from exc
    finally:
        transport.close()
    return _said(answer, url.host)


def _said(answer: fhir_http.Answer, host: str) -> str:
    """What a FHIR server is by its answer to /metadata."""
    if answer.status in (401, 403):
        return f"{host} answers, and shows what it is only to who has a token; the first study asks for one"
    if answer.status != 200:
        raise PeerRefused(f"{host} answers /metadata with status {answer.status}: fhir.url must be the base URL, without /metadata.")
    release = answer.content.get("fhirVersion")
    if answer.content.get("resourceType") != "CapabilityStatement" or not isinstance(release, str):
        raise PeerRefused(f"{host} answers /metadata with no CapabilityStatement: fhir.url must be a FHIR server's base URL.")
    if not release.startswith("4."):
        raise PeerRefused(f"{host} does not speak FHIR R4: set fhir.url to the server's R4 base URL.")
    return f"{host} speaks FHIR {release if len(release) < 16 else 'R4'}"
