"""Frames of one stack → a regular grid, proven; or a refusal with the numbers. And a tilted gantry put straight, when asked.

::

    frames ─▶ each has a place ─▶ order along the normal ─▶ even steps ─▶ on one straight line ─▶ along the normal? ─▶ Grid
                                                                                                     └─ no: tilt: refuse, or shear

Nothing is filled in and nothing is resampled, but for the shear of a tilted gantry, in plane, when the bundle asks for it.
Frame: LPS, millimeters. Not here: what belongs to one stack (stacks.py), values (values.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from worker.errors import GeometryError
from worker.imaging.frame import Frame

#: With two slices there is one gap, and nothing to tell whether a slice is missing from it.
MIN_SLICES: Final = 3
#: Frames nearer than this stand in the same place, mm.
SAME_PLACE_MM: Final = 0.01
# PS3.3 §C.7.6.2.1.1: unit length and orthogonal; decimal strings are cut to a few digits.
_COSINE_TOLERANCE: Final = 1e-3
#: No scanner reaches farther, mm, and no pixel is larger or smaller: outside, arithmetic would overflow before it is noticed.
_FARTHEST_MM, _SMALLEST_MM, _LARGEST_MM = 1e5, 1e-4, 1e3
#: Gantries tilt by 30 degrees at most; more is no tilt but another error, and the shear would make what was never scanned.
_MOST_TILT_DEGREES: Final = 45.0

GantryTilt = Literal["refuse", "correct"]


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Where the frames of one stack lie.

    ``frames`` in order along the normal. ``affine`` (4, 4): index (i, j, k, 1) of the straightened array → LPS mm;
    ``spacing_mm`` (k, j, i). ``shear`` (row, column): by how many pixels each frame stands aside of the one before, (0, 0)
    unless a tilted gantry is to be corrected; ``start`` and ``size`` (row, column) are those of the straightened planes.
    """

    frames: tuple[Frame, ...]
    affine: NDArray[np.float64]
    spacing_mm: tuple[float, float, float]
    shear: tuple[float, float]
    start: tuple[int, int]
    size: tuple[int, int]


def regular(frames: Sequence[Frame], *, max_gap_mm: float, gantry_tilt: GantryTilt = "refuse") -> Grid:
    """Prove that `frames`, of one orientation, size and spacing, stand evenly on one straight line, and say where.

    Parameters
    ----------
    max_gap_mm
        Largest departure of a frame from even spacing along one straight line that still counts as regular.

    Raises
    ------
    GeometryError
        Fewer than three slices, none or no sensible place, a slice that is missing or there twice, uneven spacing, a tilted
        gantry that is not to be corrected, a Slice Location that contradicts the order of the positions.
    """
    if len(frames) < MIN_SLICES:
        raise GeometryError(f"A volume needs at least {MIN_SLICES} slices; the series has {len(frames)} that are no localizer.")
    axes = _axes(frames)
    normal = np.cross(axes[0], axes[1])
    positions = np.array([one.position for one in frames], np.float64)  # (K, 3)
    order = np.lexsort((np.array([one.sop_instance_uid for one in frames]), positions @ normal))
    frames, positions = [frames[k] for k in order], positions[order]
    step = _even_step(positions, normal, max_gap_mm=max_gap_mm)
    _check_slice_locations(frames, positions @ normal)
    row_mm, column_mm = (float(mm) for mm in np.median(np.array([one.pixel_spacing for one in frames]), axis=0))
    origin, between = positions[0], float(step @ normal)
    aside = step - between * normal
    shear, start, size = (0.0, 0.0), (0, 0), frames[0].pixels.shape
    if np.linalg.norm(aside) * (len(frames) - 1) > max_gap_mm:
        _check_tilt(aside, between, len(frames), gantry_tilt)
        shear = (float(aside @ axes[1]) / row_mm, float(aside @ axes[0]) / column_mm)
        start, size = _bounds(shear, len(frames), frames[0].pixels.shape)
        origin = origin + start[0] * row_mm * axes[1] + start[1] * column_mm * axes[0]
        step = between * normal
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2], affine[:3, 3] = axes[0] * column_mm, axes[1] * row_mm, step, origin
    return Grid(tuple(frames), affine, (float(np.linalg.norm(step)), row_mm, column_mm), shear, start, size)


def check_place(one: Frame) -> None:
    """Refuse a frame that says not, or not sensibly, where it lies.

    Raises
    ------
    GeometryError
        An attribute is absent, or its numbers cannot be.
    """
    if one.position is None or one.orientation is None or one.pixel_spacing is None:
        raise GeometryError("Image Position (Patient), Image Orientation (Patient) or Pixel Spacing is absent from a slice.")
    if not (min(one.pixel_spacing) >= _SMALLEST_MM and max(one.pixel_spacing) <= _LARGEST_MM):
        raise GeometryError(f"The pixel spacing of a slice is {one.pixel_spacing[0]:g} x {one.pixel_spacing[1]:g} mm.")
    if max(map(abs, one.position)) > _FARTHEST_MM:
        raise GeometryError(f"A slice stands {max(map(abs, one.position)):g} mm from the origin of its frame of reference.")
    row, column = one.orientation[:3], one.orientation[3:]
    lengths, dot = (math.hypot(*row), math.hypot(*column)), sum(a * b for a, b in zip(row, column, strict=True))
    if max(abs(lengths[0] - 1), abs(lengths[1] - 1), abs(dot)) > _COSINE_TOLERANCE:
        raise GeometryError(f"The direction cosines have lengths {lengths[0]:.4f} and {lengths[1]:.4f} and a dot product of {dot:.4f}.")


