"""What stands of the patient's record: the facts of one person, of one issuer, as of a time.

::

    all that was said ─▶ of each key what stands ─▶ not later than `as_of`, not withdrawn ─▶ PatientRecord

Rows are written by records.py, which offers these names too. Not here: what a study is given of a record (worker/inputs.py).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from worker.domain import CLOCKS, Code, Observation, Patient, PatientKey, PatientRecord
from worker.store import persons
from worker.store.persons import person_of
from worker.store.schema import IS_WITHDRAWN, AnyRow, demographics, message, observation, patient

#: HL7 table 0085: what a result's status supersedes.
_RANK: Final = {"F": 1, "C": 2, "D": 2, "W": 2, "X": 2}
#: Statuses that take back what was said under the same key.
WITHDRAWN: Final = frozenset("DWX")
#: Of demographics.
PARTS: Final = ("name", "birth_date", "sex")
#: When it was said who somebody is, by a message about something else: any admission's word comes after it.
IN_PASSING: Final = datetime(1900, 1, 1, tzinfo=UTC)
#: Facts of a patient who is read whole: asking for some of so few takes longer.
FEW = 2_000


# Statements of `view`, built once: building them took most of their time.
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


#: Of the key alone: what it was merged with may make it a long read, not a wrong one. By the index alone: no fact is fetched.
_BEYOND: Final = (
    sa.select(observation.c.patient_pk)
    .join(patient)
    .where(patient.c.issuer == sa.bindparam("issuer"), patient.c.patient_id == sa.bindparam("patient_id"))
    .offset(sa.bindparam("few"))
    .limit(1)
)


def _with_rivals(is_asked: sa.ColumnElement[bool], *keys: sa.Select[tuple[str]]) -> sa.Select[tuple[object, ...]]:
    """The facts that are asked for, and those under `keys`; two sets of numbers, for each has its index."""
    asked = sa.select(observation.c.id).where(is_asked).correlate(None)
    rivals = sa.select(observation.c.id).where(_OF_PERSON, observation.c.key != "", observation.c.key.in_(sa.union_all(*keys)))
    return _FACTS.where(observation.c.id.in_(sa.union(asked, rivals.correlate(None))))


_CODED: Final = _with_rivals(_OF_CODES, sa.select(observation.c.key).where(_OF_CODES).correlate(None), _WITHDRAWALS)
_CODED_SINCE: Final = _with_rivals(_OF_TIME, sa.select(observation.c.key).where(_OF_TIME).correlate(None), _WITHDRAWALS)


def has_few(conn: Connection, key: PatientKey) -> bool:
    """Whether all facts of a patient are as soon read as some of them."""
    return conn.execute(_BEYOND, {"issuer": key.issuer, "patient_id": key.patient_id, "few": FEW}).first() is None


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
    facts = _facts(conn, chain, codes, since)
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
        told=tuple(dict.fromkeys(_said_to_be(line, keys) for line in lines if line.at == IN_PASSING)),
        admissions=tuple((line.at, _said_to_be(line, keys)) for line in lines if line.at > IN_PASSING),
    )


def _standing(facts: Sequence[AnyRow]) -> list[AnyRow]:
    """Of all that was said of one person what stands, withdrawals included."""
    best: dict[object, AnyRow] = {}
    # Taken back by its row: what else was said under its key, later or of a patient merged since, is not meant.
    taken = {fact.key for fact in facts if fact.status == "W" and fact.key.startswith("#")}
    for fact in facts:
        if taken and row_key(fact) in taken:
            continue
        # Across merged keys too: a result that is corrected after the merge comes under the survivor. And across codes: what was
        # filed under a wrong one is corrected under another, and a document may be cancelled by its number alone.
        name = (fact.source, fact.key or row_key(fact))
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


def row_key(fact: AnyRow) -> str:
    """The name by which this very fact is withdrawn, whatever else its source says under the same key; no source's keys begin so."""
    return f"#{fact.id}"


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
    if since is None:
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


def _is_withdrawn_repeat(fact: AnyRow, best: Mapping[object, AnyRow]) -> bool:
    """Whether a repeat of a key ("key#1") was said before the key was withdrawn: which of the repeats was meant is not told."""
    withdrawn = best.get((fact.source, fact.key.rpartition("#")[0]))
    return withdrawn is not None and withdrawn.status in WITHDRAWN and _stands(withdrawn)[1:] > _stands(fact)[1:]


def _demographics(key: PatientKey, rows: Sequence[AnyRow], chain: Sequence[int]) -> Patient:
    """Of each part what was last said of the surviving key, else of the others, else in passing; an empty one says nothing."""
    told: dict[str, str] = {}
    # Oldest first, the survivor's last.
    for row in sorted(rows, key=lambda one: (one.at > IN_PASSING, one.patient_pk == chain[0], one.at, one.id)):
        told |= {name: getattr(row, name) for name in PARTS if getattr(row, name)}
    return Patient(key, **told)


def _said_to_be(line: AnyRow, keys: Mapping[int, PatientKey]) -> Patient:
    return Patient(keys[line.patient_pk], **{name: getattr(line, name) for name in PARTS})


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


# --- what of one message, or of one source, stands


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
