"""One commit for all who wait for one: threads that write at the same time share a transaction.

A commit waits for the disk and SQLite has one writer, so threads queue. Whoever's turn it is takes along
everybody who queued meanwhile; nobody waits for company. Each still returns only after the commit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

from sqlalchemy.engine import Connection

from worker.errors import Retry

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(slots=True, eq=False)
class _Turn(Generic[Item, Result]):
    """One caller's item, and what became of it."""

    item: Item
    result: Result | None = None
    error: Exception | None = None
    is_settled: bool = False


class GroupCommit(Generic[Item, Result]):
    """Call it from any thread: it applies `item` in a transaction, and returns when that is committed.

    Parameters
    ----------
    begin
        Opens a write transaction that commits at the end (``Store.begin``).
    apply
        Writes one item. If it raises, the transaction is undone and the group's members are
        written one by one, so that a bad item costs nobody else anything.
    order
        The rows an item locks, as text: a group is written in this order, so that two processes
        cannot hold each other's rows (PostgreSQL would end one of them as a deadlock).
    """

    def __init__(
        self,
        begin: Callable[[], AbstractContextManager[Connection]],
        apply: Callable[[Connection, Item], Result],
        *,
        order: Callable[[Item], str] = lambda _item: "",
    ) -> None:
        self._begin = begin
        self._order = order
        self._apply = apply
        self._writer = threading.Lock()
        self._queue_lock = threading.Lock()
        self._queue: list[_Turn[Item, Result]] = []

    def __call__(self, item: Item) -> Result:
        """Write `item`; raises what `apply` or the commit raised."""
        turn: _Turn[Item, Result] = _Turn(item)
        with self._queue_lock:
            self._queue.append(turn)
        with self._writer:
            if not turn.is_settled:
                with self._queue_lock:
                    group, self._queue = self._queue, []
                self._settle(group)
        if turn.error is not None:
            raise turn.error
        return turn.result  # type: ignore[return-value]  # a settled turn without an error has one

    def _settle(self, group: list[_Turn[Item, Result]]) -> None:
        try:
            with self._begin() as conn:
                group.sort(key=lambda turn: self._order(turn.item))
                results = [self._apply(conn, turn.item) for turn in group]
        except Exception as error:  # noqa: BLE001  it is raised again where it belongs
            if len(group) > 1 and not isinstance(error, Retry):
                for turn in group:
                    self._settle([turn])
                return
            # A database that is away is away for all of them.
            for turn in group:
                turn.error, turn.is_settled = error, True
            return
        for turn, result in zip(group, results, strict=True):
            turn.result, turn.is_settled = result, True
