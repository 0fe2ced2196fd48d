"""Rows of findings and documents: commit 4 of the line writes them with the job's verdict (the outbox)."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from datetime import datetime
from typing import Final

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from worker.domain import Code, Document, Finding, Job, Patient, PatientKey, Saliency
from worker.store.schema import UNFINISHED, AnyRow, document, finding, job, study
from worker.store.studies import insert_or_ignore

#: Of all forms of one result the root report stands for it.
_IS_ROOT: Final = document.c.kind == "sr"

_note, _of_note = document.alias("note"), job.alias("of_note")
#: Of a delivery: a rejection note of a later version was delivered to the same destination. A note itself is never marked.
_IS_MARKED: Final = sa.and_(
    job.c.document_id.not_in(sa.select(document.c.id).where(document.c.study_id == job.c.study_id, document.c.kind == "rejection")),
    sa.exists().where(
        *(_of_note.c[name] == job.c[name] for name in ("study_id", "kind", "bundle", "destination")),
        _of_note.c.input_version > job.c.input_version,
        _of_note.c.state == "completed",
        _note.c.id == _of_note.c.document_id,
        _note.c.kind == "rejection",
    ),
)


def add(
    conn: Connection,
    one: Job,
    *,
    report: Document,
    findings: Sequence[Finding],
    input_sha256: str,
    failure: str,
    now: datetime,
    record_sha256: str = "",
) -> int:
    """Store a root report and its findings, or another form of them without; returns the document's row.

    The UID is derived from the input and the predecessor, so a job run twice finds its document there already.
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
            "record_sha256": record_sha256,
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
                attributions=dict(one_finding.attributions),
                is_atypical=one_finding.is_atypical,
                saliency=_packed(one_finding.saliency),
            )
        )
    return added


def load(conn: Connection, document_id: int) -> Document:
    """One document, as it is to be sent."""
    row = conn.execute(sa.select(document).where(document.c.id == document_id)).one()
    return _document(row)


def hold_of(conn: Connection, study_id: int) -> str:
    """Why a study is held, '' if it is not: then nothing of it is sent."""
    return str(conn.execute(sa.select(study.c.hold).where(study.c.id == study_id)).scalar_one())


def is_superseded(conn: Connection, document_id: int) -> bool:
    """Whether there is a later document of the same kind, bundle and study."""
    own, later = document.alias("own"), document.alias("later")
    same = [later.c[name] == own.c[name] for name in ("study_id", "bundle", "kind")]
    found = sa.select(later.c.id).join(own, sa.and_(*same, later.c.id > own.c.id)).where(own.c.id == document_id).limit(1)
    return conn.execute(found).first() is not None


def owner(conn: Connection, study_id: int) -> tuple[str, Patient, str]:
    """Study Instance UID, patient and accession number: of whom a document says something that is no DICOM object."""
    row = conn.execute(sa.select(study).where(study.c.id == study_id)).one()
    return row.study_instance_uid, Patient(PatientKey(row.issuer, row.patient_id), row.patient_name), row.accession_number


def root_delivery(conn: Connection, one: Job) -> str:
    """State of the job that brings the root report of the same analysis to the same destination; "completed" if it gets none."""
    same = (job.c.study_id == one.study_id, job.c.bundle == one.bundle, job.c.input_version == one.input_version)
    of_root = sa.select(job.c.state).join(document, document.c.id == job.c.document_id).where(*same, _IS_ROOT)
    state = conn.execute(of_root.where(job.c.kind == "deliver", job.c.destination == one.destination).order_by(job.c.id.desc())).scalar()
    return str(state or "completed")


def is_older_on_its_way(conn: Connection, one: Job) -> bool:
    """Whether something of the bundle on an earlier version of the study is still to come to the same destination."""
    earlier = (job.c.study_id == one.study_id, job.c.bundle == one.bundle, job.c.input_version < one.input_version)
    waiting = (job.c.kind == "deliver", job.c.destination == one.destination, job.c.state.in_(UNFINISHED))
    return conn.execute(sa.select(job.c.id).where(*earlier, *waiting).limit(1)).first() is not None


def is_marked(conn: Connection, job_id: int) -> bool:
    """Whether a note was taken where this job took its document, of a later version: an archive may hide the document, and refuse it."""
    return conn.execute(sa.select(job.c.id).where(job.c.id == job_id, _IS_MARKED)).first() is not None


