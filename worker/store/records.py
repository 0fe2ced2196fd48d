"""Rows of the patient's record: what HL7, FHIR and tables told us, appended, never overwritten.

::

    patient A ──merge──▶ patient B ──merge──▶ patient C       one person: the facts of A, B and C are read together
        └ facts, demographics stay under the key they came with, so that undoing a merge is one time stamp

``apply`` is commit 3 of the line: after it, HL7 may be answered AA.
``view`` is the join's other half: the facts of one patient, of one issuer, as of a time.
Not here: messages and feeds (feeds.py), what a study is given of a record (worker/inputs.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from worker.domain import ROUTINE, Code, Observation, Patient, PatientKey, PatientRecord, RecordUpdate
from worker.store import queue
from worker.store.schema import AnyRow, demographics, imaging_order, merge, observation, patient, study
from worker.store.studies import insert_or_ignore

#: HL7 table 0085: what a result's status supersedes.
_RANK: Final = {"F": 1, "C": 2, "D": 2, "W": 2, "X": 2}
_WITHDRAWN: Final = frozenset("DWX")
#: How far clocks may differ before a time of after its own message is a wrong one.
CLOCKS: Final = timedelta(hours=24)


# --- what is said


def apply(conn: Connection, update: RecordUpdate, *, now: datetime, message_id: int | None = None) -> int:
    """Add what one message says of one patient, wake the studies that wait for it, mark those that were answered without it.

    Returns
    -------
    int
        The number of facts added; facts already there (same key, same content) are not added again.
    """
    patient_pk = _patient(conn, update.patient.key)
    said = {"source": update.source, "received_at": now, "message_id": message_id}
    changed = 0
    if update.has_demographics:
        changed += _add_demographics(conn, patient_pk, update, said)
    for one in update.merges:
        survivor, retired = _patient(conn, one.survivor), _patient(conn, one.retired)
        if survivor != retired and not _is_merged(conn, survivor, retired):
            conn.execute(sa.insert(merge).values(survivor_pk=survivor, retired_pk=retired, **said))
            changed += 1
    for order in update.orders:
        facts = {
            "accession_number": order.accession_number,
            "placer": order.placer,
            "filler": order.filler,
            "priority": order.priority,
            "is_cancelled": order.is_cancelled,
        }
        conn.execute(sa.insert(imaging_order).values(patient_pk=patient_pk, **facts, **said))
    added = sum(_add_fact(conn, patient_pk, fact, update, said) for fact in update.observations)
    keys = _keys(conn, _group(conn, patient_pk))
    queue.wake(conn, keys=keys, now=now)
    if changed or added:
        _mark(conn, keys, now=now)
    for order in update.orders:
        if order.accession_number and not order.is_cancelled:
            queue.prioritize_order(conn, keys=keys, accession_number=order.accession_number, priority=order.priority)
    return added


def _patient(conn: Connection, key: PatientKey) -> int:
    added = insert_or_ignore(conn, patient, {"issuer": key.issuer, "patient_id": key.patient_id})
    return added if added is not None else int(conn.execute(_ROW, {"issuer": key.issuer, "patient_id": key.patient_id}).scalar_one())


_ROW: Final = sa.select(patient.c.id).where(patient.c.issuer == sa.bindparam("issuer"), patient.c.patient_id == sa.bindparam("patient_id"))


def _add_demographics(conn: Connection, patient_pk: int, update: RecordUpdate, said: dict[str, object]) -> bool:
    """Add a line to the history; False where the very same was said before at the same time."""
    told = {"name": update.patient.name, "birth_date": update.patient.birth_date, "sex": update.patient.sex}
    if not any(told.values()):
        return False
    same = sa.select(demographics.c.id).where(demographics.c.patient_pk == patient_pk)
    for name, value in (*told.items(), ("at", update.at or said["received_at"])):
        same = same.where(demographics.c[name] == value)
    if conn.execute(same.limit(1)).first():
        return False
    conn.execute(sa.insert(demographics).values(patient_pk=patient_pk, **told, at=update.at or said["received_at"], **said))
    return True


def _add_fact(conn: Connection, patient_pk: int, fact: Observation, update: RecordUpdate, said: dict[str, object]) -> bool:
    if _is_known(conn, patient_pk, fact):  # also when something newer stands: a replayed day undoes nothing
        return False
    coded = fact.coded or Code("", "", "")
    conn.execute(
        sa.insert(observation).values(
            {
                **said,
                "patient_pk": patient_pk,
                "code": fact.code.value,
                "scheme": fact.code.scheme,
                "meaning": fact.code.meaning,
                "at": fact.at,
                "value": fact.value,
                "comparator": fact.comparator,
                "unit": fact.unit,
                "text": fact.text,
                "status": fact.status,
                "key": fact.key,
                "source": fact.source or update.source,
                "kind": fact.kind,
                "high": fact.high,
                "coded_value": coded.value,
                "coded_scheme": coded.scheme,
                "coded_meaning": coded.meaning,
                "said_at": update.at,
            }
        )
    )
    return True


def _is_known(conn: Connection, patient_pk: int, fact: Observation) -> bool:
    """Whether the very same was said before under the same key."""
    if not fact.key:
        return False
    facts = observation.c
    said = conn.execute(
        sa.select(facts.value, facts.high, facts.comparator, facts.unit, facts.text, facts.status, facts.coded_value).where(
            facts.patient_pk == patient_pk,
            facts.at == fact.at,
            facts.key == fact.key,
            facts.code == fact.code.value,
            facts.scheme == fact.code.scheme,
        )
    )
    coded = fact.coded.value if fact.coded else ""
    return (fact.value, fact.high, fact.comparator, fact.unit, fact.text, fact.status, coded) in {tuple(row) for row in said}


def _mark(conn: Connection, keys: Iterable[PatientKey], *, now: datetime) -> None:
    """What is complete may have been answered from a record that was another one."""
    for key in keys:
        conn.execute(
            sa.update(study)
            .where(study.c.issuer == key.issuer, study.c.patient_id == key.patient_id, study.c.state == "complete")
            .values(record_changed_at=now)
        )


# --- who is who


def _is_merged(conn: Connection, survivor: int, retired: int) -> bool:
    wanted = sa.select(merge.c.id).where(merge.c.survivor_pk == survivor, merge.c.retired_pk == retired, merge.c.undone_at.is_(None))
    return conn.execute(wanted.limit(1)).first() is not None


def _merges(conn: Connection, patients: Iterable[int], known_at: datetime | None) -> list[AnyRow]:
    """The merges that touch any of `patients` and stood at `known_at`, oldest first."""
    several = list(patients)
    wanted = sa.select(merge).where(sa.or_(merge.c.survivor_pk.in_(several), merge.c.retired_pk.in_(several)))
    if known_at is None:
        wanted = wanted.where(merge.c.undone_at.is_(None))
    else:
        stood = sa.or_(merge.c.undone_at.is_(None), merge.c.undone_at > known_at)
        wanted = wanted.where(merge.c.received_at <= known_at, stood)
    return list(conn.execute(wanted.order_by(merge.c.id)))


def _chain(conn: Connection, patient_pk: int, known_at: datetime | None = None) -> list[AnyRow]:
    """Every merge that leads to or from a patient, however many steps away, oldest first."""
    found: dict[int, AnyRow] = {}
    todo, seen = {patient_pk}, {patient_pk}
    while todo:
        for row in _merges(conn, todo, known_at):
            found[row.id] = row
        todo = {pk for row in found.values() for pk in (row.survivor_pk, row.retired_pk)} - seen
        seen |= todo
    return [found[number] for number in sorted(found)]


def _group(conn: Connection, patient_pk: int, known_at: datetime | None = None) -> list[int]:
    """All rows of one person, whoever survived first."""
    rows = _chain(conn, patient_pk, known_at)
    survivor = rows[-1].survivor_pk if rows else patient_pk
    # The last merge names who survives, unless that one had been retired by an earlier message that came in order.
    seen = {survivor}
    while (
        after := next((r.survivor_pk for r in reversed(rows) if r.retired_pk == survivor and r.survivor_pk not in seen), None)
    ) is not None:
        survivor = after
        seen.add(survivor)
    everyone = {pk for row in rows for pk in (row.survivor_pk, row.retired_pk)} | {patient_pk}
    return [survivor, *sorted(everyone - {survivor})]


def _keys(conn: Connection, patients: Sequence[int]) -> tuple[PatientKey, ...]:
    rows = {row.id: row for row in conn.execute(sa.select(patient).where(patient.c.id.in_(patients)))}
    return tuple(PatientKey(rows[pk].issuer, rows[pk].patient_id) for pk in patients)


def keys_of(conn: Connection, key: PatientKey) -> tuple[PatientKey, ...]:
    """All keys of one person, the surviving first; just `key` where no feed knows it."""
    found = _find(conn, key)
    return (key,) if found is None else _keys(conn, _group(conn, found))


def merges_of(conn: Connection, key: PatientKey) -> list[tuple[int, PatientKey, PatientKey, datetime, str]]:
    """The merges that stand for a patient: number, survivor, retired, when received, from whom."""
    found = _find(conn, key)
    if found is None:
        return []
    rows = _chain(conn, found)
    pairs = [_keys(conn, [row.survivor_pk, row.retired_pk]) for row in rows]
    return [(row.id, pair[0], pair[1], row.received_at, row.source) for row, pair in zip(rows, pairs, strict=True)]


def unmerge(conn: Connection, number: int, *, reason: str, now: datetime) -> bool:
    """Undo one merge: each key has its own facts again, as if it had never been. False if there is no such merge that stands."""
    row = conn.execute(sa.select(merge).where(merge.c.id == number, merge.c.undone_at.is_(None))).first()
    if row is None:
        return False
    keys = _keys(conn, _group(conn, row.survivor_pk))
    conn.execute(sa.update(merge).where(merge.c.id == number).values(undone_at=now, undone_because=reason))
    _mark(conn, keys, now=now)
    queue.wake(conn, keys=keys, now=now)
    return True


def issuers_of(conn: Connection, patient_id: str) -> list[str]:
    """Under how many issuers an ID is known: an ID alone names nobody."""
    return list(conn.scalars(sa.select(patient.c.issuer).where(patient.c.patient_id == patient_id).order_by(patient.c.issuer)))


def _find(conn: Connection, key: PatientKey) -> int | None:
    return conn.execute(_ROW, {"issuer": key.issuer, "patient_id": key.patient_id}).scalar()


# --- the view


def view(conn: Connection, key: PatientKey, *, as_of: datetime, known_at: datetime | None = None) -> PatientRecord | None:
    """The record of exactly this patient of this issuer, nothing in it later than `as_of`, nothing received after `known_at`.

    Of several facts under one key a correction or withdrawal stands before a final, a final before a preliminary, then the later
    said, then the later received: feeds are replayed and connections are parallel.
    None if no feed has ever named the patient.
    """
    found = _find(conn, key) if key.issuer and key.patient_id else None
    if found is None:
        return None
    chain = _group(conn, found, known_at)
    told = sa.select(demographics).where(demographics.c.patient_pk.in_(chain))
    wanted = sa.select(observation).where(observation.c.patient_pk.in_(chain))
    if known_at is not None:
        told, wanted = told.where(demographics.c.received_at <= known_at), wanted.where(observation.c.received_at <= known_at)
    best: dict[object, AnyRow] = {}
    for fact in conn.execute(wanted.order_by(observation.c.id)):
        # Across merged keys too: a result that is corrected after the merge comes under the survivor.
        known = best.get(fact.key or fact.id)
        if known is None or _stands(fact) >= _stands(known):
            best[fact.key or fact.id] = fact
    # A withdrawn panel withdraws its components, whose keys begin with its own.
    gone = tuple(f"{fact.key}/" for fact in best.values() if fact.key and fact.status in _WITHDRAWN)
    standing = [fact for fact in best.values() if not (gone and fact.key.startswith(gone))]
    # The time counts only now: what was moved past `as_of`, or withdrawn after it, must not stand as it was before.
    unusable = [fact for fact in standing if fact.at > fact.received_at + CLOCKS]
    stamp = hashlib.sha256(repr(sorted(chain)).encode()).hexdigest()[:16]
    return PatientRecord(
        patient=_demographics(key, conn.execute(told.order_by(demographics.c.at, demographics.c.id)).all(), chain),
        as_of=as_of,
        observations=tuple(_observation(fact) for fact in standing if fact.at <= min(as_of, fact.received_at + CLOCKS)),
        keys=_keys(conn, chain),
        unusable=tuple(_observation(fact) for fact in unusable),
        stamp=stamp,
    )


def _stands(fact: AnyRow) -> tuple[int, datetime, int]:
    return _RANK.get(fact.status, 0), fact.said_at or fact.received_at, fact.id


def _demographics(key: PatientKey, rows: Sequence[AnyRow], chain: Sequence[int]) -> Patient:
    """Of each part what was last said of the surviving key, else of the others; an empty one says nothing."""
    told: dict[str, str] = {}
    # Oldest first, the survivor's last.
    for row in sorted(rows, key=lambda one: (one.patient_pk == chain[0], one.at, one.id)):
        told |= {name: getattr(row, name) for name in ("name", "birth_date", "sex") if getattr(row, name)}
    return Patient(key, **told)


def _observation(fact: AnyRow) -> Observation:
    return Observation(
        code=Code(fact.code, fact.scheme, fact.meaning),
        at=fact.at,
        value=fact.value,
        comparator=fact.comparator,
        unit=fact.unit,
        text=fact.text,
        status=fact.status,
        key=fact.key,
        source=fact.source,
        kind=fact.kind,
        high=fact.high,
        coded=Code(fact.coded_value, fact.coded_scheme, fact.coded_meaning) if fact.coded_value else None,
        received_at=fact.received_at,
        message_id=fact.message_id,
    )


def is_known(conn: Connection, key: PatientKey) -> bool:
    """Whether any feed has named this patient of this issuer."""
    return _find(conn, key) is not None


def priority_of(conn: Connection, key: PatientKey, accession_number: str) -> int:
    """How urgent the orders of a study say it is; ROUTINE where there is none that stands."""
    keys = keys_of(conn, key) if accession_number else ()
    rows = [pk for pk in (_find(conn, one) for one in keys) if pk is not None]
    wanted = sa.select(imaging_order.c.placer, imaging_order.c.filler, imaging_order.c.priority, imaging_order.c.is_cancelled).where(
        imaging_order.c.patient_pk.in_(rows), imaging_order.c.accession_number == accession_number
    )
    last = {(row.placer, row.filler): row for row in conn.execute(wanted.order_by(imaging_order.c.id))}
    return min((row.priority for row in last.values() if not row.is_cancelled), default=ROUTINE)
