"""One commit for all who wait: nobody returns before it, and nobody pays for another's fault."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from worker.errors import Retry
from worker.store.group import GroupCommit


@dataclass
class Database:
    """Transactions on a list; `gate` holds the first commit back, `is_away` makes every one fail."""

    committed: list[str] = field(default_factory=list)
    transactions: list[list[str]] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    inside: threading.Event = field(default_factory=threading.Event)
    is_away: bool = False

    @contextmanager
    def begin(self) -> Iterator[Any]:
        """Commit at the end, undo on an exception."""
        written: list[str] = []
        yield written
        self.inside.set()
        self.gate.wait(10)
        if self.is_away:
            raise Retry("The database is away.")
        self.transactions.append(written)
        self.committed += written


def apply(conn: Any, item: str) -> str:
    """Write one item; a bad one raises."""
    conn.append(item)
    if item == "bad":
        raise ValueError(item)
    return item.upper()


def run_group(database: Database, items: list[str]) -> dict[str, object]:
    """Write `first` alone and, while it waits for its commit, `items` from a thread each; returns what each got."""
    commit: GroupCommit[str, str] = GroupCommit(database.begin, apply)

    def outcome(item: str) -> object:
        try:
            return commit(item)
        except (ValueError, Retry) as error:
            return type(error)

    with ThreadPoolExecutor(len(items) + 1) as pool:
        first = pool.submit(outcome, "first")
        assert database.inside.wait(10)
        others = {item: pool.submit(outcome, item) for item in items}
        while len(commit._queue) < len(items):
            threading.Event().wait(0.001)
        database.gate.set()
        return {"first": first.result(10)} | {item: future.result(10) for item, future in others.items()}


def test_those_who_queue_meanwhile_share_one_commit() -> None:
    database = Database()
    assert run_group(database, ["a", "b", "c"]) == {"first": "FIRST", "a": "A", "b": "B", "c": "C"}
    assert [sorted(transaction) for transaction in database.transactions] == [["first"], ["a", "b", "c"]]


def test_a_bad_item_costs_nobody_else_anything() -> None:
    database = Database()
    assert run_group(database, ["a", "bad", "c"]) == {"first": "FIRST", "a": "A", "bad": ValueError, "c": "C"}
    assert sorted(database.committed) == ["a", "c", "first"]


@pytest.mark.requirement("D1")
def test_a_database_that_is_away_is_tried_once_for_all() -> None:
    database = Database(is_away=True)
    assert set(run_group(database, ["a", "b", "c"]).values()) == {Retry}
    assert database.committed == []
