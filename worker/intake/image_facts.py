"""What a header says of its image, from the raw values of its top level: for the rules that choose series.

Nothing here refuses an instance: what is malformed, of another kind or too long is not known. Bounded by `header._MAX_VALUE_BYTES`
a value. Not here: what the facts mean for a bundle (selection.py).
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from typing import Final

from worker.domain import ImageFacts, Orientation
from worker.domain.images import VIEW_OF_CODE
from worker.intake.facts import number

_IMAGE_TYPE, _INTENT, _REGION = 0x00080008, 0x00080068, 0x00082218
_AGE, _AGENT, _AGENTS, _BODY_PART = 0x00101010, 0x00180010, 0x00180012, 0x00180015
_THICKNESS, _SPACING, _IMAGER, _KERNEL, _VIEW = 0x00180050, 0x00180088, 0x00181164, 0x00181210, 0x00185101
_ORIENTATION, _SERIES_SIDE, _IMAGE_SIDE, _PIXELS, _VIEWS = 0x00200037, 0x00200060, 0x00200062, 0x00280030, 0x00540220
#: Sequences of which the first item's code is read.
CODED: Final = frozenset({_REGION, _VIEWS, _AGENTS})
WANTED: Final = CODED | {
    _IMAGE_TYPE, _INTENT, _AGE, _AGENT, _BODY_PART, _THICKNESS, _SPACING, _IMAGER, _KERNEL, _VIEW, _ORIENTATION, _SERIES_SIDE,
    _IMAGE_SIDE, _PIXELS,
}  # fmt: skip

_CONTROLS: Final = re.compile(rb"[\x01-\x1f\x7f]")
_CODE_VALUE: Final = 0x00080100
_CODE_STRING: Final = re.compile(r"[A-Z0-9_ ]{1,16}")
_CODE: Final = re.compile(r"[A-Za-z0-9.-]{1,16}")
# PS3.5 §6.2: AS.
_AGE_STRING: Final = re.compile(r"([0-9]{3})([DWMY])")
_A_YEAR: Final = {"D": 365.25, "W": 365.25 / 7, "M": 12.0, "Y": 1.0}
#: What is written where there was no agent; the attribute should be empty or absent then (PS3.3 §C.7.6.4).
_NO_AGENT: Final = frozenset({"", "NO", "NONE", "N", "0", "-", "WITHOUT", "NO CONTRAST", "W/O", "OHNE", "UNKNOWN"})

#: How far the two directions of an image may be from unit length and a right angle, and its normal from an axis of the patient.
_COSINE_TOLERANCE: Final = 0.01
_MAX_TILT: Final = math.cos(math.radians(30))
#: Values of Image Type that are kept (four have a meaning, PS3.3 §C.8.16.1; vendors add some more).
_MAX_VALUES: Final = 16


def image_facts(values: Mapping[int, bytes], *, is_implicit: bool) -> ImageFacts:
    """Read the facts from the raw values by tag; sequences are their items as they stand, in the data set's encoding."""
    told = {tag: _text(values.get(tag, b"")) for tag in (_INTENT, _AGENT, _IMAGE_SIDE, _SERIES_SIDE, _KERNEL, _AGE)}
    side = told[_IMAGE_SIDE] or told[_SERIES_SIDE]
    age = _AGE_STRING.fullmatch(told[_AGE])
    return ImageFacts(
        image_type=_image_type(values.get(_IMAGE_TYPE, b"")),
        # Not ASCII, as it should be, it is still another part than those a bundle names.
        body_part=_CONTROLS.sub(b"", values.get(_BODY_PART, b"")[:64]).decode("latin-1").strip("\0 ").upper()[:16].strip(),
        region=first_code(values.get(_REGION, b""), is_implicit=is_implicit),
        laterality=side if side in ("L", "R", "B", "U") else "",
        orientation=_orientation(values.get(_ORIENTATION, b"")),
        slice_mm=_length_mm(values.get(_SPACING, b"")) or _length_mm(values.get(_THICKNESS, b"")),
        pixel_mm=_pixel_mm(values.get(_PIXELS, b"")) or _pixel_mm(values.get(_IMAGER, b"")),
        has_contrast=told[_AGENT] not in _NO_AGENT or len(values.get(_AGENTS, b"")) > 8,  # longer than an empty item
        kernel=told[_KERNEL][:64],
        intent=told[_INTENT] if told[_INTENT] in ("FOR PRESENTATION", "FOR PROCESSING") else "",
        age_years=round(int(age[1]) / _A_YEAR[age[2]], 2) if age else None,
    )


