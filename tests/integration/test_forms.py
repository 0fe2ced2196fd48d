"""All DICOM forms of one result together: they say the same, and no validator has a finding in any of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import Dataset, FileDataset, dcmread

from tests import factories, located, peers
from tests.unit.test_gsps import marked, region_of
from tests.unit.test_keys import COMPANIONS, renewed, two_findings
from tests.unit.test_sr import items
from worker.deliver import cstore
from worker.domain import Code, Document, Finding
from worker.report import codes, forms
from worker.report.content import percent, tracking_uid
from worker.report.result import Result

PIXELMED = "/usr/share/java/pixelmed.jar"
#: What validators say of all that is right: see STANDARDS.md §8.
NOISE = (
    r"Unrecognized defined term = <99",
    r"DeviceUID.*not present in standard DICOM IOD",
    r"Different information entities for attribute - Element=<AccessionNumber>",
)


def by_kind(documents: Sequence[Document]) -> dict[str, FileDataset]:
    return {one.kind: dcmread(BytesIO(one.data)) for one in documents}


# --- agreement


@dataclass(frozen=True)
class Said:
    """What one form says of one finding."""

    name: str
    percent: float
    verdict: str


def of_groups(ds: Dataset) -> dict[str, Said]:
    """By tracking UID: what the measurement groups of the root say."""
    found = {}
    for group in items(ds):
        said = {item.ConceptNameCodeSequence[0].CodeValue: item for item in group.get("ContentSequence") or ()}
        if codes.PROBABILITY.value in said:
            value = said[codes.PROBABILITY.value].MeasuredValueSequence[0].NumericValue
            verdict = next(
                v for v, code in codes.VERDICTS.items() if code.value == said[codes.VERDICT.value].ConceptCodeSequence[0].CodeValue
            )
            found[said["112040"].UID] = Said(said["121071"].ConceptCodeSequence[0].CodeMeaning, float(value), verdict)
    return found


def of_text(ds: Dataset) -> dict[str, Said]:
    """By tracking UID: what the paragraphs of the text say."""
    found, verdicts = {}, {code.meaning: verdict for verdict, code in codes.VERDICTS.items()}
    for group in items(ds):
        said = {item.ConceptNameCodeSequence[0].CodeValue: item for item in group.get("ContentSequence") or ()}
        paragraph = said["121111"].TextValue if {"112040", "121111"} <= said.keys() else ""
        if read := re.search(r"\bProbability: ([0-9.]+) %\..* Verdict at the operating threshold: (\w+)\.", paragraph):
            found[said["112040"].UID] = Said(group.ConceptNameCodeSequence[0].CodeMeaning, float(read[1]), verdicts[read[2]])
    return found


def of_words(text: str) -> Said:
    """Of "Pneumonia: positive, 73.21 % (research)"."""
    read = re.fullmatch(r"(.*): (positive|negative|uncertain), ([0-9.]+) % \((?:research|not verified)\)", text)
    assert read is not None, text
    return Said(codes.short(read[1]), float(read[3]), read[2])


def of_state(ds: Dataset) -> dict[str, Said]:
    """By tracking UID: what is written on the images."""
    texts = [text for annotation in ds.GraphicAnnotationSequence for text in annotation.TextObjectSequence]
    return {text.TrackingUID: of_words(text.UnformattedTextValue) for text in texts}


NAMES = st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="\\"), min_size=1, max_size=40).map(str.strip)
FINDINGS = st.lists(
    st.tuples(NAMES.filter(bool), st.floats(0, 1), st.sampled_from(("positive", "negative", "uncertain")), st.booleans()),
    min_size=1,
    max_size=4,
)


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(FINDINGS)
def test_all_forms_say_the_same_findings_verdicts_and_probabilities_under_the_same_tracking_uids(
    tmp_path: Path, drawn: list[tuple[str, float, str, bool]]
) -> None:
    """Whichever of them a viewer shows, it shows the same answer. Where a form has a finding at all it is the root's."""
    series = factories.spool(factories.make_ct(slices=4, rows=24, columns=24), tmp_path)
    mask = np.zeros((4, 24, 24), bool)
    mask[1:3, 4:9, 5:12] = True
    region = region_of(mask, series, affine=factories.known_affine())
    findings = [
        Finding(f"f{n}", Code(f"{n}", "SCT", name), probability, 0.5, verdict, regions=(region,) if has_region else ())  # type: ignore[arg-type]
        for n, (name, probability, verdict, has_region) in enumerate(drawn)
    ]
    result = marked(series, findings=findings)
    made = by_kind(forms.author(result, COMPANIONS))
    root = of_groups(made["sr"])
    assert sorted((one.percent, one.verdict) for one in root.values()) == sorted((percent(f.probability), f.verdict) for f in findings)
    assert of_text(made["basic"]) == root
    uids = {tracking_uid(result.study, result.algorithm, finding) for finding in findings if finding.regions}
    with_region = {uid: said for uid, said in root.items() if uid in uids}
    assert ("gsps" in made) == ("keys" in made) == ("seg" in made) == bool(with_region)
    if with_region:
        assert of_state(made["gsps"]) == with_region
        assert {one.TrackingUID for one in made["seg"].SegmentSequence} == set(with_region)
        description = made["keys"].ContentSequence[-2].TextValue
        assert all(f": {one.verdict}, {one.percent:g} % (" in description for one in with_region.values())


