"""The job table: every statement that touches ``job.state`` is in this file.

::

    available ──lease──▶ leased ──complete──▶ completed
        ▲                  │ ├────discard───▶ discarded   (dead letter: a person looks)
        └─ snooze, retry, ─┘ └────cancel────▶ cancelled
           rescue                revive: back to available when the cause is gone; an operator's retry does so whatever the cause
                                 reopen: completed, back to available, for the archive lost the document

A lease carries a generation (a fencing token). Every verdict is
``UPDATE … WHERE id = ? AND lease_generation = ? AND state = 'leased'``; no row means that the job
is somebody else's by now, and the verdict is turned away with `LeaseLost`.
Attempts are counted when leased, so that a job which kills its worker is counted too.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from functools import cache
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from worker.domain import STAT, Job, JobKind, Lease, PatientKey
from worker.errors import WorkerError
from worker.store import history
from worker.store.database import listed, rows_of
from worker.store.schema import UNFINISHED, AnyRow, document, job, study
from worker.store.studies import insert_or_ignore

#: First retry after about this long, doubling up to the cap; half of it is jitter, so that
#: a recovering PACS is not met by all reports in the same second.
BACKOFF_S: Final = 5.0
BACKOFF_CAP_S: Final = 600.0
#: A study that failed this often is for a person; a delivery has no limit (max_attempts NULL).
INFER_ATTEMPTS: Final = 5


#: Of the document that a job is to bring; NULL: it is an analysis.
_KIND: Final = sa.select(document.c.kind).where(document.c.id == job.c.document_id).scalar_subquery().label("document")


class LeaseLost(WorkerError):
    """The lease expired and the job was given to another, or an operator cancelled it."""


def enqueue_infer(conn: Connection, study_id: int, *, bundle: str, input_version: int, priority: int, now: datetime) -> int | None:
    """Queue one analysis of one input version by one bundle; None if it is queued already."""
    return insert_or_ignore(
        conn,
        job,
        {
            "kind": "infer",
            "study_id": study_id,
            "bundle": bundle,
            "input_version": input_version,
            "unique_key": f"infer/{study_id}/{bundle}/{input_version}",
            "priority": priority,
            "max_attempts": INFER_ATTEMPTS,
            "not_before": now,
            "created_at": now,
        },
    )


def enqueue_deliver(
    conn: Connection, study_id: int, *, document_id: int, bundle: str, input_version: int, destination: str, priority: int, now: datetime
) -> int | None:
    """Queue one document for one destination; None if it is queued already."""
    return insert_or_ignore(
        conn,
        job,
        {
            "kind": "deliver",
            "study_id": study_id,
            "bundle": bundle,
            "input_version": input_version,
            "document_id": document_id,
            "destination": destination,
            "unique_key": f"deliver/{document_id}/{destination}",
            "priority": priority,
            "not_before": now,
            "created_at": now,
        },
    )


def lease(
    conn: Connection,
    kind: JobKind,
    *,
    owner: str,
    limit: int,
    lease_s: float,
    now: datetime,
    bundles: Sequence[str] = (),
    destination: str = "",
) -> list[Job]:
    """Take up to `limit` due jobs, STAT first, then the oldest.

    PostgreSQL skips rows that another worker is taking; SQLite's write lock serves one at a time.
    """
    due = sa.select(job, _KIND).where(job.c.kind == kind, job.c.state == "available", job.c.not_before <= now)
    if bundles:
        due = due.where(job.c.bundle.in_(bundles))
    if destination:
        due = due.where(job.c.destination == destination)
    rows = conn.execute(due.order_by(job.c.priority, job.c.not_before, job.c.id).limit(limit).with_for_update(skip_locked=True)).all()
    if kind == "infer" and rows and rows[0].attempt:
        rows = rows[:1]  # a study that may have killed its worker goes alone, and takes no other with it
    elif kind == "infer":
        rows = [row for row in rows if not row.attempt]
    expires_at = now + timedelta(seconds=lease_s)
    jobs = []
    for row in rows:
        conn.execute(
            sa.update(job)
            .where(job.c.id == row.id)
            .values(
                state="leased",
                attempt=row.attempt + 1,
                is_snoozed=False,
                lease_owner=owner,
                lease_generation=row.lease_generation + 1,
                lease_expires_at=expires_at,
                started_at=row.started_at or now,
            )
        )
        jobs.append(_job(row, owner=owner, expires_at=expires_at, now=now))
    return jobs


def _job(row: AnyRow, *, owner: str, expires_at: datetime, now: datetime) -> Job:
    return Job(
        id=row.id,
        kind=row.kind,
        study_id=row.study_id,
        bundle=row.bundle,
        input_version=row.input_version,
        destination=row.destination,
        document_id=row.document_id,
        attempt=row.attempt + 1,
        priority=row.priority,
        started_at=row.started_at or now,
        lease=Lease(owner, row.lease_generation + 1, expires_at),
        document=row.document or "",
    )


def renew(conn: Connection, jobs: Iterable[Job], *, lease_s: float, now: datetime) -> set[int]:
    """Extend leases; returns the ids of the jobs that are still ours."""
    held = set()
    for one in jobs:
        changed = conn.execute(_held(one).values(lease_expires_at=now + timedelta(seconds=lease_s))).rowcount
        if changed:
            held.add(one.id)
    return held


def complete(conn: Connection, one: Job, *, now: datetime, **facts: object) -> None:
    """Verdict: done.

    Raises
    ------
    LeaseLost
        Another worker has the job; the caller's transaction must be rolled back.
    """
    _settle(conn, one, "completed", reason="", now=now)
    history.note(conn, one.study_id, name=f"{one.kind}.completed", now=now, **_facts(one), **facts)


def discard(conn: Connection, one: Job, *, error: WorkerError | Exception, now: datetime) -> None:
    """Verdict: no attempt will help; kept as a dead letter with its reason."""
    _settle(conn, one, "discarded", reason=_sentence(error), now=now)
    facts = {"reason": _sentence(error), "error": type(error).__name__}
    history.note(conn, one.study_id, name=f"{one.kind}.discarded", now=now, **_facts(one), **facts)


def cancel(conn: Connection, one: Job, *, reason: str, now: datetime) -> None:
    """Verdict: not needed any more."""
    _settle(conn, one, "cancelled", reason=reason, now=now)
    history.note(conn, one.study_id, name=f"{one.kind}.cancelled", now=now, **_facts(one), reason=reason)


def snooze(conn: Connection, one: Job, *, delay_s: float, reason: str, now: datetime) -> None:
    """Verdict: not ready; the attempt is given back. Noted once, not at each look."""
    first = conn.execute(sa.select(job.c.reason).where(job.c.id == one.id)).scalar_one() != reason
    _settle(
        conn,
        one,
        "available",
        reason=reason,
        now=now,
        attempt=one.attempt - 1,
        is_snoozed=True,
        started_at=None,  # the analysis has not begun: the report's time must not come before the record it waits for
        not_before=now + timedelta(seconds=delay_s),
    )
    if first:
        history.note(conn, one.study_id, name=f"{one.kind}.snoozed", now=now, **_facts(one), reason=reason)


def retry(conn: Connection, one: Job, *, error: WorkerError | Exception, now: datetime) -> bool:
    """Verdict: try again later, or discard when the attempts are used up. True if it will be tried."""
    limit = conn.execute(sa.select(job.c.max_attempts).where(job.c.id == one.id)).scalar_one()
    if limit is not None and one.attempt >= limit:
        discard(conn, one, error=error, now=now)
        return False
    delay_s = backoff_s(one.attempt)
    _settle(conn, one, "available", reason=_sentence(error), now=now, not_before=now + timedelta(seconds=delay_s))
    history.note(conn, one.study_id, name=f"{one.kind}.retried", now=now, **_facts(one), reason=_sentence(error), delay_s=round(delay_s, 1))
    return True


def backoff_s(attempt: int) -> float:
    """Seconds before the next attempt: exponential, capped, between half and the whole of it."""
    return min(BACKOFF_CAP_S, BACKOFF_S * 2.0 ** min(attempt - 1, 30)) * random.uniform(0.5, 1.0)  # noqa: S311  jitter, no secret


def rescue(conn: Connection, *, now: datetime) -> list[int]:
    """Give back jobs whose lease ran out; those that used up their attempts become dead letters."""
    late = sa.select(job, _KIND).where(job.c.state == "leased", job.c.lease_expires_at < now)
    rows = conn.execute(late.with_for_update(of=job, skip_locked=True)).all()
    for row in rows:
        is_poison = row.max_attempts is not None and row.attempt >= row.max_attempts
        state = "discarded" if is_poison else "available"
        reason = f"The worker stopped without a verdict in attempt {row.attempt}."
        conn.execute(
            sa.update(job)
            .where(job.c.id == row.id)
            .values(
                state=state, lease_expires_at=None, lease_owner="", reason=reason, not_before=now, finished_at=now if is_poison else None
            )
        )
        said = {"bundle": row.bundle, "version": row.input_version, "attempt": row.attempt}
        said |= {"destination": row.destination, "document": row.document} if row.destination else {}
        history.note(conn, row.study_id, name=f"{row.kind}.rescued", now=now, **said, state=state)
        if is_poison:  # the last word on it: an earlier one, of a cause that may go, must not bring it back
            history.note(conn, row.study_id, name=f"{row.kind}.discarded", now=now, **said, reason=reason, error="LeaseLost")
    return [row.id for row in rows]


_PATIENTS_STUDIES: Final = sa.select(study.c.id).where(study.c.issuer == sa.bindparam("of"), study.c.patient_id == sa.bindparam("whom"))


@cache
def _wake(dialect: str) -> sa.Executable:
    several = sa.select(study.c.id).where(listed(dialect, study.c.issuer, study.c.patient_id))
    due = sa.update(job).where(job.c.kind == "infer", job.c.state == "available", job.c.is_snoozed, job.c.study_id.in_(several))
    return due.values(not_before=sa.bindparam("now"))


def wake(conn: Connection, *, keys: Iterable[PatientKey], now: datetime) -> None:
    """The record of these patients changed: snoozed jobs of their studies are due at once."""
    dialect = conn.dialect.name
    conn.execute(_wake(dialect), {"rows": rows_of(dialect, ((key.issuer, key.patient_id) for key in keys)), "now": now})


def prioritize_order(conn: Connection, *, keys: Iterable[PatientKey], accession_number: str, priority: int) -> None:
    """An order says how urgent its study is: unfinished jobs move forward, never back."""
    for key in keys:
        ordered = _PATIENTS_STUDIES.where(study.c.accession_number == accession_number)
        due = sa.update(job).where(job.c.state == "available", job.c.priority > priority, job.c.study_id.in_(ordered))
        conn.execute(due.values(priority=priority), {"of": key.issuer, "whom": key.patient_id})


def operator_retry(conn: Connection, study_id: int, *, now: datetime, by: str = "") -> int:
    """Put a study's discarded and cancelled jobs back, and those waiting for a later attempt forward."""
    changed = conn.execute(
        sa.update(job)
        .where(job.c.study_id == study_id, job.c.state.in_(("discarded", "cancelled", "available")))
        .values(state="available", attempt=0, is_snoozed=False, not_before=now, finished_at=None)
    ).rowcount
    if changed:
        history.note(conn, study_id, name="operator.retried", now=now, jobs=changed, by=by)
    return changed


