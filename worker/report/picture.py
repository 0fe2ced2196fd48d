"""The one plane that a person is shown: the slice or radiograph that matters most, windowed, with the findings' regions as outlines.

::

    Result ─▶ key plane ─▶ decoder pool: its file once more ─▶ window of the image, else percentiles ─▶ 8 bits, square pixels ─▶ Picture
                  └─ regions that cross it ─▶ patient coordinates ─▶ outlines

Nothing was kept of the volume: one file is cheaper to read again than a volume is to hold. Not here: the page around it (page.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, cast

import numpy as np
import pydicom
from contourpy import contour_generator
from numpy.typing import NDArray
from PIL import Image
from pydicom import config

from worker.domain import Finding, Region
from worker.errors import WorkerError
from worker.imaging.frame import Frame
from worker.imaging.values import values
from worker.report.result import Result

#: Longest side of a picture as it is embedded, pixels: more than a page shows.
_LONGEST: Final = 1000
#: Values that a window without an image's own shows, percent; metal and collimators are beyond.
_PERCENTILES: Final = (0.5, 99.5)
#: A window that makes nearly all of the image black or nearly all of it white is not one of this image.
_FLATTENED: Final = 0.98
# PS3.3 §C.7.6.1.1.1: the axes of LPS in letters, towards plus and minus.
_LETTERS: Final = (("L", "R"), ("P", "A"), ("H", "F"))
_OPPOSITE: Final = {"L": "R", "R": "L", "P": "A", "A": "P", "H": "F", "F": "H"}
_OUTLINED: Final = "outlined: what the answer rests on, not the edge of a lesion"
_VERDICTS: Final = ("positive", "uncertain", "negative")


@dataclass(frozen=True, slots=True)
class Outline:
    """The edge of one finding's region; points are (x, y) of the picture, (0, 0) its upper left corner and (1, 1) its lower right."""

    number: int
    lines: tuple[tuple[tuple[float, float], ...], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A plane as it is shown. ``gray`` (rows, columns) uint8 in square pixels; ``letters``: whereto left, right, top and bottom lie.

    ``frame_number`` counts from 1, and is 0 of an instance with one frame.
    """

    gray: NDArray[np.uint8]
    outlines: tuple[Outline, ...]
    letters: tuple[str, str, str, str]
    caption: str
    sop_class_uid: str
    sop_instance_uid: str
    frame_number: int


def ranked(findings: Sequence[Finding]) -> list[Finding]:
    """Put what a person must see first: positive, then uncertain, then negative; in each the more probable first."""
    return sorted(findings, key=lambda one: (_VERDICTS.index(one.verdict), -one.probability, one.name))


def key_picture(result: Result) -> Picture | None:
    """Draw the plane with most of the first finding that has a region; without one the middle plane of the first image.

    None where nothing was analysed, or the plane cannot be read.
    """
    if result.failure:
        return None
    try:
        found = _key_plane(result)
        frame = _frame(result, *found) if found else None
        return None if frame is None else _drawn(result, frame)
    except WorkerError:  # it was read before; what says why it cannot be now says nothing to the reader of a page
        return None


def _key_plane(result: Result) -> tuple[str, int] | None:
    """SOP Instance UID and frame number."""
    for finding in ranked(result.findings):
        for region in finding.regions:
            k = region.key_plane
            return region.sop_instance_uids[k], region.frame_numbers[k]
    planes = next(iter(result.planes.values()), ())
    return planes[len(planes) // 2] if planes else None


def _frame(result: Result, sop_instance_uid: str, number: int) -> Frame | None:
    if result.inputs is None or result.decoders is None:
        return None
    instances = (one for series in result.inputs.series.values() for one in series.instances)
    instance = next((one for one in instances if one.sop_instance_uid == sop_instance_uid), None)
    if instance is None:
        return None
    (frames,) = result.decoders.read([instance.path], [instance.sha256], color="luminance")
    return next((one for one in frames if one.number == number), None)


def _drawn(result: Result, frame: Frame) -> Picture:
    rows, columns = frame.pixels.shape
    gray, window = _windowed(frame, result.source.paths.get(frame.sop_instance_uid))
    high, wide = _proportions(frame)
    scale = _LONGEST / max(rows * high, columns * wide)
    size = (max(1, round(columns * wide * scale)), max(1, round(rows * high * scale)))
    shown = np.asarray(Image.fromarray(gray).resize(size, Image.Resampling.BICUBIC))
    outlines = [
        Outline(number, lines)
        for number, finding in enumerate(ranked(result.findings), start=1)
        if (lines := tuple(line for region in finding.regions for line in _outline(region, frame)))
    ]
    return Picture(
        gray=shown,
        outlines=tuple(outlines),
        letters=_letters(frame),
        caption=" · ".join(filter(None, (_place(result, frame), window, _OUTLINED if outlines else ""))),
        sop_class_uid=frame.sop_class_uid,
        sop_instance_uid=frame.sop_instance_uid,
        frame_number=frame.number if frame.is_enhanced or frame.number > 1 else 0,
    )


def _proportions(frame: Frame) -> tuple[float, float]:
    """How far rows and columns are apart; as far as each other where nothing sensible is said."""
    for said in (frame.pixel_spacing, frame.imager_spacing, frame.aspect_ratio):
        if said and min(said) > 0 and max(said) / min(said) < _LONGEST:
            return said[0], said[1]
    return 1.0, 1.0


def _windowed(frame: Frame, path: Path | None) -> tuple[NDArray[np.uint8], str]:
    """Show (rows, columns) in 8 bits by the image's own window (PS3.3 §C.11.2.1.2), else by percentiles; and say by which."""
    # As stored, for the window is meant for that; what MONOCHROME1 turns around is turned around last.
    plane = values([replace(frame, photometric="MONOCHROME2", presentation_lut_shape="")])[0]
    for centre, width in _windows(path):
        # PS3.3 §C.11.2.1.2.1: the linear function, from 0 to 1.
        share = (plane - (centre - 0.5)) / max(width - 1, 1e-6) + 0.5
        if max((share <= 0).mean(), (share >= 1).mean()) < _FLATTENED:
            said = f"window {width:g}, level {centre:g}".replace("-", "−")
            break
    else:
        low, high = np.percentile(plane, _PERCENTILES)
        share, said = (plane - low) / max(high - low, 1e-6), ""
    gray = (np.clip(share, 0, 1) * 255).round().astype(np.uint8)
    return (255 - gray if frame.photometric == "MONOCHROME1" else gray), said


def _windows(path: Path | None) -> Iterator[tuple[float, float]]:
    """Window Center and Width of the image, the first of several; none where it has a table in their place, or nothing sensible."""
    if path is None:
        return
    try:
        with config.disable_value_validation():  # it would quote what it finds odd
            said = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["WindowCenter", "WindowWidth"])
            centre, width = (float(np.atleast_1d(said[keyword].value)[0]) for keyword in ("WindowCenter", "WindowWidth"))
    except (KeyError, ValueError, TypeError, IndexError):
        return
    if math.isfinite(centre) and 1 <= width < math.inf:
        yield centre, width


