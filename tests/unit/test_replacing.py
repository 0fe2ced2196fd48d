"""What a new report says of the old one: when that was, and why it does not stand any more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests import factories, reports
from tests.reports import ALGORITHM, INPUTS
from tests.unit.test_sr import named
from worker.domain import Document, Inputs
from worker.report import codes, page, replacing, sr
from worker.report.result import Result

CRP, LDH, *_ = INPUTS.values


def after(sources: list[Path], first: Document, **changes: object) -> Result:
    """The result that replaces `first`."""
    algorithm = replace(changes.pop("algorithm", ALGORITHM), input_sha256="01" * 32)  # type: ignore[type-var]
    return reports.result(sources, algorithm=algorithm, predecessor=first, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        (replace(INPUTS, values=(replace(CRP, value=50.0), *INPUTS.values[1:])), CRP.code.meaning),
        (replace(INPUTS, values=(replace(CRP, comparator=""), *INPUTS.values[1:])), CRP.code.meaning),
        (replace(INPUTS, values=(replace(CRP, at=CRP.at.replace(hour=4)), *INPUTS.values[1:])), CRP.code.meaning),
        (replace(INPUTS, values=INPUTS.values[1:]), CRP.code.meaning),
        (replace(INPUTS, texts=()), "History and physical note"),
    ],
    ids=["value", "comparator", "time", "withdrawn", "text"],
)
def test_a_changed_record_is_named_by_what_changed_in_it(inputs: Inputs, names: str, tmp_path: Path) -> None:
    """The value itself stands in each report; of a text, neither."""
    source = reports.radiograph(tmp_path)
    said = replacing.sentence(after([source], reports.report([source]).document, inputs=inputs))
    assert said == f"Replaces the report of 2026-11-21 02:02 +0100, because the patient's record changed ({names})."
    assert reports.SECRET not in said


def test_what_changed_most_is_named_and_the_rest_counted(tmp_path: Path) -> None:
    """A sentence stays one."""
    source = reports.radiograph(tmp_path)
    values = tuple(replace(CRP, code=replace(CRP.code, value=f"{n}-0", meaning=f"Value {n}")) for n in range(7))
    first = reports.report([source], inputs=replace(INPUTS, values=values)).document
    changed = tuple(replace(one, value=1.0) for one in values)
    said = replacing.sentence(after([source], first, inputs=replace(INPUTS, values=changed)))
    assert "changed (Value 0, Value 1, Value 2, Value 3 and 3 more)." in said


@pytest.mark.parametrize(
    ("before", "now", "words"), [(3, 5, "2 images came"), (5, 4, "1 image that it was made from is not used any more")]
)
def test_a_late_series_is_counted(before: int, now: int, words: str, tmp_path: Path) -> None:
    """Late images are the commonest reason."""
    paths = [one.path for one in factories.spool(factories.make_ct(slices=5), tmp_path).instances]
    assert f"because {words}." in replacing.sentence(after(paths[:now], reports.report(paths[:before]).document))


@pytest.mark.parametrize(("version", "words"), [("0.2.0", "version 0.2.0 now, not 0.1.0"), ("0.1.0", "version 0.1.0 now, another build")])
def test_a_new_model_is_named_by_its_version(version: str, words: str, tmp_path: Path) -> None:
    """Numbers changed though nothing of the patient did: that must not be taken for a course."""
    source = reports.radiograph(tmp_path)
    result = after([source], reports.report([source]).document, algorithm=replace(ALGORITHM, version=version, bundle_sha256="99" * 32))
    assert f"because the algorithm is {words}." in replacing.sentence(result)


@pytest.mark.parametrize("is_failure", [True, False])
def test_that_it_can_be_analysed_now_or_not_any_more_is_said(is_failure: bool, tmp_path: Path) -> None:
    """A failure is a report that may be replaced, too."""
    source = reports.radiograph(tmp_path)
    failed: dict[str, object] = {"failure": "no slice fits", "findings": (), "inputs": None}
    first = reports.report([source], **({} if is_failure else failed)).document
    said = replacing.sentence(after([source], first, **(failed if is_failure else {})))
    assert ("it cannot be analysed any more" if is_failure else "it could be analysed now") in said


def test_several_reasons_are_all_said(tmp_path: Path) -> None:
    paths = [one.path for one in factories.spool(factories.make_ct(slices=5), tmp_path).instances]
    changed = replace(INPUTS, values=(CRP, replace(LDH, value=1.0)))
    result = after(paths, reports.report(paths[:4], inputs=replace(INPUTS, values=(CRP, LDH))).document, inputs=changed)
    assert "because 1 image came; the patient's record changed (Lactate dehydrogenase" in replacing.sentence(result)


def test_what_is_not_seen_in_the_reports_is_not_made_up(tmp_path: Path) -> None:
    """The same images with other bytes, say."""
    source = reports.radiograph(tmp_path)
    said = replacing.sentence(after([source], reports.report([source]).document))
    assert said.endswith("because what it was made from changed.")


def test_a_first_report_replaces_none_and_says_so_by_silence(tmp_path: Path) -> None:
    source = reports.radiograph(tmp_path)
    assert replacing.sentence(reports.result([source])) == ""
    assert not named(reports.report([source]).ds, codes.REPLACES)


def test_the_new_report_says_it_in_a_series_that_viewers_tell_from_the_old(tmp_path: Path) -> None:
    """Predecessor Documents Sequence is what no viewer shows; series and their descriptions all do."""
    source = reports.radiograph(tmp_path)
    first = reports.report([source])
    study = reports.study_of(source, version=2)
    second = reports.Example(sr.build(after([source], first.document, study=study)), first.sources).ds
    (item,) = named(second, codes.REPLACES)
    assert item.TextValue.startswith("Replaces the report of 2026-11-21 02:02 +0100, because ")
    assert page.said(after([source], first.document), None)["notes"] == [item.TextValue]
    assert second.SeriesInstanceUID != first.ds.SeriesInstanceUID
    assert first.ds.SeriesDescription == "AI chest-fusion 0.1.0: research, not for diagnosis"
    assert second.SeriesDescription == "AI chest-fusion 0.1.0 #2: research, not for diagnosis"
    assert (first.ds.InstanceNumber, second.InstanceNumber) == (1, 2)
    (old,) = second.PredecessorDocumentsSequence[0].ReferencedSeriesSequence
    assert (old.SeriesInstanceUID, old.ReferencedSOPSequence[0].ReferencedSOPInstanceUID) == (
        first.ds.SeriesInstanceUID,
        first.ds.SOPInstanceUID,
    )
