"""A result to an EHR: one FHIR R4 transaction, POSTed (R4 §3.1.0.11). Its entries' statuses decide.

==============================  =============================================================================
what the server answers         what becomes of the result
==============================  =============================================================================
2xx, each entry 2xx             delivered: created, or there already under its identifier
2xx, an entry says otherwise    judged by that entry's status, the gravest first
2xx, and anything else          NotReadBack: nothing says what became of it; again later, which creates nothing twice
404 with an OperationOutcome    PeerUnavailable: what the result refers to is not known there yet, the patient for one
409 412 423                     PeerUnavailable: again later
others                          as web.py says
==============================  =============================================================================

The patient is never created: `subject` becomes a conditional reference (R4 §3.1.0.11.3) by the Identifier.system that the site says the
patient's issuer has; without one the result is not sent. What a server writes in words may name a patient and is not repeated.
Not here: what the resources say (report/fhir.py), HTTP (web.py), jobs (send.py).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Final
from urllib.parse import quote

from worker.deliver import web
from worker.deliver.association import Peer
from worker.deliver.cstore import Outcome
from worker.domain import Document
from worker.errors import NotReadBack, PeerRefused, PeerUnavailable, WorkerError

Json = dict[str, Any]

_FHIR_JSON: Final = "application/fhir+json"
#: A large server's statement of what it is.
_MAX_STATEMENT: Final = 32 << 20
#: Another writer, no single match, locked: R4 §3.1.0.5, RFC 4918 §11.3.
_AGAIN: Final = (409, 412, 423)
_OID: Final = re.compile(r"[0-2](\.(0|[1-9][0-9]*))+")


def send(documents: Sequence[Document], *, peer: Peer) -> list[Outcome]:
    """Post `documents` in order; one outcome each, in order, as of `cstore.send`."""
    return web.each(documents, partial(_deliver, peer=peer))


def ask(peer: Peer) -> float:
    """Return the seconds that the server takes to say what it is (R4 §3.1.0.9).

    Raises
    ------
    PeerUnavailable
        With the reason in words.
    """
    started = time.perf_counter()
    status, body = web.exchange(peer, "GET", f"{_base(peer)}/metadata", headers={"Accept": _FHIR_JSON}, max_body=_MAX_STATEMENT)
    # Some show what they are only to a user; that they want one is answer enough.
    if status not in (401, 403) and not str(_object(body).get("fhirVersion", "")).startswith("4."):
        raise PeerUnavailable(f"{peer.name} answers /metadata with HTTP status {status} and not as a FHIR R4 server does.")
    return time.perf_counter() - started


def _base(peer: Peer) -> str:
    return peer.url.rstrip("/")


def _deliver(document: Document, *, peer: Peer) -> Outcome:
    uid = document.sop_instance_uid
    try:
        body, wanted = _addressed(document, peer=peer)
        # "minimal": the resources are ours, they need not come back.
        headers = {"Accept": _FHIR_JSON, "Content-Type": f"{_FHIR_JSON}; charset=utf-8", "Prefer": "return=minimal"}
        status, said = web.exchange(peer, "POST", _base(peer), body=body, headers=headers)
    except WorkerError as error:
        return Outcome(uid, error=error)
    return Outcome(uid, 0, error=_verdict(status, _object(said), wanted=wanted, peer=peer))


def _verdict(status: int, answer: Json, *, wanted: int, peer: Peer) -> WorkerError | None:
    what = f"{peer.name} answers the transaction with HTTP status {status}"
    if status // 100 != 2:
        is_its_own = status == 404 and answer.get("resourceType") == "OperationOutcome"
        return web.refusal(status, what, again=(*_AGAIN, *((404,) if is_its_own else ())))
    statuses = _statuses(answer)
    if len(statuses) != wanted:
        return NotReadBack(f"{what} and does not say what became of its {wanted} entries.")
    failed = [web.refusal(one, f"{what}, and of an entry with {one}", again=(*_AGAIN, 404)) for one in statuses if one // 100 != 2]
    return next((one for one in failed if isinstance(one, PeerRefused)), next(iter(failed), None))


def _statuses(answer: Json) -> list[int]:
    """The status of each entry of a transaction's response, in the order of the request; 0 where one says none."""
    if answer.get("resourceType") != "Bundle" or answer.get("type") not in ("transaction-response", "batch-response"):
        return []
    entries = answer.get("entry")
    said = [one.get("response") if isinstance(one, dict) else None for one in entries] if isinstance(entries, list) else []
    texts = [str(one.get("status", "")) if isinstance(one, dict) else "" for one in said]
    return [int(text[:3]) if re.match(r"[1-5][0-9]{2}\b", text, re.ASCII) else 500 for text in texts]


def _addressed(document: Document, *, peer: Peer) -> tuple[bytes, int]:
    """The transaction with its patient as this server knows them, and how many entries it has.

    Raises
    ------
    PeerRefused
        Under which Identifier.system the server keeps the patient's issuer is not said.
    """
    bundle = json.loads(document.data)
    for entry in bundle["entry"]:
        resource = entry["resource"]
        if "subject" in resource:
            resource["subject"] = {"reference": _patient(resource["subject"]["identifier"], peer=peer)}
    return json.dumps(bundle, ensure_ascii=False, separators=(",", ":")).encode(), len(bundle["entry"])


def _patient(identifier: Json, *, peer: Peer) -> str:
    issuer = identifier.get("assigner", {}).get("display", "")
    system = peer.systems.get(issuer) or (f"urn:oid:{issuer}" if _OID.fullmatch(issuer) else issuer if ":" in issuer else "")
    if not system:
        raise PeerRefused(
            f"Under which Identifier.system {peer.name} keeps IDs of this patient's issuer is not configured: see [records] issuers."
        )
    # R4 §3.1.1.3.1: these end a value, unless they are escaped.
    escaped = (re.sub(r"([\\,$|])", r"\\\1", part) for part in (system, identifier["value"]))
    return "Patient?identifier=" + "|".join(quote(part, safe=":/") for part in escaped)


def _object(body: bytes) -> Json:
    try:
        found = json.loads(body.decode("utf-8-sig")) if body else {}
    except (ValueError, RecursionError):
        found = {}
    return found if isinstance(found, dict) else {}