def straighten(array: NDArray[np.float32], grid: Grid) -> NDArray[np.float32]:
    """Shear (K, J, I) onto the grid's normal, by linear interpolation along columns, then along rows.

    Outside of what was scanned, and where one of the two neighbors is outside, stands the least value of `array`.
    """
    if grid.shear == (0.0, 0.0):
        return array
    least = array.min()
    straight = np.full((len(array), *grid.size), least, np.float32)
    for k, plane in enumerate(array):
        rows = _shifted(plane, grid.start[0] - k * grid.shear[0], grid.size[0], least)
        straight[k] = _shifted(rows.T, grid.start[1] - k * grid.shear[1], grid.size[1], least).T
    return straight


def _axes(frames: Sequence[Frame]) -> NDArray[np.float64]:
    """Return the two directions in the plane (2, 3), of unit length and at right angles; the median, for no slice is the first."""
    cosines = np.median(np.array([one.orientation for one in frames], np.float64), axis=0).reshape(2, 3)
    along_row = cosines[0] / np.linalg.norm(cosines[0])
    along_column = cosines[1] - (cosines[1] @ along_row) * along_row
    return np.stack([along_row, along_column / np.linalg.norm(along_column)])


def _even_step(positions: NDArray[np.float64], normal: NDArray[np.float64], *, max_gap_mm: float) -> NDArray[np.float64]:
    """Return the step (3,) from slice to slice, when the positions stand evenly on one straight line."""
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
    step: NDArray[np.float64] = (positions[-1] - positions[0]) / (len(positions) - 1)
    off = positions - positions[0] - np.arange(len(positions))[:, np.newaxis] * step  # (K, 3) from where even steps would put it
    along = off @ normal
    if (aside := float(np.linalg.norm(off - np.outer(along, normal), axis=1).max())) > max_gap_mm:
        raise GeometryError(f"The slices are not stacked along a straight line: they shift sideways by up to {aside:.2f} mm.")
    if (drift := float(np.linalg.norm(off, axis=1).max())) > max_gap_mm:
        raise GeometryError(f"The spacing drifts: a slice is {drift:.2f} mm from where even steps would put it.")
    return step


def _check_slice_locations(frames: Sequence[Frame], heights: NDArray[np.float64]) -> None:
    """Refuse positions that most Slice Locations confirm and some contradict: two slices have changed places.

    Slice Location (PS3.3 §C.7.6.2.1.2) counts from where its writer likes, up or down. Where most slices disagree it means
    something else than the height along the normal and is no witness.
    """
    said = np.array([math.nan if one.slice_location is None else one.slice_location for one in frames])
    if not np.isfinite(said).all():
        return
    half = float(np.median(np.diff(heights))) / 2
    wrong = min(int((abs((rest := said - sign * heights) - np.median(rest)) > half).sum()) for sign in (1, -1))
    if 0 < wrong < len(frames) / 2:
        raise GeometryError(f"Slice Location of {wrong} of {len(frames)} slices contradicts their Image Position (Patient).")


def _check_tilt(aside: NDArray[np.float64], between: float, count: int, gantry_tilt: GantryTilt) -> None:
    shift = float(np.linalg.norm(aside))
    degrees = math.degrees(math.atan2(shift, between))
    if gantry_tilt == "refuse" or degrees > _MOST_TILT_DEGREES:
        raise GeometryError(
            f"The slices are not stacked along their normal: they shift sideways by up to {shift * (count - 1):.2f} mm, "
            f"as with a gantry tilted by {degrees:.2f} degrees."
        )


def _bounds(shear: tuple[float, float], count: int, size: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the first row and column, counted on the first frame's grid, and the size, that hold every frame."""
    ends = [(min(0.0, by * (count - 1)), max(0.0, by * (count - 1))) for by in shear]
    # Rounded first: a shear of 1e-12 pixels, which is what cosines leave of none, adds no column.
    start = [math.floor(round(low, 3)) for low, _ in ends]
    wide = [math.ceil(round(high, 3)) - low + n for (_, high), low, n in zip(ends, start, size, strict=True)]
    if wide[0] > 3 * size[0] or wide[1] > 3 * size[1]:
        raise GeometryError(f"The tilted slices cover {wide[0]} x {wide[1]} pixels together, of {size[0]} x {size[1]} each.")
    return (start[0], start[1]), (wide[0], wide[1])


def _shifted(plane: NDArray[np.float32], by: float, size: int, least: np.float32) -> NDArray[np.float32]:
    """Sample the first axis of `plane` (n, m) at by, by + 1, … (size, m), linearly; `least` outside."""
    whole = math.floor(round(by, 3))
    part = np.float32(max(by - whole, 0.0)) if abs(by - round(by)) > 1e-3 else np.float32(0)
    lower = np.arange(size) + whole
    inside = (lower >= 0) & (lower + (part > 0) < len(plane))
    out = np.full((size, plane.shape[1]), least, np.float32)
    low = plane[lower[inside]]
    out[inside] = low if part == 0 else low + part * (plane[lower[inside] + 1] - low)
    return out
