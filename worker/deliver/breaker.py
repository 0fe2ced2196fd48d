"""A destination that is down is tried once an interval, whatever waits for it.

::

    try everything ──not reached──▶ try one job ──5 tries in a row not reached──▶ wait 5 s, 10 s … 60 s, one job each
          ▲                               │                                                    │
          └───────────reached─────────────┴────────────────────reached─────────────────────────┘

Without it a thousand reports try a dead PACS each on its own back-off, and each attempt costs the whole time-out where packets are dropped.
A peer was reached if it gave an association, whatever it did then: what a document is refused for must not hold up the next.
In memory: after a restart a peer that is down costs five tries again. Not here: who leases the jobs (roles.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Final

from worker import events
from worker.deliver.cstore import Outcome
from worker.errors import PeerUnreachable
from worker.store import queue
from worker.store.database import Store

#: Tries in a row that did not reach the peer before it is left alone.
TRIES: Final = 5
#: Then it is left alone for so long, doubling up to the cap: a PACS that is back gets its reports within a minute.
PAUSE_S: Final = 5.0
PAUSE_CAP_S: Final = 60.0


class Breaker:
    """Counts the tries that did not reach one peer. Of one thread.

    Parameters
    ----------
    clock
        Seconds of a clock that only goes forward.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next_at = 0.0
        #: Tries in a row that did not reach the peer.
        self.failures = 0

    @property
    def is_open(self) -> bool:
        """Whether the peer is left alone between tries."""
        return self.failures >= TRIES

    @property
    def wait_s(self) -> float:
        """Seconds until the next try; 0 if one may be made now."""
        return max(0.0, self._next_at - self._clock()) if self.is_open else 0.0

    def failed(self) -> None:
        """A try did not reach the peer."""
        self.failures += 1
        if self.is_open:
            self._next_at = self._clock() + min(PAUSE_CAP_S, PAUSE_S * 2.0 ** min(self.failures - TRIES, 10))

    def reached(self) -> None:
        """The peer gave an association."""
        self.failures = 0


def judge(breaker: Breaker, outcomes: Sequence[Outcome], *, store: Store, destination: str, now: datetime) -> None:
    """Count what one try at a destination came to, and tell the jobs that wait for it; nothing was tried where there is no outcome.

    Emits ``destination.down`` (tries, reason) when it is left alone from now on, ``destination.reached`` when it no longer is.
    """
    if not outcomes:
        return
    causes = [outcome.error for outcome in outcomes if isinstance(outcome.error, PeerUnreachable)]
    was_open = breaker.is_open
    if len(causes) < len(outcomes):
        if breaker.failures:
            with store.begin() as conn:
                queue.release(conn, destination, now=now)
        breaker.reached()
        if was_open:
            events.emit("destination.reached", destination=destination)
        return
    breaker.failed()
    if breaker.is_open:
        if not was_open:
            events.emit("destination.down", destination=destination, tries=breaker.failures, reason=str(causes[0]))
        again = now + timedelta(seconds=breaker.wait_s)
        reason = f"{causes[0]} It is left alone after {breaker.failures} tries; the next is at {again:%H:%M:%S} UTC."
        with store.begin() as conn:
            queue.hold(conn, destination, reason=reason, now=now)