def view_of(values: Mapping[int, bytes], *, is_implicit: bool) -> str:
    """View Position, else the one that the code of View Code Sequence stands for; '' where neither is known."""
    view = _text(values.get(_VIEW, b""))
    if view:
        return view if _CODE_STRING.fullmatch(view) else ""
    return VIEW_OF_CODE.get(first_code(values.get(_VIEWS, b""), is_implicit=is_implicit), "")


def first_code(items: bytes, *, is_implicit: bool) -> str:
    """The Code Value of a sequence's first item; '' where there is none, or something longer stands before it."""
    try:
        if struct.unpack_from("<HH", items) != (0xFFFE, 0xE000):
            return ""
        position = 8
        while True:
            group, element, vr, length = struct.unpack_from("<HH2sH", items, position)
            if is_implicit or vr == b"UN":
                (length,) = struct.unpack_from("<L", items, position + (4 if is_implicit else 8))
                position += 0 if is_implicit else 4
            if (group << 16 | element) > _CODE_VALUE:
                return ""
            position += 8
            if (group << 16 | element) == _CODE_VALUE:
                found = _text(items[position : position + length])
                return found if _CODE.fullmatch(found) else ""
            position += length
    except struct.error:
        return ""


def _text(raw: bytes) -> str:
    """A value that is ASCII by its kind, in upper case; '' where it is none or unreasonably long."""
    return raw.decode("ascii").strip("\0 ").upper() if len(raw) <= 256 and raw.isascii() and not _CONTROLS.search(raw) else ""


def _image_type(raw: bytes) -> tuple[str, ...]:
    words = tuple(word if _CODE_STRING.fullmatch(word) else "" for word in (_text(one) for one in raw.split(b"\\")[:_MAX_VALUES]))
    return words if any(words) else ()


def _orientation(raw: bytes) -> Orientation:
    """Return the plane that Image Orientation (Patient) names (PS3.3 §C.7.6.2.1.1); "" for an oblique or a malformed one."""
    values = _numbers(raw)
    if len(values) != 6:
        return ""
    row, column = values[:3], values[3:]
    faults = (math.hypot(*row) - 1, math.hypot(*column) - 1, sum(r * c for r, c in zip(row, column, strict=True)))
    if not all(abs(fault) <= _COSINE_TOLERANCE for fault in faults):
        return ""
    # LPS: the normal of a sagittal image runs along x, of a coronal one along y, of an axial one along z.
    sagittal, coronal, axial = (abs(row[a] * column[b] - row[b] * column[a]) for a, b in ((1, 2), (2, 0), (0, 1)))
    length = math.hypot(sagittal, coronal, axial)
    planes: tuple[tuple[float, Orientation], ...] = ((axial, "axial"), (coronal, "coronal"), (sagittal, "sagittal"))
    return next((name for share, name in planes if share >= _MAX_TILT * length), "")


def _length_mm(raw: bytes) -> float:
    """Return the one positive number that `raw` holds, 0 for anything else."""
    lengths = _numbers(raw)
    return lengths[0] if len(lengths) == 1 and 0 < lengths[0] < math.inf else 0.0


def _pixel_mm(raw: bytes) -> tuple[float, ...]:
    """Return the two positive numbers that `raw` holds, () for anything else."""
    lengths = tuple(_numbers(raw))
    return lengths if len(lengths) == 2 and all(0 < one < math.inf for one in lengths) else ()


def _numbers(raw: bytes) -> list[float]:
    """Return the values of a DS (PS3.5 §6.2); none of them when one is malformed."""
    found = [number(part.strip(" ")) for part in raw.decode("latin-1").rstrip("\0").split("\\")]
    return [] if None in found else [value for value in found if value is not None]
