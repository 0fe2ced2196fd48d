"""The noun of this folder: one frame as a decoding process hands it over. Standard library and numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One frame of an instance: stored values and the facts that give them meaning.

    ``pixels`` (rows, columns) are stored values as PS3.5 §8.1.1 reads them: ``bits_stored`` wide, sign-extended, before rescale.
    ``position`` and ``orientation`` are LPS, mm; ``pixel_spacing``, ``imager_spacing`` and ``region_spacing`` (of the one
    ultrasound region) are (between rows, between columns), mm; ``magnification`` is that of the object on the detector.
    ``padding`` is the closed range of stored values that are no image (PS3.3 §C.7.5.1.1.2).
    ``rescale_type`` names what the rescale gives (Units of a PET image), or with ``has_modality_lut`` the table, which then has been
    applied. ``suv_factor`` turns rescaled values into SUV by body weight, g/ml; where it is None, ``suv_reason`` says why in a
    sentence.
    ``patient_orientation`` says whereto the rows and the columns run, in letters (PS3.3 §C.7.6.1.1.1).
    ``number`` counts the frames of its instance from 1. None means that the attribute is absent or empty.

    What tells one stack of a series from another: ``image_type`` (Frame Type of an enhanced object), ``kilovolts`` of the tube,
    ``kernel`` of the reconstruction, ``echo_time`` ms, ``echo_number``, ``b_value`` s/mm², ``diffusion_direction``,
    ``has_contrast``, ``stack_id``, ``temporal_position``, ``cardiac_phase`` %, ``trigger_time`` ms, ``acquisition_number`` and
    ``acquired_at`` (digits of a DICOM date and time, in the clock of the site).

    ``concatenated``: into how many instances the object that ``concatenation_uid`` names was split (PS3.3 §C.7.6.16.1); 0: not told.
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
    suv_factor: float | None
    suv_reason: str
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    slice_location: float | None
    pixel_spacing: tuple[float, ...] | None
    imager_spacing: tuple[float, ...] | None
    region_spacing: tuple[float, ...] | None
    magnification: float | None
    aspect_ratio: tuple[float, ...] | None
    frame_of_reference_uid: str
    padding: tuple[int, int] | None
    view_position: str
    patient_orientation: tuple[str, ...]
    laterality: str
    presentation_intent: str
    kilovolts: float | None
    kernel: tuple[str, ...]
    echo_time: float | None
    echo_number: float | None
    b_value: float | None
    diffusion_direction: tuple[float, ...] | None
    has_contrast: bool
    stack_id: str
    temporal_position: float | None
    cardiac_phase: float | None
    trigger_time: float | None
    acquisition_number: float | None
    acquired_at: str
    concatenation_uid: str
    concatenated: int
    pixels: NDArray[np.integer]
