"""One series to one `Volume`: slices in order, geometry proven regular, values in HU; or a refusal in words.

::

    series ─▶ DecoderPool.read ─▶ frames ─┬─ "volume": localizers out ─▶ stacks.py ─▶ one stack ─▶ geometry.py: regular ─▶ values ─▶ Volume
                                          ├─ "radiograph": planar.py: the largest image that fits ─▶ bright is dense
                                          └─ "frames": planar.py: one clip

What does not form one regular volume raises `GeometryError`, with the numbers; nothing is filled in, and nothing is resampled but
for the shear of a tilted gantry when the bundle asks for it.
Frame: LPS, millimeters. Not here: files and decoders (decoding.py), windows and resizing (the bundle's transforms).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from worker.domain import Series, Volume
from worker.errors import GeometryError, PixelError
from worker.imaging import planar
from worker.imaging.decoding import DecoderPool
from worker.imaging.frame import Frame
from worker.imaging.geometry import MIN_SLICES, GantryTilt, Grid, check_place, regular, straighten
from worker.imaging.stacks import Choice, Stack, listed, split
from worker.imaging.values import values

Kind = Literal["volume", "radiograph", "frames"]
Unit = Literal["", "HU", "SUVbw"]

#: Objects with functional groups whose frames are slices of the patient (PS3.4 §B.5); not segmentations, maps or microscopy.
ENHANCED: Final = frozenset({
    "1.2.840.10008.5.1.4.1.1.2.1",  # Enhanced CT
    "1.2.840.10008.5.1.4.1.1.2.2",  # Legacy Converted Enhanced CT
    "1.2.840.10008.5.1.4.1.1.4.1",  # Enhanced MR
    "1.2.840.10008.5.1.4.1.1.4.4",  # Legacy Converted Enhanced MR
    "1.2.840.10008.5.1.4.1.1.130",  # Enhanced PET
    "1.2.840.10008.5.1.4.1.1.128.1",  # Legacy Converted Enhanced PET
    "1.2.840.10008.5.1.4.1.1.13.1.1",  # X-Ray 3D Angiographic
    "1.2.840.10008.5.1.4.1.1.13.1.2",  # X-Ray 3D Craniofacial
    "1.2.840.10008.5.1.4.1.1.13.1.3",  # Breast Tomosynthesis
})  # fmt: skip
#: And those whose frames are pictures without a place: XA, XRF, multi-frame secondary captures.
_PICTURES: Final = ENHANCED | {
    "1.2.840.10008.5.1.4.1.1.12.1.1", "1.2.840.10008.5.1.4.1.1.12.2.1", "1.2.840.10008.5.1.4.1.1.7.1",
    "1.2.840.10008.5.1.4.1.1.7.2", "1.2.840.10008.5.1.4.1.1.7.3", "1.2.840.10008.5.1.4.1.1.7.4",
}  # fmt: skip


def load(
    series: Series,
    *,
    kind: Kind,
    pool: DecoderPool,
    views: Collection[str] = (),
    laterality: str = "",
    max_gap_mm: float = 0.1,
    gantry_tilt: GantryTilt = "refuse",
    stack: Choice = "only",
    color: Literal["refuse", "luminance"] = "refuse",
    unit: Unit = "",
) -> Volume:
    """Read one series into a regular volume, into one radiograph, or into the frames of one clip.

    A volume's slices are ordered along the normal of Image Orientation (Patient) by Image Position (Patient), not by Instance
    Number, which vendors do not keep in order. Images whose Image Type says LOCALIZER are left out when others remain;
    `sop_instance_uids` and `frame_numbers` name the frames used. Of several radiographs in a series the one with most pixels is
    taken, then the one whose SOP Instance UID sorts first.

    Padding (PS3.3 §C.7.5.1.1.2) takes the smallest value that is not padding. No window is applied.

    Parameters
    ----------
    views, laterality
        View Positions (PS3.3 §C.8.1.1) and side, R or L, of a radiograph that will do; an image that names none will do, too.
        Empty: any; but not one of both sides.
    max_gap_mm
        Largest departure of a slice from even spacing along one straight line that still counts as regular.
    gantry_tilt
        "refuse" slices that are not stacked along their normal, or "correct" them: sheared in plane by linear interpolation onto
        a grid whose third axis is the normal, the least value outside.
    stack
        "only": refuse a series of several stacks, naming them. "first" or "last" in the order of `stacks.split` (by time of
        acquisition), or "largest" (then the first): of the stacks of three slices or more, or of the clips. If that one forms no
        volume, it is refused: the next phase does not stand in for the one that is wanted.
    color
        "refuse" images with colors, or reduce them to their "luminance" (PS3.3 §C.7.6.3.1.2).
    unit
        "HU" or "SUVbw", refused where the header does not allow it; "" for what the rescale gives; see `values`.

    Returns
    -------
    Volume
        ``array`` (K, J, I) float32: HU for CT, rescaled stored values otherwise, MONOCHROME1 inverted over the range of Bits
        Stored so that bright is dense (not for CT and PT, whose values are physical). ``affine`` index (i, j, k, 1) → LPS mm,
        None for a radiograph and frames. ``spacing_mm`` (k, j, i); these have k = 0, and 0 where unknown.

    Raises
    ------
    GeometryError
        Fewer than three slices, different orientations, sizes, spacings or frames of reference, a tilted gantry, a slice that
        is missing or there twice, uneven spacing, several stacks and none chosen.
    NoSuitableSeries
        No radiograph of the view and side.
    PixelError
        From the decoder; or rescale values that are missing, zero or not Hounsfield units, or pixels that are not finite.
    DecoderDied, Retry
        See `DecoderPool.read`.

    References
    ----------
    PS3.3 §C.7.6.2.1.1 (Image Position and Orientation), §C.11.1 (Modality LUT), §C.7.6.3.1.2 (Photometric Interpretation),
    §C.7.6.16 (functional groups).
    """
    frames, in_unit = _read(series, pool, color=color), partial(values, unit=unit)
    if kind == "radiograph":
        return planar.radiograph(frames, views, laterality.upper(), in_unit)
    if kind == "frames":
        return planar.clip(frames, stack, in_unit)
    return _volume(frames, max_gap_mm=max_gap_mm, gantry_tilt=gantry_tilt, choose=stack, unit=unit)


def _read(series: Series, pool: DecoderPool, *, color: str) -> list[Frame]:
    if not series.instances:
        raise GeometryError("The series has 0 instances.")
    read = pool.read([one.path for one in series.instances], [one.sha256 for one in series.instances], color=color)
    for (first, *_), instance in zip(read, series.instances, strict=True):
        if (first.sop_instance_uid, first.series_instance_uid) != (instance.sop_instance_uid, series.series_instance_uid):
            raise PixelError("A stored file holds another instance than its row says.")
        if first.is_enhanced and first.sop_class_uid not in _PICTURES:
            raise GeometryError("The frames of this SOP class, which has functional groups, are no images of the patient.")
    _check_whole([first for first, *_ in read])
    return [one for frames in read for one in frames]


def _check_whole(instances: Sequence[Frame]) -> None:
    """Refuse an object that was split into several instances, of which some are not there; given is one frame of each instance."""
    for uid in {one.concatenation_uid for one in instances} - {""}:
        parts = [one for one in instances if one.concatenation_uid == uid]
        if len(parts) < (total := max(one.concatenated for one in parts)):
            raise GeometryError(f"The series has {len(parts)} of the {total} instances into which one object was split.")


def _volume(frames: Sequence[Frame], *, max_gap_mm: float, gantry_tilt: GantryTilt, choose: Choice, unit: Unit) -> Volume:
    # PS3.3 §C.8.2.1.1.1 and §C.8.3.1.1.1: value 3 of Image Type.
    frames = [one for one in frames if "LOCALIZER" not in one.image_type[2:]]
    if len(frames) < MIN_SLICES:
        raise GeometryError(f"A volume needs at least {MIN_SLICES} slices; the series has {len(frames)} that are no localizer.")
    for one in frames[::-1]:  # of an object with several frames and no places, that is said first
        _check_is_slice(one)
    stacks, cause = split(frames)
    if choose == "only" and len(stacks) > 1:
        raise GeometryError(f"{cause} The series has {listed(stacks)}, and nothing says which is meant.")
    label, grid = _chosen(stacks, choose, max_gap_mm=max_gap_mm, gantry_tilt=gantry_tilt)
    array: NDArray[np.float32] = straighten(values(grid.frames, unit=unit), grid)
    return Volume(
        array=array,
        affine=grid.affine,
        spacing_mm=grid.spacing_mm,
        modality=grid.frames[0].modality,
        series_instance_uid=grid.frames[0].series_instance_uid,
        sop_instance_uids=tuple(one.sop_instance_uid for one in grid.frames),
        frame_numbers=tuple(one.number for one in grid.frames),
        stack=label,
        spacing_from="Pixel Spacing",
    )


def _check_is_slice(one: Frame) -> None:
    if "MOSAIC" in one.image_type[2:]:
        raise GeometryError("A Siemens mosaic holds the slices of a volume side by side in one frame; it is not taken apart.")
    if one.number > 1 and one.sop_class_uid not in ENHANCED:
        raise GeometryError("The object has several frames and no position of each: frames, and not a volume.")
    check_place(one)


def _chosen(stacks: Sequence[Stack], choose: Choice, *, max_gap_mm: float, gantry_tilt: GantryTilt) -> tuple[str, Grid]:
    """Take the wanted one of the stacks, stray slices aside; if that forms no volume, no other stands in for it: another phase is none."""
    large = [one for one in stacks if len(one.frames) >= MIN_SLICES] or stacks
    wanted = max(large, key=lambda one: len(one.frames)) if choose == "largest" else large[-1 if choose == "last" else 0]
    try:
        return wanted.label, regular(wanted.frames, max_gap_mm=max_gap_mm, gantry_tilt=gantry_tilt)
    except GeometryError as exc:
        raise GeometryError(f"{exc} It is the {choose} of {listed(stacks)}." if len(stacks) > 1 else str(exc)) from exc
