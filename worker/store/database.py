"""Opening the database: one engine a process, SQLite in WAL or PostgreSQL. No tables, no queries of the trade.

SQLite writers take the lock at BEGIN IMMEDIATE, so that a transaction which reads and then writes
cannot fail half-way with SQLITE_BUSY. synchronous=FULL: a commit is on disk when it returns
(https://www.sqlite.org/pragma.html#pragma_synchronous), which is what C-STORE Success promises.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from worker.errors import Retry
from worker.store import schema

__all__ = ["Connection", "DatabaseUnavailable", "Store", "listed", "rows_of", "told_by"]

#: How long a transaction waits for other writers: SQLite's, this process's and others together (FAULTS D5), or a lock of PostgreSQL
#: (FAULTS D4). Senders of HL7 commonly wait 30 s for their answer, and must hear that a message was not stored, not nothing. What is
#: refused comes again.
BUSY_S: Final = 20.0
#: PostgreSQL: no statement may hang a receiver (FAULTS D4).
STATEMENT_TIMEOUT_MS: Final = 30_000
#: Connections of one process, and how many more while there is a rush; who finds all of them taken for so long comes again (FAULTS D7).
POOL: Final = {"pool_size": 8, "max_overflow": 10, "pool_timeout": BUSY_S / 2}
#: PostgreSQL: a server that was cut off without a word is noticed after about BUSY_S, not when the system gives up after a quarter of an
#: hour (FAULTS D1). https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-KEEPALIVES
_KEEPALIVE: Final = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 2, "tcp_user_timeout": 20_000}


#: Not the other kinds of DatabaseError, a broken constraint, a wrong statement: those are ours. Of none of its kinds is a damaged SQLite.
#: A PostgreSQL that became read-only, or found a page of its own damaged, says InternalError.
_UNAVAILABLE: Final = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.InternalError, sa.exc.TimeoutError, sa.exc.DatabaseError)
#: PostgreSQL's read_only_sql_transaction: https://www.postgresql.org/docs/current/errcodes-appendix.html
_READ_ONLY: Final = "25006"
#: PostgreSQL: of all who take an advisory lock of this number, one migrates at a time.
_MIGRATION: Final = 0x53594E4F


class DatabaseUnavailable(Retry):
    """The database does not answer, is locked or is not of this version."""


class Store:
    """A database and how to talk to it: ``with store.begin() as conn`` writes, ``store.read()`` reads."""

    def __init__(self, url: str) -> None:
        self.url = _parsed(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        if self.is_sqlite:
            # A pooled connection outlives its file's deletion; checking in is cheap.
            self.engine = sa.create_engine(self.url, hide_parameters=True, **POOL)
            sa.event.listen(self.engine, "connect", _prepare_sqlite)
        else:
            options = f"-c statement_timeout={STATEMENT_TIMEOUT_MS} -c lock_timeout={round(1000 * BUSY_S)}"
            self.engine = sa.create_engine(
                self.url,
                pool_pre_ping=True,
                hide_parameters=True,  # they are patient data
                # Without client_encoding, psycopg gives bytes for text where the database is SQL_ASCII, and SQLAlchemy fails on them.
                connect_args={"options": options, "connect_timeout": 5, "client_encoding": "utf8", **_KEEPALIVE},
                **POOL,
            )
        sa.event.listen(self.engine, "handle_error", _forget_read_only)
        # Threads of one process queue here: SQLite's own busy handler sleeps, and is not fair.
        self._writer = threading.Lock()

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """One write transaction: commits at the end, rolls back on any exception.

        Raises
        ------
        DatabaseUnavailable
            The database is away, locked for too long or damaged, or its disk is full.
        """
        try:
            with self._turn() as until, self.engine.connect() as conn, conn.begin():
                if self.is_sqlite:
                    _wait(conn, max(0.0, until - time.monotonic()))
                    conn.exec_driver_sql("BEGIN IMMEDIATE")
                yield conn
        except sa.exc.SQLAlchemyError as exc:
            if type(exc) not in _UNAVAILABLE:
                raise
            raise DatabaseUnavailable(_reason(exc)) from exc

    @contextmanager
    def _turn(self) -> Iterator[float]:
        """Wait for the other writers of this process; gives the moment (monotonic) until which those of others are waited for."""
        until = time.monotonic() + BUSY_S
        if not self.is_sqlite:
            yield until
            return
        if not self._writer.acquire(timeout=BUSY_S):
            raise DatabaseUnavailable(f"The database is not available: other writers held it for {BUSY_S:g} s.")
        try:
            yield until
        finally:
            self._writer.release()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A read transaction: a consistent view, rolled back at the end."""
        try:
            with self.engine.connect() as conn:
                if self.is_sqlite:
                    _wait(conn, BUSY_S)  # a writer may have left this connection a shorter time
                    conn.exec_driver_sql("BEGIN")
                else:
                    conn = conn.execution_options(isolation_level="REPEATABLE READ")
                yield conn
        except sa.exc.SQLAlchemyError as exc:
            if type(exc) not in _UNAVAILABLE:
                raise
            raise DatabaseUnavailable(_reason(exc)) from exc

    def check(self) -> None:
        """Refuse to start on a database that is absent, damaged, of another version, or cannot hold every name.

        Raises
        ------
        DatabaseUnavailable
            With a sentence that says what to do.
        """
        if self.is_sqlite and self.url.database not in (None, "", ":memory:"):
            path = Path(str(self.url.database))
            if not path.exists():
                raise DatabaseUnavailable(f"There is no database at {path}. Run: synoptic migrate")
        revision = self._revision()
        if revision != schema.REVISION:
            raise DatabaseUnavailable(
                f"The database is at revision {revision}, this program needs {schema.REVISION}. "
                "If the program is newer: synoptic migrate. If the database is newer: install the newer program."
            )

    def _revision(self) -> str:
        with self.read() as conn:
            self._check_encoding(conn)
            if not sa.inspect(conn).has_table("alembic_version"):
                raise DatabaseUnavailable("The database is empty. Run: synoptic migrate")
            return str(conn.exec_driver_sql("SELECT version_num FROM alembic_version").scalar())

    def _check_encoding(self, conn: Connection) -> None:
        # Any other refuses names that it cannot write, or keeps bytes that are no text (SQL_ASCII: the C locale of a bare container).
        if self.is_sqlite or (encoding := conn.exec_driver_sql("SHOW server_encoding").scalar()) == "UTF8":
            return
        raise DatabaseUnavailable(
            f"The database's encoding is {encoding}; it must be UTF8: createdb --encoding=UTF8 --locale=C --template=template0 …"
        )

    def is_ready(self) -> bool:
        """Whether `check` would pass."""
        try:
            self.check()
        except DatabaseUnavailable:
            return False
        return True

    def migrate(self) -> None:
        """Bring the database to this program's revision; creates it if absent. Forward only."""
        from alembic import command
        from alembic.config import Config

        if self.is_sqlite and self.url.database:
            path = Path(str(self.url.database))
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch(mode=0o600)
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with self.begin() as conn:
            self._check_encoding(conn)
            if not self.is_sqlite:
                # An index of ten million facts takes minutes, and who comes second waits for it: its CREATE TABLE would collide.
                conn.exec_driver_sql("SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0")
                conn.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION)))
            config.attributes["connection"] = conn
            command.upgrade(config, "head")

    def close(self) -> None:
        """Close all connections of this process."""
        self.engine.dispose()


