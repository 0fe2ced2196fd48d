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

from worker.domain import ROUTINE, Code, Observation, Order, Patient, PatientKey, PatientRecord, RecordUpdate
from worker.store import queue
from worker.store.schema import AnyRow, demographics, imaging_order, merge, message, observation, patient, study
from worker.store.studies import insert_or_ignore

#: HL7 table 0085: what a result's status supersedes.
_RANK: Final = {"F": 1, "C": 2, "D": 2, "W": 2, "X": 2}
#: Statuses that take back what was said under the same key.
WITHDRAWN: Final = frozenset("DWX")
#: How far clocks may differ before a time of after its own message is a wrong one.
CLOCKS: Final = timedelta(hours=24)


# --- what is said


def apply(conn: Connection, update: RecordUpdate, *, now: datetime, message_id: int | None = None) -> int:
    """Add what one message says of one patient, wake the studies that wait for it, mark those that were answered without it.

    Returns
    -------
    int
        The number of facts added; what was said before, in the same words and at the same time, is not added again.
    """
    said = {"source": update.source, "received_at": now, "message_id": message_id}
    patient_pk = _patient(conn, update.patient.key, said)
    changed = 0
    if update.has_demographics:
        changed += _add_demographics(conn, patient_pk, update, said)
    named = {patient_pk}
    for one in update.merges:
        survivor, retired = _patient(conn, one.survivor, said), _patient(conn, one.retired, said)
        named |= {survivor, retired}
        if survivor != retired and not _is_merged(conn, survivor, retired, said_at=update.at):
            conn.execute(sa.insert(merge).values(survivor_pk=survivor, retired_pk=retired, **said))
            changed += 1
    urgent = {order.accession_number for order in update.orders if _add_order(conn, patient_pk, order, said)} - {""}
    added = sum(_add_fact(conn, patient_pk, fact, update, said) for fact in update.observations)
    keys = _keys(conn, list(dict.fromkeys(pk for one in sorted(named) for pk in person_of(conn, one))))
    queue.wake(conn, keys=keys, now=now)
    if changed or added:
        mark_changed(conn, keys, now=now)
    for accession_number in sorted(urgent):
        priority = priority_of(conn, update.patient.key, accession_number)
        queue.prioritize_order(conn, keys=keys, accession_number=accession_number, priority=priority)
    return added


def _patient(conn: Connection, key: PatientKey, said: dict[str, object]) -> int:
    added = insert_or_ignore(conn, patient, {"issuer": key.issuer, "patient_id": key.patient_id})
    if added is None:
        return int(conn.execute(_ROW, {"issuer": key.issuer, "patient_id": key.patient_id}).scalar_one())
    # An empty first line says nothing of the patient but since when there is one: `view` asks it with `known_at`.
    conn.execute(sa.insert(demographics).values(patient_pk=added, at=said["received_at"], **said))
    return added


_ROW: Final = sa.select(patient.c.id).where(patient.c.issuer == sa.bindparam("issuer"), patient.c.patient_id == sa.bindparam("patient_id"))


def _add_demographics(conn: Connection, patient_pk: int, update: RecordUpdate, said: dict[str, object]) -> bool:
    """Add a line to the history; False where the very same was said before at the same time, or both times without one."""
    told = {"name": update.patient.name, "birth_date": update.patient.birth_date, "sex": update.patient.sex}
    if not any(told.values()):
        return False
    same = sa.select(demographics.c.id).where(demographics.c.patient_pk == patient_pk)
    for name, value in (*told.items(), ("at", update.at or demographics.c.received_at)):
        same = same.where(demographics.c[name] == value)
    if conn.execute(same.limit(1)).first():
        return False
    conn.execute(sa.insert(demographics).values(patient_pk=patient_pk, **told, at=update.at or said["received_at"], **said))
    return True


def _add_order(conn: Connection, patient_pk: int, order: Order, said: dict[str, object]) -> bool:
    """Add what is said of an order; False where the very same was said before: a replayed day gives back nothing that was cancelled."""
    facts = {
        "patient_pk": patient_pk,
        "accession_number": order.accession_number,
        "placer": order.placer,
        "filler": order.filler,
        "priority": order.priority,
        "is_cancelled": order.is_cancelled,
    }
    same = sa.select(imaging_order.c.id).where(*(imaging_order.c[name] == value for name, value in facts.items()))
    if conn.execute(same.limit(1)).first():
        return False
    conn.execute(sa.insert(imaging_order).values(**facts, **said))
    return True


#: What of a fact's row was said; the rest is of whom, by whom and when it came.
_ENVELOPE: Final = frozenset({"id", "patient_pk", "source", "meaning", "coded_meaning", "received_at", "message_id"})
_WORDS: Final = tuple(column for column in observation.c if column.name not in _ENVELOPE)
_SAID: Final = sa.select(*_WORDS).where(
    observation.c.patient_pk == sa.bindparam("patient_pk"), observation.c.at == sa.bindparam("at"), observation.c.key == sa.bindparam("key")
)


