"""Regions as the archive gets them: report, segmentation and map agree with the lesion that was painted, within a voxel."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import cast

import highdicom as hd
import numpy as np
import pytest
from highdicom.spatial import ImageToReferenceTransformer
from numpy.typing import NDArray
from pydicom import Dataset, dcmread

from tests import factories, located, reports
from tests.conftest import Captured
from tests.unit.test_sr import items, named
from worker.domain import Document, Region, Series, Volume
from worker.imaging import volume
from worker.imaging.decoding import DecoderPool
from worker.regions import Place
from worker.report import codes, evidence, fhir, forms
from worker.report.result import Result
from worker.report.seg import segment_of

KINDS = ("seg", "map")
RADIUS_MM = 5.0
OBLIQUE = (0.8, 0.6, 0.0, 0.0, 0.0, -1.0)


def _of_ct(folder: Path, orientation: tuple[float, ...] = (1, 0, 0, 0, 1, 0)) -> Series:
    return factories.spool(factories.make_ct(slices=10, orientation=orientation)[::-1], folder)


SERIES: dict[str, Callable[[Path], Series]] = {
    "axial": _of_ct,
    "sagittal": lambda folder: _of_ct(folder, (0, 1, 0, 0, 0, -1)),
    "oblique": lambda folder: _of_ct(folder, OBLIQUE),
    "tilted": lambda folder: factories.spool(factories.make_tilted_ct(degrees=12, lesions_mm=[(0, 0, 20)]), folder),
    "enhanced": lambda folder: factories.spool([factories.make_enhanced(factories.make_ct(slices=10, orientation=OBLIQUE)[::-1])], folder),
}


class Case:
    """One series with a lesion at known mm, and every document that is made of it."""

    def __init__(self, kind: str, folder: Path, pool: DecoderPool) -> None:
        self.series = SERIES[kind](folder)
        self.image: Volume = volume.load(self.series, kind="volume", pool=pool, gantry_tilt="correct")
        assert self.image.affine is not None
        middle = np.array(self.image.array.shape[::-1]) // 2 + (2, -1, 0)
        self.lesion = (self.image.affine @ np.append(middle, 1.0))[:3]
        finding = located.finding_at(located.painted(self.image, self.lesion, RADIUS_MM), located.place_of(self.image))
        self.region: Region = finding.regions[0]
        self.result: Result = located.result_with(self.series, [finding])
        self.documents = forms.author(self.result, KINDS)
        self.seg, self.map, self.sr = (dcmread(BytesIO(one.data)) for one in self.documents)

    def near(self, center: NDArray[np.float64]) -> None:
        """Assert that `center` is the lesion's, within a voxel."""
        assert np.abs(np.asarray(center) - self.lesion).max() < max(self.image.spacing_mm)


@pytest.fixture(scope="module", params=SERIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pool: DecoderPool) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param), pool)


def segment_mm(seg: Dataset) -> tuple[NDArray[np.float64], float]:
    """The voxels (N, 3) of a segmentation's only segment, LPS mm, and their volume, from its bits and functional groups alone."""
    shared = seg.SharedFunctionalGroupsSequence[0]
    along, down = np.reshape([float(x) for x in shared.PlaneOrientationSequence[0].ImageOrientationPatient], (2, 3))
    row_mm, column_mm = (float(mm) for mm in shared.PixelMeasuresSequence[0].PixelSpacing)
    bits = np.unpackbits(np.frombuffer(seg.PixelData, np.uint8), bitorder="little")
    frames = bits[: seg.NumberOfFrames * seg.Rows * seg.Columns].reshape(seg.NumberOfFrames, seg.Rows, seg.Columns)
    found = []
    for frame, groups in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        rows, columns = np.nonzero(frame)
        start = np.array([float(x) for x in groups.PlanePositionSequence[0].ImagePositionPatient])
        found.append(start + np.outer(columns * column_mm, along) + np.outer(rows * row_mm, down))
    step_mm = float(shared.PixelMeasuresSequence[0].SpacingBetweenSlices)
    return np.concatenate(found), len(np.concatenate(found)) * row_mm * column_mm * step_mm


