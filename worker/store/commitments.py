"""What an archive promised of a document: one row for each time it was asked (PS3.4 Annex J).

::

    asked ──▶ committed            the archive's N-EVENT-REPORT says so
      │  ╲──▶ refused              it says no, or does not find the document: sent again, after `SENDINGS` a dead letter
      ├──▶ found                   no report in time, but a query finds the document   ─┐ a report that comes
      └──▶ unproven                no report in time, and no query is answered         ─┘ later still counts

A row is written with the verdict on the delivery, before the archive is asked: its report may be quicker than its
answer to us, and a crash between the two costs nothing, for `overdue` finds the row. Of a delivery's rows the last counts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from worker import events
from worker.domain import CommitmentReport, Document, Job
from worker.store import documents, history, queue
from worker.store.schema import AnyRow, commitment, document, job

#: A document that the archive lost so often is a dead letter: a person must look at the archive.
SENDINGS: Final = 3

#: PS3.3 §C.14.1.1, Failure Reason (0008,1197).
_REASONS: Final[Mapping[int, str]] = {
    0x0110: "processing failure",
    0x0112: "no such object instance",
    0x0119: "class and instance conflict",
    0x0122: "SOP class not supported",
    0x0131: "duplicate transaction UID",
    0x0213: "resource limitation",
}
_OPEN: Final = ("asked", "found", "unproven")


@dataclass(frozen=True, slots=True)
class Change:
    """What became of one document; `is_final` is a refusal after which it is not sent again."""

    job_id: int
    study_id: int
    destination: str
    state: Literal["committed", "refused", "found", "unproven"]
    reason: str = ""
    is_final: bool = False


def ask(conn: Connection, one: Job, *, transaction_uid: str, wait_s: float, now: datetime) -> None:
    """Note that the archive is asked about a delivery; commit before asking."""
    look_at = now + timedelta(seconds=wait_s)
    conn.execute(sa.insert(commitment).values(job_id=one.id, transaction_uid=transaction_uid, asked_at=now, look_at=look_at))


def turned_down(conn: Connection, transaction_uid: str, *, reason: str, now: datetime) -> None:
    """The archive will not commit to anything: a query must do, at once."""
    waiting = (commitment.c.transaction_uid == transaction_uid, commitment.c.state == "asked")
    conn.execute(sa.update(commitment).where(*waiting).values(look_at=now, reason=reason))


def report(conn: Connection, said: CommitmentReport, *, destinations: Collection[str], now: datetime) -> list[Change] | None:
    """Take in what the archive behind `destinations` says of one transaction; a repetition changes nothing.

    Returns
    -------
    list[Change] | None
        None: the transaction is none of theirs.
    """
    of_transaction = (commitment.c.transaction_uid == said.transaction_uid, job.c.destination.in_(list(destinations)))
    rows = conn.execute(_joined().where(*of_transaction).order_by(commitment.c.id).with_for_update(of=commitment)).all()
    if not rows:
        return None
    changes = []
    for row in rows:
        if row.state not in _OPEN:
            continue
        code = said.failed.get(row.sop_instance_uid)
        if code is not None:
            words = _REASONS.get(code, "a reason that is not in the standard")
            changes.append(_refuse(conn, row, reason=f"{row.destination} does not commit to the document: 0x{code:04X}, {words}.", now=now))
        elif row.sop_instance_uid in said.committed:
            changes.append(_settle(conn, row, "committed", now=now))
    return changes


def overdue(conn: Connection, *, destination: str, limit: int, now: datetime) -> list[tuple[AnyRow, Document]]:
    """What waits for longer than it should, oldest first."""
    late = (commitment.c.state == "asked", commitment.c.look_at <= now, job.c.destination == destination)
    rows = conn.execute(_joined().where(*late).order_by(commitment.c.look_at, commitment.c.id).limit(limit)).all()
    return [(row, documents.load(conn, row.document_id)) for row in rows]


def looked(conn: Connection, row: AnyRow, *, is_found: bool | None, now: datetime) -> Change | None:
    """What a query said of an overdue row (None: it was not answered). None if a report was quicker."""
    still = _joined().where(commitment.c.id == row.id, commitment.c.state == "asked").with_for_update(of=commitment)
    if conn.execute(still).first() is None:
        return None
    silence = row.reason or f"{row.destination} did not say within {(row.look_at - row.asked_at).total_seconds():g} s whether it commits."
    if is_found is False:
        return _refuse(conn, row, reason=f"{silence} A query does not find the document.", now=now)
    return _settle(conn, row, "found" if is_found else "unproven", reason=silence, now=now)


def postpone(conn: Connection, rows: Sequence[AnyRow], *, until: datetime) -> None:
    """The archive is away: look again later."""
    waiting = (commitment.c.id.in_([row.id for row in rows]), commitment.c.state == "asked")
    conn.execute(sa.update(commitment).where(*waiting).values(look_at=until))


def of_document(conn: Connection, document_id: int) -> list[AnyRow]:
    """Destination, state, times and reason of a document, where an archive was asked; the last word of each."""
    newest = sa.select(sa.func.max(commitment.c.id)).group_by(commitment.c.job_id)
    wanted = _joined().where(job.c.document_id == document_id, commitment.c.id.in_(newest)).order_by(job.c.id)
    return list(conn.execute(wanted))


def of_study(conn: Connection, study_id: int) -> list[AnyRow]:
    """Every time that an archive was asked about a document of the study."""
    return list(conn.execute(_joined().where(job.c.study_id == study_id).order_by(commitment.c.id)))


def say(change: Change) -> None:
    """Emit what became of one document."""
    name = {"committed": "commitment.given", "refused": "commitment.denied"}.get(change.state, "commitment.missing")
    facts: dict[str, object] = {"job": change.job_id, "study": change.study_id, "destination": change.destination}
    if change.reason:
        facts["reason"] = change.reason
    events.emit(name, state=change.state, **facts)
    if change.is_final:
        events.emit("job.discarded", kind="deliver", **facts)


def _joined() -> sa.Select[*tuple[AnyRow, ...]]:
    columns = (job.c.study_id, job.c.destination, job.c.document_id, document.c.sop_instance_uid)
    return sa.select(commitment, *columns).select_from(commitment.join(job, commitment.c.job_id == job.c.id).join(document))


def _settle(
    conn: Connection, row: AnyRow, state: Literal["committed", "refused", "found", "unproven"], *, reason: str = "", now: datetime
) -> Change:
    conn.execute(sa.update(commitment).where(commitment.c.id == row.id).values(state=state, answered_at=now, reason=reason))
    facts = {"reason": reason} if reason else {}
    history.note(conn, row.study_id, name=f"commitment.{state}", now=now, destination=row.destination, **facts)
    return Change(row.job_id, row.study_id, row.destination, state, reason)


def _refuse(conn: Connection, row: AnyRow, *, reason: str, now: datetime) -> Change:
    """Send the document again, unless it was asked about anew since, was lost too often, or is one that a note told the archive to hide."""
    change = _settle(conn, row, "refused", reason=reason, now=now)
    of_job = sa.select(commitment.c.id, commitment.c.state).where(commitment.c.job_id == row.job_id)
    rows = conn.execute(of_job).all()
    if any(one.id > row.id for one in rows) or documents.is_marked(conn, row.job_id):
        return change
    refusals = sum(one.state == "refused" for one in rows)
    is_final = refusals >= SENDINGS
    words = f"{reason} It was sent {refusals} times." if is_final else reason
    was_done = queue.reopen(conn, row.job_id, reason=words, delay_s=None if is_final else queue.backoff_s(refusals), now=now)
    return Change(row.job_id, row.study_id, row.destination, "refused", words, is_final and was_done)