# --- validators


def tools(*names: str) -> None:
    """Skip on a laptop, fail in CI, where a validator is missing."""
    missing = [name for name in names if shutil.which(name) is None] + ([] if Path(PIXELMED).exists() else [PIXELMED])
    if missing and os.environ.get("CI"):
        pytest.fail(f"validators not installed: {', '.join(missing)}")
    if missing:
        pytest.skip(f"validators not installed: {', '.join(missing)}")


def findings_of(*command: str | Path) -> list[str]:
    """What a validator says that is no noise; what it is and what it looks at, it says without a level."""
    done = subprocess.run(list(map(str, command)), capture_output=True, check=False)
    lines = (done.stdout + done.stderr).decode(errors="replace").splitlines()
    found = [line for line in lines if re.match(r"(Error|Warning|Abort|[EF]: )", line) and not any(re.search(one, line) for one in NOISE)]
    return [f"{command[0]}: {line}" for line in found] or ([] if done.returncode == 0 else [f"{command[0]}: exit {done.returncode}"])


def checked(documents: Sequence[Document], sources: Sequence[Path], folder: Path) -> list[str]:
    """Dciodvfy of each, dcentvfy of all with their images, and what there is for its kind."""
    said, paths = [], []
    folder.mkdir(exist_ok=True)
    for number, one in enumerate(documents):
        path = folder / f"{number}-{one.kind}.dcm"
        path.write_bytes(one.data)
        paths.append(path)
        said += findings_of("dciodvfy", "-new", path)
        if one.kind == "gsps":
            said += findings_of("dcmpschk", path)
        if one.kind in {"keys", "rejection", "basic"}:
            said += [*findings_of("dsrdump", path), *findings_of("dsr2html", "+U8", path, folder / "report.html")]
    return said + findings_of("dcentvfy", *sources, *paths)


def of_ct(folder: Path) -> Result:
    return two_findings(folder)


def of_radiograph(folder: Path) -> Result:
    series = located.film(folder)
    mask = np.zeros((1, 96, 80), bool)
    mask[0, 30:40, 50:70] = True
    return marked(series, region_of(mask, series))


def of_enhanced(folder: Path) -> Result:
    series = factories.spool([factories.make_enhanced(factories.make_ct(slices=6))], folder)
    mask = np.zeros((6, 40, 48), bool)
    mask[2:4, 10:20, 10:20] = True
    return marked(series, region_of(mask, series, affine=factories.known_affine(), frames=6))


