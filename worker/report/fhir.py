"""One result as a FHIR R4 transaction: DiagnosticReport, an Observation a finding, where it looked, and the device that says so.

::

    DiagnosticReport ─result─▶ Observation ─device─▶ Device
        │ identifier: that of     │ focus ─▶ Basic: R5's ImagingSelection in R4, one a region
        │ the SR; replaces        └ component: probability, threshold, shares; volume and centre of each region
        └ subject, basedOn, imagingStudy, derivedFrom: by identifier; patient, order and study are the server's own

By HL7's DICOM SR to FHIR guide (1.0.0, R5), with what R4 lacks: a measurement group is one Observation with components, not one with
members; ImagingSelection is Basic with the cross-version extensions (hl7.fhir.uv.xver-r5.r4); derivedFrom has no place for it, focus has.
Each resource is created unless one with its identifier is there, so that a transaction sent twice is one. A replaced report is not
overwritten, for an older transaction may come after a newer one: the new one is "amended" and names the old one by the extension
`diagnosticReport-replaces`.

Not here: sending, and under which system the server keeps patient IDs (deliver/fhir.py).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from datetime import datetime
from typing import Any, Final

import numpy as np

from worker.domain import Code, Document, Finding, Region
from worker.report import codes, content, sites
from worker.report.result import Result

Json = dict[str, Any]

UID_SYSTEM: Final = "urn:dicom:uid"
_SYSTEMS: Final = {
    "SCT": "http://snomed.info/sct",
    "LN": "http://loinc.org",
    "DCM": "http://dicom.nema.org/resources/ontology/DCM",
    "UCUM": "http://unitsofmeasure.org",
    "RADLEX": "http://radlex.org",
    "RXNORM": "http://www.nlm.nih.gov/research/umls/rxnorm",
    "I10": "http://hl7.org/fhir/sid/icd-10",
}
_TERMINOLOGY: Final = "http://terminology.hl7.org/CodeSystem"
_GUIDE: Final = "http://hl7.org/fhir/uv/dicom-sr/CodeSystem/dicom-identifier-type"
_REPLACES: Final = "http://hl7.org/fhir/StructureDefinition/diagnosticReport-replaces"
_SELECTION: Final = "http://hl7.org/fhir/5.0/StructureDefinition/extension-ImagingSelection"
_PROFILE: Final = "http://hl7.org/fhir/5.0/StructureDefinition/profile-ImagingSelection"

_MEASUREMENT_GROUP: Final = Code("125007", "DCM", "Measurement Group")
_MM: Final = Code("mm", "UCUM", "millimeter")
_CENTRE: Final = tuple(
    Code(f"{codes.REGION_CENTRE.value}-{axis}", codes.OWN, f"{codes.REGION_CENTRE.meaning}, {axis} (LPS)") for axis in "xyz"
)
# v3-ObservationInterpretation.
_INTERPRETATIONS: Final = {"positive": ("POS", "Positive"), "negative": ("NEG", "Negative"), "uncertain": ("IND", "Indeterminate")}


def build(result: Result) -> tuple[Document, ...]:
    """Write the transaction, whatever the result is."""
    device = _Entry(result.uids.device_uid, _device(result))
    entries, observations = [device] if result.findings else [], []
    for finding in result.findings:
        selections = [_Entry(_uid(result, finding, "region", str(n)), _selection(result, one)) for n, one in enumerate(finding.regions)]
        observations.append(_Entry(_uid(result, finding, "observation"), _observation(result, finding, device, selections)))
        entries += [*selections, observations[-1]]
    entries.append(_Entry(result.uids.sop_instance_uid, _report(result, observations)))
    bundle = {
        "resourceType": "Bundle",
        "identifier": _identifier(result.uid("fhir")),
        "type": "transaction",
        "timestamp": _instant(result.analysed_at),
        "entry": [entry.as_json() for entry in entries],
    }
    data = json.dumps(bundle, ensure_ascii=False, separators=(",", ":")).encode()
    return (Document(sop_instance_uid=result.uid("fhir"), sop_class_uid="", kind="fhir", data=data),)


class _Entry:
    """A resource with the UID that it is known by, within the transaction and for ever."""

    def __init__(self, uid: str, resource: Json) -> None:
        self.uid, self.resource = uid, resource

    @property
    def reference(self) -> Json:
        return {"reference": self._url}

    @property
    def _url(self) -> str:
        # RFC 9562 §5.5; servers know urn:uuid, few know urn:oid, as the name of an entry.
        return f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, self.uid)}"

    def as_json(self) -> Json:
        """R4 §3.1.0.8.1, conditional create: nothing is done where it is there already."""
        kind, own = self.resource["resourceType"], _identifier(self.uid)
        resource = {"resourceType": kind} | self.resource | {"identifier": [own, *self.resource.get("identifier", [])]}
        request = {"method": "POST", "url": kind, "ifNoneExist": f"identifier={own['system']}|{own['value']}"}
        return {"fullUrl": self._url, "resource": resource, "request": request}


def _uid(result: Result, finding: Finding, *what: str) -> str:
    return result.uid("fhir", finding.name, *what)


def _device(result: Result) -> Json:
    algorithm = result.algorithm
    return {
        "resourceType": "Device",
        "status": "active",
        "manufacturer": content.MANUFACTURER,
        "serialNumber": algorithm.bundle_sha256,
        "modelNumber": algorithm.name,
        "deviceName": [{"name": f"{content.MANUFACTURER} {algorithm.name}", "type": "model-name"}],
        "type": {"text": "Image analysis software"},
        "version": [
            {"type": {"text": "bundle"}, "value": algorithm.version},
            {"type": {"text": "code"}, "value": algorithm.code_version},
            {"type": {"text": "weights sha256"}, "value": algorithm.weights_sha256},
        ],
    }


def _report(result: Result, observations: list[_Entry]) -> Json:
    outcome, words = content.outcome(result.findings, failure=result.failure)
    # R4 diagnostic-report-status: cancelled is "not completed"; preliminary is "not verified", which no result of ours is.
    status = "cancelled" if result.failure else "amended" if result.previous else "preliminary"
    replaces = {"type": "DiagnosticReport", "identifier": _identifier(str(result.previous.SOPInstanceUID))} if result.previous else None
    report = {
        "resourceType": "DiagnosticReport",
        "extension": [{"url": _REPLACES, "valueReference": replaces}] if replaces else [],
        **_context(result),
        "status": status,
        "category": [{"coding": [{"system": f"{_TERMINOLOGY}/v2-0074", "code": "RAD", "display": "Radiology"}]}],
        "code": _concept(codes.REPORT) | {"text": f"AI: {result.algorithm.title or result.algorithm.name}"},
        "imagingStudy": [_study(result)],
        "result": [one.reference for one in observations],
        "conclusion": " ".join([words, *(said for _, said in content.statements(result.algorithm))]),
        "conclusionCode": [_concept(outcome)],
    }
    return {key: value for key, value in report.items() if value != []}


def _observation(result: Result, finding: Finding, device: _Entry, selections: list[_Entry]) -> Json:
    code, display = _INTERPRETATIONS[finding.verdict]
    said = [(code, display), *([("AA", "Critical abnormal")] if finding.is_alarming else [])]
    tracking = {"type": {"coding": [{"system": _GUIDE, "code": "tracking-uid", "display": "Tracking UID"}]}}
    tracking |= _identifier(content.tracking_uid(result.study, result.algorithm, finding))
    imaging = {"coding": [{"system": f"{_TERMINOLOGY}/observation-category", "code": "imaging", "display": "Imaging"}]}
    observation = {
        "resourceType": "Observation",
        "identifier": [tracking],
        **_context(result),
        "status": "amended" if result.previous else "preliminary",
        "category": [imaging, _concept(_MEASUREMENT_GROUP)],
        "code": _concept(finding.code),
        "focus": [one.reference for one in selections],
        "valueCodeableConcept": _concept(codes.VERDICTS[finding.verdict]),
        "interpretation": [
            {"coding": [{"system": f"{_TERMINOLOGY}/v3-ObservationInterpretation", "code": code, "display": display}]}
            for code, display in said
        ],
        "note": [{"text": content.ATYPICAL_STATEMENT}] if finding.is_atypical else [],
        "device": device.reference,
        "derivedFrom": [_study(result)],
        "component": list(_components(finding)),
    }
    if site := _site(result):
        observation["bodySite"] = site
    return {key: value for key, value in observation.items() if value != []}


def _context(result: Result) -> Json:
    """Whose it is, of which orders and when, alike in report and observation."""
    key, at = result.study.patient.key, result.study_at
    numbers = [str(order.get("AccessionNumber") or "") for order in result.source.requests]
    accession = {"coding": [{"system": f"{_TERMINOLOGY}/v2-0203", "code": "ACSN", "display": "Accession ID"}]}
    orders = [{"type": "ServiceRequest", "identifier": {"type": accession, "value": number}} for number in numbers if number]
    subject: Json = {"type": "Patient", "identifier": {"value": key.patient_id}}
    if key.issuer:
        subject["identifier"]["assigner"] = {"display": key.issuer}
    effective = {"effectiveDateTime": _instant(at)} if at else {}
    return {"basedOn": orders, "subject": subject, **effective, "issued": _instant(result.analysed_at)}


def _components(finding: Finding) -> Iterator[Json]:
    yield _component(codes.PROBABILITY, content.percent(finding.probability), codes.PERCENT)
    yield _component(codes.THRESHOLD, content.percent(finding.threshold), codes.PERCENT)
    for part, share in finding.shapley.items():
        yield _component(codes.shapley(part), round(share, 4) + 0.0, codes.LOG_ODDS)
    for region in finding.regions:
        if region.volume_mm3 is not None and region.centre_mm is not None:
            yield _component(codes.REGION_VOLUME, round(region.volume_mm3, 1), codes.CUBIC_MM, of=region.image)
            for code, where in zip(_CENTRE, region.centre_mm, strict=True):
                yield _component(code, round(float(where), 2) + 0.0, _MM, of=region.image)


def _component(code: Code, value: float, unit: Code, *, of: str = "") -> Json:
    quantity = {"value": value, "unit": unit.meaning, "system": _SYSTEMS["UCUM"], "code": unit.value}
    return {"code": _concept(code) | ({"text": f"{code.meaning}, in image {of}"} if of else {}), "valueQuantity": quantity}


def _selection(result: Result, region: Region) -> Json:
    """R5's ImagingSelection: the images, or frames of them, that the region lies in."""
    planes = region.origin[0] + np.flatnonzero(region.mask.any(axis=(1, 2)))
    frames: dict[str, list[int]] = {}
    for plane in planes:
        frames.setdefault(region.sop_instance_uids[plane], []).append(region.frame_numbers[plane])
    known = {ds.SOPInstanceUID: ds for ds in result.source.instances}
    first = known[next(iter(frames))]
    extensions = [_extension("status", valueCode="available"), _extension("studyUid", valueId=str(first.StudyInstanceUID))]
    extensions.append(_extension("seriesUid", valueId=str(first.SeriesInstanceUID)))
    is_framed = len(set(region.sop_instance_uids)) < len(region.sop_instance_uids)
    for uid, numbers in frames.items():
        sop_class = {"system": "urn:ietf:rfc:3986", "code": f"urn:oid:{known[uid].SOPClassUID}"}
        parts: list[Json] = [{"url": "uid", "valueId": uid}, {"url": "sopClass", "valueCoding": sop_class}]
        parts += [{"url": "subset", "valueString": str(number)} for number in numbers] if is_framed else []
        extensions.append({"url": f"{_SELECTION}.instance", "extension": parts})
    return {
        "resourceType": "Basic",
        "meta": {"profile": [_PROFILE]},
        "extension": extensions,
        "code": _concept(codes.REGION),
        "subject": _context(result)["subject"],
    }


