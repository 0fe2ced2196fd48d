"""What a report says, and that it says it of the right patient, in the right words, and the same way twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, timedelta
from pathlib import Path

import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import Dataset, dcmread

from tests import reports
from tests.reports import ALGORITHM, CRP, DRAWN_AT, EXAMPLES, FINDINGS, INPUTS, ZONE, Example
from worker.domain import Code, Inputs, UsedValue
from worker.report import codes, content, tree
from worker.report.result import report_uids


def items(ds: Dataset) -> Iterator[Dataset]:
    """Every content item below `ds`, parents first."""
    for item in ds.get("ContentSequence") or ():
        yield item
        yield from items(item)


def named(ds: Dataset, code: Code) -> list[Dataset]:
    """The content items whose concept name is `code`."""
    return [item for item in items(ds) if item.ConceptNameCodeSequence[0].get("CodeValue") == code.value]


def with_value(value: UsedValue, folder: Path) -> Dataset:
    """The NUM item that one value of the record becomes."""
    example = reports.report([reports.radiograph(folder)], inputs=replace(INPUTS, values=(value,)))
    return named(example.ds, value.code)[0]


@pytest.fixture
def example(tmp_path: Path) -> Example:
    """The report of a radiograph with everything in it."""
    return reports.of_radiograph(tmp_path)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_each_kind_of_report_reads_as_it_did(kind: str, tmp_path: Path) -> None:
    """A change in what a radiologist reads must be seen: `python -m tests.reports` writes the new text, git shows the difference."""
    golden = (reports.GOLDEN / f"sr_{kind}.txt").read_text(encoding="utf-8")
    assert reports.golden_text(EXAMPLES[kind](tmp_path)) == golden


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_same_arguments_give_the_same_bytes(kind: str, tmp_path: Path) -> None:
    """A job that runs twice makes the same object, which the archive knows already, not a second opinion."""
    assert EXAMPLES[kind](tmp_path).document == EXAMPLES[kind](tmp_path).document


def test_the_order_of_the_files_makes_no_difference(tmp_path: Path) -> None:
    """The store gives instances in no particular order."""
    sources = reports.of_ct(tmp_path).sources
    assert reports.report(sources).document == reports.report(sources[::-1]).document


def test_the_header_is_what_ihe_air_asks_for(example: Example) -> None:
    """Own series in the images' study, complete, unverified, preliminary, research, UTF-8; all inputs listed, the order kept."""
    ds, source = example.ds, dcmread(example.sources[0], stop_before_pixels=True)
    assert (ds.CompletionFlag, ds.VerificationFlag, ds.PreliminaryFlag) == ("COMPLETE", "UNVERIFIED", "PRELIMINARY")
    assert (ds.ContentQualification, ds.SpecificCharacterSet, ds.Modality) == ("RESEARCH", "ISO_IR 192", "SR")
    assert (ds.StudyInstanceUID, ds.AccessionNumber) == (source.StudyInstanceUID, source.AccessionNumber)
    assert ds.SeriesInstanceUID != source.SeriesInstanceUID
    assert ds.SeriesDescription == "AI chest-fusion 0.1.0: research, not for diagnosis"
    evidence = ds.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
    assert evidence.SeriesInstanceUID == source.SeriesInstanceUID
    assert [ref.ReferencedSOPInstanceUID for ref in evidence.ReferencedSOPSequence] == [source.SOPInstanceUID]
    order = ds.ReferencedRequestSequence[0]
    assert (order.AccessionNumber, order.RequestedProcedureID) == (source.AccessionNumber, "RP-7")
    assert ds.PerformedProcedureCodeSequence[0].CodeValue == "43468-8"
    assert example.document.sop_instance_uid == ds.SOPInstanceUID == ds.file_meta.MediaStorageSOPInstanceUID


def test_every_group_names_algorithm_weights_input_and_code(example: Example) -> None:
    """A result that does not say what made it cannot be judged, nor withdrawn (IHE AIR)."""
    groups = [item for item in items(example.ds) if item.ConceptNameCodeSequence[0].CodeValue == "125007"]
    assert len(groups) == 4  # two findings, two times at which blood was drawn
    for group in groups:
        said = {item.TextValue for item in group.ContentSequence if item.ValueType == "TEXT"}
        assert {
            "chest-fusion",
            "0.1.0",
            f"weights-sha256:{'cd' * 32}",
            f"input-sha256:{'ef' * 32}",
            "code:0.1.0",
            f"code-sha256:{'ef' * 32}",
        } <= said


