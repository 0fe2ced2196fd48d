"""FHIR R4: what one bundle says, what is refused, and that nothing is guessed. Synthetic patients only."""

from __future__ import annotations

import base64
import json
from datetime import timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.domain import Code, Merge, Observation, Patient, PatientKey, RecordUpdate
from worker.errors import RecordError
from worker.intake.fhir import parse

CET = timezone(timedelta(hours=1))
SENTINEL = "ZZSENTINEL"
CRP = {"coding": [{"system": "http://loinc.org", "code": "1988-5", "display": "CRP"}]}
QUANTITY = {"value": 3.2, "unit": "mg/l", "system": "http://unitsofmeasure.org", "code": "mg/L"}
Json = dict[str, Any]


def person(**changes: object) -> Json:
    return {
        "resourceType": "Patient",
        "id": "p1",
        "identifier": [{"system": "urn:oid:1.2.3", "value": "4711", "assigner": {"display": "HOSP"}}],
        "name": [{"family": "Doe", "given": ["Jane", "Q"], "prefix": ["Dr"], "suffix": ["Jr"]}],
        "birthDate": "1980-02-29",
        "gender": "female",
    } | changes


def observation(**changes: object) -> Json:
    made = {
        "resourceType": "Observation",
        "id": "o1",
        "status": "final",
        "code": CRP,
        "subject": {"reference": "Patient/p1"},
        "effectiveDateTime": "2020-05-06T06:30:00+01:00",
        "valueQuantity": QUANTITY,
    } | changes
    return {name: value for name, value in made.items() if value is not None}


def bundle(*resources: Json, kind: str = "collection") -> bytes:
    return json.dumps({"resourceType": "Bundle", "type": kind, "entry": [{"resource": one} for one in resources]}).encode()


def updates(*resources: Json, issuers: dict[str, str] | None = None, schemes: dict[str, str] | None = None) -> list[RecordUpdate]:
    return parse(bundle(*resources), zone=CET, issuers=issuers or {}, schemes=schemes)


def facts(*resources: Json) -> tuple[Observation, ...]:
    (update,) = updates(person(), *resources)
    return update.observations


def test_a_patient_gives_the_demographics_as_dicom_writes_them() -> None:
    (update,) = updates(person())
    assert update.patient == Patient(PatientKey("HOSP", "4711"), "Doe^Jane^Q^Dr^Jr", "19800229", "F")
    assert update.has_demographics


def test_a_quantity_is_a_value_in_its_ucum_unit() -> None:
    (fact,) = facts(observation(valueQuantity=QUANTITY | {"comparator": "<"}))
    assert (fact.code, fact.value, fact.comparator, fact.unit, fact.status) == (Code("1988-5", "LN", "CRP"), 3.2, "<", "mg/L", "F")
    assert fact.at.isoformat() == "2020-05-06T05:30:00+00:00"


@pytest.mark.parametrize(
    ("content", "value", "text"),
    [
        ({"valueQuantity": {"value": 3, "unit": "mg"}}, 3.0, ""),
        ({"valueInteger": 7}, 7.0, ""),
        ({"valueString": "a\r\nb\u0000"}, None, "a\nb"),
        ({"valueString": "lone \ud800"}, None, "lone \ufffd"),
        ({"valueCodeableConcept": {"coding": [{"code": "x", "display": "not detected"}], "text": "none"}}, None, "not detected"),
        ({"valueCodeableConcept": {"text": "none"}}, None, "none"),
        ({"valueBoolean": False}, None, "false"),
        ({"valueDateTime": "2020"}, None, "2020"),
    ],
)
def test_each_kind_of_value_becomes_a_number_or_a_text(content: Json, value: float | None, text: str) -> None:
    (fact,) = facts(observation(**({"valueQuantity": None} | content)))
    assert (fact.value, fact.text) == (value, text)


@pytest.mark.parametrize(
    ("status", "kept"),
    [
        ("final", ["F"]),
        ("amended", ["C"]),
        ("corrected", ["C"]),
        ("preliminary", ["P"]),
        ("entered-in-error", ["W"]),
        ("cancelled", ["X"]),
        ("registered", []),
    ],
)
def test_statuses_are_those_of_hl7(status: str, kept: list[str]) -> None:
    assert [fact.status for fact in facts(observation(status=status))] == kept


def test_a_withdrawn_observation_has_the_key_of_what_it_withdraws_though_it_is_empty() -> None:
    (first,) = facts(observation())
    (second,) = facts(observation(status="entered-in-error", valueQuantity=None))
    assert (second.key, second.status, second.value) == (first.key, "W", None)


