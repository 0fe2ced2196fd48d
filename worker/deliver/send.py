"""Job kind `deliver`: one document to one destination, and back to be sure. Commit 5 of the line.

A document counts as delivered when the PACS gave it back by a query, not when it said Success. A destination may
then be asked to commit to it (commitment.py).
Destinations do not know of each other: one that is down holds up nobody else's jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from io import BytesIO
from typing import Final

from pydicom import dcmread
from pydicom.uid import generate_uid

from worker import events
from worker.deliver import commitment, cstore, fhir, mllp, notice, stow
from worker.domain import Document, Job, Patient, PatientKey
from worker.errors import PatientConflict, Reject, ReportInvalid, Retry, Superseded
from worker.ops import audit
from worker.store import commitments, documents, queue
from worker.store.database import Connection, Store

Door = Callable[..., list[cstore.Outcome]]

#: By the door of a destination: each takes documents and the peer, and gives one outcome each, in order.
DOORS: Final[Mapping[str, Door]] = {
    "dicom": cstore.send,
    "stow": stow.send,
    "hl7": mllp.send,
    "fhir": fhir.send,
    "webhook": notice.send,
    "mail": notice.send,
}


def deliver(
    jobs: Sequence[Job], *, store: Store, peer: cstore.Peer, clock: Callable[[], datetime], commitment_wait_s: float | None = None
) -> list[cstore.Outcome]:
    """Send leased jobs' documents by the peer's door and settle each on its own; returns the outcomes of the sent.

    With `commitment_wait_s` the peer is asked to commit to what it took, and its report is waited for so long.
    """
    with store.read() as conn:
        loaded = [documents.load(conn, job.document_id or 0) for job in jobs]
        whose = [documents.owner(conn, job.study_id) for job in jobs]
        stops = [_stop(conn, job, document) for job, document in zip(jobs, loaded, strict=True)]
    fit = [document for document, stop in zip(loaded, stops, strict=True) if stop is None]
    owners = [owner for owner, stop in zip(whose, stops, strict=True) if stop is None]
    subjects: list[audit.Subject] = []
    to = audit.Party(peer.url or peer.stow_url or peer.ae_title or peer.name, peer.host, is_ae=bool(peer.ae_title))
    try:
        for document, owner in zip(fit, owners, strict=True):
            subjects.append(_subject(document) if document.sop_class_uid else audit.Subject(*owner, {}))
            audit.begun(subjects[-1], destination=to)
        sent = DOORS["stow" if peer.stow_url else peer.door](fit, peer=peer)
    except Exception as exc:  # noqa: BLE001  one document must not end the deliveries of a destination
        sent = [cstore.Outcome(document.sop_instance_uid, error=Retry(commitment.unforeseen(exc))) for document in fit]
    for subject, outcome in zip(subjects, sent, strict=False):
        error = outcome.error
        verdict = audit.SUCCESS if error is None else audit.FAILED if isinstance(error, Reject) else audit.AGAIN
        audit.transferred(subject, destination=to, outcome=verdict, reason=str(error or outcome.warning))
    of_fit = iter(sent)
    became = zip(loaded, stops, strict=True)
    outcomes = [cstore.Outcome(document.sop_instance_uid, error=stop) if stop else next(of_fit) for document, stop in became]
    transaction_uid = str(generate_uid(prefix=None))  # of random bits: none is ever used twice
    taken = []
    for job, document, outcome in zip(jobs, loaded, outcomes, strict=True):
        has_status = bool(document.sop_class_uid) and outcome.status != cstore.NO_RESPONSE
        try:
            _settle(
                job,
                outcome,
                f"0x{outcome.status:04X}" if has_status else "",
                store=store,
                now=clock(),
                transaction_uid=transaction_uid,
                wait_s=commitment_wait_s,
            )
            taken += [document] if outcome.error is None else []
        except queue.LeaseLost:
            events.emit("job.fenced", job=job.id, kind=job.kind, study=job.study_id)
    if taken and commitment_wait_s is not None:
        commitment.ask(taken, transaction_uid=transaction_uid, store=store, peer=peer, clock=clock)
    return list(sent)


def _stop(conn: Connection, job: Job, document: Document) -> Reject | Retry | Superseded | None:
    """Why a document is not sent at all, or not yet: what was true when it was written may not be any more."""
    if hold := documents.hold_of(conn, job.study_id):
        return PatientConflict(f"The study is held, its report is not sent: {hold}")
    if not document.data:
        return ReportInvalid(
            f"This form of the result, {document.kind}, could not be written and is not sent; the log says where it failed."
        )
    if not document.is_whole:
        return ReportInvalid("The stored report is not as it was written, its sha256 is another: it is not sent.")
    # A message that waited for the RIS would put the result before the last one in the last one's place.
    if document.kind == "oru" and documents.is_superseded(conn, job.document_id or 0):
        return Superseded("A later result of the study is sent instead.")
    if documents.is_marked(conn, job.id):  # a dead letter that was put back, or one that the archive was found not to have
        return Superseded("A note there says already that it is outdated: it would stand beside the report that replaces it.")
    return _stop_of_note(conn, job) if document.kind == "rejection" else None


def _stop_of_note(conn: Connection, job: Job) -> Reject | Retry | None:
    """Why the old report is not marked: it must not vanish before the new one is there, nor come, unmarked, when the note has gone by."""
    state = documents.root_delivery(conn, job)
    if state == "completed":
        is_early = documents.is_older_on_its_way(conn, job)
        return Retry("The replaced report is not delivered yet: the old one is not marked.") if is_early else None
    if state in {"discarded", "cancelled"}:
        return ReportInvalid(f"The delivery of the report that replaces the old one was {state}: the old one is not marked.")
    return Retry("The report that replaces the old one is not delivered yet: the old one is not marked.")


def _subject(document: Document) -> audit.Subject:
    tags = ["SpecificCharacterSet", "StudyInstanceUID", "AccessionNumber", "PatientID", "IssuerOfPatientID", "PatientName"]
    ds = dcmread(BytesIO(document.data), stop_before_pixels=True, specific_tags=list(tags))
    uid, accession, *whose = (str(ds.get(tag) or "") for tag in tags[1:])
    patient = Patient(PatientKey(whose[1], whose[0]), whose[2])
    return audit.Subject(uid, patient, accession, {document.sop_class_uid: 1})


def _settle(
    job: Job, outcome: cstore.Outcome, status: str, *, store: Store, now: datetime, transaction_uid: str, wait_s: float | None
) -> None:
    error = outcome.error
    with store.begin() as conn:
        if error is None:
            name = "job.completed"
            queue.complete(conn, job, now=now, status=status, warning=outcome.warning)
            if wait_s is not None:
                commitments.ask(conn, job, transaction_uid=transaction_uid, wait_s=wait_s, now=now)
        elif isinstance(error, Superseded):
            name = "job.cancelled"
            queue.cancel(conn, job, reason=str(error), now=now)
        elif isinstance(error, Reject):
            name = "job.discarded"
            queue.discard(conn, job, error=error, now=now)
        else:
            name = "job.retried" if queue.retry(conn, job, error=error, now=now) else "job.discarded"
    facts = {"status": status, "reason": str(error or ""), "warning": outcome.warning}
    events.emit(
        name,
        kind=job.kind,
        job=job.id,
        study=job.study_id,
        destination=job.destination,
        document=job.document,
        attempt=job.attempt,
        **{name: value for name, value in facts.items() if value},
    )
