"""Places: who has one, who gets one, and who loses it."""

from __future__ import annotations

import pytest

from worker.intake.places import PATIENCE_S, Place, Places

pytestmark = pytest.mark.requirement("X14")


class Peer(Place):
    """A place of a peer that keeps us waiting for as long as the test says."""

    def __init__(self, address: str, waited_s: float) -> None:
        self.lost = 0
        super().__init__(address, lambda: waited_s, self._lose)

    def _lose(self) -> None:
        self.lost += 1


def test_while_there_is_room_nobody_loses_a_place() -> None:
    places, stalled = Places(2, 2), Peer("a", 10 * PATIENCE_S)
    assert places.take(stalled)
    assert places.take(Peer("b", 0))
    assert (stalled.lost, len(places)) == (0, 2)


def test_the_one_that_has_kept_us_waiting_longest_gives_way() -> None:
    places, waited = Places(3, 3), [PATIENCE_S + 1, PATIENCE_S + 3, PATIENCE_S + 2]
    held = [Peer("a", waited_s) for waited_s in waited]
    assert all(places.take(one) for one in held)
    assert places.take(Peer("b", 0))
    assert [one.lost for one in held] == [0, 1, 0]
    assert len(places) == 3


def test_who_works_keeps_its_place_and_the_newcomer_is_turned_away() -> None:
    places, held = Places(2, 2), [Peer("a", 0), Peer("a", PATIENCE_S - 1)]
    assert all(places.take(one) for one in held)
    assert not places.take(Peer("a", 0))
    assert [one.lost for one in held] == [0, 0]


def test_an_address_without_any_place_is_served_sooner() -> None:
    places, held = Places(2, 2), [Peer("a", PATIENCE_S / 2), Peer("a", 0)]
    assert all(places.take(one) for one in held)
    assert places.take(Peer("b", 0))
    assert not places.take(Peer("c", 0))
    assert [one.lost for one in held] == [1, 0]


def test_an_address_with_all_its_places_takes_none_of_another_one() -> None:
    places, other = Places(10, 2), Peer("b", 10 * PATIENCE_S)
    own = [Peer("a", 2 * PATIENCE_S), Peer("a", 0)]
    assert all(places.take(one) for one in (other, *own))
    assert places.take(Peer("a", 0))
    assert not places.take(Peer("a", 0))
    assert (other.lost, [one.lost for one in own]) == (0, [1, 0])


def test_a_lost_place_is_not_given_back_twice() -> None:
    places, stalled = Places(1, 1), Peer("a", 2 * PATIENCE_S)
    assert places.take(stalled)
    assert places.take(Peer("b", 0))
    places.leave(stalled)
    assert len(places) == 1
    assert not places.take(Peer("c", 0))
