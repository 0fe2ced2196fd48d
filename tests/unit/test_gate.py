"""No report leaves that breaks a rule or names somebody else: its bytes are read again, whatever wrote them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pytest
from pydicom import Dataset

from tests import reports
from tests.reports import EXAMPLES, Example
from worker.domain import Patient, PatientKey, Study
from worker.errors import PatientConflict, ReportInvalid
from worker.report import gate


@pytest.fixture
def example(tmp_path: Path) -> Example:
    """A report that is in order."""
    return reports.of_radiograph(tmp_path)


def study_of(example: Example) -> Study:
    return reports.study_of(example.sources[0])


def changed(example: Example, change: Callable[[Dataset], object]) -> bytes:
    """The report's bytes after `change`."""
    ds, buffer = example.ds, BytesIO()
    change(ds)
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def items(ds: Dataset) -> Iterator[Dataset]:
    for item in ds.get("ContentSequence") or ():
        yield item
        yield from items(item)


def measured(ds: Dataset) -> Dataset:
    """The value of the first number."""
    found: Dataset = next(item for item in items(ds) if item.ValueType == "NUM").MeasuredValueSequence[0]
    return found


def without(code: str) -> Callable[[Dataset], None]:
    """Take every content item of that name out."""

    def change(ds: Dataset) -> None:
        for item in (ds, *items(ds)):
            if "ContentSequence" in item:
                item.ContentSequence = [one for one in item.ContentSequence if one.ConceptNameCodeSequence[0].get("CodeValue") != code]

    return change


def other_image(ds: Dataset) -> None:
    next(item for item in items(ds) if item.ValueType == "IMAGE").ReferencedSOPSequence[0].ReferencedSOPInstanceUID = "1.2.3"


def evidence_series(ds: Dataset) -> Dataset:
    found: Dataset = ds.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
    return found


@pytest.mark.requirement("L9")
@pytest.mark.parametrize("kind", EXAMPLES)
def test_every_kind_of_report_passes(kind: str, tmp_path: Path) -> None:
    example = EXAMPLES[kind](tmp_path)
    gate.check(example.document.data, study=study_of(example))


@pytest.mark.requirement("L9")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda ds: setattr(ds, "VerificationFlag", "VERIFIED"), "says that a person verified it"),
        (lambda ds: setattr(ds, "SpecificCharacterSet", "ISO_IR 100"), "is not in UTF-8"),
        (lambda ds: delattr(ds, "ContributingEquipmentSequence"), "names no Contributing Equipment"),
        (lambda ds: delattr(ds, "ContentTemplateSequence"), "is not of template 1500"),
        (without("121058"), "has no Procedure Reported"),
        (without("121005"), "has no Observer Type"),
        (without("121012"), "has no Device Observer UID"),
        (without("112039"), "without Tracking Identifier"),
        (without("112040"), "without Tracking Unique Identifier"),
        (without("111001"), "without Algorithm Name"),
        (without("111003"), "without Algorithm Version"),
        (lambda ds: setattr(ds, "SeriesInstanceUID", evidence_series(ds).SeriesInstanceUID), "is in a series of the images"),
        (lambda ds: setattr(evidence_series(ds), "ReferencedSOPSequence", []), "has no evidence"),
        (other_image, "refers to an image that is no evidence"),
        (lambda ds: delattr(measured(ds), "NumericValue"), "a number without a value or unit"),
        (lambda ds: delattr(measured(ds), "MeasurementUnitsCodeSequence"), "a number without a value or unit"),
    ],
)
def test_a_report_that_breaks_a_rule_is_not_sent(example: Example, change: Callable[[Dataset], object], said: str) -> None:
    with pytest.raises(ReportInvalid, match=said):
        gate.check(changed(example, change), study=study_of(example))


@pytest.mark.requirement("L9")
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.9999])
def test_a_report_that_was_cut_off_is_not_sent(example: Example, share: float) -> None:
    data = example.document.data
    with pytest.raises((ReportInvalid, PatientConflict)):
        gate.check(data[: int(share * len(data))], study=study_of(example))


@pytest.mark.requirement("L11")
@pytest.mark.parametrize(
    "change",
    [
        lambda ds: setattr(ds, "PatientID", "F-0002"),
        lambda ds: setattr(ds, "PatientID", ""),
        lambda ds: setattr(ds, "IssuerOfPatientID", "ELSEWHERE"),
        lambda ds: setattr(ds, "StudyInstanceUID", "1.2.3"),
        lambda ds: setattr(ds.CurrentRequestedProcedureEvidenceSequence[0], "StudyInstanceUID", "1.2.3"),
    ],
)
def test_a_report_that_names_another_patient_or_study_is_not_sent_and_the_error_names_nobody(
    example: Example, change: Callable[[Dataset], object]
) -> None:
    with pytest.raises(PatientConflict, match="names another patient or study") as raised:
        gate.check(changed(example, change), study=study_of(example))
    assert "F-000" not in str(raised.value)


@pytest.mark.requirement("L9")
@pytest.mark.requirement("L11")
def test_what_is_written_passes_the_gate_before_anybody_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate is asked about the very bytes that become the document."""
    asked: list[tuple[bytes, Patient]] = []
    monkeypatch.setattr(gate, "check", lambda data, *, study: asked.append((data, study.patient)))
    example = reports.of_radiograph(tmp_path)
    assert asked == [(example.document.data, Patient(PatientKey("FACTORY", "F-0001")))]
