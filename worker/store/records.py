"""Rows of the patient's record: what HL7 and FHIR told us, appended, never overwritten.

``apply`` is commit 3 of the line: after it, HL7 may be answered AA.
``view`` is the join's other half: the facts of one patient, of one issuer, as of a time.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from worker.domain import Code, Observation, Patient, PatientKey, PatientRecord, RecordUpdate
from worker.store import queue
from worker.store.schema import AnyRow, message, observation, patient
from worker.store.studies import insert_or_ignore

#: HL7 table 0085: what a result's status supersedes.
_RANK: Final = {"F": 1, "C": 2, "D": 2, "W": 2, "X": 2}
_WITHDRAWN: Final = frozenset("DWX")


def note_message(
    conn: Connection,
    *,
    sender: str,
    control_id: str,
    sent_at: str,
    trigger: str,
    result: str,
    now: datetime,
    reason: str = "",
    digest: str = "",
    raw: bytes | None = None,
) -> bool:
    """Remember one message; False if the very same (sender, control ID, time, sha256) was accepted before."""
    values = {
        "sender": sender,
        "control_id": control_id,
        "sent_at": sent_at,
        "sha256": digest,
        "trigger": trigger,
        "result": result,
        "reason": reason,
        "raw": raw,
        "received_at": now,
    }
    return insert_or_ignore(conn, message, values) is not None


def apply(conn: Connection, update: RecordUpdate, *, now: datetime) -> int:
    """Add what one message says of one patient, and wake the studies that wait for it.

    Returns
    -------
    int
        The number of facts added; facts already there (same key, same content) are not added again.
    """
    patient_pk = _patient_of(conn, update, now=now)
    added = 0
    for fact in update.observations:
        if _is_known(conn, patient_pk, fact):  # also when something newer stands: a replayed day undoes nothing
            continue
        conn.execute(
            sa.insert(observation).values(
                patient_pk=patient_pk,
                code=fact.code.value,
                scheme=fact.code.scheme,
                meaning=fact.code.meaning,
                at=fact.at,
                value=fact.value,
                comparator=fact.comparator,
                unit=fact.unit,
                text=fact.text,
                status=fact.status,
                key=fact.key,
                source=fact.source or update.source,
                received_at=now,
            )
        )
        added += 1
    queue.wake(conn, issuer=update.patient.key.issuer, patient_id=update.patient.key.patient_id, now=now)
    return added


def _patient_of(conn: Connection, update: RecordUpdate, *, now: datetime) -> int:
    key = update.patient.key
    demographics = {
        "name": update.patient.name,
        "birth_date": update.patient.birth_date,
        "sex": update.patient.sex,
        "source": update.source,
        "updated_at": now,
    }
    added = insert_or_ignore(conn, patient, {"issuer": key.issuer, "patient_id": key.patient_id, **demographics})
    if added is not None:
        return added
    found = conn.execute(sa.select(patient.c.id).where(patient.c.issuer == key.issuer, patient.c.patient_id == key.patient_id)).scalar_one()
    if update.has_demographics:
        known = {name: value for name, value in demographics.items() if value}
        conn.execute(sa.update(patient).where(patient.c.id == found).values(**known))
    return int(found)


def _is_known(conn: Connection, patient_pk: int, fact: Observation) -> bool:
    """Whether the very same was said before under the same key."""
    if not fact.key:
        return False
    said = conn.execute(
        sa.select(observation.c.value, observation.c.comparator, observation.c.unit, observation.c.text, observation.c.status).where(
            observation.c.patient_pk == patient_pk,
            observation.c.at == fact.at,
            observation.c.key == fact.key,
            observation.c.code == fact.code.value,
            observation.c.scheme == fact.code.scheme,
        )
    )
    return (fact.value, fact.comparator, fact.unit, fact.text, fact.status) in {tuple(row) for row in said}


def view(conn: Connection, key: PatientKey, *, as_of: datetime) -> PatientRecord | None:
    """The record of exactly this patient of this issuer, nothing in it later than `as_of`.

    Of several facts under one key a correction or withdrawal stands before a final, a final before a preliminary, whatever
    came last: feeds are replayed and connections are parallel. Among equals the newest received stands.
    None if no feed has ever named the patient.
    """
    if not (key.issuer and key.patient_id):
        return None
    row = conn.execute(sa.select(patient).where(patient.c.issuer == key.issuer, patient.c.patient_id == key.patient_id)).first()
    if row is None:
        return None
    facts = conn.execute(sa.select(observation).where(observation.c.patient_pk == row.id).order_by(observation.c.id))
    best: dict[object, AnyRow] = {}
    for fact in facts:
        known = best.get(fact.key or fact.id)
        if known is None or _RANK.get(fact.status, 0) >= _RANK.get(known.status, 0):
            best[fact.key or fact.id] = fact
    # A withdrawn panel withdraws its components, whose keys begin with its own.
    gone = tuple(f"{fact.key}/" for fact in best.values() if fact.key and fact.status in _WITHDRAWN)
    # The time counts only now: what was moved past `as_of`, or withdrawn after it, must not stand as it was before.
    standing = [fact for fact in best.values() if fact.at <= as_of and not (gone and fact.key.startswith(gone))]
    return PatientRecord(
        patient=Patient(key, row.name, row.birth_date, row.sex),
        as_of=as_of,
        observations=tuple(_observation(fact) for fact in standing),
    )


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
    )


def is_known(conn: Connection, key: PatientKey) -> bool:
    """Whether any feed has named this patient of this issuer."""
    return (
        conn.execute(sa.select(patient.c.id).where(patient.c.issuer == key.issuer, patient.c.patient_id == key.patient_id)).first()
        is not None
    )


def message_counts(conn: Connection) -> dict[str, int]:
    """How many messages were applied, ignored and refused."""
    rows = conn.execute(sa.select(message.c.result, sa.func.count()).group_by(message.c.result))
    return dict(rows.tuples().all())
