"""Small changes of an image that change no answer: moved, scaled, turned, re-contrasted, by MonAI's transforms.

Not here: making the image (transforms.py). No mirror: the heart has a side.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from monai.transforms import Compose, Lambda, RandAffine, RandScaleIntensity, RandShiftIntensity, ToTensor
from torch import Tensor


def augment(images: Tensor, generator: torch.Generator, *, shift: float, zoom: float, rotate_deg: float, contrast: float) -> Tensor:
    """Move, scale, turn (in the first two axes) and re-contrast each image of a batch (B, 1, *size) in [0, 1] a little.

    `shift` is a share of the field of view, `zoom` (each axis apart) and `contrast` are shares of 1. What comes into view
    repeats the border. All randomness is of `generator`.
    """
    if not (shift or zoom or rotate_deg or contrast):
        return images
    steps = _steps(tuple(images.shape[2:]), shift, zoom, rotate_deg, contrast)
    seeds = torch.randint(2**31, (len(images),), generator=generator).tolist()
    return torch.stack([steps.set_random_state(seed)(image) for seed, image in zip(seeds, images, strict=True)])


@lru_cache(maxsize=8)
def _steps(size: tuple[int, ...], shift: float, zoom: float, rotate_deg: float, contrast: float) -> Compose:
    angle = math.radians(rotate_deg)
    moved = RandAffine(
        prob=1.0,
        rotate_range=angle if len(size) == 2 else (0.0, 0.0, angle),
        translate_range=[shift * n for n in size],
        scale_range=[zoom] * len(size),
        padding_mode="border",
        spatial_size=size,
        cache_grid=True,
    )
    # Around the middle of the window, so that contrast does not brighten.
    lit = [Lambda(lambda x: x - 0.5), RandScaleIntensity(contrast, prob=1.0), RandShiftIntensity(0.5 * contrast, prob=1.0)]
    lit += [Lambda(lambda x: (x + 0.5).clamp(0, 1))]
    # ToTensor: plain tensors, for a MetaTensor would carry its history along.
    return Compose([*([moved] if shift or zoom or rotate_deg else []), *(lit if contrast else []), ToTensor(track_meta=False)])
