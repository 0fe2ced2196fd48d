"""A notice is made where a finding that the bundle calls critical is positive, and it says nobody's name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests import reports
from tests.reports import FINDINGS
from worker.domain import Patient, PatientKey
from worker.report import forms, notice

CRITICAL = replace(FINDINGS[0], is_critical=True)


@pytest.mark.parametrize(
    ("finding", "is_told"),
    [
        (CRITICAL, True),
        (FINDINGS[0], False),
        (replace(CRITICAL, verdict="uncertain"), False),
        (replace(CRITICAL, verdict="negative"), False),
    ],
)
def test_a_notice_is_made_only_of_a_positive_critical_finding(finding: object, *, is_told: bool, tmp_path: Path) -> None:
    result = reports.result([reports.radiograph(tmp_path)], findings=[finding, FINDINGS[1]])  # type: ignore[list-item]
    assert len(notice.build(result)) == is_told
    failed = reports.result([reports.radiograph(tmp_path)], inputs=None, findings=(), failure="No series fits.")
    assert notice.build(failed) == ()


def test_a_notice_names_study_finding_and_algorithm_and_not_the_patient(tmp_path: Path) -> None:
    source = reports.radiograph(tmp_path)
    patient = Patient(PatientKey("FACTORY", "F-0001"), "ZZNAME^ZZGIVEN", "19350131", "M")
    result = reports.result([source], findings=[CRITICAL, FINDINGS[1]], study=replace(reports.study_of(source), patient=patient))
    [document] = notice.build(result)
    assert [word for word in ("ZZ", "F-0001", "FACTORY", "1935", "ZZGIVEN") if word in document.data.decode()] == []
    said = json.loads(document.data)
    assert said["type"] == "finding.critical"
    assert said["data"]["accession_number"] == "A-0002"
    assert said["data"]["study_instance_uid"] == result.study.study_instance_uid
    [finding] = said["data"]["findings"]
    assert (finding["name"], finding["probability_percent"], finding["code"]["value"]) == ("pneumonia", 73.21, "233604007")
    assert "For research use only" in said["data"]["statement"]
    assert notice.build(result) == notice.build(result)


def test_the_forms_of_the_other_doors_are_made_where_a_destination_wants_them(tmp_path: Path) -> None:
    result = reports.result([reports.radiograph(tmp_path)], findings=[CRITICAL])
    kinds = [one.kind for one in forms.author(result, {"oru", "fhir", "notice", "sr"})]
    assert kinds == ["oru", "fhir", "notice", "sr"]
    assert [one.kind for one in forms.author(result, {"sr"})] == ["sr"]
