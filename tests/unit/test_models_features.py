"""The classical features say what is drawn, always with the same finite numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from models.features import PLANES, SMALLEST, feature_names, features

SIZE = 64


def described(plane: NDArray[np.float64]) -> dict[str, float]:
    return dict(zip(feature_names(2), features(torch.from_numpy(plane)[None]).tolist(), strict=True))


def smooth(seed: int, *shape: int) -> NDArray[np.float64]:
    """A cloudy image in [0, 1]."""
    cloud = gaussian_filter(np.random.default_rng(seed).random(shape), 2)
    return np.asarray((cloud - cloud.min()) / np.ptp(cloud))


def ellipse(half_height: float, half_width: float) -> NDArray[np.float64]:
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    return np.where((y / half_height) ** 2 + (x / half_width) ** 2 <= 1, 0.9, 0.1)


def gradient_share(found: dict[str, float], degrees: str) -> float:
    """Which share of the squared gradient histogram lies in one direction."""
    energy = {name: value**2 for name, value in found.items() if name.startswith("gradient")}
    return sum(v for name, v in energy.items() if name.startswith(f"gradient {degrees} degrees")) / sum(energy.values())


@pytest.mark.parametrize("dims", [2, 3])
def test_there_is_one_name_for_each_number(dims: int) -> None:
    names = feature_names(dims)
    assert len(set(names)) == len(names)
    assert features(torch.rand(1, *(20, 17, 31)[:dims])).shape == (len(names),)


def test_the_same_image_gives_the_same_bits_and_is_not_changed() -> None:
    image = torch.from_numpy(smooth(0, 48, 40)).float()[None]
    before = image.clone()
    first = features(image)
    assert first.dtype == np.float64
    assert first.tobytes() == features(image.clone()).tobytes()
    assert torch.equal(image, before)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), levels=st.integers(1, 5), height=st.integers(SMALLEST, 40), width=st.integers(SMALLEST, 40))
def test_every_image_has_finite_features(seed: int, levels: int, height: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    found = features(torch.from_numpy(rng.choice(rng.random(levels), (1, height, width))))
    assert found.shape == (len(feature_names(2)),)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rounding", [0.0, 1e-9])
def test_a_constant_image_has_no_contrast_no_edges_and_no_moments(value: float, rounding: float) -> None:
    plane = np.full((SIZE, SIZE), value)
    plane[0, 0] += rounding
    found = described(plane)
    assert np.isfinite(list(found.values())).all()
    assert found["intensity mean"] == pytest.approx(value)
    quiet = ("intensity deviation", "intensity skewness", "intensity kurtosis", "intensity entropy", "sobel mean", "canny density")
    assert [found[name] for name in quiet] == pytest.approx([0.0] * len(quiet), abs=1e-9)
    assert found["co-occurrence contrast at 1, mean"] == 0


@pytest.mark.parametrize(("vertical", "across", "along"), [(True, "0", "90"), (False, "90", "0")])
def test_stripes_have_their_gradients_in_one_direction(vertical: bool, across: str, along: str) -> None:
    row = 0.5 + 0.5 * np.sin(np.arange(SIZE) * 2 * np.pi / 16)
    stripes = np.tile(row, (SIZE, 1))
    found = described(stripes if vertical else stripes.T)
    assert gradient_share(found, across) > 0.99
    assert gradient_share(found, along) < 0.01


def test_gradients_are_counted_in_the_cell_where_they_are() -> None:
    plane = np.zeros((SIZE, SIZE))
    plane[40:56, 4:28] = 1.0  # lower left
    found = described(plane)
    elsewhere = [v for name, v in found.items() if name.startswith("gradient") and not name.endswith("cell 1, 0")]
    assert found["gradient 0 degrees in cell 1, 0"] > 0.1
    assert found["gradient 90 degrees in cell 1, 0"] > 0.1
    assert elsewhere == pytest.approx([0.0] * len(elsewhere))


def test_a_disc_gives_its_area_and_no_eccentricity() -> None:
    found = described(ellipse(20, 20))
    assert found["bright region area"] == pytest.approx(np.pi * 20**2 / SIZE**2, rel=0.02)
    assert found["bright region area"] + found["dark region area"] == pytest.approx(1)
    assert found["bright region eccentricity"] < 0.05
    assert found["bright region extent"] == pytest.approx(np.pi / 4, rel=0.03)
    assert found["bright region solidity"] > 0.95


def test_an_ellipse_gives_its_eccentricity() -> None:
    assert described(ellipse(12, 24))["bright region eccentricity"] == pytest.approx(np.sqrt(1 - 0.5**2), abs=0.02)


def test_a_ring_is_less_solid_than_the_disc_it_lies_on_and_only_the_largest_region_counts() -> None:
    ring = np.where(ellipse(12, 12) > 0.5, 0.1, ellipse(20, 20))
    ring[:3, :3] = 0.9
    found = described(ring)
    assert found["bright region area"] == pytest.approx(np.pi * (20**2 - 12**2) / SIZE**2, rel=0.03)
    assert found["bright share"] == pytest.approx(found["bright region area"] + 9 / SIZE**2)
    assert found["bright region solidity"] == pytest.approx(1 - (12 / 20) ** 2, abs=0.03)


def test_co_occurrence_of_a_checkerboard_is_known() -> None:
    board = np.indices((SIZE, SIZE)).sum(axis=0) % 2 / 1.0
    found = described(board)
    # One pixel along a row or column is 31 levels away, along a diagonal 0; two pixels are 0 in every direction.
    assert found["co-occurrence contrast at 1, mean"] == pytest.approx(31**2 / 2)
    assert found["co-occurrence contrast at 1, range"] == pytest.approx(31**2)
    assert found["co-occurrence contrast at 2, mean"] == 0
    assert found["intensity entropy"] == pytest.approx(1)  # bit


def test_noise_is_rougher_than_a_cloud() -> None:
    noise, cloud = described(np.random.default_rng(0).random((SIZE, SIZE))), described(smooth(0, SIZE, SIZE))
    assert noise["co-occurrence contrast at 1, mean"] > 5 * cloud["co-occurrence contrast at 1, mean"]
    assert noise["co-occurrence homogeneity at 1, mean"] < cloud["co-occurrence homogeneity at 1, mean"]
    assert noise["binary pattern 9 at 1"] > cloud["binary pattern 9 at 1"]
    assert noise["sobel mean"] > cloud["sobel mean"]


@pytest.mark.parametrize("turned", [np.rot90, np.fliplr, np.flipud])
def test_a_turn_or_mirror_changes_only_what_has_a_place_or_a_direction(turned: object) -> None:
    assert callable(turned)
    plane = smooth(1, SIZE, SIZE)
    before, after = described(plane), described(np.ascontiguousarray(turned(plane)))
    kept = [name for name in before if name.startswith(("intensity", "co-occurrence", "sobel")) or name == "bright share"]
    assert [after[name] for name in kept] == pytest.approx([before[name] for name in kept], rel=1e-6, abs=1e-9)
    gradients = [name for name in before if name.startswith("gradient")]
    assert [after[name] for name in gradients] != pytest.approx([before[name] for name in gradients], rel=0.01)


def test_a_volume_is_described_by_its_middle_planes() -> None:
    volume = torch.from_numpy(smooth(2, 20, 24, 28))[None]
    found = features(volume)
    planes = (volume[:, 10], volume[:, :, 12], volume[:, :, :, 14])
    assert found.tolist() == np.concatenate([features(plane) for plane in planes]).tolist()
    assert feature_names(3) == tuple(f"{plane}: {name}" for plane in PLANES for name in feature_names(2))


def test_values_outside_the_unit_interval_are_clipped() -> None:
    plane = smooth(3, SIZE, SIZE) * 1.5 - 0.2
    assert described(plane) == described(plane.clip(0, 1))


@pytest.mark.parametrize("shape", [(32, 32), (2, 32, 32), (1, SMALLEST - 1, 32), (1, 32, 32, 8), (1, 1, 32, 32, 32)])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="is expected, found"):
        features(torch.zeros(shape))


def test_a_pixel_that_is_no_number_is_refused() -> None:
    image = torch.zeros(1, 32, 32)
    image[0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        features(image)


def test_names_are_for_images_and_volumes_only() -> None:
    with pytest.raises(ValueError, match="2 or 3 dimensions"):
        feature_names(4)
