"""Rows of the patient's record: what HL7 and FHIR told us, appended, never overwritten.

``apply`` is commit 3 of the line: after it, HL7 may be answered AA.
``view`` is the join's other half: the facts of one patient, of one issuer, as of a time.
"""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from worker.domain import Code, Observation, Patient, PatientKey, PatientRecord, RecordUpdate
from worker.store import queue
from worker.store.schema import message, observation, patient
from worker.store.studies import insert_or_ignore


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
    raw: bytes | None = None,
) -> bool:
    """Remember one message; False if an equal one (sender, control ID, time) was accepted before."""
    values = {
        "sender": sender,
        "control_id": control_id,
        "sent_at": sent_at,
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
        if _is_known(conn, patient_pk, fact):
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
    """Whether the newest fact under the same key says the same."""
    if not fact.key:
        return False
    newest = conn.execute(
        sa.select(observation.c.value, observation.c.comparator, observation.c.unit, observation.c.text, observation.c.status)
        .where(
            observation.c.patient_pk == patient_pk,
            observation.c.at == fact.at,
            observation.c.key == fact.key,
            observation.c.code == fact.code.value,
            observation.c.scheme == fact.code.scheme,
        )
        .order_by(observation.c.id.desc())
        .limit(1)
    ).first()
    return newest is not None and tuple(newest) == (fact.value, fact.comparator, fact.unit, fact.text, fact.status)


def view(conn: Connection, key: PatientKey, *, as_of: datetime) -> PatientRecord | None:
    """The record of exactly this patient of this issuer, nothing in it later than `as_of`.

    Of several facts under one key the newest received stands: corrections replace, deletions hide.
    None if no feed has ever named the patient.
    """
    if not (key.issuer and key.patient_id):
        return None
    row = conn.execute(sa.select(patient).where(patient.c.issuer == key.issuer, patient.c.patient_id == key.patient_id)).first()
    if row is None:
        return None
    facts = conn.execute(
        sa.select(observation).where(observation.c.patient_pk == row.id, observation.c.at <= as_of).order_by(observation.c.id)
    )
    newest: dict[object, Observation] = {}
    for fact in facts:
        kept = Observation(
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
        newest[fact.key or fact.id] = kept
    return PatientRecord(
        patient=Patient(key, row.name, row.birth_date, row.sex),
        as_of=as_of,
        observations=tuple(newest.values()),
    )


def message_counts(conn: Connection) -> dict[str, int]:
    """How many messages were applied, ignored and refused."""
    rows = conn.execute(sa.select(message.c.result, sa.func.count()).group_by(message.c.result))
    return dict(rows.tuples().all())
