"""Before the network is asked: the patient, the pixels and the tensor are what the bundle is meant for, or a sentence says why not."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.image_spec import ImageSpec
from models.spec import PatientRule
from tests.factories import known_hu
from worker import checks
from worker.domain import ImageFacts, Instance, Patient, PatientKey, PatientRecord, Series, Study, Volume
from worker.errors import Implausible, PixelError

VOLUME = ImageSpec("image", "volume", ("CT",), (8, 8, 8), spacing_mm=(1, 1, 1), window_hu=(0, 1))
FILM = ImageSpec("image", "radiograph", ("DX",), (8, 8))
AT = datetime(2026, 3, 4, 12, tzinfo=UTC)
ADULTS = PatientRule(age_years=(18, 90))


def patient(birth_date: str = "", sex: str = "") -> Patient:
    return Patient(PatientKey("TEST", "T-1"), "", birth_date, sex)


def study(of: Patient) -> Study:
    return Study("1.2", of, "A1", AT, "", 1)


def volume(array: np.ndarray, *, modality: str = "CT", spacing_mm: tuple[float, float, float] = (1.0, 0.7, 0.7)) -> Volume:
    return Volume(array.astype(np.float32), np.eye(4), spacing_mm, modality, "1.2.3", ("1.2.3.1",))


def films(age_years: float | None) -> list[Series]:
    return [Series("1", "DX", "", "", (Instance("1.1", "1", "1", Path("x"), "", 1, facts=ImageFacts(age_years=age_years)),))]


@pytest.mark.requirement("P13")
@pytest.mark.parametrize(("birth_date", "age"), [("20080305", 17), ("20250101", 1), ("20260304", 0), ("19350304", 91), ("19350301", 91)])
def test_a_patient_of_another_age_than_the_bundle_is_meant_for_is_not_analysed_and_no_birth_date_is_said(birth_date: str, age: int) -> None:
    said = checks.patient(study(patient(birth_date)), None, (), ADULTS)
    assert said == f"The patient is {age} years old; the bundle is meant for 18 to 90 years."
    assert birth_date not in said


@pytest.mark.requirement("P13")
@pytest.mark.parametrize("birth_date", ["20080304", "19960229", "19350305"])
def test_one_who_is_eighteen_that_day_or_ninety_still_is_analysed(birth_date: str) -> None:
    assert checks.patient(study(patient(birth_date)), None, (), ADULTS) == ""


@pytest.mark.requirement("P13")
def test_the_age_is_the_studys_else_the_records_else_that_of_the_images() -> None:
    child, adult = patient("20200101"), patient("19500101")

    def record(of: Patient) -> PatientRecord:
        return PatientRecord(of, AT)

    assert checks.patient(study(adult), record(child), films(3.0), ADULTS) == ""
    assert checks.patient(study(patient()), record(adult), films(3.0), ADULTS) == ""
    assert "is 6 years old" in checks.patient(study(patient()), record(child), films(3.0), ADULTS)
    assert "is 3 years old" in checks.patient(study(patient()), None, films(3.0), ADULTS)


@pytest.mark.requirement("P13")
def test_an_unknown_age_or_sex_is_accepted_or_refused_by_the_bundles_word() -> None:
    def said(of: Patient, rule: PatientRule) -> str:
        return checks.patient(study(of), None, films(None), rule)

    assert said(patient(), replace(ADULTS, sexes=("F",))) == ""
    assert "age is not known" in said(patient("19000000"), replace(ADULTS, unknown="refuse"))
    only_women = PatientRule(sexes=("F",))
    assert "sex is not known, and the bundle is meant for female" in said(patient(), replace(only_women, unknown="refuse"))
    assert "sex is male, and the bundle is meant for female" in said(patient(sex="M"), only_women)
    assert said(patient(sex="F"), replace(only_women, unknown="refuse")) == ""


@pytest.mark.requirement("P17")
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_one_pixel_that_is_not_finite_stops_the_study_before_the_network(wrong: float) -> None:
    array = known_hu(4)
    array[2, 3, 4] = wrong
    with pytest.raises(PixelError, match=r"^1 pixels of the series are not finite numbers"):
        checks.image(volume(array), VOLUME)


@pytest.mark.requirement("P17")
def test_infinities_of_both_signs_and_values_whose_sum_overflows_are_told_apart() -> None:
    array = known_hu(4)
    array[0, 0, 0], array[1, 0, 0] = np.inf, -np.inf
    with pytest.raises(PixelError, match=r"^2 pixels"):
        checks.image(volume(array), VOLUME)
    large = np.full((2, 8, 8), np.finfo(np.float32).max)
    checks.image(volume(large, modality="MR"), VOLUME)


@pytest.mark.requirement("P17")
def test_a_tensor_that_is_not_finite_stops_the_study_whatever_made_it_so() -> None:
    tensor = np.zeros((1, 8, 8), np.float32)
    tensor[0, 1, 1] = np.nan
    with pytest.raises(PixelError, match="1 numbers of the network's input are not finite"):
        checks.tensor(tensor, FILM)


@pytest.mark.requirement("P6")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda hu: hu + 1024, "0.00% are air"),  # the intercept was left out
        (lambda hu: np.full_like(hu, -1000), "0.00% are tissue"),
        (lambda hu: np.where(hu > -200, hu * 100, hu), "% are tissue"),
    ],
)
def test_a_ct_without_air_or_without_tissue_is_no_hounsfield_units(change: Any, said: str) -> None:
    hu = known_hu(8, 64, 64)
    hu[hu > 300] = 40
    checks.image(volume(hu), VOLUME)
    changed = volume(change(np.where((hu > -200) & (abs(hu) < 5), 50, hu)))
    with pytest.raises(Implausible, match="not plausible Hounsfield units") as caught:
        checks.image(changed, VOLUME)
    assert said in str(caught.value)


@pytest.mark.requirement("P13")
def test_statistics_outside_what_the_bundle_says_are_refused_with_their_number() -> None:
    hu = known_hu(8, 64, 64)
    checks.image(volume(hu), replace(VOLUME, intensity={"p1": (-1100, -900), "sd": (10, 2000)}))
    with pytest.raises(Implausible, match=r"The pixels' first percentile is -1\d\d\d, and the bundle takes -500 to 0\."):
        checks.image(volume(hu), replace(VOLUME, intensity={"p1": (-500, 0)}))
    checks.image(volume(hu + 1024), replace(VOLUME, intensity={"p99": (0, 9000)}))  # the bundle's own word replaces ours
    with pytest.raises(Implausible, match=r"its mean is 0, and the bundle takes 0\.3 to 0\.7"):
        checks.tensor(np.zeros((1, 8, 8), np.float32), replace(FILM, tensor={"mean": (0.3, 0.7)}))


@pytest.mark.requirement("P7")
def test_spacing_is_judged_by_what_was_read_whatever_the_header_claimed() -> None:
    hu, rule = known_hu(8), replace(VOLUME, slice_mm=(0.5, 2.5), pixel_mm=(0.5, 1.0))
    checks.image(volume(hu, spacing_mm=(2.5, 0.7, 0.7)), rule)
    with pytest.raises(Implausible, match=r"The slices are 3 mm apart, and the bundle takes 0\.5 to 2\.5 mm"):
        checks.image(volume(hu, spacing_mm=(3.0, 0.7, 0.7)), rule)
    with pytest.raises(Implausible, match=r"The pixels are 1\.2 mm apart"):
        checks.image(volume(hu, spacing_mm=(1.0, 0.7, 1.2)), rule)


@pytest.mark.requirement("P9")
@pytest.mark.parametrize(
    ("plane", "along"),
    [
        ("axial", [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        ("coronal", [[1, 0, 0], [0, 0, -1], [0, 1, 0]]),
        ("sagittal", [[0, 1, 0], [0, 0, -1], [-1, 0, 0]]),
        ("", [[1, 0, 0], [0, 0.7071, 0.7071], [0, -0.7071, 0.7071]]),
    ],
)
def test_the_plane_is_judged_by_what_was_read_for_an_enhanced_object_does_not_say_it_at_the_top(
    plane: str, along: list[list[float]]
) -> None:
    """Columns of the affine: the directions of i, j and k; that of "" lies between the planes."""
    found = replace(volume(known_hu(8)), affine=np.block([[np.array(along).T * [0.7, 0.7, 3.0], np.zeros((3, 1))], [0, 0, 0, 1]]))
    for wanted in ("axial", "coronal", "sagittal"):
        rule = replace(VOLUME, orientation=wanted)
        if wanted == plane:
            checks.image(found, rule)
        else:
            with pytest.raises(Implausible, match=f"The slices are not {wanted}, and the bundle takes no others"):
                checks.image(found, rule)


def test_statistics_of_a_large_volume_are_those_of_a_sample_of_every_column() -> None:
    array = np.zeros((40, 256, 256), np.float32)
    array[:, :, ::2] = 1.0
    assert checks._sample(array).size >= checks.SAMPLED / 4
    checks._check_statistics(array, {"mean": (0.49, 0.51), "sd": (0.49, 0.51)}, "The")