def revive(conn: Connection, study_id: int, *, input_version: int, bundles: Iterable[str], now: datetime) -> None:
    """Put back discarded analyses whose cause is gone."""
    wanted = (job.c.kind == "infer", job.c.study_id == study_id, job.c.input_version == input_version, job.c.bundle.in_(list(bundles)))
    changed = conn.execute(
        sa.update(job)
        .where(*wanted, job.c.state == "discarded")
        .values(state="available", attempt=0, is_snoozed=False, reason="", not_before=now, started_at=None, finished_at=None)
    ).rowcount
    if changed:
        history.note(conn, study_id, name="infer.revived", now=now, version=input_version, jobs=changed)


def reopen(conn: Connection, job_id: int, *, reason: str, delay_s: float | None, now: datetime) -> bool:
    """A completed delivery whose document the archive does not have: again after `delay_s`, or never, where that is None.

    False: it is not completed any more, and stays as it is.
    """
    done = (job.c.id == job_id, job.c.state == "completed")
    state, due = ("discarded", now) if delay_s is None else ("available", now + timedelta(seconds=delay_s))
    changed = sa.update(job).where(*done).values(state=state, reason=reason, not_before=due, finished_at=now if delay_s is None else None)
    row = conn.execute(changed.returning(job.c.study_id, job.c.bundle, job.c.input_version, job.c.destination, _KIND)).first()
    if row is not None:
        facts = {"bundle": row.bundle, "version": row.input_version, "destination": row.destination, "document": row.document}
        name = "deliver.discarded" if delay_s is None else "deliver.reopened"
        history.note(conn, row.study_id, name=name, now=now, **facts, reason=reason)
    return row is not None


