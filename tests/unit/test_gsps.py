"""Presentation states: the outline is the region's own, pixel for pixel, and beneath it the image looks as before."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from matplotlib.path import Path as Polygon
from numpy.typing import NDArray
from pydicom import Dataset, FileDataset, dcmread

from tests import factories, located, reports
from tests.integration.test_located import OBLIQUE
from worker.domain import Finding, Region, Series
from worker.imaging import volume
from worker.imaging.decoding import DecoderPool
from worker.report import gsps
from worker.report.result import Result


def region_of(mask: NDArray[np.bool_], series: Series, *, affine: NDArray[np.float64] | None = None, frames: int = 0) -> Region:
    """The region `mask` (K, J, I) of a whole image; of one instance with `frames` frames, or of an instance a plane."""
    k, j, i = np.nonzero(mask)
    low, high = (k.min(), j.min(), i.min()), (k.max() + 1, j.max() + 1, i.max() + 1)
    uids = tuple(one.sop_instance_uid for one in series.instances) * (frames or 1)
    cut = mask[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    origin = (int(low[0]), int(low[1]), int(low[2]))
    return Region(cut, origin, mask.shape, affine, "image", uids, tuple(range(1, frames + 1)) or (1,) * len(uids))


def marked(series: Series, *regions: Region, findings: Sequence[Finding] = reports.FINDINGS) -> Result:
    """The result on `series` whose findings have these regions, one each."""
    found = [replace(finding, regions=(region,)) for finding, region in zip(findings, regions, strict=False)]
    inputs = replace(reports.INPUTS, series={"image": series})
    return reports.result([one.path for one in series.instances], inputs=inputs, findings=[*found, *findings[len(regions) :]])


def states(result: Result) -> list[FileDataset]:
    return [dcmread(BytesIO(one.data)) for one in gsps.build(result)]


def outlines(annotation: Dataset) -> list[NDArray[np.float64]]:
    """(N, 2): column, row, as a viewer draws them."""
    return [np.reshape(np.array(one.GraphicData, float), (-1, 2)) for one in annotation.GraphicObjectSequence]


def filled(lines: Sequence[NDArray[np.float64]], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels whose middle is within an odd number of `lines`; (0.5, 0.5) is the middle of the first (PS3.3 §C.10.5)."""
    rows, columns = np.indices(shape) + 0.5
    middles = np.column_stack([columns.ravel(), rows.ravel()])
    return np.asarray(np.logical_xor.reduce([Polygon(line).contains_points(middles) for line in lines]).reshape(shape))


def middle(lines: Sequence[NDArray[np.float64]]) -> tuple[NDArray[np.float64], float]:
    """The centre of what closed lines enclose, (column, row), and their area in pixels; holes count less than nothing."""
    area, moment = 0.0, np.zeros(2)
    for line in lines:
        cross = line[:-1, 0] * line[1:, 1] - line[1:, 0] * line[:-1, 1]
        area += cross.sum() / 2
        moment += ((line[:-1] + line[1:]) * cross[:, np.newaxis]).sum(axis=0) / 6
    return moment / area, area


# --- the outline


@given(arrays.arrays(bool, arrays.array_shapes(min_dims=2, max_dims=2, max_side=7), elements=st.booleans()))
def test_an_outline_encloses_the_pixels_of_the_mask_and_no_other(mask: NDArray[np.bool_]) -> None:
    """Islands, holes, pixels that touch at a corner: filled again it is the mask; its area is the number of pixels."""
    lines = gsps.outlines(mask)
    assert bool(lines) == bool(mask.any())
    if lines:
        assert all((line[0] == line[-1]).all() and (line == line.round()).all() for line in lines)
        assert all((np.abs(np.diff(line, axis=0)).min(axis=1) == 0).all() for line in lines)  # along rows and columns only
        np.testing.assert_array_equal(filled(lines, mask.shape), mask)
        assert middle(lines)[1] == mask.sum()


def test_the_corners_of_one_pixel_are_its_own() -> None:
    """The pixel of row 2 and column 3 lies between 3 and 4, 2 and 3: 0 is the first pixel's outer edge."""
    mask = np.zeros((5, 5), bool)
    mask[2, 3] = True
    (line,) = gsps.outlines(mask)
    assert line.tolist() == [[3, 2], [4, 2], [4, 3], [3, 3], [3, 2]]


# --- geometry


