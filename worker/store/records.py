"""Rows of the patient's record: what HL7, FHIR and tables told us, appended, never overwritten.

::

    patient A ──merge──▶ patient B ──merge──▶ patient C       one person: the facts of A, B and C are read together
        └ facts, demographics stay under the key they came with, so that undoing a merge is one time stamp

``apply`` is commit 3 of the line: after it, HL7 may be answered AA.
``view`` is the join's other half: the facts of one patient, of one issuer, as of a time.
``withdraw`` is a person's: what one message said stands no longer, and stays.
Who is who is in persons.py, orders are in orders.py; their names are offered here too.
Not here: messages and feeds (feeds.py), what a study is given of a record (worker/inputs.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from operator import itemgetter
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from worker.domain import Code, Observation, Order, Patient, PatientKey, PatientRecord, RecordUpdate
from worker.store import orders, persons, queue
from worker.store.database import listed, rows_of
from worker.store.orders import priority_of
from worker.store.persons import Held, is_known, issuers_of, keys_of, lock, mark_changed, merges_of, person_of, stamp_of, unmerge
from worker.store.schema import AnyRow, demographics, message, observation

__all__ = [
    "CLOCKS",
    "IN_PASSING",
    "WITHDRAWN",
    "apply",
    "apply_all",
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
    "withdraw",
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


def apply(conn: Connection, update: RecordUpdate, *, now: datetime, message_id: int | None = None, held: Held | None = None) -> int:
    """`apply_all` of one update."""
    return apply_all(conn, [update], now=now, message_id=message_id, held=held)


def apply_all(
    conn: Connection, updates: Sequence[RecordUpdate], *, now: datetime, message_id: int | None = None, held: Held | None = None
) -> int:
    """Add what one message says of patients, in order, wake the studies that wait for it, mark those that may be answered without it.

    The patients it names are locked until the commit: two messages that come together are applied one after the other. The number
    of statements does not depend on that of patients and facts; merges and orders, which are few, take some each.

    Parameters
    ----------
    held
        All patients that the updates name, where the caller has locked them.

    Returns
    -------
    int
        The number of facts added; what was said before, in the same words and at the same time, is not added again.
    """
    # A clock that is ahead must not rule until its time has come.
    updates = [replace(one, at=now) if one.at is not None and one.at > now else one for one in updates]
    if not updates:
        return 0
    said = {"source": updates[0].source, "received_at": now, "message_id": message_id}
    if held is None:
        held = persons.locked(conn, (key for one in updates for key in one.named), said)
    rows = held.rows
    changed = _add_demographics(conn, updates, rows, said)
    merged = _add_merges(conn, updates, rows, said)
    ordered = [
        (one.patient.key, order.accession_number)
        for one in updates
        for order in one.orders
        if orders.add(conn, rows[one.patient.key], order, said_at=_said_at(order, one, now), said={**said, "source": one.source})
    ]
    facts = _add_facts(conn, [row for one in updates for row in _facts(one, rows[one.patient.key], said, now=now)])
    changed |= merged | {row["patient_pk"] for row in facts}
    if merged:
        held = Held(rows, persons.chains(conn, rows.values()))
    keys = held.keys(conn)
    # Studies before jobs, as workers and receivers take them: else the two wait for each other.
    if changed:
        mark_changed(conn, {keys[pk] for one in changed for pk in held.chains[one]}, now=now)
    queue.wake(conn, keys=keys.values(), now=now)
    for key, accession_number in sorted(set(ordered), key=lambda one: (one[1], one[0].issuer, one[0].patient_id)):
        if accession_number:
            priority = priority_of(conn, key, accession_number)
            of_person = [keys[pk] for pk in held.chains[rows[key]]]
            queue.prioritize_order(conn, keys=of_person, accession_number=accession_number, priority=priority)
    return len(facts)


def _add_merges(conn: Connection, updates: Sequence[RecordUpdate], rows: Mapping[PatientKey, int], said: Mapping[str, object]) -> set[int]:
    """The rows of those who were merged now."""
    merged: set[int] = set()
    for update in updates:
        for one in update.merges:
            pair = rows[one.survivor], rows[one.retired]
            if persons.add_merge(conn, *pair, said_at=update.at, said={**said, "source": update.source}):
                merged.update(pair)
    return merged


def _add_demographics(
    conn: Connection, updates: Sequence[RecordUpdate], rows: Mapping[PatientKey, int], said: Mapping[str, object]
) -> set[int]:
    """Add lines to the histories, and return whose.

    None is added where the very same was said before at the same time, or both times without one.
    """
    lines = [((rows[one.patient.key], *told.values()), one) for one in updates if any((told := _parts(one.patient)).values())]
    if not lines:
        return set()
    dialect, known = conn.dialect.name, set[tuple[object, ...]]()
    for *words, at, received_at in conn.execute(
        _known_lines(dialect), {"rows": rows_of(dialect, dict.fromkeys(line for line, _ in lines))}
    ):
        known |= {(*words, at), (*words, None if at == received_at else at)}  # None: said without a time
    new: list[dict[str, Any]] = []
    for line, update in lines:
        said_at = update.at if update.has_demographics else IN_PASSING
        if (*line, said_at) in known:
            continue
        at = said_at or said["received_at"]
        known |= {(*line, at), (*line, None if at == said["received_at"] else at)}
        new.append({**said, "source": update.source, "patient_pk": line[0], **_parts(update.patient), "at": at})
    if new:
        conn.execute(sa.insert(demographics), new)
    return {row["patient_pk"] for row in new}


@cache
def _known_lines(dialect: str) -> sa.Select[*tuple[Any, ...]]:
    words = (demographics.c.patient_pk, *(demographics.c[name] for name in _PARTS))
    return sa.select(*words, demographics.c.at, demographics.c.received_at).where(listed(dialect, *words))


def _parts(patient: Patient) -> dict[str, str]:
    return {name: getattr(patient, name) for name in _PARTS}


#: What of a fact's row was said; the rest is of whom, by whom and when.
_ENVELOPE: Final = frozenset({"id", "patient_pk", "source", "meaning", "coded_meaning", "said_at", "told", "received_at", "message_id"})
_WORDS: Final = tuple(column for column in observation.c if column.name not in _ENVELOPE)
_words: Final = itemgetter(*(column.name for column in _WORDS))
_INSERT: Final = sa.insert(observation)


def _facts(update: RecordUpdate, patient_pk: int, said: Mapping[str, object], *, now: datetime) -> Iterator[dict[str, Any]]:
    """The rows of an update's facts."""
    told = {} if update.has_demographics else {name: value for name, value in _parts(update.patient).items() if value}
    envelope = {**said, "patient_pk": patient_pk, "told": json.dumps(told, sort_keys=True) if told else ""}
    for fact in update.observations:
        coded = fact.coded or Code("", "", "")
        yield {
            **envelope,
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
            "said_at": _said_at(fact, update, now),
        }


