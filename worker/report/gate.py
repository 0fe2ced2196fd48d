"""The last look at a report: the very bytes that would be sent are read again, and what may not be told stops them.

The rules are those that no validator knows, and those by which a report would reach the wrong patient. Not here: templates and
attributes, for which every kind of report stands before dciodvfy, dsrdump and PixelMed in the tests (tests/integration/test_srgate.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from io import BytesIO
from typing import Final

import pydicom
from pydicom import config
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset

from worker.domain import Study
from worker.errors import PatientConflict, ReportInvalid

_UNDEFINED: Final = 0xFFFFFFFF  # PS3.5 §7.1.1
# PS3.16 TID 1500, 1501: what each measurement group says of itself, and what the root says.
_GROUP: Final = "125007"
_OF_GROUP: Final = {
    "112039": "Tracking Identifier",
    "112040": "Tracking Unique Identifier",
    "111001": "Algorithm Name",
    "111003": "Algorithm Version",
}
_OF_ROOT: Final = {"121058": "Procedure Reported", "121005": "Observer Type", "121012": "Device Observer UID"}


def check(data: bytes, *, study: Study) -> None:
    """Refuse the report `data` on `study` if it may not be sent.

    Raises
    ------
    PatientConflict
        Patient, issuer or study are others than those of the study's row.
    ReportInvalid
        It cannot be read again, or breaks a rule; the sentence says which.
    """
    try:
        with config.disable_value_validation():
            ds = pydicom.dcmread(BytesIO(data))
            is_cut_off = any(_is_short(ds.get_item(tag)) for tag in ds.keys())  # noqa: SIM118  values would be decoded
            is_theirs, broken = _is_of(ds, study), "is cut off" if is_cut_off else next(_broken(ds), "")
    except Exception as error:  # noqa: BLE001  pydicom raises whatever bytes make it raise
        raise ReportInvalid(f"The report that was written cannot be read again ({type(error).__name__}).") from None
    if not is_theirs:
        raise PatientConflict("The report that was written names another patient or study than its study: it is not sent.")
    if broken:
        raise ReportInvalid(f"The report that was written {broken}: it is not sent.")


def _is_short(element: DataElement | RawDataElement | None) -> bool:
    """Whether the file ended within the element, which pydicom takes for its end: a report without its last sentences would pass."""
    return isinstance(element, RawDataElement) and element.length not in {_UNDEFINED, len(element.value or b"")}


def _is_of(ds: Dataset, study: Study) -> bool:
    key, issuer = study.patient.key, str(ds.get("IssuerOfPatientID") or "").strip()
    if str(ds.get("PatientID") or "").strip() != key.patient_id.strip() or (issuer and key.issuer and issuer != key.issuer.strip()):
        return False
    evidence = [str(one.get("StudyInstanceUID")) for one in ds.get("CurrentRequestedProcedureEvidenceSequence") or ()]
    return {str(ds.get("StudyInstanceUID")), *evidence} == {study.study_instance_uid}


def _broken(ds: Dataset) -> Iterator[str]:
    """What is wrong with it, as words that follow "the report"."""
    if ds.get("VerificationFlag") != "UNVERIFIED":
        yield "says that a person verified it"
    if ds.get("SpecificCharacterSet") != "ISO_IR 192":
        yield "is not in UTF-8"
    if not ds.get("ContributingEquipmentSequence"):
        yield "names no Contributing Equipment"
    if [one.get("TemplateIdentifier") for one in ds.get("ContentTemplateSequence") or ()] != ["1500"]:
        yield "is not of template 1500"
    said = {_name(item) for item in ds.get("ContentSequence") or ()}
    yield from (f"has no {meaning}" for code, meaning in _OF_ROOT.items() if code not in said)
    series = [one for study in ds.get("CurrentRequestedProcedureEvidenceSequence") or () for one in study.ReferencedSeriesSequence]
    if ds.get("SeriesInstanceUID") in {one.SeriesInstanceUID for one in series}:
        yield "is in a series of the images"
    evidence = {item.ReferencedSOPInstanceUID for one in series for item in one.ReferencedSOPSequence}
    if not evidence:
        yield "has no evidence"
    for item in _items(ds):
        yield from _wrong(item, evidence)


def _wrong(item: Dataset, evidence: set[str]) -> Iterator[str]:
    if item.ValueType == "IMAGE" and not {one.ReferencedSOPInstanceUID for one in item.ReferencedSOPSequence} <= evidence:
        yield "refers to an image that is no evidence"
    if item.ValueType == "NUM":
        measured = next(iter(item.get("MeasuredValueSequence") or ()), Dataset())
        if not (math.isfinite(float(measured.get("NumericValue", "nan"))) and measured.get("MeasurementUnitsCodeSequence")):
            yield "holds a number without a value or unit"
    if _name(item) == _GROUP:
        said = {_name(child) for child in item.get("ContentSequence") or ()}
        yield from (f"has a measurement group without {meaning}" for code, meaning in _OF_GROUP.items() if code not in said)


def _items(item: Dataset) -> Iterator[Dataset]:
    for child in item.get("ContentSequence") or ():
        yield child
        yield from _items(child)


def _name(item: Dataset) -> str:
    return str(next(iter(item.get("ConceptNameCodeSequence") or ()), Dataset()).get("CodeValue", ""))