@pytest.mark.peer
@pytest.mark.parametrize("make", [of_ct, of_radiograph, of_enhanced])
def test_no_validator_has_a_finding_in_any_form_of_a_result_and_of_the_one_that_replaces_it(
    make: Callable[[Path], Result], tmp_path: Path
) -> None:
    """Each object, and all of both versions beside their images in one study."""
    tools("dciodvfy", "dcentvfy", "dcmpschk", "dsrdump", "dsr2html")
    first = make(tmp_path / "images")
    made = forms.author(first, COMPANIONS)
    later = forms.author(renewed(first, made[-1]), COMPANIONS)
    assert {one.kind: one.sop_class_uid for one in [*made, *later]}.items() <= forms.SOP_CLASSES.items()
    assert [one.kind for one in later if one.kind in {"gsps", "keys", "basic", "rejection"}] == ["gsps", "keys", "basic", "rejection"]
    assert checked([*made, *later], list(first.source.paths.values()), tmp_path / "made") == []


@pytest.mark.peer
@pytest.mark.slow
def test_pixelmed_finds_the_template_of_selections_and_nothing_wrong(tmp_path: Path) -> None:
    """TID 2010: of all validators the one that knows templates. Images and other objects are in the selection."""
    tools("java")
    first = two_findings(tmp_path)
    made = forms.author(first, COMPANIONS)
    path = tmp_path / "selection.dcm"
    path.write_bytes(forms.author(renewed(first, made[-1]), ("rejection",))[0].data)
    options = [f"-Djdk.xml.xpath{name}=0" for name in ("ExprGrpLimit", "ExprOpLimit", "TotalOpLimit")]
    command = ["java", "-Xss8m", *options, "-cp", PIXELMED, "com.pixelmed.validate.DicomSRValidator", "-checktemplateid", path]
    done = subprocess.run(list(map(str, command)), capture_output=True, check=False, text=True)
    assert [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("Picked up")] == [
        "Found KeyObjectSelectionDocument IOD",
        "Found Root Template TID_2010 (KeyObjectSelection)",
        "Root Template Validation Complete",
        "IOD validation complete",
    ]


def test_a_failure_has_the_root_the_text_and_the_note_alone(tmp_path: Path) -> None:
    """There is nothing to draw, and what it replaces stands no more."""
    first = of_radiograph(tmp_path)
    made = forms.author(first, COMPANIONS)
    failed = replace(renewed(first, made[-1]), findings=(), inputs=None, failure="No slice fits.")
    assert [one.kind for one in forms.author(failed, COMPANIONS)] == ["basic", "rejection", "sr"]


@pytest.mark.peer
def test_an_archive_takes_every_form_of_both_versions_and_lists_each_in_a_series_of_its_own(tmp_path: Path) -> None:
    """By C-STORE, and found again by C-FIND; what a viewer lists tells the versions apart."""
    first = two_findings(tmp_path / "images")
    made = forms.author(first, COMPANIONS)
    later = forms.author(renewed(first, made[-1]), COMPANIONS)
    (tmp_path / "pacs").mkdir()
    with peers.orthanc(tmp_path / "pacs") as pacs:
        sent = cstore.send([*made, *later], peer=pacs.peer())
        assert [one.error for one in sent] == [None] * len(sent)
        listed = pacs.qidos("series", includefield="0008103E")
    told = sorted((one["00080060"]["Value"][0], one["0008103E"]["Value"][0].partition(":")[0]) for one in listed)
    name = "AI chest-fusion 0.1.0"
    old = [("KO", f"{name} key images"), ("PR", f"{name} outlines"), ("SEG", f"{name} regions"), ("SR", name), ("SR", f"{name} as text")]
    new = [(modality, f"{description} #2") for modality, description in old]
    assert [one for one in told if one[0] != "OT"] == sorted([*old, *new, ("KO", f"{name} outdated #2")])
