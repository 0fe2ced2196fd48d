"""Images without a place in the patient: one radiograph of a series, or the frames of an ultrasound or angiographic clip.

Which spacing was used is said in `Volume.spacing_from`, for a spacing at the detector is not one in the patient.
Not here: what stands in the patient (geometry.py, stacks.py), values (values.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from worker.domain import Volume
from worker.errors import GeometryError, NoSuitableSeries, PixelError
from worker.imaging.frame import Frame
from worker.imaging.stacks import Choice, Stack, listed

Values = Callable[[Sequence[Frame]], NDArray[np.float32]]

#: The detector is behind the patient, and magnification views of the breast reach 2 (PS3.3 §C.8.7.2, §C.8.11.7).
_LEAST_MAGNIFICATION, _MOST_MAGNIFICATION = 1.0, 10.0
#: Pixels are square when their sides differ by less than this part.
_SQUARE: Final = 1.01


def radiograph(frames: Sequence[Frame], views: Collection[str], laterality: str, values: Values) -> Volume:
    """Choose one image for presentation, of one of the views and of the side that is wanted: that of most pixels, then of the first UID.

    Raises
    ------
    NoSuitableSeries
        No image fits, or images of both sides do.
    PixelError
        The image has several frames.
    GeometryError
        Its pixels are not square, its spacing cannot be, or it is stored mirrored or turned.
    """
    # PS3.3 §C.8.11.1.1.1: raw data FOR PROCESSING are not what a person, or a network, was taught to read.
    fitting = [
        one
        for one in frames
        if one.presentation_intent != "FOR PROCESSING"
        and (not views or one.view_position in {"", *views})
        and (not laterality or one.laterality in {"", "U", laterality})
    ]
    if not fitting:
        wanted = (f" of view {' or '.join(views)}" if views else "") + (f" of side {laterality}" if laterality else "")
        raise NoSuitableSeries(f"The series has {len(frames)} images, none for presentation{wanted}.")
    sides = [sum(one.laterality == side for one in fitting) for side in ("R", "L")]
    if all(sides):
        raise NoSuitableSeries(
            f"The series has images of both sides, {sides[0]} of the right and {sides[1]} of the left, and either would do."
        )
    chosen = min(fitting, key=lambda one: (-one.pixels.size, one.sop_instance_uid, one.number))
    if (count := sum(one.sop_instance_uid == chosen.sop_instance_uid for one in fitting)) > 1:
        raise PixelError(f"A radiograph has one frame; this object has {count}.")
    _check_upright(chosen)
    spacing, source = spacing_of(chosen)
    if spacing is not None and max(spacing) > _SQUARE * min(spacing):
        raise GeometryError(f"The pixels are not square: {spacing[0]:g} x {spacing[1]:g} mm.")
    if chosen.aspect_ratio is not None and chosen.aspect_ratio[0] != chosen.aspect_ratio[1]:
        raise GeometryError(f"The pixels are not square: Pixel Aspect Ratio is {chosen.aspect_ratio[0]:g} to {chosen.aspect_ratio[1]:g}.")
    return _made([chosen], spacing, source, "", values)


def _check_upright(one: Frame) -> None:
    """Refuse a frontal film that says it is mirrored or turned: its heart would be on the other side.

    Frontal films of the trunk are stored as they are read, with the patient's left on the right of the image. Films of one limb have a
    side, and their rows run to where their hand or foot lay; what is said of lateral films is often wrong.
    """
    said = tuple(letters[:1] for letters in one.patient_orientation)
    if one.view_position in {"AP", "PA"} and one.laterality not in {"L", "R"} and len(said) == 2 and all(said) and said != ("L", "F"):
        raise GeometryError(
            "Patient Orientation (0020,0020) says that the rows of a frontal film do not run to the patient's left, or its columns not "
            "to the feet: it is stored mirrored or turned."
        )


def clip(frames: Sequence[Frame], choose: Choice, values: Values) -> Volume:
    """Take the frames of one instance in their order, or the single frames of a series in that of their Instance Number.

    Raises
    ------
    GeometryError
        There are several clips and none may be chosen, single frames share an Instance Number, or their spacing differs.
    """
    clips: dict[object, list[Frame]] = {}
    many = {one.sop_instance_uid for one in frames if one.number > 1}
    for one in sorted(frames, key=lambda one: (one.instance_number or 0, one.sop_instance_uid, one.number)):
        clips.setdefault(one.sop_instance_uid if one.sop_instance_uid in many else one.pixels.shape, []).append(one)
    stacks = [Stack(f"clip {n}" if len(clips) > 1 else "", tuple(of)) for n, of in enumerate(clips.values(), start=1)]
    if len(stacks) > 1 and choose == "only":
        raise GeometryError(f"The series has {listed(stacks, of='frame')}, and nothing says which is meant.")
    chosen = stacks[0] if choose in {"only", "first"} else stacks[-1] if choose == "last" else max(stacks, key=lambda one: len(one.frames))
    if not many & {chosen.frames[0].sop_instance_uid}:
        _check_numbered(chosen.frames)
    found = {spacing_of(one) for one in chosen.frames}
    if len(found) > 1:
        raise GeometryError(f"The pixel spacing differs between frames: {len(found)} different ones.")
    spacing, source = found.pop()
    return _made(chosen.frames, spacing, source, chosen.label, values)


def spacing_of(one: Frame) -> tuple[tuple[float, float] | None, str]:
    """Return (between rows, between columns) mm and the attribute that said so; None and '' if none does.

    Pixel Spacing comes first, for it may be calibrated (PS3.3 §10.7.1.3); where it only repeats that of the imager, and where
    there is that of the imager alone, it is divided by the magnification, if one is stated.

    Raises
    ------
    GeometryError
        A spacing or a magnification that cannot be.
    """
    said, source = one.pixel_spacing, "Pixel Spacing"
    if said is None and one.region_spacing is not None:
        said, source = one.region_spacing, "Sequence of Ultrasound Regions"
    if one.imager_spacing is not None and said in {None, one.imager_spacing}:
        said, source = one.imager_spacing, "Imager Pixel Spacing"
        if one.magnification is not None:
            if not _LEAST_MAGNIFICATION <= one.magnification <= _MOST_MAGNIFICATION:
                raise GeometryError(f"Estimated Radiographic Magnification Factor is {one.magnification:g}.")
            said, source = tuple(mm / one.magnification for mm in said), "Imager Pixel Spacing over magnification"
    if said is None:
        return None, ""
    if min(said) <= 0:
        raise GeometryError(f"The pixel spacing is {said[0]:g} x {said[1]:g} mm.")
    return (said[0], said[1]), source


def _check_numbered(frames: Sequence[Frame]) -> None:
    numbers = {one.instance_number for one in frames}
    if len(frames) > 1 and (None in numbers or len(numbers) < len(frames)):
        raise GeometryError(f"{len(frames)} single frames have {len(numbers)} Instance Numbers: their order is not known.")


def _made(frames: Sequence[Frame], spacing: tuple[float, float] | None, source: str, label: str, values: Values) -> Volume:
    return Volume(
        array=values(frames),
        affine=None,
        spacing_mm=(0.0, *(spacing or (0.0, 0.0))),
        modality=frames[0].modality,
        series_instance_uid=frames[0].series_instance_uid,
        sop_instance_uids=tuple(one.sop_instance_uid for one in frames),
        frame_numbers=tuple(one.number for one in frames),
        stack=label,
        spacing_from=source,
        view=frames[0].view_position,
        laterality=frames[0].laterality,
    )
