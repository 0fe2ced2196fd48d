"""ORU^R01 as two other readers of HL7 v2 read it: hl7apy strictly by the standard's tables, python-hl7 field by field."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import hl7
import pytest
from hl7apy.consts import VALIDATION_LEVEL
from hl7apy.parser import parse_message
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from tests import factories, reports
from tests.reports import ALGORITHM, FINDINGS, ZONE
from worker.domain import Code, Document, Patient, PatientKey
from worker.intake.hl7 import parse
from worker.report import codes, content, oru, sr
from worker.report.result import Result, result_of


def result(folder: Path, *, change: Callable[[Dataset], object] = lambda _: None, **made_of: object) -> Result:
    """A radiograph's result of a patient with a name."""
    source = reports.radiograph(folder, change=change)
    patient = Patient(reports.study_of(source).patient.key, "Ōe^Kenzaburō^^Dr^PhD=大江^健三郎", "19350131", "M")
    return reports.result([source], study=replace(reports.study_of(source), patient=patient), **made_of)  # type: ignore[arg-type]


def message(one: Result) -> str:
    """The message; strictly valid, and of no character that MLLP or HL7 uses itself."""
    [document] = oru.build(one)
    assert (document.kind, document.sop_class_uid) == ("oru", "")
    text = document.data.decode()
    assert re.fullmatch(r"[^\x00-\x0c\x0e-\x1f\x7f-\x9f]+", text)
    # hl7apy takes OBX-5 for an ST of 199 characters whatever OBX-2 says.
    short = re.sub(r"(\|FT\|[^|]*\|\|)([^|]{199})[^|]*", r"\1\2", text)
    parse_message(short, validation_level=VALIDATION_LEVEL.STRICT).validate()
    return text


def rows(text: str, *fields: int) -> list[tuple[str, ...]]:
    """Of each OBX these fields."""
    return [tuple(str(segment(number)) for number in fields) for segment in hl7.parse(text).segments("OBX")]


def test_a_message_says_who_when_and_what_by_the_tables_of_hl7(tmp_path: Path) -> None:
    text = message(result(tmp_path))
    parsed = hl7.parse(text)
    msh, pid, orc, obr = (parsed.segment(name) for name in ("MSH", "PID", "ORC", "OBR"))
    assert [str(msh(n)) for n in (3, 7, 9, 11, 12, 18)] == [
        "SYNOPTIC", "20261121020203+0100", "ORU^R01^ORU_R01", "P", "2.5.1", "UNICODE UTF-8"]  # fmt: skip
    assert re.fullmatch("[0-9A-F]{20}", str(msh(10)))
    assert [str(pid(n)) for n in (3, 5, 7, 8)] == [
        "F-0001^^^FACTORY", "Ōe^Kenzaburō^^PhD^Dr^^^A~大江^健三郎^^^^^^I", "19350131", "M"]  # fmt: skip
    assert (str(orc(1)), str(orc(3)), str(obr(3)), str(obr(18))) == ("RE", "A-0002", "A-0002", "A-0002")
    assert str(obr(4)) == "chest-fusion^AI: Chest radiograph with laboratory values^99SYNOPTIC^43468-8^XR unspecified body region^LN"
    assert [str(obr(n)) for n in (7, 22, 24, 25)] == ["20240102103000+0100", "20261121020203+0100", "RAD", "P"]
    assert str(obr(32)) == "abababababab&Synoptic chest-fusion 0.1.0"


def test_each_finding_is_a_group_of_observations_beside_outcome_words_algorithm_study_and_report(tmp_path: Path) -> None:
    one = result(tmp_path)
    critical = replace(one, findings=(replace(one.findings[0], is_critical=True), *one.findings[1:]))
    text = message(critical)
    assert rows(text, 2, 3, 4, 5, 6, 8, 11)[2:9] == [
        ("CWE", "233604007^Pneumonia^SCT", "1", "10828004^Positive^SCT", "", "AA", "P"),
        ("NM", "122157^Probability^DCM", "1", "73.21", "%^percent^UCUM", "", "P"),
        ("NM", "threshold^Operating threshold of the probability^99SYNOPTIC", "1", "50", "%^percent^UCUM", "", "P"),
        ("NM", "shapley-image^Share of the image in the log-odds^99SYNOPTIC", "1", "1.3123", "{log-odds}^log-odds^UCUM", "", "P"),
        ("NM", "shapley-values^Share of the record's values in the log-odds^99SYNOPTIC", "1", "-0.2", "{log-odds}^log-odds^UCUM", "", "P"),
        ("NM", "shapley-text^Share of the record's text in the log-odds^99SYNOPTIC", "1", "0", "{log-odds}^log-odds^UCUM", "", "P"),
        ("CWE", "60046008^Pleural effusion^SCT", "2", "260385009^Negative^SCT", "", "", "P"),
    ]
    assert rows(message(one), 8)[2] == ("A",)
    outcome, summary = rows(text, 2, 3, 5)[:2]
    assert outcome == ("CWE", "111017^CAD Processing and Findings Summary^DCM", "111242^All algorithms succeeded; with findings^DCM")
    assert summary[0] == "FT"
    assert summary[2].split("\\.br\\") == [
        content.outcome(one.findings, failure="")[1], *(words for _, words in content.statements(ALGORITHM))]  # fmt: skip
    assert "For research use only" in summary[2]
    assert rows(text, 3, 5, 11)[-4:] == [
        ("111001^Algorithm Name^DCM", "chest-fusion", "P"),
        ("111003^Algorithm Version^DCM", "0.1.0", "P"),
        ("113014^DICOM Study^DCM", one.study.study_instance_uid, "O"),
        ("report^DICOM Structured Report of this result^99SYNOPTIC", one.uids.sop_instance_uid, "O"),
    ]
    numbered = [int(number) for (number,) in rows(text, 1)]
    assert numbered == list(range(1, len(numbered) + 1))
    assert len(set(rows(text, 3, 4))) == len(numbered), "OBX-3 and OBX-4 together name one observation"
    assert set(rows(text, 18, 19)) == {(f"chest-fusion 0.1.0^Synoptic^{one.uids.device_uid}^ISO", "20261121020203+0100")}


