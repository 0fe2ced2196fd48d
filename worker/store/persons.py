"""Rows of who is who: patients, the merges that make several keys one person, and who may write of them now.

::

    locked ─▶ the rows of a person, nobody else writes of them until the commit
    add_merge, unmerge: what a feed says, what a person takes back; a merge is never deleted, it gets a time stamp

Not here: what is said of a person (records.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from worker.domain import PatientKey
from worker.store import queue
from worker.store.database import listed, rows_of
from worker.store.schema import AnyRow, demographics, merge, patient, study

_ROW: Final = sa.select(patient.c.id).where(patient.c.issuer == sa.bindparam("issuer"), patient.c.patient_id == sa.bindparam("patient_id"))
_PATIENTS: Final = sa.select(patient).where(patient.c.id.in_(sa.bindparam("several", expanding=True)))
_LOCK: Final = (
    sa.select(patient.c.id).where(patient.c.id.in_(sa.bindparam("several", expanding=True))).order_by(patient.c.id).with_for_update()
)
_MERGES: Final = sa.select(merge).where(
    sa.or_(
        merge.c.survivor_pk.in_(sa.bindparam("several", expanding=True)), merge.c.retired_pk.in_(sa.bindparam("several", expanding=True))
    )
)


@dataclass(frozen=True, slots=True)
class Held:
    """Patients that are locked until the commit: the row of each, all rows of each row's person, the survivor's first."""

    rows: dict[PatientKey, int]
    chains: dict[int, list[int]]

    def keys(self, conn: Connection) -> dict[int, PatientKey]:
        """The key of each row of these persons."""
        named = {pk: key for key, pk in self.rows.items()}
        others = sorted({pk for chain in self.chains.values() for pk in chain} - named.keys())
        return named | dict(zip(others, keys(conn, others), strict=True)) if others else named


# --- rows and locks


def find(conn: Connection, key: PatientKey) -> int | None:
    """The row of a patient."""
    return conn.execute(_ROW, {"issuer": key.issuer, "patient_id": key.patient_id}).scalar()


def find_all(conn: Connection, keys: Iterable[PatientKey]) -> dict[PatientKey, int]:
    """The rows of those of these patients that have one."""
    dialect = conn.dialect.name
    several = rows_of(dialect, ((key.issuer, key.patient_id) for key in keys))
    return {PatientKey(row.issuer, row.patient_id): row.id for row in conn.execute(_all(dialect), {"rows": several})}


@cache
def _all(dialect: str) -> sa.Select[tuple[object, ...]]:
    return sa.select(patient).where(listed(dialect, patient.c.issuer, patient.c.patient_id))


def is_known(conn: Connection, key: PatientKey) -> bool:
    """Whether any feed has named this patient of this issuer."""
    return find(conn, key) is not None


def issuers_of(conn: Connection, patient_id: str) -> list[str]:
    """Under how many issuers an ID is known: an ID alone names nobody."""
    return list(conn.scalars(sa.select(patient.c.issuer).where(patient.c.patient_id == patient_id).order_by(patient.c.issuer)))


def locked(conn: Connection, keys: Iterable[PatientKey], said: Mapping[str, object]) -> Held:
    """These patients, made where there are none, locked with all they are merged with.

    `said` is the source, time and message of a row that is made.
    """
    # In one order everywhere: two messages that name the same new patients would wait for each other.
    wanted = sorted(set(keys), key=lambda key: (key.issuer, key.patient_id))
    if conn.dialect.name == "sqlite":
        rows = _made(conn, wanted, said)
        return Held(rows, chains(conn, rows.values()))
    while True:
        with conn.begin_nested() as attempt:
            rows = _made(conn, wanted, said)
            several, _ = _hold(conn, frozenset(rows.values()))
            if several is not None:
                return Held(rows, several)
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
            several, is_erased = _hold(conn, named)
            if several is not None:
                return True
            attempt.rollback()
            if is_erased:
                return False


def _hold(conn: Connection, named: frozenset[int]) -> tuple[dict[int, list[int]] | None, bool]:
    """The persons of these rows, all locked; None where that must be tried again, and whether one of the rows is not there any more."""
    before = chains(conn, named)
    held = set(conn.scalars(_LOCK, {"several": sorted({pk for chain in before.values() for pk in chain})}))
    if not named <= held:
        return None, True
    # Whoever held them may have merged them with others meanwhile: those may sort before what is locked now.
    several = chains(conn, named)
    return (several if all(held.issuperset(chain) for chain in several.values()) else None), False


def _made(conn: Connection, wanted: Sequence[PatientKey], said: Mapping[str, object]) -> dict[PatientKey, int]:
    while True:
        found = find_all(conn, wanted)
        new = [{"issuer": key.issuer, "patient_id": key.patient_id} for key in wanted if key not in found]
        if not new:
            return found
        for row in conn.execute(_new(conn.dialect.name), new).all():
            # An empty first line says nothing of the patient but since when there is one: `view` asks it with `known_at`.
            found[PatientKey(row.issuer, row.patient_id)] = row.id
        first = [{"patient_pk": found[key], "at": said["received_at"], **said} for one in new if (key := PatientKey(**one)) in found]
        if first:
            conn.execute(sa.insert(demographics), first)
        if len(found) == len(wanted):
            return {key: found[key] for key in wanted}
        # Else somebody made, or erased, one of them this very moment.


@cache
def _new(dialect: str) -> sa.Executable:
    insert = (sqlite.insert if dialect == "sqlite" else postgresql.insert)(patient)
    return insert.on_conflict_do_nothing().returning(patient.c.id, patient.c.issuer, patient.c.patient_id)


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


def _merges(conn: Connection, rows: Iterable[int], known_at: datetime | None = None) -> list[AnyRow]:
    """Every merge that leads to or from these patients and stood at `known_at`, however many steps away, the first said first."""
    found: dict[int, AnyRow] = {}
    todo = set(rows)
    seen = set(todo)
    while todo:
        new = [row for row in conn.execute(_MERGES, {"several": sorted(todo)}) if _stood(row, known_at)]
        found |= {row.id: row for row in new}
        todo = {pk for row in new for pk in (row.survivor_pk, row.retired_pk)} - seen
        seen |= todo
    return sorted(found.values(), key=lambda row: (row.said_at or row.received_at, row.id))


def _stood(row: AnyRow, known_at: datetime | None) -> bool:
    if known_at is None:
        return row.undone_at is None
    return row.received_at <= known_at and (row.undone_at is None or row.undone_at > known_at)


def chains(conn: Connection, rows: Iterable[int], known_at: datetime | None = None) -> dict[int, list[int]]:
    """Of each of these rows all rows of its person, the surviving first: one statement for each step of merges, not for each row."""
    of = {pk: {pk} for pk in rows}
    named, merges, said = list(of), _merges(conn, of, known_at), dict[int, list[AnyRow]]()
    for row in merges:
        whole = of.setdefault(row.survivor_pk, {row.survivor_pk}) | of.setdefault(row.retired_pk, {row.retired_pk})
        of |= dict.fromkeys(whole, whole)
    for row in merges:
        said.setdefault(id(of[row.survivor_pk]), []).append(row)
    return {pk: _survivor_first(of[pk], said.get(id(of[pk]), [])) for pk in named}


def _survivor_first(everyone: set[int], merges: Sequence[AnyRow]) -> list[int]:
    """The survivor is the last named as one that no merge retires, in whatever order they came."""
    retired = {row.retired_pk for row in merges}
    survivors = [row.survivor_pk for row in reversed(merges)] or list(everyone)
    # Two merges may say the opposite: then the last said counts.
    survivor = next((pk for pk in survivors if pk not in retired), survivors[0])
    return [survivor, *sorted(everyone - {survivor})]


def person_of(conn: Connection, patient_pk: int, known_at: datetime | None = None) -> list[int]:
    """All rows of one person, the surviving first."""
    return chains(conn, [patient_pk], known_at)[patient_pk]


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
    rows = _merges(conn, [found])
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
    dialect = conn.dialect.name
    conn.execute(_mark(dialect), {"rows": rows_of(dialect, ((key.issuer, key.patient_id) for key in keys)), "now": now})


@cache
def _mark(dialect: str) -> sa.Executable:
    several = sa.select(study.c.id).where(listed(dialect, study.c.issuer, study.c.patient_id)).correlate(None)
    if dialect != "sqlite":  # in the order in which receivers hold several (SQLite has one writer)
        several = several.order_by(study.c.study_instance_uid.collate("C")).with_for_update(of=study)
    return sa.update(study).where(study.c.id.in_(several)).values(record_changed_at=sa.bindparam("now"))
