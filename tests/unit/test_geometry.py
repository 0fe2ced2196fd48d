"""Geometry: a tilted gantry is refused or put straight, and an edit of the header is harmless or refused, never another volume."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import config
from pydicom.dataset import FileDataset

from tests import factories
from worker.domain import Series, Volume
from worker.errors import GeometryError
from worker.imaging import volume
from worker.imaging.decoding import DecoderPool

LESIONS = ((-20.0, -10.0, 16.0), (15.0, 8.0, 20.0), (0.0, 20.0, 24.0))


def _centers(one: Volume) -> list[np.ndarray]:
    """Return the center of mass of what is dense about each lesion, LPS mm."""
    assert one.affine is not None
    dense = np.argwhere(one.array > 0)[:, ::-1]  # (n, ijk)
    weight = one.array[one.array > 0] + 1000
    at = dense @ one.affine[:3, :3].T + one.affine[:3, 3]
    found = []
    for lesion in LESIONS:
        near = np.linalg.norm(at - np.array(lesion), axis=1) < 9
        found.append(np.average(at[near], axis=0, weights=weight[near]))
    return found


# --- tilt


@pytest.mark.requirement("P8")
@pytest.mark.parametrize("degrees", [-24.0, -7.5, 0.0, 12.0, 24.0])
def test_lesions_of_a_tilted_scan_come_back_within_half_a_voxel(pool: DecoderPool, tmp_path: Path, degrees: float) -> None:
    series = factories.spool(factories.make_tilted_ct(degrees=degrees, lesions_mm=LESIONS)[::-1], tmp_path)
    one = volume.load(series, kind="volume", pool=pool, gantry_tilt="correct")
    assert one.affine is not None
    axes = one.affine[:3, :3] / np.linalg.norm(one.affine[:3, :3], axis=0)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-9)
    assert one.spacing_mm == pytest.approx((4 * math.cos(math.radians(degrees)), 1, 1))
    for found, lesion in zip(_centers(one), LESIONS, strict=True):
        off = abs(axes.T @ (found - np.array(lesion)))  # along i, j, k
        assert (off < 0.5 * np.array(one.spacing_mm[::-1])).all()
    assert one.array.min() == -1000
    assert one.array.max() == 1000


@pytest.mark.requirement("P8")
def test_a_tilted_scan_is_refused_unless_asked_for(pool: DecoderPool, tmp_path: Path) -> None:
    series = factories.spool(factories.make_tilted_ct(degrees=12, lesions_mm=LESIONS), tmp_path)
    with pytest.raises(GeometryError, match=r"shift sideways by up to 9\.15 mm, as with a gantry tilted by 12\.00 degrees"):
        volume.load(series, kind="volume", pool=pool)
    steep = factories.spool(factories.make_tilted_ct(degrees=50, lesions_mm=LESIONS), tmp_path / "steep")
    with pytest.raises(GeometryError, match=r"tilted by 50\.00 degrees"):
        volume.load(steep, kind="volume", pool=pool, gantry_tilt="correct")


@pytest.mark.requirement("P8")
def test_a_straight_scan_is_not_touched_by_the_correction(pool: DecoderPool, tmp_path: Path) -> None:
    series = factories.spool(factories.make_ct(slices=5), tmp_path)
    one = volume.load(series, kind="volume", pool=pool, gantry_tilt="correct")
    np.testing.assert_array_equal(one.array, factories.known_hu(5))


@pytest.mark.requirement("P8")
def test_a_shear_of_whole_pixels_only_moves_them(pool: DecoderPool, tmp_path: Path) -> None:
    """Both ways in the plane: nothing is interpolated, and every voxel is where its own header puts it."""
    datasets = factories.make_ct(slices=4, spacing_mm=(5, 0.5, 0.5))
    for k, ds in enumerate(datasets):
        ds.ImagePositionPatient = [ds.ImagePositionPatient[0] - k, ds.ImagePositionPatient[1] + 1.5 * k, ds.ImagePositionPatient[2]]
    one = volume.load(factories.spool(datasets, tmp_path), kind="volume", pool=pool, gantry_tilt="correct")
    assert one.array.shape == (4, 40 + 9, 48 + 6)
    assert one.affine is not None
    for k, plane in enumerate(factories.known_hu(4)):
        where = np.linalg.inv(one.affine) @ np.array([*map(float, datasets[k].ImagePositionPatient), 1])
        i, j, at = (round(float(x), 6) for x in where[:3])
        assert (i, j, at) == (6 - 2 * k, 3 * k, k)
        np.testing.assert_array_equal(one.array[k, int(j) : int(j) + 40, int(i) : int(i) + 48], plane)
    assert (one.array == factories.INTERCEPT_HU).sum() >= 4 * (49 * 54 - 40 * 48)


@pytest.mark.requirement("P8")
def test_a_real_tilted_scan_is_corrected_when_asked_for(pool: DecoderPool, shared: Path) -> None:
    """Each slice keeps its mean above the background: the shear moves a head, it does not change it."""
    folder = shared / "data" / "dicom" / "dicom2nifti" / "failing" / "gantrytilting" / "001"
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    headers = [pydicom.dcmread(path) for path in paths]
    series = Series(str(headers[0].SeriesInstanceUID), "CT", "", "", tuple(factories.instance_of(path) for path in paths))
    one = volume.load(series, kind="volume", pool=pool, gantry_tilt="correct")
    assert one.array.shape == (4, 521, 512)
    assert one.spacing_mm[0] == pytest.approx(5 * math.cos(math.radians(14)), abs=0.01)
    by_uid = {str(ds.SOPInstanceUID): ds for ds in headers}
    for plane, uid in zip(one.array, one.sop_instance_uids, strict=True):
        ds = by_uid[uid]
        hu = ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        assert np.clip(plane, -500, None).sum() + 500 * plane.size == pytest.approx(np.clip(hu, -500, None).sum() + 500 * hu.size, rel=2e-3)


# --- a second witness of the order


@pytest.mark.requirement("P8")
@pytest.mark.parametrize("sign", [1, -1])
def test_two_slices_that_changed_places_are_noticed_by_their_slice_location(pool: DecoderPool, tmp_path: Path, sign: int) -> None:
    datasets = located(factories.make_ct(slices=9), sign=sign)
    a, b = datasets[2], datasets[5]
    a.ImagePositionPatient, b.ImagePositionPatient = b.ImagePositionPatient, a.ImagePositionPatient
    with pytest.raises(GeometryError, match=r"Slice Location of 2 of 9 slices contradicts their Image Position \(Patient\)\."):
        volume.load(factories.spool(datasets, tmp_path), kind="volume", pool=pool)


def test_a_slice_location_that_means_something_else_is_no_witness(pool: DecoderPool, tmp_path: Path) -> None:
    datasets = factories.make_ct(slices=6)
    for k, ds in enumerate(datasets):
        ds.SliceLocation = (7 * k) % 6
    np.testing.assert_array_equal(volume.load(factories.spool(datasets, tmp_path), kind="volume", pool=pool).array, factories.known_hu(6))


def located(datasets: list[FileDataset], *, sign: int = 1) -> list[FileDataset]:
    """Give each slice the Slice Location that its position has."""
    for ds in datasets:
        ds.SliceLocation = sign * float(ds.ImagePositionPatient[2]) + 3
    return datasets


# --- random edits

Edit = Callable[[list[FileDataset]], object]
_NUMBERS = st.one_of(st.floats(-1e-5, 1e-5), st.floats(-0.2, 0.2), st.floats(-30, 30), st.sampled_from([1e300, -1e9]))
_RAW = st.sampled_from(["nan", "inf", "", "1e400", "a", "1\\2", "1\\2\\3\\4\\5\\6\\7"])
_KEYWORDS = st.sampled_from(["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])


@st.composite
def edits(draw: st.DrawFn) -> Edit:
    """Draw one edit of the geometry of one slice, or of two that swap something."""
    keyword, slot, which = draw(_KEYWORDS), draw(st.integers(0, 8)), draw(st.integers(0, 5))
    how = draw(st.sampled_from(["add", "scale", "swap", "raw", "drop", "frame", "copy", "turn"]))
    number, raw, other = draw(_NUMBERS), draw(_RAW), draw(st.integers(0, 8))

    def edit(datasets: list[FileDataset]) -> None:
        ds, values = datasets[slot], [float(x) for x in datasets[slot][keyword].value]
        if how == "add":
            values[which % len(values)] += number
        elif how == "scale":
            values = [x * (1 + number) for x in values]
        if how in {"add", "scale"}:
            setattr(ds, keyword, [f"{x:.8g}" for x in values])
        elif how == "swap":
            there = deepcopy(datasets[other][keyword].value)
            setattr(datasets[other], keyword, ds[keyword].value)
            setattr(ds, keyword, there)
        elif how == "raw":
            ds[keyword] = pydicom.DataElement(ds[keyword].tag, "LO", raw)  # implausible text, written as it is
            ds[keyword].VR = "DS"
        elif how == "drop":
            delattr(ds, keyword)
        elif how == "frame":
            ds.FrameOfReferenceUID = "1.2.3"
        elif how == "copy":
            ds.ImagePositionPatient = datasets[other].ImagePositionPatient
        else:
            ds.ImageOrientationPatient = [math.cos(number), math.sin(number), 0, -math.sin(number), math.cos(number), 0]

    return edit


@pytest.mark.requirement("P8")
@pytest.mark.requirement("P7")
@pytest.mark.parametrize("gantry_tilt", ["refuse", "correct"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edit=edits())
def test_a_random_edit_of_one_slice_is_harmless_or_refused(
    pool: DecoderPool, tmp_path_factory: pytest.TempPathFactory, edit: Edit, gantry_tilt: str
) -> None:
    """Harmless: the same voxels, each within the tolerance of an even step of where it was."""
    datasets = located(factories.make_ct(slices=9))
    with config.disable_value_validation():
        edit(datasets)
        series = factories.spool(datasets, tmp_path_factory.mktemp("edited"))
    try:
        one = volume.load(series, kind="volume", pool=pool, gantry_tilt=gantry_tilt)  # type: ignore[arg-type]
    except GeometryError:
        return
    np.testing.assert_array_equal(one.array, factories.known_hu(9))
    assert one.affine is not None
    corners = np.array([[i, j, k, 1] for i in (0, 47) for j in (0, 39) for k in (0, 8)], float)
    moved = np.linalg.norm((corners @ (one.affine - factories.known_affine()).T)[:, :3], axis=1)
    assert moved.max() <= 0.15
