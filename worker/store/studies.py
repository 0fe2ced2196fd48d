"""Rows of studies, series and instances: what was received, and when a study is complete.

``add_instance`` is commit 1 of the line (worker/README.md): after it, C-STORE may answer 0x0000.
``complete`` is commit 2: the study and its jobs, together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from worker.domain import Header, Patient, PatientKey, Received, Series, Study
from worker.selection import holds_image, takes
from worker.store import history, images
from worker.store.schema import AnyRow, document, instance, job, series, study

#: When a study without a date was made: no value can be shown to be older, so none is used for it.
UNDATED: Final = datetime(1900, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Pending:
    """A study that is still being received, as the completeness sweep sees it."""

    id: int
    study_instance_uid: str
    calling_ae: str
    address: str
    instances: int
    expected_instances: int | None
    asked_at: datetime | None
    last_received_at: datetime
    quiet_until: datetime
    created_at: datetime
    #: Objects by modality and SOP class; each frame counts.
    classes: Mapping[tuple[str, str], int]
    patient: PatientKey
    accession_number: str


# Statements of `add_instance`, built once: building them for each instance took 1.3 of its 1.6 ms of CPU.
_OF_STUDY: Final = study.c["id", "issuer", "patient_id", "state", "version", "study_at", "removed_at"]
_STUDY: Final = sa.select(*_OF_STUDY).where(study.c.study_instance_uid == sa.bindparam("uid")).with_for_update(key_share=True)
_SERIES: Final = sa.select(series.c.id).filter_by(study_id=sa.bindparam("study"), series_instance_uid=sa.bindparam("uid"))
_KNOWN: Final = sa.select(instance.c.id, instance.c.sha256, instance.c.removed_at, series.c.study_id).where(
    instance.c.sop_instance_uid == sa.bindparam("uid"), instance.c.series_id == series.c.id
)
#: A summary page is an image as any other: analysed again for it, what failed would make another, for ever where all is forwarded.
_OWN: Final = sa.select(document.c.id).where(document.c.sop_instance_uid == sa.bindparam("uid"))
_TOUCHED: Final = sa.update(study).where(study.c.id == sa.bindparam("study")).values(state="receiving", removed_at=None)
_TOUCH: Final = _TOUCHED.values(last_received_at=sa.bindparam("now"), quiet_until=sa.bindparam("quiet"))


@cache
def _insert_or_ignore(table: sa.Table, dialect: str, names: tuple[str, ...]) -> sa.Executable:
    insert = (sqlite.insert if dialect == "sqlite" else postgresql.insert)(table)
    return insert.values({name: sa.bindparam(name) for name in names}).on_conflict_do_nothing().returning(table.c.id)


def insert_or_ignore(conn: Connection, table: sa.Table, values: Mapping[str, object]) -> int | None:
    """Insert a row; None if a unique key is taken. One statement in both databases."""
    return conn.execute(_insert_or_ignore(table, conn.dialect.name, tuple(values)), values).scalar()


def add_instance(
    conn: Connection,
    header: Header,
    *,
    path: Path,
    sha256: str,
    size_bytes: int,
    calling_ae: str,
    address: str,
    study_at: datetime | None,
    quiet_s: float,
    now: datetime,
) -> Received:
    """Record one stored instance; a complete study opens again, unless what came has no image or is our own: our documents come back to us.

    Returns
    -------
    Received
        DUPLICATE and CONFLICT leave every row as it was; OTHER_PATIENT keeps the instance and
        puts the study on hold, for a person to decide whose it is. What comes again after [retention] is STORED, without a new version.
    """
    study_row = _study_of(conn, header, calling_ae=calling_ae, address=address, study_at=study_at, quiet_s=quiet_s, now=now)
    series_id = _series_of(conn, study_row.id, header)
    added = insert_or_ignore(
        conn,
        instance,
        {
            "series_id": series_id,
            "sop_instance_uid": header.sop_instance_uid,
            "sop_class_uid": header.sop_class_uid,
            "transfer_syntax_uid": header.transfer_syntax_uid,
            "path": str(path),
            "sha256": sha256,
            "size_bytes": size_bytes,
            "view": header.view,
            "frames": header.number_of_frames,
            "facts": images.encoded(header.facts),
            "received_at": now,
        },
    )
    if added is None:
        known = conn.execute(_KNOWN, {"uid": header.sop_instance_uid}).one()
        if known.sha256 == sha256:
            return Received.DUPLICATE if known.removed_at is None else _returned(conn, study_row, known.id, quiet_s=quiet_s, now=now)
        reason = "same SOP Instance UID, other bytes"
        for study_id in sorted({known.study_id, study_row.id}):  # the other bytes may name another study
            history.note(conn, study_id, name="instance.quarantined", now=now, instance=known.id, reason=reason)
        return Received.CONFLICT
    result = Received.STORED
    if PatientKey(study_row.issuer, study_row.patient_id) != header.patient.key:
        hold = "The images of this study name two different patients; nothing was analysed."
        conn.execute(sa.update(study).where(study.c.id == study_row.id).values(hold=hold))
        history.note(conn, study_row.id, name="study.held", now=now, reason="another patient in the same study")
        result = Received.OTHER_PATIENT
    is_image = takes((), header.modality) and holds_image(header.sop_class_uid)
    is_late = study_row.state == "complete" and result is Received.STORED
    if is_late and not (is_image and conn.execute(_OWN, {"uid": header.sop_instance_uid}).first() is None):
        history.note(conn, study_row.id, name="document.received", now=now, reason=f"{header.modality}: no image to analyse")
        conn.execute(sa.update(study).where(study.c.id == study_row.id).values(removed_at=None))
        return result
    if study_at is not None and (study_row.study_at is None or study_at < study_row.study_at):
        # Whichever image came first, a value must be older than the earliest of them.
        conn.execute(sa.update(study).where(study.c.id == study_row.id).values(study_at=study_at))
    if study_row.state == "complete":
        history.note(conn, study_row.id, name="study.reopened", now=now, version=study_row.version)
    conn.execute(_TOUCH, {"study": study_row.id, "now": now, "quiet": now + timedelta(seconds=quiet_s)})
    return result


def _returned(conn: Connection, study_row: AnyRow, instance_id: int, *, quiet_s: float, now: datetime) -> Received:
    """A file that went under [retention] is here again: kept as long again, and nothing new to analyse."""
    conn.execute(sa.update(instance).where(instance.c.id == instance_id).values(removed_at=None, received_at=now))
    if study_row.removed_at is not None:
        history.note(conn, study_row.id, name="images.returned", now=now)
    if study_row.state == "receiving":
        conn.execute(_TOUCH, {"study": study_row.id, "now": now, "quiet": now + timedelta(seconds=quiet_s)})
    else:
        conn.execute(sa.update(study).where(study.c.id == study_row.id).values(removed_at=None, last_received_at=now))
    return Received.STORED


def _study_of(
    conn: Connection, header: Header, *, calling_ae: str, address: str, study_at: datetime | None, quiet_s: float, now: datetime
) -> AnyRow:
    wanted = {"uid": header.study_instance_uid}
    row = conn.execute(_STUDY, wanted).first()
    if row is None:
        # Two associations may bring a study's first images at once: the second finds the first's row.
        added = insert_or_ignore(
            conn,
            study,
            {
                "study_instance_uid": header.study_instance_uid,
                "issuer": header.patient.key.issuer,
                "patient_id": header.patient.key.patient_id,
                "patient_name": header.patient.name,
                "birth_date": header.patient.birth_date,
                "sex": header.patient.sex,
                "accession_number": header.accession_number,
                "description": header.study_description,
                "study_at": study_at,
                "created_at": now,
                "last_received_at": now,
                "quiet_until": now + timedelta(seconds=quiet_s),
                "calling_ae": calling_ae,
                "address": address,
            },
        )
        if added is not None:
            history.note(conn, added, name="study.received", now=now, calling_ae=calling_ae)
        row = conn.execute(_STUDY, wanted).one()
    return row


def _series_of(conn: Connection, study_id: int, header: Header) -> int:
    wanted = {"study": study_id, "uid": header.series_instance_uid}
    found = conn.execute(_SERIES, wanted).scalar()
    if found is None:
        insert_or_ignore(
            conn,
            series,
            {
                "study_id": study_id,
                "series_instance_uid": header.series_instance_uid,
                "modality": header.modality,
                "body_part": header.facts.body_part,
                "description": header.series_description,
                "orientation": header.facts.orientation,
                "slice_mm": header.facts.slice_mm,
            },
        )
        found = conn.execute(_SERIES, wanted).scalar_one()
    return int(found)


def receiving(conn: Connection) -> list[Pending]:
    """Studies not complete yet, the longest waiting first."""
    rows = conn.execute(sa.select(study).where(study.c.state == "receiving").order_by(study.c.quiet_until)).all()
    if not rows:
        return []
    frames: dict[int, dict[tuple[str, str], int]] = {}
    counts: dict[int, int] = {}
    of_one = sa.case((instance.c.frames > 0, instance.c.frames), else_=1)
    per_class = (
        sa.select(series.c.study_id, series.c.modality, instance.c.sop_class_uid, sa.func.count(instance.c.id), sa.func.sum(of_one))
        .join(instance, instance.c.series_id == series.c.id)
        .join(study, study.c.id == series.c.study_id)
        .where(study.c.state == "receiving")  # in the same view as the rows; of their numbers PostgreSQL takes no more than 65535
        .group_by(series.c.study_id, series.c.modality, instance.c.sop_class_uid)
    )
    for study_id, modality, sop_class_uid, count, of_all in conn.execute(per_class):
        frames.setdefault(study_id, {})[modality, sop_class_uid] = int(of_all)
        counts[study_id] = counts.get(study_id, 0) + count
    return [
        Pending(
            id=row.id,
            study_instance_uid=row.study_instance_uid,
            calling_ae=row.calling_ae,
            address=row.address,
            instances=counts.get(row.id, 0),
            expected_instances=row.expected_instances,
            asked_at=row.asked_at,
            last_received_at=row.last_received_at,
            quiet_until=row.quiet_until,
            created_at=row.created_at,
            classes=frames.get(row.id, {}),
            patient=PatientKey(row.issuer, row.patient_id),
            accession_number=row.accession_number,
        )
        for row in rows
    ]


def note_expected(conn: Connection, study_id: int, *, expected: int | None, now: datetime) -> None:
    """Remember how many instances the sender says the study has, and when it was asked."""
    conn.execute(sa.update(study).where(study.c.id == study_id).values(expected_instances=expected, asked_at=now))


def complete(conn: Connection, pending: Pending, *, cause: str, now: datetime) -> int | None:
    """Mark a study complete; returns its new input version, None if an image came meanwhile."""
    done = conn.execute(
        sa.update(study)
        .where(study.c.id == pending.id, study.c.state == "receiving", study.c.last_received_at == pending.last_received_at)
        .values(state="complete", version=study.c.version + 1, completed_at=now)
        .returning(study.c.version)
    ).scalar()
    if done is not None:
        history.note(conn, pending.id, name="study.completed", now=now, version=done, instances=pending.instances, cause=cause)
    return done


def record_changed(conn: Connection) -> list[tuple[int, datetime]]:
    """Complete studies whose patient's record changed since they were analysed, and when; the longest waiting first.

    Those that are being received stay marked until they are complete.
    """
    is_marked = study.c.record_changed_at.is_not(None), study.c.state == "complete"
    changed = sa.select(study.c.id, study.c.record_changed_at).where(*is_marked)
    return [(row.id, row.record_changed_at) for row in conn.execute(changed.order_by(study.c.record_changed_at))]


def record_changed_at(conn: Connection, study_id: int) -> datetime | None:
    """When the patient's record last changed; None if that was looked at. It moves with every change while jobs are unfinished."""
    found: datetime | None = conn.execute(sa.select(study.c.record_changed_at).where(study.c.id == study_id)).scalar_one()
    return found