def test_tracking_uids_differ_by_finding_and_outlive_a_new_version(tmp_path: Path) -> None:
    """The same question asked again of the same study is tracked as the same."""
    source = reports.radiograph(tmp_path)
    first = reports.report([source]).ds
    second = reports.report([source], algorithm=replace(ALGORITHM, version="2", bundle_sha256="00" * 32)).ds
    tracked = [[i.UID for i in items(ds) if i.ConceptNameCodeSequence[0].CodeValue == "112040"] for ds in (first, second)]
    assert tracked[0] == tracked[1]
    assert len(set(tracked[0])) == 4


def test_the_device_uid_changes_with_the_bundle_and_with_nothing_else() -> None:
    """IHE AIR: each change of the model is another device."""
    one = report_uids("1.2.3", bundle_sha256="aa", input_sha256="bb")
    assert one.device_uid == report_uids("1.2.4", bundle_sha256="aa", input_sha256="cc").device_uid
    assert one.device_uid != report_uids("1.2.3", bundle_sha256="ab", input_sha256="bb").device_uid


def test_a_failure_is_another_document_in_the_same_series() -> None:
    """What failed once may succeed later: two contents may not share a UID."""
    good = report_uids("1.2.3", bundle_sha256="aa", input_sha256="bb")
    bad = report_uids("1.2.3", bundle_sha256="aa", input_sha256="bb", is_failure=True)
    assert good.sop_instance_uid != bad.sop_instance_uid
    assert good.series_instance_uid == bad.series_instance_uid
    assert all(pydicom.uid.UID(uid).is_valid for uid in (good.sop_instance_uid, good.series_instance_uid, good.device_uid))


def test_nothing_found_is_said_in_code_and_in_words(tmp_path: Path) -> None:
    """Silence could be a failure; "nothing found" is an answer."""
    ds = reports.of_nothing_found(tmp_path).ds
    assert named(ds, codes.OUTCOME)[0].ConceptCodeSequence[0].CodeValue == codes.NOTHING_FOUND.value
    assert named(ds, codes.SUMMARY)[0].TextValue == "Nothing found. Negative: Pleural effusion (3.1 %)."


def test_an_uncertain_answer_is_never_reported_as_nothing_found(tmp_path: Path) -> None:
    """Uncertain is not no."""
    ds = reports.of_ct(tmp_path).ds
    assert named(ds, codes.OUTCOME)[0].ConceptCodeSequence[0].CodeValue == codes.FOUND.value
    assert "Nothing found" not in named(ds, codes.SUMMARY)[0].TextValue


def test_a_failure_says_why_and_states_no_number(tmp_path: Path) -> None:
    """A report of what could not be analysed must not hold anything that looks like a result."""
    ds = reports.of_failure(tmp_path).ds
    assert named(ds, codes.OUTCOME)[0].ConceptCodeSequence[0].CodeValue == codes.FAILED.value
    assert "because slices 4 and 5 are 7.5 mm apart" in named(ds, codes.SUMMARY)[0].TextValue
    assert not [item for item in items(ds) if item.ValueType == "NUM" or item.ConceptNameCodeSequence[0].CodeValue == "125007"]


@pytest.mark.parametrize(("failure", "findings"), [("", ()), ("no series fits", FINDINGS)])
def test_findings_and_failure_exclude_each_other(failure: str, findings: tuple[object, ...], tmp_path: Path) -> None:
    """A report with neither says nothing; one with both says two things."""
    with pytest.raises(ValueError, match="either findings or a reason"):
        reports.report([reports.radiograph(tmp_path)], failure=failure, findings=findings)


@pytest.mark.parametrize(("symbol", "code"), [("<", "276139006"), ("<=", "276137008"), (">", "276140008"), (">=", "276138003")])
def test_a_comparator_is_never_lost(symbol: str, code: str, tmp_path: Path) -> None:
    """A value below 0.3 must not become 0.3: the comparator qualifies the number, modifies the concept, and is what a person reads."""
    item = with_value(UsedValue("crp", CRP, 0.3, symbol, "mg/L", DRAWN_AT, ""), tmp_path)
    assert item.NumericValueQualifierCodeSequence[0].CodeValue == code
    assert item.ContentSequence[0].ConceptCodeSequence[0].CodeValue == code
    assert f": {symbol} 0.3 mg/L" in "\n".join(tree.lines(_report_of(item)))


def _report_of(item: Dataset) -> Dataset:
    ds = Dataset()
    ds.ContentSequence = [item]
    return ds