def delivered(conn: Connection, *, destination: str, since: datetime) -> list[AnyRow]:
    """Job, study and document of each delivery to `destination` since then, the newest first; without what a note there has marked."""
    done = (job.c.kind == "deliver", job.c.state == "completed", job.c.destination == destination, job.c.finished_at >= since)
    wanted = sa.select(job.c.id, job.c.study_id, job.c.document_id).where(*done, ~_IS_MARKED)
    return list(conn.execute(wanted.order_by(job.c.finished_at.desc(), job.c.id.desc())))


def predecessor(conn: Connection, study_id: int, *, bundle: str, before_version: int) -> Document | None:
    """The last report of this bundle on an earlier input version of the study."""
    row = conn.execute(
        sa.select(document)
        .where(document.c.study_id == study_id, document.c.bundle == bundle, document.c.input_version < before_version, _IS_ROOT)
        .order_by(document.c.input_version.desc(), document.c.id.desc())
        .limit(1)
    ).first()
    return None if row is None else _document(row)


def is_repeated(conn: Connection, study_id: int, *, bundle: str, before_version: int, input_sha256: str) -> bool:
    """Whether the bundle's last report, on whatever earlier version, rests on this very input: the same would be said again."""
    last = (
        sa.select(document.c.input_sha256)
        .where(document.c.study_id == study_id, document.c.bundle == bundle, document.c.input_version < before_version, _IS_ROOT)
        .order_by(document.c.input_version.desc(), document.c.id.desc())
        .limit(1)
    )
    return bool(conn.execute(last).scalar() == input_sha256)


def record_digests(conn: Connection, study_id: int) -> dict[str, str | None]:
    """Bundle → what its last report on the study, of whatever version, was made from of the patient's record; None: not known."""
    rows = conn.execute(
        sa.select(document.c.bundle, document.c.record_sha256)
        .where(document.c.study_id == study_id, _IS_ROOT)
        .order_by(document.c.input_version, document.c.id)
    )
    return dict(rows.tuples().all())


def of_study(conn: Connection, study_id: int) -> list[tuple[AnyRow, list[AnyRow]]]:
    """A study's documents with their findings, oldest first; without saliency, which nobody reads in a list."""
    rows = conn.execute(sa.select(document).where(document.c.study_id == study_id).order_by(document.c.id)).all()
    told = sa.select(*(column for column in finding.c if column is not finding.c.saliency)).order_by(finding.c.id)
    return [(row, list(conn.execute(told.where(finding.c.document_id == row.id)))) for row in rows]


def findings(conn: Connection, document_id: int) -> tuple[Finding, ...]:
    """The findings of one document as they were added, saliency and all."""
    rows = conn.execute(sa.select(finding).where(finding.c.document_id == document_id).order_by(finding.c.id))
    return tuple(
        Finding(
            name=row.name,
            code=Code(row.code, row.scheme, row.meaning),
            probability=row.probability,
            threshold=row.threshold,
            verdict=row.verdict,
            shapley=row.shapley,
            attributions=row.attributions,
            is_atypical=row.is_atypical,
            saliency=_unpacked(row.saliency),
        )
        for row in rows
    )


def _packed(maps: Sequence[Saliency]) -> bytes | None:
    """Arrays by ``<number>.<field>`` in one .npz; None for none."""
    if not maps:
        return None
    arrays: dict[str, np.typing.NDArray[np.generic]] = {}
    for number, one in enumerate(maps):
        arrays[f"{number}.array"], arrays[f"{number}.image"] = one.array, np.array(one.image)
        arrays[f"{number}.sop_instance_uids"] = np.array(one.sop_instance_uids, dtype=np.str_)
        if one.affine is not None:
            arrays[f"{number}.affine"] = one.affine
    out = io.BytesIO()
    np.savez_compressed(out, allow_pickle=False, **arrays)
    return out.getvalue()


def _unpacked(data: bytes | None) -> tuple[Saliency, ...]:
    if data is None:
        return ()
    with np.load(io.BytesIO(data), allow_pickle=False) as found:
        return tuple(
            Saliency(
                array=found[f"{number}.array"],
                affine=found.get(f"{number}.affine"),
                image=str(found[f"{number}.image"]),
                sop_instance_uids=tuple(found[f"{number}.sop_instance_uids"].tolist()),
            )
            for number in range(sum(name.endswith(".array") for name in found))
        )


def _document(row: AnyRow) -> Document:
    return Document(row.sop_instance_uid, row.sop_class_uid, row.kind, bytes(row.data), row.predecessor_uid, row.sha256)