def test_a_replacement_is_a_correction_and_what_could_not_be_analysed_has_no_result(tmp_path: Path) -> None:
    first = reports.of_radiograph(tmp_path).document
    replaced = message(result(tmp_path, predecessor=replace_uid(first)))
    assert str(hl7.parse(replaced).segment("OBR")(25)) == "C"
    assert {status for (status,) in rows(replaced, 11)} == {"C", "O"}
    failed = message(result(tmp_path, inputs=None, findings=(), failure="No series | fits."))
    assert str(hl7.parse(failed).segment("OBR")(25)) == "X"
    assert rows(failed, 5, 11)[:2] == [
        ("111245^No algorithms succeeded; without findings^DCM", "X"),
        (rows(failed, 5)[1][0], "P"),
    ]
    assert rows(failed, 5)[1][0].startswith("Could not be analysed, because no series \\F\\ fits. No finding is stated.")


def replace_uid(report: Document) -> Document:
    """The same report as one of before."""
    ds = reports.Example(report, ()).ds
    ds.SOPInstanceUID = "2.25.1"
    with BytesIO() as out:
        ds.save_as(out, enforce_file_format=True)
        return replace(report, sop_instance_uid="2.25.1", data=out.getvalue())


def test_every_order_that_the_images_answer_gets_the_result(tmp_path: Path) -> None:
    def change(ds: Dataset) -> None:
        orders: Sequence[Dataset] = (Dataset(), Dataset())
        for number, order in enumerate(orders, start=1):
            order.AccessionNumber = f"A{number}"
            order.PlacerOrderNumberImagingServiceRequest, order.FillerOrderNumberImagingServiceRequest = f"P{number}", f"F{number}"
            order.RequestedProcedureCodeSequence = [codes.concept(Code("36643-5", "LN", "XR Chest 2 Views"))]
        ds.RequestAttributesSequence = list(orders)

    parsed = hl7.parse(message(result(tmp_path, change=change)))
    found = [tuple(str(segment(n)) for n in (2, 3, 18, 44)) for segment in parsed.segments("OBR")]
    assert found == [("P1", "F1", "A1", "36643-5^XR Chest 2 Views^LN"), ("P2", "F2", "A2", "36643-5^XR Chest 2 Views^LN")]
    assert [str(segment[0]) for segment in parsed].count("OBX") == 2 * len({str(one(1)) for one in parsed.segments("OBX")})


@pytest.mark.parametrize("code", [{}, {"CodeValue": ""}, {"CodeMeaning": "XR Chest"}, {"CodeValue": "XR1"}], ids=str)
def test_an_order_whose_procedure_is_half_coded_gets_the_result_all_the_same(code: dict[str, str], tmp_path: Path) -> None:
    """Worklists hand on what the RIS has; the RIS would wait for ever."""

    def order(ds: Dataset) -> None:
        item, requested = Dataset(), Dataset()
        for keyword, value in code.items():
            setattr(requested, keyword, value)
        item.RequestedProcedureCodeSequence = [requested]
        ds.RequestAttributesSequence = [item]

    obr = hl7.parse(message(result(tmp_path, change=order))).segment("OBR")
    assert str(obr(25)) == "P"
    assert (str(obr(44)) if len(obr) > 44 else "") == ("XR1^^99LOCAL" if code.get("CodeValue") else "")


def test_images_without_an_order_are_answered_by_their_study(tmp_path: Path) -> None:
    def change(ds: Dataset) -> None:
        del ds.RequestAttributesSequence
        ds.AccessionNumber = ""

    one = result(tmp_path, change=change)
    [document] = oru.build(one)
    obr = hl7.parse(document.data.decode()).segment("OBR")
    assert (str(obr(2)), str(obr(3)), str(obr(18))) == ("", one.study.study_instance_uid, "")


