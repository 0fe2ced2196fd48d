"""What a prediction may be made from: never a value of after the study, never a stale one for a newer one."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.bundle import Bundle
from worker.domain import Code, Instance, Observation, Patient, PatientKey, PatientRecord, Series, Study
from worker.errors import NoSuitableSeries
from worker.inputs import Spec, select_inputs, suitable_series

STUDY_AT = datetime(2026, 3, 4, 12, tzinfo=UTC)
CRP, CRP_OTHER, NOTE = Code("1988-5", "LN", "CRP"), Code("CRP", "L", "CRP, local"), Code("34109-9", "LN", "Note")
PATIENT = Patient(PatientKey("TEST", "T-1"))


@dataclass(frozen=True)
class Wanted:
    """A value or text a bundle may ask for."""

    name: str
    code: Code
    synonyms: tuple[Code, ...] = ()
    unit: str = "mg/L"
    conversions: dict[str, float] = field(default_factory=lambda: {"mg/dL": 10.0})
    plausible: tuple[float, float] = (0.0, 1000.0)


@dataclass(frozen=True)
class Rule:
    """Which series will do."""

    kind: Literal["volume", "radiograph"] = "volume"
    modalities: tuple[str, ...] = ("CT",)
    body_parts: tuple[str, ...] = ("CHEST",)
    exclude_descriptions: tuple[str, ...] = ("scout",)
    views: tuple[str, ...] = ()
    min_instances: int = 2
    required: int = 1


@dataclass(frozen=True)
class Record:
    """What is wanted of the record."""

    look_back_h: float = 24
    values: tuple[Wanted, ...] = (Wanted("crp", CRP, (CRP_OTHER,)),)
    texts: tuple[Wanted, ...] = (Wanted("note", NOTE),)


@dataclass(frozen=True)
class Asked:
    """A bundle, as far as inputs go."""

    series: Rule = Rule()
    record: Record = Record()


SPEC: Spec = Asked()


def series(uid: str = "1.2.3", *, count: int = 5, **changes: str) -> Series:
    instances = tuple(Instance(f"{uid}.{n}", "1.2", "1.2.1", Path("x"), "", 1) for n in range(count))
    return replace(Series(uid, "CT", "CHEST", "axial", instances), **changes)  # type: ignore[arg-type]


def study(*found: Series) -> Study:
    return Study("1.2", PATIENT, "A1", STUDY_AT, "", 1, found or (series(),))


def record(*observations: Observation) -> PatientRecord:
    return PatientRecord(PATIENT, STUDY_AT + timedelta(days=9), observations)


def crp(hours_before: float, value: float | None = 5.0, **changes: object) -> Observation:
    at = STUDY_AT - timedelta(hours=hours_before)
    return replace(Observation(code=CRP, at=at, value=value, unit="mg/L"), **changes)  # type: ignore[arg-type]


observations = st.builds(
    Observation,
    code=st.sampled_from([CRP, CRP_OTHER, NOTE, Code("1988-5", "L", "another scheme")]),
    at=st.integers(-40, 40).map(lambda hours: STUDY_AT + timedelta(hours=hours)),
    value=st.one_of(st.none(), st.floats(-10, 2000), st.just(float("nan"))),
    comparator=st.sampled_from(["", "<", ">="]),
    unit=st.sampled_from(["mg/L", "mg/dL", "g/L", ""]),
    text=st.sampled_from(["", " ", "one", "two"]),
    status=st.sampled_from(["F", "C", "P", "D", "W", "X"]),
    key=st.sampled_from(["", "a", "b"]),
    source=st.sampled_from(["m1", "m2"]),
)


@given(st.lists(observations, max_size=12))
def test_nothing_of_after_the_study_or_before_the_look_back_is_ever_used(drawn: list[Observation]) -> None:
    inputs = select_inputs(study(), record(*drawn), SPEC)
    for at in (*(used.at for used in inputs.values), *(used.at for used in inputs.texts)):
        assert STUDY_AT - timedelta(hours=24) <= at <= STUDY_AT


@given(st.lists(observations, max_size=12).flatmap(lambda drawn: st.tuples(st.just(drawn), st.permutations(drawn))))
def test_the_order_in_which_observations_arrived_does_not_matter(pair: tuple[list[Observation], list[Observation]]) -> None:
    assert select_inputs(study(), record(*pair[0]), SPEC) == select_inputs(study(), record(*pair[1]), SPEC)


@given(st.lists(observations, max_size=12))
def test_every_wanted_thing_is_either_used_or_missing_with_a_cause(drawn: list[Observation]) -> None:
    inputs = select_inputs(study(), record(*drawn), SPEC)
    used_codes = [*(used.code for used in inputs.values), *(used.code for used in inputs.texts)]
    assert sorted(code.value for code in (*used_codes, *inputs.missing)) == ["1988-5", "34109-9"]
    assert len(inputs.missing_causes) == len(inputs.missing)
    assert all(inputs.missing_causes)
    assert all(0 <= used.value <= 1000 and used.unit == "mg/L" for used in inputs.values)


@given(st.lists(observations, max_size=8), observations)
def test_what_is_learned_after_the_study_changes_no_input(drawn: list[Observation], late: Observation) -> None:
    late = replace(late, at=STUDY_AT + timedelta(minutes=1), key="")
    assert select_inputs(study(), record(*drawn, late), SPEC) == select_inputs(study(), record(*drawn), SPEC)


def test_the_latest_of_several_draws_is_used() -> None:
    (used,) = select_inputs(study(), record(crp(9, 1.0), crp(2, 2.0), crp(5, 3.0), crp(-1, 4.0)), SPEC).values
    assert (used.value, used.at) == (2.0, STUDY_AT - timedelta(hours=2))


def test_a_value_drawn_at_the_very_second_of_the_study_is_used_and_a_second_later_is_not() -> None:
    assert select_inputs(study(), record(crp(0)), SPEC).values
    assert not select_inputs(study(), record(crp(-1 / 3600)), SPEC).values


def test_a_synonym_counts_and_is_reported_under_the_bundles_own_code() -> None:
    (used,) = select_inputs(study(), record(crp(3, code=CRP_OTHER)), SPEC).values
    assert used.code == CRP


def test_a_foreign_unit_is_converted_and_a_comparator_kept() -> None:
    (used,) = select_inputs(study(), record(crp(3, 0.6, unit="mg/dL", comparator="<")), SPEC).values
    assert (used.value, used.unit, used.comparator) == (6.0, "mg/L", "<")


@pytest.mark.parametrize(
    ("newest", "cause"),
    [
        (crp(1, unit="nmol/L"), "in nmol/L, which does not convert to mg/L"),
        (crp(1, unit=""), "in no unit"),
        (crp(1, 5000.0), "not plausible"),
        (crp(1, None), "not a number"),
    ],
)
def test_an_older_value_never_stands_in_for_a_newer_one_that_cannot_be_used(newest: Observation, cause: str) -> None:
    """The newer one may say the opposite; the report says why there is none."""
    inputs = select_inputs(study(), record(crp(5, 7.0), newest), SPEC)
    assert not inputs.values
    assert cause in inputs.missing_causes[0]


@pytest.mark.parametrize("status", ["P", "D", "W", "X"])
def test_preliminary_and_withdrawn_results_are_not_used(status: str) -> None:
    (used,) = select_inputs(study(), record(crp(5, 7.0), crp(1, 1.0, status=status)), SPEC).values
    assert used.value == 7.0


def test_a_correction_replaces_its_result_and_a_withdrawal_removes_it() -> None:
    final, corrected, withdrawn = (crp(3, v, status=s, key="k") for v, s in ((1.0, "F"), (2.0, "C"), (3.0, "W")))
    assert select_inputs(study(), record(final, corrected), SPEC).values[0].value == 2.0
    assert not select_inputs(study(), record(final, withdrawn), SPEC).values
    assert select_inputs(study(), record(final, withdrawn, corrected), SPEC).values[0].value == 2.0


def test_the_latest_text_with_words_in_it_is_used() -> None:
    notes = [replace(crp(h, None), code=NOTE, text=t) for h, t in ((8, "old"), (4, "new"), (1, "  "))]
    (used,) = select_inputs(study(), record(*notes), SPEC).texts
    assert used.text == "new"


def test_a_study_without_a_record_has_every_wanted_value_missing() -> None:
    inputs = select_inputs(study(), None, SPEC)
    assert not inputs.record_found
    assert inputs.missing == (CRP, NOTE)
    assert inputs.missing_causes == ("no patient record", "no patient record")


def test_of_the_fitting_series_the_largest_is_taken_then_the_smaller_uid() -> None:
    found = study(series("1.9", count=3), series("1.5", count=8), series("1.4", count=8), series("1.1", count=9, modality="SR"))
    assert [s.series_instance_uid for s in suitable_series(found, Rule())] == ["1.4", "1.5", "1.9"]
    assert select_inputs(found, None, SPEC).series.series_instance_uid == "1.4"


def test_a_series_that_does_not_say_its_body_part_is_not_refused_for_it() -> None:
    assert select_inputs(study(series(body_part="")), None, SPEC).series.body_part == ""


def test_a_study_of_nothing_suitable_is_refused_with_the_reasons_and_no_words_of_its_descriptions() -> None:
    found = study(
        series("1.1", modality="MR"),
        series("1.2", body_part="HEAD"),
        series("1.3", description="Scout of Mrs Sentinel"),
        series("1.4", count=1),
    )
    with pytest.raises(NoSuitableSeries) as caught:
        select_inputs(found, None, SPEC)
    for reason in ("modality MR is not CT", "body part is not CHEST", "excluded word 'scout'", "1 instances are fewer than 2"):
        assert reason in str(caught.value)
    assert "Sentinel" not in str(caught.value)


def test_a_bundle_is_a_spec_as_it_stands() -> None:
    bundle = Bundle.read(Path(__file__).parents[2] / "models" / "bundles" / "phantom", verify=False)
    chosen = select_inputs(study(series(count=20)), record(crp(3, 12.0)), bundle)
    assert [used.name for used in chosen.values] == ["crp"]
    assert len(chosen.missing) == 4


def test_choosing_inputs_needs_no_torch() -> None:
    code = "import sys, worker.inputs; sys.exit('torch' in sys.modules or 'models' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
