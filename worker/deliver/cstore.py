"""C-STORE to a PACS and back to be sure: what each status means, and the query that proves delivery.

========================  =============================================================================
what the peer does        what becomes of the document (PS3.4 Table B.2-1; PS3.7 Annex C)
========================  =============================================================================
0x0000                    read back; then delivered
0x0001 0x0107 0x0116 Bxxx stored with a warning: recorded, read back; then delivered
0x0111 duplicate          delivered if the query finds it
A9xx Cxxx, 01xx, 021x     PeerRefused: sending again changes nothing (the list is ``_REFUSALS``)
no context accepted       PeerRefused
A7xx and all others       PeerUnavailable: again later
abort, silence            unknown: asked at once on a new association; if not found, again later
Success, but not found    NotReadBack: again later
found, other patient      PatientConflict: a person must look
no association            PeerUnavailable, permanent rejections too: somebody will mend the AE title
========================  =============================================================================

Not here: STOW-RS, which is judged by the same table (stow.py), storage commitment (commitment.py), jobs (send.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Final

from pydicom import dcmread
from pydicom.uid import UID, ImplicitVRLittleEndian
from pynetdicom.dsutils import encode

from worker.deliver.association import NATIVE, STUDY_ROOT_FIND, VERIFICATION, Association, Peer, associate
from worker.deliver.wire import EncodedObject, Response, open_file
from worker.domain import Document
from worker.errors import NotReadBack, PatientConflict, PeerRefused, PeerUnavailable, WorkerError

__all__ = [
    "MAX_LOST",
    "NO_RESPONSE",
    "Outcome",
    "Parcel",
    "Peer",
    "count_instances",
    "echo",
    "find_document",
    "find_documents",
    "find_instance",
    "is_warning",
    "judged",
    "misfiled",
    "open_document",
    "send",
    "unaccepted",
]

#: Stands in `Outcome.status` where the peer gave none; no DICOM status has this value. Peers that speak no DICOM, and answered, gave 0.
NO_RESPONSE: Final = 0xFFFF

_DUPLICATE: Final = 0x0111
# PS3.7 Annex C: what the message itself is at fault for, beside the ranges of PS3.4 Table B.2-1.
_REFUSALS: Final = frozenset({0x0105, 0x0106, 0x0117, 0x0118, 0x0119, 0x0120, 0x0121, 0x0122, 0x0124, 0x0210, 0x0211, 0x0212})
_WARNINGS: Final = {
    0x0001: "a warning",
    0x0107: "attribute list error",
    0x0116: "attribute value out of range",
    0xB000: "coercion of data elements",
    0xB006: "elements discarded",
    0xB007: "data set does not match SOP class",
}
#: Two associations (or answers) lost in one call are the peer's fault, not a document's: the rest waits.
MAX_LOST: Final = 2


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one document: delivered when there is no error."""

    sop_instance_uid: str
    status: int = NO_RESPONSE
    warning: str = ""
    error: WorkerError | None = None

    @property
    def delivered(self) -> bool:
        """Whether the peer has the object, as far as the peer lets us ask."""
        return self.error is None


@dataclass(frozen=True, slots=True)
class Parcel:
    """A document opened as far as sending and finding it again needs; `keys` are those of a query at level IMAGE."""

    item: EncodedObject
    file: bytes
    keys: Mapping[str, str]
    patient_id: str


def send(documents: Sequence[Document], *, peer: Peer) -> list[Outcome]:
    """Store `documents` in order over one association and read each back; one outcome each, in order.

    A document's failure is its own, unless the peer is gone: then the rest are outcomes of
    PeerUnavailable. Each step is bounded by ``peer.timeout_s``, and a call loses at most two associations.
    """
    parcels = [open_document(document) for document in documents]
    proposals = _proposals([parcel.item for parcel in parcels])
    outcomes: list[Outcome] = []
    line: Association | None = None
    lost: list[WorkerError] = []
    try:
        for parcel in parcels:
            uid = parcel.item.sop_instance_uid
            if len(lost) >= MAX_LOST:
                outcomes.append(Outcome(uid, error=lost[-1]))
                continue
            try:
                line = line if line and line.is_open else associate(peer, proposals)
            except PeerUnavailable as error:
                lost = [error] * MAX_LOST
                outcomes.append(Outcome(uid, error=error))
                continue
            outcome = _deliver(line, parcel, peer=peer)
            if outcome.error and not line.is_open:
                lost.append(outcome.error)
                if outcome.status == NO_RESPONSE and peer.read_back:
                    line, outcome = _ask(parcel, outcome, proposals=proposals, peer=peer)
                    lost += [] if line else [outcome.error or lost[-1]]
            outcomes.append(outcome)
    finally:
        if line:
            line.release()
    return outcomes


def echo(peer: Peer) -> float:
    """Return the seconds that an association and a C-ECHO take.

    Raises
    ------
    PeerUnavailable
        With the reason in words.
    """
    started = time.perf_counter()
    with associate(peer, [(VERIFICATION, NATIVE)]) as line:
        status = line.echo().status
        if status != 0:
            raise PeerUnavailable(f"{peer.name} answers C-ECHO with 0x{status:04X}.")
        return time.perf_counter() - started


