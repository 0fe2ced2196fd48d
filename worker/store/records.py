"""Rows of the patient's record: what HL7, FHIR and tables told us, appended, never overwritten.

::

    patient A ──merge──▶ patient B ──merge──▶ patient C       one person: the facts of A, B and C are read together
        └ facts, demographics stay under the key they came with, so that undoing a merge is one time stamp

``apply`` is commit 3 of the line: after it, HL7 may be answered AA.
``withdraw`` is a person's: what one message said stands no longer, and stays.
What stands of all this is in views.py, who is who in persons.py, orders are in orders.py; their names are offered here too.
Not here: messages and feeds (feeds.py), what a study is given of a record (worker/inputs.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cache
from operator import itemgetter
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from worker.domain import Code, Observation, Order, Patient, PatientKey, RecordUpdate
from worker.store import orders, persons, queue, resources
from worker.store.database import listed, rows_of
from worker.store.orders import priority_of
from worker.store.persons import Held, is_known, issuers_of, keys_of, lock, mark_changed, merges_of, person_of, stamp_of, unmerge
from worker.store.schema import AnyRow, demographics, observation
from worker.store.views import IN_PASSING, PARTS, WITHDRAWN, has_few, person, row_key, standing_from, standing_of, view

__all__ = [
    "IN_PASSING",
    "WITHDRAWN",
    "apply",
    "apply_all",
    "has_few",
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
    "standing_from",
    "standing_of",
    "unmerge",
    "view",
    "withdraw",
]

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
    if merged:
        held = Held(rows, persons.chains(conn, rows.values()))
    versions = resources.versions(updates, rows, facts, now=now)
    moved = resources.moved(conn, facts, held, versions, now=now)
    held = Held(rows, held.chains | persons.chains(conn, {pk for pk, _ in moved}))
    gone = resources.gone(conn, versions | moved)
    _take_back(conn, gone, by_row=True, now=now, message_id=message_id)
    changed |= merged | {row["patient_pk"] for row in (*facts, *({"patient_pk": one.patient_pk} for one in gone))}
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
    words = (demographics.c.patient_pk, *(demographics.c[name] for name in PARTS))
    return sa.select(*words, demographics.c.at, demographics.c.received_at).where(listed(dialect, *words))


def _parts(patient: Patient) -> dict[str, str]:
    return {name: getattr(patient, name) for name in PARTS}


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
    _take_back(conn, found, by_row=False, now=now, message_id=message_id)
    chains = persons.chains(conn, {fact.patient_pk for fact in found})
    named = persons.keys(conn, sorted({pk for chain in chains.values() for pk in chain}))
    mark_changed(conn, named, now=now)
    queue.wake(conn, keys=named, now=now)
    return len(found)


def _take_back(conn: Connection, found: Sequence[AnyRow], *, by_row: bool, now: datetime, message_id: int | None) -> None:
    """Add a row of status W for each fact; `by_row`: nothing else said under its key is meant, be it later or of another patient."""
    for fact in found:
        row = {column.name: getattr(fact, column.name) for column in observation.c if column.name != "id"}
        # A text would be kept for as long again, and who withdraws needs none.
        row |= {"status": "W", "key": row_key(fact) if by_row else fact.key or row_key(fact)}
        row |= {"text": "" if fact.kind == "text" else fact.text, "told": ""}
        row |= {"said_at": max(now, fact.said_at or fact.received_at), "received_at": now, "message_id": message_id}
        conn.execute(_INSERT, row)
