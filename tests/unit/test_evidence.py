"""What a report takes over from the images: the right patient, every script, and nothing outside the standard."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, tzinfo
from io import BytesIO
from pathlib import Path

import pydicom
import pytest
from pydicom import Dataset, dcmread
from pydicom.valuerep import PersonName

from tests import factories, reports
from tests.reports import ALGORITHM, ANALYSED_AT, FINDINGS
from worker.domain import PatientKey
from worker.errors import PatientConflict, PixelError
from worker.report import evidence, sr
from worker.report.result import result_of


@pytest.mark.parametrize(
    ("patient", "said"),
    [(PatientKey("FACTORY", "F-0002"), "another patient"), (PatientKey("ELSEWHERE", "F-0001"), "another issuer")],
)
def test_images_of_another_patient_are_never_reported_on(patient: PatientKey, said: str, tmp_path: Path) -> None:
    """A result is delivered to the right patient or not at all; and the error names nobody."""
    source = reports.radiograph(tmp_path)
    with pytest.raises(PatientConflict, match=said) as raised:
        reports.report([source], study=reports.study_of(source, patient=patient))
    assert "F-000" not in str(raised.value)


def test_images_of_another_study_are_never_reported_on(tmp_path: Path) -> None:
    """The report goes into the study of its images."""
    source = reports.radiograph(tmp_path)
    with pytest.raises(PatientConflict, match="another study"):
        reports.report([source], study=replace(reports.study_of(source), study_instance_uid="1.2.3"))


@pytest.mark.requirement("P15")
def test_an_enhanced_object_is_one_instance_of_the_evidence(tmp_path: Path) -> None:
    """Its frames are many, and a report refers to it once, under its own SOP class."""
    enhanced = factories.make_enhanced(factories.make_ct(slices=5))
    source = factories.write(enhanced, tmp_path / "enhanced.dcm")
    found = evidence.read([source], study=reports.study_of(source))
    assert [(one.SOPInstanceUID, one.SOPClassUID) for one in found.instances] == [(enhanced.SOPInstanceUID, enhanced.SOPClassUID)]
    written = dcmread(BytesIO(reports.report([source], study=reports.study_of(source)).document.data))
    (study,) = written.CurrentRequestedProcedureEvidenceSequence
    (series,) = study.ReferencedSeriesSequence
    assert [item.ReferencedSOPInstanceUID for item in series.ReferencedSOPSequence] == [enhanced.SOPInstanceUID]


def test_one_image_of_another_patient_among_many_is_enough_to_stop(tmp_path: Path) -> None:
    """Every header is read, not only the first."""
    sources = reports.of_ct(tmp_path).sources
    ds = dcmread(sources[3])
    ds.PatientID = "F-0002"
    ds.save_as(sources[3])
    with pytest.raises(PatientConflict):
        reports.report(sources, study=reports.study_of(sources[0]))


@pytest.mark.parametrize(
    ("character_set", "name"),
    [
        (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        ("ISO_IR 126", "Διονυσιος^Α"),
        ("ISO_IR 100", "Müller^Jürgen"),
        ("GB18030", "Wang^XiaoDong=王^小东"),
        ("ISO_IR 192", "Nguyễn^Văn"),
    ],
)
def test_names_in_every_script_arrive_as_they_were(character_set: str | list[str], name: str, tmp_path: Path) -> None:
    """Empty first character sets are refused by highdicom, and nothing may be lost on the way to UTF-8."""

    def change(ds: Dataset) -> None:
        ds.SpecificCharacterSet = character_set
        ds.PatientName = ds.OtherPatientNames = name
        order = Dataset()
        order.RequestedProcedureDescription = name.split("=")[-1]
        ds.RequestAttributesSequence = [order]

    example = reports.report([reports.radiograph(tmp_path, change=change)])
    assert str(example.ds.PatientName) == str(example.ds.OtherPatientNames) == name
    assert example.ds.ReferencedRequestSequence[0].RequestedProcedureDescription == name.split("=")[-1]
    assert name.encode("utf-8") in example.document.data


def test_half_width_katakana_is_not_turned_into_question_marks(tmp_path: Path) -> None:
    """Dataset.decode of pydicom does that: it encodes names once more, and cannot in ISO_IR 13."""
    name = "ﾔﾏﾀﾞ^ﾀﾛｳ"

    def change(ds: Dataset) -> None:
        ds.SpecificCharacterSet = "ISO_IR 13"
        ds.PatientName = PersonName(name.encode("shift_jis"), ["shift_jis"])

    assert str(reports.report([reports.radiograph(tmp_path, change=change)]).ds.PatientName) == name


def test_images_without_any_type_2_attribute_can_be_reported_on(tmp_path: Path) -> None:
    """Modalities leave out what they do not know; the report has it, empty."""
    gone = ["PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber"]
    gone += ["ReferringPhysicianName", "StudyID", "IssuerOfPatientID", "RequestAttributesSequence"]

    def change(ds: Dataset) -> None:
        for keyword in gone:
            if keyword in ds:
                del ds[keyword]

    ds = reports.report([reports.radiograph(tmp_path, change=change)]).ds
    assert all(keyword in ds and not ds[keyword].value for keyword in gone[:9])
    assert "ReferencedRequestSequence" not in ds
    assert "IssuerOfPatientID" not in ds


def test_values_outside_the_standard_neither_stop_a_report_nor_enter_it(tmp_path: Path) -> None:
    """Archives refuse objects for less; and nothing of it may be quoted in a warning, which the tests would raise on."""
    illegal = {"PatientSex": "?", "PatientBirthDate": "UNKNOWN", "StudyDate": "1997.04.24", "StudyTime": "14:04:38"}

    def change(ds: Dataset) -> None:
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = pydicom.uid.UID("1.2.3.4.5")
        ds.Manufacturer = "M" * 80
        for keyword, value in illegal.items():
            ds[keyword]._value = value

    with pydicom.config.disable_value_validation():
        source = reports.radiograph(tmp_path, change=change)
    ds = reports.report([source]).ds
    assert (ds.PatientSex, ds.PatientBirthDate) == ("", "")
    assert (ds.StudyDate, ds.StudyTime) == ("19970424", "140438")
    assert (
        ds.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[0].ReferencedSOPClassUID
        == "1.2.3.4.5"
    )


def test_of_two_dates_where_there_is_one_neither_is_taken_over(tmp_path: Path) -> None:
    def change(ds: Dataset) -> None:
        ds["StudyDate"]._value = pydicom.multival.MultiValue(str, ["20260101", "20260102"])
        ds.OtherPatientNames = ["A^B", "C^D"]

    with pydicom.config.disable_value_validation():
        ds = reports.report([reports.radiograph(tmp_path, change=change)]).ds
    assert ds.StudyDate == ""
    assert [str(name) for name in ds.OtherPatientNames] == ["A^B", "C^D"]


def test_a_file_that_is_no_dicom_says_so_and_a_missing_one_is_not_the_senders_fault(tmp_path: Path) -> None:
    """One is a verdict on the images, the other on our disk."""
    source = reports.radiograph(tmp_path)
    study = reports.study_of(source)
    (tmp_path / "bad").write_bytes(b"\x00" * 128 + b"DICM" + b"\x08\x00\x05\x00CS\xff\xff" * 9)
    with pytest.raises(PixelError):
        reports.report([tmp_path / "bad"], study=study)
    with pytest.raises(FileNotFoundError):
        reports.report([tmp_path / "gone"], study=study)


class _Summer(tzinfo):
    """One hour ahead, two from April to September."""

    def utcoffset(self, at: datetime | None) -> timedelta:
        return timedelta(hours=2 if at is not None and 4 <= at.month <= 9 else 1)

    def dst(self, at: datetime | None) -> timedelta:
        return self.utcoffset(at) - timedelta(hours=1)

    def tzname(self, at: datetime | None) -> str:
        return "CEST" if self.dst(at) else "CET"


@pytest.mark.parametrize(("own", "expected", "clock"), [("", "+0200", "030203"), ("-0530", "-0530", "193203")])
def test_one_offset_holds_for_all_times_of_the_document(own: str, expected: str, clock: str, tmp_path: Path) -> None:
    """Timezone Offset From UTC also governs Study Time, which is the images': theirs wins, else the site's on that day."""

    def change(ds: Dataset) -> None:
        if own:
            ds.TimezoneOffsetFromUTC = own

    source = reports.radiograph(tmp_path, change=change)
    in_july = replace(reports.study_of(source), study_at=datetime(2024, 7, 2, 10, 30, tzinfo=_Summer()))
    made_of = result_of(
        in_july, algorithm=ALGORITHM, evidence=[source], inputs=None, findings=FINDINGS, analysed_at=ANALYSED_AT, zone=_Summer()
    )
    document = sr.build(made_of)
    ds = dcmread(BytesIO(document.data))
    assert (ds.TimezoneOffsetFromUTC, ds.ContentTime[:6]) == (expected, clock)


def test_highdicom_never_logs_a_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It warns of names that it finds odd, and quotes them."""
    with caplog.at_level("DEBUG"):
        reports.report([reports.radiograph(tmp_path, change=lambda ds: setattr(ds, "PatientName", "SENTINEL"))])
    assert "SENTINEL" not in caplog.text
    assert "F-0001" not in caplog.text
