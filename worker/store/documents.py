"""Rows of findings and documents: commit 4 of the line writes them with the job's verdict (the outbox)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from worker.domain import Document, Finding, Job
from worker.store.schema import AnyRow, document, finding
from worker.store.studies import insert_or_ignore


def add(
    conn: Connection, one: Job, *, report: Document, findings: Sequence[Finding], input_sha256: str, failure: str, now: datetime
) -> int:
    """Store a report and its findings; returns the document's row.

    The UID is derived from the input, so a job run twice finds its document there already.
    """
    added = insert_or_ignore(
        conn,
        document,
        {
            "study_id": one.study_id,
            "sop_instance_uid": report.sop_instance_uid,
            "sop_class_uid": report.sop_class_uid,
            "kind": report.kind,
            "bundle": one.bundle,
            "input_version": one.input_version,
            "input_sha256": input_sha256,
            "predecessor_uid": report.predecessor_uid,
            "failure": failure,
            "sha256": hashlib.sha256(report.data).hexdigest(),
            "data": report.data,
            "created_at": now,
        },
    )
    if added is None:
        return int(conn.execute(sa.select(document.c.id).where(document.c.sop_instance_uid == report.sop_instance_uid)).scalar_one())
    for one_finding in findings:
        conn.execute(
            sa.insert(finding).values(
                document_id=added,
                name=one_finding.name,
                code=one_finding.code.value,
                scheme=one_finding.code.scheme,
                meaning=one_finding.code.meaning,
                probability=one_finding.probability,
                threshold=one_finding.threshold,
                verdict=one_finding.verdict,
                shapley=dict(one_finding.shapley),
            )
        )
    return added


def load(conn: Connection, document_id: int) -> Document:
    """One document, as it is to be sent."""
    row = conn.execute(sa.select(document).where(document.c.id == document_id)).one()
    return _document(row)


def predecessor(conn: Connection, study_id: int, *, bundle: str, before_version: int) -> Document | None:
    """The last report of this bundle on an earlier input version of the study."""
    row = conn.execute(
        sa.select(document)
        .where(document.c.study_id == study_id, document.c.bundle == bundle, document.c.input_version < before_version)
        .order_by(document.c.input_version.desc(), document.c.id.desc())
        .limit(1)
    ).first()
    return None if row is None else _document(row)


def of_study(conn: Connection, study_id: int) -> list[tuple[AnyRow, list[AnyRow]]]:
    """A study's documents with their findings, oldest first."""
    rows = conn.execute(sa.select(document).where(document.c.study_id == study_id).order_by(document.c.id)).all()
    return [(row, list(conn.execute(sa.select(finding).where(finding.c.document_id == row.id).order_by(finding.c.id)))) for row in rows]


def _document(row: AnyRow) -> Document:
    return Document(row.sop_instance_uid, row.sop_class_uid, row.kind, bytes(row.data), row.predecessor_uid)