@pytest.mark.requirement("F10")
@pytest.mark.parametrize(
    "withdrawn",
    [
        {"status": "entered-in-error", "code": None},
        {"status": "entered-in-error", "effectiveDateTime": None},
        {"status": "cancelled", "code": None, "effectiveDateTime": None, "valueQuantity": None},
        {"focus": [{"reference": "Patient/fetus"}]},
        {"status": "amended", "focus": [{"reference": "Patient/p1"}, {"display": "the donor"}]},
    ],
    ids=["no code", "no time", "only the id is left", "of the fetus", "of the donor"],
)
def test_what_is_withdrawn_or_of_somebody_else_takes_back_what_was_said_under_its_id(withdrawn: Json) -> None:
    (first,) = facts(observation())
    (second,) = facts(observation(meta={"lastUpdated": "2020-05-08T00:00:00Z"}, **withdrawn))
    assert second.key == first.key
    assert second.status in ("D", "W", "X")


@pytest.mark.requirement("F10")
def test_a_focus_on_the_subject_is_nobody_else() -> None:
    assert [fact.status for fact in facts(observation(focus=[{"reference": "Patient/p1"}]))] == ["F"]


@pytest.mark.requirement("F10")
@pytest.mark.parametrize(
    "resources",
    [
        [person(), observation(modifierExtension=[{"url": "http://x.org/not", "valueString": SENTINEL}])],
        [person(), observation(component=[{"code": CRP, "modifierExtension": [{"url": "http://x.org/not", "valueString": SENTINEL}]}])],
        [person(modifierExtension=[{"url": "http://x.org/not", "valueString": SENTINEL}]), observation()],
    ],
)
def test_what_an_unknown_extension_may_turn_into_its_opposite_is_refused(resources: list[Json]) -> None:
    with pytest.raises(RecordError, match="modifierExtension") as caught:
        updates(*resources)
    assert SENTINEL not in str(caught.value)


@pytest.mark.parametrize("resources", [[person(implicitRules="http://x.org/rules")], [person(), observation(implicitRules="http://x.org")]])
def test_what_was_made_under_rules_that_are_not_known_is_refused(resources: list[Json]) -> None:
    with pytest.raises(RecordError, match="implicitRules"):
        updates(*resources)


def test_an_observation_without_an_id_supersedes_nothing() -> None:
    """Two nameless facts under one key would hide one another."""
    assert [fact.key for fact in facts(observation(id=None), observation(id=None))] == ["", ""]


def test_components_are_facts_of_their_own() -> None:
    systolic = {"code": {"coding": [{"system": "http://loinc.org", "code": "8480-6"}]}, "valueQuantity": {"value": 120}}
    diastolic = {"code": {"coding": [{"system": "http://loinc.org", "code": "8462-4"}]}, "valueQuantity": {"value": 80}}
    many = facts(observation(valueQuantity=None, component=[systolic, diastolic, diastolic]))
    assert [(fact.code.value, fact.value) for fact in many] == [("8480-6", 120.0), ("8462-4", 80.0), ("8462-4", 80.0)]
    assert len({fact.key for fact in many}) == 3


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ({"effectiveDateTime": "2020-05-06T06:30:00.5Z"}, "2020-05-06T06:30:00.500000+00:00"),
        ({"effectiveDateTime": "2020-05-06T06:30:00-02:30"}, "2020-05-06T09:00:00+00:00"),
        ({"effectiveDateTime": "2020-05-06"}, "2020-05-06T22:59:59+00:00"),
        ({"effectiveDateTime": "2020-02"}, "2020-02-29T22:59:59+00:00"),
        ({"effectiveDateTime": "2020"}, "2020-12-31T22:59:59+00:00"),
        ({"effectivePeriod": {"start": "2020-05-06T06:30:00Z", "end": "2020-05-06T07:30:00Z"}}, "2020-05-06T07:30:00+00:00"),
        ({"effectivePeriod": {"start": "2020-05-06T06:30:00Z"}}, "2020-05-06T06:30:00+00:00"),
        ({"effectiveInstant": "2020-05-06T06:30:00Z"}, "2020-05-06T06:30:00+00:00"),
        ({"issued": "2020-05-06T06:30:00Z"}, "2020-05-06T06:30:00+00:00"),
    ],
)
def test_an_imprecise_time_is_the_latest_it_may_be(time: Json, expected: str) -> None:
    (fact,) = facts(observation(effectiveDateTime=None) | time)
    assert fact.at.isoformat() == expected


