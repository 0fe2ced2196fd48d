"""Deliveries that the configuration names no more, and an operator's word that they are owed to nobody.

A form that a PACS will never take leaves a dead letter a study, and each study counts as failed. Only who asks takes them back, and
never the program by itself: a line of the configuration that was lost for a day must cost no result.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from datetime import datetime
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from worker.store import history
from worker.store.database import Store
from worker.store.schema import GIVEN_UP, AnyRow, commitment, document, job

#: Deliveries of one transaction: SQLite's other writers wait for it.
BATCH: Final = 200

_OWED: Final = sa.select(job).join(document).where(job.c.kind == "deliver", job.c.state.in_(("available", *GIVEN_UP)))


def unnamed(conn: Connection, wanted: Mapping[str, Collection[str]]) -> list[AnyRow]:
    """What is neither done nor in hand, of kinds that `wanted` lacks: destination, kind, how many wait, were given up, cancelled."""
    counts = (sa.func.sum(sa.case((job.c.state == state, 1), else_=0)).label(state) for state in ("available", *GIVEN_UP))
    by = (job.c.destination, document.c.kind)
    rows = conn.execute(_OWED.with_only_columns(*by, *counts).group_by(*by).order_by(*by))
    return [row for row in rows if row.kind not in wanted.get(row.destination, ())]


def take_back(store: Store, destination: str, *, kinds: Collection[str], now: datetime, by: str = "") -> Iterator[int]:
    """Delete the deliveries to `destination` of documents that are none of `kinds`, `BATCH` by `BATCH`; yields how many.

    What is done or in hand stays, and what was deleted stands in each study's history.
    """
    columns = (job.c.id, job.c.study_id, job.c.bundle, job.c.input_version, job.c.state, document.c.kind)
    owed = _OWED.with_only_columns(*columns).where(job.c.destination == destination, document.c.kind.not_in(list(kinds)))
    while True:
        with store.begin() as conn:
            # What another transaction holds is about to be sent, and is the next batch's if it is not.
            rows = conn.execute(owed.order_by(job.c.id).limit(BATCH).with_for_update(of=job, skip_locked=True)).all()
            ids = [row.id for row in rows]
            conn.execute(sa.delete(commitment).where(commitment.c.job_id.in_(ids)))
            conn.execute(sa.delete(job).where(job.c.id.in_(ids)))
            for row in rows:
                facts = {"bundle": row.bundle, "version": row.input_version, "destination": destination, "document": row.kind}
                history.note(conn, row.study_id, name="deliver.withdrawn", now=now, **facts, was=row.state, by=by)
        if not rows:
            return
        yield len(rows)