def dead_analyses(conn: Connection) -> dict[tuple[int, int], list[str]]:
    """(Study, its version) → the bundles whose analysis of it is a dead letter."""
    found: dict[tuple[int, int], list[str]] = {}
    wanted = sa.select(job.c.study_id, job.c.input_version, job.c.bundle).join(study, study.c.id == job.c.study_id)
    is_dead = (job.c.kind == "infer", job.c.state == "discarded", job.c.input_version == study.c.version)
    for study_id, version, bundle in conn.execute(wanted.where(*is_dead).order_by(job.c.study_id, job.c.id)):
        found.setdefault((study_id, version), []).append(bundle)
    return found


def operator_cancel(conn: Connection, study_id: int, *, now: datetime, by: str = "") -> int:
    """Cancel a study's unfinished jobs; one that is being worked on loses its lease."""
    changed = conn.execute(
        sa.update(job)
        .where(job.c.study_id == study_id, job.c.state.in_(UNFINISHED))
        .values(state="cancelled", lease_expires_at=None, lease_owner="", finished_at=now, reason="Cancelled by an operator.")
    ).rowcount
    if changed:
        history.note(conn, study_id, name="operator.cancelled", now=now, jobs=changed, by=by)
    return changed


def hold(conn: Connection, destination: str, *, reason: str, now: datetime) -> None:
    """Say of a destination's due jobs why nobody takes them: it is left alone. They stay due."""
    due = (job.c.kind == "deliver", job.c.state == "available", job.c.destination == destination, job.c.not_before <= now)
    conn.execute(sa.update(job).where(*due).values(reason=reason))