def _said_at(one: Observation | Order, update: RecordUpdate, now: datetime) -> datetime | None:
    """When this was said, never ahead: a clock that is must not rule until its time has come."""
    return min(one.said_at, now) if one.said_at else update.at if update.is_at_of_all else None


def _add_facts(conn: Connection, facts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Insert, and return, those that are no repetitions, neither of what is stored nor of one before them."""
    if not facts:
        return []
    known: dict[tuple[object, ...], list[tuple[Any, ...]]] = {}
    dialect = conn.dialect.name
    places = rows_of(dialect, dict.fromkeys((row["patient_pk"], row["at"], row["key"]) for row in facts))
    for *words, patient_pk, source, said_at, received_at in conn.execute(_known_facts(dialect), {"rows": places}):
        known.setdefault((patient_pk, *words), []).append((source, said_at, received_at))
    new = []
    for row in facts:
        same = known.setdefault((row["patient_pk"], *_words(row)), [])
        if not _is_known(row, same):  # also when something newer stands: a replayed day undoes nothing
            same.append((row["source"], row["said_at"], row["received_at"]))
            new.append(row)
    if new:
        conn.execute(_INSERT, new)
    return new


@cache
def _known_facts(dialect: str) -> sa.Select[*tuple[Any, ...]]:
    columns = (*_WORDS, observation.c.patient_pk, observation.c.source, observation.c.said_at, observation.c.received_at)
    return sa.select(*columns).where(listed(dialect, observation.c.patient_pk, observation.c.at, observation.c.key))


def _is_known(row: Mapping[str, Any], same: Iterable[tuple[Any, ...]]) -> bool:
    """Whether the very same was said before at the same time, or both times without one: then it is a repetition.

    The same value said again later is news: it may stand in place of another said meanwhile. Of a stored fact that does not tell
    when it was said (the first release kept no such time) it is only known that it was said before it came.
    """
    said_at = row["said_at"]
    return any(
        # Each source names its facts; what has no name is the same whoever says it.
        (source == row["source"] or not row["key"])
        and (known_said_at == said_at or (known_said_at is None and (not row["key"] or said_at <= received_at)))
        for source, known_said_at, received_at in same
    )


# --- what is taken back


def standing_of(conn: Connection, number: int) -> list[AnyRow]:
    """The facts of one message that stand, whatever was merged since: none that was superseded or withdrawn."""
    named = sa.select(observation.c.patient_pk).where(observation.c.message_id == number).distinct()
    return [fact for fact in _standing_under(conn, conn.scalars(named).all()) if fact.message_id == number]


def standing_from(conn: Connection, key: PatientKey, source: str) -> list[AnyRow]:
    """The facts that one source said under exactly this key and that stand."""
    found = persons.find(conn, key)
    facts = _standing_under(conn, [] if found is None else [found])
    return [fact for fact in facts if fact.patient_pk == found and fact.source == source]


def _standing_under(conn: Connection, rows: Iterable[int]) -> list[AnyRow]:
    """What stands of the persons whose rows these are, without withdrawals."""
    people = sorted({tuple(chain) for chain in persons.chains(conn, rows).values()})
    facts = (fact for chain in people for fact in _standing(conn.execute(_FACTS, {"several": chain}).all()))
    return [fact for fact in facts if fact.status not in WITHDRAWN]


def withdraw(conn: Connection, standing: Callable[[], Sequence[AnyRow]], *, now: datetime, message_id: int) -> int:
    """Take back facts that stand, by a row of status W for each; nothing is deleted, and what was known stays so.

    Who somebody is, merges and orders stay. As after a source's own withdrawal only a correction stands again.

    Parameters
    ----------
    standing
        Gives the facts to take back: asked again with the lock.
    message_id
        The row that says who withdraws them, and why.

    Returns
    -------
    int
        How many facts were withdrawn.
    """
    if not lock(conn, {fact.patient_pk for fact in standing()}):
        return 0  # a patient was erased this very moment
    found = standing()
    for fact in found:
        row = {column.name: getattr(fact, column.name) for column in observation.c if column.name != "id"}
        # A text would be kept for as long again, and who withdraws needs none.
        row |= {"status": "W", "key": fact.key or _row_key(fact), "text": "" if fact.kind == "text" else fact.text, "told": ""}
        row |= {"said_at": max(now, fact.said_at or fact.received_at), "received_at": now, "message_id": message_id}
        conn.execute(_INSERT, row)
    chains = persons.chains(conn, {fact.patient_pk for fact in found})
    named = persons.keys(conn, sorted({pk for chain in chains.values() for pk in chain}))
    mark_changed(conn, named, now=now)
    queue.wake(conn, keys=named, now=now)
    return len(found)


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

    Of several facts under one key of a source, be it of several codes, a correction or withdrawal stands before a final, a final before a
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
    facts: Sequence[AnyRow] = conn.execute(_some(chain, codes, since), {"several": chain}).all()
    if known_at is not None:
        lines, facts = ([row for row in rows if row.received_at <= known_at] for rows in (lines, facts))
        if (
            not any(row.patient_pk == found for row in (*lines, *facts))
            and not conn.execute(_FIRST, {"one": found, "by": known_at}).first()
        ):
            return None
    wanted = None if codes is None else frozenset(codes)
    standing = [
        fact for fact in _standing(facts) if (wanted is None or (fact.code, fact.scheme) in wanted) and (since is None or fact.at >= since)
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
    )


def _standing(facts: Sequence[AnyRow]) -> list[AnyRow]:
    """Of all that was said of one person what stands, withdrawals included."""
    best: dict[object, AnyRow] = {}
    for fact in facts:
        # Across merged keys too: a result that is corrected after the merge comes under the survivor. And across codes: what was
        # filed under a wrong one is corrected under another, and a document may be cancelled by its number alone.
        name = (fact.source, fact.key or _row_key(fact))
        known = best.get(name)
        if known is None or _stands(fact) >= _stands(known):
            best[name] = fact
    # A withdrawn panel withdraws its components, whose keys begin with its own.
    gone: dict[str, tuple[str, ...]] = {}
    for fact in best.values():
        if fact.key and fact.status in WITHDRAWN:
            gone[fact.source] = (*gone.get(fact.source, ()), f"{fact.key}/")
    return [
        fact
        for fact in best.values()
        if not (fact.key and (fact.key.startswith(gone.get(fact.source, ())) or _is_withdrawn_repeat(fact, best)))
    ]


def _row_key(fact: AnyRow) -> str:
    """The name by which a person withdraws a fact that its source gave none; no source's keys begin so."""
    return f"#{fact.id}"


_FIRST: Final = sa.select(observation.c.id).where(
    observation.c.patient_pk == sa.bindparam("one"), observation.c.received_at <= sa.bindparam("by")
)


def _some(chain: Sequence[int], codes: Collection[tuple[str, str]] | None, since: datetime | None) -> sa.Select[tuple[object, ...]]:
    """The facts that are wanted, and whatever else says whether they stand: under the same keys, and under the keys of withdrawals."""
    if codes is None and since is None:
        return _FACTS
    is_wanted: sa.ColumnElement[bool] = (
        sa.true() if codes is None else sa.tuple_(observation.c.code, observation.c.scheme).in_(sorted(codes))
    )
    if since is not None:
        is_wanted = sa.and_(is_wanted, observation.c.at >= since)
    says = sa.or_(is_wanted, observation.c.status.in_(sorted(WITHDRAWN)))
    named = sa.select(observation.c.key).where(observation.c.patient_pk.in_(chain), observation.c.key != "", says).correlate(None)
    return _FACTS.where(sa.or_(is_wanted, observation.c.key.in_(named)))


def person(conn: Connection, key: PatientKey) -> Patient | None:
    """Who this patient is by all that was said so far, of all merged keys; None if no feed has ever named the patient."""
    found = persons.find(conn, key) if key.issuer and key.patient_id else None
    if found is None:
        return None
    chain = person_of(conn, found)
    return _demographics(key, conn.execute(_LINES, {"several": chain}).all(), chain)


def _stands(fact: AnyRow) -> tuple[int, datetime, int]:
    return _RANK.get(fact.status, 0), fact.said_at or fact.received_at, fact.id


def _is_withdrawn_repeat(fact: AnyRow, best: Mapping[object, AnyRow]) -> bool:
    """Whether a repeat of a key ("key#1") was said before the key was withdrawn: which of the repeats was meant is not told."""
    withdrawn = best.get((fact.source, fact.key.rpartition("#")[0]))
    return withdrawn is not None and withdrawn.status in WITHDRAWN and _stands(withdrawn)[1:] > _stands(fact)[1:]


def _demographics(key: PatientKey, rows: Sequence[AnyRow], chain: Sequence[int]) -> Patient:
    """Of each part what was last said of the surviving key, else of the others, else in passing; an empty one says nothing."""
    told: dict[str, str] = {}
    # Oldest first, the survivor's last.
    for row in sorted(rows, key=lambda one: (one.at > IN_PASSING, one.patient_pk == chain[0], one.at, one.id)):
        told |= {name: getattr(row, name) for name in _PARTS if getattr(row, name)}
    return Patient(key, **told)


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