def _outline(region: Region, frame: Frame) -> Iterator[tuple[tuple[float, float], ...]]:
    """The edges of `region` in the plane that `frame` is, if it crosses it."""
    rows, columns = frame.pixels.shape
    planes = zip(region.sop_instance_uids, region.frame_numbers, strict=True)
    this = next((k for k, plane in enumerate(planes) if plane == (frame.sop_instance_uid, frame.number)), -1)
    k0, j0, i0 = region.origin
    if not 0 <= this - k0 < len(region.mask):
        return
    mask = np.pad(region.mask[this - k0], 1).astype(np.float32)
    for line in cast("list[NDArray[np.float64]]", contour_generator(z=mask).lines(0.5)):
        steps = np.diff(line, axis=0)
        bends = np.append(True, np.append((steps[1:] != steps[:-1]).any(axis=1), True))
        points = _in_frame(line[bends] - 1 + (i0, j0), this, region, frame)  # (column, row), (0, 0) in the middle of the first pixel
        yield tuple((round(float((i + 0.5) / columns), 5), round(float((j + 0.5) / rows), 5)) for i, j in points)


def _in_frame(points: NDArray[np.float64], k: int, region: Region, frame: Frame) -> NDArray[np.float64]:
    """(column, row) of the analysed image → those of the file: a gantry that was put straight moved the one against the other."""
    if region.affine is None or frame.position is None or frame.orientation is None or frame.pixel_spacing is None:
        return points
    index = np.column_stack([points, np.full(len(points), k), np.ones(len(points))])  # (N, 4): i, j, k, 1
    aside = (index @ region.affine.T)[:, :3] - np.asarray(frame.position)
    along, down = np.asarray(frame.orientation[:3]), np.asarray(frame.orientation[3:])
    high, wide = frame.pixel_spacing
    return np.column_stack([aside @ along / wide, aside @ down / high])


def _letters(frame: Frame) -> tuple[str, str, str, str]:
    """Whereto left, right, top and bottom lie; '' where nobody says."""
    if frame.orientation is not None:
        right, bottom = (_letter(frame.orientation[at : at + 3]) for at in (0, 3))
    else:
        right, bottom = (word[:1] for word in (*frame.patient_orientation, "", "")[:2])
    left, top = _OPPOSITE.get(right, ""), _OPPOSITE.get(bottom, "")
    return left, right if left else "", top, bottom if top else ""


def _letter(direction: Sequence[float]) -> str:
    axis = int(np.argmax(np.abs(direction)))
    return _LETTERS[axis][direction[axis] < 0]


def _place(result: Result, frame: Frame) -> str:
    """Which plane it is: "Axial slice 27 of 40", "Radiograph, PA"."""
    for name, planes in result.planes.items():
        if (frame.sop_instance_uid, frame.number) not in planes:
            continue
        series = result.inputs.series.get(name) if result.inputs else None
        if len(planes) > 1:
            where = f"{series.orientation} slice" if series and series.orientation else "slice"
            return f"{where} {planes.index((frame.sop_instance_uid, frame.number)) + 1} of {len(planes)}".capitalize()
    return ", ".join(filter(None, (f"{frame.modality} image", frame.view_position)))