def test_the_segmentation_lies_on_the_lesion_for_each_reader(case: Case) -> None:
    """By its bits and attributes alone, and by highdicom's own geometry: the same voxels, those of the region."""
    voxels, volume_mm3 = segment_mm(case.seg)
    expected = located.voxels_mm(case.region)
    np.testing.assert_allclose(voxels[np.lexsort(voxels.round(2).T)], expected[np.lexsort(expected.round(2).T)], atol=1e-3)
    case.near(voxels.mean(axis=0))
    assert volume_mm3 == pytest.approx(case.region.volume_mm3, rel=1e-4)
    read = hd.seg.segread(BytesIO(case.documents[0].data)).get_volume(combine_segments=True)
    inside = np.argwhere(read.array > 0)
    case.near((read.affine @ np.append(inside.mean(axis=0), 1.0))[:3])
    assert len(inside) == case.region.mask.sum()


def test_only_frames_that_contain_something_are_written_and_each_names_its_image(case: Case) -> None:
    """The viewer puts a frame onto the image it names; pixels of a tilted gantry were moved, and no image has them where they are."""
    planes = sorted({case.region.origin[0] + k for k in np.argwhere(case.region.mask)[:, 0]})
    assert case.seg.NumberOfFrames == len(planes)
    named_by = []
    for groups in case.seg.PerFrameFunctionalGroupsSequence:
        (source,) = groups.DerivationImageSequence[0].SourceImageSequence
        named_by.append((source.ReferencedSOPInstanceUID, int(source.get("ReferencedFrameNumber", 1))))
        is_moved = case.region.shape[1:] != case.image.array.shape[1:] or (case.seg.Rows, case.seg.Columns) != _size(case.series)
        assert source.get("SpatialLocationsPreserved") == ("NO" if is_moved else "YES")
    wanted = [(case.region.sop_instance_uids[k], case.region.frame_numbers[k]) for k in planes]
    assert sorted(named_by) == sorted(wanted)


def _size(series: Series) -> tuple[int, int]:
    ds = dcmread(series.instances[0].path, stop_before_pixels=True)
    return ds.Rows, ds.Columns


def test_the_report_says_where_in_image_and_patient_coordinates(case: Case) -> None:
    """Center, outline on the key image and in the patient, volume and area: all of the one region, within a voxel of the lesion."""
    (center,) = [one for one in named(case.sr, codes.REGION_CENTRE) if one.ValueType == "SCOORD3D"]
    assert center.ReferencedFrameOfReferenceUID == case.seg.FrameOfReferenceUID
    case.near(np.array(center.GraphicData))
    flat, _, solid = named(case.sr, codes.REGION)
    assert (flat.ValueType, flat.GraphicType, solid.ValueType, solid.GraphicType) == ("SCOORD", "POLYLINE", "SCOORD3D", "POLYGON")
    curve = np.reshape(np.array(solid.GraphicData, float), (-1, 3))
    pixels = np.reshape(np.array(flat.GraphicData, float), (-1, 2))
    assert (pixels[0] == pixels[-1]).all()
    reference = flat.ContentSequence[0].ReferencedSOPSequence[0]
    source = dcmread(case.result.source.paths[reference.ReferencedSOPInstanceUID], stop_before_pixels=True)
    transform = ImageToReferenceTransformer.for_image(source, frame_number=reference.get("ReferencedFrameNumber"))
    np.testing.assert_allclose(transform(pixels), curve, atol=0.05)  # of tilted slices the positions are even to 0.1 mm
    on_key = located.voxels_mm(case.region)[np.argwhere(case.region.mask)[:, 0] + case.region.origin[0] == case.region.key_plane]
    assert np.abs((curve.min(0) + curve.max(0)) / 2 - (on_key.min(0) + on_key.max(0)) / 2).max() < 0.6
    (number,) = named(case.sr, codes.REGION_VOLUME)
    assert float(number.MeasuredValueSequence[0].NumericValue) == pytest.approx(case.region.volume_mm3, rel=1e-3)
    assert float(number.MeasuredValueSequence[0].NumericValue) == pytest.approx(4 / 3 * np.pi * RADIUS_MM**3, rel=0.25)


def test_report_and_segmentation_name_each_other(case: Case) -> None:
    """The group shows the segment; its tracking UID and identifier are the group's; the segmentation is evidence."""
    (shown,) = [one for one in named(case.sr, codes.REGION) if one.ValueType == "IMAGE"]
    segment = shown.ReferencedSOPSequence[0]
    assert (segment.ReferencedSOPInstanceUID, segment.ReferencedSegmentNumber) == (case.seg.SOPInstanceUID, 1)
    group = next(one for one in items(case.sr) if shown in (one.get("ContentSequence") or ()))
    said = {one.ConceptNameCodeSequence[0].CodeValue: one for one in group.ContentSequence}
    described = case.seg.SegmentSequence[0]
    assert (said["112039"].TextValue, said["112040"].UID) == (described.TrackingID, described.TrackingUID)
    evidence = {
        one.ReferencedSOPInstanceUID
        for study in case.sr.CurrentRequestedProcedureEvidenceSequence
        for series in study.ReferencedSeriesSequence
        for one in series.ReferencedSOPSequence
    }
    assert {case.seg.SOPInstanceUID, case.map.SOPInstanceUID} <= evidence


