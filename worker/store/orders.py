"""Rows of imaging orders: what feeds say of them, one row a statement, and how urgent a study is by them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from worker.domain import ROUTINE, Order, PatientKey
from worker.store import persons
from worker.store.schema import imaging_order


def add(conn: Connection, patient_pk: int, order: Order, *, said_at: datetime | None, said: Mapping[str, object]) -> bool:
    """Add what is said of an order; False for a repetition.

    The very same said at the same time is one, whatever was said since: a replayed day gives back nothing that was cancelled.
    Said without a time, it is one only of the last that was said of this order: STAT, ROUTINE, STAT ends as STAT.
    """
    of_order = sa.select(imaging_order).where(
        imaging_order.c.patient_pk == patient_pk,
        imaging_order.c.accession_number == order.accession_number,
        imaging_order.c.placer == order.placer,
        imaging_order.c.filler == order.filler,
    )
    if not (order.placer or order.filler):
        of_order = of_order.where(imaging_order.c.source == said["source"])
    rows = conn.execute(of_order.order_by(imaging_order.c.id)).all()
    if said_at is None:
        rows = rows[-1:]
    if (order.priority, order.is_cancelled, said_at) in {(row.priority, row.is_cancelled, row.said_at) for row in rows}:
        return False
    conn.execute(
        sa.insert(imaging_order).values(
            patient_pk=patient_pk,
            accession_number=order.accession_number,
            placer=order.placer,
            filler=order.filler,
            priority=order.priority,
            is_cancelled=order.is_cancelled,
            said_at=said_at,
            **said,
        )
    )
    return True


def priority_of(conn: Connection, key: PatientKey, accession_number: str) -> int:
    """How urgent the orders of a study say it is; ROUTINE where there is none that stands.

    A cancelled order stays so. One without a number is nobody's but its source's, and of those the last said counts: which of
    several such orders a cancellation means cannot be known.
    """
    keys = persons.keys_of(conn, key) if accession_number else ()
    rows = [pk for pk in (persons.find(conn, one) for one in keys) if pk is not None]
    wanted = sa.select(imaging_order).where(imaging_order.c.patient_pk.in_(rows), imaging_order.c.accession_number == accession_number)
    last: dict[tuple[str, str, str], int | None] = {}
    cancelled = set()
    for row in sorted(conn.execute(wanted), key=lambda one: (one.said_at or one.received_at, one.id)):
        is_numbered = bool(row.placer or row.filler)
        order = (row.placer, row.filler, "" if is_numbered else row.source)
        last[order] = None if row.is_cancelled else row.priority
        if row.is_cancelled and is_numbered:
            cancelled.add(order)
    return min((urgency for order, urgency in last.items() if urgency is not None and order not in cancelled), default=ROUTINE)