@pytest.mark.parametrize(
    ("issuer", "qualifiers", "expected"),
    [
        ("HOSPITAL", None, "HOSPITAL"),
        ("1.2.40.3", None, "&1.2.40.3&ISO"),
        ("HOSPITAL", ("1.2.40.3", "ISO"), "HOSPITAL&1.2.40.3&ISO"),
        ("A&B^C", None, "A\\T\\B\\S\\C"),
    ],
)
def test_the_issuer_is_the_assigning_authority(issuer: str, qualifiers: tuple[str, str] | None, expected: str, tmp_path: Path) -> None:
    def change(ds: Dataset) -> None:
        ds.IssuerOfPatientID = issuer
        if qualifiers:
            item = Dataset()
            item.UniversalEntityID, item.UniversalEntityIDType = qualifiers
            ds.IssuerOfPatientIDQualifiersSequence = [item]

    assert str(hl7.parse(message(result(tmp_path, change=change))).segment("PID")(3)) == f"F-0001^^^{expected}"


def test_the_same_result_is_the_same_message_and_another_has_another_control_id(tmp_path: Path) -> None:
    one = result(tmp_path)
    assert oru.build(one) == oru.build(result(tmp_path))
    other = result(tmp_path, algorithm=replace(ALGORITHM, input_sha256="01" * 32))
    assert str(hl7.parse(message(one)).segment("MSH")(10)) != str(hl7.parse(message(other)).segment("MSH")(10))


def test_a_result_that_a_ris_forwards_to_us_is_no_fact_of_the_record(tmp_path: Path) -> None:
    """Else what the network said would be what it is given the next time."""
    parsed = parse(message(result(tmp_path)).encode(), zone=ZONE, issuers={})
    assert parsed.update is None
    assert "a result of ours, sent back" in parsed.note


def test_a_study_without_a_date_has_no_time_of_observation(tmp_path: Path) -> None:
    one = result(tmp_path)
    undated = replace(one, study=replace(one.study, study_at=one.study.study_at.replace(year=1900)))
    assert str(hl7.parse(message(undated)).segment("OBR")(7)) == ""


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@settings(max_examples=60, deadline=None)
@given(name=TEXTS, issuer=TEXTS, patient_id=TEXTS, title=TEXTS, meaning=TEXTS)
def test_no_text_breaks_a_field_and_each_comes_back_as_it_was(
    name: str, issuer: str, patient_id: str, title: str, meaning: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever a hospital calls its patients: separators are escaped, control characters are blanks, the number of fields is the same."""
    one = _ready(tmp_path_factory)
    patient = Patient(PatientKey(issuer or "H", patient_id or "1"), name, "", "")
    finding = replace(FINDINGS[0], code=Code("233604007", "SCT", meaning))
    changed = replace(
        one, study=replace(one.study, patient=patient), algorithm=replace(ALGORITHM, title=title), findings=(finding, FINDINGS[1])
    )
    [document] = oru.build(changed)
    text = document.data.decode()
    plain = oru.build(one)[0].data.decode()
    assert [line.split("|")[0] for line in text.split("\r")] == [line.split("|")[0] for line in plain.split("\r")]
    parsed = hl7.parse(text)
    pid, verdict = text.split("\r")[1].split("|"), text.split("\r")[6].split("|")
    assert parsed.unescape(pid[3].split("^")[0]) == _clean(patient_id or "1")
    assert len(pid[3].split("^")) == 4
    assert parsed.unescape(verdict[3].split("^")[1]) == _clean(meaning)
    family = name.split("=")[0].split("^")[0]
    assert parsed.unescape(pid[5].split("~")[0].split("^")[0] if len(pid) > 5 else "") in (
        _clean(family),
        "",
        *map(_clean, name.split("=")),
    )


def _clean(text: str) -> str:
    return re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", text).strip()


_made: list[Result] = []


def _ready(factory: pytest.TempPathFactory) -> Result:
    if not _made:
        _made.append(reports.result([reports.radiograph(factory.mktemp("oru"))]))
    return _made[0]


def test_a_ct_with_an_uncertain_atypical_finding_says_so(tmp_path: Path) -> None:
    series = factories.spool(factories.make_ct(slices=3), tmp_path)
    paths = [instance.path for instance in series.instances]
    uncertain = replace(FINDINGS[0], verdict="uncertain", is_atypical=True)
    one = result_of(
        reports.study_of(paths[0]),
        algorithm=ALGORITHM,
        evidence=paths,
        inputs=None,
        findings=[uncertain],
        analysed_at=reports.ANALYSED_AT,
        zone=ZONE,
    )
    text = oru.build(one)[0].data.decode()
    assert content.ATYPICAL_STATEMENT in text
    assert "82334004^Indeterminate^SCT" in text
    assert sr.build(one, ()).sop_instance_uid in text
