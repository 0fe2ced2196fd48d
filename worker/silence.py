"""The alarm of a feed that fell silent: a record that gets no more values is worse than none, and nobody sees it.

::

    messages ──▶ feeds ──▶ silent longer than `records.silent_after_s`? ──once──▶ event feed.silent … heard again ──▶ feed.heard

What was said before is kept in memory only: after a restart a silence is told once more. Not here: the rows (store/feeds.py),
when it is looked (sweeps.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Final

from worker import events
from worker.store.feeds import Feed

#: Who was not heard for so long is no feed any more: an interface that was taken down must not alarm for ever.
FORGOTTEN: Final = timedelta(days=30)


def silent(feeds: Iterable[Feed], *, after_s: float, now: datetime) -> list[Feed]:
    """The senders not heard for longer than `after_s` seconds; none where it is 0, which turns the alarm off."""
    if after_s <= 0:
        return []
    return [feed for feed in feeds if is_heard(feed) and timedelta(seconds=after_s) < now - feed.last_received_at <= FORGOTTEN]


def is_heard(feed: Feed) -> bool:
    """Whether a sender speaks of itself, by HL7 v2: files are imported and servers asked when somebody wants it.

    Its name is MSH-3 and MSH-4 with a bar between them; no other's has one. What could not be read at all has no name.
    """
    return "|" in feed.sender


class Silence:
    """Says each silence once, and its end.

    Emits ``feed.silent`` (sender, silent_s: seconds since its last message) and ``feed.heard`` (sender, silent_s: seconds between its
    last message before and the last one now).
    """

    def __init__(self, *, after_s: float) -> None:
        self._after_s = after_s
        #: By sender, when it was last heard before it fell silent.
        self._since: dict[str, datetime] = {}

    def look(self, feeds: Iterable[Feed], *, now: datetime) -> None:
        """Compare with what was seen the last time."""
        known = list(feeds)
        quiet = {feed.sender for feed in silent(known, after_s=self._after_s, now=now)}
        for feed in known:
            since = self._since.get(feed.sender)
            if feed.sender in quiet:
                # One that spoke between two looks and is silent again was told already; it is not back.
                self._since[feed.sender] = feed.last_received_at
                if since is None:
                    events.emit("feed.silent", sender=feed.sender, silent_s=round((now - feed.last_received_at).total_seconds()))
            elif since is not None and feed.last_received_at > since:
                del self._since[feed.sender]
                events.emit("feed.heard", sender=feed.sender, silent_s=round((feed.last_received_at - since).total_seconds()))
