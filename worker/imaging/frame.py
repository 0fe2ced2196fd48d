"""The noun of this folder: one frame as a decoding process hands it over. Standard library and numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One frame of an instance: stored values and the facts that give them meaning.

    ``pixels`` (rows, columns) are stored values as PS3.5 §8.1.1 reads them: ``bits_stored`` wide, sign-extended, before rescale.
    ``position`` and ``orientation`` are LPS, mm; ``pixel_spacing`` and ``imager_spacing`` are (between rows, between columns), mm.
    ``padding`` is the closed range of stored values that are no image (PS3.3 §C.7.5.1.1.2); ``window`` holds (center, width).
    ``number`` counts the frames of its instance from 1. None means that the attribute is absent or empty.
    """

    sop_instance_uid: str
    number: int
    sop_class_uid: str
    series_instance_uid: str
    transfer_syntax_uid: str
    modality: str
    image_type: tuple[str, ...]
    instance_number: int | None
    photometric: str
    presentation_lut_shape: str
    bits_stored: int
    is_signed: bool
    is_enhanced: bool
    has_modality_lut: bool
    rescale_slope: float | None
    rescale_intercept: float | None
    rescale_type: str
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    pixel_spacing: tuple[float, ...] | None
    imager_spacing: tuple[float, ...] | None
    aspect_ratio: tuple[float, ...] | None
    frame_of_reference_uid: str
    padding: tuple[int, int] | None
    window: tuple[tuple[float, float], ...]
    view_position: str
    presentation_intent: str
    pixels: NDArray[np.integer]
