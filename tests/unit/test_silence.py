"""A feed that falls silent is told once, and once more when it is back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from tests.conftest import Captured
from worker.silence import Silence, silent
from worker.store import feeds
from worker.store.database import Store
from worker.store.feeds import Feed

NOW = datetime(2026, 3, 4, 12, tzinfo=UTC)
HOUR = 3600.0


def feed(sender: str, *, silent_s: float, now: datetime = NOW) -> Feed:
    return Feed(sender, {"applied": 3}, now - timedelta(seconds=silent_s), "")


@pytest.mark.requirement("F11")
def test_a_silence_is_told_once_and_its_end_once(captured: Captured) -> None:
    watch = Silence(after_s=HOUR)
    watch.look([feed("LAB|SITE", silent_s=HOUR), feed("ADT|SITE", silent_s=1)], now=NOW)
    assert captured == []
    for seconds in (1, 2, 3):
        watch.look([feed("LAB|SITE", silent_s=HOUR), feed("ADT|SITE", silent_s=1)], now=NOW + timedelta(seconds=seconds))
    assert captured == [("feed.silent", {"sender": "LAB|SITE", "silent_s": 3601})]
    later = NOW + timedelta(hours=2)
    watch.look([feed("LAB|SITE", silent_s=60, now=later)], now=later)
    watch.look([feed("LAB|SITE", silent_s=60, now=later)], now=later)
    assert captured[1:] == [("feed.heard", {"sender": "LAB|SITE", "silent_s": 3 * 3600 - 60})]
    much_later = later + timedelta(hours=2)
    watch.look([feed("LAB|SITE", silent_s=60, now=later)], now=much_later)
    assert [name for name, _ in captured] == ["feed.silent", "feed.heard", "feed.silent"]


@pytest.mark.requirement("F11")
def test_a_feed_that_spoke_between_two_looks_and_is_silent_again_is_not_told_to_be_back(captured: Captured) -> None:
    watch = Silence(after_s=HOUR)
    watch.look([feed("LAB|SITE", silent_s=2 * HOUR)], now=NOW)
    later = NOW + timedelta(hours=9)
    watch.look([feed("LAB|SITE", silent_s=5 * HOUR, now=later)], now=later)
    assert [name for name, _ in captured] == ["feed.silent"]
    back = later + timedelta(hours=1)
    watch.look([feed("LAB|SITE", silent_s=0, now=back)], now=back)
    assert captured[1:] == [("feed.heard", {"sender": "LAB|SITE", "silent_s": 6 * 3600})]


@pytest.mark.requirement("F11")
def test_who_was_not_heard_for_a_month_is_no_feed_any_more() -> None:
    month = timedelta(days=30).total_seconds()
    found = silent([feed("OLD|SITE", silent_s=month + 1), feed("YET|SITE", silent_s=month)], after_s=HOUR, now=NOW)
    assert [one.sender for one in found] == ["YET|SITE"]


@pytest.mark.requirement("F11")
def test_nobody_is_silent_while_the_alarm_is_off_or_the_clock_went_back(captured: Captured) -> None:
    Silence(after_s=0.0).look([feed("LAB|SITE", silent_s=HOUR)], now=NOW)
    Silence(after_s=HOUR).look([feed("LAB|SITE", silent_s=-HOUR)], now=NOW)
    assert captured == []


@pytest.mark.parametrize("sender", ["", "FHIR", "FHIR import", "laboratory"])
def test_what_could_not_be_read_and_what_is_imported_or_asked_for_is_no_feed(sender: str) -> None:
    """A file imported once, or a server that no study asks, does not fall silent."""
    assert silent([feed(sender, silent_s=2 * HOUR)], after_s=HOUR, now=NOW) == []


@pytest.mark.requirement("F11")
def test_the_alarm_is_of_the_rows_that_are_there(store: Store, captured: Captured) -> None:
    watch = Silence(after_s=HOUR)

    def note(number: int, at: datetime) -> None:
        with store.begin() as conn:
            feeds.note_message(conn, sender="LAB|SITE", control_id=str(number), sent_at="", trigger="ORU^R01", result="applied", now=at)

    def look(at: datetime) -> None:
        with store.read() as conn:
            watch.look(feeds.feeds(conn), now=at)

    note(1, NOW)
    look(NOW + timedelta(minutes=59))
    look(NOW + timedelta(minutes=61))
    note(2, NOW + timedelta(minutes=90))
    look(NOW + timedelta(minutes=91))
    assert captured == [
        ("feed.silent", {"sender": "LAB|SITE", "silent_s": 3660}),
        ("feed.heard", {"sender": "LAB|SITE", "silent_s": 5400}),
    ]
