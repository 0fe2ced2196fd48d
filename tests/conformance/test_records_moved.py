"""What a FHIR server moves to another patient, or says no more, does not stand where it was; on both databases."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

import pytest
import sqlalchemy as sa

from tests.conformance.test_records import CRP, HOUR, NOW, A, B, marked, say_merged, study, undo
from worker.domain import Observation, Patient, PatientKey, RecordUpdate
from worker.store import records
from worker.store.database import Store
from worker.store.schema import observation

SERVER = "FHIR fhir.example"
AT = NOW - 9 * HOUR


def pull(store: Store, key: PatientKey, value: float, *, hour: int, name: str = "o1", source: str = SERVER, status: str = "F") -> None:
    """A server's answer of this hour: one Observation."""
    fact = Observation(CRP, AT, value, status=status, key=f"{source}/Observation/{name}", source=source, said_at=NOW + hour * HOUR)
    tell(store, key, [fact], source=source, hour=hour)


def tell(store: Store, key: PatientKey, facts: list[Observation], *, source: str = SERVER, hour: int) -> None:
    with store.begin() as conn:
        update = RecordUpdate(Patient(key), tuple(facts), source, has_demographics=False, is_at_of_all=False)
        records.apply(conn, update, now=NOW + hour * HOUR + HOUR / 2)


def used(store: Store, key: PatientKey, *, known_at: datetime | None = None) -> list[float | None]:
    with store.read() as conn:
        whole = records.view(conn, key, as_of=NOW, known_at=known_at)
        part = records.view(conn, key, as_of=NOW, known_at=known_at, codes=[(CRP.value, CRP.scheme)], since=AT)
    assert whole is not None
    assert part is not None
    found = [one.value for one in whole.observations if one.status in "FC"]
    assert found == [one.value for one in part.observations if one.status in "FC"]
    return found


@pytest.mark.requirement("F4")
def test_a_resource_that_comes_with_another_subject_leaves_the_first(store: Store) -> None:
    studies = study(store, A, uid="1.1"), study(store, B, uid="1.2")
    pull(store, A, 300.0, hour=1)
    pull(store, A, 5.0, hour=1, name="o2")
    pull(store, B, 300.0, hour=2)
    assert (used(store, A), used(store, B)) == ([5.0], [300.0])
    assert used(store, A, known_at=NOW + 2 * HOUR) == [300.0, 5.0]
    assert marked(store) == dict.fromkeys(studies, NOW + 2.5 * HOUR)
    pull(store, B, 300.0, hour=3)  # said again: nothing is taken back twice
    with store.read() as conn:
        assert conn.execute(sa.select(sa.func.count()).where(observation.c.status == "W")).scalar_one() == 1


@pytest.mark.requirement("F4")
def test_a_resource_that_is_moved_back_stands_again(store: Store) -> None:
    pull(store, A, 300.0, hour=1)
    pull(store, B, 300.0, hour=2)
    pull(store, A, 300.0, hour=3)
    assert (used(store, A), used(store, B)) == ([300.0], [])


@pytest.mark.requirement("F3")
def test_what_was_moved_stands_once_when_the_patients_are_merged_and_where_it_was_moved_when_they_are_parted(store: Store) -> None:
    pull(store, A, 5.0, hour=1)
    pull(store, A, 6.0, hour=1, status="C")
    pull(store, B, 7.0, hour=2)
    say_merged(store, survivor=B, retired=A)
    assert used(store, A) == used(store, B) == [7.0]
    assert undo(store, survivor=B, retired=A)
    assert (used(store, A), used(store, B)) == ([], [7.0])


@pytest.mark.requirement("F3")
def test_between_merged_patients_nothing_is_moved(store: Store) -> None:
    pull(store, A, 5.0, hour=1)
    say_merged(store, survivor=B, retired=A)
    pull(store, B, 7.0, hour=2)
    assert undo(store, survivor=B, retired=A)
    assert (used(store, A), used(store, B)) == ([5.0], [7.0])


@pytest.mark.requirement("F4")
def test_an_answer_of_before_moves_nothing(store: Store) -> None:
    pull(store, B, 7.0, hour=2)
    pull(store, A, 5.0, hour=1)
    assert used(store, B) == [7.0]


def panel(hour: int, *codes: str, value: float = 1.0, status: str = "F", source: str = SERVER) -> list[Observation]:
    """A panel with these components, as of this hour."""
    key, said_at = f"{source}/Observation/p1", NOW + hour * HOUR
    return [Observation(CRP, AT, value, text=code, status=status, key=f"{key}/LN/{code}", source=source, said_at=said_at) for code in codes]


def components(store: Store, key: PatientKey) -> list[str]:
    with store.read() as conn:
        found = records.view(conn, key, as_of=NOW)
    assert found is not None
    return sorted(one.text for one in found.observations if one.status in "FC")


@pytest.mark.requirement("F6")
@pytest.mark.parametrize("source", ["FHIR", SERVER])
@pytest.mark.parametrize("status", ["F", "C"])
def test_a_panel_that_has_lost_components_withdraws_them_and_one_that_gets_them_back_has_them(
    store: Store, source: str, status: str
) -> None:
    tell(store, A, panel(1, "a", "b", "c", source=source), source=source, hour=1)
    tell(store, A, panel(2, "a", status=status, source=source), source=source, hour=2)
    assert components(store, A) == ["a"]
    tell(store, A, panel(1, "a", "b", "c", source=source), source=source, hour=3)  # read again
    assert components(store, A) == ["a"]
    tell(store, A, panel(4, "a", "c", status=status, source=source), source=source, hour=4)
    assert components(store, A) == ["a", "c"]


@pytest.mark.requirement("F6")
def test_an_older_version_that_comes_later_brings_no_component_back(store: Store) -> None:
    tell(store, A, panel(2, "a"), hour=2)
    tell(store, A, panel(1, "a", "b"), hour=3)
    assert components(store, A) == ["a"]
    tell(store, B, [*panel(1, "a", "b"), *panel(2, "a")], hour=2)  # a history of versions
    assert components(store, B) == ["a"]


@pytest.mark.requirement("F6")
def test_a_panel_that_does_not_tell_when_it_was_said_keeps_what_it_says_again(store: Store) -> None:
    def untold(*codes: str, value: float = 1.0) -> list[Observation]:
        return [replace(one, said_at=None, value=value if one.text == "a" else 1.0) for one in panel(0, *codes)]

    tell(store, A, untold("a", "b", "c"), hour=1)
    tell(store, A, untold("a", "b", value=2.0), hour=2)
    assert components(store, A) == ["a", "b"]


@pytest.mark.requirement("F4")
def test_a_panel_that_is_moved_and_amended_leaves_no_component_behind(store: Store) -> None:
    tell(store, A, panel(1, "a", "b"), hour=1)
    tell(store, B, panel(2, "a"), hour=2)
    assert (components(store, A), components(store, B)) == ([], ["a"])


@pytest.mark.parametrize("source", ["FHIR", "FHIR other", "FHIR fhir|H", "LAB|H"])
def test_the_same_name_from_elsewhere_or_without_a_server_moves_nothing(store: Store, source: str) -> None:
    pull(store, A, 5.0, hour=1, source=SERVER if source == "FHIR other" else source)
    pull(store, B, 7.0, hour=2, source=source)
    assert (used(store, A), used(store, B)) == ([5.0], [7.0])
