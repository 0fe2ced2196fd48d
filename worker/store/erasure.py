"""What goes again: facts and raw messages past their time, and all of one patient, with a receipt.

::

    expire   by the calendar: raw bytes, values, texts received longer ago than the site keeps them
    erase    by request: every row of one (issuer, patient ID) ─▶ Receipt ─▶ caller: commit, delete `paths`, `purge`

Nothing goes that a job still needs. Not here: files (spool.py), reports in the PACS, backups; the receipt says so.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import unicodedata
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Final, TypedDict

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from worker import __version__
from worker.domain import PatientKey
from worker.errors import WorkerError
from worker.store import history, persons, records
from worker.store.database import Store
from worker.store.schema import (
    UNFINISHED,
    AnyRow,
    commitment,
    demographics,
    document,
    event,
    finding,
    imaging_order,
    instance,
    job,
    merge,
    message,
    observation,
    patient,
    review,
    series,
    study,
)

#: Patients, and messages, of one transaction: SQLite's other writers wait for it, some tenths of a second.
BATCH: Final = 100
#: Facts looked at in one reading.
_PAGE: Final = 2000
_ENCODINGS: Final = ("utf-8", "latin-1", "utf-16-le", "utf-16-be")
SCOPE: Final = (
    "Exactly this issuer and patient ID. Other IDs that were merged with it keep their own rows: erase each of them too. "
    "Not reached: reports already in a PACS, quarantined files, backups."
)


class NotErased(WorkerError):
    """Nothing was erased; the sentence says what to do first."""


class Receipt(TypedDict):
    """What was erased, without saying of whom to anybody who does not know the patient ID; see `is_of`.

    ``counts`` is rows by kind; ``raw_messages`` lost their bytes and keep their row. ``paths`` are the spool files of the
    erased instances, to be deleted after the commit.
    """

    at: str
    program: str
    salt: str
    patient_sha256: str
    scope: str
    counts: dict[str, int]
    paths: list[str]


# --- by the calendar


def expire(store: Store, *, now: datetime, keep_raw_days: int, keep_values_days: int, keep_texts_days: int) -> dict[str, int]:
    """Delete what was received longer ago than so many days (0: keep for ever); returns how many went, by kind.

    Raw bytes go, their rows stay and are counted. Facts stay while a study of the person is received or a job of it is not
    finished, and while a later statement of the same fact stays, which might otherwise stand uncorrected. Candidates are sought
    without a lock, and go `BATCH` by `BATCH`, each its own transaction. Keep values longer than the look-back of a bundle and the
    time in which reports are made anew, or those will miss them.
    """
    gone = {"raw": _expire_raw(store, now - timedelta(days=keep_raw_days)) if keep_raw_days > 0 else 0}
    for name, days in {"values": keep_values_days, "texts": keep_texts_days}.items():
        gone[name] = _expire_facts(store, now - timedelta(days=days), is_text=name == "texts") if days > 0 else 0
    return gone


def _expire_raw(store: Store, before: datetime) -> int:
    gone = 0
    for rows in _pages(store, message.c.id, sa.and_(message.c.raw.is_not(None), message.c.received_at < before), size=BATCH):
        with store.begin() as conn:
            gone += conn.execute(sa.update(message).where(message.c.id.in_([row.id for row in rows])).values(raw=None)).rowcount
    return gone


def _expire_facts(store: Store, before: datetime, *, is_text: bool) -> int:
    old = sa.and_(observation.c.received_at < before, (observation.c.kind == "text") if is_text else (observation.c.kind != "text"))
    gone, seen = 0, set[int]()
    for rows in _pages(store, observation.c.patient_pk, old, size=_PAGE):
        patients = sorted({row.patient_pk for row in rows} - seen)
        seen.update(patients)
        for start in range(0, len(patients), BATCH):
            with store.begin() as conn:
                gone += sum(_expire_of(conn, patient_pk, old, before) for patient_pk in patients[start : start + BATCH])
    return gone


def _expire_of(conn: Connection, patient_pk: int, old: sa.ColumnElement[bool], before: datetime) -> int:
    person = records.person_of(conn, patient_pk)
    if _is_busy(conn, person):
        return 0
    return _delete(conn, observation, sa.and_(observation.c.patient_pk == patient_pk, old, _is_past(person, before)))


def _pages(store: Store, column: sa.Column[int], due: sa.ColumnElement[bool], *, size: int) -> Iterator[Sequence[AnyRow]]:
    """Yield one column of the rows that are due, by the index of when they were received; nothing is locked between two pages."""
    table = column.table
    at, number, wanted = table.c.received_at, table.c.id, sa.select(column, table.c.received_at, table.c.id).where(due)
    rest: sa.ColumnElement[bool] = sa.true()
    while True:
        with store.read() as conn:
            rows = conn.execute(wanted.where(rest).order_by(at, number).limit(size)).all()
        if rows:
            yield rows
        if len(rows) < size:
            return
        last = rows[-1]
        rest = sa.and_(at >= last.received_at, sa.or_(at > last.received_at, number > last.id))


def _is_past(person: Sequence[int], before: datetime) -> sa.ColumnElement[bool]:
    """A correction outlives what it corrects, a withdrawn panel whatever may still come of its components."""
    later = sa.select(observation.c.key).where(observation.c.patient_pk.in_(person), observation.c.received_at >= before).correlate(None)
    is_said_again = observation.c.key.in_(later.where(observation.c.key != ""))
    return sa.not_(sa.or_(is_said_again, sa.and_(observation.c.status.in_(records.WITHDRAWN), sa.exists(later))))


def _is_busy(conn: Connection, person: Sequence[int]) -> bool:
    """Whether the record of a person is still wanted, by whatever key."""
    unfinished = sa.select(job.c.id).where(job.c.study_id == study.c.id, job.c.state.in_(UNFINISHED)).exists()
    wanted = sa.select(study.c.id).join(patient, sa.and_(study.c.issuer == patient.c.issuer, study.c.patient_id == patient.c.patient_id))
    wanted = wanted.where(patient.c.id.in_(person), sa.or_(study.c.state == "receiving", unfinished))
    return conn.execute(wanted.limit(1)).first() is not None


# --- by request


def erase(conn: Connection, key: PatientKey, *, now: datetime) -> Receipt:
    """Delete every row of exactly this patient of this issuer, studies and reports included; leaves one event without patient data.

    The complete studies of those who were merged with the patient are marked: their record is another one now.

    Raises
    ------
    NotErased
        Nobody knows the patient, or a study of the patient is still being received or worked on.
    """
    of_key = (study.c.issuer == key.issuer, study.c.patient_id == key.patient_id)
    known = persons.find(conn, key)
    if known is not None:  # the patient before the studies, as messages do: else the two wait for each other
        persons.lock(conn, [known])
    rows = conn.execute(sa.select(study.c.id, study.c.state).where(*of_key).order_by(study.c.id).with_for_update()).all()
    named = sa.select(patient.c.id).where(patient.c.issuer == key.issuer, patient.c.patient_id == key.patient_id)
    patient_pk = conn.execute(named.with_for_update()).scalar()
    if not rows and patient_pk is None:
        raise NotErased("Neither images nor a feed have named this patient: check the issuer and the patient ID, nothing was erased.")
    ids = [row.id for row in rows]
    _refuse_unfinished(conn, ids, receiving=sum(row.state == "receiving" for row in rows))
    counts, paths = _erase_studies(conn, ids)
    counts |= _erase_record(conn, key, patient_pk, now=now)
    counts["raw_messages"] = _erase_raw(conn, key.patient_id)
    _erase_control_ids(conn, key.patient_id)
    salt = secrets.token_hex(16)
    receipt = Receipt(
        at=now.isoformat(), program=__version__, salt=salt, patient_sha256=_digest(salt, key), scope=SCOPE, counts=counts, paths=paths
    )
    # Without the salt the hash tells nobody who it was, and with the receipt it proves that this row is of it.
    history.note(conn, None, name="patient.erased", now=now, program=__version__, patient_sha256=receipt["patient_sha256"], **counts)
    return receipt


def is_of(receipt: Receipt, key: PatientKey) -> bool:
    """Whether a receipt is of this patient."""
    return secrets.compare_digest(receipt["patient_sha256"], _digest(receipt["salt"], key))


def purge(store: Store) -> None:
    """Rewrite the database so that its files hold no deleted row any more; takes the time of copying it, and locks SQLite meanwhile."""
    with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        if store.is_sqlite:
            conn.exec_driver_sql("VACUUM")
            conn.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        else:
            conn.exec_driver_sql("SET statement_timeout = 0")
            conn.exec_driver_sql("VACUUM")


def _digest(salt: str, key: PatientKey) -> str:
    return hashlib.sha256(json.dumps([salt, key.issuer, key.patient_id]).encode()).hexdigest()


def _refuse_unfinished(conn: Connection, ids: Sequence[int], *, receiving: int) -> None:
    if receiving:
        raise NotErased(f"{receiving} of the patient's studies are still being received: erase again when they are complete.")
    count = sa.select(sa.func.count()).select_from(job).where(job.c.study_id.in_(ids), job.c.state.in_(UNFINISHED))
    if unfinished := conn.execute(count).scalar_one():
        raise NotErased(f"{unfinished} jobs of the patient's studies are not finished: cancel them or let them end, then erase again.")


def _erase_studies(conn: Connection, ids: Sequence[int]) -> tuple[dict[str, int], list[str]]:
    of_series = instance.c.series_id.in_(sa.select(series.c.id).where(series.c.study_id.in_(ids)))
    of_documents = finding.c.document_id.in_(sa.select(document.c.id).where(document.c.study_id.in_(ids)))
    paths = list(conn.scalars(sa.select(instance.c.path).where(of_series).order_by(instance.c.id)))
    # Whatever refers to another goes before it.
    counts = {
        "commitments": _delete(conn, commitment, commitment.c.job_id.in_(sa.select(job.c.id).where(job.c.study_id.in_(ids)))),
        "events": _delete(conn, event, event.c.study_id.in_(ids)),
        "jobs": _delete(conn, job, job.c.study_id.in_(ids)),
        "reviews": _delete(conn, review, review.c.finding_id.in_(sa.select(finding.c.id).where(of_documents))),
        "findings": _delete(conn, finding, of_documents),
        "documents": _delete(conn, document, document.c.study_id.in_(ids)),
        "instances": _delete(conn, instance, of_series),
        "series": _delete(conn, series, series.c.study_id.in_(ids)),
        "studies": _delete(conn, study, study.c.id.in_(ids)),
    }
    return counts, paths


def _erase_record(conn: Connection, key: PatientKey, patient_pk: int | None, *, now: datetime) -> dict[str, int]:
    others = [one for one in records.keys_of(conn, key) if one != key]
    counts = {
        "facts": _delete(conn, observation, observation.c.patient_pk == patient_pk),
        "demographics": _delete(conn, demographics, demographics.c.patient_pk == patient_pk),
        "orders": _delete(conn, imaging_order, imaging_order.c.patient_pk == patient_pk),
        "merges": _delete(conn, merge, sa.or_(merge.c.survivor_pk == patient_pk, merge.c.retired_pk == patient_pk)),
        "patients": _delete(conn, patient, patient.c.id == patient_pk),
    }
    records.mark_changed(conn, others, now=now)
    return counts


def _erase_control_ids(conn: Connection, patient_id: str) -> None:
    """Some senders make a message's control ID of the patient's ID; a refused or ignored message's, and a merge's, too."""
    wanted = _word(patient_id)
    number, page = 0, sa.select(message.c.id, message.c.control_id).order_by(message.c.id).limit(_PAGE)
    while rows := conn.execute(page.where(message.c.id > number, message.c.control_id != "")).all():
        held = [row.id for row in rows if wanted.search(_plain(row.control_id))]
        conn.execute(sa.update(message).where(message.c.id.in_(held)).values(control_id=""))
        number = rows[-1].id


def _delete(conn: Connection, table: sa.Table, condition: sa.ColumnElement[bool]) -> int:
    return conn.execute(sa.delete(table).where(condition)).rowcount


def _erase_raw(conn: Connection, patient_id: str) -> int:
    held = [number for number, raw in _raws(conn) if _names(raw, patient_id)]
    for number in held:
        conn.execute(sa.update(message).where(message.c.id == number).values(raw=None))
    return len(held)


def _raws(conn: Connection) -> Iterator[tuple[int, bytes]]:
    for number in conn.scalars(sa.select(message.c.id).where(message.c.raw.is_not(None)).order_by(message.c.id)).all():
        yield number, conn.execute(sa.select(message.c.raw).where(message.c.id == number)).scalar_one()


#: HL7 v2.5.1 §2.7.5: any character may be written so.
_HEXADECIMAL: Final = re.compile(rb"\\X((?:[0-9A-Fa-f]{2})+)\\")


def _names(raw: bytes, patient_id: str) -> bool:
    """Whether a message holds the ID as a whole word, in any case and width and with any zeros before it, as a site may compare them."""
    wanted = _word(patient_id)
    spelled = _HEXADECIMAL.sub(lambda found: bytes.fromhex(found[1].decode()), raw)
    return any(wanted.search(_plain(one.decode(encoding, errors="replace"))) for one in {raw, spelled} for encoding in _ENCODINGS)


def _word(patient_id: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![^\W_])0*{re.escape(_plain(patient_id))}(?![^\W_])")


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