@pytest.mark.parametrize(
    "make",
    [
        lambda: factories.make_ct(slices=10),
        lambda: factories.make_ct(slices=10, orientation=(0, 1, 0, 0, 0, -1)),
        lambda: factories.make_ct(slices=10, orientation=OBLIQUE),
        lambda: factories.make_tilted_ct(degrees=12, lesions_mm=[(0, 0, 20)]),
        lambda: [factories.make_enhanced(factories.make_ct(slices=10, orientation=OBLIQUE)[::-1])],
    ],
    ids=["axial", "sagittal", "oblique", "tilted", "enhanced"],
)
def test_centre_and_volume_of_what_is_drawn_are_those_of_the_region(make: object, tmp_path: Path, pool: DecoderPool) -> None:
    """In patient coordinates, each line by the place that its own image gives itself."""
    series = factories.spool(make(), tmp_path)  # type: ignore[operator]
    image = volume.load(series, kind="volume", pool=pool, gantry_tilt="correct")
    assert image.affine is not None
    index = np.array(image.array.shape[::-1]) // 2 + (2, -1, 0)
    lesion = (image.affine @ np.append(index, 1.0))[:3]
    finding = located.finding_at(located.painted(image, lesion, 5.0), located.place_of(image))
    (region,) = finding.regions
    result = located.result_with(series, [finding])
    (state,) = states(result)
    total, sum_mm = 0.0, np.zeros(3)
    for annotation in state.GraphicAnnotationSequence:
        (reference,) = annotation.ReferencedImageSequence
        ds = dcmread(result.source.paths[reference.ReferencedSOPInstanceUID], stop_before_pixels=True)
        if frame := reference.get("ReferencedFrameNumber"):
            groups = ds.PerFrameFunctionalGroupsSequence[frame - 1]
            shared = ds.SharedFunctionalGroupsSequence[0]
            ds.ImagePositionPatient = groups.PlanePositionSequence[0].ImagePositionPatient
            ds.ImageOrientationPatient = shared.PlaneOrientationSequence[0].ImageOrientationPatient
            ds.PixelSpacing = shared.PixelMeasuresSequence[0].PixelSpacing
        (column, row), area = middle(outlines(annotation))
        along, down = np.reshape(np.array(ds.ImageOrientationPatient, float), (2, 3))
        row_mm, column_mm = (float(mm) for mm in ds.PixelSpacing)
        sum_mm += area * (np.array(ds.ImagePositionPatient, float) + (column - 0.5) * column_mm * along + (row - 0.5) * row_mm * down)
        total += area
    assert region.centre_mm is not None
    np.testing.assert_allclose(sum_mm / total, region.centre_mm, atol=0.05)
    assert np.abs(sum_mm / total - lesion).max() < max(image.spacing_mm)
    assert total == pytest.approx(region.mask.sum(), rel=1e-3)
    assert {one.GraphicLayer for one in state.GraphicAnnotationSequence} == {"FINDING_1"}


def test_on_a_radiograph_the_outline_is_in_its_pixels_and_says_the_finding(tmp_path: Path) -> None:
    """No patient coordinates are needed."""
    series = located.film(tmp_path)
    mask = np.zeros((1, 96, 80), bool)
    mask[0, 30:40, 50:70] = True
    result = marked(series, region_of(mask, series))
    (state,) = states(result)
    (annotation,) = state.GraphicAnnotationSequence
    np.testing.assert_array_equal(filled(outlines(annotation), (96, 80)), mask[0])
    (text,) = annotation.TextObjectSequence
    assert text.UnformattedTextValue == "Pneumonia: positive, 73.21 % (research)"
    assert text.TrackingUID == annotation.GraphicObjectSequence[0].TrackingUID
    assert state.SeriesDescription == "AI chest-fusion 0.1.0 outlines: research, not for diagnosis"
    assert gsps.build(result) == gsps.build(result)


def test_findings_on_the_same_place_have_lines_of_text_of_their_own(tmp_path: Path) -> None:
    """At the upper edge, too, where there is room below alone; all within the image."""
    series = located.film(tmp_path)
    mask = np.zeros((1, 96, 80), bool)
    mask[0, 0:4, 0:70] = True
    (state,) = states(marked(series, region_of(mask, series), region_of(mask, series)))
    boxes = [
        (*text.BoundingBoxTopLeftHandCorner, *text.BoundingBoxBottomRightHandCorner)
        for annotation in state.GraphicAnnotationSequence
        for text in annotation.TextObjectSequence
    ]
    assert len(boxes) == 2
    assert boxes[0][1] == 4
    assert boxes[0][3] <= boxes[1][1]
    assert all(0 <= left < right <= 80 and 0 <= top < bottom <= 96 for left, top, right, bottom in boxes)


def test_a_line_longer_than_one_element_may_be_goes_on_in_another(tmp_path: Path) -> None:
    """PS3.5 gives Graphic Data 65,534 bytes; a comb of 3,000 teeth has 12,000 corners."""
    series = located.film(tmp_path, rows=8, columns=6000)
    mask = np.zeros((1, 8, 6000), bool)
    mask[0, 4, :] = True
    mask[0, 3, ::2] = True
    (state,) = states(marked(series, region_of(mask, series)))
    parts = outlines(state.GraphicAnnotationSequence[0])
    assert len(parts) > 1
    assert all(len(part) <= 8191 for part in parts)
    joined = np.concatenate([parts[0], *(part[1:] for part in parts[1:])])
    assert middle([joined])[1] == mask.sum()