@pytest.mark.parametrize("mapped", ["urn:oid:1.2.3", "HOSP"])
def test_the_issuer_is_mapped_by_system_or_by_assigner(mapped: str) -> None:
    (update,) = updates(person(), issuers={mapped: "OURS", "": "NOBODY'S"})
    assert update.patient.key == PatientKey("OURS", "4711")


@pytest.mark.parametrize(
    ("identifiers", "key"),
    [
        ([{"system": "s", "value": "1"}, {"system": "m", "value": "2", "type": {"coding": [{"code": "MR"}]}}], PatientKey("m", "2")),
        ([{"system": "s", "value": "1"}, {"system": "m", "value": "2"}], PatientKey("s", "1")),
        ([{"system": "s", "value": "1", "use": "old"}, {"system": "m", "value": " 2 "}], PatientKey("m", "2")),
        ([{"system": "s", "value": "1", "period": {"end": "2020-01-31"}}, {"system": "m", "value": "2"}], PatientKey("m", "2")),
        ([{"system": "s", "value": "1", "period": {"end": "9999-12"}}, {"system": "m", "value": "2"}], PatientKey("s", "1")),
        ([{"system": "s", "value": "1", "period": {"end": "2020"}}], PatientKey("s", "1")),
    ],
)
def test_the_record_number_is_preferred(identifiers: list[Json], key: PatientKey) -> None:
    (update,) = updates(person(identifier=identifiers))
    assert update.patient.key == key


def test_the_local_name_of_a_code_is_mapped_and_one_left_out_is_local() -> None:
    coded = [
        observation(id=str(n), code={"coding": [one]})
        for n, one in enumerate([{"system": "urn:x", "code": "F13"}, {"code": "F14"}, {"system": "urn:y", "code": "F15"}])
    ]
    (update,) = updates(person(), *coded, schemes={"urn:x": "L"})
    assert [(fact.code.value, fact.code.scheme) for fact in update.observations] == [("F13", "L"), ("F14", "L"), ("F15", "urn:y")]


def test_a_reference_by_urn_is_followed_and_each_patient_gets_their_own() -> None:
    """One bundle may speak of several patients: none gets another's values."""
    other = person(id="p2", identifier=[{"system": "s", "value": "2"}])
    raw = json.loads(
        bundle(
            person(id=None),
            other,
            observation(subject={"reference": "urn:uuid:1"}),
            observation(id="o2", subject={"reference": "Patient/p2/_history/3"}),
        )
    )
    raw["entry"][0]["fullUrl"] = "urn:uuid:1"
    del raw["entry"][0]["resource"]["id"]
    first, second = parse(json.dumps(raw).encode(), zone=CET, issuers={})
    assert (first.patient.key.patient_id, [fact.key for fact in first.observations]) == ("4711", ["FHIR/Observation/o1"])
    assert (second.patient.key.patient_id, [fact.key for fact in second.observations]) == ("2", ["FHIR/Observation/o2"])


def test_a_subject_by_identifier_needs_no_patient_resource() -> None:
    (update,) = updates(observation(subject={"identifier": {"system": "s", "value": "9"}}))
    assert (update.patient, update.has_demographics) == (Patient(PatientKey("s", "9")), False)


def test_when_the_patient_was_said_comes_along() -> None:
    (update,) = updates(person(meta={"lastUpdated": "2020-05-06T06:30:00.5+01:00"}))
    assert update.at is not None
    assert update.at.isoformat() == "2020-05-06T05:30:00.500000+00:00"
    assert [one.at for one in updates(person())] == [None]


TWIN = {"system": "s", "value": "2", "assigner": {"display": "HOSP"}}


@pytest.mark.requirement("F3")
@pytest.mark.parametrize(("kind", "survivor", "retired"), [("replaced-by", "2", "4711"), ("replaces", "4711", "2")])
@pytest.mark.parametrize("other", [{"reference": "Patient/p2"}, {"identifier": TWIN}])
def test_a_link_of_two_patients_is_a_merge(kind: str, survivor: str, retired: str, other: Json) -> None:
    found = updates(person(link=[{"other": other, "type": kind}]), person(id="p2", identifier=[TWIN]))
    merges = [merge for update in found for merge in update.merges]
    assert merges == [Merge(PatientKey("HOSP", survivor), PatientKey("HOSP", retired))]


