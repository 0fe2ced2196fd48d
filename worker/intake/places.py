"""Places that peers compete for: so many in all, and of one address. When they are full, who keeps us waiting gives way.

A peer that stalls costs nothing while there is room, and its own deadlines end it. Only where another wants a place does
the one that has kept us waiting longest lose its own, so that stalled peers never lock out one that works.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

#: Two lost packets in a row are no stall (RFC 6298: 1 s, then 2 s).
PATIENCE_S: Final = 5.0


def waiting() -> Callable[[], float]:
    """Return a clock that runs from now."""
    began = time.monotonic()
    return lambda: time.monotonic() - began


def working() -> float:
    """Return 0: the peer waits for us."""
    return 0.0


@dataclass(slots=True, eq=False)
class Place:
    """One peer's place: how many seconds it keeps us waiting now, and how its connection is ended."""

    address: str
    waited_s: Callable[[], float]
    give_way: Callable[[], None]


@dataclass(slots=True)
class Places:
    """At most `total` places, and `per_address` of one address."""

    total: int
    per_address: int
    _held: set[Place] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return len(self._held)

    def take(self, place: Place) -> bool:
        """Return whether there is room, or was made."""
        with self._lock:
            neighbors = {one for one in self._held if one.address == place.address}
            if len(neighbors) >= self.per_address or len(self._held) >= self.total:
                rivals = neighbors if len(neighbors) >= self.per_address else self._held
                waited_s, last = max(((one.waited_s(), one) for one in rivals), key=lambda pair: pair[0])
                if waited_s < (
                    PATIENCE_S if neighbors else PATIENCE_S / 5
                ):  # an address that has none competes with who comes by the hundred
                    return False
                self._held.remove(last)
                last.give_way()
            self._held.add(place)
            return True

    def leave(self, place: Place) -> None:
        """Give the place back, if it was not lost already."""
        with self._lock:
            self._held.discard(place)
