"""Rows of the patient's record: what HL7, FHIR and tables told us, appended, never overwritten.

::

    patient A ──merge──▶ patient B ──merge──▶ patient C       one person: the facts of A, B and C are read together
        └ facts, demographics stay under the key they came with, so that undoing a merge is one time stamp

``apply`` is commit 3 of the line: after it, HL7 may be answered AA.
``view`` is the join's other half: the facts of one patient, of one issuer, as of a time.
Who is who is in persons.py, orders are in orders.py; their names are offered here too.
Not here: messages and feeds (feeds.py), what a study is given of a record (worker/inputs.py).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from worker.domain import Code, Observation, Patient, PatientKey, PatientRecord, RecordUpdate
from worker.store import orders, persons, queue
from worker.store.orders import priority_of
from worker.store.persons import is_known, issuers_of, keys_of, lock, mark_changed, merges_of, person_of, stamp_of, unmerge
from worker.store.schema import IS_WITHDRAWN, AnyRow, demographics, message, observation

__all__ = [
    "CLOCKS",
    "IN_PASSING",
    "WITHDRAWN",
    "apply",
    "is_known",
    "issuers_of",
    "keys_of",
    "lock",
    "mark_changed",
    "merges_of",
    "person",
    "person_of",
    "priority_of",
    "stamp_of",
    "unmerge",
    "view",
]

#: HL7 table 0085: what a result's status supersedes.
_RANK: Final = {"F": 1, "C": 2, "D": 2, "W": 2, "X": 2}
#: Statuses that take back what was said under the same key.
WITHDRAWN: Final = frozenset("DWX")
#: How far clocks may differ before a time of after its own message is a wrong one.
CLOCKS: Final = timedelta(hours=24)
_PARTS: Final = ("name", "birth_date", "sex")
#: When it was said who somebody is, by a message about something else: any admission's word comes after it.
IN_PASSING: Final = datetime(1900, 1, 1, tzinfo=UTC)


# --- what is said


def apply(conn: Connection, update: RecordUpdate, *, now: datetime, message_id: int | None = None) -> int:
    """Add what one message says of one patient, wake the studies that wait for it, mark those that may be answered without it.

    The patients it names are locked until the commit: two messages that come together are applied one after the other.

    Returns
    -------
    int
        The number of facts added; what was said before, in the same words and at the same time, is not added again.
    """
    said = {"source": update.source, "received_at": now, "message_id": message_id}
    if update.at is not None and update.at > now:  # a clock that is ahead must not rule until its time has come
        update = replace(update, at=now)
    pairs = [(one.survivor, one.retired) for one in update.merges]
    rows = persons.locked(conn, [update.patient.key, *(key for pair in pairs for key in pair)], said)
    patient_pk = rows[update.patient.key]
    changed = int(_add_demographics(conn, patient_pk, update, said))
    for survivor, retired in pairs:
        changed += persons.add_merge(conn, rows[survivor], rows[retired], said_at=update.at, said=said)
    ordered = [order for order in update.orders if orders.add(conn, patient_pk, order, said_at=update.at, said=said)]
    told = {} if update.has_demographics else _told(update.patient)
    fact_said = {**said, "told": json.dumps(told, sort_keys=True) if told else ""}
    added = sum(_add_fact(conn, patient_pk, fact, update, fact_said, now=now) for fact in update.observations)
    keys = persons.keys(conn, persons.people(conn, rows.values()))
    # Studies before jobs, as workers and receivers take them: else the two wait for each other.
    if changed or added:
        mark_changed(conn, keys, now=now)
    queue.wake(conn, keys=keys, now=now)
    for accession_number in sorted({order.accession_number for order in ordered} - {""}):
        priority = priority_of(conn, update.patient.key, accession_number)
        queue.prioritize_order(conn, keys=keys, accession_number=accession_number, priority=priority)
    return added


def _add_demographics(conn: Connection, patient_pk: int, update: RecordUpdate, said: dict[str, object]) -> bool:
    """Add a line to the history; False where the very same was said before at the same time, or both times without one."""
    told = dict.fromkeys(_PARTS, "") | _told(update.patient)
    if not any(told.values()):
        return False
    at = update.at if update.has_demographics else IN_PASSING
    same = sa.select(demographics.c.id).where(demographics.c.patient_pk == patient_pk)
    for name, value in (*told.items(), ("at", at or demographics.c.received_at)):
        same = same.where(demographics.c[name] == value)
    if conn.execute(same.limit(1)).first():
        return False
    conn.execute(sa.insert(demographics).values(patient_pk=patient_pk, **told, at=at or said["received_at"], **said))
    return True


def _told(patient: Patient) -> dict[str, str]:
    """The parts of the demographics that say something."""
    return {name: value for name in _PARTS if (value := getattr(patient, name))}


#: What of a fact's row was said; the rest is of whom, by whom and when.
_ENVELOPE: Final = frozenset({"id", "patient_pk", "source", "meaning", "coded_meaning", "said_at", "told", "received_at", "message_id"})
_WORDS: Final = tuple(column for column in observation.c if column.name not in _ENVELOPE)
_SAID: Final = sa.select(*_WORDS, observation.c.source, observation.c.said_at, observation.c.received_at).where(
    observation.c.patient_pk == sa.bindparam("patient_pk"), observation.c.at == sa.bindparam("at"), observation.c.key == sa.bindparam("key")
)
_INSERT: Final = sa.insert(observation)


def _add_fact(
    conn: Connection, patient_pk: int, fact: Observation, update: RecordUpdate, said: dict[str, object], *, now: datetime
) -> bool:
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
        "said_at": min(fact.said_at, now) if fact.said_at else update.at,
    }
    if _is_known(conn, row):  # also when something newer stands: a replayed day undoes nothing
        return False
    conn.execute(_INSERT, row)
    return True


def _is_known(conn: Connection, row: dict[str, object]) -> bool:
    """Whether the very same was said before at the same time, or both times without one: then it is a repetition.

    The same value said again later is news: it may stand in place of another said meanwhile. Of a stored fact that does not tell
    when it was said (the first release kept no such time) it is only known that it was said before it came.
    """
    words = tuple(row[column.name] for column in _WORDS)
    said_at = row["said_at"]
    for *known, source, known_said_at, received_at in conn.execute(_SAID, {name: row[name] for name in ("patient_pk", "at", "key")}):
        # Each source names its facts; what has no name is the same whoever says it.
        if tuple(known) != words or (row["key"] and source != row["source"]):
            continue
        if known_said_at == said_at or (known_said_at is None and (not row["key"] or said_at <= received_at)):
            return True
    return False


# --- the view


# Statements of `view` and `apply`, built once: building them took most of their time.
_LINES: Final = (
    sa.select(demographics)
    .where(demographics.c.patient_pk.in_(sa.bindparam("several", expanding=True)))
    .order_by(demographics.c.at, demographics.c.id)
)
_OF_PERSON: Final = observation.c.patient_pk.in_(sa.bindparam("several", expanding=True))
_FACTS: Final = sa.select(observation, message.c.control_id).outerjoin(message).where(_OF_PERSON).order_by(observation.c.id)
_OF_CODES: Final = sa.and_(_OF_PERSON, observation.c.code.in_(sa.bindparam("codes", expanding=True)))
_OF_TIME: Final = sa.and_(_OF_CODES, observation.c.at >= sa.bindparam("since"))
_WITHDRAWALS: Final = sa.select(observation.c.key).where(_OF_PERSON, sa.text(IS_WITHDRAWN)).correlate(None)


def _with_rivals(is_asked: sa.ColumnElement[bool], *keys: sa.Select[tuple[str]]) -> sa.Select[tuple[object, ...]]:
    """The facts that are asked for, and those under `keys`; two sets of numbers, for each has its index."""
    asked = sa.select(observation.c.id).where(is_asked).correlate(None)
    rivals = sa.select(observation.c.id).where(_OF_PERSON, observation.c.key != "", observation.c.key.in_(sa.union_all(*keys)))
    return _FACTS.where(observation.c.id.in_(sa.union(asked, rivals.correlate(None))))


_CODED: Final = _with_rivals(_OF_CODES, _WITHDRAWALS)
_CODED_SINCE: Final = _with_rivals(_OF_TIME, sa.select(observation.c.key).where(_OF_TIME).correlate(None), _WITHDRAWALS)


def view(
    conn: Connection,
    key: PatientKey,
    *,
    as_of: datetime,
    known_at: datetime | None = None,
    codes: Collection[tuple[str, str]] | None = None,
    since: datetime | None = None,
) -> PatientRecord | None:
    """The record of exactly this patient of this issuer, nothing in it later than `as_of`, nothing received after `known_at`.

    Of several facts of one code under one key of a source a correction or withdrawal stands before a final, a final before a
    preliminary, then the later said, then the later received: feeds are replayed and connections are parallel.
    None if no feed has ever named the patient, or none had at `known_at`.

    Parameters
    ----------
    codes
        (value, scheme) of the facts to give; None: all. Not those alone are read: others withdraw them.
    since
        The time of the oldest fact to give; None: all.
    """
    found = persons.find(conn, key) if key.issuer and key.patient_id else None
    if found is None:
        return None
    chain = person_of(conn, found, known_at)
    lines: Sequence[AnyRow] = conn.execute(_LINES, {"several": chain}).all()
    facts = _facts(conn, chain, codes, since)
    if known_at is not None:
        lines, facts = ([row for row in rows if row.received_at <= known_at] for rows in (lines, facts))
        if (
            not any(row.patient_pk == found for row in (*lines, *facts))
            and not conn.execute(_FIRST, {"one": found, "by": known_at}).first()
        ):
            return None
    best: dict[object, AnyRow] = {}
    for fact in facts:
        # Across merged keys too: a result that is corrected after the merge comes under the survivor.
        name = (fact.source, fact.scheme, fact.code, fact.key) if fact.key else fact.id
        known = best.get(name)
        if known is None or _stands(fact) >= _stands(known):
            best[name] = fact
    # A withdrawn panel withdraws its components, whose keys begin with its own.
    gone: dict[str, tuple[str, ...]] = {}
    for fact in best.values():
        if fact.key and fact.status in WITHDRAWN:
            gone[fact.source] = (*gone.get(fact.source, ()), f"{fact.key}/")
    wanted = None if codes is None else frozenset(codes)
    standing = [
        fact
        for fact in best.values()
        if not (fact.key and fact.key.startswith(gone.get(fact.source, ())))
        and (wanted is None or (fact.code, fact.scheme) in wanted)
        and (since is None or fact.at >= since)
    ]
    # The time counts only now: what was moved past `as_of`, or withdrawn after it, must not stand as it was before.
    unusable = [fact for fact in standing if fact.at > fact.received_at + CLOCKS]
    keys = dict(zip(chain, persons.keys(conn, chain), strict=True))
    return PatientRecord(
        patient=_demographics(key, lines, chain),
        as_of=as_of,
        observations=tuple(_observation(fact, keys) for fact in standing if fact.at <= min(as_of, fact.received_at + CLOCKS)),
        keys=tuple(keys.values()),
        unusable=tuple(_observation(fact, keys) for fact in unusable),
        stamp=persons.stamp(chain),
        told=tuple(dict.fromkeys(_said_to_be(line, keys) for line in lines if line.at == IN_PASSING)),
    )


_FIRST: Final = sa.select(observation.c.id).where(
    observation.c.patient_pk == sa.bindparam("one"), observation.c.received_at <= sa.bindparam("by")
)


def _facts(conn: Connection, chain: Sequence[int], codes: Collection[tuple[str, str]] | None, since: datetime | None) -> Sequence[AnyRow]:
    """The facts that are wanted, and whatever else says whether they stand: under the same keys, and under the keys of withdrawals.

    More than that may be among them: `view` chooses.
    """
    if codes is None:
        return conn.execute(_FACTS, {"several": chain}).all()
    asked = {"several": chain, "codes": sorted({value for value, _ in codes})}
    if since is None:  # all that is said under a key and a code has the code
        return conn.execute(_CODED, asked).all()
    return conn.execute(_CODED_SINCE, {**asked, "since": since}).all()


def person(conn: Connection, key: PatientKey) -> Patient | None:
    """Who this patient is by all that was said so far, of all merged keys; None if no feed has ever named the patient."""
    found = persons.find(conn, key) if key.issuer and key.patient_id else None
    if found is None:
        return None
    chain = person_of(conn, found)
    return _demographics(key, conn.execute(_LINES, {"several": chain}).all(), chain)


def _stands(fact: AnyRow) -> tuple[int, datetime, int]:
    return _RANK.get(fact.status, 0), fact.said_at or fact.received_at, fact.id


def _demographics(key: PatientKey, rows: Sequence[AnyRow], chain: Sequence[int]) -> Patient:
    """Of each part what was last said of the surviving key, else of the others, else in passing; an empty one says nothing."""
    told: dict[str, str] = {}
    # Oldest first, the survivor's last.
    for row in sorted(rows, key=lambda one: (one.at > IN_PASSING, one.patient_pk == chain[0], one.at, one.id)):
        told |= {name: getattr(row, name) for name in _PARTS if getattr(row, name)}
    return Patient(key, **told)


def _said_to_be(line: AnyRow, keys: Mapping[int, PatientKey]) -> Patient:
    return Patient(keys[line.patient_pk], **{name: getattr(line, name) for name in _PARTS})


def _observation(fact: AnyRow, keys: Mapping[int, PatientKey]) -> Observation:
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
        said_at=fact.said_at,
        told=Patient(keys[fact.patient_pk], **json.loads(fact.told)) if fact.told else None,
    )
