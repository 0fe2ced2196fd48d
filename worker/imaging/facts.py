"""Elements of one file → the facts of its frames. Runs in a decoding process (child.py), and nowhere else.

Sentences say which attribute and which numbers; never a value of one, which could be a patient's.
Not here: pixels (pixels.py), what facts mean together (volume.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import pydicom
from pydicom.datadict import dictionary_description, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.tag import Tag

from worker.errors import GeometryError, PixelError

_MAX_TEXT: Final = 64

_KEYWORDS: Final = (
    "SOPInstanceUID", "SOPClassUID", "SeriesInstanceUID", "Modality", "ImageType", "InstanceNumber", "FrameOfReferenceUID",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio",
    "SamplesPerPixel", "PhotometricInterpretation", "PresentationLUTShape", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "RescaleSlope", "RescaleIntercept", "RescaleType", "WindowCenter", "WindowWidth", "ViewPosition", "PresentationIntentType",
    "ModalityLUTSequence", "SharedFunctionalGroupsSequence", "PixelData",
    # How pixels are laid out and coloured (layout.py, samples.py, color.py).
    "PlanarConfiguration", "ExtendedOffsetTable", "ExtendedOffsetTableLengths", "FloatPixelData", "DoubleFloatPixelData",
    "RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableDescriptor",
    "RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData", "BluePaletteColorLookupTableData",
    # What a standardized uptake value needs (uptake.py).
    "Units", "SUVType", "CorrectedImage", "DecayCorrection", "RadiopharmaceuticalInformationSequence", "PatientWeight",
    "SeriesDate", "SeriesTime", "AcquisitionDate", "AcquisitionTime",
)  # fmt: skip
# Overlay Bit Position of each overlay group (PS3.3 §C.9.2): which of the unused high bits older files put an overlay into.
OVERLAY_BITS: Final = tuple((group << 16) | 0x0102 for group in range(0x6000, 0x6020, 2))
TAGS: Final = {keyword: Tag(tag_for_keyword(keyword) or 0) for keyword in _KEYWORDS}
WANTED: Final = [*TAGS.values(), *(Tag(tag) for tag in OVERLAY_BITS)]

#: The wanted elements by tag. A dict, for a `Dataset` spends 2 ms a file on looking them up again and again.
Elements = dict[int, DataElement]


def facts_of(elements: Elements, transfer_syntax_uid: str) -> dict[str, Any]:
    """The facts of one file as `Frame` names them."""
    return {
        "sop_instance_uid": text_of(elements, "SOPInstanceUID"),
        "sop_class_uid": text_of(elements, "SOPClassUID"),
        "series_instance_uid": text_of(elements, "SeriesInstanceUID"),
        "transfer_syntax_uid": transfer_syntax_uid,
        "modality": text_of(elements, "Modality"),
        "image_type": [str(part)[:_MAX_TEXT] for part in values_of(elements, "ImageType")[:16]],
        "instance_number": integer_of(elements, "InstanceNumber") if values_of(elements, "InstanceNumber") else None,
        "photometric": text_of(elements, "PhotometricInterpretation"),
        "presentation_lut_shape": text_of(elements, "PresentationLUTShape"),
        "bits_stored": integer_of(elements, "BitsStored"),
        "is_signed": integer_of(elements, "PixelRepresentation") == 1,
        "is_enhanced": TAGS["SharedFunctionalGroupsSequence"] in elements,
        "has_modality_lut": TAGS["ModalityLUTSequence"] in elements,
        "rescale_slope": number_of(elements, "RescaleSlope"),
        "rescale_intercept": number_of(elements, "RescaleIntercept"),
        "rescale_type": text_of(elements, "RescaleType"),
        "position": numbers_of(elements, "ImagePositionPatient", 3),
        "orientation": numbers_of(elements, "ImageOrientationPatient", 6),
        "pixel_spacing": numbers_of(elements, "PixelSpacing", 2),
        "imager_spacing": numbers_of(elements, "ImagerPixelSpacing", 2),
        "aspect_ratio": numbers_of(elements, "PixelAspectRatio", 2),
        "frame_of_reference_uid": text_of(elements, "FrameOfReferenceUID"),
        "window": _window(elements),
        "view_position": text_of(elements, "ViewPosition"),
        "presentation_intent": text_of(elements, "PresentationIntentType"),
    }


def _named(keyword: str) -> str:
    tag = TAGS[keyword]
    return f"{dictionary_description(tag)} ({tag.group:04X},{tag.element:04X})"


def values_of(elements: Elements, keyword: str) -> Sequence[Any]:
    """Return the values of an element; none if it is absent or empty."""
    element = elements.get(TAGS[keyword])
    if element is None or element.value in (None, "", b"", []):
        return ()
    value = element.value
    return tuple(value) if isinstance(value, list | pydicom.multival.MultiValue) else (value,)


def text_of(elements: Elements, keyword: str) -> str:
    """Return the first value of a UI or CS, neither of which is longer than 64 characters (PS3.5 §6.2)."""
    text = str(next(iter(values_of(elements, keyword)), "")).strip()
    if len(text) > _MAX_TEXT:
        raise PixelError(f"{_named(keyword)} has {len(text)} characters; {_MAX_TEXT} are the most.")
    return text


def integer_of(elements: Elements, keyword: str, *, default: int | None = None) -> int:
    """The one whole number of an element; `default` if it is absent or empty.

    Raises
    ------
    PixelError
        It is no whole number, or absent and there is no default.
    """
    values = values_of(elements, keyword)
    if not values and default is not None:
        return default
    # The VR must be the dictionary's: a Rows of VR UL is how sizes overflow (Orthanc CVE-2026-5437 ff.).
    if len(values) == 1 and isinstance(values[0], int) and elements[TAGS[keyword]].VR in {"US", "SS", "IS"}:
        return int(values[0])
    raise PixelError(f"{_named(keyword)} is absent or not one whole number.")


def number_of(elements: Elements, keyword: str) -> float | None:
    """The one finite number of an element; None if it is absent or empty."""
    values = values_of(elements, keyword)
    if not values:
        return None
    numbers = _floats(values)
    if len(numbers) != 1:
        raise PixelError(f"{_named(keyword)} is not one finite number.")
    return numbers[0]


def numbers_of(elements: Elements, keyword: str, count: int) -> list[float] | None:
    """Exactly `count` finite numbers of an element; None if it is absent or empty."""
    values = values_of(elements, keyword)
    if not values:
        return None
    numbers = _floats(values)
    if len(numbers) != count:
        raise GeometryError(f"{_named(keyword)} does not hold {count} finite numbers.")
    return numbers


def _window(elements: Elements) -> list[tuple[float, float]]:
    centers, widths = _floats(values_of(elements, "WindowCenter")), _floats(values_of(elements, "WindowWidth"))
    return list(zip(centers, widths, strict=True)) if len(centers) == len(widths) else []


def _floats(values: Sequence[Any]) -> list[float]:
    """Return the values as floats; none at all if one of them is not a finite number."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        return []
    return numbers if all(math.isfinite(number) for number in numbers) else []