_INSERT: Final = sa.insert(observation)


def _add_fact(conn: Connection, patient_pk: int, fact: Observation, update: RecordUpdate, said: dict[str, object]) -> bool:
    coded = fact.coded or Code("", "", "")
    row = {
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
    if _is_known(conn, patient_pk, row):  # also when something newer stands: a replayed day undoes nothing
        return False
    conn.execute(_INSERT, row)
    return True


def _is_known(conn: Connection, patient_pk: int, row: dict[str, object]) -> bool:
    """Whether the very same was said before at the same time, or both times without one: then it is a repetition.

    The same value said again later is news: it may stand in place of another said meanwhile.
    """
    words = tuple(row[column.name] for column in _WORDS)
    return words in {tuple(said) for said in conn.execute(_SAID, {"patient_pk": patient_pk, "at": row["at"], "key": row["key"]})}


def mark_changed(conn: Connection, keys: Iterable[PatientKey], *, now: datetime) -> None:
    """What is complete may have been answered from a record that was another one."""
    for key in keys:
        conn.execute(_MARK, {"of": key.issuer, "whom": key.patient_id, "now": now})


_MARK: Final = (
    sa.update(study)
    .where(study.c.issuer == sa.bindparam("of"), study.c.patient_id == sa.bindparam("whom"), study.c.state == "complete")
    .values(record_changed_at=sa.bindparam("now"))
)


# --- who is who


def _is_merged(conn: Connection, survivor: int, retired: int, *, said_at: datetime | None) -> bool:
    """Whether a merge stands, or was undone after it was said: feeds repeat themselves, and must not undo what a person did."""
    stands = merge.c.undone_at.is_(None)
    is_older = sa.true() if said_at is None else merge.c.undone_at >= said_at
    wanted = sa.select(merge.c.id).where(merge.c.survivor_pk == survivor, merge.c.retired_pk == retired, sa.or_(stands, is_older))
    return conn.execute(wanted.limit(1)).first() is not None


_MERGES: Final = sa.select(merge).where(sa.or_(merge.c.survivor_pk == sa.bindparam("one"), merge.c.retired_pk == sa.bindparam("one")))


def _merges(conn: Connection, patient_pk: int, known_at: datetime | None) -> list[AnyRow]:
    """The merges that name a patient and stood at `known_at`."""
    rows = conn.execute(_MERGES, {"one": patient_pk})
    if known_at is None:
        return [row for row in rows if row.undone_at is None]
    return [row for row in rows if row.received_at <= known_at and (row.undone_at is None or row.undone_at > known_at)]


def _chain(conn: Connection, patient_pk: int, known_at: datetime | None = None) -> list[AnyRow]:
    """Every merge that leads to or from a patient, however many steps away, oldest first."""
    found: dict[int, AnyRow] = {}
    todo, seen = {patient_pk}, {patient_pk}
    while todo:
        for one in todo:
            found |= {row.id: row for row in _merges(conn, one, known_at)}
        todo = {pk for row in found.values() for pk in (row.survivor_pk, row.retired_pk)} - seen
        seen |= todo
    return [found[number] for number in sorted(found)]


def person_of(conn: Connection, patient_pk: int, known_at: datetime | None = None) -> list[int]:
    """All rows of one person, the surviving first: the last named as survivor that no merge retires, in whatever order they came."""
    rows = _chain(conn, patient_pk, known_at)
    retired = {row.retired_pk for row in rows}
    survivors = [row.survivor_pk for row in reversed(rows)] or [patient_pk]
    # Two merges may say the opposite: then the last counts.
    survivor = next((pk for pk in survivors if pk not in retired), survivors[0])
    everyone = {pk for row in rows for pk in (row.survivor_pk, row.retired_pk)} | {patient_pk}
    return [survivor, *sorted(everyone - {survivor})]


_PATIENTS: Final = sa.select(patient).where(patient.c.id.in_(sa.bindparam("several", expanding=True)))


def _keys(conn: Connection, patients: Sequence[int]) -> tuple[PatientKey, ...]:
    rows = {row.id: row for row in conn.execute(_PATIENTS, {"several": list(patients)})}
    return tuple(PatientKey(rows[pk].issuer, rows[pk].patient_id) for pk in patients)


def keys_of(conn: Connection, key: PatientKey) -> tuple[PatientKey, ...]:
    """All keys of one person, the surviving first; just `key` where no feed knows it."""
    found = _find(conn, key)
    return (key,) if found is None else _keys(conn, person_of(conn, found))


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
    keys = _keys(conn, person_of(conn, row.survivor_pk))
    conn.execute(sa.update(merge).where(merge.c.id == number).values(undone_at=now, undone_because=reason))
    mark_changed(conn, keys, now=now)
    queue.wake(conn, keys=keys, now=now)
    return True


def issuers_of(conn: Connection, patient_id: str) -> list[str]:
    """Under how many issuers an ID is known: an ID alone names nobody."""
    return list(conn.scalars(sa.select(patient.c.issuer).where(patient.c.patient_id == patient_id).order_by(patient.c.issuer)))


def _find(conn: Connection, key: PatientKey) -> int | None:
    return conn.execute(_ROW, {"issuer": key.issuer, "patient_id": key.patient_id}).scalar()


# --- the view


# Statements of `view` and `apply`, built once: building them took most of their time.
_LINES: Final = (
    sa.select(demographics)
    .where(demographics.c.patient_pk.in_(sa.bindparam("several", expanding=True)))
    .order_by(demographics.c.at, demographics.c.id)
)
_FACTS: Final = (
    sa.select(observation, message.c.control_id)
    .outerjoin(message)
    .where(observation.c.patient_pk.in_(sa.bindparam("several", expanding=True)))
    .order_by(observation.c.id)
)


def view(conn: Connection, key: PatientKey, *, as_of: datetime, known_at: datetime | None = None) -> PatientRecord | None:
    """The record of exactly this patient of this issuer, nothing in it later than `as_of`, nothing received after `known_at`.

    Of several facts under one key a correction or withdrawal stands before a final, a final before a preliminary, then the later
    said, then the later received: feeds are replayed and connections are parallel.
    None if no feed has ever named the patient, or none had at `known_at`.
    """
    found = _find(conn, key) if key.issuer and key.patient_id else None
    if found is None:
        return None
    chain = person_of(conn, found, known_at)
    lines: Sequence[AnyRow] = conn.execute(_LINES, {"several": chain}).all()
    facts: Sequence[AnyRow] = conn.execute(_FACTS, {"several": chain}).all()
    if known_at is not None:
        lines, facts = ([row for row in rows if row.received_at <= known_at] for rows in (lines, facts))
    if known_at is not None and not any(row.patient_pk == found for row in (*lines, *facts)):
        return None
    best: dict[object, AnyRow] = {}
    for fact in facts:
        # Across merged keys too: a result that is corrected after the merge comes under the survivor.
        known = best.get(fact.key or fact.id)
        if known is None or _stands(fact) >= _stands(known):
            best[fact.key or fact.id] = fact
    # A withdrawn panel withdraws its components, whose keys begin with its own.
    gone = tuple(f"{fact.key}/" for fact in best.values() if fact.key and fact.status in WITHDRAWN)
    standing = [fact for fact in best.values() if not (gone and fact.key.startswith(gone))]
    # The time counts only now: what was moved past `as_of`, or withdrawn after it, must not stand as it was before.
    unusable = [fact for fact in standing if fact.at > fact.received_at + CLOCKS]
    return PatientRecord(
        patient=_demographics(key, lines, chain),
        as_of=as_of,
        observations=tuple(_observation(fact) for fact in standing if fact.at <= min(as_of, fact.received_at + CLOCKS)),
        keys=_keys(conn, chain),
        unusable=tuple(_observation(fact) for fact in unusable),
        stamp=_stamp(chain),
    )


def _stamp(chain: Sequence[int]) -> str:
    return hashlib.sha256(repr(list(chain)).encode()).hexdigest()[:16]


def stamp_of(conn: Connection, key: PatientKey) -> str:
    """What `view` would give as its stamp now; '' where no feed knows the patient."""
    found = _find(conn, key) if key.issuer else None
    return "" if found is None else _stamp(person_of(conn, found))


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
        message=fact.control_id or "",
    )


def is_known(conn: Connection, key: PatientKey) -> bool:
    """Whether any feed has named this patient of this issuer."""
    return _find(conn, key) is not None


def priority_of(conn: Connection, key: PatientKey, accession_number: str) -> int:
    """How urgent the orders of a study say it is; ROUTINE where there is none that stands. A cancelled order stays so."""
    keys = keys_of(conn, key) if accession_number else ()
    rows = [pk for pk in (_find(conn, one) for one in keys) if pk is not None]
    wanted = sa.select(imaging_order.c.placer, imaging_order.c.filler, imaging_order.c.priority, imaging_order.c.is_cancelled).where(
        imaging_order.c.patient_pk.in_(rows), imaging_order.c.accession_number == accession_number
    )
    last: dict[tuple[str, str], int] = {}
    cancelled = set()
    for row in conn.execute(wanted.order_by(imaging_order.c.id)):
        last[row.placer, row.filler] = row.priority
        if row.is_cancelled:
            cancelled.add((row.placer, row.filler))
    return min((priority for order, priority in last.items() if order not in cancelled), default=ROUTINE)
