"""Key objects: the slices that mattered, and the note that marks a replaced report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
from pydicom import Dataset, FileDataset, dcmread

from tests import factories, located, reports
from tests.unit.test_gsps import marked, region_of
from worker.domain import Document
from worker.report import forms, keys
from worker.report.result import Result

COMPANIONS = ("seg", "map", "gsps", "keys", "basic", "rejection")


def read(documents: Sequence[Document]) -> list[FileDataset]:
    return [dcmread(BytesIO(one.data)) for one in documents]


def referred(ds: Dataset) -> list[tuple[str, list[int]]]:
    """What a selection selects: instance, and frames."""
    found = []
    for item in ds.ContentSequence:
        for reference in item.get("ReferencedSOPSequence") or ():
            frames = reference.get("ReferencedFrameNumber") or []
            found.append((reference.ReferencedSOPInstanceUID, [frames] if isinstance(frames, int) else list(frames)))
    return found


def evidence(ds: Dataset) -> set[str]:
    return {
        one.ReferencedSOPInstanceUID
        for study in ds.CurrentRequestedProcedureEvidenceSequence
        for series in study.ReferencedSeriesSequence
        for one in series.ReferencedSOPSequence
    }


def title(ds: Dataset) -> str:
    return str(ds.ConceptNameCodeSequence[0].CodeValue)


def description(ds: Dataset) -> str:
    return str(next(item.TextValue for item in ds.ContentSequence if item.ConceptNameCodeSequence[0].CodeValue == "113012"))


def two_findings(folder: Path) -> Result:
    """A CT of 6 slices; the first finding is most of slice 3, the second all of slice 5."""
    series = factories.spool(factories.make_ct(slices=6), folder)
    first, second = np.zeros((2, 6, 40, 48), bool)
    first[1:4, 10:12, 10:12] = True
    first[2, 10:20, 10:20] = True
    second[4, 5:9, 5:9] = True
    affine = factories.known_affine()
    return marked(series, region_of(first, series, affine=affine), region_of(second, series, affine=affine))


def renewed(result: Result, root: Document, **changes: object) -> Result:
    """The same images analysed once more, after `root`."""
    algorithm = replace(result.algorithm, input_sha256="01" * 32, **changes)  # type: ignore[arg-type]
    return reports.result(
        list(result.source.paths.values()),
        study=replace(result.study, version=result.study.version + 1),
        inputs=result.inputs,
        findings=result.findings,
        algorithm=algorithm,
        predecessor=root,
    )


def test_of_each_finding_the_slice_with_most_of_it_is_selected_and_said_in_words(tmp_path: Path) -> None:
    """A radiologist opens two slices, not sixty."""
    result = two_findings(tmp_path)
    (ds,) = read(keys.build(result))
    uids = result.findings[0].regions[0].sop_instance_uids
    assert title(ds) == "113000"
    assert referred(ds) == [(uids[2], []), (uids[4], [])]
    assert evidence(ds) == {uids[2], uids[4]}
    assert description(ds) == (
        "Pneumonia: positive, 73.21 % (research): most of it in image 3 of series 1. "
        "Pleural effusion: negative, 3.1 % (research): most of it in image 5 of series 1."
    )
    assert "ConceptNameCodeSequence" not in next(item for item in ds.ContentSequence if item.ValueType == "IMAGE")  # TID 2010


def test_of_an_object_with_many_frames_the_frames_are_selected(tmp_path: Path) -> None:
    """The object itself would select all."""
    series = factories.spool([factories.make_enhanced(factories.make_ct(slices=6))], tmp_path)
    first, second = np.zeros((2, 6, 40, 48), bool)
    first[0, 10:20, 10:20] = second[4, 5:9, 5:9] = True
    made = [region_of(mask, series, affine=factories.known_affine(), frames=6) for mask in (first, second)]
    (ds,) = read(keys.build(marked(series, *made)))
    assert referred(ds) == [(series.instances[0].sop_instance_uid, [1, 5])]
    assert "in frame 1 of image 1 of series 1" in description(ds)


def test_without_a_region_nothing_is_selected(tmp_path: Path) -> None:
    """Silence: a selection must select something."""
    assert keys.build(marked(located.film(tmp_path))) == ()


def test_a_first_report_rejects_nothing(tmp_path: Path) -> None:
    """And neither does one that is made again."""
    result = two_findings(tmp_path)
    *_, root = forms.author(result, ())
    assert keys.reject(result) == ()
    again = reports.result(list(result.source.paths.values()), inputs=result.inputs, findings=result.findings, predecessor=root)
    assert keys.reject(again) == ()


def test_a_note_marks_the_replaced_report_and_all_that_was_made_with_it_but_no_older_note(tmp_path: Path) -> None:
    """IHE RAD-66: what is hidden is hidden whole; the note that hides the report before stays in force. Images are never marked."""
    first = two_findings(tmp_path)
    made = forms.author(first, COMPANIONS)
    second = renewed(first, made[-1])
    made_next = forms.author(second, COMPANIONS)
    (note,) = read([one for one in made_next if one.kind == "rejection"])
    assert (title(note), note.SeriesDescription) == ("113001", "AI chest-fusion 0.1.0 outdated #2: research, not for diagnosis")
    marked_uids = {uid for uid, _ in referred(note)}
    assert marked_uids == {one.sop_instance_uid for one in made} == evidence(note)
    assert description(note).startswith("Outdated: a new report replaces the report of 2026-11-21 02:02 +0100, because ")
    third = renewed(second, made_next[-1])
    (last,) = read(keys.reject(third))
    assert {uid for uid, _ in referred(last)} == {one.sop_instance_uid for one in made_next if one.kind != "rejection"}
