"""FHIR R4 bundles and bulk exports: JSON bytes → what they say of each patient. The other door of hl7.py, with the same mapping.

::

    Bundle (JSON) ──────── parse ──────────┐
    bulk export (NDJSON) ─ parse_ndjson ───┼─▶ Assembly: patients first, then what is said of each ─▶ RecordUpdate
    FHIR server ────────── fhir_client.py ─┘

What each resource says is in fhir_resources.py. Nothing is fetched here: a reference out of what was given is never
followed, and nothing is attributed to the only patient just because there is only one.

Why no library: fhir.resources 8.3 takes 2.7 s for the 6.8 MB that json takes 0.07 s for, repeats the rejected content
in its errors, refuses a whole bundle for one field of a resource that nobody reads, and lets comparator "~" pass.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, tzinfo
from typing import Final

from worker.domain import Merge, Observation, Order, Patient, PatientKey, RecordUpdate
from worker.errors import RecordError
from worker.intake.facts import MAX_CONTROL_ID, MAX_ID, MAX_KEY, bounded, part
from worker.intake.fhir_elements import SCHEMES, Elements, Json, birth_date_of, object_of, objects_of, text_of, texts_of
from worker.intake.fhir_resources import READERS

_BUNDLES: Final = frozenset({"collection", "transaction", "batch", "searchset", "document", "message"})
_SEXES: Final = {"male": "M", "female": "F", "other": "O"}  # administrative-gender → PS3.3 §C.7.1.1
_NEVER: Final = datetime.min.replace(tzinfo=UTC)
#: One resource of a bulk export: R4 asks for far less, and json holds twenty times this in memory.
_LINE_BYTES: Final = 16 * 2**20


def parse(
    raw: bytes,
    *,
    zone: tzinfo,
    issuers: Mapping[str, str],
    schemes: Mapping[str, str] | None = None,
    source: str = "FHIR",
    max_bytes: int = 64 * 2**20,
) -> list[RecordUpdate]:
    """Read one bundle: one update for each patient named in it, in the bundle's order.

    Parameters
    ----------
    zone
        Of dates without a time; times always have an offset in FHIR.
    issuers
        Identifier.system, or the assigner's name → issuer of patient ID. Without an entry the issuer is the assigner's
        name, else the system itself; the name '' stands for an identifier with neither, which is refused without it.
    schemes
        URI of a coding system → coding scheme designator, in addition to the well-known ones. Others are kept.
    source
        The system the bundle came from: facts of one source supersede each other by resource id.

    Raises
    ------
    RecordError
        What is needed cannot be understood; the text names the field and never repeats its content.
    """
    if len(raw) > max_bytes:
        raise RecordError(f"The bundle has {len(raw)} bytes; the limit is {max_bytes}.")
    bundle = read_json(raw, "The bundle")
    if bundle.get("resourceType") != "Bundle":
        raise RecordError("The resource is not a Bundle.")
    if bundle.get("type") not in _BUNDLES:
        raise RecordError("Bundle.type is not one of those understood.")
    assembly = Assembly(Elements(zone, issuers, {**SCHEMES, **(schemes or {})}, source))
    entries = [(object_of(entry, "resource"), text_of(entry, "fullUrl")) for entry in objects_of(bundle, "entry")]
    for resource, url in entries:
        assembly.introduce(resource, url)
    for resource, url in entries:
        assembly.add(resource, url)
    return assembly.updates()


def parse_ndjson(
    raw: bytes | Sequence[bytes],
    *,
    zone: tzinfo,
    issuers: Mapping[str, str],
    schemes: Mapping[str, str] | None = None,
    source: str = "FHIR",
    max_bytes: int = 2**30,
) -> tuple[list[RecordUpdate], list[str]]:
    """Read a bulk export: one resource a line, in any order, of one file or of several that belong together.

    What is not named here is as in `parse`.

    Parameters
    ----------
    raw
        The bytes of one file, or of each: a subject may be in another file than what is said of it.
    max_bytes
        Of all files together.

    Returns
    -------
    tuple
        The updates, and a sentence with file and line number for each line that cannot be understood: it alone is left out.

    Raises
    ------
    RecordError
        There are more bytes than `max_bytes`.
    """
    files = [raw] if isinstance(raw, bytes) else list(raw)
    if (size := sum(map(len, files))) > max_bytes:
        raise RecordError(f"The files have {size} bytes; the limit is {max_bytes}.")
    assembly = Assembly(Elements(zone, issuers, {**SCHEMES, **(schemes or {})}, source))
    errors: dict[tuple[int, int], str] = {}

    def each(take: Callable[[Json], None], words: tuple[bytes, ...]) -> None:
        for place, line in _lines(files):
            # Two passes over the bytes, so that a large export is not held in memory as objects.
            if place in errors or not any(word in line for word in words):
                continue
            try:
                resource = read_json(line, "The line", max_bytes=_LINE_BYTES)
                if not text_of(resource, "resourceType"):
                    raise RecordError("The line is not a resource.")  # noqa: TRY301
                take(resource)
            except RecordError as exc:
                errors[place] = str(exc)

    each(assembly.introduce, (b'"Patient"', b'"Medication"'))
    each(assembly.add, (b"",))
    named = {place: f"File {place[0]}, line {place[1]}" if len(files) > 1 else f"Line {place[1]}" for place in errors}
    return assembly.updates(), [f"{named[place]}: {text}" for place, text in sorted(errors.items())]


def _lines(files: Sequence[bytes]) -> Iterator[tuple[tuple[int, int], bytes]]:
    """Give each line that is not blank with its file's and its own number, from 1."""
    for file, raw in enumerate(files, start=1):
        start, number = 0, 0
        while start < len(raw):
            end = raw.find(b"\n", start)
            end = len(raw) if end < 0 else end
            number += 1
            if line := raw[start:end].strip(b" \t\r"):
                yield (file, number), line
            start = end + 1


