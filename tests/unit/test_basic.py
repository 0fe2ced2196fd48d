"""The report as text: all of the root, for who takes no other."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
from pydicom import FileDataset, dcmread

from tests import reports
from tests.reports import EXAMPLES
from tests.unit.test_keys import evidence, renewed, two_findings
from tests.unit.test_sr import items
from worker.report import basic, codes, forms, tree
from worker.report.result import Result

#: Of the tree, and what a number in words holds already: where it lies in the images, and its "<".
UNTOLD = {
    "Image Library Group",
    "Imaging Measurements",
    "Measurement Group",
    "Modality",
    "Source",
    "Source of Measurement",
    codes.COMPARATOR.meaning,
}


def in_words(result: Result) -> FileDataset:
    (document,) = basic.build(result)
    return dcmread(BytesIO(document.data))


def result_of(kind: str, folder: Path) -> Result:
    """The result of one of the examples."""
    sources = EXAMPLES[kind](folder).sources
    if kind == "failure":
        return reports.result(sources, inputs=None, findings=(), failure="Slices 4 and 5 are 7.5 mm apart.")
    return reports.result(sources, findings=reports.FINDINGS[1:] if kind == "nothing_found" else reports.FINDINGS)


def said_by(ds: FileDataset) -> set[str]:
    """Each item's name and value, codes and all."""
    return {tree.line(item) for item in items(ds) if item.ConceptNameCodeSequence[0].CodeMeaning not in UNTOLD and tree.told(item)}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_every_number_code_and_sentence_of_the_root_is_in_it(kind: str, tmp_path: Path) -> None:
    """By construction, and here by reading both as receivers do."""
    result = result_of(kind, tmp_path)
    (*_, root) = forms.author(result, ())
    ds = in_words(result)
    assert said_by(dcmread(BytesIO(root.data))) <= said_by(ds)
    assert (ds.SOPClassUID, ds.Modality, ds.CompletionFlag, ds.VerificationFlag) == (
        "1.2.840.10008.5.1.4.1.1.88.11",
        "SR",
        "COMPLETE",
        "UNVERIFIED",
    )
    assert ds.file_meta.MediaStorageSOPClassUID == ds.SOPClassUID
    assert {item.ValueType for item in items(ds)} <= {"CONTAINER", "TEXT", "CODE", "UIDREF"}
    assert "ContentTemplateSequence" not in ds
    assert evidence(ds) == {str(one.SOPInstanceUID) for one in result.source.instances}


def test_regions_are_told_by_their_numbers_and_places(tmp_path: Path) -> None:
    """Coordinates are for programs; where the middle lies, and on which image it is drawn, is for people."""
    result = two_findings(tmp_path)
    ds = in_words(result)
    told = "\n".join(tree.line(item) for item in items(ds) if item.ValueType == "TEXT")
    for code in (codes.REGION_VOLUME, codes.REGION_AREA, codes.REGION_CENTRE, codes.REGION):
        assert f"{code.meaning} [{code.value} 99SYNOPTIC]: " in told
    assert result.findings[0].regions[0].centre_mm is not None
    left = result.findings[0].regions[0].centre_mm[0]
    assert f": {left:.1f}, " in told


def test_the_answer_comes_first_and_the_algorithm_once(tmp_path: Path) -> None:
    """A person reads from the top, and not six digests a finding."""
    ds = in_words(result_of("radiograph", tmp_path))
    parts = [item.ConceptNameCodeSequence[0].CodeMeaning for item in ds.ContentSequence if item.RelationshipType == "CONTAINS"]
    assert parts == [
        "Qualitative Evaluations",
        "Pneumonia",
        "Pleural effusion",
        "Laboratory test finding",
        "Laboratory test finding",
        "Processing Equipment",
        "Image Library",
    ]
    names = [item.ConceptNameCodeSequence[0].CodeValue for item in items(ds)]
    assert names.count("111001") == 1


@pytest.mark.parametrize("kinds", [("basic",), ()])
def test_its_predecessor_is_the_old_text_or_the_old_root_where_there_was_none(kinds: tuple[str, ...], tmp_path: Path) -> None:
    """Who is sent text alone can follow it back."""
    first = two_findings(tmp_path)
    made = forms.author(first, kinds)
    ds = in_words(renewed(first, made[-1]))
    (old,) = ds.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert old.ReferencedSOPInstanceUID == made[0].sop_instance_uid
    assert len(made) == len(kinds) + 1
    assert any("Replaces the report of" in str(item.get("TextValue")) for item in items(ds))
    assert ds.SeriesDescription == "AI chest-fusion 0.1.0 as text #2: research, not for diagnosis"


def test_the_same_result_gives_the_same_bytes(tmp_path: Path) -> None:
    result = result_of("ct", tmp_path)
    assert basic.build(result) == basic.build(replace(result))
