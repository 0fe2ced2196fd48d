"""The phantoms: the same every time, valid DICOM, honest HL7, and a truth that takes all three sources."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest

from worker.demo.phantom import FINDING, make_case, write_cohort


def test_one_seed_is_one_patient_byte_for_byte() -> None:
    first, second, other = make_case(7), make_case(7), make_case(8)
    assert first.hl7 == second.hl7
    assert [ds.to_json() for ds in first.datasets] == [ds.to_json() for ds in second.datasets]
    assert first.study_instance_uid != other.study_instance_uid
    assert {ds.SOPInstanceUID for ds in first.datasets}.isdisjoint({ds.SOPInstanceUID for ds in other.datasets})


def test_the_truth_is_what_two_of_three_facts_say_and_no_fact_is_the_truth() -> None:
    cases = [make_case(seed) for seed in range(40)]
    truth = np.array([c.truth[FINDING] for c in cases])
    facts = np.array([[c.factors[f] for f in ("nodule", "history", "marker")] for c in cases])
    assert (truth == (facts.sum(1) >= 2)).all()
    assert all((facts[:, i] != truth).sum() >= 3 for i in range(3))
    assert 10 <= truth.sum() <= 30


def test_a_value_after_the_study_and_an_older_one_say_the_opposite_of_the_one_to_use() -> None:
    for seed in range(12):
        case = make_case(seed, absent=frozenset())
        stamp = case.study_at.strftime("%Y%m%d%H%M%S")
        draws = []
        for message in case.hl7:
            fields = [line.split("|") for line in message.split("\r")]
            draws += [(f[14], f[11], float(f[5].lstrip("<^"))) for f in fields if f[0] == "OBX" and f[3].startswith("2039-6")]
        raised = bool(case.factors["marker"])
        before = sorted(d for d in draws if d[0] <= stamp and d[1] == "F")
        assert (before[-1][2] > 5) is raised
        assert (before[0][2] > 5) is not raised
        assert all((d[2] > 5) is not raised for d in draws if d[0] > stamp)


@pytest.mark.parametrize("absent", [frozenset(), frozenset({"marker"}), frozenset({"note"}), frozenset({"marker", "note"})])
def test_what_is_absent_is_in_no_message_and_the_images_do_not_change(absent: frozenset[str]) -> None:
    case = make_case(3, absent=absent)
    text = "".join(case.hl7)
    assert ("2039-6" in text) is ("marker" not in absent)
    assert ("|TX|" in text) is ("note" not in absent)
    assert case.absent == absent
    assert case.datasets[0].PixelData == make_case(3).datasets[0].PixelData


def test_a_large_nodule_fills_a_square_of_13_mm_in_the_lung_and_nothing_else_there_does() -> None:
    """Small nodules and vessels stay below it, so the image holds its fact, and a network can find it."""
    for seed in range(12):
        case = make_case(seed)
        hu = np.stack([ds.pixel_array for ds in case.datasets]).astype(int) - 1024
        lung = hu[9:23, 50:78, 30:50] > -300
        filled = np.lib.stride_tricks.sliding_window_view(lung, (5, 5), axis=(1, 2)).all(axis=(-2, -1))
        assert filled.any() == case.factors["nodule"], (seed, case.severities)


def test_dciodvfy_finds_no_error_in_a_slice(tmp_path: Path) -> None:
    if shutil.which("dciodvfy") is None:
        assert "CI" not in os.environ, "dicom3tools must be there in CI"
        pytest.skip("dicom3tools is not installed")
    ds = make_case(2).datasets[5]
    ds.save_as(tmp_path / "slice.dcm", enforce_file_format=True)
    done = subprocess.run(["dciodvfy", "-new", str(tmp_path / "slice.dcm")], capture_output=True, check=False)
    assert (done.returncode, b"Error" in done.stderr) == (0, False), done.stderr


def test_a_cohort_is_dicom_hl7_and_labels_of_the_same_patients(tmp_path: Path) -> None:
    write_cohort(tmp_path, 2, 50)
    with (tmp_path / "labels.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["patient_id"] for row in rows] == ["PH000050", "PH000051"]
    assert [int(row[FINDING]) for row in rows] == [make_case(seed).truth[FINDING] for seed in (50, 51)]
    for row in rows:
        slices = sorted((tmp_path / "dicom" / row["patient_id"]).glob("*.dcm"))
        datasets = [pydicom.dcmread(path) for path in slices]
        assert len(datasets) == 32
        assert {str(ds.StudyInstanceUID) for ds in datasets} == {row["study_instance_uid"]}
        assert {str(ds.PatientName).split("^")[0] for ds in datasets} == {"Phantom"}
        raw = (tmp_path / "hl7" / f"{row['patient_id']}.hl7").read_bytes().decode("utf-8")
        assert raw.count("MSH|") == len(make_case(int(row["patient_id"][2:])).hl7)
        assert all(message.startswith("MSH|") and message.endswith("\r") for message in raw.rstrip("\n").split("\n"))
        assert row["patient_id"] in raw
