"""What happened to a study, one row an event, written in the transaction it speaks of.

``synoptic show`` prints these rows. Facts hold numbers, states and reasons, no patient data.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def is_discarded_for(past: Sequence[Entry], error: type[Exception], *, bundle: str, version: int) -> bool:
    """Whether the last word on an analysis is that it was discarded for such an error, in this version."""
    of_bundle = [one.facts for one in past if one.name == "infer.discarded" and one.facts.get("bundle") == bundle]
    return bool(of_bundle) and (of_bundle[-1].get("version"), of_bundle[-1].get("error")) == (version, error.__name__)