def unaccepted(peer: Peer, sop_class_uids: Iterable[str]) -> list[str]:
    """Of these classes, and of the query where it reads back, what the peer accepts no presentation context for.

    Raises
    ------
    PeerUnavailable
        With the reason in words.
    """
    wanted = [*sop_class_uids, *([STUDY_ROOT_FIND] if peer.read_back else [])]
    with associate(peer, [(uid, NATIVE) for uid in wanted]) as line:
        return [uid for uid in wanted if line.context(uid, NATIVE) is None]


def count_instances(peer: Peer, *, study_instance_uid: str) -> int | None:
    """Ask how many instances the peer has of a study: Number of Study Related Instances (PS3.4 §C.3.4).

    Returns
    -------
    int | None
        None where the peer does not know the study, the attribute or the query, or has it twice.

    Raises
    ------
    PeerUnavailable
        No association, or no answer in time.
    """
    keys = {"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": study_instance_uid, "NumberOfStudyRelatedInstances": ""}
    with associate(peer, [(STUDY_ROOT_FIND, NATIVE)]) as line:
        answers = _answers(line, keys)
    counts = [a["NumberOfStudyRelatedInstances"] for a in answers or () if a["StudyInstanceUID"] == study_instance_uid]
    return int(counts[0]) if len(counts) == 1 and counts[0].isdecimal() else None


def find_instance(peer: Peer, *, study_instance_uid: str, series_instance_uid: str, sop_instance_uid: str) -> bool | None:
    """Ask whether the peer has an instance; None where it does not answer such queries.

    Raises
    ------
    PeerUnavailable
        No association, or no answer in time.
    """
    return _find(peer, _instance_keys(study_instance_uid, series_instance_uid, sop_instance_uid))


def find_document(peer: Peer, document: Document) -> bool | None:
    """Ask whether the peer has a document of ours; as `find_instance`."""
    return _find(peer, open_document(document).keys)


def find_documents(peer: Peer, documents: Iterable[Document]) -> Iterator[bool | None]:
    """Ask for one document after the other, each when its answer is wanted, over one association; as `find_instance`."""
    with associate(peer, [(STUDY_ROOT_FIND, NATIVE)]) as line:
        for document in documents:
            yield _asked(line, open_document(document).keys)


def _find(peer: Peer, keys: Mapping[str, str]) -> bool | None:
    with associate(peer, [(STUDY_ROOT_FIND, NATIVE)]) as line:
        return _asked(line, keys)


def _asked(line: Association, keys: Mapping[str, str]) -> bool | None:
    answers = _answers(line, keys)
    return None if answers is None else any(_is_same(answer, keys) for answer in answers)


def _deliver(line: Association, parcel: Parcel, *, peer: Peer) -> Outcome:
    uid = parcel.item.sop_instance_uid
    try:
        response, note = _store(line, parcel, peer=peer)
    except (PeerUnavailable, PeerRefused) as error:
        return Outcome(uid, error=error)
    outcome = judged(uid, response, note=note, peer=peer)
    return _confirm(line, parcel, outcome, peer=peer) if peer.read_back and outcome.delivered else outcome


def judged(sop_instance_uid: str, response: Response, *, note: str = "", peer: Peer) -> Outcome:
    """What a status means, by the table above; without an error it is stored, as far as the peer says. `note` goes into the warning."""
    uid, status = sop_instance_uid, response.status
    blamed = f" at {', '.join(response.offending)}" if response.offending else ""
    if status in _REFUSALS or status >> 8 == 0xA9 or status >> 12 == 0xC:
        return Outcome(uid, status, error=PeerRefused(f"{peer.name} refuses the object with 0x{status:04X}{blamed}."))
    if status == _DUPLICATE:
        note = "; ".join(filter(None, (note, "0x0111: an object with this UID was there before")))
    elif is_warning(status):
        note = "; ".join(filter(None, (note, f"0x{status:04X}: {_WARNINGS.get(status, 'a warning')}{blamed}")))
    elif status != 0:
        return Outcome(uid, status, error=PeerUnavailable(f"{peer.name} cannot store now: 0x{status:04X}{blamed}."))
    return Outcome(uid, status, note)


def _store(line: Association, parcel: Parcel, *, peer: Peer) -> tuple[Response, str]:
    """C-STORE the bytes as they are; decompressed, or in Implicit VR, only for a peer that takes nothing else."""
    item, note = parcel.item, ""
    context_id = line.context(item.sop_class_uid, [item.transfer_syntax_uid])
    for syntax in NATIVE if context_id is None else ():
        if context_id is None and (context_id := line.context(item.sop_class_uid, [syntax])) is not None:
            ds = dcmread(BytesIO(parcel.file))
            if item.transfer_syntax_uid not in NATIVE:
                ds.decompress(generate_instance_uid=False)  # it is lossless: the same object
            encoded = encode(ds, syntax == ImplicitVRLittleEndian, True) or b""
            item, note = replace(item, data=memoryview(encoded)), f"sent in {UID(syntax).name}"
    if context_id is None:
        what = f"{UID(item.sop_class_uid).name} in {UID(item.transfer_syntax_uid).name}"
        raise PeerRefused(f"{peer.name} accepts no presentation context for {what}.")
    return line.store(item, context_id), note


