"""What a prediction may be made from: never a value of after the horizon, never a stale one for a newer one."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import spec as bundle_spec
from models.bundle import Bundle
from models.spec import ImageSpec, RecordRule, TextSpec, ValueSpec
from worker.domain import Code, Instance, Observation, Patient, PatientKey, PatientRecord, Series, Study, UsedValue
from worker.errors import NoSuitableSeries
from worker.inputs import Spec, select_inputs
from worker.joining import lacking
from worker.selection import suitable_series
from worker.units import factor

STUDY_AT = datetime(2026, 3, 4, 12, tzinfo=UTC)
CRP, CRP_OTHER, NOTE = Code("1988-5", "LN", "CRP"), Code("CRP", "L", "CRP, local"), Code("34109-9", "LN", "Note")
AGE, SEX = Code("30525-0", "LN", "Age"), Code("46098-0", "LN", "Sex")
PATIENT = Patient(PatientKey("TEST", "T-1"))


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    """The tables are read at the first question: 0.4 s, longer than Hypothesis gives one example."""
    factor("mg/dL", "g/L")


def wanted_code(code: Code) -> bundle_spec.Code:
    return bundle_spec.Code(code.value, code.scheme, code.meaning)


IMAGE = ImageSpec("image", "volume", ("CT",), (8, 8, 8), body_parts=("CHEST",), exclude_descriptions=("scout",), min_instances=2)
VALUE = ValueSpec("crp", wanted_code(CRP), "mg/L", (0.0, 1000.0), synonyms=(wanted_code(CRP_OTHER),), conversions={"mg/dL": 10.0})
TEXT = TextSpec("note", wanted_code(NOTE))
YEARS = ValueSpec("age", wanted_code(AGE), "a", (0.0, 120.0))
FEMALE = ValueSpec("sex", wanted_code(SEX), "1", (0.0, 1.0))
RECORD = RecordRule(wait_s=0, look_back_h=24, values=(VALUE,), texts=(TEXT,))


@dataclass(frozen=True)
class Asked:
    """A bundle, as far as inputs go."""

    images: tuple[ImageSpec, ...] = (IMAGE,)
    record: RecordRule = RECORD


SPEC: Spec = Asked()
#: Six hours after the study are allowed; histories reach two days back.
WIDE: Spec = Asked(record=replace(RECORD, horizon_h=6, history_h=48, histories=(VALUE,)))


def series(uid: str = "1.2.3", *, count: int = 5, **changes: Any) -> Series:
    instances = tuple(Instance(f"{uid}.{n}", "1.2", "1.2.1", Path("x"), "", 1) for n in range(count))
    return replace(Series(uid, "CT", "CHEST", "axial", instances), **changes)


def study(*found: Series, patient: Patient = PATIENT, at: datetime = STUDY_AT, description: str = "") -> Study:
    return Study("1.2", patient, "A1", at, description, 1, found or (series(),))


def record(*observations: Observation, patient: Patient = PATIENT, unusable: tuple[Observation, ...] = ()) -> PatientRecord:
    return PatientRecord(patient, STUDY_AT + timedelta(days=9), observations, unusable=unusable)


def crp(hours_before: float, value: float | None = 5.0, **changes: object) -> Observation:
    at = STUDY_AT - timedelta(hours=hours_before)
    return replace(Observation(code=CRP, at=at, value=value, unit="mg/L"), **changes)  # type: ignore[arg-type]


def chosen(found: Study, *images: ImageSpec) -> dict[str, str]:
    """The UIDs of the series by image name."""
    return {name: one.series_instance_uid for name, one in select_inputs(found, None, Asked(images=images)).series.items()}


def cause(*observations: Observation, spec: Spec = SPEC, unusable: tuple[Observation, ...] = ()) -> str:
    """Why there is no CRP."""
    inputs = select_inputs(study(), record(*observations, unusable=unusable), spec)
    assert not inputs.values
    assert not inputs.histories
    return dict(zip(inputs.missing, inputs.missing_causes, strict=True))[CRP]


def of_age(wanted: ValueSpec, birth_date: str, *, at: datetime = STUDY_AT) -> list[UsedValue]:
    asked = Asked(record=replace(RECORD, values=(wanted,), texts=()))
    return list(select_inputs(study(patient=replace(PATIENT, birth_date=birth_date), at=at), None, asked).values)


observations = st.builds(
    Observation,
    code=st.sampled_from([CRP, CRP_OTHER, NOTE, Code("1988-5", "L", "another scheme")]),
    at=st.integers(-60, 40).map(lambda hours: STUDY_AT + timedelta(hours=hours)),
    value=st.one_of(st.none(), st.floats(-10, 2000), st.just(float("nan"))),
    comparator=st.sampled_from(["", "<", ">="]),
    unit=st.sampled_from(["mg/L", "mg/dL", "g/L", ""]),
    text=st.sampled_from(["", " ", "one", "two"]),
    status=st.sampled_from(["F", "C", "P", "D", "W", "X"]),
    key=st.sampled_from(["", "a", "b"]),
    source=st.sampled_from(["m1", "m2"]),
)
specs = st.sampled_from([SPEC, WIDE])


@given(st.lists(observations, max_size=12))
def test_nothing_of_after_the_study_or_before_the_look_back_is_ever_used(drawn: list[Observation]) -> None:
    inputs = select_inputs(study(), record(*drawn), SPEC)
    for at in (*(used.at for used in inputs.values), *(used.at for used in inputs.texts)):
        assert STUDY_AT - timedelta(hours=24) <= at <= STUDY_AT


@given(st.lists(observations, max_size=12))
def test_nothing_of_after_the_horizon_is_ever_used_and_no_point_of_a_history_of_after_the_study(drawn: list[Observation]) -> None:
    inputs = select_inputs(study(), record(*drawn), WIDE)
    for at in (*(used.at for used in inputs.values), *(used.at for used in inputs.texts)):
        assert STUDY_AT - timedelta(hours=24) <= at <= STUDY_AT + timedelta(hours=6)
    for history in inputs.histories:
        assert all(STUDY_AT - timedelta(hours=48) <= point.at <= STUDY_AT for point in history.points)


@given(st.lists(observations, max_size=12).flatmap(lambda drawn: st.tuples(st.just(drawn), st.permutations(drawn))), specs)
def test_the_order_in_which_observations_arrived_does_not_matter(pair: tuple[list[Observation], list[Observation]], spec: Spec) -> None:
    assert select_inputs(study(), record(*pair[0]), spec) == select_inputs(study(), record(*pair[1]), spec)


@pytest.mark.requirement("F10")
@given(st.lists(observations, max_size=8), st.lists(observations, max_size=4), specs)
def test_what_is_dated_after_it_was_received_is_never_used_and_can_only_take_away(
    drawn: list[Observation], ahead: list[Observation], spec: Spec
) -> None:
    drawn = [replace(one, source="usable") for one in drawn]
    ahead = [replace(one, source="ahead") for one in ahead]
    inputs = select_inputs(study(), record(*drawn, unusable=tuple(ahead)), spec)
    without = select_inputs(study(), record(*drawn), spec)
    assert {*inputs.values} <= {*without.values}
    assert {*inputs.texts} <= {*without.texts}
    points = {point for history in inputs.histories for point in history.points}
    assert points <= {point for history in without.histories for point in history.points}


@given(st.lists(observations, max_size=12), specs)
def test_every_wanted_thing_is_either_used_or_missing_with_a_cause(drawn: list[Observation], spec: Spec) -> None:
    inputs = select_inputs(study(), record(*drawn), spec)
    used_codes = {u.code for u in inputs.values} | {u.code for u in inputs.texts} | {u.code for u in inputs.histories}
    assert used_codes | set(inputs.missing) == {CRP, NOTE}
    assert len(set(inputs.missing)) == len(inputs.missing) == len(inputs.missing_causes)
    assert all(inputs.missing_causes)
    points = [point for history in inputs.histories for point in history.points]
    assert all(0 <= used.value <= 1000 and used.unit == "mg/L" for used in (*inputs.values, *points))


@given(st.lists(observations, max_size=8), observations, specs)
def test_what_is_learned_after_the_horizon_changes_no_input(drawn: list[Observation], late: Observation, spec: Spec) -> None:
    late = replace(late, at=STUDY_AT + timedelta(hours=spec.record.horizon_h, minutes=1), key="")
    assert select_inputs(study(), record(*drawn, late), spec) == select_inputs(study(), record(*drawn), spec)


@given(st.lists(observations, max_size=12))
def test_each_point_of_a_history_is_what_would_be_the_latest_value_of_a_study_at_its_time(drawn: list[Observation]) -> None:
    """One rule for both: units, plausibility, corrections and which of two results of one minute counts."""
    inputs = select_inputs(study(), record(*drawn), WIDE)
    for point in (point for history in inputs.histories for point in history.points):
        (used,) = select_inputs(study(at=point.at), record(*drawn), SPEC).values
        assert replace(used, age_h=point.age_h) == point


def test_the_latest_of_several_draws_is_used() -> None:
    (used,) = select_inputs(study(), record(crp(9, 1.0), crp(2, 2.0), crp(5, 3.0), crp(-1, 4.0)), SPEC).values
    assert (used.value, used.at, used.age_h) == (2.0, STUDY_AT - timedelta(hours=2), 2.0)


def test_a_value_drawn_at_the_very_second_of_the_study_is_used_and_a_second_later_is_not() -> None:
    assert select_inputs(study(), record(crp(0)), SPEC).values
    assert not select_inputs(study(), record(crp(-1 / 3600)), SPEC).values


def test_a_horizon_lets_later_values_and_texts_in_and_their_age_is_negative() -> None:
    written = replace(crp(-5, None), code=NOTE, text="after")
    inputs = select_inputs(study(), record(crp(2, 1.0), crp(-6, 2.0), written), WIDE)
    assert [(used.value, used.age_h) for used in inputs.values] == [(2.0, -6.0)]
    assert [used.text for used in inputs.texts] == ["after"]


def test_a_synonym_counts_and_is_reported_under_the_bundles_own_code() -> None:
    (used,) = select_inputs(study(), record(crp(3, code=CRP_OTHER)), SPEC).values
    assert used.code == CRP


def test_a_foreign_unit_is_converted_and_a_comparator_kept() -> None:
    (used,) = select_inputs(study(), record(crp(3, 0.6, unit="mg/dL", comparator="<")), SPEC).values
    assert (used.value, used.unit, used.comparator) == (6.0, "mg/L", "<")


@pytest.mark.requirement("F10")
@pytest.mark.parametrize(
    ("newest", "why"),
    [
        (crp(1, unit="nmol/L"), "in nmol/L, which does not convert to mg/L"),
        (crp(1, unit="[IU]/L"), "in [IU]/L, which"),
        (crp(1, unit="mg/L{SENTINEL}"), "in mg/L{}, which"),
        (crp(1, unit=""), "in no unit"),
        (crp(1, unit="mcg/mL"), "in a unit that is not UCUM"),
        (crp(1, unit="SENTINEL^ANNA"), "in a unit that is not UCUM"),
        (crp(1, 5000.0), "not plausible (outside 0 to 1000 mg/L)"),
        (crp(1, 5.0, unit="kg/L"), "not plausible"),
        (crp(1, -5.0), "not plausible"),
        (crp(1, None), "not a number"),
        (crp(1, float("nan")), "not a number"),
        (crp(1, float("inf")), "not a number"),
        (crp(1, 5.0, kind="range", high=9.0), "a range, not a number"),
        (crp(1, 5.0, kind="ratio", high=9.0), "a ratio, not a number"),
        (crp(1, None, kind="coded", coded=Code("260385009", "SCT", "Negative"), text="Negative"), "a code, not a number"),
        (crp(1, None, kind="text", text="SENTINEL"), "a text, not a number"),
    ],
)
def test_an_older_value_never_stands_in_for_a_newer_one_that_cannot_be_used(newest: Observation, why: str) -> None:
    """The newer one may say the opposite; the report says why there is none, and repeats nothing that a sender wrote."""
    said = cause(crp(5, 7.0), newest)
    assert why in said
    assert "SENTINEL" not in said


@pytest.mark.requirement("F10")
def test_a_result_dated_after_it_was_received_is_not_used_nor_is_an_older_one_that_it_would_replace() -> None:
    ahead = "the latest result is dated after it was received"
    assert cause(unusable=(crp(1),)) == ahead
    assert cause(crp(5, 7.0), unusable=(crp(1),)) == ahead
    assert cause(unusable=(crp(-9000),)) == ahead
    assert cause(crp(60), unusable=(crp(-9000),)) == ahead
    note = replace(crp(1, None), code=NOTE, text="note")
    inputs = select_inputs(study(), record(replace(note, at=note.at - timedelta(hours=3)), unusable=(note,)), SPEC)
    assert (inputs.texts, inputs.missing_causes[1]) == ((), ahead)


@pytest.mark.requirement("F4")
def test_a_result_in_another_persons_name_is_told_as_such() -> None:
    of_another = replace(crp(5, 7.0), received_at=crp(5).at)
    assert cause(unusable=(of_another,)) == "the latest result came in another person's name"


@pytest.mark.requirement("F10")
def test_a_result_dated_past_the_horizon_leaves_the_known_one_in_its_place() -> None:
    (used,) = select_inputs(study(), record(crp(5, 7.0), unusable=(crp(-9000, 1.0), crp(9, 2.0))), SPEC).values
    assert used.value == 7.0


@pytest.mark.requirement("F10")
def test_a_correction_with_a_date_ahead_takes_its_result_away() -> None:
    assert "dated after" in cause(crp(5, 7.0, key="k"), unusable=(crp(-9000, 9.0, key="k", status="C"),))


@pytest.mark.requirement("F10")
def test_a_point_dated_after_it_was_received_is_no_point_of_a_history() -> None:
    asked = Asked(record=replace(RECORD, values=(), texts=(), histories=(VALUE,), history_h=48))
    (history,) = select_inputs(study(), record(crp(30, 1.0), crp(9, 2.0), unusable=(crp(9, 3.0, status="C"),)), asked).histories
    assert [point.value for point in history.points] == [1.0]
    assert cause(spec=asked, unusable=(crp(9),)) == "no result in time can be used: the latest result is dated after it was received"


@pytest.mark.requirement("F10")
@pytest.mark.parametrize(
    ("known", "why"),
    [
        ((), "nothing is known under its code"),
        ((crp(3, code=Code("CRP", "LN", "a code of another kind")),), "nothing is known under its code"),
        ((crp(60), crp(24.02)), "the latest is 24.1 h before the study, and the bundle looks back 24 h"),
        ((crp(60, status="P"), crp(70)), "the latest is 70 h before the study, and the bundle looks back 24 h"),
        ((crp(60), crp(3, status="P")), "all that is known in time is preliminary or withdrawn"),
        ((crp(3, key="k"), crp(3, key="k", status="W")), "all that is known in time is preliminary or withdrawn"),
        ((crp(60, status="X"),), "all that is known is preliminary or withdrawn"),
        ((crp(-3),), "nothing is known under its code"),
    ],
)
def test_the_cause_says_whether_a_result_is_unknown_stale_or_withdrawn(known: tuple[Observation, ...], why: str) -> None:
    """Nobody fills in for it: neither an old value nor a usual one."""
    assert cause(*known) == why


@pytest.mark.requirement("F10")
@pytest.mark.parametrize(
    ("unit", "told", "value"),
    [("g/L", 0.006, 6.0), ("ug/mL", 6.0, 6.0), ("mg/dl", 0.6, 6.0), ("ug/dL", 600.0, 6.0), ("kg/m3", 0.006, 6.0)],
)
def test_a_unit_of_the_same_kind_is_converted_though_the_bundle_does_not_name_it(unit: str, told: float, value: float) -> None:
    (used,) = select_inputs(study(), record(crp(3, told, unit=unit)), SPEC).values
    assert used.value == pytest.approx(value)
    assert used.unit == "mg/L"


@pytest.mark.requirement("F10")
def test_the_bundles_own_conversions_come_before_ucum_and_give_what_ucum_cannot_know() -> None:
    molar = replace(VALUE, conversions={"nmol/L": 0.12, "mg/dL": 11.0, "": 1.0})
    asked = Asked(record=replace(RECORD, values=(molar,)))
    for unit, value in (("nmol/L", 0.12), ("mg/dL", 11.0), ("", 1.0), ("g/L", 1000.0)):
        (used,) = select_inputs(study(), record(crp(3, 1.0, unit=unit)), asked).values
        assert used.value == value


@pytest.mark.parametrize("status", ["P", "D", "W", "X"])
def test_preliminary_and_withdrawn_results_are_not_used(status: str) -> None:
    (used,) = select_inputs(study(), record(crp(5, 7.0), crp(1, 1.0, status=status)), SPEC).values
    assert used.value == 7.0


def test_a_correction_replaces_its_result_and_a_withdrawal_removes_it() -> None:
    final, corrected, withdrawn = (crp(3, v, status=s, key="k") for v, s in ((1.0, "F"), (2.0, "C"), (3.0, "W")))
    assert select_inputs(study(), record(final, corrected), SPEC).values[0].value == 2.0
    assert not select_inputs(study(), record(final, withdrawn), SPEC).values
    assert select_inputs(study(), record(final, withdrawn, corrected), SPEC).values[0].value == 2.0


def test_a_history_holds_every_usable_point_oldest_first_in_the_wanted_unit() -> None:
    drawn = (crp(1, 4.0), crp(30, 1.0), crp(47, 0.6, unit="mg/dL", comparator="<"), crp(20, 2.0, code=CRP_OTHER))
    unusable = (crp(49, 9.0), crp(-1, 9.0), crp(5, 5000.0), crp(6, 9.0, unit="nmol/L"), crp(7, None), crp(8, 9.0, status="P"))
    (history,) = select_inputs(study(), record(*drawn, *unusable), WIDE).histories
    assert (history.name, history.code) == ("crp", CRP)
    assert [(point.age_h, point.value, point.comparator) for point in history.points] == [
        (47, 6, "<"),
        (30, 1, ""),
        (20, 2, ""),
        (1, 4, ""),
    ]
    assert {(point.unit, point.code) for point in history.points} == {("mg/L", CRP)}


def test_a_corrected_point_of_a_history_is_there_once_and_a_withdrawn_one_is_not() -> None:
    final, corrected = crp(3, 1.0, key="k"), crp(3, 2.0, key="k", status="C")
    gone = (crp(5, 9.0, key="g"), crp(5, 9.0, key="g", status="W"))
    (history,) = select_inputs(study(), record(final, *gone, corrected), WIDE).histories
    assert [point.value for point in history.points] == [2.0]


@pytest.mark.parametrize("is_reversed", [False, True])
def test_of_two_results_of_one_minute_a_history_takes_the_one_the_latest_value_would_be(is_reversed: bool) -> None:
    drawn = [crp(3, 1.0), crp(3, 2.0, code=CRP_OTHER), crp(3, 3.0, status="C"), crp(9, 4.0), crp(9, 9.0, unit="nmol/L", status="C")]
    inputs = select_inputs(study(), record(*(reversed(drawn) if is_reversed else drawn)), WIDE)
    assert [point.value for history in inputs.histories for point in history.points] == [3.0] == [used.value for used in inputs.values]


def test_a_history_without_a_point_is_missing_and_named_once() -> None:
    inputs = select_inputs(study(), record(), WIDE)
    assert (inputs.histories, inputs.missing) == ((), (CRP, NOTE))
    only = Asked(record=replace(RECORD, values=(), texts=(), histories=(VALUE,), history_h=48))
    assert select_inputs(study(), record(crp(60)), only).missing_causes == (
        "the latest is 60 h before the study, and the bundle looks back 48 h",
    )


def test_the_latest_text_with_words_in_it_is_used() -> None:
    notes = [replace(crp(h, None), code=NOTE, text=t) for h, t in ((8, "old"), (4, "new"), (1, "  "))]
    (used,) = select_inputs(study(), record(*notes), SPEC).texts
    assert used.text == "new"


@pytest.mark.parametrize("kind", ["variants", "expression"])
def test_genomic_texts_are_chosen_like_notes(kind: Literal["variants", "expression"]) -> None:
    wanted = replace(TEXT, kind=kind, genes=("TP53",) if kind == "expression" else ())
    notes = [replace(crp(h, None), code=NOTE, text=t) for h, t in ((8, "TP53=1"), (4, "TP53=2"))]
    (used,) = select_inputs(study(), record(*notes), Asked(record=replace(RECORD, texts=(wanted,)))).texts
    assert used.text == "TP53=2"


def test_descriptions_of_the_images_are_texts_with_or_without_a_record() -> None:
    texts = (replace(TEXT, name="order", attribute="StudyDescription"), replace(TEXT, name="made", attribute="SeriesDescription"))
    asked = Asked(record=replace(RECORD, texts=texts))
    found = study(series("1.9", count=9, description="thin"), series("1.1", description="thick"), description="Thorax, cough")
    for known in (None, record(replace(crp(3, None), code=NOTE, text="of the record"))):
        used = select_inputs(found, known, asked).texts
        assert [(one.name, one.text, one.at) for one in used] == [("order", "Thorax, cough", STUDY_AT), ("made", "thin", STUDY_AT)]
    inputs = select_inputs(study(series(description=" ")), None, asked)
    assert inputs.missing_causes == ("no patient record", "the images have no StudyDescription", "the images have no SeriesDescription")


def test_a_study_without_a_record_has_every_wanted_value_missing() -> None:
    inputs = select_inputs(study(), None, WIDE)
    assert not inputs.record_found
    assert inputs.missing == (CRP, NOTE)
    assert inputs.missing_causes == ("no patient record", "no patient record")


# --- what a study waits for ----------------------------------------------------------------------


def test_what_is_required_or_wanted_and_not_there_is_named_and_what_is_optional_is_not() -> None:
    values = (replace(VALUE, need="required"), replace(YEARS, need="wanted"), replace(FEMALE, need="optional"))
    rule = replace(RECORD, values=values, texts=(replace(TEXT, need="wanted"),))
    inputs = select_inputs(study(), record(), Asked(record=rule))
    assert lacking(inputs, rule) == ((CRP,), (AGE, NOTE))
    there = select_inputs(study(), record(crp(3), replace(crp(3, None), code=NOTE, text="note")), Asked(record=rule))
    assert lacking(there, rule) == ((), (AGE,))
    assert lacking(select_inputs(study(), None, SPEC), RECORD) == ((), ())


def test_a_result_that_cannot_be_used_is_lacking() -> None:
    rule = replace(RECORD, values=(replace(VALUE, need="required"),))
    assert lacking(select_inputs(study(), record(crp(3, 9000.0)), Asked(record=rule)), rule) == ((CRP,), ())


def test_a_value_and_a_history_of_one_code_are_asked_for_apart_and_named_once() -> None:
    def of(value: bundle_spec.Need, history: bundle_spec.Need, *known: Observation) -> tuple[tuple[Code, ...], tuple[Code, ...]]:
        rule = replace(WIDE.record, values=(replace(VALUE, need=value),), histories=(replace(VALUE, need=history),), texts=())
        return lacking(select_inputs(study(), record(*known), Asked(record=rule)), rule)

    after_the_study, before_the_look_back = crp(-3), crp(30)
    assert of("required", "wanted") == ((CRP,), ())
    assert of("wanted", "wanted") == ((), (CRP,))
    assert of("required", "wanted", after_the_study) == ((), (CRP,))
    assert of("required", "optional", after_the_study) == ((), ())
    assert of("required", "wanted", before_the_look_back) == ((CRP,), ())
    assert of("optional", "required", before_the_look_back) == ((), ())


@given(st.lists(observations, max_size=8), st.sampled_from(["optional", "wanted", "required"]))
def test_only_what_is_missing_is_ever_lacking(drawn: list[Observation], need: bundle_spec.Need) -> None:
    rule = replace(WIDE.record, values=(replace(VALUE, need=need),), texts=(replace(TEXT, need="required"),))
    inputs = select_inputs(study(), record(*drawn), Asked(record=rule))
    required, wanted = lacking(inputs, rule)
    assert {*required, *wanted} <= {*inputs.missing}
    assert not {*required} & {*wanted}


# --- demographics --------------------------------------------------------------------------------


@given(st.dates(date(1920, 1, 1), date(2026, 3, 4)))
def test_an_age_is_the_years_between_birth_and_study(born: date) -> None:
    (used,) = of_age(YEARS, f"{born:%Y%m%d}")
    birthdays = 2026 - born.year - ((born.month, born.day) > (3, 4))
    assert birthdays - 0.01 <= used.value <= birthdays + 1
    assert (used.name, used.code, used.unit, used.at, used.source, used.age_h) == ("age", AGE, "a", STUDY_AT, "demographics", 0)


@pytest.mark.parametrize(("birth_date", "years"), [("19560304", 70.0), ("20250304", 1.0), ("20251203", 0.25), ("20260304", 0.0)])
def test_ages_known_by_heart(birth_date: str, years: float) -> None:
    (used,) = of_age(YEARS, birth_date)
    assert used.value == years


def test_an_age_in_months_is_converted_like_any_value() -> None:
    for conversions in ({"a": 12.0}, {}):
        (used,) = of_age(replace(YEARS, unit="mo", conversions=conversions, plausible=(0, 1500)), "20250304")
        assert (used.value, used.unit) == (12.0, "mo")


def test_a_child_born_on_the_studys_local_day_is_not_refused_where_that_is_tomorrow_in_utc() -> None:
    assert [used.value for used in of_age(YEARS, "20260305", at=datetime(2026, 3, 4, 22, tzinfo=UTC))] == [0.0]


@pytest.mark.parametrize("birth_date", ["", "20260306", "18500101", "20261301", "1970", "1970-01-01", "unknown"])
def test_an_unknown_or_implausible_birth_date_is_no_age(birth_date: str) -> None:
    assert of_age(YEARS, birth_date) == []


def test_an_age_that_the_bundle_does_not_believe_is_missing() -> None:
    assert of_age(replace(YEARS, plausible=(18, 60)), "19560304") == []


@pytest.mark.parametrize(("sex", "values"), [("F", [1.0]), ("M", [0.0]), ("O", []), ("", [])])
def test_sex_is_a_value_and_anything_but_female_and_male_is_missing(sex: str, values: list[float]) -> None:
    asked = Asked(record=replace(RECORD, values=(FEMALE,), texts=()))
    inputs = select_inputs(study(patient=replace(PATIENT, sex=sex)), None, asked)
    assert [used.value for used in inputs.values] == values
    assert inputs.missing == (() if values else (SEX,))
    assert all("record" not in cause for cause in inputs.missing_causes)


def test_the_images_demographics_come_before_the_records_and_both_before_observations() -> None:
    asked = Asked(record=replace(RECORD, values=(YEARS, FEMALE), texts=()))
    ours = replace(PATIENT, birth_date="19560304", sex="F")
    theirs = replace(PATIENT, birth_date="19860304", sex="M")
    observed = (crp(1, 20.0, code=AGE, unit="a"), crp(1, 0.5, code=SEX, unit="1"))

    def values(images: Patient, of_record: Patient) -> list[float]:
        return [used.value for used in select_inputs(study(patient=images), record(*observed, patient=of_record), asked).values]

    assert values(ours, theirs) == [70.0, 1.0]
    assert values(PATIENT, theirs) == [40.0, 0.0]
    assert values(PATIENT, PATIENT) == [20.0, 0.5]


# --- images --------------------------------------------------------------------------------------


def test_of_the_fitting_series_the_largest_is_taken_then_the_smaller_uid() -> None:
    found = study(series("1.9", count=3), series("1.5", count=8), series("1.4", count=8), series("1.1", count=9, modality="SR"))
    assert [s.series_instance_uid for s in suitable_series(found, IMAGE)] == ["1.4", "1.5", "1.9"]
    assert chosen(found, IMAGE) == {"image": "1.4"}


def test_a_series_that_does_not_say_its_body_part_is_not_refused_for_it() -> None:
    assert select_inputs(study(series(body_part="")), None, SPEC).series["image"].body_part == ""


def test_a_study_of_nothing_suitable_is_refused_with_the_reasons_and_no_words_of_its_descriptions() -> None:
    found = study(
        series("1.1", modality="MR"),
        series("1.2", body_part="HEAD"),
        series("1.3", description="Scout of Mrs Sentinel"),
        series("1.4", count=1),
    )
    with pytest.raises(NoSuitableSeries) as caught:
        select_inputs(found, None, SPEC)
    for reason in ("modality MR is not CT", "body part is not CHEST", "excluded word 'scout'", "1 images are fewer than 2"):
        assert reason in str(caught.value)
    assert str(caught.value).startswith("1 suitable series needed, 0 of 4 fit: ")
    assert "Sentinel" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "fitting", "misfit", "reason"),
    [
        (
            {"descriptions": ("lung", "THORAX")},
            {"description": "Thorax 1.0"},
            {"description": "Mrs Sentinel"},
            "not hold 'lung' or 'THORAX'",
        ),
        ({"descriptions": ("lung",)}, {"description": "LUNGS"}, {"description": ""}, "not hold 'lung'"),
        ({"orientation": "axial"}, {"orientation": "axial"}, {"orientation": "coronal"}, "orientation coronal is not axial"),
        ({"orientation": "axial"}, {"orientation": ""}, {"orientation": "sagittal"}, "orientation sagittal is not axial"),
        ({"slice_mm": (0.5, 2.0)}, {"slice_mm": 2.0}, {"slice_mm": 5.0}, "slices of 5 mm are not within 0.5 to 2 mm"),
        ({"slice_mm": (0.5, 2.0)}, {"slice_mm": 0.0}, {"slice_mm": 0.3}, "slices of 0.3 mm are not within 0.5 to 2 mm"),
    ],
)
def test_each_rule_on_series_takes_what_fits_and_what_says_nothing_and_gives_its_reason(
    changes: dict[str, Any], fitting: dict[str, Any], misfit: dict[str, Any], reason: str
) -> None:
    rule = replace(IMAGE, **changes)
    assert chosen(study(series("1.1", count=9, **misfit), series("1.2", **fitting)), rule) == {"image": "1.2"}
    with pytest.raises(NoSuitableSeries) as caught:
        chosen(study(series(**misfit)), rule)
    assert reason in str(caught.value)
    assert "Sentinel" not in str(caught.value)


THIN = replace(IMAGE, name="thin", slice_mm=(0.0, 2.0))
THICK = replace(IMAGE, name="thick", slice_mm=(3.0, 9.0), required=False)


def test_each_image_gets_its_own_series_in_the_bundles_order() -> None:
    found = study(series("1.1", slice_mm=5.0), series("1.2", slice_mm=1.0), series("1.3", slice_mm=1.0, count=9))
    assert list(chosen(found, THICK, THIN).items()) == [("thick", "1.1"), ("thin", "1.3")]


def test_a_series_serves_one_image_only() -> None:
    other = replace(THIN, name="other")
    found = study(series("1.1", count=9), series("1.2"))
    assert chosen(found, THIN, other) == {"thin": "1.1", "other": "1.2"}
    with pytest.raises(NoSuitableSeries, match=r"Image 'other': 1 suitable series needed, 1 of 1 fit: the series that fits serves another"):
        chosen(study(series()), THIN, other)


def test_an_optional_image_without_a_series_is_left_out_and_named() -> None:
    inputs = select_inputs(study(series(slice_mm=1.0)), None, Asked(images=(THICK, THIN)))
    assert (list(inputs.series), inputs.missing_images) == (["thin"], ("thick",))


def test_a_required_image_without_a_series_is_named_where_there_are_several() -> None:
    with pytest.raises(NoSuitableSeries, match=r"^Image 'thin': 1 suitable series needed, 0 of 1 fit: slices of 5 mm"):
        chosen(study(series(slice_mm=5.0)), THICK, THIN)


def test_a_study_without_any_image_is_refused_even_if_none_is_required() -> None:
    with pytest.raises(NoSuitableSeries, match=r"Image 'thick': .* Image 'thin': "):
        chosen(study(series(modality="MR")), THICK, replace(THIN, required=False))


FRONTAL = replace(IMAGE, name="frontal", kind="radiograph", views=("AP", "PA"), size=(8, 8), min_instances=1)
LATERAL = replace(FRONTAL, name="lateral", views=("LL",), required=False)


def films(uid: str, *views: str) -> Series:
    return series(uid, instances=tuple(Instance(f"{uid}.{n}", "1.2", "1.2.1", Path("x"), "", 1, view) for n, view in enumerate(views)))


def test_a_film_of_another_view_is_not_taken_though_its_series_has_more() -> None:
    found = study(films("1.1", "LL", "LL"), films("1.2", "PA"))
    assert chosen(found, FRONTAL, LATERAL) == {"frontal": "1.2", "lateral": "1.1"}
    with pytest.raises(NoSuitableSeries, match="no image is of view AP or PA"):
        chosen(study(films("1.1", "LL")), FRONTAL)


def test_a_film_that_does_not_say_its_view_may_be_of_any_but_serves_one_image_only() -> None:
    assert chosen(study(films("1.1", "")), FRONTAL, LATERAL) == {"frontal": "1.1"}
    # Of these two the reader might take the first for both.
    assert chosen(study(films("1.1", "", "LL")), FRONTAL, LATERAL) == {"frontal": "1.1"}


def test_images_of_disjoint_views_share_a_series_and_others_do_not() -> None:
    assert chosen(study(films("1.1", "PA", "LL")), FRONTAL, LATERAL) == {"frontal": "1.1", "lateral": "1.1"}
    assert chosen(study(films("1.1", "PA", "AP")), FRONTAL, replace(LATERAL, views=("AP",))) == {"frontal": "1.1"}
    assert chosen(study(films("1.1", "PA", "LL")), FRONTAL, replace(LATERAL, views=())) == {"frontal": "1.1"}


def test_any_modality_is_every_one_with_images() -> None:
    anything = replace(IMAGE, modalities=())
    assert chosen(study(series("1.1", modality="SR", count=9), series("1.2", modality="MR")), anything) == {"image": "1.2"}
    with pytest.raises(NoSuitableSeries, match="modality SR is not of images"):
        chosen(study(series(modality="SR")), anything)


kinds = st.builds(
    series,
    st.sampled_from([f"1.{n}" for n in range(6)]),
    count=st.integers(1, 4),
    slice_mm=st.sampled_from([0.0, 1.0, 5.0]),
    description=st.sampled_from(["", "lung", "scout"]),
)


@given(
    st.lists(kinds, max_size=6, unique_by=lambda one: one.series_instance_uid).flatmap(lambda s: st.tuples(st.just(s), st.permutations(s)))
)
def test_images_never_share_a_series_fit_their_rules_and_do_not_depend_on_the_order_of_arrival(
    pair: tuple[list[Series], list[Series]],
) -> None:
    images = (replace(THIN, required=False), THICK, replace(IMAGE, name="any", required=False))
    found = [replace(study(), series=tuple(one)) for one in pair]
    try:
        inputs = select_inputs(found[0], None, Asked(images=images))
    except NoSuitableSeries:
        assert not any(suitable_series(found[0], image) for image in images)
        return
    assert inputs == select_inputs(found[1], None, Asked(images=images))
    uids = [one.series_instance_uid for one in inputs.series.values()]
    assert len(set(uids)) == len(uids)
    assert [*inputs.series, *inputs.missing_images] == sorted([image.name for image in images], key=lambda name: name not in inputs.series)
    for image in images:
        fitting = suitable_series(found[0], image)
        assert (
            inputs.series[image.name] in fitting if image.name in inputs.series else {s.series_instance_uid for s in fitting} <= set(uids)
        )


def test_a_bundle_is_a_spec_as_it_stands() -> None:
    bundle = Bundle.read(Path(__file__).parents[2] / "models" / "bundles" / "phantom", verify=False)
    inputs = select_inputs(study(series(count=20)), record(crp(3, 12.0)), bundle)
    assert [used.name for used in inputs.values] == ["crp"]
    assert len(inputs.missing) == 4


def test_choosing_inputs_needs_no_torch() -> None:
    code = "import sys, worker.inputs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