def read_json(raw: bytes, name: str, *, max_bytes: int | None = None) -> Json:
    """Read one JSON object.

    Raises
    ------
    RecordError
        It is none; the text begins with `name`.
    """
    if max_bytes is not None and len(raw) > max_bytes:
        raise RecordError(f"{name} has {len(raw)} bytes; the limit is {max_bytes}.")
    try:
        found = json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse)
    except UnicodeDecodeError:
        raise RecordError(f"{name} is not UTF-8.") from None
    except RecursionError:
        raise RecordError(f"{name} is nested too deeply.") from None
    except ValueError:
        raise RecordError(f"{name} is not JSON.") from None
    return found if isinstance(found, dict) else {}


def _refuse(_: str) -> float:
    raise ValueError  # NaN and Infinity are JavaScript, not JSON


@dataclass(slots=True)
class Assembly:
    """What is being said of several patients: `introduce` them all, then `add` what is said, then take the `updates`.

    None in ``_references`` marks a reference that two patients claim.
    """

    elements: Elements
    _references: dict[str, PatientKey | None] = field(init=False, default_factory=dict)
    _patients: dict[PatientKey, tuple[Patient, datetime | None]] = field(init=False, default_factory=dict)
    _facts: dict[PatientKey, list[Observation]] = field(init=False, default_factory=dict)
    _orders: dict[PatientKey, list[Order]] = field(init=False, default_factory=dict)
    _links: list[tuple[PatientKey, Json]] = field(init=False, default_factory=list)

    def introduce(self, resource: Json, url: str = "", *, key: PatientKey | None = None) -> None:
        """Take a Patient, or a Medication that others refer to; `key` where it is known from elsewhere."""
        kind = resource.get("resourceType")
        if kind not in ("Patient", "Medication"):
            return
        names = {url, f"{kind}/{text_of(resource, 'id')}"} - {"", f"{kind}/"}
        if kind == "Medication":
            self.elements.medications.update(dict.fromkeys(names, resource))
            return
        _refuse_modified(resource)
        patient = _patient(resource, key or self.elements.key(objects_of(resource, "identifier")))
        links = objects_of(resource, "link")
        for link in links:  # what is wrong with one is this patient's fault, and known before anything is taken
            self._merge(patient.key, link)
        for name in names:
            if self._references.setdefault(name, patient.key) != patient.key:
                self._references[name] = None
                raise RecordError("Two patients of the bundle have the same reference.")
        said = text_of(object_of(resource, "meta"), "lastUpdated")
        at = self.elements.moment(said, "Patient.meta.lastUpdated") if said else None
        earlier = self._patients.get(patient.key)
        if earlier is None or (at or _NEVER) >= (earlier[1] or _NEVER):
            self._patients[patient.key] = (patient, at)
        self._facts.setdefault(patient.key, [])
        self._links += [(patient.key, link) for link in links]

    def add(self, resource: Json, url: str = "") -> None:
        """Take what a resource says, of whom it says it; others than those of `READERS` are passed by."""
        kind = resource.get("resourceType")
        if not isinstance(kind, str) or kind not in READERS:
            return
        _refuse_modified(resource)
        name = text_of(resource, "id") or url
        # Without a name of its own a fact supersedes nothing and nothing supersedes it.
        own = f"{part(self.elements.source)}/{kind}/{part(name)}" if name else ""
        found = list(READERS[kind](self.elements, resource, own))
        if found:
            key, said_at = self.subject(resource), self.elements.said_at(resource)
            for one in found:
                _check(one, kind)
            # The patient's own time is when an address was changed, and says nothing of the results.
            self._facts.setdefault(key, []).extend(replace(one, said_at=said_at) for one in found if isinstance(one, Observation))
            self._orders.setdefault(key, []).extend(replace(one, said_at=said_at) for one in found if isinstance(one, Order))

    def subject(self, resource: Json) -> PatientKey:
        """Return whom `resource` is about. Nothing is attributed to the only patient just because there is only one."""
        if (key := self._refer(object_of(resource, "subject"))) is None:
            raise RecordError(f"The subject of a resource of type {resource['resourceType']} is not in the bundle.")
        return key

    def updates(self) -> list[RecordUpdate]:
        """Return one update for each patient, in the order in which they were named."""
        merges: dict[PatientKey, list[Merge]] = {}
        seen: set[Merge] = set()
        for key, link in self._links:
            merge = self._merge(key, link)
            if merge and merge not in seen:
                seen.add(merge)
                merges.setdefault(key, []).append(merge)
        return [self._update(key, tuple(merges.get(key, ()))) for key in self._facts]

    def _update(self, key: PatientKey, merges: tuple[Merge, ...]) -> RecordUpdate:
        patient, at = self._patients.get(key, (Patient(key), None))
        return RecordUpdate(
            patient,
            tuple(self._facts[key]),
            self.elements.source,
            has_demographics=key in self._patients,
            merges=merges,
            orders=tuple(self._orders.get(key, ())),
            at=at,
            is_at_of_all=False,
        )

    def _refer(self, reference: Json) -> PatientKey | None:
        """Return the patient a Reference means: one that was introduced, or by identifier where there is no other name."""
        name = re.sub(r"/_history/.*$", "", text_of(reference, "reference"))
        if not name and (identifier := object_of(reference, "identifier")):
            return self.elements.key([identifier])
        return self._references.get(name)

    def _merge(self, key: PatientKey, link: Json) -> Merge | None:
        """Read Patient.link; what is only alike ("seealso") or cannot be found is not one."""
        kind, other = text_of(link, "type"), object_of(link, "other")
        if kind not in ("replaced-by", "replaces") or text_of(other, "type") not in ("", "Patient"):
            return None
        linked = self._refer(other)
        if linked is None or linked == key:
            return None
        return Merge(linked, key) if kind == "replaced-by" else Merge(key, linked)


