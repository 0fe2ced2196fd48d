"""The factor from activity concentration to the standardized uptake value by body weight (SUVbw), or why there is none.

::

    SUVbw [g/ml] = activity [Bq/ml] x weight [g] / (dose [Bq] x 2 ** -((scan start - injection) / half life))

After the vendor-neutral calculation of QIBA (RSNA), its path where the header says all that is needed; where it does not, or
contradicts itself, there is a sentence and no factor. Runs in a decoding process, so that weights and times never leave it.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Final

from pydicom.dataset import Dataset
from pydicom.valuerep import DA, DT, TM

from worker.errors import PixelError
from worker.imaging.facts import Elements, number_of, text_of, values_of

_MODALITY: Final = "PT"
#: Less activity than this is not an injected dose in Bq, but one in MBq.
_LEAST_DOSE_BQ: Final = 1e5
_MOST_KG: Final = 500.0
#: After so many half lives nothing is left to be seen: a date is wrong.
_MOST_HALF_LIVES: Final = 10
#: With a half life beyond this, patients are scanned on another day, and a time without its date says nothing.
_SAME_DAY_HALF_LIFE_S: Final = 12 * 3600
_DAY: Final = timedelta(days=1)
_CLOCKS_AGREE: Final = timedelta(minutes=1)


def uptake_of(elements: Elements) -> Mapping[str, Any]:
    """Return the facts ``suv_factor``, g/ml per Bq/ml or None, and ``suv_reason``, why it is None."""
    try:
        return {"suv_factor": _factor(elements), "suv_reason": ""}
    except PixelError as exc:
        return {"suv_factor": None, "suv_reason": str(exc)}


def _factor(elements: Elements) -> float:
    if text_of(elements, "Modality") != _MODALITY:
        raise PixelError("The image is no PET image.")
    units = text_of(elements, "Units")
    if units == "GML":  # PS3.3 §C.8.9.1: body weight where SUV Type does not say otherwise
        if text_of(elements, "SUVType") not in {"", "BW"}:
            raise PixelError("The PET image is in an uptake value that is not by body weight: SUV Type (0054,1006) is not BW.")
        return 1.0
    if units != "BQML":
        raise PixelError("The PET image is neither in Bq/ml nor in g/ml: Units (0054,1001) is not BQML or GML.")
    _check_corrected(elements)
    item = _one_injection(elements)
    weight_kg = number_of(elements, "PatientWeight")
    if weight_kg is None or not 0 < weight_kg <= _MOST_KG:
        raise PixelError(f"Patient's Weight (0010,1030) is absent or not between 0 and {_MOST_KG:g} kg.")
    dose = _positive(item, "RadionuclideTotalDose", "Radionuclide Total Dose (0018,1074)")
    if dose < _LEAST_DOSE_BQ:
        raise PixelError(f"Radionuclide Total Dose (0018,1074) is less than {_LEAST_DOSE_BQ:g} Bq, as if it were in MBq.")
    return 1000 * weight_kg / (dose * _left_at_reference(elements, item))


def _check_corrected(elements: Elements) -> None:
    corrections = {str(one).strip() for one in values_of(elements, "CorrectedImage")}
    for correction, what in (("ATTN", "attenuation"), ("DECY", "decay")):
        if correction not in corrections:
            raise PixelError(f"The PET image is not corrected for {what}: Corrected Image (0028,0051) does not say {correction}.")


def _one_injection(elements: Elements) -> Dataset:
    items = values_of(elements, "RadiopharmaceuticalInformationSequence")
    if len(items) != 1:
        raise PixelError(f"Radiopharmaceutical Information Sequence (0054,0016) has {len(items)} items; one is needed.")
    item: Dataset = items[0]
    return item


def _left_at_reference(elements: Elements, item: Dataset) -> float:
    """Return the part of the dose that is left at the time to which the image was decay corrected (PS3.3 §C.8.9.1.1.6)."""
    reference = text_of(elements, "DecayCorrection")
    if reference == "ADMIN":
        return 1.0
    if reference != "START":
        raise PixelError("Decay Correction (0054,1102) is neither START nor ADMIN.")
    half_life_s = _positive(item, "RadionuclideHalfLife", "Radionuclide Half Life (0018,1075)")
    scan = _moment(elements, "Series")
    if scan > _moment(elements, "Acquisition"):
        raise PixelError("Series Date and Time are later than those of the acquisition: they are not the start of the scan.")
    elapsed_s = (scan - _injected(item, scan, half_life_s)).total_seconds()
    if not 0 <= elapsed_s <= _MOST_HALF_LIVES * half_life_s:
        raise PixelError(
            f"The injection was not between 0 and {_MOST_HALF_LIVES} half lives before the scan: "
            "Radiopharmaceutical Start DateTime (0018,1078) or Series Date and Time are wrong."
        )
    return float(2 ** (-elapsed_s / half_life_s))


def _injected(item: Dataset, scan: datetime, half_life_s: float) -> datetime:
    """Return when the radiopharmaceutical was given; a time without a date is the last one before the scan."""
    try:
        start, clock = DT(str(item.get("RadiopharmaceuticalStartDateTime") or "")), TM(str(item.get("RadiopharmaceuticalStartTime") or ""))
    except ValueError as exc:
        raise PixelError("Radiopharmaceutical Start Time (0018,1072) or Start DateTime (0018,1078) is no time.") from exc
    on_day = None if clock is None else datetime.combine(scan.date(), clock)
    if start is not None:
        start = start.replace(tzinfo=None)
        if on_day is not None and (start - on_day + _CLOCKS_AGREE) % _DAY > 2 * _CLOCKS_AGREE:
            raise PixelError("Radiopharmaceutical Start Time (0018,1072) and Start DateTime (0018,1078) contradict each other.")
        return datetime.combine(start.date(), start.time())
    if on_day is None:
        raise PixelError("Radiopharmaceutical Start Time (0018,1072) and Start DateTime (0018,1078) are absent.")
    if half_life_s > _SAME_DAY_HALF_LIFE_S:
        raise PixelError(
            "Radiopharmaceutical Start DateTime (0018,1078) is absent, and the half life is too long for a time without a date."
        )
    return on_day if on_day <= scan else on_day - _DAY


def _moment(elements: Elements, what: str) -> datetime:
    try:
        date, time = DA(text_of(elements, f"{what}Date")), TM(text_of(elements, f"{what}Time"))
    except ValueError as exc:
        raise PixelError(f"{what} Date or {what} Time is no date or time.") from exc
    if date is None or time is None:
        raise PixelError(f"{what} Date or {what} Time is absent.")
    return datetime.combine(date, time)


def _positive(item: Dataset, keyword: str, name: str) -> float:
    try:
        number = float(item.get(keyword) or 0)
    except (TypeError, ValueError):
        number = 0.0
    if not 0 < number < float("inf"):
        raise PixelError(f"{name} is absent or not a positive number.")
    return number
