"""One series to one `Volume`: slices in order, geometry proven regular, values in HU; or a refusal in words.

::

    series ─▶ DecoderPool.read ─▶ localizers out ─▶ one frame, one grid ─▶ order along the normal ─▶ even? ─▶ rescale ─▶ Volume
                                                                        └─ kind "radiograph": the largest image ─▶ bright is dense

What does not form one regular volume raises `GeometryError`, with the numbers; nothing is resampled, sheared or filled in.
Frame: LPS, millimetres. Not here: files and decoders (decoding.py), windows and resizing (the bundle's transforms).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from worker.domain import Series, Volume
from worker.errors import GeometryError, NoSuitableSeries, PixelError
from worker.imaging.decoding import DecoderPool
from worker.imaging.frame import Frame
from worker.imaging.values import values

#: With two slices there is one gap, and nothing to tell whether a slice is missing from it.
MIN_SLICES: Final = 3
#: Two orientations are one when no cosine differs by more.
ORIENTATION_TOLERANCE: Final = 1e-4
#: Two spacings are one when they differ by no more than this part.
SPACING_TOLERANCE: Final = 1e-4
# PS3.3 §C.7.6.2.1.1: unit length and orthogonal; decimal strings are cut to a few digits.
_COSINE_TOLERANCE: Final = 1e-3
#: Frames nearer than this stand in the same place, mm.
SAME_PLACE_MM: Final = 0.01


def load(
    series: Series, *, kind: Literal["volume", "radiograph"], pool: DecoderPool, max_gap_mm: float = 0.1, views: Collection[str] = ()
) -> Volume:
    """Read one series into a regular volume, or into one radiograph.

    A volume's slices are ordered along the normal of Image Orientation (Patient) by Image Position (Patient), not by Instance
    Number, which vendors do not keep in order. Images whose Image Type says LOCALIZER are left out when others remain;
    `sop_instance_uids` names those used. Of several radiographs in a series the one with most pixels is taken, then the one
    whose SOP Instance UID sorts first.

    Padding (PS3.3 §C.7.5.1.1.2) takes the smallest value that is not padding. No window is applied.

    Parameters
    ----------
    views
        View Positions (PS3.3 §C.8.1.1) of a radiograph that will do; an image that names none will do, too. Empty: any.
    max_gap_mm
        Largest departure of a slice from even spacing along one straight normal that still counts as regular.

    Returns
    -------
    Volume
        ``array`` (K, J, I) float32: HU for CT, rescaled stored values otherwise, MONOCHROME1 inverted over the range of Bits
        Stored so that bright is dense (not for CT and PT, whose values are physical). ``affine`` index (i, j, k, 1) → LPS mm,
        None for a radiograph. ``spacing_mm`` (k, j, i); a radiograph has k = 0, and 0 where unknown.

    Raises
    ------
    GeometryError
        Fewer than three slices, different orientations, sizes, spacings or frames of reference, a tilted gantry, a slice that
        is missing or there twice, uneven spacing.
    PixelError
        From the decoder; or rescale values that are missing, zero or not Hounsfield units, or pixels that are not finite.
    DecoderDied, Retry
        See `DecoderPool.read`.

    References
    ----------
    PS3.3 §C.7.6.2.1.1 (Image Position and Orientation), §C.11.1 (Modality LUT), §C.7.6.3.1.2 (Photometric Interpretation).
    """
    if not series.instances:
        raise GeometryError("The series has 0 instances.")
    slices: list[Frame] = []
    read = pool.read([one.path for one in series.instances], [one.sha256 for one in series.instances])
    for frames, instance in zip(read, series.instances, strict=True):
        for one in frames:
            if one.is_enhanced:
                raise PixelError("Enhanced objects, whose facts are in functional groups, are not read.")
            if (one.sop_instance_uid, one.series_instance_uid) != (instance.sop_instance_uid, series.series_instance_uid):
                raise PixelError("A stored file holds another instance than its row says.")
        slices += frames
    return _radiograph(slices, views) if kind == "radiograph" else _volume(slices, max_gap_mm=max_gap_mm)


def _radiograph(slices: Sequence[Frame], views: Collection[str]) -> Volume:
    # PS3.3 §C.8.11.1.1.1: raw data FOR PROCESSING are not what a person, or a network, was taught to read.
    fitting = [
        one for one in slices if one.presentation_intent != "FOR PROCESSING" and (not views or one.view_position.upper() in {"", *views})
    ]
    if not fitting:
        wanted = f" of view {' or '.join(views)}" if views else ""
        raise NoSuitableSeries(f"The series has {len(slices)} images, none for presentation{wanted}.")
    chosen = min(fitting, key=lambda one: (-one.pixels.size, one.sop_instance_uid))
    spacing = chosen.pixel_spacing or chosen.imager_spacing  # PS3.3 §10.7.1.3: the calibrated one first
    if spacing is not None and min(spacing) <= 0:
        raise GeometryError(f"The pixel spacing is {spacing[0]:g} x {spacing[1]:g} mm.")
    if spacing is not None and max(spacing) > 1.01 * min(spacing):
        raise GeometryError(f"The pixels are not square: {spacing[0]:g} x {spacing[1]:g} mm.")
    if chosen.aspect_ratio is not None and chosen.aspect_ratio[0] != chosen.aspect_ratio[1]:
        raise GeometryError(f"The pixels are not square: Pixel Aspect Ratio is {chosen.aspect_ratio[0]:g} to {chosen.aspect_ratio[1]:g}.")
    row_mm, column_mm = spacing if spacing is not None else (0.0, 0.0)
    return Volume(
        array=values([chosen]),
        affine=None,
        spacing_mm=(0.0, row_mm, column_mm),
        modality=chosen.modality,
        series_instance_uid=chosen.series_instance_uid,
        sop_instance_uids=(chosen.sop_instance_uid,),
    )


def _volume(slices: Sequence[Frame], *, max_gap_mm: float) -> Volume:
    # PS3.3 §C.8.2.1.1.1 and §C.8.3.1.1.1: value 3 of Image Type.
    slices = [one for one in slices if "LOCALIZER" not in one.image_type[2:]]
    if len(slices) < MIN_SLICES:
        raise GeometryError(f"A volume needs at least {MIN_SLICES} slices; the series has {len(slices)} that are no localizer.")
    normal, axes = _one_grid(slices)
    positions = np.array([one.position for one in slices], np.float64)  # (K, 3)
    order = np.lexsort((np.array([one.sop_instance_uid for one in slices]), positions @ normal))
    slices, positions = [slices[k] for k in order], positions[order]
    step = _even_step(positions, normal, max_gap_mm=max_gap_mm)
    row_mm, column_mm = slices[0].pixel_spacing or (0.0, 0.0)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2], affine[:3, 3] = axes[0] * column_mm, axes[1] * row_mm, step, positions[0]
    return Volume(
        array=values(slices),
        affine=affine,
        spacing_mm=(float(np.linalg.norm(step)), row_mm, column_mm),
        modality=slices[0].modality,
        series_instance_uid=slices[0].series_instance_uid,
        sop_instance_uids=tuple(one.sop_instance_uid for one in slices),
    )


def _one_grid(slices: Sequence[Frame]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the normal (3,) and the two in-plane axes (2, 3), when every slice has the same grid but for its position."""
    for one in slices:
        _check_has_place(one)
    cosines = np.array([one.orientation for one in slices], np.float64).reshape(-1, 2, 3)
    lengths, dot = np.linalg.norm(cosines[0], axis=1), float(cosines[0, 0] @ cosines[0, 1])
    if abs(lengths - 1).max() > _COSINE_TOLERANCE or abs(dot) > _COSINE_TOLERANCE:
        raise GeometryError(f"The direction cosines have lengths {lengths[0]:.4f} and {lengths[1]:.4f} and a dot product of {dot:.4f}.")
    turned = abs(cosines - cosines[0]).max(axis=(1, 2))
    if turned.max() > ORIENTATION_TOLERANCE:
        normals = np.cross(cosines[:, 0], cosines[:, 1])
        degrees = math.degrees(math.acos(min(1.0, max(-1.0, float((normals @ normals[0]).min())))))
        raise GeometryError(
            f"{int((turned > ORIENTATION_TOLERANCE).sum())} of {len(slices)} slices have another orientation than the first; "
            f"their normals are up to {degrees:.2f} degrees apart."
        )
    _same("Rows x Columns", {f"{one.pixels.shape[0]} x {one.pixels.shape[1]}" for one in slices})
    spacings = np.array([one.pixel_spacing for one in slices], np.float64)
    if not np.allclose(spacings, spacings[0], rtol=SPACING_TOLERANCE, atol=0):
        low, high = spacings.min(axis=0), spacings.max(axis=0)
        raise GeometryError(f"The pixel spacing differs between slices: {low[0]:g} to {high[0]:g} by {low[1]:g} to {high[1]:g} mm.")
    _same("Frame of Reference UID", {one.frame_of_reference_uid for one in slices})
    _same("Modality", {one.modality for one in slices})
    # PS3.3 §C.7.6.1.1.2: value 2 tells images of the patient from reformats and captures made of them.
    _same("Image Type value 2", {one.image_type[1] if len(one.image_type) > 1 else "" for one in slices})
    _same("Photometric Interpretation", {one.photometric for one in slices})
    axes = cosines[0] / lengths[:, np.newaxis]
    normal = np.cross(axes[0], axes[1])
    return normal / np.linalg.norm(normal), axes


