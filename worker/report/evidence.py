"""The headers of the instances that were analysed: what a report takes over from the images.

Every file is read, so that a report cannot be written for another patient; pixels never are.
Whatever an image says outside its VR is left out rather than carried into a document of ours.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

import pydicom
from pydicom import config
from pydicom.datadict import dictionary_has_tag, dictionary_VM, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_partial
from pydicom.uid import SecondaryCaptureImageStorage

from worker.domain import Study
from worker.errors import PatientConflict, PixelError
from worker.report import codes

# PS3.3 §C.7.1.1 (Patient Module) and §C.7.2.1 (General Study Module): copied as they are.
_TYPE_2: Final = [
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "ReferringPhysicianName",
    "StudyID",
]
_COPIED: Final = (
    *_TYPE_2,
    *[
        "IssuerOfPatientID",
        "TypeOfPatientID",
        "IssuerOfPatientIDQualifiersSequence",
        "PatientBirthTime",
        "QualityControlSubject",
        "OtherPatientIDsSequence",
        "OtherPatientNames",
        "PatientSpeciesDescription",
        "PatientSpeciesCodeSequence",
        "PatientBreedDescription",
        "PatientBreedCodeSequence",
        "BreedRegistrationSequence",
        "ResponsiblePerson",
        "ResponsiblePersonRole",
        "ResponsibleOrganization",
        "PatientIdentityRemoved",
        "DeidentificationMethod",
        "DeidentificationMethodCodeSequence",
        "IssuerOfAccessionNumberSequence",
        "StudyDescription",
    ],
)
_EQUIPMENT: Final = ["Manufacturer", "ManufacturerModelName", "InstitutionName", "StationName", "DeviceSerialNumber", "SoftwareVersions"]
_IDENTITY: Final = [
    "SpecificCharacterSet",
    "SOPClassUID",
    "SOPInstanceUID",
    "Modality",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "PatientID",
    "IssuerOfPatientID",
]
_HEADER: Final = [*_IDENTITY, *_COPIED, *_EQUIPMENT, "TimezoneOffsetFromUTC", "RequestAttributesSequence"]
_LAST_IDENTITY_TAG: Final = 0x0020000E
_IDENTITY_TAGS: Final = [tag for keyword in _IDENTITY if (tag := tag_for_keyword(keyword))]

# What pydicom raises on a damaged header. Not OSError: a file that is gone is not the sender's fault.
_UNREADABLE: Final = (
    InvalidDicomError,
    struct.error,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    RuntimeError,
)

# PS3.5 §6.2. What does not match is not a value of that VR, and an archive may refuse the object for it.
_LEGAL: Final = {
    "CS": re.compile(r"[A-Z0-9 _]{0,16}"),
    "DA": re.compile(r"(\d{4}(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01]))?"),
    "TM": re.compile(r"(([01]\d|2[0-3])([0-5]\d([0-5]\d(\.\d{1,6})?)?)?)? *"),
    "UI": re.compile(r"([0-9]+(\.[0-9]+)*)?"),
}
# PS3.5 §6.2, notes on DA and TM: 1997.04.24 and 14:04:38 as before DICOM are to be understood, not to be written.
_ACR_NEMA: Final = {"DA": r"(?<=\d)\.(\d)", "TM": r"(?<=\d):(\d)"}


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the analysed instances say of patient, study, order and equipment.

    ``instances`` hold UIDs and SOP class each, in the order of their UIDs; the rest is the first one's.
    ``paths`` are their files by SOP Instance UID. ``stand_in`` is an image for highdicom, with nobody's name in it.
    """

    paths: Mapping[str, Path]
    instances: tuple[Dataset, ...]
    stand_in: Dataset
    copied: tuple[DataElement, ...]
    requests: tuple[Dataset, ...]
    modality: str
    utc_offset: timedelta | None


