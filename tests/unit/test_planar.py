"""Images without a place in the patient: which radiograph, which spacing and who said it, and the frames of a clip."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset
from pydicom.uid import UID

from tests import factories
from worker.domain import Series
from worker.errors import GeometryError, NoSuitableSeries, PixelError
from worker.imaging import volume
from worker.imaging.decoding import DecoderPool


def moving(frames: int = 5, *, number: int = 1, rows: int = 64) -> tuple[FileDataset, NDArray[np.uint8 | np.uint16]]:
    """Make an ultrasound clip; each frame is another image."""
    stored = np.stack([factories.known_stored(rows, bits_stored=8, seed=n) for n in range(frames)])
    ds = factories.make_radiograph(rows=rows, bits_stored=8, spacing_mm=None, number=number)
    ds.Modality, ds.NumberOfFrames, ds.PixelData = "US", frames, stored.tobytes()
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.3.1")
    return ds, stored


def region(*, delta: float = 0.05, units: int = 3, form: int = 1) -> Dataset:
    """Make one ultrasound region; delta in cm a pixel, twice as much between rows."""
    ds = Dataset()
    ds.RegionSpatialFormat, ds.RegionDataType, ds.PhysicalUnitsXDirection, ds.PhysicalUnitsYDirection = form, 1, units, units
    ds.PhysicalDeltaX, ds.PhysicalDeltaY = delta, 2 * delta
    return ds


# --- clips


def test_frames_come_in_the_order_of_their_object(pool: DecoderPool, tmp_path: Path) -> None:
    ds, stored = moving()
    one = volume.load(factories.spool([ds], tmp_path), kind="frames", pool=pool)
    np.testing.assert_array_equal(one.array, stored)
    assert (one.affine, one.spacing_mm, one.frame_numbers) == (None, (0, 0, 0), (1, 2, 3, 4, 5))
    assert one.sop_instance_uids == (ds.SOPInstanceUID,) * 5


def test_single_frames_come_in_the_order_of_their_instance_numbers(pool: DecoderPool, tmp_path: Path) -> None:
    datasets = factories.make_ct(slices=6)
    one = volume.load(factories.spool([datasets[k] for k in (3, 0, 5, 1, 4, 2)], tmp_path), kind="frames", pool=pool)
    np.testing.assert_array_equal(one.array, factories.known_hu(6))
    datasets[2].InstanceNumber = 5
    with pytest.raises(GeometryError, match="6 single frames have 5 Instance Numbers: their order is not known"):
        volume.load(factories.spool(datasets, tmp_path / "twice"), kind="frames", pool=pool)


@pytest.mark.requirement("P8")
def test_of_several_clips_none_is_guessed(pool: DecoderPool, tmp_path: Path) -> None:
    clips = [moving(frames, number=number)[0] for number, frames in ((1, 3), (2, 5), (3, 4))]
    series = factories.spool(clips[::-1], tmp_path)
    with pytest.raises(GeometryError, match=r"3 stacks: clip 1 \(3 frames\), clip 2 \(5 frames\), clip 3 \(4 frames\), and nothing says"):
        volume.load(series, kind="frames", pool=pool)
    for choose, frames in (("first", 3), ("last", 4), ("largest", 5)):
        assert volume.load(series, kind="frames", pool=pool, stack=choose).array.shape == (frames, 64, 48)  # type: ignore[arg-type]


@pytest.mark.requirement("P7")
@pytest.mark.parametrize(
    ("regions", "expected"),
    [
        ([region()], (1.0, 0.5)),
        ([region(delta=-0.05)], (1.0, 0.5)),
        ([region(units=4)], (0, 0)),
        ([region(form=3)], (0, 0)),
        ([region(delta=0)], (0, 0)),
        ([region(), region()], (0, 0)),
    ],
)
def test_an_ultrasound_spacing_is_that_of_its_one_region(
    pool: DecoderPool, tmp_path: Path, regions: list[Dataset], expected: tuple[float, float]
) -> None:
    ds, _ = moving()
    ds.SequenceOfUltrasoundRegions = regions
    one = volume.load(factories.spool([ds], tmp_path), kind="frames", pool=pool)
    assert one.spacing_mm == pytest.approx((0, *expected))
    assert one.spacing_from == ("Sequence of Ultrasound Regions" if expected[0] else "")


def test_a_real_clip_has_its_frames_and_spacing(pool: DecoderPool, shared: Path) -> None:
    path = shared / "data" / "dicom" / "pydicom" / "test_files" / "examples_ybr_color.dcm"
    uid = str(pydicom.dcmread(path, stop_before_pixels=True).SeriesInstanceUID)
    series = Series(uid, "US", "", "", (factories.instance_of(path),))
    one = volume.load(series, kind="frames", pool=pool, color="luminance")
    assert one.array.shape == (30, 240, 320)
    assert one.spacing_from == "Sequence of Ultrasound Regions"
    with pytest.raises(GeometryError, match="several frames and no position of each"):
        volume.load(series, kind="volume", pool=pool, color="luminance")
    with pytest.raises(PixelError, match="A radiograph has one frame; this object has 30"):
        volume.load(series, kind="radiograph", pool=pool, color="luminance")


@pytest.mark.requirement("P8")
def test_a_mosaic_is_refused_in_words(pool: DecoderPool, tmp_path: Path) -> None:
    datasets = factories.make_ct(slices=4)
    for ds in datasets:
        ds.Modality, ds.ImageType = "MR", ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]
    with pytest.raises(GeometryError, match="A Siemens mosaic holds the slices of a volume side by side"):
        volume.load(factories.spool(datasets, tmp_path), kind="volume", pool=pool)


# --- spacing of a radiograph


@pytest.mark.requirement("P7")
@pytest.mark.parametrize(
    ("pixel", "imager", "magnification", "expected", "source"),
    [
        (None, None, None, 0, ""),
        (0.18, None, None, 0.18, "Pixel Spacing"),
        (None, 0.2, None, 0.2, "Imager Pixel Spacing"),
        (0.18, 0.2, None, 0.18, "Pixel Spacing"),
        (0.18, 0.2, 1.25, 0.18, "Pixel Spacing"),
        (0.2, 0.2, None, 0.2, "Imager Pixel Spacing"),
        (0.2, 0.2, 1.25, 0.16, "Imager Pixel Spacing over magnification"),
        (None, 0.1, 1.25, 0.08, "Imager Pixel Spacing over magnification"),
        (None, 0.1, 1, 0.1, "Imager Pixel Spacing over magnification"),
    ],
)
def test_which_spacing_of_a_radiograph_is_used_is_said(
    pool: DecoderPool, tmp_path: Path, pixel: float | None, imager: float | None, magnification: float | None, expected: float, source: str
) -> None:
    ds = factories.make_radiograph(spacing_mm=None)
    for keyword, value in (("PixelSpacing", pixel), ("ImagerPixelSpacing", imager)):
        if value is not None:
            setattr(ds, keyword, [value, value])
    if magnification is not None:
        ds.EstimatedRadiographicMagnificationFactor = magnification
    one = volume.load(factories.spool([ds], tmp_path), kind="radiograph", pool=pool)
    assert one.spacing_mm == pytest.approx((0, expected, expected))
    assert one.spacing_from == source


@pytest.mark.requirement("P7")
@pytest.mark.parametrize("magnification", [0, -1, 0.5, 100])
def test_a_magnification_that_cannot_be_is_refused(pool: DecoderPool, tmp_path: Path, magnification: float) -> None:
    ds = factories.make_radiograph()
    ds.EstimatedRadiographicMagnificationFactor = magnification
    with pytest.raises(GeometryError, match="Estimated Radiographic Magnification Factor is"):
        volume.load(factories.spool([ds], tmp_path), kind="radiograph", pool=pool)


# --- view and side


def breast(side: str, code: str = "399368009", *, number: int = 1) -> FileDataset:
    """Make one mammogram; its view is said by code alone, as mammography units do."""
    ds = factories.make_radiograph(number=number, rows=64 + number)
    ds.Modality, ds.ImageLaterality = "MG", side
    del ds.ViewPosition
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator = code, "SCT"
    ds.ViewCodeSequence = [item]
    return ds


@pytest.mark.parametrize(("code", "view"), [("399368009", "MLO"), ("R-10226", "MLO"), ("399162004", "CC"), ("R-10242", "CC"), ("1", "")])
def test_a_mammogram_has_a_view_and_a_side(pool: DecoderPool, tmp_path: Path, code: str, view: str) -> None:
    one = volume.load(factories.spool([breast("R", code)], tmp_path), kind="radiograph", pool=pool)
    assert (one.view, one.laterality, one.modality) == (view, "R", "MG")


@pytest.mark.requirement("P13")
@pytest.mark.parametrize("orientation", [["R", "F"], ["L", "H"], ["F", "R"], ["R", "H"]])
def test_a_frontal_film_that_says_it_is_mirrored_or_turned_is_refused(pool: DecoderPool, tmp_path: Path, orientation: list[str]) -> None:
    ds = factories.make_radiograph()
    ds.PatientOrientation = orientation
    with pytest.raises(GeometryError, match="it is stored mirrored or turned"):
        volume.load(factories.spool([ds], tmp_path), kind="radiograph", pool=pool)


@pytest.mark.parametrize(
    ("orientation", "view", "side"), [(["L", "F"], "PA", "U"), ("", "PA", "U"), (["R", "H"], "PA", "L"), (["P", "F"], "LL", "U")]
)
def test_a_film_that_may_lie_as_it_says_is_read(pool: DecoderPool, tmp_path: Path, orientation: object, view: str, side: str) -> None:
    ds = factories.make_radiograph()
    ds.PatientOrientation, ds.ViewPosition, ds.ImageLaterality = orientation, view, side
    assert volume.load(factories.spool([ds], tmp_path), kind="radiograph", pool=pool).view == view


@pytest.mark.requirement("P13")
def test_of_both_sides_none_is_guessed(pool: DecoderPool, tmp_path: Path) -> None:
    films = [breast("R", number=1), breast("L", number=2), breast("L", "399162004", number=3)]
    series = factories.spool(films, tmp_path)
    with pytest.raises(NoSuitableSeries, match="images of both sides, 1 of the right and 2 of the left"):
        volume.load(series, kind="radiograph", pool=pool)
    one = volume.load(series, kind="radiograph", pool=pool, laterality="L", views=["MLO"])
    assert one.sop_instance_uids == (films[1].SOPInstanceUID,)
    with pytest.raises(NoSuitableSeries, match="none for presentation of view CC of side R"):
        volume.load(series, kind="radiograph", pool=pool, laterality="R", views=["CC"])