def test_a_link_said_from_both_sides_is_one_merge() -> None:
    first = person(link=[{"other": {"reference": "Patient/p2"}, "type": "replaced-by"}])
    second = person(id="p2", identifier=[TWIN], link=[{"other": {"reference": "Patient/p1"}, "type": "replaces"}])
    assert [len(update.merges) for update in updates(first, second)] == [1, 0]


@pytest.mark.parametrize(
    "link",
    [
        {"other": {"reference": "Patient/p2"}, "type": "seealso"},
        {"other": {"reference": "Patient/elsewhere"}, "type": "replaces"},
        {"other": {"reference": "Patient/p1"}, "type": "replaces"},
        {"other": {"identifier": TWIN, "type": "RelatedPerson"}, "type": "replaces"},
    ],
)
def test_what_is_only_alike_or_cannot_be_found_is_no_merge(link: Json) -> None:
    found = updates(person(link=[link]), person(id="p2", identifier=[TWIN]))
    assert not [merge for update in found for merge in update.merges]


def attachment(text: str, *, kind: str = "text/plain", codec: str = "utf-8") -> Json:
    return {"contentType": kind, "data": base64.b64encode(text.encode(codec)).decode()}


def test_a_report_is_a_text_that_counts_from_when_it_was_issued() -> None:
    """A report on the study itself names the study's time; as its input it would give the answer away."""
    report = observation(resourceType="DiagnosticReport", issued="2020-05-06T09:30:00Z", presentedForm=[attachment("a\r\nü")])
    (fact,) = facts(report)
    assert fact.kind == "text"
    assert (fact.text, fact.at.isoformat(), fact.value) == ("a\nü", "2020-05-06T09:30:00+00:00", None)
    assert [fact.text for fact in facts(observation(resourceType="DiagnosticReport", conclusion="none"))] == ["none"]


def test_a_document_is_the_plain_text_of_its_attachments() -> None:
    document = {
        "resourceType": "DocumentReference",
        "id": "d1",
        "status": "current",
        "type": CRP,
        "subject": {"reference": "Patient/p1"},
        "date": "2020-05-06T09:30:00Z",
        "content": [
            {"attachment": attachment("é", kind="text/plain; charset=ISO-8859-1", codec="latin-1")},
            {"attachment": attachment("%PDF", kind="application/pdf")},
            {"attachment": {"contentType": "text/plain", "url": "file:///etc/passwd"}},
        ],
    }
    (fact,) = facts(document)
    assert (fact.text, fact.status) == ("é", "F")
    assert facts(document | {"docStatus": "preliminary"})[0].status == "P"
    assert facts(document | {"status": "superseded"})[0].status == "D"


@pytest.mark.parametrize(
    ("resources", "field"),
    [
        ([person(identifier=[])], r"Patient\.identifier"),
        ([person(identifier=[{"value": SENTINEL}])], r"Patient\.identifier"),
        ([person(birthDate=SENTINEL)], r"Patient\.birthDate"),
        ([person(birthDate="1980-02-30")], r"Patient\.birthDate"),
        ([person(name=SENTINEL)], "name"),
        ([person(), person(identifier=[{"system": "s", "value": SENTINEL}])], "same reference"),
        ([person(), observation(subject={"reference": f"Patient/{SENTINEL}"})], "subject"),
        ([person(), observation(subject=None)], "subject"),
        ([person(), observation(status=SENTINEL)], r"Observation\.status"),
        ([person(), observation(effectiveDateTime=SENTINEL)], r"Observation\.effectiveDateTime"),
        ([person(), observation(effectiveDateTime="2020-05-06T06:30:00")], "offset"),
        ([person(), observation(effectiveDateTime="2020-02-30")], r"Observation\.effectiveDateTime"),
        ([person(), observation(effectiveDateTime="0001-01-01T00:00:00+01:00")], r"Observation\.effectiveDateTime"),
        ([person(), observation(effectiveDateTime=None)], "effectiveDateTime"),
        ([person(), observation(valueQuantity=QUANTITY | {"value": SENTINEL})], r"Quantity\.value"),
        ([person(), observation(valueQuantity=QUANTITY | {"value": True})], r"Quantity\.value"),
        ([person(), observation(valueQuantity=QUANTITY | {"value": 10**400})], r"Quantity\.value"),
        ([person(), observation(valueQuantity=QUANTITY | {"comparator": "~"})], r"Quantity\.comparator"),
        ([person(), observation(component=[SENTINEL])], "component"),
        (
            [person(), observation(resourceType="DiagnosticReport", presentedForm=[{"contentType": "text/plain", "data": SENTINEL}])],
            "Attachment",
        ),
    ],
)
def test_what_cannot_be_understood_is_refused_by_field_and_without_its_content(resources: list[Json], field: str) -> None:
    with pytest.raises(RecordError, match=field) as caught:
        updates(*resources)
    assert SENTINEL not in str(caught.value)


