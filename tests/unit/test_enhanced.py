"""Enhanced multi-frame objects: the same volume as the classic series of the same data, in bounded time and memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileDataset
from pydicom.uid import EnhancedMRImageStorage, JPEG2000Lossless, RLELossless

from tests import factories
from worker.domain import Series, Volume
from worker.errors import GeometryError, PixelError
from worker.imaging import volume
from worker.imaging.decoding import MAX_ANSWER_BYTES, DecoderPool

OBLIQUE = (0.8, 0.6, 0.0, 0.0, 0.0, -1.0)


def same(one: Volume, other: Volume) -> None:
    """Assert that two volumes have the same voxels in the same places."""
    np.testing.assert_array_equal(one.array, other.array)
    assert one.affine is not None
    assert other.affine is not None
    np.testing.assert_allclose(one.affine, other.affine, atol=1e-9)
    assert one.spacing_mm == pytest.approx(other.spacing_mm)


def pet() -> list[FileDataset]:
    """Make a PET series: each slice has its own rescale."""
    datasets = factories.make_ct(slices=6)
    for k, ds in enumerate(datasets):
        ds.Modality, ds.ImageType, ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = "PT", ["ORIGINAL", "PRIMARY"], 0.5 + k, 0, "US"
    return datasets


def mr() -> list[FileDataset]:
    """Make an oblique MR series."""
    datasets = factories.make_ct(slices=6, orientation=OBLIQUE)
    for ds in datasets:
        ds.Modality, ds.EchoTime, ds.ImageType = "MR", 20, ["ORIGINAL", "PRIMARY", "M"]
    return datasets


MAKERS: dict[str, Callable[[], list[FileDataset]]] = {
    "CT": lambda: factories.make_ct(slices=6),
    "signed CT": lambda: factories.make_ct(slices=6, is_signed=True, orientation=OBLIQUE),
    "MR": mr,
    "PET": pet,
}


@pytest.mark.requirement("P15")
@pytest.mark.parametrize("name", MAKERS)
def test_an_enhanced_object_is_the_volume_of_its_classic_series(pool: DecoderPool, tmp_path: Path, name: str) -> None:
    datasets = MAKERS[name]()
    classic = volume.load(factories.spool(datasets, tmp_path / "classic"), kind="volume", pool=pool)
    enhanced = factories.make_enhanced(datasets)
    one = volume.load(factories.spool([enhanced], tmp_path / "enhanced"), kind="volume", pool=pool)
    same(one, classic)
    assert one.sop_instance_uids == (enhanced.SOPInstanceUID,) * 6
    assert one.frame_numbers == (1, 2, 3, 4, 5, 6)
    assert one.modality == classic.modality


@pytest.mark.requirement("P15")
@pytest.mark.parametrize("transfer_syntax", [JPEG2000Lossless, RLELossless])
def test_a_compressed_enhanced_object_is_the_same_volume(pool: DecoderPool, tmp_path: Path, transfer_syntax: str) -> None:
    datasets = factories.make_ct(slices=4)
    enhanced = factories.encode(factories.make_enhanced(datasets), transfer_syntax)
    one = volume.load(factories.spool([enhanced], tmp_path), kind="volume", pool=pool)
    np.testing.assert_array_equal(one.array, factories.known_hu(4))


@pytest.mark.requirement("P15")
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(12)), parts=st.integers(1, 3))
def test_any_order_of_frames_over_any_number_of_objects_gives_the_same_volume(
    pool: DecoderPool, tmp_path_factory: pytest.TempPathFactory, order: list[int], parts: int
) -> None:
    """Scanners write a long series as several enhanced objects; its two echoes are still two stacks."""
    first, second = factories.make_ct(slices=6, seed=1), factories.make_ct(slices=6, seed=2)
    for datasets, echo in ((first, 20), (second, 80)):
        for ds in datasets:
            ds.Modality, ds.EchoTime = "MR", echo
    frames = [factories.in_one_series(first, second)[n] for n in order]
    size = 12 // parts
    objects = [factories.make_enhanced(frames[at : at + size]) for at in range(0, 12, size)]
    series = factories.spool(objects, tmp_path_factory.mktemp("enhanced"))
    found = volume.load(series, kind="volume", pool=pool, stack="largest")
    expected = {"echo time 20 ms": 1, "echo time 80 ms": 2}[found.stack]
    np.testing.assert_array_equal(found.array, factories.known_hu(6, seed=expected))
    with pytest.raises(GeometryError, match=r"Echo Time differs between slices: 2 different ones\. The series has 2 stacks"):
        volume.load(series, kind="volume", pool=pool)


@pytest.mark.requirement("P8")
def test_an_object_split_into_instances_is_a_volume_when_all_are_there(pool: DecoderPool, tmp_path: Path) -> None:
    """The first two of three look like a whole scan: nothing but their own word tells that the rest is missing."""
    datasets = factories.make_ct(slices=9)
    parts = [factories.make_enhanced(datasets[at : at + 3]) for at in (0, 3, 6)]
    for number, ds in enumerate(parts, start=1):
        ds.ConcatenationUID, ds.InConcatenationNumber, ds.InConcatenationTotalNumber = "2.25.77", number, 3
    whole = volume.load(factories.spool(parts, tmp_path / "whole"), kind="volume", pool=pool)
    np.testing.assert_array_equal(whole.array, factories.known_hu(9))
    with pytest.raises(GeometryError, match="2 of the 3 instances"):
        volume.load(factories.spool(parts[:2], tmp_path / "part"), kind="volume", pool=pool)


@pytest.mark.requirement("P15")
def test_frames_say_which_slice_of_the_object_they_are(pool: DecoderPool, tmp_path: Path) -> None:
    datasets = factories.make_ct(slices=4)
    one = volume.load(factories.spool([factories.make_enhanced(datasets[::-1])], tmp_path), kind="volume", pool=pool)
    assert one.frame_numbers == (4, 3, 2, 1)
    np.testing.assert_array_equal(one.array, factories.known_hu(4))


@pytest.mark.requirement("P15")
def test_what_a_converter_had_no_group_for_never_stands_in_for_a_group(pool: DecoderPool, tmp_path: Path) -> None:
    """Left-over attributes that contradict the rescale and the position of the groups, in the shared item and in each frame."""
    ds = factories.make_enhanced(factories.make_ct(slices=5))
    for number, item in enumerate((ds.SharedFunctionalGroupsSequence[0], *ds.PerFrameFunctionalGroupsSequence)):
        left = Dataset()
        left.RescaleSlope, left.RescaleIntercept, left.ImagePositionPatient, left.PixelSpacing = 5 + number, 7, [9, 9, number], [3, 3]
        where = "PerFrame" if number else "Shared"
        setattr(item, f"Unassigned{where}ConvertedAttributesSequence", [left])
    one = volume.load(factories.spool([ds], tmp_path), kind="volume", pool=pool)
    np.testing.assert_array_equal(one.array, factories.known_hu(5))
    assert one.affine is not None
    np.testing.assert_allclose(one.affine, factories.known_affine(), atol=1e-6)


@pytest.mark.requirement("P15")
def test_time_points_and_b_values_of_one_object_are_stacks(pool: DecoderPool, tmp_path: Path) -> None:
    parts = []
    for seed, (b_value, at) in enumerate(((0, 1), (1000, 1), (1000, 2))):
        datasets = factories.make_ct(slices=4, seed=seed)
        for ds in datasets:
            ds.Modality, ds.DiffusionBValue, ds.TemporalPositionIdentifier = "MR", float(b_value), at
        parts.append(datasets)
    series = factories.spool([factories.make_enhanced(factories.in_one_series(*parts))], tmp_path)
    with pytest.raises(GeometryError, match=r"b-value 0 \(4 slices\), b-value 1000, time point 1 \(4 slices\), b-value 1000, time point 2"):
        volume.load(series, kind="volume", pool=pool)
    one = volume.load(series, kind="volume", pool=pool, stack="last")
    np.testing.assert_array_equal(one.array, factories.known_hu(4, seed=2))


def _drop(name: str) -> Callable[[FileDataset], None]:
    def change(ds: FileDataset) -> None:
        for item in (*ds.SharedFunctionalGroupsSequence, *ds.PerFrameFunctionalGroupsSequence):
            if name in item:
                delattr(item, name)

    return change


def _drop_from_one_frame(ds: FileDataset) -> None:
    """Let one frame of an MR say no rescale, while the others do."""
    ds.Modality = "MR"
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    rescale = ds.SharedFunctionalGroupsSequence[0].pop("PixelValueTransformationSequence").value
    for item in ds.PerFrameFunctionalGroupsSequence[1:]:
        item.PixelValueTransformationSequence = rescale


def _at_the_top(ds: FileDataset) -> None:
    """Say geometry and rescale where a classic header has them, and not in the groups: they mean nothing there."""
    ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing = [0, 0, 0], [1, 0, 0, 0, 1, 0], [1, 1]
    _drop("PlaneOrientationSequence")(ds)


@pytest.mark.requirement("P5")
@pytest.mark.requirement("P15")
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_drop("PlanePositionSequence"), "is absent from a slice"),
        (_drop("PlaneOrientationSequence"), "is absent from a slice"),
        (_drop("PixelMeasuresSequence"), "is absent from a slice"),
        (_drop("PixelValueTransformationSequence"), "no rescale to Hounsfield units"),
        (_drop_from_one_frame, "1 of 5 slices have no rescale, and the others do."),
        (_at_the_top, "is absent from a slice"),
        (
            lambda ds: ds.PerFrameFunctionalGroupsSequence.pop(),
            "The functional groups are of 4 frames and 1 shared items; there are 5 frames.",
        ),
        (lambda ds: ds.SharedFunctionalGroupsSequence.append(Dataset()), "and 2 shared items"),
        (lambda ds: setattr(ds, "NumberOfFrames", 4), "Pixel Data"),
    ],
)
def test_an_enhanced_object_that_lacks_something_is_refused(
    pool: DecoderPool, tmp_path: Path, change: Callable[[FileDataset], object], sentence: str
) -> None:
    ds = factories.make_enhanced(factories.make_ct(slices=5))
    change(ds)
    with pytest.raises((GeometryError, PixelError)) as caught:
        volume.load(factories.spool([ds], tmp_path), kind="volume", pool=pool)
    assert sentence in str(caught.value)


@pytest.mark.requirement("P9")
@pytest.mark.parametrize("kind", ["volume", "radiograph", "frames"])
def test_a_segmentation_is_no_image_of_the_patient(pool: DecoderPool, shared: Path, kind: str) -> None:
    path = shared / "data" / "dicom" / "dcmqi" / "data" / "segmentations" / "liver.dcm"
    with pytest.raises(GeometryError, match="no images of the patient"):
        volume.load(_series([path]), kind=kind, pool=pool)  # type: ignore[arg-type]


def _series(paths: Sequence[Path]) -> Series:
    uid = str(pydicom.dcmread(paths[0], stop_before_pixels=True).SeriesInstanceUID)
    return Series(uid, "", "", "", tuple(factories.instance_of(path) for path in paths))


@pytest.mark.requirement("P15")
@pytest.mark.parametrize("name", ["23x38x3", "24x38x3"])
def test_a_real_legacy_converted_ct_is_the_volume_of_its_classic_series(pool: DecoderPool, shared: Path, tmp_path: Path, name: str) -> None:
    """The pairs of dcmqi say no rescale, which CT may not lack: as they are both are refused, and given one both are the same volume."""
    folder = shared / "data" / "dicom" / "dcmqi" / "data" / "segmentations" / name
    slices, (multi,) = sorted((folder / "image").glob("*.dcm")), sorted((folder / "multiframe").glob("*.dcm"))
    for paths in (slices, [multi]):
        with pytest.raises(PixelError, match="no rescale to Hounsfield units"):
            volume.load(_series(paths), kind="volume", pool=pool)
    classic, enhanced = [pydicom.dcmread(path) for path in slices], pydicom.dcmread(multi)
    said = Dataset()
    said.RescaleSlope, said.RescaleIntercept, said.RescaleType = 1, -1024, "HU"
    for ds in classic:
        ds.update(said)
    enhanced.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence = [said]
    one = volume.load(factories.spool([enhanced], tmp_path / "enhanced"), kind="volume", pool=pool)
    same(one, volume.load(factories.spool(classic, tmp_path / "classic"), kind="volume", pool=pool))
    assert one.array.shape[0] == 3


def test_an_object_of_2000_frames_is_read_in_bounded_time_and_memory(pool: DecoderPool, tmp_path: Path) -> None:
    """Every frame with its own position, rescale, window, time and trigger: the longest answer there is."""
    (small,) = factories.make_ct(hu=np.zeros((1, 32, 32), np.float32))
    ds = factories.make_enhanced([small] * 2000)
    groups = []
    for k in range(2000):
        item = Dataset()
        item.PlanePositionSequence = [Dataset()]
        item.PlanePositionSequence[0].ImagePositionPatient = [
            f"{-123.456789 - k / 3:.10f}"[:16],
            "0.123456789",
            f"{k * 0.7123456789:.10f}"[:16],
        ]
        item.PixelValueTransformationSequence = [Dataset()]
        item.PixelValueTransformationSequence[0].RescaleSlope = f"{1 + k * 1.23456789e-4:.12f}"
        item.PixelValueTransformationSequence[0].RescaleIntercept, item.PixelValueTransformationSequence[0].RescaleType = (
            "-1024.123456",
            "HU",
        )
        item.FrameVOILUTSequence = [Dataset()]
        item.FrameVOILUTSequence[0].WindowCenter, item.FrameVOILUTSequence[0].WindowWidth = 40.123456 + k, 400.123456 + k
        item.FrameContentSequence = [Dataset()]
        item.FrameContentSequence[0].FrameAcquisitionDateTime = f"2024010210{k // 60 % 60:02d}{k % 60:02d}.123456"
        item.FrameContentSequence[0].TemporalPositionIndex, item.FrameContentSequence[0].FrameAcquisitionNumber = k, k
        item.CardiacSynchronizationSequence = [Dataset()]
        item.CardiacSynchronizationSequence[0].NominalCardiacTriggerDelayTime = k * 1.23456789
        groups.append(item)
    ds.PerFrameFunctionalGroupsSequence = groups
    del ds.SharedFunctionalGroupsSequence[0].PlanePositionSequence
    instance = factories.spool([ds], tmp_path).instances[0]
    this = psutil.Process()
    before, started = this.memory_info().rss, time.perf_counter()
    ((*frames,),) = pool.read([instance.path], [instance.sha256])
    took = time.perf_counter() - started
    assert len(frames) == 2000
    assert frames[1999].temporal_position == 1999
    assert this.memory_info().rss - before < 50 * 2**20
    print(f"2000 frames: {took:.1f} s; an answer may have {MAX_ANSWER_BYTES} bytes")
    assert took < 20
