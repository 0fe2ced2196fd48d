"""What the tables of schema.py and people.py are made of: their metadata, kinds of columns."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Dialect

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class UtcDateTime(sa.types.TypeDecorator[datetime]):
    """An aware UTC datetime in both databases; a naive one never enters the store."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuse naive times; SQLite keeps them as UTC text, which sorts."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("A naive datetime may not enter the store.")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        """Give back an aware UTC time."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def id_column() -> sa.Column[int]:
    """The number of a row, counted by the database."""
    big = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    return sa.Column("id", big, primary_key=True, autoincrement=True)


def text(name: str, *, default: str = "") -> sa.Column[str]:
    """A text that is never NULL."""
    return sa.Column(name, sa.Text, nullable=False, default=default, server_default=default)


def reference(name: str, target: str, *, nullable: bool = False) -> sa.Column[int]:
    """The row of another table."""
    return sa.Column(name, sa.ForeignKey(target), nullable=nullable)


def where(condition: str) -> dict[str, Any]:
    """What makes an index one of some rows only, in both databases."""
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


def is_one_of(column: str, states: tuple[str, ...]) -> str:
    """A condition of a CHECK."""
    return f"{column} IN ({', '.join(repr(state) for state in states)})"
