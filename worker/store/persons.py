"""Rows of who is who: patients, the merges that make several keys one person, and who may write of them now.

::

    locked ─▶ the rows of a person, nobody else writes of them until the commit
    add_merge, unmerge: what a feed says, what a person takes back; a merge is never deleted, it gets a time stamp

Not here: what is said of a person (records.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from worker.domain import PatientKey
from worker.store import queue
from worker.store.schema import AnyRow, demographics, merge, patient, study
from worker.store.studies import insert_or_ignore

_ROW: Final = sa.select(patient.c.id).where(patient.c.issuer == sa.bindparam("issuer"), patient.c.patient_id == sa.bindparam("patient_id"))
_PATIENTS: Final = sa.select(patient).where(patient.c.id.in_(sa.bindparam("several", expanding=True)))
_LOCK: Final = (
    sa.select(patient.c.id).where(patient.c.id.in_(sa.bindparam("several", expanding=True))).order_by(patient.c.id).with_for_update()
)
_MERGES: Final = sa.select(merge).where(sa.or_(merge.c.survivor_pk == sa.bindparam("one"), merge.c.retired_pk == sa.bindparam("one")))


# --- rows and locks


def find(conn: Connection, key: PatientKey) -> int | None:
    """The row of a patient."""
    return conn.execute(_ROW, {"issuer": key.issuer, "patient_id": key.patient_id}).scalar()


def is_known(conn: Connection, key: PatientKey) -> bool:
    """Whether any feed has named this patient of this issuer."""
    return find(conn, key) is not None


def issuers_of(conn: Connection, patient_id: str) -> list[str]:
    """Under how many issuers an ID is known: an ID alone names nobody."""
    return list(conn.scalars(sa.select(patient.c.issuer).where(patient.c.patient_id == patient_id).order_by(patient.c.issuer)))


def locked(conn: Connection, keys: Iterable[PatientKey], said: Mapping[str, object]) -> dict[PatientKey, int]:
    """The rows of these patients, made where there are none, locked with all they are merged with.

    `said` is the source, time and message of a row that is made.
    """
    # In one order everywhere: two messages that name the same new patients would wait for each other.
    wanted = sorted(set(keys), key=lambda key: (key.issuer, key.patient_id))
    if conn.dialect.name == "sqlite":
        return {key: _made(conn, key, said) for key in wanted}
    while True:
        with conn.begin_nested() as attempt:
            rows = {key: _made(conn, key, said) for key in wanted}
            if lock(conn, rows.values()):
                return rows
            attempt.rollback()


def lock(conn: Connection, rows: Iterable[int]) -> bool:
    """Keep others from writing of these persons until the commit; False if one of the rows was erased meanwhile.

    All rows of them in one statement, in one order: who locks some and then the others waits for one who began with those others.
    SQLite has one writer at a time: nothing to do there.
    """
    named = frozenset(rows)
    if conn.dialect.name == "sqlite" or not named:
        return True
    while True:
        with conn.begin_nested() as attempt:
            held = set(conn.scalars(_LOCK, {"several": people(conn, named)}))
            # Whoever held them may have merged them with others meanwhile: those may sort before what is locked now.
            is_whole = held.issuperset(people(conn, named))
            if is_whole and named <= held:
                return True
            attempt.rollback()
            if not named <= held:
                return False


def _made(conn: Connection, key: PatientKey, said: Mapping[str, object]) -> int:
    while True:
        added = insert_or_ignore(conn, patient, {"issuer": key.issuer, "patient_id": key.patient_id})
        if added is not None:
            # An empty first line says nothing of the patient but since when there is one: `view` asks it with `known_at`.
            conn.execute(sa.insert(demographics).values(patient_pk=added, at=said["received_at"], **said))
            return added
        found = find(conn, key)
        if found is not None:  # else erased this very moment
            return found


# --- merges


def add_merge(conn: Connection, survivor: int, retired: int, *, said_at: datetime | None, said: Mapping[str, object]) -> bool:
    """Merge two patients, both locked; False where they are, or where a person undid it and this says nothing new.

    What a person undid comes back, whichever of the two is to survive, only by what a feed says after the undoing; never by a FHIR
    server's links: they are a state, not an event, and get a new time with whatever else changes of the patient.
    """
    is_state = said_at is None or str(said["source"]).startswith("FHIR")
    is_undone = merge.c.undone_at.is_not(None) if is_state else merge.c.undone_at >= said_at
    same = sa.and_(merge.c.survivor_pk == survivor, merge.c.retired_pk == retired)
    opposite = sa.and_(merge.c.survivor_pk == retired, merge.c.retired_pk == survivor)
    is_barred = sa.or_(sa.and_(same, merge.c.undone_at.is_(None)), sa.and_(sa.or_(same, opposite), is_undone))
    if survivor == retired or conn.execute(sa.select(merge.c.id).where(is_barred).limit(1)).first():
        return False
    conn.execute(sa.insert(merge).values(survivor_pk=survivor, retired_pk=retired, said_at=said_at, **said))
    return True


def _merges(conn: Connection, patient_pk: int, known_at: datetime | None) -> list[AnyRow]:
    """The merges that name a patient and stood at `known_at`."""
    rows = conn.execute(_MERGES, {"one": patient_pk})
    if known_at is None:
        return [row for row in rows if row.undone_at is None]
    return [row for row in rows if row.received_at <= known_at and (row.undone_at is None or row.undone_at > known_at)]


def _chain(conn: Connection, patient_pk: int, known_at: datetime | None = None) -> list[AnyRow]:
    """Every merge that leads to or from a patient, however many steps away, the first said first."""
    found: dict[int, AnyRow] = {}
    todo, seen = {patient_pk}, {patient_pk}
    while todo:
        new = {row.id: row for one in todo for row in _merges(conn, one, known_at)}
        found |= new
        todo = {pk for row in new.values() for pk in (row.survivor_pk, row.retired_pk)} - seen
        seen |= todo
    return sorted(found.values(), key=lambda row: (row.said_at or row.received_at, row.id))


def people(conn: Connection, rows: Iterable[int]) -> list[int]:
    """All rows of several persons, each person looked up once: a message may name a hundred keys of one."""
    found: dict[int, None] = {}
    for one in sorted(set(rows)):
        if one not in found:
            found |= dict.fromkeys(person_of(conn, one))
    return list(found)


def person_of(conn: Connection, patient_pk: int, known_at: datetime | None = None) -> list[int]:
    """All rows of one person, the surviving first: the last named as survivor that no merge retires, in whatever order they came."""
    rows = _chain(conn, patient_pk, known_at)
    retired = {row.retired_pk for row in rows}
    survivors = [row.survivor_pk for row in reversed(rows)] or [patient_pk]
    # Two merges may say the opposite: then the last said counts.
    survivor = next((pk for pk in survivors if pk not in retired), survivors[0])
    everyone = {pk for row in rows for pk in (row.survivor_pk, row.retired_pk)} | {patient_pk}
    return [survivor, *sorted(everyone - {survivor})]


def keys(conn: Connection, patients: Sequence[int]) -> tuple[PatientKey, ...]:
    """The keys of rows, in their order."""
    rows = {row.id: row for row in conn.execute(_PATIENTS, {"several": list(patients)})}
    return tuple(PatientKey(rows[pk].issuer, rows[pk].patient_id) for pk in patients)


def keys_of(conn: Connection, key: PatientKey) -> tuple[PatientKey, ...]:
    """All keys of one person, the surviving first; just `key` where no feed knows it."""
    found = find(conn, key)
    return (key,) if found is None else keys(conn, person_of(conn, found))


def merges_of(conn: Connection, key: PatientKey) -> list[tuple[int, PatientKey, PatientKey, datetime, str]]:
    """The merges that stand for a patient: number, survivor, retired, when received, from whom."""
    found = find(conn, key)
    if found is None:
        return []
    rows = _chain(conn, found)
    pairs = [keys(conn, [row.survivor_pk, row.retired_pk]) for row in rows]
    return [(row.id, pair[0], pair[1], row.received_at, row.source) for row, pair in zip(rows, pairs, strict=True)]


def unmerge(conn: Connection, number: int, *, reason: str, now: datetime) -> bool:
    """Undo one merge: each key has its own facts again, as if it had never been. False if there is no such merge that stands."""
    wanted = sa.select(merge).where(merge.c.id == number, merge.c.undone_at.is_(None))
    row = conn.execute(wanted).first()
    # What stands is asked again with the lock: somebody else may undo it, or erase the patient.
    if row is None or not lock(conn, (row.survivor_pk, row.retired_pk)) or conn.execute(wanted).first() is None:
        return False
    named = keys(conn, person_of(conn, row.survivor_pk))
    conn.execute(sa.update(merge).where(merge.c.id == number).values(undone_at=now, undone_because=reason))
    mark_changed(conn, named, now=now)
    queue.wake(conn, keys=named, now=now)
    return True


def stamp(chain: Sequence[int]) -> str:
    """A name of one person's rows that tells nothing of them."""
    return hashlib.sha256(repr(list(chain)).encode()).hexdigest()[:16]


def stamp_of(conn: Connection, key: PatientKey) -> str:
    """What `records.view` would give as its stamp now; '' where no feed knows the patient."""
    found = find(conn, key) if key.issuer else None
    return "" if found is None else stamp(person_of(conn, found))


# --- what a change means for studies


def mark_changed(conn: Connection, keys: Iterable[PatientKey], *, now: datetime) -> None:
    """What was answered, or is being answered this moment, may rest on a record that was another one.

    Whatever the study's state: one that another transaction completes meanwhile still looks like received here.
    """
    for key in keys:
        conn.execute(_MARK, {"of": key.issuer, "whom": key.patient_id, "now": now})


_MARK: Final = (
    sa.update(study)
    .where(study.c.issuer == sa.bindparam("of"), study.c.patient_id == sa.bindparam("whom"))
    .values(record_changed_at=sa.bindparam("now"))
)
