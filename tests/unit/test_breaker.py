"""When a destination that is down is tried."""

from __future__ import annotations

import pytest

from worker.deliver.breaker import PAUSE_CAP_S, PAUSE_S, TRIES, Breaker

pytestmark = pytest.mark.requirement("L1")


class Clock:
    """A clock that a test moves."""

    now = 1000.0

    def __call__(self) -> float:
        """The time now."""
        return self.now


def test_a_peer_may_be_tried_until_five_tries_in_a_row_did_not_reach_it() -> None:
    breaker = Breaker(Clock())
    for _ in range(TRIES - 1):
        breaker.failed()
        assert (breaker.is_open, breaker.wait_s) == (False, 0.0)
    breaker.failed()
    assert (breaker.is_open, breaker.wait_s) == (True, PAUSE_S)


def test_one_try_that_reached_it_begins_the_count_anew() -> None:
    breaker = Breaker(Clock())
    for _ in range(TRIES - 1):
        breaker.failed()
    breaker.reached()
    breaker.failed()
    assert (breaker.failures, breaker.is_open) == (1, False)


def test_the_pauses_grow_up_to_a_minute_and_a_day_costs_few_tries() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    pauses = []
    while clock.now < 1000 + 86400:
        breaker.failed()
        pauses.append(breaker.wait_s)
        clock.now += breaker.wait_s
    assert pauses[TRIES - 1 : TRIES + 5] == [5, 10, 20, 40, PAUSE_CAP_S, PAUSE_CAP_S]
    assert pauses == sorted(pauses)
    assert len(pauses) < 1460
    for _ in range(5000):  # and years of it are no overflow
        breaker.failed()
    assert breaker.wait_s == PAUSE_CAP_S


def test_a_pause_ends_by_the_clock() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    for _ in range(TRIES):
        breaker.failed()
    clock.now += PAUSE_S - 1
    assert breaker.wait_s == 1
    clock.now += 2
    assert breaker.wait_s == 0
    assert breaker.is_open  # until a try has reached it