@pytest.mark.parametrize(
    ("value", "written"), [(3.0, "3"), (0.1, "0.1"), (1e-7, "1e-07"), (-123456.789012345, "-123456.789"), (1e21, "1e+21")]
)
def test_numbers_are_written_as_people_write_them(value: float, written: str, tmp_path: Path) -> None:
    """Three written as 3.0 claims a digit that nobody measured; the exact value stands beside it."""
    measured = with_value(UsedValue("crp", CRP, value, "", "mg/L", DRAWN_AT, ""), tmp_path).MeasuredValueSequence[0]
    assert (str(measured.NumericValue), measured.FloatingPointValue) == (written, value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_not_reported(value: float, tmp_path: Path) -> None:
    """It cannot have been what the network was given."""
    with pytest.raises(ValueError, match="finite"):
        with_value(UsedValue("crp", CRP, value, "", "mg/L", DRAWN_AT, ""), tmp_path)


def test_a_value_has_its_own_time_unit_and_origin(example: Example) -> None:
    """Not the document's time: blood was drawn before, and by somebody else."""
    item = named(example.ds, Code("F13", "L", ""))[0]
    assert item.ObservationDateTime == "20240101063000+0100"
    assert item.MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0].CodeValue == "%"
    sessions = {i.TextValue for i in items(example.ds) if i.ConceptNameCodeSequence[0].CodeValue == "C67447"}
    assert sessions == {"Patient record, from LAB"}


def test_every_private_scheme_is_identified(tmp_path: Path) -> None:
    """A code means nothing without its scheme: "L" is not one, and a FHIR address is too long to be one."""
    values = tuple(
        UsedValue("x", Code(f"X{n}", scheme, "Something"), 1.0, "", unit, DRAWN_AT, "")
        for n, (scheme, unit) in enumerate([("L", "mg/L"), ("http://hospital.example/labs", "µg/L"), ("http://loinc.org", ""), ("", "1")])
    )
    ds = reports.report([reports.radiograph(tmp_path)], inputs=replace(INPUTS, values=values)).ds
    used: set[str] = set()
    ds.walk(lambda _, element: used.add(str(element.value)) if element.keyword == "CodingSchemeDesignator" else None)
    identified = {item.CodingSchemeDesignator for item in ds.CodingSchemeIdentificationSequence}
    assert {scheme for scheme in used if scheme.startswith("99")} == identified
    assert {"99SYNOPTIC", "99L", "99LOCAL"} < identified
    assert "LN" in used
    assert all(len(scheme) <= 16 for scheme in used)


@pytest.mark.parametrize(
    ("unit", "code"),
    [
        ("mg/L", "mg/L"),
        ("µg/L", "ug/L"),
        ("μg/L", "ug/L"),
        ("", "1"),
        ("1", "1"),
        ("%", "%"),
        ("Stück / {µl}", "{Stck/ul}"),
        ("단위", "{unit}"),
    ],
)
def test_every_unit_is_ucum(unit: str, code: str) -> None:
    """DICOM knows no other scheme for units; what is none stands in braces, and its meaning as it was."""
    coded = codes.concept(codes.unit(unit))
    assert (coded.CodeValue, coded.CodingSchemeDesignator) == (code, "UCUM")


def test_a_meaning_longer_than_dicom_allows_is_shortened_and_a_backslash_replaced() -> None:
    """LOINC's long names are longer than an LO."""
    coded = codes.concept(Code("2532-0", "LN", "A\\B " + "x" * 80))
    assert coded.CodeMeaning.startswith("A/B ")
    assert coded.CodeMeaning.endswith("...")
    assert len(coded.CodeMeaning) == 64
    with pytest.raises(ValueError, match="without a code value"):
        codes.concept(Code("", "LN", "Nothing"))


def test_texts_are_named_by_title_and_time_and_never_repeated(example: Example) -> None:
    """The archive's readers are not the note's."""
    assert reports.SECRET.encode() not in example.document.data
    said = named(example.ds, INPUTS.texts[0].code)[0]
    assert said.TextValue.startswith("Admission note, written 2024-01-02 06:30+01:00, from HIS")


def test_what_the_network_lacked_is_named_by_code_and_a_missing_record_is_said(tmp_path: Path) -> None:
    """A score without the laboratory values is another score."""
    ds = reports.of_ct(tmp_path).ds
    assert [item.ConceptCodeSequence[0].CodeValue for item in named(ds, codes.RECORD_MISSING)] == [CRP.value]
    assert named(ds, codes.RECORD_FOUND)[0].ConceptCodeSequence[0].CodeValue == codes.NO.value