def note_record_seen(conn: Connection, study_id: int, *, changed_at: datetime, version: int) -> bool:
    """The change of `changed_at` has been looked at, for this version; False where record or study changed meanwhile: it stays marked."""
    as_seen = study.c.record_changed_at == changed_at, study.c.version == version, study.c.state == "complete"
    return conn.execute(sa.update(study).where(study.c.id == study_id, *as_seen).values(record_changed_at=None)).rowcount == 1


def new_version(conn: Connection, study_id: int, *, now: datetime, cause: str) -> int:
    """The same images, but other input: returns the study's new input version."""
    version = conn.execute(
        sa.update(study).where(study.c.id == study_id).values(version=study.c.version + 1).returning(study.c.version)
    ).scalar_one()
    history.note(conn, study_id, name="study.renewed", now=now, version=version, cause=cause)
    return int(version)


def load(conn: Connection, study_id: int, *, root: Path = Path()) -> Study:
    """A study with its series and instances, whose files lie below `root`."""
    row = conn.execute(sa.select(study).where(study.c.id == study_id)).one()
    return _study(row, images.of_study(conn, study_id, root))


def standing(conn: Connection, study_id: int) -> tuple[str, int]:
    """Why a study is held ('' if it is not) and its version; nobody else changes its row until the commit."""
    row = conn.execute(sa.select(study.c.hold, study.c.version).where(study.c.id == study_id).with_for_update(key_share=True)).one()
    return row.hold, row.version


