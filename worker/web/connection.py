"""A browser's connection that cannot be held: uvicorn waits for ever for a request that never ends and for whoever never reads an answer.

::

    connected ──REQUEST_S──▶ a whole request ──ANSWER_S──▶ answered, read, and another begun ──REQUEST_S──▶ …

Whatever takes longer is cut. Where all connections are in use, a new one takes the place of the one that has been idle longest.
Not here: what is asked and answered (app.py).
"""

from __future__ import annotations

import asyncio
from typing import Final

from uvicorn.protocols.http.h11_impl import H11Protocol

#: From a connection, or the first byte of a further request, to its last.
REQUEST_S: Final = 10.0
#: From the last byte of a request until its answer is read.
ANSWER_S: Final = 60.0


class Connection(H11Protocol):
    """HTTP/1.1, with an end to each wait."""

    _is_asking = True
    _end: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin; where there is no room, instead of the idlest."""
        others = [one for one in self.connections if isinstance(one, Connection) and not one.transport.is_closing()]
        idle = [one for one in others if one.is_idle]
        # uvicorn refuses a request that makes it so many.
        if idle and self.limit_concurrency is not None and len(others) >= self.limit_concurrency - 1:
            min(idle, key=lambda one: one.ends_at).transport.abort()
        super().connection_made(transport)
        self._await(REQUEST_S)

    def data_received(self, data: bytes) -> None:
        """A request, or a part of one."""
        if not self._is_asking and (self.cycle is None or self.cycle.response_complete):
            self._is_asking = True
            self._await(REQUEST_S)
        super().data_received(data)
        if self._is_asking and self.cycle is not None and not self.cycle.more_body:
            self._is_asking = False
            self._await(ANSWER_S)

    def on_response_complete(self) -> None:
        """The answer is written, if not read; the next request may be here already."""
        self._is_asking = False
        self._await(ANSWER_S)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        if self._end is not None:
            self._end.cancel()
        super().connection_lost(exc)

    @property
    def is_idle(self) -> bool:
        """Whether no request is in hand."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def ends_at(self) -> float:
        """When it is cut if nothing comes, by the loop's clock."""
        return 0.0 if self._end is None else self._end.when()

    def _await(self, seconds: float) -> None:
        if self._end is not None:
            self._end.cancel()
        self._end = self.loop.call_later(seconds, self.transport.abort)