def test_a_new_report_names_the_one_it_replaces_but_never_itself(tmp_path: Path) -> None:
    """A late series makes a new report; a job that runs again does not."""
    source = reports.radiograph(tmp_path)
    first = reports.report([source])
    study = reports.study_of(source, version=2)
    second = reports.report([source], study=study, algorithm=replace(ALGORITHM, input_sha256="00" * 32), predecessor=first.document)
    previous = second.ds.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0]
    assert previous.SeriesInstanceUID == first.ds.SeriesInstanceUID != second.ds.SeriesInstanceUID
    assert previous.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == first.document.sop_instance_uid
    assert second.document.predecessor_uid == first.document.sop_instance_uid
    assert second.ds.InstanceNumber == 2
    again = reports.report([source], predecessor=first.document)
    assert again.document == first.document


@given(st.floats(0, 1))
def test_only_certainty_is_reported_as_0_or_100_percent(probability: float) -> None:
    """Rounding must not make a network sure."""
    shown = content.percent(probability)
    assert shown == pytest.approx(100 * probability, abs=0.0101)
    assert (shown in {0, 100}) == (probability in {0, 1})


@pytest.mark.parametrize("probability", [float("nan"), -0.1, 1.1])
def test_what_is_no_probability_is_not_reported(probability: float, tmp_path: Path) -> None:
    """A diverged network must not reach a radiologist."""
    with pytest.raises(ValueError, match="no probability"):
        reports.report([reports.radiograph(tmp_path)], findings=[replace(FINDINGS[0], probability=probability)])


def test_a_product_is_not_marked_as_research_nor_a_person_named(tmp_path: Path) -> None:
    """The flag follows the bundle."""
    ds = reports.report([reports.radiograph(tmp_path)], algorithm=replace(ALGORITHM, research_use=False)).ds
    assert ds.ContentQualification == "PRODUCT"
    assert "research" not in ds.SeriesDescription
    assert "not verified" in named(ds, codes.INTENDED_USE)[0].TextValue


def test_shares_of_the_log_odds_are_given_where_they_were_computed(example: Example, tmp_path: Path) -> None:
    """One coded number for each modality; none where there is none."""
    assert [str(i.MeasuredValueSequence[0].NumericValue) for i in named(example.ds, codes.shapley("image"))] == ["1.3123"]
    odd = replace(FINDINGS[1], shapley={"electrocardiogram": 0.5})
    ds = reports.report([reports.radiograph(tmp_path)], findings=[odd]).ds
    assert len(named(ds, codes.shapley("electrocardiogram"))) == 1


def test_a_misspelt_keyword_is_an_error() -> None:
    """Another product's equipment record was lost that way: pydicom drops what it does not know."""
    with pytest.raises(ValueError, match="ContributingequipmentSequence"):
        Dataset().ContributingequipmentSequence = []


def test_a_tree_shows_what_others_write(shared: Path) -> None:
    """`synoptic show` may be pointed at any report."""
    shown = "\n".join(tree.lines(dcmread(shared / "tools" / "sr_air.dcm")))
    assert "Probability of cancer [111047 DCM]: 73.2 %" in shown
    assert "Finding Site [363698007 SCT]: Lung [39607008 SCT]" in shown


def test_a_tree_survives_a_bare_document() -> None:
    """Type 1 attributes are missing in the field too."""
    ds, number, empty = Dataset(), Dataset(), Dataset()
    number.ValueType, number.MeasuredValueSequence = "NUM", []
    ds.ContentSequence = [number, empty]
    assert "no value" in "\n".join(tree.lines(ds))


def test_inputs_without_values_make_no_group(tmp_path: Path) -> None:
    """An empty group is not valid."""
    ds = reports.report([reports.radiograph(tmp_path)], inputs=Inputs(series=INPUTS.series, record_found=True)).ds
    assert len([item for item in items(ds) if item.ConceptNameCodeSequence[0].CodeValue == "125007"]) == len(FINDINGS)


def test_times_of_the_record_are_written_in_the_sites_zone(example: Example) -> None:
    """A reader compares them with the wall clock of the ward."""
    assert ZONE.utcoffset(None) == timedelta(hours=1)
    points = [i.TextValue for i in items(example.ds) if i.ConceptNameCodeSequence[0].CodeValue == "C2348792"]
    assert points == ["2024-01-01 06:30+01:00", "2024-01-02 06:30+01:00"]
    assert DRAWN_AT.tzinfo is UTC
