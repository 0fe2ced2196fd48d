"""Rows of messages: who said something, when it came, what became of it. What it said is in records.py."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from worker.store.schema import message
from worker.store.studies import insert_or_ignore


@dataclass(frozen=True, slots=True)
class Feed:
    """One sender of messages: how many of each result it sent, and the last."""

    sender: str
    counts: dict[str, int]
    last_received_at: datetime
    last_sent_at: str


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
) -> int | None:
    """Remember one message and return its row; None if the very same (sender, control ID, time, sha256) was accepted before."""
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
    return insert_or_ignore(conn, message, values)


def counts(conn: Connection) -> dict[str, int]:
    """How many messages were applied, ignored and refused."""
    rows = conn.execute(sa.select(message.c.result, sa.func.count()).group_by(message.c.result))
    return dict(rows.tuples().all())


def feeds(conn: Connection) -> list[Feed]:
    """Every sender there ever was, the last heard first; what could not be read at all has the sender ''."""
    rows = conn.execute(
        sa.select(message.c.sender, message.c.result, sa.func.count(), sa.func.max(message.c.id)).group_by(
            message.c.sender, message.c.result
        )
    ).all()
    found: dict[str, dict[str, int]] = {}
    last: dict[str, int] = {}
    for sender, result, count, newest in rows:
        found.setdefault(sender, {})[result] = count
        last[sender] = max(last.get(sender, 0), newest)
    times = {
        row.id: row
        for row in conn.execute(sa.select(message.c.id, message.c.received_at, message.c.sent_at).where(message.c.id.in_(last.values())))
    }
    made = [Feed(sender, results, times[last[sender]].received_at, times[last[sender]].sent_at) for sender, results in found.items()]
    return sorted(made, key=lambda feed: feed.last_received_at, reverse=True)


def rejected(conn: Connection, *, limit: int) -> list[tuple[int, datetime, str, str, str]]:
    """The last refused messages: number, when, from whom, trigger, why. Never their content."""
    wanted = sa.select(message.c.id, message.c.received_at, message.c.sender, message.c.trigger, message.c.reason)
    rows = conn.execute(wanted.where(message.c.result == "refused").order_by(message.c.id.desc()).limit(limit))
    return [tuple(row) for row in rows]


def raw(conn: Connection, number: int) -> bytes | None:
    """The bytes of a message that was kept because nothing was made of it; None for any other."""
    return conn.execute(sa.select(message.c.raw).where(message.c.id == number)).scalar()