@pytest.mark.requirement("X8")
@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "not JSON"),
        (b"\xff", "not UTF-8"),
        (b"[]", "not a Bundle"),
        (b'{"resourceType": "Patient"}', "not a Bundle"),
        (b'{"resourceType": "Bundle", "type": "history"}', "type"),
        (b'{"resourceType": "Bundle", "type": "batch", "entry": {}}', "entry"),
        (b'{"a":' * 200_000, "nested"),
        (b"[" * 200_000, "nested"),
        (b'{"a": NaN}', "not JSON"),
        (b'{"a": ' + b"9" * 9999 + b"}", "not JSON"),
        (b" " * 2000, "limit"),
    ],
)
def test_hostile_json_is_refused_and_not_followed(raw: bytes, reason: str) -> None:
    with pytest.raises(RecordError, match=reason):
        parse(raw, zone=CET, issuers={}, max_bytes=1000 if reason == "limit" else 2**21)


def test_a_number_that_is_no_number_is_refused() -> None:
    raw = bundle(person(), observation()).replace(b"3.2", b"1e999")
    with pytest.raises(RecordError, match="finite"):
        parse(raw, zone=CET, issuers={})


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["coding", "code", "value", "system", "reference", "attachment"]), inner, max_size=2)
    ),
)


@settings(max_examples=40)
@given(field=st.sampled_from(sorted(observation())), value=JSON)
def test_no_content_of_a_field_gives_anything_but_updates_or_a_refusal(field: str, value: object) -> None:
    try:
        updates(person(), observation(**{field: value}))
        updates(person(), observation(resourceType="DiagnosticReport", presentedForm=value))
        updates(person(identifier=value))
    except RecordError:
        return


# --- when it was said, and under what name


@pytest.mark.requirement("F6")
@pytest.mark.parametrize(
    ("changes", "said_at"),
    [
        ({"meta": {"lastUpdated": "2020-05-08T00:00:00Z"}, "issued": "2020-05-07T00:00:00Z"}, "2020-05-08T00:00:00+00:00"),
        ({"issued": "2020-05-07T00:00:00Z"}, "2020-05-07T00:00:00+00:00"),
        ({"meta": {"versionId": "2"}}, None),
    ],
    ids=["changed", "issued", "neither"],
)
def test_a_fact_was_said_when_its_own_resource_was_changed(changes: Json, said_at: str | None) -> None:
    """The patient's own resource changes with an address: an old result in a new bundle must not stand before its later version."""
    (update,) = updates(person(meta={"lastUpdated": "2024-01-01T00:00:00Z"}), observation(**changes))
    (fact,) = update.observations
    assert update.at is not None
    assert update.at.year == 2024
    assert (fact.said_at.isoformat() if fact.said_at else None) == said_at


@pytest.mark.requirement("F6")
def test_no_id_is_the_beginning_of_another() -> None:
    """A withdrawal takes back all whose key begins with its own and a slash."""
    one, other = (fact.key for fact in facts(observation(id="77"), observation(id="77/2")))
    assert not other.startswith(f"{one}/")
    (percent,) = facts(observation(id="77%2F2"))
    assert percent.key != other


@pytest.mark.parametrize(
    ("resources", "field"),
    [
        ([person(identifier=[{"system": "s", "value": SENTINEL * 7}])], "Patient.identifier.value has 70 characters; the limit is 64"),
        ([person(), observation(code={"coding": [{"code": SENTINEL * 7}]})], "Observation.code has 70 characters"),
        ([person(), observation(id=SENTINEL * 50)], "Observation.id .* has 517 characters"),
        ([person(identifier=[{"system": SENTINEL * 60, "value": "1"}])], "system or assigner of Patient.identifier has 600"),
    ],
    ids=["patient", "code", "key", "issuer"],
)
def test_what_no_index_can_hold_is_refused_by_its_field(resources: list[Json], field: str) -> None:
    """The database would refuse it for ever, and say so with its content."""
    with pytest.raises(RecordError, match=field) as caught:
        updates(*resources)
    assert SENTINEL not in str(caught.value)
    assert updates(person(identifier=[{"system": "s", "value": "x" * 64}]))