def references(instances: Sequence[Dataset]) -> list[Dataset]:
    """List `instances` by study and series, as the evidence sequences do (PS3.3 Table 10-11)."""
    by_study: dict[str, dict[str, list[Dataset]]] = {}
    for ds in instances:
        item = Dataset()
        item.ReferencedSOPClassUID = ds.SOPClassUID
        item.ReferencedSOPInstanceUID = ds.SOPInstanceUID
        by_study.setdefault(ds.StudyInstanceUID, {}).setdefault(ds.SeriesInstanceUID, []).append(item)
    return [
        _listed(
            "StudyInstanceUID",
            uid,
            "ReferencedSeriesSequence",
            [_listed("SeriesInstanceUID", series, "ReferencedSOPSequence", items) for series, items in by_series.items()],
        )
        for uid, by_series in by_study.items()
    ]


def referred(ds: Dataset) -> list[Dataset]:
    """Read the evidence of the document `ds` as what `references` would be given to write it."""
    found = []
    for study in ds.get("CurrentRequestedProcedureEvidenceSequence") or ():
        for series in study.ReferencedSeriesSequence:
            for item in series.ReferencedSOPSequence:
                one = Dataset()
                one.SOPClassUID, one.SOPInstanceUID = item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID
                one.StudyInstanceUID, one.SeriesInstanceUID = study.StudyInstanceUID, series.SeriesInstanceUID
                found.append(one)
    return found


def _listed(level: str, uid: str, keyword: str, items: list[Dataset]) -> Dataset:
    ds = Dataset()
    setattr(ds, level, uid)
    setattr(ds, keyword, items)
    return ds


def read(paths: Sequence[Path], *, study: Study) -> Evidence:
    """Read the headers of `paths`, which must all be of `study` and of its patient.

    Raises
    ------
    PatientConflict
        An instance is of another patient, issuer or study than `study` is.
    PixelError
        A file has no readable header.
    ValueError
        There are no `paths`.
    """
    if not paths:
        raise ValueError("A report needs at least one analysed instance.")
    # pydicom quotes a value outside its VR in a warning: what images say must not reach a log.
    with config.disable_value_validation():
        found = {said["SOPInstanceUID"]: (said, path) for path in paths for said in (_identity(path),)}
        for said, _ in found.values():
            _check_owner(said, study)
        instances = tuple(_reference(found[uid][0]) for uid in sorted(found))
        header = _header(found[min(found)][1])
        stand_in = _stand_in(instances[0], header)
        requests = _requests(header)
    copied = tuple(header[keyword] for keyword in _COPIED if keyword in header)
    return Evidence(
        paths={uid: path for uid, (_, path) in found.items()},
        instances=instances,
        stand_in=stand_in,
        copied=copied,
        requests=requests,
        modality=_text(header, "Modality"),
        utc_offset=_utc_offset(_text(header, "TimezoneOffsetFromUTC")),
    )


def _identity(path: Path) -> dict[str, str]:
    """Read whose instance it is, and no further than Series Instance UID: there may be a thousand."""
    try:
        with path.open("rb") as file:
            ds = read_partial(file, lambda tag, _vr, _length: tag > _LAST_IDENTITY_TAG, specific_tags=list(_IDENTITY_TAGS))
            return {keyword: _text(ds, keyword) for keyword in _IDENTITY}
    except _UNREADABLE as error:
        raise PixelError(f"The header of an analysed instance cannot be read ({type(error).__name__}).") from None


def _header(path: Path) -> Dataset:
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_HEADER))
        _normalize(header)
    except _UNREADABLE as error:
        raise PixelError(f"The header of an analysed instance cannot be read ({type(error).__name__}).") from None
    for keyword in _TYPE_2:
        if keyword not in header or header[keyword].value is None:
            setattr(header, keyword, "")
    if isinstance(title := header.get("StudyDescription"), str):
        header.StudyDescription = codes.short(title)
    return header


def _check_owner(said: dict[str, str], study: Study) -> None:
    """Compare patient and study. An image that names no issuer is its study's; one that names another is not."""
    issuer = said["IssuerOfPatientID"]
    if said["PatientID"] != study.patient.key.patient_id.strip():
        raise PatientConflict("An analysed instance is of another patient than its study: nothing is reported.")
    if issuer and study.patient.key.issuer and issuer != study.patient.key.issuer.strip():
        raise PatientConflict("An analysed instance has another issuer of its patient ID than its study.")
    if said["StudyInstanceUID"] != study.study_instance_uid:
        raise PatientConflict("An analysed instance belongs to another study than the report.")


