"""Augmentation changes an image a little, the same way for one seed, and never out of its range."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.augmentation import augment

NOTHING = {"shift": 0.0, "zoom": 0.0, "rotate_deg": 0.0, "contrast": 0.0}
ALL = {"shift": 0.1, "zoom": 0.1, "rotate_deg": 10.0, "contrast": 0.2}
SIZES = [(20, 16), (12, 10, 8)]


def changed(images: Tensor, seed: float = 0, **amounts: float) -> Tensor:
    return augment(images, torch.Generator().manual_seed(int(seed)), **(NOTHING | amounts))


def ramp(size: tuple[int, ...], axis: int) -> Tensor:
    """An image that grows from 0 to 1 along one axis."""
    shape = [1, 1, *(n if i == axis else 1 for i, n in enumerate(size))]
    return torch.linspace(0, 1, size[axis]).view(shape).expand(1, 1, *size).clone()


@pytest.mark.parametrize("size", SIZES)
def test_by_nothing_nothing_changes_and_by_something_it_stays_in_range(size: tuple[int, ...]) -> None:
    images = torch.rand((3, 1, *size), generator=torch.Generator().manual_seed(1))
    assert torch.equal(changed(images), images)
    moved = changed(images, **ALL)
    assert moved.shape == images.shape
    assert moved.dtype == torch.float32
    assert type(moved) is Tensor, "no MetaTensor leaves"
    assert 0 <= moved.min() < moved.max() <= 1
    assert not torch.equal(moved, images)


@pytest.mark.parametrize("size", SIZES)
def test_one_seed_changes_alike_and_each_image_of_a_batch_differently(size: tuple[int, ...]) -> None:
    images = torch.rand((1, 1, *size), generator=torch.Generator().manual_seed(1)).repeat(2, *[1] * (1 + len(size)))
    first, again, other = (changed(images, seed=seed, **ALL) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_what_comes_into_view_repeats_the_border() -> None:
    """Black bands at the border would tell the network how far an image was moved."""
    bright = torch.full((4, 1, 16, 16), 0.7)
    assert torch.allclose(changed(bright, shift=0.3, zoom=0.2, rotate_deg=20.0), bright, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_a_shift_is_a_share_of_the_view_and_reaches_every_axis(size: tuple[int, ...]) -> None:
    for axis in range(len(size)):
        image = ramp(size, axis)
        middle = (0, 0, *(n // 2 for n in size))
        steps = [float(changed(image, seed=seed, shift=0.25)[middle] - image[middle]) for seed in range(20)]
        assert max(abs(step) for step in steps) <= 0.25 * size[axis] / (size[axis] - 1) + 1e-4
        assert min(steps) < -0.05
        assert max(steps) > 0.05


def test_a_volume_turns_in_its_first_two_axes_only() -> None:
    size = (12, 12, 8)
    assert torch.allclose(changed(ramp(size, 2), rotate_deg=30.0), ramp(size, 2), atol=1e-5)
    assert not torch.allclose(changed(ramp(size, 0), rotate_deg=30.0), ramp(size, 0), atol=1e-2)


def test_contrast_keeps_the_order_of_gray_values() -> None:
    image = ramp((16, 16), 1)
    lit = changed(image, contrast=0.3)
    assert bool((lit.diff(dim=-1) >= 0).all())
    assert not torch.allclose(lit, image, atol=1e-2)


def test_the_left_stays_left() -> None:
    """The heart has a side: no seed mirrors."""
    image = ramp((16, 16), 1)
    for seed in range(20):
        moved = changed(image, seed=seed, **ALL)
        assert moved[..., -4:].mean() > moved[..., :4].mean()
