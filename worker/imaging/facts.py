"""Elements of one file → the facts of its frames. Runs in a decoding process (child.py), and nowhere else.

Sentences say which attribute and which numbers; never a value of one, which could be a patient's.
Not here: pixels (pixels.py), what facts mean together (volume.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Final

import pydicom
from pydicom.datadict import dictionary_description, dictionary_has_tag, dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.tag import Tag

from worker.domain.images import VIEW_OF_CODE
from worker.errors import GeometryError, PixelError

_MAX_TEXT: Final = 64
_ONE: Final = (str, bytes)
_SEVERAL: Final = (list, pydicom.multival.MultiValue, pydicom.sequence.Sequence)

_KEYWORDS: Final = (
    "SOPInstanceUID", "SOPClassUID", "SeriesInstanceUID", "Modality", "ImageType", "InstanceNumber", "FrameOfReferenceUID",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio",
    "SamplesPerPixel", "PhotometricInterpretation", "PresentationLUTShape", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "RescaleSlope", "RescaleIntercept", "RescaleType", "ViewPosition", "PatientOrientation",
    "PresentationIntentType",
    "SliceLocation", "ViewCodeSequence", "ImageLaterality", "Laterality", "EstimatedRadiographicMagnificationFactor",
    "SequenceOfUltrasoundRegions", "EchoTime", "EchoNumbers", "DiffusionBValue", "DiffusionGradientOrientation",
    "ContrastBolusAgent", "StackID", "TemporalPositionIdentifier", "NominalPercentageOfCardiacPhase", "TriggerTime",
    "AcquisitionNumber", "AcquisitionDateTime", "KVP", "ConvolutionKernel", "ConcatenationUID", "InConcatenationTotalNumber",
    "ModalityLUTSequence", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "PixelData",
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
# Plain numbers: a dict compares pydicom's tags in Python, hundreds of times a file.
TAGS: Final = {keyword: tag_for_keyword(keyword) or 0 for keyword in _KEYWORDS}
WANTED: Final = [Tag(tag) for tag in (*TAGS.values(), *OVERLAY_BITS)]
#: VRs (PS3.5 §6.2) whose values need nothing else of their file, as text needs its character set; and what has one by the dictionary.
PLAIN_VRS: Final = frozenset({"AS", "CS", "DA", "DS", "DT", "FD", "FL", "IS", "SL", "SS", "TM", "UI", "UL", "US"})
PLAIN_TAGS: Final = frozenset(int(tag) for tag in WANTED if dictionary_has_tag(tag) and dictionary_VR(tag) in PLAIN_VRS)

# PS3.3 §C.8.5.5.1.15 and .1.1: centimeters; §C.8.5.5.1.1: 2D (tissue or flow).
_CENTIMETERS, _TWO_D = 3, 1

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
        "image_type": [str(part).strip().upper()[:_MAX_TEXT] for part in values_of(elements, "ImageType")[:16]],
        "instance_number": integer_of(elements, "InstanceNumber") if values_of(elements, "InstanceNumber") else None,
        "photometric": text_of(elements, "PhotometricInterpretation"),
        "presentation_lut_shape": text_of(elements, "PresentationLUTShape"),
        "bits_stored": integer_of(elements, "BitsStored"),
        "is_signed": integer_of(elements, "PixelRepresentation") == 1,
        "is_enhanced": bool({TAGS["SharedFunctionalGroupsSequence"], TAGS["PerFrameFunctionalGroupsSequence"]} & elements.keys()),
        "has_modality_lut": TAGS["ModalityLUTSequence"] in elements,
        "rescale_slope": number_of(elements, "RescaleSlope"),
        "rescale_intercept": number_of(elements, "RescaleIntercept"),
        # PS3.3 §C.8.9.1: in PET, Units are what the rescale gives.
        "rescale_type": text_of(elements, "RescaleType") or text_of(elements, "Units"),
        "position": numbers_of(elements, "ImagePositionPatient", 3),
        "orientation": numbers_of(elements, "ImageOrientationPatient", 6),
        "slice_location": _first_number(elements, "SliceLocation"),
        "pixel_spacing": numbers_of(elements, "PixelSpacing", 2),
        "imager_spacing": numbers_of(elements, "ImagerPixelSpacing", 2),
        "region_spacing": _region_spacing(elements),
        "magnification": number_of(elements, "EstimatedRadiographicMagnificationFactor"),
        "aspect_ratio": numbers_of(elements, "PixelAspectRatio", 2),
        "frame_of_reference_uid": text_of(elements, "FrameOfReferenceUID"),
        "view_position": text_of(elements, "ViewPosition").upper() or _coded_view(elements),
        "patient_orientation": [str(part).strip().upper()[:16] for part in values_of(elements, "PatientOrientation")[:2]],
        # PS3.3 §C.8.11.1.1.6 before §C.7.3.1: that of the image before that of its series.
        "laterality": (text_of(elements, "ImageLaterality") or text_of(elements, "Laterality")).upper(),
        "presentation_intent": text_of(elements, "PresentationIntentType"),
    } | _stack_facts(elements)


def _stack_facts(elements: Elements) -> dict[str, Any]:
    """What tells one stack from another. Not checked here: what is malformed is as good as absent, and tells nothing apart."""
    direction = _floats(values_of(elements, "DiffusionGradientOrientation"))
    return {
        "kilovolts": _first_number(elements, "KVP"),
        "kernel": [str(part).strip().upper()[:_MAX_TEXT] for part in values_of(elements, "ConvolutionKernel")[:8]],
        "echo_time": _first_number(elements, "EchoTime"),
        "echo_number": _first_number(elements, "EchoNumbers"),
        "b_value": _first_number(elements, "DiffusionBValue"),
        "diffusion_direction": [round(part, 4) for part in direction] if len(direction) == 3 else None,
        "has_contrast": bool(values_of(elements, "ContrastBolusAgent")),
        "stack_id": text_of(elements, "StackID"),
        "temporal_position": _first_number(elements, "TemporalPositionIdentifier"),
        "cardiac_phase": _first_number(elements, "NominalPercentageOfCardiacPhase"),
        "trigger_time": _first_number(elements, "TriggerTime"),
        "acquisition_number": _first_number(elements, "AcquisitionNumber"),
        "acquired_at": _acquired_at(elements),
        "concatenation_uid": text_of(elements, "ConcatenationUID"),
        "concatenated": integer_of(elements, "InConcatenationTotalNumber", default=0),
    }


def _acquired_at(elements: Elements) -> str:
    """Return Acquisition DateTime, or date and time, as digits that sort by time; '' if they are none."""
    said = [str(next(iter(values_of(elements, keyword)), "")) for keyword in ("AcquisitionDateTime", "AcquisitionDate", "AcquisitionTime")]
    at = re.sub(r"[+-]\d{4}$", "", said[0]) or (said[1] + said[2] if said[1] and said[2] else "")
    return at if re.fullmatch(r"\d{8,14}(\.\d{1,6})?", at) else ""


def _coded_view(elements: Elements) -> str:
    codes = [str(item.get("CodeValue", "")) for item in values_of(elements, "ViewCodeSequence")]
    return VIEW_OF_CODE.get(codes[0], "") if len(codes) == 1 else ""


def _region_spacing(elements: Elements) -> list[float] | None:
    """Return (between rows, between columns) mm of the one region of an ultrasound image (PS3.3 §C.8.5.5); None if there is none."""
    regions = values_of(elements, "SequenceOfUltrasoundRegions")
    if len(regions) != 1:
        return None
    units = {regions[0].get(keyword) for keyword in ("PhysicalUnitsXDirection", "PhysicalUnitsYDirection")}
    deltas = _floats([regions[0].get("PhysicalDeltaY"), regions[0].get("PhysicalDeltaX")])
    if units != {_CENTIMETERS} or regions[0].get("RegionSpatialFormat") != _TWO_D or len(deltas) != 2 or 0 in deltas:
        return None
    return [10 * abs(delta) for delta in deltas]


def _named(keyword: str) -> str:
    tag = Tag(TAGS[keyword])
    return f"{dictionary_description(tag)} ({tag.group:04X},{tag.element:04X})"


def values_of(elements: Elements, keyword: str) -> Sequence[Any]:
    """Return the values of an element; none if it is absent or empty."""
    element = elements.get(TAGS[keyword])
    if element is None or element.value is None:
        return ()
    value = element.value
    if isinstance(value, _ONE):  # asked first: whether it is one of pydicom's collections takes longer to find out
        return () if value in ("", b"") else (value,)
    return tuple(value) if isinstance(value, _SEVERAL) else (value,)


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


def _first_number(elements: Elements, keyword: str) -> float | None:
    """The one finite number of an element; None if it has none or several."""
    numbers = _floats(values_of(elements, keyword))
    return numbers[0] if len(numbers) == 1 else None


def numbers_of(elements: Elements, keyword: str, count: int) -> list[float] | None:
    """Exactly `count` finite numbers of an element; None if it is absent or empty."""
    values = values_of(elements, keyword)
    if not values:
        return None
    numbers = _floats(values)
    if len(numbers) != count:
        raise GeometryError(f"{_named(keyword)} does not hold {count} finite numbers.")
    return numbers


def _floats(values: Sequence[Any]) -> list[float]:
    """Return the values as floats; none at all if one of them is not a finite number."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        return []
    return numbers if all(math.isfinite(number) for number in numbers) else []