def _reference(said: dict[str, str]) -> Dataset:
    reference = Dataset()
    for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        setattr(reference, keyword, said[keyword])
    return reference


def _stand_in(first: Dataset, header: Dataset) -> Dataset:
    """Make the image that highdicom takes patient and study from, as empty as it may be.

    highdicom raises on a sex or a date outside the standard and on a SOP class that it does not know, and logs
    a name that it finds odd. So it never sees the real ones, which are in `Evidence.copied`.
    """
    image = deepcopy(first)
    image.SOPClassUID = SecondaryCaptureImageStorage
    for keyword in _TYPE_2:
        setattr(image, keyword, "")
    for keyword in _EQUIPMENT:
        if keyword in header:
            setattr(image, keyword, header[keyword].value)
    return image


def _normalize(ds: Dataset) -> None:
    """Decode each element as its item declares, at every level, and delete what is outside its VR.

    Not by `Dataset.decode`: it encodes names once more and makes "?" of katakana in ISO_IR 13.
    """
    for element in list(ds):
        if element.VR == "SQ":
            for item in element.value:
                _normalize(item)
                item.pop("SpecificCharacterSet", None)  # ours is UTF-8 throughout
            if not element.value:
                del ds[element.tag]
        elif not _is_legal(element):
            del ds[element.tag]


def _is_legal(element: DataElement) -> bool:
    """Whether `element` is what its VR and the data dictionary allow; turns the old forms of dates and times into today's."""
    if element.VM > 1 and dictionary_has_tag(element.tag) and dictionary_VM(element.tag) == "1":
        return False  # of two values where there is one, none is known to be the right one
    rule = _LEGAL.get(element.VR)
    if rule is None:
        return True
    if element.VR in _ACR_NEMA and isinstance(element.value, str):
        element.value = re.sub(_ACR_NEMA[element.VR], r"\1", element.value)
    return all(rule.fullmatch(str(value)) for value in _values(element))


def _values(element: DataElement) -> list[object]:
    if element.value is None:
        return []
    return list(element.value) if element.VM > 1 else [element.value]


def _requests(header: Dataset) -> tuple[Dataset, ...]:
    """Say which orders the report answers (PS3.3 §C.17.2, Referenced Request Sequence): none is made up."""
    orders = list(header.get("RequestAttributesSequence") or ()) or ([Dataset()] if _text(header, "AccessionNumber") else [])
    return tuple(_request(order, header) for order in orders)


def _request(order: Dataset, header: Dataset) -> Dataset:
    item = Dataset()
    item.StudyInstanceUID = header.StudyInstanceUID
    item.ReferencedStudySequence = []
    item.AccessionNumber = _text(order, "AccessionNumber") or _text(header, "AccessionNumber")
    if issuer := order.get("IssuerOfAccessionNumberSequence") or header.get("IssuerOfAccessionNumberSequence"):
        item.IssuerOfAccessionNumberSequence = deepcopy(issuer)
    item.PlacerOrderNumberImagingServiceRequest = _text(order, "PlacerOrderNumberImagingServiceRequest")
    item.FillerOrderNumberImagingServiceRequest = _text(order, "FillerOrderNumberImagingServiceRequest")
    item.RequestedProcedureID = _text(order, "RequestedProcedureID")[:16]
    item.RequestedProcedureDescription = codes.short(_text(order, "RequestedProcedureDescription"))
    item.RequestedProcedureCodeSequence = deepcopy(order.get("RequestedProcedureCodeSequence") or [])
    return item


def _utc_offset(text: str) -> timedelta | None:
    """Read Timezone Offset From UTC (PS3.3 §C.12.1.1.8); None if it is absent or no offset."""
    try:
        return datetime.strptime(text, "%z").utcoffset() if re.fullmatch(r"[+-]\d{4}", text) else None
    except ValueError:
        return None


def _text(ds: Dataset, keyword: str) -> str:
    value = ds.get(keyword)
    return "" if value is None else str(value).strip()
