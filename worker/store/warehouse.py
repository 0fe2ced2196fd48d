"""The site's data warehouse, read only: rows of one query, streamed; and how far each view was read, kept with the messages.

Not here: what the rows mean (intake/tables.py), when they are asked for (worker/tables_feed.py). The account that the URL names
should be able to read and nothing more: the transaction is read only where the database knows that, and always rolled back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date, datetime
from typing import Any, Final
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.engine import Connection, CursorResult, Engine

from worker.errors import RecordError, Retry
from worker.store import feeds
from worker.store.schema import message

#: How far a view was read: of whatever type its column has.
Watermark = datetime | date | int | str

#: A view may join a lot; a sweep must end all the same.
STATEMENT_TIMEOUT_MS: Final = 600_000
#: Rows fetched at once.
FETCH_ROWS: Final = 500
_TRIGGER: Final = "watermark"
# A watermark is kept and shown; a column of names, taken by mistake, must not be.
_TEXT: Final = re.compile(r"[0-9T:Z+. -]{1,40}")


class WarehouseUnavailable(Retry):
    """The warehouse does not answer, or refuses the query."""


@contextmanager
def reading(url: str, query: str, *, since: Watermark | None) -> Iterator[tuple[list[str], Iterator[Sequence[object]]]]:
    """Run one query: the names of its columns, and its rows as they are fetched.

    Parameters
    ----------
    since
        Bound to ``:since``; None for a query without it.

    Raises
    ------
    WarehouseUnavailable
        With the kind of error and the database's code for it, never its text: that repeats rows and passwords.
    RecordError
        The URL or the query is not what it should be.
    """
    statement = _statement(query, since)
    engine = _engine(url)
    try:
        conn, result = _run(engine, statement)
        try:
            yield list(result.keys()), _rows(result)
        finally:
            conn.close()  # rolls back
    finally:
        engine.dispose()


def _statement(query: str, since: Watermark | None) -> sa.TextClause:
    statement = sa.text(query)
    wanted = set(statement.compile().params)
    if not re.match(r"\s*(SELECT|WITH)\b", query, re.IGNORECASE):
        raise RecordError("The table's query must begin with SELECT or WITH.")
    if wanted != ({"since"} if since is not None else set()):
        raise RecordError("The table's query takes :since and nothing else if its mapping has [changed] with start, else nothing.")
    return statement if since is None else statement.bindparams(sa.bindparam("since", since, type_=_type(since)))


def _type(since: Watermark) -> sa.types.TypeEngine[Any]:
    """The type that `since` is sent as: a time with an offset must not lose it."""
    if isinstance(since, datetime):
        return sa.DateTime(timezone=since.tzinfo is not None)
    return sa.Date() if isinstance(since, date) else sa.BigInteger() if isinstance(since, int) else sa.String()


def _engine(url: str) -> Engine:
    try:
        parsed = sa.make_url(url)
        arguments: dict[str, Any] = {}
        if parsed.get_backend_name() == "sqlite":
            # Opened in any other way, a file that is not there would be made.
            parsed = parsed.set(database=f"file:{quote(parsed.database or '')}", query={"mode": "ro", "uri": "true"})
        elif parsed.get_backend_name() == "postgresql":
            options = f"-c default_transaction_read_only=on -c statement_timeout={STATEMENT_TIMEOUT_MS}"
            arguments = {"options": options, "connect_timeout": 10}
        return sa.create_engine(parsed, poolclass=sa.NullPool, hide_parameters=True, connect_args=arguments)
    except (sa.exc.ArgumentError, ImportError, ValueError):
        raise RecordError(
            "The table's database is no URL of a database that is known here; "
            "write driver://user:password@host/name and install the driver."
        ) from None


def _run(engine: Engine, statement: sa.TextClause) -> tuple[Connection, CursorResult[Any]]:
    try:
        conn = engine.connect()
    except (sa.exc.SQLAlchemyError, OSError) as exc:
        raise WarehouseUnavailable(_reason(exc)) from None
    try:
        if conn.dialect.name in ("mysql", "mariadb", "oracle"):
            conn.exec_driver_sql("SET TRANSACTION READ ONLY")
        streamed = conn.execution_options(stream_results=True, yield_per=FETCH_ROWS)
        return conn, streamed.execute(statement)
    except (sa.exc.SQLAlchemyError, OSError) as exc:
        conn.close()
        raise WarehouseUnavailable(_reason(exc)) from None


def _rows(result: CursorResult[Any]) -> Iterator[Sequence[object]]:
    try:
        for row in result:
            yield tuple(row)
    except (sa.exc.SQLAlchemyError, OSError, ValueError) as exc:  # ValueError: a driver cannot read a date
        raise WarehouseUnavailable(_reason(exc)) from None


def _reason(exc: BaseException) -> str:
    """The kind of error and its code: the driver's own words repeat values, and some the connection."""
    cause = getattr(exc, "orig", None)
    code = getattr(cause, "sqlstate", None) or getattr(cause, "sqlite_errorname", None) or ""
    kind = type(cause or exc).__name__
    return f"The warehouse does not answer or refuses the query ({kind}{f', {code}' if code else ''})."


# --- how far a view was read


def watermark(conn: Connection, sender: str) -> Watermark | None:
    """How far this view was read; None if it never was."""
    row = conn.execute(_reached(sender)).first()
    if row is None:
        return None
    kind, value = row.control_id.split(" ", 1)
    readers: dict[str, Any] = {"time": datetime.fromisoformat, "day": date.fromisoformat, "number": int, "text": str}
    return readers[kind](value)  # type: ignore[no-any-return]


def _reached(sender: str) -> sa.Select[tuple[int, str]]:
    """The row that stands, by the index of the last received; should two processes have made one each, the later of them."""
    wanted = sa.select(message.c.id, message.c.control_id).where(message.c.sender == sender, message.c.trigger == _TRIGGER)
    return wanted.order_by(message.c.received_at.desc(), message.c.id.desc()).limit(1)


def note_watermark(conn: Connection, sender: str, reached: Watermark, *, now: datetime) -> None:
    """Remember how far a view was read; one row, the last, stands.

    Raises
    ------
    RecordError
        A text that does not look like a time or a count.
    """
    if isinstance(reached, str) and not _TEXT.fullmatch(reached):
        raise RecordError("The column of the mapping's [changed] is a text that is neither a time nor a count.")
    kind = next(name for type_, name in ((datetime, "time"), (date, "day"), (int, "number"), (str, "text")) if isinstance(reached, type_))
    value = reached.isoformat() if isinstance(reached, date) else str(reached)
    said = f"{kind} {value}"
    row = conn.execute(_reached(sender)).first()
    if row is None:
        feeds.note_message(conn, sender=sender, control_id=said, sent_at="", trigger=_TRIGGER, result="ignored", now=now)
    elif row.control_id != said:
        conn.execute(sa.update(message).where(message.c.id == row.id).values(control_id=said, received_at=now))


def note_refused(conn: Connection, *, sender: str, trigger: str, reason: str, digest: str, now: datetime) -> None:
    """Remember that rows were refused, once however often the same rows are read."""
    same = sa.select(message.c.id).where(message.c.sender == sender, message.c.sha256 == digest, message.c.result == "refused")
    if conn.execute(same.limit(1)).first() is None:
        feeds.note_message(
            conn, sender=sender, control_id="", sent_at="", trigger=trigger, result="refused", reason=reason, digest=digest, now=now
        )
