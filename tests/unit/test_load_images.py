"""What a bundle says of how an image is read reaches the loader, and what it must look like is asked of what was read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.image_spec import ImageSpec
from tests.factories import known_hu, make_ct, make_radiograph, spool
from worker.domain import Inputs, Series, Volume
from worker.errors import GeometryError, NoSuitableSeries, PixelError
from worker.imaging.decoding import DecoderPool
from worker.pipeline import load_images

VOLUME = ImageSpec("image", "volume", ("CT",), (8, 8, 8), spacing_mm=(1, 1, 1), window_hu=(0, 1))
FILM = ImageSpec("image", "radiograph", ("DX",), (8, 8))


@dataclass(frozen=True)
class Asked:
    """A bundle, as far as its images go."""

    images: tuple[ImageSpec, ...]


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    with DecoderPool(processes=1, memory_bytes=2**30, timeout_s=60) as made:
        yield made


def loaded(rule: ImageSpec, series: Series, pool: DecoderPool) -> Volume:
    return load_images(Asked((rule,)), Inputs({"image": series}), pool)["image"]  # type: ignore[arg-type]


def tilted() -> list[Any]:
    found = make_ct(slices=6)
    for k, ds in enumerate(found):
        x, y, z = ds.ImagePositionPatient
        ds.ImagePositionPatient = [x, y + 0.5 * k, z]
    return found


@pytest.mark.requirement("P8")
def test_a_tilted_gantry_is_refused_or_corrected_by_the_bundles_word(tmp_path: Path, pool: DecoderPool) -> None:
    series = spool(tilted(), tmp_path)
    with pytest.raises(GeometryError, match="gantry"):
        loaded(VOLUME, series, pool)
    straight = loaded(replace(VOLUME, gantry_tilt="correct"), series, pool)
    assert straight.affine is not None
    axes = straight.affine[:3, :3] / np.linalg.norm(straight.affine[:3, :3], axis=0)
    assert np.allclose(axes.T @ axes, np.eye(3), atol=1e-6)


def test_a_unit_that_the_header_does_not_allow_is_refused(tmp_path: Path, pool: DecoderPool) -> None:
    series = spool(make_ct(slices=4), tmp_path)
    assert np.array_equal(loaded(replace(VOLUME, unit="HU"), series, pool).array, known_hu(4))
    with pytest.raises(PixelError, match="standardized uptake value"):
        loaded(replace(VOLUME, unit="SUVbw"), series, pool)


def test_the_side_of_a_film_reaches_the_loader(tmp_path: Path, pool: DecoderPool) -> None:
    film = make_radiograph()
    film.ImageLaterality = "R"
    series = spool([film], tmp_path)
    assert loaded(replace(FILM, laterality="R"), series, pool).array.shape == (1, 64, 48)
    with pytest.raises(NoSuitableSeries, match="side L"):
        loaded(replace(FILM, laterality="L"), series, pool)
