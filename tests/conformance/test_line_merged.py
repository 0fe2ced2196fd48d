"""Two keys of one person, told by two names: an unknown of the emergency department who turns out to be known; on both databases."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from models.bundle import Bundle
from tests.conformance.test_line_record import NOW, after, analyze, bundle, receive, result, say, used
from worker import record_feeds
from worker.config import Config
from worker.domain import Patient, PatientKey
from worker.errors import PatientConflict, RecordError
from worker.intake.hl7 import parse
from worker.store import records
from worker.store.database import Store

__all__ = ["bundle"]  # a fixture

TRAUMA, SMITH, JONES = "Trauma^Alpha||19000101|M", "Smith^Peter||19560203|M", "Jones^Robert||19400101|M"
T, B = (Patient(PatientKey("SITE", patient_id)) for patient_id in ("T-1", "B-1"))
ON_IMAGES = {"T": replace(T, name="Trauma^Alpha", birth_date="19000101"), "B": replace(B, name="Smith^Peter", birth_date="19560203")}


def admit(store: Store, patient_id: str, person: str, *, hour: int, control_id: str) -> None:
    _send(store, "ADT^A08", f"PID|1||{patient_id}^^^SITE||{person}", hour=hour, control_id=control_id)


def merge(store: Store, *, survivor: str = "B-1", retired: str = "T-1", control_id: str = "merge") -> None:
    _send(store, "ADT^A40", f"PID|1||{survivor}^^^SITE\rMRG|{retired}^^^SITE", hour=10, control_id=control_id)


def _send(store: Store, trigger: str, segments: str, *, hour: int, control_id: str) -> None:
    time = datetime(2026, 3, 1, hour, tzinfo=UTC).strftime("%Y%m%d%H%M%S")
    raw = f"MSH|^~\\&|HIS|H|S|H|{time}||{trigger}|{control_id}|P|2.5.1\rEVN||{time}\r{segments}".encode()
    record_feeds.apply_message(Config(), store, parse(raw, zone=UTC, issuers={"": "SITE"}), raw)


def trauma(store: Store, *, is_merged: bool = True) -> None:
    """An unknown T with a result, and B, who is known."""
    admit(store, "T-1", TRAUMA, hour=8, control_id="a04")
    say(store, "ORU^R01", TRAUMA, *result(5, "F1"), control_id="oru", patient_id="T-1")
    admit(store, "B-1", SMITH, hour=9, control_id="a28")
    if is_merged:
        merge(store)


@pytest.mark.requirement("F3")
@pytest.mark.parametrize("images", ["T", "B"])
def test_an_unknown_who_turns_out_to_be_somebody_keeps_the_results_and_the_images(store: Store, bundle: Bundle, images: str) -> None:
    trauma(store)
    receive(store, ON_IMAGES[images])
    assert used(analyze(store, bundle)) == [5.0]


@pytest.mark.requirement("F3")
@pytest.mark.parametrize("patient_id", ["T-1", "B-1"])
@pytest.mark.parametrize("person", [TRAUMA, SMITH])
def test_a_later_result_in_either_name_under_either_id_is_taken(store: Store, bundle: Bundle, patient_id: str, person: str) -> None:
    trauma(store)
    say(store, "ORU^R01", person, *result(7, "F1", status="C"), control_id="late", patient_id=patient_id)
    receive(store, ON_IMAGES["B"])
    assert used(analyze(store, bundle)) == [7.0]


@pytest.mark.requirement("F4")
@pytest.mark.parametrize(
    "person", [JONES, "Trauma^Bravo||19000101|M", "Trauma^Alpha||19000102|M", "Jones^Robert||19000101|M", "Jones^Robert"]
)
def test_what_agrees_with_no_admission_of_the_merged_stays_refused(store: Store, bundle: Bundle, person: str) -> None:
    trauma(store)
    with pytest.raises(RecordError, match="PID-5"):
        say(store, "ORU^R01", person, *result(300, "F2"), control_id="other", patient_id="B-1")


@pytest.mark.requirement("F4")
def test_an_admission_that_says_little_lends_nobody_its_name(store: Store, bundle: Bundle) -> None:
    admit(store, "T-1", "Unknown^Unknown|||M", hour=8, control_id="a04")
    say(store, "ORU^R01", JONES, *result(300, "F1"), control_id="oru", patient_id="T-1")
    admit(store, "B-1", SMITH, hour=9, control_id="a28")
    merge(store)
    receive(store, ON_IMAGES["B"])
    assert used(analyze(store, bundle)) == []


@pytest.mark.requirement("F4")
def test_without_a_merge_nobody_has_another_name(store: Store, bundle: Bundle) -> None:
    trauma(store, is_merged=False)
    with pytest.raises(RecordError, match="PID-5"):
        say(store, "ORU^R01", TRAUMA, *result(300, "F2"), control_id="other", patient_id="B-1")
    admit(store, "T-1", SMITH, hour=10, control_id="a08")
    receive(store, ON_IMAGES["T"])
    assert isinstance(analyze(store, bundle).error, PatientConflict)


@pytest.mark.requirement("F3")
def test_an_unknown_who_was_renamed_before_the_merge_keeps_them_too(store: Store, bundle: Bundle) -> None:
    trauma(store, is_merged=False)
    admit(store, "T-1", SMITH, hour=11, control_id="a08")  # the result was said at ten
    merge(store)
    receive(store, ON_IMAGES["B"])
    assert used(analyze(store, bundle)) == [5.0]


@pytest.mark.requirement("F4")
def test_who_took_a_number_by_mistake_does_not_come_with_it_into_a_merge(store: Store, bundle: Bundle) -> None:
    admit(store, "T-1", SMITH, hour=7, control_id="1")
    admit(store, "T-1", JONES, hour=8, control_id="2")  # the wrong number
    say(store, "ORU^R01", JONES, *result(300, "F1"), control_id="oru", patient_id="T-1")
    admit(store, "T-1", SMITH, hour=11, control_id="3")
    admit(store, "B-1", SMITH, hour=11, control_id="4")
    merge(store)
    receive(store, ON_IMAGES["B"])
    assert used(analyze(store, bundle)) == []


@pytest.mark.requirement("F4")
def test_what_a_correction_of_the_survivor_took_away_a_merge_does_not_bring_back(store: Store, bundle: Bundle) -> None:
    admit(store, "B-1", JONES, hour=8, control_id="1")
    say(store, "ORU^R01", JONES, *result(300, "F1"), control_id="oru", patient_id="B-1")
    admit(store, "B-1", SMITH, hour=11, control_id="2")
    admit(store, "T-1", TRAUMA, hour=8, control_id="3")
    merge(store)
    receive(store, ON_IMAGES["B"])
    assert used(analyze(store, bundle)) == []


@pytest.mark.requirement("F3")
def test_undoing_the_merge_of_an_unknown_restores_whose_the_images_are(store: Store, bundle: Bundle) -> None:
    trauma(store)
    receive(store, replace(ON_IMAGES["T"], key=B.key))
    assert used(analyze(store, bundle)) == [5.0]
    with store.begin() as conn:
        (only,) = records.merges_of(conn, B.key)
        assert records.unmerge(conn, only[0], reason="wrong person", now=after(1))
    with store.read() as conn:
        record = records.view(conn, B.key, as_of=NOW)
    assert record is not None
    assert (record.observations, [said.name for _, said in record.admissions if said.name]) == ((), ["Smith^Peter"])
