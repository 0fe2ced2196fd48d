r"""One result as HL7 v2.5.1 ORU^R01, for a RIS or an interface engine.

::

    MSH        UTF-8; the control ID is derived: the same result is the same message, byte by byte
    PID        patient ID with its issuer, name, birth date, sex
    ORC, OBR   once for each order of the images. OBR-4 is our own service, so that nobody files it in place of the radiologist's
               report; OBR-25 P preliminary, C replaces an earlier one of ours, X could not be analysed
    OBX        outcome, its words · of each finding verdict, probability, threshold, shares (OBX-4 tells findings apart) · algorithm ·
               study and report

Not here: framing and acknowledgments (deliver/mllp.py), what the words are (content.py).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from pydicom.dataset import Dataset

from worker.domain import OWN_APPLICATION, Code, Document, Finding
from worker.report import codes, content
from worker.report.result import Result

#: HL7 v2.5.1 §2.7; a backslash first, for the others bring some.
_ESCAPES: Final = str.maketrans({"\\": "\\E\\", "|": "\\F\\", "^": "\\S\\", "&": "\\T\\", "~": "\\R\\"})
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_OID: Final = re.compile(r"[0-2](\.(0|[1-9][0-9]*))+")
#: HL7 v2.5.1 §2.15.9.10: an ST of 20 characters.
_CONTROL_ID_LENGTH: Final = 20
# IHE RAD TF-2, 4.7: how a message names its study.
_STUDY: Final = Code("113014", "DCM", "DICOM Study")
_NAME: Final = Code("111001", "DCM", "Algorithm Name")
_VERSION: Final = Code("111003", "DCM", "Algorithm Version")
_REPORT: Final = Code("report", codes.OWN, "DICOM Structured Report of this result")


@dataclass(frozen=True, slots=True)
class _Observation:
    """One OBX as far as it is its own; `value` is encoded."""

    kind: str
    code: Code
    value: str
    part: str = ""
    unit: Code | None = None
    flag: str = ""
    status: str = ""


def build(result: Result) -> tuple[Document, ...]:
    """Write the message, whatever the result is."""
    status = "X" if result.failure else "C" if result.previous else "P"
    lines = [_msh(result), _pid(result)]
    observations = [_obx(result, number, one, status=status) for number, one in enumerate(_observations(result), start=1)]
    for order in result.source.requests or (Dataset(),):
        lines += [*_order(result, order, status=status), *observations]
    data = "".join(f"{line}\r" for line in lines).encode()
    return (Document(sop_instance_uid=result.uid("oru"), sop_class_uid="", kind="oru", data=data),)


def _msh(result: Result) -> str:
    control_id = hashlib.sha256(result.uid("oru").encode()).hexdigest()[:_CONTROL_ID_LENGTH].upper()
    fields = {2: "^~\\&", 3: OWN_APPLICATION, 7: _time(result.analysed_at), 9: "ORU^R01^ORU_R01", 10: control_id}
    fields |= {11: "P", 12: "2.5.1", 18: "UNICODE UTF-8"}
    # MSH-1 is the separator itself.
    return _segment("MSH", {number - 1: value for number, value in fields.items()})


def _pid(result: Result) -> str:
    patient = result.study.patient
    fields = {1: "1", 3: f"{_text(patient.key.patient_id)}^^^{_authority(result)}", 5: _name(patient.name)}
    return _segment("PID", fields | {7: patient.birth_date, 8: patient.sex})


def _authority(result: Result) -> str:
    """The issuer as an HD, with the universal ID that the images give it (PS3.3 Table 10-18)."""
    name = result.study.patient.key.issuer.strip()
    qualifiers = next((one.value for one in result.source.copied if one.keyword == "IssuerOfPatientIDQualifiersSequence"), ())
    for item in qualifiers:
        universal = str(item.get("UniversalEntityID") or "").strip()
        if universal:
            return f"{_text(name)}&{_text(universal)}&{_text(str(item.get('UniversalEntityIDType') or ''))}"
    return f"&{name}&ISO" if _OID.fullmatch(name) else _text(name)


def _name(name: str) -> str:
    """A DICOM PN as XPN: prefix and suffix change places, and each way of writing is a repetition (HL7 v2.5.1 §2.A.88, table 4000)."""
    written = []
    for kind, group in zip("AIP", name.split("="), strict=False):
        parts = [_text(part) for part in f"{group}^^^^".split("^")[:5]]
        if any(parts):
            family, given, middle, prefix, suffix = parts
            written.append("^".join((family, given, middle, suffix, prefix, "", "", kind if "=" in name else "")).rstrip("^"))
    return "~".join(written)


def _order(result: Result, order: Dataset, *, status: str) -> Iterator[str]:
    accession = str(order.get("AccessionNumber") or result.study.accession_number)
    placer = _text(str(order.get("PlacerOrderNumberImagingServiceRequest") or ""))
    filler = _text(str(order.get("FillerOrderNumberImagingServiceRequest") or accession or result.study.study_instance_uid))
    algorithm = result.algorithm
    own = Code(codes.short(algorithm.name, 20), codes.OWN, f"AI: {algorithm.title or algorithm.name}")
    requested = next(iter(order.get("RequestedProcedureCodeSequence") or ()), Dataset())
    # What a modality was given by its worklist may lack any of them.
    value, scheme, meaning = (str(requested.get(keyword) or "") for keyword in ("CodeValue", "CodingSchemeDesignator", "CodeMeaning"))
    device = f"{algorithm.bundle_sha256[:12]}&{_text(f'{content.MANUFACTURER} {algorithm.name} {algorithm.version}')}"
    yield _segment("ORC", {1: "RE", 2: placer, 3: filler})
    fields = {1: "1", 2: placer, 3: filler, 4: f"{_coded(own)}^{_coded(algorithm.procedure)}", 18: _text(accession), 24: "RAD"}
    fields |= {7: _time(result.study_at) if result.study_at else "", 22: _time(result.analysed_at), 25: status, 32: device}
    fields[44] = _coded(Code(value, scheme, meaning)) if value else ""
    yield _segment("OBR", fields)


def _observations(result: Result) -> Iterator[_Observation]:
    outcome, words = content.outcome(result.findings, failure=result.failure)
    # The words that say why there is no result are there.
    said = "P" if result.failure else ""
    yield _Observation("CWE", codes.OUTCOME, _coded(outcome))
    statements = [words, *(words for _, words in content.statements(result.algorithm))]
    if any(finding.is_atypical for finding in result.findings):
        statements.insert(1, content.ATYPICAL_STATEMENT)
    yield _Observation("FT", codes.SUMMARY, "\\.br\\".join(_text(one) for one in statements), status=said)
    for number, finding in enumerate(result.findings, start=1):
        yield from _finding(finding, str(number))
    yield _Observation("ST", _NAME, _text(result.algorithm.name), status=said)
    yield _Observation("ST", _VERSION, _text(result.algorithm.version), status=said)
    # HL7 table 0085: O, not a result but what it is of.
    yield _Observation("ST", _STUDY, result.study.study_instance_uid, status="O")
    yield _Observation("ST", _REPORT, result.uids.sop_instance_uid, status="O")


def _finding(finding: Finding, part: str) -> Iterator[_Observation]:
    # HL7 table 0078: abnormal, very abnormal.
    flag = "AA" if finding.is_alarming else "A" if finding.verdict == "positive" else ""
    yield _Observation("CWE", finding.code, _coded(codes.VERDICTS[finding.verdict]), part, flag=flag)
    yield _Observation("NM", codes.PROBABILITY, f"{content.percent(finding.probability):g}", part, codes.PERCENT)
    yield _Observation("NM", codes.THRESHOLD, f"{content.percent(finding.threshold):g}", part, codes.PERCENT)
    for modality, share in finding.shapley.items():
        yield _Observation("NM", codes.shapley(modality), f"{round(share, 4) + 0.0:g}", part, codes.LOG_ODDS)


def _obx(result: Result, number: int, one: _Observation, *, status: str) -> str:
    algorithm = result.algorithm
    device = f"{_text(f'{algorithm.name} {algorithm.version}')}^{content.MANUFACTURER}^{result.uids.device_uid}^ISO"
    fields = {1: str(number), 2: one.kind, 3: _coded(one.code), 4: one.part, 5: one.value, 6: _coded(one.unit) if one.unit else ""}
    return _segment("OBX", fields | {8: one.flag, 11: one.status or status, 18: device, 19: _time(result.analysed_at)})


# --- how HL7 writes it


def _segment(name: str, fields: Mapping[int, str]) -> str:
    last = max(number for number, value in fields.items() if value)
    return "|".join([name, *(fields.get(number, "") for number in range(1, last + 1))])


def _text(text: str) -> str:
    return _CONTROL.sub(" ", text).strip().translate(_ESCAPES)


def _coded(code: Code) -> str:
    return "^".join(_text(part) for part in (code.value, code.meaning, codes.designator(code.scheme)))


def _time(at: datetime) -> str:
    return at.strftime("%Y%m%d%H%M%S%z")
