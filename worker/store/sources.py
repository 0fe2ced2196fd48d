"""Where what is known of a patient came from: the messages behind the facts, and each line of the demographics. Reads only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from worker.domain import PatientKey
from worker.store import persons
from worker.store.schema import demographics, message, patient

#: Well below the bound parameters that SQLite (32,766) and PostgreSQL (65,535) take in one statement.
_AT_ONCE: Final = 1000


@dataclass(frozen=True, slots=True)
class Message:
    """One message, without its content; `sent_at` is as the sender told it, '' if it did not.

    ``reason`` is why nothing, or not all, was made of it; or why a person did it by hand.
    """

    number: int
    sender: str
    control_id: str
    trigger: str
    sent_at: str
    received_at: datetime
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Told:
    """What one message said of a patient's demographics; an empty part said nothing."""

    key: PatientKey
    name: str
    birth_date: str
    sex: str
    source: str
    at: datetime
    received_at: datetime
    message_id: int | None


def messages(conn: Connection, numbers: Iterable[int]) -> list[Message]:
    """The messages of these numbers, in their order."""
    found: list[Message] = []
    said = message.c
    columns = (said.id, said.sender, said.control_id, said.trigger, said.sent_at, said.received_at, said.reason)
    wanted = sorted(set(numbers))
    for start in range(0, len(wanted), _AT_ONCE):
        some = wanted[start : start + _AT_ONCE]
        found += [Message(*row) for row in conn.execute(sa.select(*columns).where(message.c.id.in_(some)).order_by(message.c.id))]
    return found


def demographics_of(conn: Connection, keys: Iterable[PatientKey], *, known_at: datetime | None = None) -> list[Told]:
    """Every line of the demographics of these keys that was received until `known_at`, oldest first."""
    ids = persons.find_all(conn, keys).values()
    told = demographics.c
    columns = (told.name, told.birth_date, told.sex, told.source, told.at, told.received_at, told.message_id)
    wanted = sa.select(patient.c.issuer, patient.c.patient_id, *columns).join(patient, patient.c.id == told.patient_pk)
    wanted = wanted.where(told.patient_pk.in_(ids))
    if known_at is not None:
        wanted = wanted.where(told.received_at <= known_at)
    return [Told(PatientKey(row[0], row[1]), *row[2:]) for row in conn.execute(wanted.order_by(told.at, told.id))]
