"""Series to volume: what must come back exactly, and what must be refused, with the right cause."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import FileDataset

from tests import factories
from worker.domain import Series, Volume
from worker.errors import GeometryError, NoSuitableSeries, PixelError
from worker.imaging import volume
from worker.imaging.decoding import DecoderPool

OBLIQUE = (0.8, 0.6, 0.0, 0.0, 0.0, -1.0)


@pytest.fixture(scope="module")
def spooled(tmp_path_factory: pytest.TempPathFactory) -> Series:
    """One plain CT series of nine slices."""
    return factories.spool(factories.make_ct(slices=9), tmp_path_factory.mktemp("ct"))


def load(pool: DecoderPool, datasets: Sequence[FileDataset], folder: Path) -> Volume:
    """Spool the datasets and load them as what they are."""
    series = factories.spool(datasets, folder)
    return volume.load(series, kind="radiograph" if series.modality in {"DX", "CR"} else "volume", pool=pool)


def refused(error: type[Exception], pool: DecoderPool, datasets: Sequence[FileDataset], folder: Path) -> str:
    """Return the sentence with which the datasets are refused."""
    with pytest.raises(error) as caught:
        load(pool, datasets, folder)
    return str(caught.value)


# --- volumes that are right


@pytest.mark.parametrize("is_signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("orientation", [(1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1), OBLIQUE, (-1, 0, 0, 0, 1, 0)])
def test_known_hu_and_affine_come_back_exactly(pool: DecoderPool, tmp_path: Path, orientation: tuple[float, ...], is_signed: bool) -> None:
    datasets = factories.make_ct(slices=5, spacing_mm=(1.25, 0.7, 0.6), orientation=orientation, is_signed=is_signed)
    one = load(pool, datasets, tmp_path)
    np.testing.assert_array_equal(one.array, factories.known_hu(5))
    assert one.affine is not None
    np.testing.assert_allclose(one.affine, factories.known_affine(spacing_mm=(1.25, 0.7, 0.6), orientation=orientation), atol=1e-6)
    assert one.array.dtype == np.float32
    assert one.spacing_mm == pytest.approx((1.25, 0.7, 0.6))
    assert one.sop_instance_uids == tuple(ds.SOPInstanceUID for ds in datasets)
    assert (one.modality, one.series_instance_uid) == ("CT", datasets[0].SeriesInstanceUID)
    assert np.linalg.det(one.affine[:3, :3]) > 0


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(9)))
def test_any_shuffle_of_the_slices_gives_the_same_volume(pool: DecoderPool, spooled: Series, order: list[int]) -> None:
    shuffled = Series(spooled.series_instance_uid, "CT", "", "", tuple(spooled.instances[k] for k in order))
    one = volume.load(shuffled, kind="volume", pool=pool)
    np.testing.assert_array_equal(one.array, factories.known_hu(9))
    assert one.sop_instance_uids == tuple(instance.sop_instance_uid for instance in spooled.instances)


def test_order_is_that_of_positions_not_of_instance_numbers(pool: DecoderPool, tmp_path: Path) -> None:
    datasets = factories.make_ct(slices=5)
    for number, ds in zip([3, 1, 1, 9, 2], datasets, strict=True):
        ds.InstanceNumber = number
    np.testing.assert_array_equal(load(pool, datasets, tmp_path).array, factories.known_hu(5))


def test_each_slice_has_its_own_rescale(pool: DecoderPool, tmp_path: Path) -> None:
    """PET is rescaled slice by slice; so may CT be."""
    datasets = factories.make_ct(slices=3)
    for k, ds in enumerate(datasets):
        ds.RescaleSlope, ds.RescaleIntercept = 0.5 * (k + 1), -1000 - k
    expected = np.stack([(factories.known_hu(3)[k] + 1024) * 0.5 * (k + 1) - 1000 - k for k in range(3)])
    np.testing.assert_array_equal(load(pool, datasets, tmp_path).array, expected)


@pytest.mark.requirement("P10")
def test_padding_takes_the_least_real_value_of_the_volume(pool: DecoderPool, tmp_path: Path) -> None:
    hu = factories.known_hu(3)
    datasets = factories.make_ct(hu=hu, is_signed=True)
    pad = np.zeros(hu.shape[1:], bool)
    pad[5:9, 3:7] = True
    for ds in datasets:
        stored = ds.pixel_array.copy()
        stored[pad] = -2000
        factories.set_pixels(ds, stored, bits_stored=16)
        ds.PixelPaddingValue = -2000
    expected = hu.copy()
    expected[:, pad] = hu[:, ~pad].min()
    np.testing.assert_array_equal(load(pool, datasets, tmp_path).array, expected)


@pytest.mark.requirement("P9")
@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
@pytest.mark.parametrize("written", ["LOCALIZER", "localizer", " LOCALIZER "])
def test_a_localizer_in_the_series_is_left_out(pool: DecoderPool, tmp_path: Path, written: str) -> None:
    datasets = factories.make_ct(slices=5)
    scout = factories.make_ct(slices=6, orientation=(0, 1, 0, 0, 0, -1))[5]
    scout.ImageType = ["ORIGINAL", "PRIMARY", written]
    one = load(pool, [scout, *datasets], tmp_path)
    np.testing.assert_array_equal(one.array, factories.known_hu(5))
    assert scout.SOPInstanceUID not in one.sop_instance_uids


def test_ct_values_do_not_depend_on_the_photometric_interpretation(pool: DecoderPool, tmp_path: Path) -> None:
    """HU are physical: MONOCHROME1 says how to show them, not what they are."""
    datasets = factories.make_ct(slices=3)
    for ds in datasets:
        ds.PhotometricInterpretation = "MONOCHROME1"
    np.testing.assert_array_equal(load(pool, datasets, tmp_path).array, factories.known_hu(3))


# --- volumes that are refused

Change = Callable[[list[FileDataset]], object]


def _move(k: int, by: tuple[float, float, float]) -> Change:
    def change(datasets: list[FileDataset]) -> None:
        datasets[k].ImagePositionPatient = [a + b for a, b in zip(datasets[k].ImagePositionPatient, by, strict=True)]

    return change


def _tilt(datasets: list[FileDataset]) -> None:
    for k, ds in enumerate(datasets):
        _move(k, (0, 0.5 * k, 0))([ds] * (k + 1))


def _drift(datasets: list[FileDataset]) -> None:
    for k, ds in enumerate(datasets):
        _move(0, (0, 0, 0.01 * k * k))([ds])


def _set(keyword: str, value: object) -> Change:
    """Change one slice of all."""
    return lambda datasets: setattr(datasets[4], keyword, value)


def _set_all(keyword: str, value: object) -> Change:
    def change(datasets: list[FileDataset]) -> None:
        for ds in datasets:
            setattr(ds, keyword, value)

    return change


@pytest.mark.requirement("P8")
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.pop(4), "gap of 5.00 mm between slices 4 and 5 of 7, where 2.50 mm is usual; 1 missing."),
        (lambda s: [s.pop(3), s.pop(3)], "gap of 7.50 mm between slices 3 and 4 of 6, where 2.50 mm is usual; 2 missing."),
        (_move(4, (0, 0, 0.8)), "gap of 3.30 mm between slices 4 and 5 of 8, where 2.50 mm is usual."),
        (_move(4, (0, 0, 0.2)), "gap of 2.70 mm"),
        (_move(4, (0, 0, 2.5)), "1 or more slices stand where another does"),
        (_move(4, (0.3, 0, 0)), "shift sideways by up to 0.30 mm"),
        (_tilt, "gantry tilted by 11.31 degrees"),
        (_drift, "The spacing drifts"),
        (
            _set("ImageOrientationPatient", [1, 0, 0, 0, 0, -1]),
            "1 of 8 slices have another orientation than the others; their normals are up to 90.00",
        ),
        (_set("ImageOrientationPatient", [1, 0, 0, 0, math.cos(0.01), math.sin(0.01)]), "up to 0.57 degrees apart"),
        (_set("PixelSpacing", [0.76, 0.5]), "The pixel spacing differs between slices: 0.75 to 0.76 by 0.5 to 0.5 mm."),
        (_set("FrameOfReferenceUID", "1.2.3"), "Frame of Reference UID differs between slices: 2 different ones."),
        (_set("FrameOfReferenceUID", ""), "Frame of Reference UID differs between slices: 2 different ones."),
        (_set("ImageType", ["DERIVED", "SECONDARY", "AXIAL"]), "Image Type value 2 differs between slices"),
        (_set("ImagePositionPatient", None), "is absent from a slice"),
        (_set("ImageOrientationPatient", None), "is absent from a slice"),
        (_set("PixelSpacing", None), "is absent from a slice"),
        (lambda s: s.__delitem__(slice(2, None)), "needs at least 3 slices; the series has 2"),
        (_set_all("ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]), "the series has 0 that are no localizer"),
        (_set_all("ImageOrientationPatient", [1, 0, 0, 0.5, 0.8, 0]), "lengths 1.0000 and 0.9434"),
        (_set_all("PixelSpacing", [0, 0]), "The pixel spacing of a slice is 0 x 0 mm."),
        (_set_all("PixelSpacing", [-1, 1]), "The pixel spacing of a slice is -1 x 1 mm."),
    ],
)
def test_what_is_no_regular_volume_is_refused_with_its_numbers(pool: DecoderPool, tmp_path: Path, change: Change, sentence: str) -> None:
    datasets = factories.make_ct(slices=8)
    change(datasets)
    assert sentence in refused(GeometryError, pool, datasets[::-1], tmp_path)


def test_slices_of_two_sizes_are_refused(pool: DecoderPool, tmp_path: Path) -> None:
    datasets = factories.make_ct(slices=4)
    datasets[2] = factories.make_ct(slices=4, rows=42)[2]
    assert "Rows x Columns differs between slices: 2 different ones." in refused(GeometryError, pool, datasets, tmp_path)


def test_slices_nearer_than_the_tolerance_are_refused(pool: DecoderPool, tmp_path: Path) -> None:
    message = refused(GeometryError, pool, factories.make_ct(slices=4, spacing_mm=(0.08, 1, 1)), tmp_path)
    assert message == "Slices stand 0.080 mm apart, which cannot be told from the tolerance of 0.1 mm."


def test_small_unevenness_within_the_tolerance_is_a_volume(pool: DecoderPool, tmp_path: Path) -> None:
    datasets = factories.make_ct(slices=6)
    _move(2, (0, 0, 0.04))(datasets)
    one = load(pool, datasets, tmp_path)
    assert one.spacing_mm[0] == pytest.approx(2.5)
    with pytest.raises(GeometryError, match="gap of"):
        volume.load(factories.spool(datasets, tmp_path), kind="volume", pool=pool, max_gap_mm=0.01)


def test_an_empty_series_is_refused(pool: DecoderPool) -> None:
    with pytest.raises(GeometryError, match="0 instances"):
        volume.load(Series("1.2.3", "CT", "", ""), kind="volume", pool=pool)


@pytest.mark.requirement("P6")
@pytest.mark.parametrize(
    ("keyword", "value", "sentence"),
    [
        ("RescaleSlope", 0, "Rescale Slope (0028,1053) is 0."),
        ("RescaleSlope", None, "Only one of Rescale Slope"),
        ("RescaleSlope", "1e308", "Rescaled pixel values of slice 2 of 3 are not finite."),
        ("RescaleIntercept", None, "Only one of Rescale Slope"),
        ("RescaleType", "US", "no rescale to Hounsfield units"),
        ("ModalityLUTSequence", [], "both a Modality LUT Sequence"),
        ("RescaleSlope", -1, "Rescale Slope (0028,1053) is -1."),
        ("PresentationLUTShape", "INVERSE", "contradicts Photometric Interpretation"),
    ],
)
def test_a_ct_slice_without_hounsfield_units_is_refused(
    pool: DecoderPool, tmp_path: Path, keyword: str, value: object, sentence: str
) -> None:
    datasets = factories.make_ct(slices=3)
    setattr(datasets[1], keyword, value)
    assert sentence in refused(PixelError, pool, datasets, tmp_path)


def test_a_ct_without_any_rescale_is_refused(pool: DecoderPool, tmp_path: Path) -> None:
    datasets = factories.make_ct(slices=3)
    for ds in datasets:
        del ds.RescaleSlope, ds.RescaleIntercept
    assert "no rescale to Hounsfield units" in refused(PixelError, pool, datasets, tmp_path)


def test_a_file_that_is_another_instance_than_its_row_says_is_refused(pool: DecoderPool, tmp_path: Path) -> None:
    series = factories.spool(factories.make_ct(slices=3), tmp_path)
    with pytest.raises(PixelError, match="another instance"):
        volume.load(Series("1.2.3", "CT", "", "", series.instances), kind="volume", pool=pool)


# --- radiographs


@pytest.mark.requirement("P10")
@pytest.mark.parametrize("modality", ["DX", "CR"])
@pytest.mark.parametrize("bits_stored", [8, 10, 12, 16])
def test_monochrome1_and_2_of_one_film_are_one_radiograph(pool: DecoderPool, tmp_path: Path, bits_stored: int, modality: str) -> None:
    stored = factories.known_stored(bits_stored=bits_stored)
    flipped = (2**bits_stored - 1 - stored.astype(int)).astype(stored.dtype)
    plain = factories.make_radiograph(stored=stored, bits_stored=bits_stored, modality=modality)
    inverse = factories.make_radiograph(stored=flipped, bits_stored=bits_stored, modality=modality, photometric="MONOCHROME1")
    for name, ds in (("plain", plain), ("inverse", inverse)):
        one = load(pool, [ds], tmp_path / name)
        np.testing.assert_array_equal(one.array[0], stored)
        assert one.array.shape == (1, 64, 48)
        assert one.affine is None
        assert one.spacing_mm == (0, 0.15, 0.15)


@pytest.mark.requirement("P10")
def test_signed_and_unsigned_of_one_film_differ_by_their_rescale_only(pool: DecoderPool, tmp_path: Path) -> None:
    stored = factories.known_stored(bits_stored=12)
    ds = factories.make_radiograph(stored=(stored.astype(int) - 2048).astype(np.int16), bits_stored=12)
    ds.RescaleIntercept = 2048
    np.testing.assert_array_equal(load(pool, [ds], tmp_path / "plain").array[0], stored)
    ds.PhotometricInterpretation, ds.PresentationLUTShape = "MONOCHROME1", "INVERSE"
    np.testing.assert_array_equal(load(pool, [ds], tmp_path / "inverse").array[0], 4095 - stored.astype(int))


@pytest.mark.requirement("P10")
@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_padding_of_a_film_is_as_dark_as_its_darkest_pixel(pool: DecoderPool, tmp_path: Path, photometric: str) -> None:
    stored = np.clip(factories.known_stored(bits_stored=12), 100, 4000)
    stored[:, :5], stored[:, -5:] = 4095, 4090
    ds = factories.make_radiograph(stored=stored, photometric=photometric)
    ds.PixelPaddingValue, ds.PixelPaddingRangeLimit = 4095, 4090
    array = load(pool, [ds], tmp_path).array[0]
    expected = stored if photometric == "MONOCHROME2" else 4095 - stored.astype(int)
    np.testing.assert_array_equal(array[:, 5:-5], expected[:, 5:-5])
    assert np.unique(array[:, :5]).tolist() == np.unique(array[:, -5:]).tolist() == [expected[:, 5:-5].min()]


@pytest.mark.requirement("P10")
def test_padding_between_the_values_of_real_pixels_is_refused_for_it_would_be_holes_in_water(pool: DecoderPool, tmp_path: Path) -> None:
    """A signed CT whose Pixel Padding Value is 0, which with an intercept of 0 is water."""
    hu = factories.known_hu(3)
    hu[:, 20, 20] = 0
    datasets = factories.make_ct(hu=hu, is_signed=True)
    for k, ds in enumerate(datasets):
        factories.set_pixels(ds, hu[k].astype(np.int16), bits_stored=16)
        ds.RescaleIntercept, ds.PixelPaddingValue = 0, 0
    assert "Padding from 0 to 0 lies between the values of real pixels" in refused(PixelError, pool, datasets, tmp_path)


@pytest.mark.requirement("P10")
@pytest.mark.parametrize(("photometric", "shape"), [("MONOCHROME2", "INVERSE"), ("MONOCHROME1", "IDENTITY")])
def test_a_film_that_says_bright_is_dense_and_that_it_is_not_is_refused(
    pool: DecoderPool, tmp_path: Path, photometric: str, shape: str
) -> None:
    ds = factories.make_radiograph(photometric=photometric)
    ds.PresentationLUTShape = shape
    assert "contradicts Photometric Interpretation" in refused(PixelError, pool, [ds], tmp_path)


def test_a_film_of_padding_only_is_refused(pool: DecoderPool, tmp_path: Path) -> None:
    ds = factories.make_radiograph(stored=np.full((8, 8), 7, np.uint16))
    ds.PixelPaddingValue = 7
    assert refused(PixelError, pool, [ds], tmp_path) == "Every pixel is padding."


def test_no_window_is_applied(pool: DecoderPool, tmp_path: Path) -> None:
    ds = factories.make_radiograph()
    ds.WindowCenter, ds.WindowWidth = 100, 10
    np.testing.assert_array_equal(load(pool, [ds], tmp_path).array[0], factories.known_stored())


@pytest.mark.requirement("P7")
def test_calibrated_spacing_comes_before_that_of_the_imager(pool: DecoderPool, tmp_path: Path) -> None:
    ds = factories.make_radiograph()
    ds.PixelSpacing = [0.18, 0.18]
    assert load(pool, [ds], tmp_path / "both").spacing_mm == (0, 0.18, 0.18)
    assert load(pool, [factories.make_radiograph(spacing_mm=None)], tmp_path / "none").spacing_mm == (0, 0, 0)


@pytest.mark.requirement("P7")
@pytest.mark.parametrize("spacing", [[0, 0], [0.2, -0.2]])
def test_a_spacing_that_cannot_be_is_refused(pool: DecoderPool, tmp_path: Path, spacing: list[float]) -> None:
    ds = factories.make_radiograph()
    ds.ImagerPixelSpacing = spacing
    assert "The pixel spacing is" in refused(GeometryError, pool, [ds], tmp_path)


def test_pixels_that_are_not_square_are_refused(pool: DecoderPool, tmp_path: Path) -> None:
    ds = factories.make_radiograph(spacing_mm=None)
    ds.PixelAspectRatio = [2, 1]
    assert "Pixel Aspect Ratio is 2 to 1" in refused(GeometryError, pool, [ds], tmp_path)


def test_of_several_films_the_largest_then_the_first_uid_is_taken(pool: DecoderPool, tmp_path: Path) -> None:
    films = [
        factories.make_radiograph(rows=32, number=1),
        factories.make_radiograph(number=2, seed=0),
        factories.make_radiograph(number=3, seed=0),
    ]
    expected = min(str(ds.SOPInstanceUID) for ds in films[1:])
    for name, order in (("there", films), ("back", films[::-1])):
        assert load(pool, order, tmp_path / name).sop_instance_uids == (expected,)


def test_a_lateral_or_raw_film_is_never_read_as_the_frontal_one(pool: DecoderPool, tmp_path: Path) -> None:
    """The larger image of a series may be the lateral one; a network for frontal films must not be given it."""
    frontal, lateral, raw = (factories.make_radiograph(rows=64 + 8 * n, seed=n) for n in range(3))
    for ds in (lateral, raw):
        ds.SeriesInstanceUID, ds.StudyInstanceUID = frontal.SeriesInstanceUID, frontal.StudyInstanceUID
    frontal.ViewPosition, lateral.ViewPosition, raw.ViewPosition = "PA", "LL", "AP"
    raw.PresentationIntentType = "FOR PROCESSING"
    series = factories.spool([frontal, lateral, raw], tmp_path)
    found = volume.load(series, kind="radiograph", pool=pool, views=("AP", "PA"))
    assert found.sop_instance_uids == (frontal.SOPInstanceUID,)
    with pytest.raises(NoSuitableSeries, match="1 images, none for presentation of view AP or PA"):
        volume.load(factories.spool([lateral], tmp_path / "lateral"), kind="radiograph", pool=pool, views=("AP", "PA"))


def test_spacings_that_are_not_square_are_refused(pool: DecoderPool, tmp_path: Path) -> None:
    ds = factories.make_radiograph(spacing_mm=None)
    ds.ImagerPixelSpacing = [0.1, 0.4]
    with pytest.raises(GeometryError, match=r"not square: 0\.1 x 0\.4 mm"):
        volume.load(factories.spool([ds], tmp_path), kind="radiograph", pool=pool)
