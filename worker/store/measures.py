"""What monitoring and the plots count: few rows by their index, or what came since the last look. Queries only."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from worker.store import ledger
from worker.store.schema import AnyRow, commitment, document, instance, job, study


def _said(value: str) -> sa.ColumnElement[str]:
    """A word as partial indexes have it, not a parameter."""
    return sa.literal_column(repr(value))


def open_jobs(conn: Connection) -> list[AnyRow]:
    """Unfinished and given up jobs by kind, state, bundle and destination: how many, and when the longest waiting was due."""
    by = (job.c.kind, job.c.state, job.c.bundle, job.c.destination)
    each = sa.select(*by, sa.func.count().label("jobs"), sa.func.min(job.c.not_before).label("due_at")).group_by(*by)
    states = (job.c.state == _said("available"), job.c.state == _said("leased"), job.c.state.in_([_said("discarded"), _said("cancelled")]))
    return [row for state in states for row in conn.execute(each.where(state))]


def counts(conn: Connection) -> dict[tuple[str, str], int]:
    """How many jobs of each kind are in each state."""
    rows = conn.execute(sa.select(job.c.kind, job.c.state, sa.func.count()).group_by(job.c.kind, job.c.state))
    return {(kind, state): count for kind, state, count in rows}


def waiting(conn: Connection) -> dict[str, int]:
    """Why jobs wait for another try or for a record: how many give each reason, the most frequent ten."""
    count = sa.func.count()
    wanted = sa.select(job.c.reason, count).where(job.c.state == "available", job.c.reason != "").group_by(job.c.reason)
    return dict(conn.execute(wanted.order_by(count.desc(), job.c.reason).limit(10)).tuples().all())


def oldest_due_s(conn: Connection, *, now: datetime) -> float:
    """How long the longest waiting due job has been due, in seconds; 0 if none waits."""
    oldest = conn.execute(sa.select(sa.func.min(job.c.not_before)).where(job.c.state == "available", job.c.not_before <= now)).scalar()
    return round((now - oldest).total_seconds(), 1) if oldest else 0.0


def standing(conn: Connection) -> Mapping[str, int]:
    """Studies that are being received, and that are held."""
    count = sa.select(sa.func.count()).select_from(study)
    return {
        "receiving": conn.execute(count.where(study.c.state == _said("receiving"))).scalar_one(),
        "held": conn.execute(count.where(study.c.hold != _said(""))).scalar_one(),
    }


def accounts(conn: Connection) -> dict[str, int]:
    """All studies by the ledger's accounts; a second and more for each hundred thousand."""
    found = dict.fromkeys((*ledger.ACCOUNTS, ledger.LOST), 0)
    for one in ledger.entries(conn, []):
        found[one.account] += one.studies
    return found


def last_instance(conn: Connection) -> int:
    """The newest instance's row; 0 for none."""
    return int(conn.execute(sa.select(sa.func.max(instance.c.id))).scalar() or 0)


def instances_after(conn: Connection, number: int) -> tuple[int, int, int]:
    """Instances since that row: how many, of how many bytes, and the newest's row."""
    size, newest = sa.func.coalesce(sa.func.sum(instance.c.size_bytes), 0), sa.func.coalesce(sa.func.max(instance.c.id), number)
    row = conn.execute(sa.select(sa.func.count(), size, newest).where(instance.c.id > number)).one()
    return int(row[0]), int(row[1]), int(row[2])


def finished(conn: Connection, since: datetime, until: datetime) -> list[AnyRow]:
    """Jobs that ended in that time, until its end, with the time of their study's last image and their document's kind."""
    columns = (job.c.kind, job.c.state, job.c.bundle, job.c.destination, job.c.started_at, job.c.finished_at, job.c.input_version)
    wanted = sa.select(*columns, study.c.last_received_at, study.c.version, document.c.kind.label("document"))
    wanted = wanted.join(study, study.c.id == job.c.study_id).outerjoin(document, document.c.id == job.c.document_id)
    return list(conn.execute(wanted.where(job.c.finished_at > since, job.c.finished_at <= until)))


def ended(conn: Connection, since: datetime, *, limit: int) -> list[tuple[datetime, datetime | None]]:
    """When each root report was delivered and its study's last image had come, the last first; (None: an image came after the report)."""
    last = sa.case((job.c.input_version == study.c.version, study.c.last_received_at))
    wanted = sa.select(job.c.finished_at, last).join(study, study.c.id == job.c.study_id).join(document, document.c.id == job.c.document_id)
    done = (job.c.kind == "deliver", job.c.state == "completed", document.c.kind == "sr", job.c.finished_at > since)
    rows = conn.execute(wanted.where(*done).order_by(job.c.finished_at.desc()).limit(limit)).tuples()
    return [(at, came) for at, came in rows]


def given_up(conn: Connection, since: datetime) -> list[datetime]:
    """When each dead letter since then became one."""
    states = job.c.state.in_([_said("discarded"), _said("cancelled")])
    return list(conn.scalars(sa.select(job.c.finished_at).where(states, job.c.state == "discarded", job.c.finished_at > since)))


def begun(conn: Connection, since: datetime) -> list[datetime]:
    """When the first image of each study came, of those since then."""
    wanted = sa.select(study.c.created_at).where(study.c.last_received_at >= since, study.c.created_at >= since)
    return list(conn.scalars(wanted))


def commitments(conn: Connection) -> int:
    """Reports whose archive was asked to keep them and has not said."""
    waiting = sa.select(sa.func.count()).select_from(commitment).where(commitment.c.state == _said("asked"))
    return int(conn.execute(waiting).scalar_one())


def open_studies(conn: Connection) -> Any:
    """When the oldest study that is still being received had its last image; None where there is none."""
    oldest = sa.select(sa.func.min(study.c.last_received_at)).where(study.c.state == _said("receiving"))
    return conn.execute(oldest).scalar()