def _check_has_place(one: Frame) -> None:
    if one.position is None or one.orientation is None or one.pixel_spacing is None:
        raise GeometryError("Image Position (Patient), Image Orientation (Patient) or Pixel Spacing is absent from a slice.")
    if min(one.pixel_spacing) <= 0:
        raise GeometryError(f"The pixel spacing of a slice is {one.pixel_spacing[0]:g} x {one.pixel_spacing[1]:g} mm.")


def _same(what: str, values: set[str]) -> None:
    if len(values) > 1:
        raise GeometryError(f"{what} differs between slices: {len(values)} different ones.")


def _even_step(positions: NDArray[np.float64], normal: NDArray[np.float64], *, max_gap_mm: float) -> NDArray[np.float64]:
    """Return the step (3,) from slice to slice, when the positions stand evenly on one line along the normal."""
    heights = positions @ normal  # (K,)
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    if (twice := int((gaps < SAME_PLACE_MM).sum())) > 0:
        k = int(np.argmin(gaps))
        raise GeometryError(f"{twice} or more slices stand where another does, the first at {heights[k]:.2f} mm along the normal.")
    if usual <= max_gap_mm:
        raise GeometryError(f"Slices stand {usual:.3f} mm apart, which cannot be told from the tolerance of {max_gap_mm:g} mm.")
    worst = int(np.argmax(abs(gaps - usual)))
    if abs(gaps[worst] - usual) > max_gap_mm:
        missing = round(float(gaps[worst]) / usual) - 1
        hint = f"; {missing} missing" if missing > 0 and abs(gaps[worst] - (missing + 1) * usual) <= max_gap_mm else ""
        raise GeometryError(
            f"There is a gap of {gaps[worst]:.2f} mm between slices {worst + 1} and {worst + 2} of {len(positions)}, "
            f"where {usual:.2f} mm is usual{hint}."
        )
    aside = positions - positions[0] - np.outer(heights - heights[0], normal)  # (K, 3)
    shift = float(np.linalg.norm(aside, axis=1).max())
    if shift > max_gap_mm:
        degrees = math.degrees(math.atan2(float(np.linalg.norm(aside[-1])), float(heights[-1] - heights[0])))
        raise GeometryError(
            f"The slices are not stacked along their normal: they shift sideways by up to {shift:.2f} mm, "
            f"as with a gantry tilted by {degrees:.2f} degrees."
        )
    step: NDArray[np.float64] = (positions[-1] - positions[0]) / (len(positions) - 1)
    line = positions[0] + np.arange(len(positions))[:, np.newaxis] * step
    if (drift := float(np.linalg.norm(positions - line, axis=1).max())) > max_gap_mm:
        raise GeometryError(f"The spacing drifts: a slice is {drift:.2f} mm from where even steps would put it.")
    return step
