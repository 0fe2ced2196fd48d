"""FHIR R4 data types (R4 §2.24) → plain values: identifiers, codings, quantities, times, attachments.

An element of the wrong JSON type is refused by its name, never by its content. Not here: what a resource means
(fhir_resources.py), whose it is (fhir.py). Nothing is fetched: an attachment's url is never followed.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from typing import Any, Final, NamedTuple

from worker.domain import Code, PatientKey
from worker.errors import RecordError
from worker.intake.facts import COMPARATORS, MAX_ID, MAX_KEY, Comparator, bounded, clean, latest_instant, token

Json = dict[str, Any]

#: FHIR R4 §4.3 (code systems' URIs) → PS3.16 §8 coding scheme designators.
SCHEMES: Final = {
    "http://loinc.org": "LN",
    "http://snomed.info/sct": "SCT",
    "http://unitsofmeasure.org": "UCUM",
    "http://www.radlex.org": "RADLEX",
    "http://radlex.org": "RADLEX",
    "http://hl7.org/fhir/sid/icd-10": "I10",
    "http://hl7.org/fhir/sid/icd-10-cm": "I10C",
    "http://dicom.nema.org/resources/ontology/DCM": "DCM",
    "http://www.nlm.nih.gov/research/umls/rxnorm": "RXNORM",
    "http://www.ama-assn.org/go/cpt": "C4",
}
_UCUM: Final = "http://unitsofmeasure.org"
#: When a resource was made available, not what it is about: Observation and DiagnosticReport, DocumentReference.
_ISSUED: Final = ("issued", "date")
_TIME: Final = re.compile(
    r"([0-9]{4})(?:-([0-9]{2})(?:-([0-9]{2})(?:T([0-9]{2}):([0-9]{2}):([0-9]{2})(?:\.([0-9]+))?(Z|[+-][0-9]{2}:[0-9]{2}))?)?)?"
)


class Amount(NamedTuple):
    """A Quantity: its number, comparator and unit; the UCUM code where there is one."""

    value: float | None = None
    comparator: Comparator = ""
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Elements:
    """How elements are read at one site, of one source.

    ``medications`` are the Medication resources that came along, by reference.
    """

    zone: tzinfo
    issuers: Mapping[str, str]
    schemes: Mapping[str, str]
    source: str
    medications: dict[str, Json] = field(default_factory=dict)

    # --- who

    def key(self, identifiers: list[Json]) -> PatientKey:
        """Choose of those in use the medical record number (MR), else the patient internal identifier (PI), else the first.

        One whose period has ended counts only where there is no other.
        """
        usable = [one for one in identifiers if text_of(one, "value") and one.get("use") != "old"]
        if not usable:
            raise RecordError("Patient.identifier has no value.")
        kinds = {"MR": 0, "PI": 1}
        chosen = min(usable, key=lambda one: (self._has_ended(one), min(kinds.get(code, 2) for code in (*self.types(one), ""))))
        system, assigner = text_of(chosen, "system"), text_of(object_of(chosen, "assigner"), "display")
        names = [name for name in (system, assigner) if name] or [""]
        issuer = next((self.issuers[name] for name in names if name in self.issuers), assigner or system)
        if not issuer:
            raise RecordError("Patient.identifier has neither a system nor an assigner.")
        patient_id = bounded(text_of(chosen, "value"), MAX_ID, "Patient.identifier.value")
        return PatientKey(bounded(issuer, MAX_KEY, "The system or assigner of Patient.identifier"), patient_id)

    def _has_ended(self, identifier: Json) -> bool:
        end = text_of(object_of(identifier, "period"), "end")
        try:
            return bool(end) and self.moment(end, "Patient.identifier.period.end") < datetime.now(UTC)
        except RecordError:
            return False  # 9999-12-31 is no time in every zone, and one that cannot be read is no reason to refuse a patient

    def types(self, identifier: Json) -> list[str]:
        """Return the codes of an Identifier's type (HL7 table 0203)."""
        return [code.value for code in self.codes(object_of(identifier, "type"))]

    # --- what

    def codes(self, concept: Json) -> list[Code]:
        """Return the codings of a CodeableConcept; a system left out is local, 'L'."""
        return [
            Code(text_of(one, "code"), self.schemes.get(system, system or "L"), text_of(one, "display") or text_of(concept, "text"))
            for one in objects_of(concept, "coding")
            for system in (text_of(one, "system"),)
        ]

    # --- when

    def first_time(self, resource: Json, names: Sequence[str]) -> datetime:
        """Return the first time there is; of a period its end, else its start; of "…Period.start" its start, else its end."""
        for name in names:
            element, _, edge = name.partition(".")
            if element.endswith("Period"):
                period = object_of(resource, element)
                edges = ("start", "end") if edge else ("end", "start")
                edge = next((one for one in edges if text_of(period, one)), edges[0])
                found, name = text_of(period, edge), f"{element}.{edge}"
            else:
                found = text_of(object_of(resource, element), edge) if edge else text_of(resource, element)
            if found:
                return self.moment(found, f"{resource['resourceType']}.{name}")
        raise RecordError(f"{resource['resourceType']} has no {names[0]}, nor another time.")

    def said_at(self, resource: Json) -> datetime | None:
        """Return when a resource was last changed, else when it was issued; None where it does not say."""
        changed = text_of(object_of(resource, "meta"), "lastUpdated")
        said = (("meta.lastUpdated", changed), *((name, text_of(resource, name)) for name in _ISSUED))
        return next((self.moment(text, f"{resource['resourceType']}.{name}") for name, text in said if text), None)

    def moment(self, text: str, name: str) -> datetime:
        """Read a date, dateTime or instant (FHIR R4 §2.24.0.1); what it leaves open is the latest it may be."""
        match = _TIME.fullmatch(text)
        if match is None:
            raise RecordError(f"{name} is not a time with an offset, nor a date.")
        zone = self.zone
        try:
            if match[8]:
                zone = UTC if match[8] == "Z" else timezone(timedelta(hours=int(match[8][:3]), minutes=int(match[8][0] + match[8][4:])))
            return latest_instant(match.groups()[:7], zone)
        except (ValueError, OverflowError):
            raise RecordError(f"{name} is not a time.") from None