def _study(row: AnyRow, parts: Iterable[Series] = ()) -> Study:
    return Study(
        study_instance_uid=row.study_instance_uid,
        patient=Patient(PatientKey(row.issuer, row.patient_id), row.patient_name, row.birth_date, row.sex),
        accession_number=row.accession_number,
        study_at=row.study_at or UNDATED,
        description=row.description,
        version=row.version,
        series=tuple(parts),
        completed_at=row.completed_at,
        hold=row.hold,
        is_complete=row.state == "complete",
    )


def find(conn: Connection, wanted: str) -> list[tuple[int, Study]]:
    """Studies whose Study Instance UID or accession number is `wanted`, or whose row number it is."""
    if not wanted:  # what many studies have as their accession number
        return []
    match = sa.or_(study.c.study_instance_uid == wanted, study.c.accession_number == wanted)
    if wanted.isdecimal() and len(wanted) < 16:
        match = sa.or_(match, study.c.id == int(wanted))
    rows = conn.execute(sa.select(study).where(match).order_by(study.c.id)).all()
    return [(row.id, _study(row, images.of_study(conn, row.id))) for row in rows]


def uids(conn: Connection) -> list[str]:
    """The Study Instance UIDs of all studies, oldest first."""
    return list(conn.scalars(sa.select(study.c.study_instance_uid).order_by(study.c.id)))


