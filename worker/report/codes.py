"""The codes a report is written in, and how a foreign code becomes one that DICOM allows.

Standard codes where one fits; the rest are ours, under 99SYNOPTIC. Not here: what is said with them (sr.py).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Final

from highdicom.coding_schemes import CodingSchemeIdentificationItem
from highdicom.sr import CodedConcept

from worker.domain import Code, Verdict

OWN: Final = "99SYNOPTIC"
ORGANIZATION: Final = "Synoptic"

# PS3.16 Annex D (DCM), §8 (schemes); SNOMED CT and UMLS codes as PS3.16 uses them.
PROBABILITY: Final = Code("122157", "DCM", "Probability")
SUMMARY: Final = Code("121111", "DCM", "Summary")
# PS3.16 TID 4001 row 1 with CID 6047: the coded way to say "nothing found" and "nothing could be said".
OUTCOME: Final = Code("111017", "DCM", "CAD Processing and Findings Summary")
NOTHING_FOUND: Final = Code("111241", "DCM", "All algorithms succeeded; without findings")
FOUND: Final = Code("111242", "DCM", "All algorithms succeeded; with findings")
FAILED: Final = Code("111245", "DCM", "No algorithms succeeded; without findings")
# PS3.16 TID 1500 row 12.
QUALITATIVE_EVALUATIONS: Final = Code("C0034375", "UMLS", "Qualitative Evaluations")
# PS3.16 TID 1204.
ENGLISH: Final = Code("en-US", "RFC5646", "English (United States)")
SOURCE: Final = Code("260753009", "SCT", "Source")
# PS3.16 CID 7202 and CID 7021.
SOURCE_IMAGE: Final = Code("121322", "DCM", "Source image for image processing operation")
REPORT: Final = Code("126000", "DCM", "Imaging Measurement Report")
LABORATORY_FINDING: Final = Code("118246004", "SCT", "Laboratory test finding")
PROCESSING_EQUIPMENT: Final = Code("109102", "DCM", "Processing Equipment")
# PS3.16 CID 230.
YES: Final = Code("373066001", "SCT", "Yes")
NO: Final = Code("373067005", "SCT", "No")
PERCENT: Final = Code("%", "UCUM", "percent")
NO_UNITS: Final = Code("1", "UCUM", "no units")
# Not "1": viewers write a unit's code behind the number, and nothing for a number of 0.
LOG_ODDS: Final = Code("{log-odds}", "UCUM", "log-odds")
SQUARE_MM: Final = Code("mm2", "UCUM", "square millimeter")
CUBIC_MM: Final = Code("mm3", "UCUM", "cubic millimeter")

# PS3.16 CID 250; 82334004 from CID 4220.
VERDICTS: Final[dict[Verdict, Code]] = {
    "positive": Code("10828004", "SCT", "Positive"),
    "negative": Code("260385009", "SCT", "Negative"),
    "uncertain": Code("82334004", "SCT", "Indeterminate"),
}
# SNOMED CT qualifier values, as OMOP's "Meas Value Operator" lists them.
COMPARATORS: Final[dict[str, Code]] = {
    "<": Code("276139006", "SCT", "Less than"),
    "<=": Code("276137008", "SCT", "Less than or equal to"),
    ">": Code("276140008", "SCT", "Greater than"),
    ">=": Code("276138003", "SCT", "Greater than or equal to"),
}

SERIES: Final = Code("ai-results", OWN, "Results of an algorithm")
THRESHOLD: Final = Code("threshold", OWN, "Operating threshold of the probability")
VERDICT: Final = Code("verdict", OWN, "Verdict at the operating threshold")
COMPARATOR: Final = Code("comparator", OWN, "The true value, compared with this number, is")
REPLACES: Final = Code("replaces", OWN, "Replaced report")
INTENDED_USE: Final = Code("intended-use", OWN, "Intended use")
QUALITY: Final = Code("quality", OWN, "Statement of model quality")
ATYPICAL: Final = Code("atypical", OWN, "Atypical input")
RECORD_FOUND: Final = Code("record-found", OWN, "Patient record found at the time of analysis")
RECORD_MISSING: Final = Code("record-missing", OWN, "Not available to the network")
GROUP_ROLE: Final = Code("group-role", OWN, "What this group holds")
# What an answer rests on (worker/regions.py): never Image Region, Volume or Area, which beside a finding would be read as the lesion's.
SALIENCY: Final = Code("saliency", OWN, "Saliency, as a share of its peak")
REGION: Final = Code("saliency-region", OWN, "Region the answer rests on (saliency), not an outlined lesion")
REGION_VOLUME: Final = Code("saliency-volume", OWN, "Volume of the saliency region")
REGION_AREA: Final = Code("saliency-area", OWN, "Area of the saliency region on the key image")
REGION_CENTRE: Final = Code("saliency-centre", OWN, "Center of the saliency region")
WHOLE_IMAGE: Final = Code("whole-image", OWN, "Whole image: no place in it is meant")
RECORD_INPUT: Final = Code("record-input", OWN, "Values of the patient record, given to the network")

# PS3.16 CID 7010; what IHE RAD TF-3 4.66 (RAD-66) has a rejection note called.
OF_INTEREST: Final = Code("113000", "DCM", "Of Interest")
REJECTED: Final = Code("113001", "DCM", "Rejected for Quality Reasons")
KEY_DESCRIPTION: Final = Code("113012", "DCM", "Key Object Description")

_SHAPLEY: Final = {
    "image": Code("shapley-image", OWN, "Share of the image in the log-odds"),
    "values": Code("shapley-values", OWN, "Share of the record's values in the log-odds"),
    "text": Code("shapley-text", OWN, "Share of the record's text in the log-odds"),
}

# PS3.16 CID 100, edition 2019: what validators take for Procedure Reported, though the group is extensible.
_CID_100: Final = frozenset(
    {("SCT", "363679005"), ("SCT", "258177008"), ("SCT", "433139009"), ("SCT", "446315002"), ("SCT", "443271005")}
    | {("SCT", "443844003"), ("DCM", "126020"), ("DCM", "126021"), ("DCM", "126022"), ("LN", "25045-6")}
    | {("LN", "25056-3"), ("LN", "49118-3"), ("LN", "44136-0"), ("LN", "44139-4"), ("LN", "39142-5"), ("LN", "39632-5")}
)
_IMAGING_PROCEDURE: Final = Code("363679005", "SCT", "Imaging procedure")

# PS3.16 Table 8-1, the designators that clinical codes come with.
_STANDARD: Final = frozenset(
    {"ACR", "BI", "C4", "DCM", "FMA", "I10", "I10P", "I9", "I9C", "ICDO3", "LN", "MSH", "NCIt", "NDC", "NEU", "PUBCHEM_CID"}
    | {"RADLEX", "RFC5646", "RXNORM", "SCT", "SRT", "UCUM", "UMLS"}
)
# HL7 v2 table 0396 and FHIR's system URIs, where they name what DICOM names otherwise.
_ALIASES: Final = {
    "LOINC": "LN",
    "http://loinc.org": "LN",
    "SNM": "SCT",
    "SNOMED": "SCT",
    "SNOMED-CT": "SCT",
    "http://snomed.info/sct": "SCT",
    "http://unitsofmeasure.org": "UCUM",
    "http://radlex.org": "RADLEX",
    "http://www.nlm.nih.gov/research/umls/rxnorm": "RXNORM",
    "http://hl7.org/fhir/sid/icd-10": "I10",
}
_LO_LENGTH: Final = 64  # PS3.5 §6.2: characters of an LO
_SH_LENGTH: Final = 16  # PS3.5 §6.2: characters of an SH


def shapley(part: str) -> Code:
    """Name the share that one modality, `part`, has in a finding's log-odds."""
    known = _SHAPLEY.get(part)
    return known or Code(f"shapley-{_squeeze(part, 8)}", OWN, f"Share of {part!r} in the log-odds")


