"""STOW-RS to an archive and QIDO-RS back to be sure: the other door for reports (PS3.18 §10.5, §10.6). The body decides.

==============================  =============================================================================
what the archive answers        what becomes of the document
==============================  =============================================================================
it is among the Referenced      stored, whatever the HTTP status is; a Warning Reason is recorded: read back
it is among the Failed          its Failure Reason is judged as the status of a C-STORE is (cstore.py), under 200 too
no word of it, 2xx or 409       unknown: a query decides; if not found, again later (409: PeerRefused)
no word of it, another status   as web.py says
no answer, or cut off           unknown: asked at once; if not found, again later
==============================  =============================================================================

A body that is too long, cannot be read or names other objects is no word of it. One document a request, so that each failure is its own.
Not here: jobs (send.py), HTTP (web.py), what a status means (cstore.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final
from urllib.parse import urlencode
from uuid import uuid4
from xml.etree import ElementTree

from pydicom.uid import generate_uid

from worker.deliver import web
from worker.deliver.association import Peer
from worker.deliver.cstore import Outcome, Parcel, is_warning, judged, misfiled, open_document
from worker.deliver.wire import Response
from worker.domain import Document
from worker.errors import NotReadBack, PeerUnavailable, PeerUnreachable, WorkerError
from worker.ops import audit

Json = dict[str, Any]

_DICOM_JSON: Final = "application/dicom+json"
_NOT_FOUND: Final = (204, 404)  # PS3.18 §10.6.3.1; older servers say 404
# PS3.18 Table I.1-1 and PS3.6, as keys of PS3.18 Annex F.
_FAILED, _REFERENCED, _OTHER_FAILURES = "00081198", "00081199", "0008119A"
_REFERENCED_UID, _FAILURE_REASON, _WARNING_REASON = "00081155", "00081197", "00081196"
_SOP_INSTANCE, _STUDY, _SERIES, _PATIENT_ID = "00080018", "0020000D", "0020000E", "00100020"
#: PS3.7 §C.5.11: stands in for a Failure Reason that is missing or that is none.
_PROCESSING_FAILURE: Final = 0x0110


def send(documents: Sequence[Document], *, peer: Peer) -> list[Outcome]:
    """Store `documents` in order and read each back; one outcome each, in order, as of `cstore.send`."""
    return web.each(documents, lambda document: _deliver(open_document(document), peer=peer))


def ask(peer: Peer) -> float:
    """Return the seconds that a query for a study that nobody has takes; there is no C-ECHO here.

    Raises
    ------
    PeerUnavailable
        With the reason in words.
    """
    started = time.perf_counter()
    _search(peer, "", StudyInstanceUID=str(generate_uid(prefix=None)))
    return time.perf_counter() - started


def find_documents(peer: Peer, documents: Iterable[Document]) -> Iterator[bool]:
    """Ask for one document after the other, each when its answer is wanted; PeerUnavailable where there is none."""
    for document in documents:
        yield _has(peer, open_document(document))


def _deliver(parcel: Parcel, *, peer: Peer) -> Outcome:
    uid, boundary = parcel.item.sop_instance_uid, uuid4().hex
    body = b"--%b\r\nContent-Type: application/dicom\r\n\r\n%b\r\n--%b--\r\n" % (boundary.encode(), parcel.file, boundary.encode())
    kind = f'multipart/related; type="application/dicom"; boundary={boundary}'
    try:
        headers = {"Accept": _DICOM_JSON, "Content-Type": kind}
        status, said = web.exchange(peer, "POST", peer.stow_url, body=body, headers=headers)
    except PeerUnreachable as error:
        return Outcome(uid, error=error)
    except PeerUnavailable as error:
        return _decided_by_query(parcel, Outcome(uid, error=error), peer=peer)
    if (word := _word_of(uid, said)) is not None:
        outcome = judged(uid, Response(word), peer=peer)
        return _confirm(parcel, outcome, peer=peer) if peer.read_back and outcome.delivered else outcome
    unknown = Outcome(uid, error=_silence(status, peer=peer))
    return _decided_by_query(parcel, unknown, peer=peer) if status // 100 == 2 or status == 409 else unknown


def _silence(status: int, *, peer: Peer) -> WorkerError:
    """What an answer means that says nothing of the object."""
    what = f"{peer.name} answers STOW-RS with HTTP status {status}"
    if status // 100 == 2:
        return NotReadBack(f"{what} and does not say what became of the object{'' if peer.read_back else ', and read_back is off'}.")
    return web.refusal(status, what)


def _decided_by_query(parcel: Parcel, unknown: Outcome, *, peer: Peer) -> Outcome:
    """Ask whether an object arrived although nothing said so."""
    if not peer.read_back:
        return unknown
    asked = _confirm(parcel, replace(unknown, error=None), peer=peer)
    if isinstance(asked.error, (NotReadBack, PeerUnavailable)):
        return unknown
    return replace(asked, warning="no answer said so; a query found the object")


def _confirm(parcel: Parcel, outcome: Outcome, *, peer: Peer) -> Outcome:
    """Turn an outcome into one that a query agrees with."""
    study = parcel.keys["StudyInstanceUID"]
    try:
        if not _has(peer, parcel):
            return replace(outcome, error=NotReadBack(f"{peer.name} does not find the object in the study it was sent to."))
        studies = _search(peer, "", StudyInstanceUID=study)
    except PeerUnavailable as error:
        return replace(outcome, error=error)
    patient_ids = {_value(one, _PATIENT_ID) for one in studies if _is_same(one, {_STUDY: study})}
    return replace(outcome, error=misfiled(parcel, patient_ids, peer=peer))


def _has(peer: Peer, parcel: Parcel) -> bool:
    study, series, uid = (parcel.keys[key] for key in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"))
    found = _search(peer, f"/{study}/series/{series}/instances", SOPInstanceUID=uid)
    return any(_is_same(one, {_SOP_INSTANCE: uid, _STUDY: study, _SERIES: series}) for one in found)


def _is_same(answer: Json, keys: dict[str, str]) -> bool:
    """Whether an answer is what was asked for; only the object's own UID must be returned (PS3.18 Table 10.6.3-5)."""
    return all(_value(answer, tag) in ((uid,) if tag == _SOP_INSTANCE else ("", uid)) for tag, uid in keys.items())


