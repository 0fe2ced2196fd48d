"""Rows of messages: who said something, when it came, what became of it. What it said is in records.py."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from worker.store.schema import message
from worker.store.studies import insert_or_ignore

#: Who sends what a person does to the record by hand; the control ID is that person's login.
OPERATOR: Final = "operator"
#: What a refused message's reason goes on with, after it was tried again.
_AGAIN: Final = " Tried again: "
#: A message refused again within this time is the same trouble: its bytes are kept once.
_SAME: Final = timedelta(days=1)


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
    """Remember one message and return its row; None if the very same (sender, control ID, time, sha256) was accepted before.

    Of one that is refused again and again within a day the bytes are kept once; each time is a row, and is counted.
    """
    if result == "refused" and raw is not None:
        digest = digest or hashlib.sha256(raw).hexdigest()
        if _holder(conn, sender, digest, now) is not None:
            raw = None
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


def _holder(conn: Connection, sender: str, digest: str, at: datetime) -> int | None:
    """The refused message that holds these bytes for all that were refused within a day of it."""
    wanted = sa.select(message.c.id).where(message.c.sender == sender, message.c.received_at.between(at - _SAME, at))
    wanted = wanted.where(message.c.sha256 == digest, message.c.result == "refused", message.c.raw.is_not(None))
    return conn.execute(wanted.order_by(message.c.id.desc()).limit(1)).scalar()


def row_of(conn: Connection, *, sender: str, digest: str, control_id: str = "", sent_at: str = "") -> int | None:
    """The row of what this sender said, in these bytes, and was not refused; None if it never did."""
    wanted = sa.select(message.c.id).where(message.c.sender == sender, message.c.control_id == control_id, message.c.sent_at == sent_at)
    return conn.execute(wanted.where(message.c.sha256 == digest, message.c.result != "refused").limit(1)).scalar()


def counts(conn: Connection) -> dict[str, int]:
    """How many messages were applied, ignored and refused."""
    rows = conn.execute(sa.select(message.c.result, sa.func.count()).group_by(message.c.result))
    return dict(rows.tuples().all())


def feeds(conn: Connection, *, counted: bool = True) -> list[Feed]:
    """Every sender, the last heard first; what could not be read at all has the sender ''.

    Parameters
    ----------
    counted
        False leaves ``counts`` empty: what is looked at every minute must not read every row there is.
    """
    made: list[Feed] = []
    for sender in _senders(conn):
        of_sender = message.c.sender == sender
        newest = sa.select(message.c.received_at, message.c.sent_at).where(of_sender)
        last = conn.execute(newest.order_by(message.c.received_at.desc(), message.c.id.desc()).limit(1)).one()
        results = sa.select(message.c.result, sa.func.count()).where(of_sender).group_by(message.c.result)
        several: dict[str, int] = dict(conn.execute(results).tuples().all()) if counted else {}
        made.append(Feed(sender, several, last.received_at, last.sent_at))
    return sorted(made, key=lambda feed: feed.last_received_at, reverse=True)


def _senders(conn: Connection) -> Iterator[str]:
    """Yield each sender there ever was, by one probe of the index: DISTINCT would read every row."""
    wanted = sa.select(sa.func.min(message.c.sender))
    sender = conn.execute(wanted).scalar()
    while sender is not None:
        yield sender
        sender = conn.execute(wanted.where(message.c.sender > sender)).scalar()


def rejected(conn: Connection, *, limit: int) -> list[tuple[int, datetime, str, str, str]]:
    """The last refused messages: number, when, from whom, trigger, why. Never their content."""
    wanted = sa.select(message.c.id, message.c.received_at, message.c.sender, message.c.trigger, message.c.reason)
    rows = conn.execute(wanted.where(message.c.result == "refused").order_by(message.c.id.desc()).limit(limit))
    return [tuple(row) for row in rows]


def refused_because(conn: Connection, *, limit: int) -> list[tuple[str, int]]:
    """Why messages were refused, and how many for each reason, the most frequent first."""
    count = sa.func.count()
    wanted = sa.select(message.c.reason, count).where(message.c.result == "refused").group_by(message.c.reason)
    return list(conn.execute(wanted.order_by(count.desc()).limit(limit)).tuples().all())


def result_of(conn: Connection, number: int) -> str | None:
    """What came of a message: applied, ignored, refused; None if there is none of this number."""
    return conn.execute(sa.select(message.c.result).where(message.c.id == number)).scalar()


def to_apply(conn: Connection) -> list[int]:
    """The refused messages whose bytes are kept and which were not taken since, the first first; each one's repetitions are left out."""
    taken = message.alias()
    same = sa.and_(taken.c.sender == message.c.sender, taken.c.sha256 == message.c.sha256, taken.c.result != "refused")
    wanted = sa.select(message.c.id).where(message.c.result == "refused", message.c.raw.is_not(None))
    wanted = wanted.where(~sa.select(taken.c.id).where(same, taken.c.sha256 != "").exists())
    return list(conn.scalars(wanted.order_by(message.c.id)))


def note_again(conn: Connection, number: int, outcome: str) -> None:
    """Say what came of a refused message that was tried again, in its own row and those of its repetitions; the last time counts."""
    row = conn.execute(sa.select(message.c.sender, message.c.sha256).where(message.c.id == number)).one()
    same = sa.and_(message.c.sender == row.sender, message.c.sha256 == row.sha256, message.c.sha256 != "", message.c.result == "refused")
    for told in conn.execute(sa.select(message.c.id, message.c.reason).where(sa.or_(message.c.id == number, same))).all():
        first = told.reason.partition(_AGAIN)[0]
        conn.execute(sa.update(message).where(message.c.id == told.id).values(reason=f"{first}{_AGAIN}{outcome}"))


def raw(conn: Connection, number: int) -> bytes | None:
    """The bytes of a message that was kept because nothing was made of it; None for any other."""
    row = conn.execute(sa.select(message).where(message.c.id == number)).first()
    if row is None or row.raw is not None or row.result != "refused" or not row.sha256:
        return row.raw if row else None
    holder = _holder(conn, row.sender, row.sha256, row.received_at)
    return None if holder is None else conn.execute(sa.select(message.c.raw).where(message.c.id == holder)).scalar_one()