def unit(ucum: str) -> Code:
    """Code a unit in UCUM, "no units" where there is none.

    What cannot be UCUM (it is ASCII without spaces) becomes an annotation in braces, which UCUM §6 allows for any text.
    """
    said = one_line(ucum)
    plain = said.replace("µ", "u").replace("μ", "u")  # micro sign and Greek mu; UCUM writes u
    if plain in {"", NO_UNITS.value}:
        return NO_UNITS
    if not re.fullmatch(r"[!-~]+", plain):
        plain = "{" + (re.sub(r"[^!-z|~]", "", plain) or "unit") + "}"
    return PERCENT if plain == PERCENT.value else Code(plain, "UCUM", said)


def reported(procedure: Code) -> Code:
    """Give the member of CID 100 that `procedure` is, or falls under: it has no code for radiography."""
    return procedure if (designator(procedure.scheme), procedure.value) in _CID_100 else _IMAGING_PROCEDURE


def designator(scheme: str) -> str:
    """Name a coding scheme as DICOM does; what PS3.16 does not know becomes private, with a leading 99 (PS3.3 §8.2)."""
    scheme = scheme.strip()
    scheme = _ALIASES.get(scheme, scheme)
    if scheme in _STANDARD or re.fullmatch(r"99[\w.-]{1,14}", scheme, re.ASCII):
        return scheme
    return f"99{_squeeze(scheme.upper(), _SH_LENGTH - 2) or 'LOCAL'}"


def concept(code: Code) -> CodedConcept:
    """Encode `code`; a meaning that an LO cannot hold is shortened with an ellipsis.

    Raises
    ------
    ValueError
        The code has no value: it would say nothing.
    """
    value, meaning = one_line(code.value), one_line(code.meaning)
    if not value:
        raise ValueError("A coded concept without a code value cannot be reported.")
    return CodedConcept(value, designator(code.scheme), short(meaning or value))


def identification(codes: Iterable[Code]) -> list[CodingSchemeIdentificationItem]:
    """Say what every private scheme among `codes` is (PS3.3 §C.12.1.1.1, Coding Scheme Identification Sequence)."""
    named = {OWN: ("Concepts of Synoptic's reports", ORGANIZATION)}
    for code in codes:
        private = designator(code.scheme)
        if private.startswith("99"):
            origin = one_line(code.scheme) or "without a name"
            named.setdefault(private, (f"Local coding scheme of the sending system: {origin}", "The sending system"))
    return [
        CodingSchemeIdentificationItem(private, name=name, responsible_organization=owner)
        for private, (name, owner) in sorted(named.items())
    ]


def one_line(text: str) -> str:
    """Take out what LO and SH forbid: backslashes and control characters (PS3.5 §6.2)."""
    return re.sub(r"[\x00-\x1f\x7f]+", " ", text.replace("\\", "/")).strip()


def short(text: str, length: int = _LO_LENGTH) -> str:
    """Shorten `text` to `length` characters, an ellipsis showing that something is gone."""
    text = one_line(text)
    return text if len(text) <= length else text[: length - 3].rstrip() + "..."


def _squeeze(text: str, length: int) -> str:
    """Reduce `text` to letters and digits; where that would be too long, a digest keeps different texts apart."""
    plain = re.sub(r"[^A-Za-z0-9]", "", text)
    if len(plain) <= length:
        return plain
    return plain[: length - 6] + hashlib.sha256(text.encode()).hexdigest()[:6].upper()
