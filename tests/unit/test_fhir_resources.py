"""What each FHIR resource says: history, medication, orders, every kind of value. Synthetic patients only."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import SHARED
from tests.unit.test_fhir import CET, JSON, SENTINEL, Json, facts, observation, person, updates
from worker.domain import ROUTINE, STAT, Code, Observation, Order
from worker.errors import RecordError
from worker.intake import fhir
from worker.intake.fhir_resources import READERS

DIABETES = {"coding": [{"system": "http://snomed.info/sct", "code": "44054006", "display": "Diabetes"}], "text": "Diabetes mellitus"}
WARFARIN = {"coding": [{"system": "http://www.nlm.nih.gov/research/umls/rxnorm", "code": "11289", "display": "warfarin"}]}
VERIFICATION = "http://terminology.hl7.org/CodeSystem/condition-ver-status"
MAY = "2020-05-06T06:30:00+00:00"


def resource(kind: str, **content: object) -> Json:
    made = {"resourceType": kind, "id": "r1", "subject": {"reference": "Patient/p1"}} | content
    return {name: value for name, value in made.items() if value is not None}


def condition(**changes: object) -> Json:
    return resource("Condition", **({"code": DIABETES, "recordedDate": MAY} | changes))


def procedure(**changes: object) -> Json:
    return resource("Procedure", **({"status": "completed", "code": DIABETES, "performedDateTime": MAY} | changes))


def statement(**changes: object) -> Json:
    made = {"status": "active", "medicationCodeableConcept": WARFARIN, "effectiveDateTime": MAY}
    return resource("MedicationStatement", **(made | changes))


def prescription(**changes: object) -> Json:
    made = {"status": "active", "intent": "order", "medicationCodeableConcept": WARFARIN, "authoredOn": MAY}
    return resource("MedicationRequest", **(made | changes))


def identifier(kind: str, value: str) -> Json:
    return {"type": {"coding": [{"system": "http://terminology.hl7.org/CodeSystem/v2-0203", "code": kind}]}, "value": value}


def request(**changes: object) -> Json:
    made = {"status": "active", "intent": "order", "authoredOn": MAY, "identifier": [identifier("ACSN", "A1")]}
    return resource("ServiceRequest", **(made | changes))


def category(code: str) -> list[Json]:
    return [{"coding": [{"system": "http://snomed.info/sct", "code": code}]}]


def orders(*resources: Json) -> tuple[Order, ...]:
    (update,) = updates(person(), *resources)
    return update.orders


# --- history


def test_a_condition_is_its_own_code_with_value_one_from_when_it_was_recorded() -> None:
    (fact,) = facts(condition(onsetDateTime="1999"))
    assert fact == Observation(
        Code("44054006", "SCT", "Diabetes"), fact.at, 1.0, unit="1", text="Diabetes", key="FHIR/Condition/r1", source="FHIR"
    )
    assert fact.at.isoformat() == MAY


@pytest.mark.parametrize(
    ("times", "at"),
    [
        ({"onsetDateTime": "1999"}, "1999-12-31T22:59:59+00:00"),
        ({"onsetPeriod": {"start": "2019-01-01T00:00:00Z"}}, "2019-01-01T00:00:00+00:00"),
        ({"onsetString": "as a child", "meta": {"lastUpdated": MAY}}, MAY),
    ],
)
def test_a_condition_that_was_not_dated_counts_from_its_onset_or_from_when_it_was_told(times: Json, at: str) -> None:
    (fact,) = facts(condition(recordedDate=None, **times))
    assert fact.at.isoformat() == at


@pytest.mark.parametrize(
    ("status", "kept"),
    [("confirmed", "F"), ("provisional", "P"), ("differential", "P"), ("unconfirmed", "P"), ("refuted", "D"), ("entered-in-error", "W")],
)
def test_only_a_confirmed_condition_is_a_fact_that_is_used(status: str, kept: str) -> None:
    (fact,) = facts(condition(verificationStatus={"coding": [{"system": VERIFICATION, "code": status}]}))
    assert fact.status == kept


@pytest.mark.requirement("F10")
@pytest.mark.parametrize(
    ("reason", "words"),
    [({"coding": [{"code": "error"}]}, "error"), ({"coding": [{"code": "unknown"}], "text": "hemolyzed"}, "hemolyzed")],
)
def test_a_value_that_turned_out_to_be_none_is_replaced_by_the_reason(reason: Json, words: str) -> None:
    """As in HL7 v2: a newer result that cannot be used is never replaced by the older one."""
    for is_part in (False, True):
        first, second = (
            facts(observation(valueQuantity=None, component=[{"code": DIABETES, **value}]) if is_part else observation(**value))[0]
            for value in ({"valueInteger": 7, "valueQuantity": None}, {"dataAbsentReason": reason, "valueQuantity": None})
        )
        assert (second.key, second.status, second.kind, second.value, second.text) == (first.key, "F", "text", None, words)


@pytest.mark.requirement("F10")
def test_a_condition_that_was_entered_in_error_is_withdrawn_by_its_id_alone() -> None:
    (first,) = facts(condition())
    status = {"coding": [{"system": VERIFICATION, "code": "entered-in-error"}]}
    (second,) = facts(condition(code=None, recordedDate=None, verificationStatus=status, meta={"lastUpdated": MAY}))
    assert (second.key, second.status) == (first.key, "W")


def test_a_resolved_condition_is_history_and_still_a_fact() -> None:
    (fact,) = facts(condition(clinicalStatus={"coding": [{"code": "resolved"}]}, abatementDateTime="2020-06-01"))
    assert (fact.status, fact.value) == ("F", 1.0)


@pytest.mark.parametrize(
    ("status", "kept"),
    [
        ("completed", ["F"]),
        ("in-progress", ["P"]),
        ("stopped", ["P"]),
        ("not-done", ["D"]),
        ("entered-in-error", ["W"]),
        ("unknown", ["P"]),
        ("preparation", []),
    ],
)
def test_a_procedure_counts_when_it_was_done(status: str, kept: list[str]) -> None:
    assert [fact.status for fact in facts(procedure(status=status))] == kept


def test_a_procedure_counts_from_when_it_was_over() -> None:
    period = {"start": "2020-05-06T06:30:00Z", "end": "2020-05-06T07:30:00Z"}
    (fact,) = facts(procedure(performedDateTime=None, performedPeriod=period))
    assert (fact.at.isoformat(), fact.value, fact.unit) == ("2020-05-06T07:30:00+00:00", 1.0, "1")


# --- medication


def test_a_medication_counts_from_its_start_though_its_end_lies_ahead() -> None:
    """A time in the future would make what is true today unusable."""
    period = {"start": MAY, "end": "2099-01-01"}
    (taken,) = facts(statement(effectiveDateTime=None, effectivePeriod=period))
    (ordered,) = facts(prescription())
    assert taken.at.isoformat() == ordered.at.isoformat() == MAY
    assert (taken.code, taken.value) == (ordered.code, ordered.value) == (Code("11289", "RXNORM", "warfarin"), 1.0)


@pytest.mark.parametrize(
    ("one", "kept"),
    [
        (statement(status="stopped"), ["F"]),
        (statement(status="not-taken"), ["D"]),
        (statement(status="intended"), []),
        (statement(status="entered-in-error"), ["W"]),
        (prescription(status="cancelled"), ["D"]),
        (prescription(status="draft"), []),
        (prescription(intent="proposal"), ["P"]),
        (prescription(doNotPerform=True), ["D"]),
    ],
)
def test_a_medication_that_is_not_taken_is_no_fact_that_is_used(one: Json, kept: list[str]) -> None:
    assert [fact.status for fact in facts(one)] == kept


@pytest.mark.parametrize(
    ("reference", "contained"), [("#m", [{"resourceType": "Medication", "id": "m", "code": WARFARIN}]), ("Medication/m", [])]
)
def test_a_medication_may_be_a_resource_of_its_own(reference: str, contained: list[Json]) -> None:
    order = prescription(medicationCodeableConcept=None, medicationReference={"reference": reference}, contained=contained)
    found = facts(order, {"resourceType": "Medication", "id": "m", "code": WARFARIN})
    assert [fact.code.value for fact in found] == ["11289"]
    assert facts(order | {"medicationReference": {"reference": "Medication/elsewhere"}}) == ()


# --- orders


def test_an_order_of_imaging_names_its_accession_number_and_the_reason() -> None:
    numbers = [identifier("ACSN", "A1"), identifier("PLAC", "P1"), identifier("FILL", "F1")]
    (update,) = updates(person(), request(identifier=numbers, priority="stat", reasonCode=[{"text": "cough"}, DIABETES]))
    assert update.orders == (Order("A1", "P1", "F1", STAT),)
    (fact,) = update.observations
    assert (fact.code.value, fact.code.scheme, fact.text, fact.kind) == ("18785-6", "LN", "cough\nDiabetes mellitus", "text")
    assert (fact.key, fact.at.isoformat()) == ("FHIR/ServiceRequest/r1/reason", MAY)


@pytest.mark.parametrize(
    ("priority", "expected"), [("stat", STAT), ("asap", STAT), ("urgent", STAT), ("routine", ROUTINE), (None, ROUTINE)]
)
def test_an_urgent_order_is_urgent(priority: str | None, expected: int) -> None:
    assert [order.priority for order in orders(request(priority=priority))] == [expected]


@pytest.mark.parametrize(
    ("status", "is_cancelled", "reason"),
    [("active", False, "F"), ("completed", False, "F"), ("revoked", True, "D"), ("entered-in-error", True, "W")],
)
def test_an_order_that_was_withdrawn_is_cancelled_and_its_reason_with_it(status: str, is_cancelled: bool, reason: str) -> None:
    (update,) = updates(person(), request(status=status, reasonCode=[{"text": "cough"}]))
    assert [order.is_cancelled for order in update.orders] == [is_cancelled]
    assert [fact.status for fact in update.observations] == [reason]


@pytest.mark.parametrize(
    ("one", "count"),
    [
        (request(), 1),
        (request(identifier=None, category=category("363679005")), 1),
        (request(identifier=None), 0),
        (request(category=category("108252007")), 0),
        (request(status="draft"), 0),
        (request(intent="plan"), 0),
    ],
)
def test_only_what_is_ordered_of_imaging_is_an_order(one: Json, count: int) -> None:
    """A laboratory numbers its orders with accession numbers too."""
    assert len(orders(one)) == count


def test_orders_without_numbers_of_their_own_are_told_apart_by_their_resource() -> None:
    """Else the cancellation of one of two orders of a study cancels both."""
    first, second = orders(request(), request(id="r2", status="revoked"))
    assert (first.placer, second.placer) == ("ServiceRequest/r1", "ServiceRequest/r2")
    assert (first.is_cancelled, second.is_cancelled) == (False, True)
    (numbered,) = orders(request(identifier=[identifier("ACSN", "A1"), identifier("FILL", "F1")]))
    assert (numbered.placer, numbered.filler) == ("", "F1")


# --- values


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ({"valueRange": {"low": {"value": 1, "unit": "g"}, "high": {"value": 2, "unit": "g"}}}, "range", (1.0, 2.0, "", "g")),
        ({"valueRange": {"low": {"value": 1, "unit": "g"}}}, "number", (1.0, None, ">=", "g")),
        ({"valueRange": {"high": {"value": 2, "unit": "g"}}}, "number", (2.0, None, "<=", "g")),
        ({"valueRatio": {"numerator": {"value": 1}, "denominator": {"value": 128}}}, "ratio", (1.0, 128.0, "", "")),
        ({"valueRatio": {"numerator": {"value": 1}, "denominator": {"value": 128, "comparator": ">"}}}, "ratio", (1.0, 128.0, ">", "")),
        (
            {"valueRatio": {"numerator": {"value": 5, "unit": "mg"}, "denominator": {"value": 2, "unit": "mL"}}},
            "ratio",
            (5.0, 2.0, "", "mg/mL"),
        ),
    ],
)
def test_a_range_and_a_ratio_are_two_numbers(value: Json, kind: str, expected: tuple[object, ...]) -> None:
    (fact,) = facts(observation(valueQuantity=None, **value))
    assert fact.kind == kind
    assert (fact.value, fact.high, fact.comparator, fact.unit) == expected


def test_a_coded_value_is_a_code_and_its_words() -> None:
    (fact,) = facts(observation(valueQuantity=None, valueCodeableConcept=DIABETES))
    assert (fact.kind, fact.coded, fact.text, fact.value) == ("coded", Code("44054006", "SCT", "Diabetes"), "Diabetes", None)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({"valueString": "a"}, "text"),
        ({"valueBoolean": True}, "text"),
        ({"valueDateTime": "2020"}, "text"),
        ({"valueTime": "06:30:00"}, "text"),
        ({"valueCodeableConcept": {"text": "a"}}, "text"),
        ({"valueInteger": 7}, "number"),
    ],
)
def test_a_value_says_how_it_is_to_be_read(value: Json, kind: str) -> None:
    assert [fact.kind for fact in facts(observation(valueQuantity=None, **value))] == [kind]


@pytest.mark.parametrize(
    "value",
    [
        {"valueQuantity": {"unit": "mg"}},
        {"valueRange": {}},
        {"valueRange": {"low": {"unit": "g"}}},
        {"valueRatio": {"numerator": {"value": 1}}},
        {"valuePeriod": {"start": "2020"}},
        {"dataAbsentReason": {"text": "see components"}, "component": [{"code": DIABETES}]},
    ],
)
def test_a_value_that_is_not_there_is_no_fact(value: Json) -> None:
    assert facts(observation(**({"valueQuantity": None} | value))) == ()


@pytest.mark.parametrize(
    ("one", "field"),
    [
        (condition(recordedDate=None), "Condition has no recordedDate"),
        (condition(recordedDate=SENTINEL), r"Condition\.recordedDate"),
        (condition(verificationStatus={"coding": [{"code": SENTINEL}]}), r"Condition\.verificationStatus"),
        (condition(verificationStatus={"text": SENTINEL}), r"Condition\.verificationStatus"),
        (procedure(status=SENTINEL), r"Procedure\.status"),
        (procedure(performedDateTime=None, performedPeriod={"end": SENTINEL}), r"Procedure\.performedPeriod\.end"),
        (statement(status=SENTINEL), r"MedicationStatement\.status"),
        (prescription(authoredOn=SENTINEL), r"MedicationRequest\.authoredOn"),
        (prescription(medicationReference=SENTINEL, medicationCodeableConcept=None), "medicationReference"),
        (request(status=SENTINEL), r"ServiceRequest\.status"),
        (request(identifier=[SENTINEL]), "identifier"),
        (request(authoredOn=None, reasonCode=[{"text": SENTINEL}]), "ServiceRequest has no authoredOn"),
        (observation(valueQuantity=None, valueRange={"low": {"value": 1, "unit": "g"}, "high": {"value": 2, "unit": "mg"}}), "Range"),
        (
            observation(
                valueQuantity=None,
                valueRatio={"numerator": {"value": 1, "comparator": "<"}, "denominator": {"value": 2, "comparator": "<"}},
            ),
            "Ratio",
        ),
        (observation(valueQuantity=None, valueRatio={"numerator": SENTINEL}), "numerator"),
        (observation(valueQuantity=None, valueString=[SENTINEL]), "valueString"),
    ],
)
def test_what_cannot_be_understood_is_refused_by_field_and_without_its_content(one: Json, field: str) -> None:
    with pytest.raises(RecordError, match=field) as caught:
        updates(person(), one)
    assert SENTINEL not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(
    one=st.sampled_from([condition(), procedure(), statement(), prescription(), request(reasonCode=[{"text": "a"}])]),
    name=st.sampled_from(["status", "code", "category", "identifier", "reasonCode", "verificationStatus", "meta"]),
    value=JSON,
)
def test_no_content_of_a_field_gives_anything_but_facts_or_a_refusal(one: Json, name: str, value: object) -> None:
    try:
        for update in updates(person(), one | {name: value}):
            assert all(fact.code.value for fact in update.observations)
    except RecordError:
        return


@pytest.mark.usefixtures("shared")
def test_every_resource_that_is_read_is_read_in_the_real_bundles() -> None:
    """The counts are those of the resources in the files, not of this parser."""
    said: Counter[str] = Counter()
    there: Counter[str] = Counter()
    for path in sorted((SHARED / "data/fhir").glob("*.json")):
        raw = path.read_bytes()
        there += Counter(entry["resource"]["resourceType"] for entry in json.loads(raw)["entry"])
        (update,) = fhir.parse(raw, zone=CET, issuers={"http://hospital.smarthealthit.org": "SYNTHEA"})
        said += Counter(fact.key.split("/")[1] for fact in update.observations if fact.key.count("/") == 2)
    for kind in ("Condition", "Procedure", "MedicationRequest"):
        assert said[kind] == there[kind] > 40
    assert set(said) <= set(READERS)