def test_every_group_has_coordinates_and_those_with_a_place_come_first(case: Case) -> None:
    """A viewer opens the first group, and shows nothing at all where one has none: the others name the corners of the key image."""
    groups = [one for one in items(case.sr) if one.ConceptNameCodeSequence[0].CodeValue == "125007"]
    assert len(groups) == 4  # two findings, two times at which blood was drawn
    drawn = [next(one for one in group.ContentSequence if one.ValueType == "SCOORD") for group in groups]
    assert [one.ConceptNameCodeSequence[0].CodeValue for one in drawn] == ["saliency-region", *["whole-image"] * 3]
    assert len({str(one.ContentSequence[0].ReferencedSOPSequence[0]) for one in drawn}) == 1
    assert len(drawn[0].GraphicData) > 10  # of four or five points OHIF makes a rectangle of its own


def test_the_map_has_its_peak_on_the_lesion(case: Case) -> None:
    """On its own grid, in the frame of reference of the images; stored are thousandths."""
    assert case.map.FrameOfReferenceUID == case.seg.FrameOfReferenceUID
    stored = np.frombuffer(case.map.PixelData, "<u2").reshape(case.map.NumberOfFrames, case.map.Rows, case.map.Columns)
    frame, row, column = np.unravel_index(stored.argmax(), stored.shape)
    shared = case.map.SharedFunctionalGroupsSequence[0]
    along, down = np.reshape([float(x) for x in shared.PlaneOrientationSequence[0].ImageOrientationPatient], (2, 3))
    row_mm, column_mm = (float(mm) for mm in shared.PixelMeasuresSequence[0].PixelSpacing)
    start = case.map.PerFrameFunctionalGroupsSequence[int(frame)].PlanePositionSequence[0].ImagePositionPatient
    case.near(np.array([float(x) for x in start]) + column * column_mm * along + row * row_mm * down)
    assert stored.max() == 1000


def test_the_observation_of_the_record_says_the_same_center_and_volume(case: Case) -> None:
    """FHIR, SR and SEG are of one region: their numbers may be rounded, not other."""
    (document,) = fhir.build(case.result)
    found = next(
        one["resource"]["component"]
        for one in json.loads(document.data)["entry"]
        if "region" in json.dumps(one["resource"].get("component"))
    )
    said = {one["code"]["coding"][0]["code"]: one["valueQuantity"]["value"] for one in found if "valueQuantity" in one}
    case.near(np.array([said[f"{codes.REGION_CENTRE.value}-{axis}"] for axis in "xyz"]))
    assert said[codes.REGION_VOLUME.value] == pytest.approx(segment_mm(case.seg)[1], rel=1e-3)


def test_the_same_result_gives_the_same_bytes(case: Case) -> None:
    """No clock, no chance: a job that runs twice writes the same objects."""
    assert forms.author(case.result, KINDS) == case.documents


def test_codes_and_words_never_call_the_region_a_lesion(case: Case) -> None:
    """It is what the answer rests on; nobody outlined anything."""
    described = case.seg.SegmentSequence[0]
    assert described.SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator == "99SYNOPTIC"
    assert described.SegmentLabel == "Pneumonia 73.21 %, saliency"
    assert "not an outlined lesion" in named(case.sr, codes.REGION)[0].ConceptNameCodeSequence[0].CodeMeaning
    assert not {"Volume", "Area", "Image Region"} & {one.ConceptNameCodeSequence[0].CodeMeaning for one in items(case.sr)}


# --- validators


