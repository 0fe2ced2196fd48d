"""What FHIR resources said and say no more: of another patient, or in components that their newest version has lost.

A resource has one patient and one newest version. Nothing tells of what it has left: it is found by the name of the resource.
Reads only. Not here: the rows that withdraw it (records.py), what a server says that it has deleted (worker/fhir_feed.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from worker.domain import PatientKey, RecordUpdate
from worker.store import persons
from worker.store.database import listed, rows_of
from worker.store.persons import Held
from worker.store.schema import IS_OF_SERVER, AnyRow, observation
from worker.store.views import WITHDRAWN

#: Of a patient's row and a resource: when its newest version was said, and the keys of the facts in it.
Versions = dict[tuple[int, str], tuple[datetime, frozenset[str]]]

_taken: Final = observation.alias()
_is_taken: Final = sa.exists().where(
    _taken.c.patient_pk == observation.c.patient_pk, _taken.c.key == sa.literal("#").concat(sa.cast(observation.c.id, sa.Text))
)
#: Those that no row of their own has withdrawn, and are no withdrawals.
_FACTS: Final = sa.select(observation).where(observation.c.status.not_in(WITHDRAWN), sa.not_(_is_taken))
_OF_PATIENTS: Final = _FACTS.where(
    observation.c.patient_pk.in_(sa.bindparam("several", expanding=True)), sa.func.substr(observation.c.source, 1, 4) == "FHIR"
)


def versions(
    updates: Sequence[RecordUpdate], rows: Mapping[PatientKey, int], facts: Sequence[Mapping[str, Any]], *, now: datetime
) -> Versions:
    """The newest version in these updates of each resource of which these facts are new."""
    touched = {(row["patient_pk"], _resource(row["key"])) for row in facts if row["key"] and _is_of_fhir(row["source"])}
    found: Versions = {}
    for one in updates:
        for fact in one.observations:
            if (of := (rows[one.patient.key], _resource(fact.key))) not in touched:
                continue
            said = min(fact.said_at or now, now)
            newest, keys = found.get(of, (said, frozenset({of[1]})))
            if said >= newest:
                found[of] = said, (keys if said == newest else frozenset({of[1]})) | {fact.key}
    return found


def moved(conn: Connection, facts: Sequence[Mapping[str, Any]], held: Held, newest: Versions, *, now: datetime) -> Versions:
    """The resources of these facts that a server said earlier to be of others, who are locked now; nothing of them is kept.

    Not of those whom a feed has merged with the patient: theirs it is as well.
    """
    named = {(row["source"], row["key"]): row for row in facts if row["key"] and _is_of_fhir(row["source"]) and row["source"] != "FHIR"}
    if not named:
        return {}
    asked = _named(conn.dialect.name), {"rows": rows_of(conn.dialect.name, named)}

    def earlier() -> Versions:
        found = ((fact, named[fact.source, fact.key]) for fact in conn.execute(*asked))
        return {
            (fact.patient_pk, name): (newest[new["patient_pk"], name][0], frozenset())
            for fact, new in found
            if fact.patient_pk not in held.chains[new["patient_pk"]] and _said(fact) < (new["said_at"] or now)
            for name in (_resource(fact.key),)
        }

    if not (found := earlier()) or not persons.lock(conn, {pk for pk, _ in found}):
        return {}
    return earlier()


@cache
def _named(dialect: str) -> sa.Select[*tuple[Any, ...]]:
    return _FACTS.where(listed(dialect, observation.c.source, observation.c.key), sa.text(IS_OF_SERVER))


def gone(conn: Connection, known: Versions) -> list[AnyRow]:
    """The facts of these resources that their newest version, told now or known already, does not have."""
    said_of: dict[tuple[int, str], list[AnyRow]] = {}
    for fact in conn.execute(_OF_PATIENTS, {"several": sorted({pk for pk, _ in known})}) if known else ():
        if (of := (fact.patient_pk, _resource(fact.key))) in known:
            said_of.setdefault(of, []).append(fact)
    found: list[AnyRow] = []
    for of, facts in said_of.items():
        said, keys = known[of]
        if (newest := max(map(_said, facts))) > said:  # an older version came later
            keys = frozenset(fact.key for fact in facts if _said(fact) == newest) | {of[1]}
        found += [fact for fact in facts if fact.key not in keys]
    return found


def _said(fact: AnyRow) -> datetime:
    said: datetime = fact.said_at or fact.received_at
    return said


def _is_of_fhir(source: str) -> bool:
    """HL7's senders have a "|", and give their numbers anew."""
    return source == "FHIR" or (source.startswith("FHIR ") and "|" not in source)


def _resource(key: str) -> str:
    """Source, type and id, of which a fact's key says more where it is of a component."""
    return "/".join(key.split("/")[:3])
