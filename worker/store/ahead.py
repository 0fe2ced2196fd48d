"""Times that a clock wrote which was put back since: they are put back with it, or a study would wait for a day that is over.

Not here: how it is known that the clock was put back (worker/sweeps.py).
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from worker.store.schema import commitment, job, promise, study

#: Of each table, the time that says whether a row was written by that clock, and those that are waited for.
_WAITED_FOR: Final = (
    (study, "last_received_at", ("last_received_at", "quiet_until", "completed_at")),
    (job, "not_before", ("not_before",)),
    (commitment, "look_at", ("look_at",)),
    (promise, "not_before", ("not_before",)),
)


def put_back(conn: Connection, by: timedelta, *, lease_s: float, now: datetime) -> None:
    """Move what lies ahead of `now` back `by` as much as the clock was; leases end within `lease_s`, and who works renews them."""
    for table, witness, names in _WAITED_FOR:
        for row in conn.execute(sa.select(table).where(table.c[witness] > now)).mappings().all():
            moved = {name: row[name] - by for name in names if row[name] is not None and row[name] > now}
            conn.execute(sa.update(table).where(table.c.id == row["id"]).values(moved))
    end = now + timedelta(seconds=lease_s)
    conn.execute(sa.update(job).where(job.c.lease_expires_at > end).values(lease_expires_at=end))