@pytest.fixture
def validate(shared: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """dciodvfy, dcentvfy with the sources, dcmdump of each object; srgate of the report, with PixelMed."""
    if missing := [tool for tool in ("dciodvfy", "dcentvfy", "dsrdump", "dcmdump", "java") if shutil.which(tool) is None]:
        pytest.skip(f"validators not installed: {', '.join(missing)}")
    spec = importlib.util.spec_from_file_location("srgate", shared / "tools" / "srgate.py")
    assert spec is not None
    assert spec.loader is not None
    srgate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(srgate)

    def run(*command: str | Path) -> list[str]:
        done = subprocess.run(list(map(str, command)), capture_output=True, check=False)
        lines = (done.stdout + done.stderr).decode(errors="replace").splitlines()
        return [] if done.returncode == 0 else [f"{command[0]}: {line}" for line in lines]

    def findings(documents: Sequence[Document], sources: Sequence[Path], *, java: bool) -> list[str]:
        said, paths = [], []
        for number, one in enumerate(documents):
            path = tmp_path / f"result{number}.dcm"
            path.write_bytes(one.data)
            paths.append(path)
            said += [*run("dciodvfy", "-new", path), *run("dcmdump", "+E", path)]
        said += run("dcentvfy", *sources, *paths)
        told = cast("list[tuple[str, str]]", srgate.validate(str(paths[-1]), [str(source) for source in sources[:2]], java))
        return said + [f"{tool}: {line}" for tool, line in told]

    return findings


@pytest.mark.peer
@pytest.mark.slow
def test_no_validator_has_a_finding(case: Case, validate: Callable[..., list[str]]) -> None:
    """Segmentation, map and report, each and together with the images they are of; PixelMed once, for its seconds."""
    java = case.seg.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient == [1, 0, 0, 0, 1, 0]
    assert validate(case.documents, [one.path for one in case.series.instances], java=java) == []


@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.parametrize("modality", ["DX", "CR"])
def test_a_radiograph_has_its_region_in_pixels(modality: str, tmp_path: Path, validate: Callable[..., list[str]]) -> None:
    """No patient coordinates: the outline on it and an area; no map, nor a segmentation, at which a common viewer's page goes black."""
    series = located.film(tmp_path, modality=modality)
    where = located.painted_on_film((96, 80), (40, 30), 12)
    uid = series.instances[0].sop_instance_uid
    finding = located.finding_at(where, Place((96, 80), None, (uid,), (1,)))
    documents = forms.author(located.result_with(series, [finding]), KINDS)
    assert [one.kind for one in documents] == ["sr"]
    sr = dcmread(BytesIO(documents[0].data))
    found = finding.regions[0]
    (flat,) = named(sr, codes.REGION)
    pixels = np.reshape(np.array(flat.GraphicData, float), (-1, 2))
    assert np.abs((pixels.min(0) + pixels.max(0)) / 2 - 0.5 - np.array([30, 40])).max() < 3.5  # a pixel of the network is three of the film
    (area,) = named(sr, codes.REGION_AREA)
    assert float(area.MeasuredValueSequence[0].NumericValue) == pytest.approx(found.mask.sum() * 0.15**2, rel=1e-3)
    assert validate(documents, [series.instances[0].path], java=False) == []


def test_each_region_of_an_image_is_a_segment_of_its_own(tmp_path: Path, pool: DecoderPool) -> None:
    """Two findings, one behind the other and overlapping: two segments, each with the tracking UID of its group."""
    series = _of_ct(tmp_path)
    image = volume.load(series, kind="volume", pool=pool)
    assert image.affine is not None
    first, second = ((image.affine @ np.array([26.0, 19.0, k, 1.0]))[:3] for k in (4.0, 6.0))
    effusion = replace(reports.FINDINGS[1], verdict="uncertain")
    findings = [
        located.finding_at(located.painted(image, lesion, RADIUS_MM), located.place_of(image), base)
        for lesion, base in ((first, reports.FINDINGS[0]), (second, effusion))
    ]
    result = reports.result([one.path for one in series.instances], findings=findings)
    seg, _, _, sr = (dcmread(BytesIO(one.data)) for one in forms.author(result, KINDS))
    assert (seg.SegmentsOverlap, [one.SegmentNumber for one in seg.SegmentSequence]) == ("YES", [1, 2])
    assert [one.UID for one in items(sr) if one.ConceptNameCodeSequence[0].CodeValue == "112040"][:2] == [
        one.TrackingUID for one in seg.SegmentSequence
    ]
    numbers = [one.ReferencedSOPSequence[0].ReferencedSegmentNumber for one in named(sr, codes.REGION) if one.ValueType == "IMAGE"]
    assert numbers == [1, 2]
    read = hd.seg.Segmentation.from_dataset(seg).get_volume()
    for number, finding in enumerate(findings):
        assert read.array[..., number].sum() == finding.regions[0].mask.sum()


def test_regions_too_large_for_one_object_are_written_in_several(tmp_path: Path) -> None:
    """Ten findings that rest on most of a large CT would be gigabytes at once: the report names the object and the segment of each."""
    large = Region(np.ones((600, 1, 1), np.bool_), (0, 0, 0), (600, 512, 512), np.eye(4), "image", ("1.2",) * 600, tuple(range(1, 601)))
    small = replace(large, mask=np.ones((2, 1, 1), np.bool_))
    regions = (large, replace(large), small, replace(small), replace(small, image="other"))
    findings = [replace(reports.FINDINGS[0], regions=(one,)) for one in regions]
    result = reports.result([reports.radiograph(tmp_path)], findings=findings)
    named_by = [segment_of(result, one) for one in regions]
    assert [number for _, number in named_by] == [1, 1, 1, 2, 1]
    assert len({uid for uid, _ in named_by}) == 4


def test_a_clip_has_its_region_on_the_frame_that_has_most_of_it(case: Case) -> None:
    """Frames without a place: the outline names the frame; no segmentation, no map, no millimeters."""
    found = replace(case.region, affine=None)
    finding = replace(case.result.findings[0], regions=(found,))
    (only,) = forms.author(located.result_with(case.series, [finding]), KINDS)
    ds = dcmread(BytesIO(only.data))
    (flat,) = named(ds, codes.REGION)
    reference = flat.ContentSequence[0].ReferencedSOPSequence[0]
    key = found.sop_instance_uids[found.key_plane], found.frame_numbers[found.key_plane]
    assert (reference.ReferencedSOPInstanceUID, reference.get("ReferencedFrameNumber", 1)) == key
    assert not [*named(ds, codes.REGION_VOLUME), *named(ds, codes.REGION_CENTRE)]


def test_without_a_frame_of_reference_there_is_the_outline_on_the_image_alone(tmp_path: Path, pool: DecoderPool) -> None:
    """Coordinates of nobody knows which frame are no place for another object; the planes of a tilted gantry are found all the same."""
    datasets = factories.make_tilted_ct(degrees=12, lesions_mm=[(0, 0, 20)])
    for ds in datasets:
        del ds.FrameOfReferenceUID
    series = factories.spool(datasets, tmp_path)
    image = volume.load(series, kind="volume", pool=pool, gantry_tilt="correct")
    finding = located.finding_at(located.painted(image, (0, 0, 20), RADIUS_MM), located.place_of(image))
    (only,) = forms.author(located.result_with(series, [finding]), KINDS)
    (flat,) = named(dcmread(BytesIO(only.data)), codes.REGION)
    assert flat.ValueType == "SCOORD"
    column, row = np.reshape(np.array(flat.GraphicData, float), (-1, 2)).mean(axis=0)
    assert (column, row) == pytest.approx((40.5, 48.5), abs=2)  # the gantry turns about the middle of the image, where the lesion is


def test_a_place_that_cannot_be_told_does_not_cost_the_report(tmp_path: Path, pool: DecoderPool, captured: Captured) -> None:
    """The finding stands without: an image that went away in between is no reason to be silent."""
    series = _of_ct(tmp_path)
    image = volume.load(series, kind="volume", pool=pool)
    assert image.affine is not None
    lesion = (image.affine @ np.array([26.0, 19.0, 5.0, 1.0]))[:3]
    result = located.result_with(series, [located.finding_at(located.painted(image, lesion, RADIUS_MM), located.place_of(image))])
    for one in series.instances:
        one.path.unlink()
    *lost, root = forms.author(result, KINDS)
    assert [(one.kind, one.data) for one in lost] == [("seg", b""), ("map", b"")]
    ds = dcmread(BytesIO(root.data))
    assert {str(one.SOPInstanceUID) for one in evidence.referred(ds)} == set(result.source.paths)
    assert len(named(ds, codes.PROBABILITY)) == 2
    assert not [one for one in items(ds) if one.ValueType.startswith("SCOORD")]
    assert {one["kind"] for one in captured.named("document.failed")} == {"seg", "map", "places"}


def test_a_result_without_a_region_has_neither_segmentation_nor_map(tmp_path: Path) -> None:
    """Nothing to show is no object, and the report is as it was."""
    example = reports.of_ct(tmp_path)
    assert [one.kind for one in forms.author(reports.result(example.sources), KINDS)] == ["sr"]