def birth_date_of(resource: Json) -> str:
    """Return Patient.birthDate as YYYYMMDD; '' where it is a year or a month alone.

    Raises
    ------
    RecordError
        There is no such day.
    """
    born = text_of(resource, "birthDate")
    match = _TIME.fullmatch(born or "0000")
    try:
        found = date.fromisoformat(born).strftime("%Y%m%d") if match and match[3] else ""
    except ValueError:
        match = None
    if match is None:
        raise RecordError("Patient.birthDate is not a date.")
    return found


def words_of(attachments: list[Json]) -> str:
    """Return the plain text that is in `attachments` themselves."""
    found: list[str] = []
    for one in attachments:
        kind, _, parameters = text_of(one, "contentType").lower().partition(";")
        if kind.strip() != "text/plain" or not text_of(one, "data"):
            continue
        charset = re.search(r"charset=\"?([a-z0-9_-]+)", parameters)
        try:
            data = base64.b64decode("".join(raw_of(one, "data").split()), validate=True)
            found.append(data.decode(charset[1] if charset else "utf-8"))
        except (binascii.Error, UnicodeDecodeError, LookupError, ValueError):
            raise RecordError("Attachment.data is not base64 of a text in its charset.") from None
    return clean("\n".join(found)).strip("\n")


def amount_of(quantity: Json) -> Amount:
    """Read a Quantity; one without a value (R4 §2.24.0.6) is empty."""
    if "value" not in quantity:
        return Amount()
    comparator = text_of(quantity, "comparator")
    if comparator not in COMPARATORS:
        raise RecordError("Quantity.comparator is not <, <=, >= or >.")
    unit = text_of(quantity, "code") if quantity.get("system") == _UCUM else ""
    return Amount(number_of(quantity["value"], "Quantity.value"), COMPARATORS[comparator], unit or text_of(quantity, "unit"))


def number_of(value: object, name: str) -> float:
    """Return a finite JSON number; a string, a boolean or 1e999 is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecordError(f"{name} is not a number.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RecordError(f"{name} is not a finite number.")
    return number


def object_of(parent: Json, name: str) -> Json:
    """Return an element that is an object; an empty one where it is left out."""
    value = parent.get(name, {})
    if not isinstance(value, dict):
        raise RecordError(f"{name} is not an object.")
    return value


def objects_of(parent: Json, name: str) -> list[Json]:
    """Return an element that repeats."""
    value = parent.get(name, [])
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise RecordError(f"{name} is not a list of objects.")
    return value


def texts_of(parent: Json, name: str) -> list[str]:
    """Return a string that repeats, each as a token."""
    value = parent.get(name, [])
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise RecordError(f"{name} is not a list of strings.")
    return [token(one) for one in value]


def text_of(parent: Json, name: str) -> str:
    """Return a string as a token: an identifier, a code, a time."""
    return token(raw_of(parent, name))


def raw_of(parent: Json, name: str) -> str:
    """Return a string with its line breaks."""
    value = parent.get(name, "")
    if not isinstance(value, str):
        raise RecordError(f"{name} is not a string.")
    return value
