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
    codes.COMPARATOR.meaning,
    codes.WHOLE_IMAGE.meaning,
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


def said_by(ds: FileDataset) -> list[tuple[str, str]]:
    """The name and the value of each item."""
    named = [(item.ConceptNameCodeSequence[0].CodeMeaning, tree.told(item, has_code=False)) for item in items(ds)]
    return [(name, value) for name, value in named if value and name not in UNTOLD]


@pytest.mark.parametrize("kind", EXAMPLES)
def test_every_number_code_and_sentence_of_the_root_is_in_it(kind: str, tmp_path: Path) -> None:
    """By construction, and here by reading both as receivers do: as an item of its own, or as "name: value." in a paragraph."""
    result = result_of(kind, tmp_path)
    (*_, root) = forms.author(result, ())
    ds = in_words(result)
    own = said_by(ds)
    paragraphs = " ".join(value for _, value in own)
    lacking = [
        (name, value)
        for name, value in said_by(dcmread(BytesIO(root.data)))
        if (name, value) not in own and f"{name}: {value}." not in paragraphs
    ]
    assert lacking == []
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


def test_a_viewer_that_shows_no_concept_names_still_shows_sentences(tmp_path: Path) -> None:
    """DCMTK's, for one: "3.1 % 50 % Negative" would be a riddle."""
    ds = in_words(result_of("radiograph", tmp_path))
    summaries = [item.TextValue for item in items(ds) if item.ValueType == "TEXT" and item.ConceptNameCodeSequence[0].CodeValue == "121111"]
    told = summaries[1:]  # that of all comes first
    assert told[0].startswith("Finding: Pneumonia. ")
    assert "Probability: 73.21 %. Operating threshold of the probability: 50 %. " in told[0]
    assert told[0].endswith("Verdict at the operating threshold: Positive.")
    assert "C reactive protein [Mass/volume] in Serum or Plasma: < 0.3 mg/L (observed 20240102063000+0100)." in told[-1]


def test_regions_are_told_by_their_numbers_and_places(tmp_path: Path) -> None:
    """Coordinates are for programs; where the middle lies, and on which image it is drawn, is for people."""
    result = two_findings(tmp_path)
    told = " ".join(item.TextValue for item in items(in_words(result)) if item.ValueType == "TEXT")
    center = result.findings[0].regions[0].centre_mm
    assert center is not None
    assert f"{codes.REGION_CENTRE.meaning}: {center[0]:.1f}, {center[1]:.1f}, {center[2]:.1f} mm (left, posterior, superior)." in told
    assert f"{codes.REGION.meaning}: drawn on image 3 of series 1." in told
    assert f"{codes.REGION_VOLUME.meaning}: " in told
    assert "POLY" not in told


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
        "Source",
    ]
    told = " ".join(item.TextValue for item in items(ds) if item.ValueType == "TEXT")
    assert told.count("Algorithm Name: chest-fusion. Algorithm Version: 0.1.0.") == told.count("Algorithm Version") == 1


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