def release(conn: Connection, destination: str, *, now: datetime) -> None:
    """A destination is back: what waits for it waits for nothing any more."""
    waiting = (job.c.kind == "deliver", job.c.state == "available", job.c.destination == destination)
    conn.execute(sa.update(job).where(*waiting).values(reason="", not_before=now))


def of_version(conn: Connection, study_id: int, *, input_version: int) -> list[AnyRow]:
    """The analyses of one input version of a study: bundle, state, priority."""
    wanted = sa.select(job.c.bundle, job.c.state, job.c.priority)
    return list(conn.execute(wanted.where(job.c.kind == "infer", job.c.study_id == study_id, job.c.input_version == input_version)))


def prioritize(conn: Connection, study_id: int, *, now: datetime, priority: int = STAT, by: str = "") -> int:
    """Move a study's unfinished jobs forward in the queue, those in hand too, which may be tried again; how many."""
    is_behind = (job.c.study_id == study_id, job.c.state.in_(UNFINISHED), job.c.priority > priority)
    changed = conn.execute(sa.update(job).where(*is_behind).values(priority=priority)).rowcount
    if changed:
        history.note(conn, study_id, name="operator.prioritized", now=now, jobs=changed, by=by)
    return changed


def of_study(conn: Connection, study_id: int) -> list[AnyRow]:
    """The jobs of a study with their documents' kinds, oldest first."""
    return list(conn.execute(sa.select(job, _KIND).where(job.c.study_id == study_id).order_by(job.c.id)))


def _held(one: Job) -> sa.Update:
    return sa.update(job).where(job.c.id == one.id, job.c.lease_generation == one.lease.generation, job.c.state == "leased")


def _settle(conn: Connection, one: Job, state: str, *, reason: str, now: datetime, **values: object) -> None:
    finished = state in {"completed", "discarded", "cancelled"}
    changed = conn.execute(
        _held(one).values(
            state=state, reason=reason, lease_owner="", lease_expires_at=None, finished_at=now if finished else None, **values
        )
    ).rowcount
    if not changed:
        raise LeaseLost(f"Job {one.id} is no longer leased to generation {one.lease.generation}.")


def _facts(one: Job) -> dict[str, object]:
    facts: dict[str, object] = {"bundle": one.bundle, "version": one.input_version, "attempt": one.attempt}
    if one.destination:
        facts |= {"destination": one.destination, "document": one.document}
    return facts


def _sentence(error: Exception) -> str:
    """A typed error speaks for itself; any other may quote its input, so only its type is kept."""
    return str(error) if isinstance(error, WorkerError) else f"Internal error ({type(error).__name__}); see the log."
