"""Bulk exports in NDJSON: lines in any order, of several files, and a bad line costs itself alone."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_fhir import CET, SENTINEL, Json, bundle, observation, person
from worker.domain import Patient, PatientKey, RecordUpdate
from worker.errors import RecordError
from worker.intake.fhir import parse, parse_ndjson

OTHER = person(id="p2", identifier=[{"system": "s", "value": "2"}])
MANY = [person(), OTHER, *(observation(id=f"o{n}", subject={"reference": f"Patient/p{1 + n % 2}"}) for n in range(4))]


def lines(*resources: Json | bytes) -> bytes:
    return b"\n".join(one if isinstance(one, bytes) else json.dumps(one).encode() for one in resources)


def read(*files: bytes) -> tuple[list[RecordUpdate], list[str]]:
    return parse_ndjson(files, zone=CET, issuers={})


def by_patient(updates: list[RecordUpdate]) -> dict[PatientKey, tuple[Patient, set[str]]]:
    return {one.patient.key: (one.patient, {fact.key for fact in one.observations}) for one in updates}


@given(order=st.permutations(MANY), cut=st.integers(0, len(MANY)))
def test_lines_in_any_order_and_of_any_file_say_what_the_bundle_says(order: list[Json], cut: int) -> None:
    updates, errors = read(lines(*order[:cut]), lines(*order[cut:]))
    assert errors == []
    assert by_patient(updates) == by_patient(parse(bundle(*MANY), zone=CET, issuers={}))


def test_one_file_is_given_as_bytes() -> None:
    updates, errors = parse_ndjson(lines(*MANY) + b"\n", zone=CET, issuers={})
    assert (len(updates), errors) == (2, [])


def test_a_bad_line_is_named_and_the_others_go_on() -> None:
    bad: list[Json | bytes] = [
        b'{"a":',
        b"[1]",
        b"\xff",
        b"{}",
        b'{"a":' * 100_000,
        observation(status=SENTINEL),
        observation(subject={"reference": SENTINEL}),
    ]
    (update,), errors = read(lines(person(), *bad, b"", observation()))
    assert len(update.observations) == 1
    assert errors == [
        "Line 2: The line is not JSON.",
        "Line 3: The line is not a resource.",
        "Line 4: The line is not UTF-8.",
        "Line 5: The line is not a resource.",
        "Line 6: The line is nested too deeply.",
        "Line 7: Observation.status is not a known status.",
        "Line 8: The subject of a resource of type Observation is not in the bundle.",
    ]


def test_of_several_files_the_file_is_named_too() -> None:
    _, errors = read(lines(person()) + b"\r\n\r\n", b"\n\nx\n")
    assert errors == ["File 2, line 3: The line is not JSON."]


def test_a_reference_that_two_patients_claim_is_nobodys() -> None:
    """The right patient or none: what was said of it may be of either."""
    twin = person(identifier=[{"system": "s", "value": "2"}])
    updates, errors = read(lines(person(), twin, observation()))
    assert [one.observations for one in updates] == [()]
    assert [error.split(": ")[0] for error in errors] == ["Line 2", "Line 3"]


def test_of_two_versions_of_a_patient_the_later_counts() -> None:
    early, late = (person(birthDate=f"{year}-01-01", meta={"lastUpdated": f"{year}-01-01T00:00:00Z"}) for year in (1990, 2000))
    for order in ((early, late), (late, early)):
        (update,), _ = read(lines(*order))
        assert update.patient.birth_date == "20000101"
        assert update.at is not None
        assert update.at.isoformat() == "2000-01-01T00:00:00+00:00"


def test_a_link_that_cannot_be_understood_costs_its_patient_alone() -> None:
    broken = OTHER | {"link": [{"type": "replaces", "other": {"identifier": {"value": SENTINEL}}}]}
    updates, errors = read(lines(broken, person(), observation()))
    assert [len(one.observations) for one in updates] == [1]
    assert errors == ["Line 1: Patient.identifier has neither a system nor an assigner."]


def test_too_many_bytes_are_refused_before_they_are_read() -> None:
    with pytest.raises(RecordError, match="limit"):
        parse_ndjson([b"x" * 600, b"x" * 600], zone=CET, issuers={}, max_bytes=1000)


def test_nothing_gives_nothing() -> None:
    assert read(b"") == read() == ([], [])