# --- many keys in one statement


def listed(dialect: str, *columns: sa.Column[Any]) -> sa.ColumnElement[bool]:
    """A condition: what `columns` hold is one of the rows bound to ``:rows`` (see `rows_of`), each looked up by their index.

    Of row values in IN, SQLite scans the whole table and PostgreSQL plans one branch a row.
    """
    given = sa.bindparam("rows", type_=sa.Text)
    if dialect == "sqlite":
        one = sa.func.json_each(given).table_valued("value", name="given").c.value
        cells: list[sa.ColumnElement[Any]] = [sa.func.json_extract(one, f"$[{n}]") for n in range(len(columns))]
    else:
        one = sa.func.json_array_elements(sa.cast(given, sa.JSON)).table_valued("value", name="given").c.value
        cells = [sa.cast(one.op("->>")(n), column.type) for n, column in enumerate(columns)]
    return sa.and_(*(column == cell for column, cell in zip(columns, cells, strict=True)))


def rows_of(dialect: str, several: Iterable[Sequence[object]]) -> str:
    """The parameter ``rows`` of `listed`: texts, numbers and aware times, of any number of rows."""

    def time(value: datetime) -> str:
        return value.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds") if dialect == "sqlite" else value.isoformat()

    return json.dumps([list(one) for one in several], default=time)


def _parsed(url: str) -> sa.URL:
    """A URL of a database; one that cannot be is not repeated, for it may hold a password."""
    try:
        parsed = sa.make_url(url)
        parsed.get_dialect()
    except (sa.exc.ArgumentError, ValueError, ImportError):
        parsed = None
    if parsed is None or "@" in (parsed.host or ""):  # of two @ the first would end the password, and the rest be shown as a host
        raise DatabaseUnavailable(
            "[site] database is no URL of a database: write postgresql+psycopg://user:password@host/name, with an @ of the password as %40."
        )
    return parsed


def told_by(url: str) -> tuple[str, list[str]]:
    """The password within a URL, and what else it names (host, user, database or path); nothing of what is no URL.

    By SQLAlchemy's rules, which take any character of a password but an @; the standard library's raise on a bracket, and end at a slash.
    """
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        return "", []
    host = parsed.host or ""
    return str(parsed.password or ""), [part for part in (host, host.lower(), parsed.username, (parsed.database or "").strip("/")) if part]


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _forget_read_only(failed: sa.engine.ExceptionContext) -> None:
    # SQLite opens for reading alone, without a word, what it cannot open for writing; kept, it would fail on a disk that is well.
    # A PostgreSQL that was made a standby keeps its connections: kept, they would never meet the new primary behind the same name.
    if "readonly" in str(failed.original_exception) or getattr(failed.original_exception, "sqlstate", "") == _READ_ONLY:
        failed.is_disconnect = True


def _wait(conn: Connection, seconds: float) -> None:
    # https://www.sqlite.org/pragma.html#pragma_busy_timeout
    conn.exec_driver_sql(f"PRAGMA busy_timeout = {round(1000 * seconds)}")


def _reason(exc: sa.exc.SQLAlchemyError) -> str:
    """Say what the driver said, never the statement's parameters, which hold patient data."""
    first = str(getattr(exc, "orig", None) or type(exc).__name__).strip().splitlines()[0]
    advice = " Restore it from its backup (deploy/README.md)." if type(exc) is sa.exc.DatabaseError else ""
    return f"The database is not available: {first}.{advice}"