def resource_of(key: str, source: str) -> str:
    """Return the resource that a fact's key names, as "Observation/17"; '' where the fact is of another source."""
    own = f"{part(source)}/"
    return "/".join(key.removeprefix(own).partition("#")[0].split("/")[:2]) if key.startswith(own) else ""


def _refuse_modified(resource: Json) -> None:
    """R4 §2.4: whoever does not understand an extension that may turn what is said into its opposite must not use what it stands in.

    Nor a resource that was made under rules which must be known to understand it (R4 §2.26.3.3).
    """
    if resource.get("implicitRules"):
        raise RecordError(f"{resource['resourceType']}.implicitRules names rules that are not known here.")
    several = [one for value in resource.values() if isinstance(value, list) for one in value if isinstance(one, dict)]
    if any(one.get("modifierExtension") for one in (resource, *several)):
        raise RecordError(f"{resource['resourceType']}.modifierExtension changes what is said in a way that is not understood.")


def _check(one: Observation | Order, kind: str) -> None:
    """Refuse what is too long to be a name of anything."""
    if isinstance(one, Observation):
        bounded(one.code.value, MAX_ID, f"{kind}.code")
        bounded(one.key, MAX_KEY, f"{kind}.id with the codes of its parts")
    else:
        for number in (one.accession_number, one.placer, one.filler):
            bounded(number, MAX_CONTROL_ID, f"{kind}.identifier")


def _patient(resource: Json, key: PatientKey) -> Patient:
    """Read demographics; deceased, address and the rest are not ours to keep."""
    names = objects_of(resource, "name")
    name = next((one for one in names if one.get("use") == "official"), names[0] if names else {})
    given = texts_of(name, "given")
    parts = [
        text_of(name, "family"),
        " ".join(given[:1]),
        " ".join(given[1:]),
        " ".join(texts_of(name, "prefix")),
        " ".join(texts_of(name, "suffix")),
    ]
    pn = "^".join(re.sub(r"[\^=\\]", " ", part) for part in parts).rstrip("^")
    return Patient(key, pn, birth_date_of(resource), _SEXES.get(text_of(resource, "gender"), ""))