def _confirm(line: Association, parcel: Parcel, outcome: Outcome, *, peer: Peer) -> Outcome:
    """Turn an outcome into one that a query agrees with."""
    if line.context(STUDY_ROOT_FIND, NATIVE) is None:
        return replace(outcome, error=NotReadBack(f"{peer.name} does not accept C-FIND, so nothing proves that it kept the object."))
    try:
        response, found = line.find(parcel.keys)
        if not any(_is_same(answer, parcel.keys) for answer in found):
            failed = f"; the query ended with 0x{response.status:04X}" if response.status else ""
            return replace(outcome, error=NotReadBack(f"{peer.name} does not find the object in the study it was sent to{failed}."))
        uid = parcel.keys["StudyInstanceUID"]
        response, studies = line.find({"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": uid, "PatientID": ""})
    except PeerUnavailable as error:
        return replace(outcome, error=error)
    if response.status:
        what = f"does not say whose study it filed the object in; the query ended with 0x{response.status:04X}"
        return replace(outcome, error=NotReadBack(f"{peer.name} {what}."))
    patient_ids = {answer["PatientID"] for answer in studies if answer["StudyInstanceUID"] in ("", uid)}
    return replace(outcome, error=misfiled(parcel, patient_ids, peer=peer))


def is_warning(status: int) -> bool:
    """Whether a status says stored, but."""
    return status in _WARNINGS or status >> 12 == 0xB


def misfiled(parcel: Parcel, patient_ids: Set[str], *, peer: Peer) -> PatientConflict | None:
    """An error where a peer keeps the document's study under other patient IDs than the document's."""
    if not parcel.patient_id or not (patient_ids - {""}) or parcel.patient_id in patient_ids:
        return None
    return PatientConflict(f"{peer.name} has the object, but files its study under another patient ID than the object's.")


def _ask(
    parcel: Parcel, unknown: Outcome, *, proposals: Sequence[tuple[str, Sequence[str]]], peer: Peer
) -> tuple[Association | None, Outcome]:
    """Ask over a new association whether an object arrived although no response said so."""
    try:
        line = associate(peer, proposals)
    except PeerUnavailable:
        return None, unknown
    asked = _confirm(line, parcel, replace(unknown, error=None), peer=peer)
    if isinstance(asked.error, NotReadBack):
        return line, unknown
    warning = asked.warning if asked.error else "no response came; a query found the object"
    return line if line.is_open else None, replace(asked, warning=warning)


def _answers(line: Association, keys: Mapping[str, str]) -> list[dict[str, str]] | None:
    if line.context(STUDY_ROOT_FIND, NATIVE) is None:
        return None
    response, answers = line.find(keys)
    return answers if response.status == 0 else None


def open_document(document: Document) -> Parcel:
    """Open a document of ours."""
    keywords = ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "PatientID"]
    header = dcmread(BytesIO(document.data), stop_before_pixels=True, specific_tags=["SpecificCharacterSet", *keywords])
    keys = _instance_keys(header.StudyInstanceUID, header.SeriesInstanceUID, header.SOPInstanceUID)
    patient_id = str(header.get("PatientID") or "").strip()
    return Parcel(item=open_file(document.data), file=document.data, keys=keys, patient_id=patient_id)


def _proposals(items: Sequence[EncodedObject]) -> list[tuple[str, Sequence[str]]]:
    """One context for each class and syntax, so that the peer cannot choose for us, and the query's.

    All are offered uncompressed and in Implicit VR Little Endian too, as PS3.5 §10.1 asks of every requestor.
    """
    pairs = dict.fromkeys((item.sop_class_uid, item.transfer_syntax_uid) for item in items)
    pairs |= dict.fromkeys((item.sop_class_uid, syntax) for item in items for syntax in NATIVE)
    return [(sop_class, (syntax,)) for sop_class, syntax in pairs] + [(STUDY_ROOT_FIND, NATIVE)]


def _instance_keys(study: str, series: str, instance: str) -> dict[str, str]:
    return {
        "QueryRetrieveLevel": "IMAGE",
        "StudyInstanceUID": str(study),
        "SeriesInstanceUID": str(series),
        "SOPInstanceUID": str(instance),
    }


def _is_same(answer: Mapping[str, str], keys: Mapping[str, str]) -> bool:
    """Whether an answer is the object asked for; parents count where they are returned (PS3.4 §C.4.1.1.3.2)."""
    parents = ("StudyInstanceUID", "SeriesInstanceUID")
    return answer["SOPInstanceUID"] == keys["SOPInstanceUID"] and all(answer[k] in ("", keys[k]) for k in parents)