def _search(peer: Peer, below: str, **matching: str) -> list[Json]:
    """QIDO-RS below the URL of the studies (PS3.18 §10.6); PeerUnavailable where that gives no answer."""
    query = f"{below}?{urlencode(matching)}"
    with audit.asking(audit.Party(peer.stow_url, peer.host, is_ae=False), query.encode(), of=peer.stow_url):
        status, body = web.exchange(peer, "GET", f"{peer.stow_url}{query}", headers={"Accept": _DICOM_JSON})
    if status in _NOT_FOUND:
        return []
    found = _datasets(body) if status == 200 else None
    if found is None:
        raise PeerUnavailable(
            f"{peer.name} answers QIDO-RS with HTTP status {status}{' and what cannot be read' if status == 200 else ''}."
        )
    return found


# --- bodies: the DICOM JSON Model, or the Native DICOM Model of XML as if it were that


def _word_of(sop_instance_uid: str, body: bytes) -> int | None:
    """The status that a Store Instances Response gives an object: 0, a warning or a failure; None where it says nothing of it."""
    said = _datasets(body) or []
    # Only this object was sent: a failure that names none is its own.
    failed = [item for ds in said for tag in (_FAILED, _OTHER_FAILURES) for item in _items(ds, tag)]
    for item in failed:
        if _value(item, _REFERENCED_UID) in ("", sop_instance_uid):
            reason = _number(item, _FAILURE_REASON)
            return _PROCESSING_FAILURE if not reason or is_warning(reason) else reason
    stored = [item for ds in said for item in _items(ds, _REFERENCED) if _value(item, _REFERENCED_UID) == sop_instance_uid]
    return _number(stored[0], _WARNING_REASON) if stored else None


def _datasets(body: bytes) -> list[Json] | None:
    """Read a body; None where it cannot be. Bounded by its length: expat expands no entity more than that allows, nor fetches one."""
    try:
        if body.lstrip()[:1] == b"<":
            return [_of_xml(ElementTree.fromstring(body))]  # noqa: S314
        found = json.loads(body)
    except (ValueError, LookupError, SyntaxError, RecursionError):
        return None
    return [one for one in (found if isinstance(found, list) else [found]) if isinstance(one, dict)]


def _of_xml(element: ElementTree.Element) -> Json:
    """PS3.19 §A.1 as PS3.18 §F.2; its namespace may be missing."""
    found: Json = {}
    for attribute in element.iterfind("{*}DicomAttribute"):
        values: list[Any] = [_of_xml(item) for item in attribute.iterfind("{*}Item")]
        found[attribute.get("tag", "").upper()] = {"Value": values or [value.text for value in attribute.iterfind("{*}Value")]}
    return found


def _values(ds: Json, tag: str) -> list[Any]:
    element = ds.get(tag)
    values = element.get("Value") if isinstance(element, dict) else None
    return values if isinstance(values, list) else []


def _items(ds: Json, tag: str) -> Iterator[Json]:
    return (item for item in _values(ds, tag) if isinstance(item, dict))


def _value(ds: Json, tag: str) -> str:
    values = _values(ds, tag)
    return values[0].strip() if values and isinstance(values[0], str) else ""


def _number(ds: Json, tag: str) -> int:
    """Return the first value as a US; 0 where it is none."""
    values = _values(ds, tag)
    try:
        return int(values[0]) & 0xFFFF if values and isinstance(values[0], (int, str)) else 0
    except ValueError:
        return 0
