"""What happened to a study, one row an event, written in the transaction it speaks of.

``synoptic show`` prints these rows. Facts hold numbers, states and reasons, no patient data.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from worker.store.schema import event


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a study's history."""

    at: datetime
    name: str
    facts: dict[str, object]


def note(conn: Connection, study_id: int | None, *, name: str, now: datetime, **facts: object) -> None:
    """Add one line to the history."""
    conn.execute(sa.insert(event).values(at=now, study_id=study_id, name=name, facts=facts))


def of_study(conn: Connection, study_id: int) -> list[Entry]:
    """All that happened to a study, oldest first."""
    rows = conn.execute(sa.select(event.c.at, event.c.name, event.c.facts).where(event.c.study_id == study_id).order_by(event.c.id))
    return [Entry(row.at, row.name, row.facts) for row in rows]