def test_no_region_and_no_grayscale_make_no_state(tmp_path: Path) -> None:
    """A state for images in color is another object; silence says less than a wrong one."""
    series = located.film(tmp_path)
    assert gsps.build(marked(series)) == ()
    mask = np.ones((1, 96, 80), bool)
    ds = dcmread(series.instances[0].path)
    ds.PhotometricInterpretation, ds.SamplesPerPixel, ds.PlanarConfiguration = "RGB", 3, 0
    ds.save_as(series.instances[0].path)
    assert gsps.build(marked(series, region_of(mask, series))) == ()


# --- the look


def test_slices_that_are_rescaled_each_its_own_way_have_a_state_each(tmp_path: Path) -> None:
    """PET: one state holds one rescale, and with another's the values would be wrong."""
    datasets = factories.make_ct(slices=4)
    for number, ds in enumerate(datasets):
        ds.RescaleSlope, ds.WindowCenter = 1 + number, 40 + number
        del ds.RescaleType
    series = factories.spool(datasets, tmp_path)
    mask = np.zeros((4, 40, 48), bool)
    mask[1:3, 10:20, 10:20] = True
    made = states(marked(series, region_of(mask, series, affine=factories.known_affine())))
    assert [float(one.RescaleSlope) for one in made] == [2, 3]
    assert [one.RescaleType for one in made] == ["US", "US"]
    assert len({one.SOPInstanceUID for one in made}) == len({one.InstanceNumber for one in made}) == 2


@pytest.mark.parametrize(("center", "width"), [(None, None), (None, "400"), ("40", None)])
def test_a_window_that_an_image_leaves_open_is_not_in_the_state(center: str | None, width: str | None, tmp_path: Path) -> None:
    """Half of one, or an empty one, would be shown black, white or not at all."""
    ds = factories.make_radiograph()
    ds.WindowCenter, ds.WindowWidth = center, width
    series = factories.spool([ds], tmp_path)
    mask = np.zeros((1, ds.Rows, ds.Columns), bool)
    mask[0, 10:20, 10:20] = True
    (state,) = states(marked(series, region_of(mask, series)))
    assert "SoftcopyVOILUTSequence" not in state


def test_each_slice_keeps_its_own_window_and_pixels_keep_their_shape(tmp_path: Path) -> None:
    """MR scanners give each slice its window; pixels here are 0.75 mm by 0.5 mm."""
    datasets = factories.make_ct(slices=4)
    for ds, center in zip(datasets, (40, 50, 50, 60), strict=True):
        ds.WindowCenter = [center, -600]
        ds.WindowWidth = [400, 1500]
    series = factories.spool(datasets, tmp_path)
    mask = np.zeros((4, 40, 48), bool)
    mask[0:3, 10:20, 10:20] = True
    (state,) = states(marked(series, region_of(mask, series, affine=factories.known_affine())))
    windows = {
        tuple(one.WindowCenter): [r.ReferencedSOPInstanceUID for r in one.ReferencedImageSequence] for one in state.SoftcopyVOILUTSequence
    }
    uids = [one.sop_instance_uid for one in series.instances]
    assert windows == {(40, -600): uids[:1], (50, -600): uids[1:3]}
    (area,) = state.DisplayedAreaSelectionSequence
    assert (list(area.PresentationPixelSpacing), "PresentationPixelAspectRatio" in area) == ([0.75, 0.5], False)
    assert (list(area.DisplayedAreaTopLeftHandCorner), list(area.DisplayedAreaBottomRightHandCorner)) == ([1, 1], [48, 40])


@pytest.mark.peer
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("window", ["linear", "table", "none"])
def test_dcmtk_shows_the_same_pixels_with_the_state_and_without(photometric: str, window: str, tmp_path: Path) -> None:
    """Another implementation's pipeline, from stored values to P-values; and its checker finds nothing."""
    if missing := [tool for tool in ("dcmp2pgm", "dcmpschk") if shutil.which(tool) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    ds = factories.make_radiograph(photometric=photometric)
    if window != "linear":
        del ds.WindowCenter, ds.WindowWidth
    if window == "table":
        table = Dataset()
        table.LUTDescriptor, table.LUTExplanation = [4096, 0, 12], "square"
        table.LUTData = (np.arange(4096, dtype=np.uint32) ** 2 // 4096).astype("<u2").tobytes()
        ds.VOILUTSequence = [table]
    series = factories.spool([ds], tmp_path / "image")
    mask = np.zeros((1, 64, 48), bool)
    mask[0, 10:20, 10:20] = True
    (made,) = gsps.build(marked(series, region_of(mask, series)))
    state, source = tmp_path / "state.dcm", series.instances[0].path
    state.write_bytes(made.data)
    shown = []
    for options in ([], ["-p", str(state)]):
        target = tmp_path / "shown.pgm"
        subprocess.run(["dcmp2pgm", *options, str(source), str(target)], check=True, capture_output=True)
        shown.append(target.read_bytes())
    assert len(set(shown[0])) > 50
    assert shown[0] == shown[1]
    checked = subprocess.run(["dcmpschk", state], check=False, capture_output=True, text=True)
    assert (checked.returncode, "Test passed" in checked.stdout + checked.stderr) == (0, True)
