"""Job kind `deliver`: one document to one destination, and back to be sure. Commit 5 of the line.

A document counts as delivered when the PACS gave it back by a query, not when it said Success. A destination may
then be asked to commit to it (commitment.py).
Destinations do not know of each other: one that is down holds up nobody else's jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

from pydicom.uid import generate_uid

from worker import events
from worker.deliver import commitment, cstore, stow
from worker.domain import Job
from worker.errors import Reject, Retry
from worker.ops.log import places
from worker.store import commitments, documents, queue
from worker.store.database import Store


def deliver(
    jobs: Sequence[Job], *, store: Store, peer: cstore.Peer, clock: Callable[[], datetime], commitment_wait_s: float | None = None
) -> list[cstore.Outcome]:
    """Send leased jobs' documents by the destination's door, C-STORE or STOW-RS, and settle each on its own; returns what became of each.

    With `commitment_wait_s` the peer is asked to commit to what it took, and its report is waited for so long.
    """
    with store.read() as conn:
        loaded = [documents.load(conn, job.document_id or 0) for job in jobs]
    try:
        outcomes = (stow if peer.stow_url else cstore).send(loaded, peer=peer)
    except Exception as exc:  # noqa: BLE001  one document must not end the deliveries of a destination
        outcomes = [cstore.Outcome(document.sop_instance_uid, error=Retry(_unforeseen(exc))) for document in loaded]
    transaction_uid = str(generate_uid(prefix=None))  # of random bits: none is ever used twice
    taken = []
    for job, document, outcome in zip(jobs, loaded, outcomes, strict=True):
        try:
            _settle(job, outcome, store=store, now=clock(), transaction_uid=transaction_uid, wait_s=commitment_wait_s)
            taken += [document] if outcome.error is None else []
        except queue.LeaseLost:
            events.emit("job.fenced", job=job.id, kind=job.kind, study=job.study_id)
    if taken and commitment_wait_s is not None:
        commitment.ask(taken, transaction_uid=transaction_uid, store=store, peer=peer, clock=clock)
    return outcomes


def _unforeseen(exc: Exception) -> str:
    return f"Internal error ({type(exc).__name__}) at {'; '.join(places(exc, limit=2))}."


def _settle(job: Job, outcome: cstore.Outcome, *, store: Store, now: datetime, transaction_uid: str, wait_s: float | None) -> None:
    error = outcome.error
    with store.begin() as conn:
        if error is None:
            name = "job.completed"
            queue.complete(conn, job, now=now, status=f"0x{outcome.status:04X}", warning=outcome.warning)
            if wait_s is not None:
                commitments.ask(conn, job, transaction_uid=transaction_uid, wait_s=wait_s, now=now)
        elif isinstance(error, Reject):
            name = "job.discarded"
            queue.discard(conn, job, error=error, now=now)
        else:
            name = "job.retried" if queue.retry(conn, job, error=error, now=now) else "job.discarded"
    facts: dict[str, object] = {"reason": str(error)} if error else {}
    if outcome.warning:
        facts["warning"] = outcome.warning
    events.emit(
        name,
        kind=job.kind,
        job=job.id,
        study=job.study_id,
        destination=job.destination,
        attempt=job.attempt,
        status=outcome.status,
        **facts,
    )
