"""From a saliency to a region: what hangs together with the peak, on the image's own voxels, or nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests import factories, located
from worker.domain import Saliency, Volume
from worker.imaging import volume
from worker.imaging.decoding import DecoderPool
from worker.regions import Place, region, regions

OBLIQUE = (0.8, 0.6, 0.0, 0.0, 0.0, -1.0)
IMAGE = np.diag([1.0, 1.0, 2.0, 1.0])


def place(*shape: int, affine: NDArray[np.float64] | None = IMAGE) -> Place:
    """An image of `shape`, its planes named by number."""
    planes = shape[0] if len(shape) == 3 else 1
    return Place(shape, affine, tuple(f"1.2.{k}" for k in range(planes)), tuple(range(1, planes + 1)))


def saliency(array: NDArray[np.floating], affine: NDArray[np.float64] | None = IMAGE) -> Saliency:
    return Saliency(array, affine, "image", ())


def test_a_region_is_what_hangs_together_with_the_peak_and_is_half_of_it_or_more() -> None:
    """A second spot of the map, though above half, is another place; a corner is enough to hang together."""
    array = np.zeros((6, 8, 10), np.float16)
    array[2, 3, 4], array[2, 3, 5], array[3, 4, 6], array[2, 2, 4] = 0.8, 0.4, 0.5, 0.39
    array[5, 7, 9] = 0.7
    found = region(saliency(array), place(6, 8, 10))
    assert found is not None
    assert found.origin == (2, 3, 4)
    assert [tuple(voxel) for voxel in np.argwhere(found.mask) + found.origin] == [(2, 3, 4), (2, 3, 5), (3, 4, 6)]
    assert (found.shape, found.sop_instance_uids[2], found.frame_numbers[2]) == ((6, 8, 10), "1.2.2", 3)
    assert found.volume_mm3 == pytest.approx(3 * 2.0)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 4), np.float16),
        np.full((4, 4, 4), np.nan, np.float16),
        np.ones((4, 4, 4), np.float16),
        np.where(np.indices((4, 4, 4))[0] < 3, 0.9, 0.1).astype(np.float16),
    ],
    ids=["flat", "undefined", "everywhere", "three quarters"],
)
def test_a_map_that_points_nowhere_has_no_region(array: NDArray[np.float16]) -> None:
    """An outline around nearly the whole image would look like an answer."""
    assert region(saliency(array), place(4, 4, 4)) is None


def test_a_peak_in_what_was_padded_has_no_region() -> None:
    """A network's view may be larger than the image: nothing lies out there."""
    array = np.zeros((6, 6, 6), np.float16)
    array[0, 0, 0] = 1
    beside = IMAGE.copy()
    beside[:3, 3] = -3.0
    assert region(saliency(array, beside), place(3, 3, 3)) is None


def test_a_region_that_fills_a_small_image_has_none_although_the_network_saw_more() -> None:
    """What it leaves out of the padding is left out of nothing."""
    array = np.zeros((8, 8, 8), np.float16)
    array[2:6, 2:6, 2:6] = 1
    beside = IMAGE @ np.block([[np.eye(3), -np.full((3, 1), 2.0)], [np.zeros((1, 3)), np.ones((1, 1))]])
    assert region(saliency(array, beside), place(4, 4, 4)) is None


@given(st.integers(1, 4), st.integers(0, 5), st.integers(0, 5))
def test_a_coarse_voxel_becomes_exactly_the_fine_ones_it_covers(width: int, row: int, column: int) -> None:
    """Nearest neighbor: a map's voxel of `width` pixels is `width` by `width` of them."""
    array = np.zeros((6, 6), np.float16)
    array[row, column] = 1
    edge = (width - 1) / 2
    affine = np.array([[width, 0, edge], [0, width, edge], [0, 0, 1.0]])
    found = region(saliency(array, affine), place(6 * width, 6 * width, affine=None))
    assert found is not None
    assert found.mask.all()
    assert (found.origin, found.mask.shape) == ((0, row * width, column * width), (1, width, width))
    assert (found.affine, found.centre_mm, found.volume_mm3) == (None, None, None)


def test_a_map_that_is_not_parallel_to_its_image_is_refused() -> None:
    """Its voxels would have to be interpolated, and it is not of this image."""
    array = np.zeros((4, 4, 4), np.float16)
    array[1, 1, 1] = 1
    turned = np.array([[0.8, -0.6, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 2.0, 0], [0, 0, 0, 1]])
    for other in (turned, np.diag([-1.0, 1, 2, 1]), None):
        with pytest.raises(ValueError, match=r"not parallel|no place"):
            region(saliency(array, other), place(4, 4, 4))


def test_only_images_that_were_read_have_regions() -> None:
    """A bundle of two images may have been given one."""
    array = np.zeros((4, 4, 4), np.float16)
    array[1, 1, 1] = 1
    assert len(regions([saliency(array)], {"image": place(4, 4, 4)})) == 1
    assert regions([saliency(array)], {"other": place(4, 4, 4)}) == ()


@pytest.mark.parametrize(
    "orientation", [(1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1), OBLIQUE, (-1, 0, 0, 0, -1, 0)], ids=["axial", "sagittal", "oblique", "prone"]
)
def test_a_lesion_in_millimeters_comes_back_within_a_voxel(orientation: tuple[float, ...], pool: DecoderPool, tmp_path: Path) -> None:
    """Painted on the network's grid in patient coordinates, found again on the image's: center, and volume to a fifth."""
    one = loaded(orientation, pool, tmp_path)
    assert one.affine is not None
    lesion = (one.affine @ np.array([26.0, 19.0, 5.0, 1.0]))[:3]
    found = region(located.painted(one, lesion, 5.0), located.place_of(one))
    assert found is not None
    assert found.centre_mm is not None
    assert np.abs(found.centre_mm - lesion).max() < max(one.spacing_mm)
    assert found.volume_mm3 == pytest.approx(4 / 3 * np.pi * 5.0**3, rel=0.2)


def loaded(orientation: tuple[float, ...], pool: DecoderPool, folder: Path) -> Volume:
    """An image of 10 x 40 x 48 voxels, its slices in no order."""
    series = factories.spool(factories.make_ct(slices=10, orientation=orientation)[::-1], folder)
    return volume.load(series, kind="volume", pool=pool)