def _extension(element: str, **value: str) -> Json:
    return {"url": f"{_SELECTION}.{element}", **value}


def _site(result: Result) -> Json:
    """The one part of the body that the images show; empty where they show none or several. R4 has no place for its side but the text."""
    shown = [site for image in (result.inputs.series if result.inputs else ()) if (site := sites.of_image(result, image))]
    if len({(one.region.value, one.laterality.value if one.laterality else "") for one in shown}) != 1:
        return {}
    region, side = shown[0].region, shown[0].laterality
    words = f"{side.meaning} {region.meaning.lower()}" if side else region.meaning
    return _concept(Code(region.value, region.scheme_designator, region.meaning)) | {"text": words}


def _study(result: Result) -> Json:
    return {"type": "ImagingStudy", "identifier": _identifier(result.study.study_instance_uid)}


def _identifier(uid: str) -> Json:
    return {"system": UID_SYSTEM, "value": f"urn:oid:{uid}"}


def _concept(code: Code) -> Json:
    """A code that its system's URI names; of a scheme that has none an OID of our own is derived."""
    designator = codes.designator(code.scheme)
    stated = code.scheme if "://" in code.scheme else ""
    system = _SYSTEMS.get(designator) or stated or f"urn:oid:{content.derive_uid('scheme', designator)}"
    return {"coding": [{"system": system, "code": code.value} | ({"display": code.meaning} if code.meaning else {})]}


def _instant(at: datetime) -> str:
    return at.isoformat(timespec="milliseconds")