@dataclass(frozen=True, slots=True)
class Line:
    """One study in a list: where it stands."""

    id: int
    study_instance_uid: str
    state: str
    modalities: str
    instances: int
    version: int
    last_received_at: datetime
    jobs: str
    reports: int
    calling_ae: str
    address: str


def recent(conn: Connection, *, limit: int | None, is_discarded: bool = False, since: datetime = UNDATED) -> list[Line]:
    """The studies of which an image came last, newest first; on wish only those with a dead letter, or with an image since then."""
    wanted = sa.select(study).where(study.c.last_received_at >= since)
    wanted = wanted.order_by(study.c.last_received_at.desc(), study.c.id.desc()).limit(limit)
    if is_discarded:
        wanted = wanted.where(study.c.id.in_(sa.select(job.c.study_id).where(job.c.state == "discarded")))
    rows = conn.execute(wanted).all()
    return [_line(conn, row) for row in rows]


def _line(conn: Connection, row: AnyRow) -> Line:
    parts = conn.execute(
        sa.select(series.c.modality, sa.func.count(instance.c.id))
        .join(instance, instance.c.series_id == series.c.id)
        .where(series.c.study_id == row.id)
        .group_by(series.c.modality)
    ).all()
    of_kind = (job.c.kind, job.c.state)
    jobs = conn.execute(sa.select(*of_kind, sa.func.count()).where(job.c.study_id == row.id).group_by(*of_kind)).all()
    ours = (document.c.study_id == row.id, document.c.sop_class_uid != "")  # the others went to no archive
    reports = conn.execute(sa.select(sa.func.count()).select_from(document).where(*ours)).scalar_one()
    return Line(
        id=row.id,
        study_instance_uid=row.study_instance_uid,
        state="hold" if row.hold else row.state,
        modalities="/".join(sorted(modality for modality, _ in parts)),
        instances=sum(count for _, count in parts),
        version=row.version,
        last_received_at=row.last_received_at,
        jobs=", ".join(f"{count} {kind} {state}" for kind, state, count in sorted(tuple(r) for r in jobs)),
        reports=reports,
        calling_ae=row.calling_ae,
        address=row.address,
    )


def counts(conn: Connection) -> dict[str, int]:
    """How many studies are being received, complete or on hold."""
    state = sa.case((study.c.hold != "", "hold"), else_=study.c.state)
    return dict(conn.execute(sa.select(state, sa.func.count()).group_by(state)).tuples().all())


def known_paths(conn: Connection, paths: Sequence[str]) -> dict[str, bool]:
    """Which of these spool files (paths below the spool's instances) have a row; and whether it says that the file is to be gone."""
    named = sa.select(instance.c.path, instance.c.removed_at.is_not(None)).where(instance.c.path.in_(paths))
    return dict(conn.execute(named).tuples().all())
