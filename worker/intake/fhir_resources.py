"""What one FHIR R4 resource says: its facts and orders. One function a resource, and a table of statuses for each.

::

    Observation ──────────────────────────── value of every kind or text; each component one of its own
    Condition, Procedure ─────────────────── the code itself, value 1
    MedicationStatement, MedicationRequest ─ the medication's code, value 1
    DiagnosticReport, DocumentReference ──── text
    ServiceRequest of imaging ────────────── the order, and the reason for it as a text

Statuses become those of HL7 table 0085: what is not sure is P and is not used, what is withdrawn supersedes what was said.
Not here: whose it is (fhir.py), data types (fhir_elements.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

from worker.domain import ROUTINE, STAT, Code, Observation, Order, ValueKind
from worker.errors import RecordError
from worker.intake.facts import SUPERSEDING, Comparator, clean, part, preferred
from worker.intake.fhir_elements import Elements, Json, amount_of, number_of, object_of, objects_of, raw_of, text_of, words_of

#: There is no result yet, or only an intention: nothing is told.
_NOTHING_YET: Final = ""
_UNKNOWN: Final = {"unknown": "P", "entered-in-error": "W"}

# observation-status, diagnostic-report-status, composition-status, document-reference-status.
_RESULT: Final = {
    **_UNKNOWN, "final": "F", "current": "F", "amended": "C", "corrected": "C", "appended": "C", "preliminary": "P", "partial": "P",
    "cancelled": "X", "superseded": "D", "registered": _NOTHING_YET,
}  # fmt: skip
# condition-ver-status: one of several that it may be (differential) is not one that it is; one ruled out is withdrawn.
_VERIFICATION: Final = {
    "confirmed": "F", "provisional": "P", "differential": "P", "unconfirmed": "P", "refuted": "D", "entered-in-error": "W",
}  # fmt: skip
# event-status, of Procedure: one that was stopped was not done as its code says.
_EVENT: Final = {
    **_UNKNOWN, "completed": "F", "in-progress": "P", "on-hold": "P", "stopped": "P", "not-done": "D", "preparation": _NOTHING_YET,
}  # fmt: skip
# medication-statement-status and medicationrequest-status: what was stopped was taken until then.
_MEDICATION: Final = {
    **_UNKNOWN, "active": "F", "completed": "F", "stopped": "F", "on-hold": "F", "not-taken": "D", "cancelled": "D",
    "intended": _NOTHING_YET, "draft": _NOTHING_YET,
}  # fmt: skip
# request-status: the reason for an order stands as long as the order does.
_REQUEST: Final = {
    **_UNKNOWN, "active": "F", "on-hold": "F", "completed": "F", "revoked": "D", "draft": _NOTHING_YET,
}  # fmt: skip
_CANCELLED: Final = frozenset({"revoked", "entered-in-error"})
_WITHDRAWN: Final = frozenset("DWX")
#: request-intent: what is only proposed or planned has not been ordered.
_NOT_ORDERED: Final = frozenset({"proposal", "plan", "option"})
_URGENT: Final = frozenset({"stat", "asap", "urgent"})  # request-priority

# servicerequest-category (R4, example binding): imaging, and the four that are not; "RAD" and "LAB" are those of HL7 table 0074.
_IMAGING: Final = frozenset({"363679005", "RAD", "RX", "CT", "NMR", "NMS", "RUS", "CUS", "VUS", "OUS", "XRC"})
_NOT_IMAGING: Final = frozenset({"108252007", "409063005", "409073007", "387713003", "LAB"})
#: LOINC; what HL7 v2 says in OBR-31.
REASON: Final = Code("18785-6", "LN", "Radiology Reason for study (narrative)")


class Content(NamedTuple):
    """A value[x], as the fields of an Observation."""

    kind: ValueKind = "number"
    value: float | None = None
    comparator: Comparator = ""
    unit: str = ""
    text: str = ""
    high: float | None = None
    coded: Code | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is said."""
        return self.value is None and not self.text and self.coded is None


# --- results


def observation(elements: Elements, resource: Json, key: str) -> Iterator[Observation]:
    """Read an Observation and each of its components."""
    status = status_of(resource, _RESULT)
    if not status:
        return
    # Observation.focus: of a fetus, a donor or a device, filed under the patient. What was said under this id without it was a mistake.
    if any(text_of(one, "reference") != text_of(object_of(resource, "subject"), "reference") for one in objects_of(resource, "focus")):
        status = "D"
    at: datetime | None = None
    repeats: Counter[str] = Counter()
    components = objects_of(resource, "component")
    for position, element in enumerate((resource, *components)):
        code = preferred(elements.codes(object_of(element, "code")))
        content = content_of(elements, element)
        # A panel has no value of its own.
        if content.is_empty and (position or not components) and (words := _absent(elements, element)):
            content = Content("text", text=words)
        if _says_nothing(code, status, is_empty=content.is_empty):
            continue
        times = ("effectiveDateTime", "effectivePeriod", "effectiveInstant", "issued")
        at = at or elements.first_time(resource, _times(times, status))
        own = f"{key}/{part(code.scheme)}/{part(code.value)}" if key and position else key
        repeats[own] += 1
        own = f"{own}#{repeats[own]}" if own and repeats[own] > 1 else own
        yield Observation(code, at, status=status, key=own, source=elements.source, **content._asdict())


def report(elements: Elements, resource: Json, key: str) -> Iterator[Observation]:
    """Read the words of a DiagnosticReport, which count from when they were issued."""
    words = words_of(objects_of(resource, "presentedForm")) or clean(raw_of(resource, "conclusion")).strip("\n")
    code = preferred(elements.codes(object_of(resource, "code")))
    times = ("issued", "effectiveDateTime", "effectivePeriod")
    yield from narrative(elements, resource, key, code, status_of(resource, _RESULT), words, times)


def document(elements: Elements, resource: Json, key: str) -> Iterator[Observation]:
    """Read the words of a DocumentReference, which count from when it was made."""
    status = status_of(resource, _RESULT)
    if status == "F" and "docStatus" in resource:
        status = status_of(resource, _RESULT, "docStatus")
    words = words_of([object_of(content, "attachment") for content in objects_of(resource, "content")])
    code = preferred(elements.codes(object_of(resource, "type")))
    yield from narrative(elements, resource, key, code, status, words, ("date", "indexed"))


def narrative(
    elements: Elements, resource: Json, key: str, code: Code, status: str, words: str, times: Sequence[str]
) -> Iterator[Observation]:
    """Give `words` as one observation."""
    if _says_nothing(code, status, is_empty=not words):
        return
    at = elements.first_time(resource, _times(times, status))
    yield Observation(code, at, text=words, status=status, key=key, source=elements.source, kind="text")


# --- history


def condition(elements: Elements, resource: Json, key: str) -> Iterator[Observation]:
    """Read a Condition: that the patient has or had it, from when it was recorded. A resolved one is history, and still a fact."""
    stated = object_of(resource, "verificationStatus")
    known = [_VERIFICATION[one.value] for one in elements.codes(stated) if one.value in _VERIFICATION]
    if stated and not known:
        raise RecordError("Condition.verificationStatus is not a known status.")
    times = ("recordedDate", "onsetDateTime", "onsetPeriod", "meta.lastUpdated")
    yield from presence(elements, resource, key, object_of(resource, "code"), known[0] if known else "F", times)


def procedure(elements: Elements, resource: Json, key: str) -> Iterator[Observation]:
    """Read a Procedure: that it was done, from when it was over."""
    times = ("performedDateTime", "performedPeriod", "meta.lastUpdated")
    yield from presence(elements, resource, key, object_of(resource, "code"), status_of(resource, _EVENT), times)


def medication(elements: Elements, resource: Json, key: str) -> Iterator[Observation]:
    """Read a MedicationStatement or MedicationRequest: that the patient takes it, from the start.

    A period's end may lie years ahead: the time of a fact that is true now may not.
    """
    status = status_of(resource, _MEDICATION)
    if status == "F" and text_of(resource, "intent") in _NOT_ORDERED:
        status = "P"
    if status and resource.get("doNotPerform") is True:
        status = "D"
    times = ("effectiveDateTime", "effectivePeriod.start", "authoredOn", "dateAsserted", "meta.lastUpdated")
    yield from presence(elements, resource, key, medicine(elements, resource), status, times)


def medicine(elements: Elements, resource: Json) -> Json:
    """Return the concept of a medication, which may be a resource of its own, contained or come along."""
    if concept := object_of(resource, "medicationCodeableConcept"):
        return concept
    reference = text_of(object_of(resource, "medicationReference"), "reference")
    contained = {f"#{text_of(one, 'id')}": one for one in objects_of(resource, "contained") if one.get("resourceType") == "Medication"}
    return object_of(contained.get(reference) or elements.medications.get(reference, {}), "code")


def presence(elements: Elements, resource: Json, key: str, concept: Json, status: str, times: Sequence[str]) -> Iterator[Observation]:
    """Give `concept` as a fact that is there: value 1, its words beside it."""
    code = preferred(elements.codes(concept))
    if _says_nothing(code, status, is_empty=False):
        return
    words = code.meaning or text_of(concept, "text")
    yield Observation(
        code,
        elements.first_time(resource, _times(times, status)),
        1.0,
        unit="1",
        text=words,
        status=status,
        key=key,
        source=elements.source,
    )


# --- orders


def request(elements: Elements, resource: Json, key: str) -> Iterator[Observation | Order]:
    """Read a ServiceRequest of imaging: the order, and why the study is asked for."""
    status = status_of(resource, _REQUEST)
    numbers = {kind: text_of(one, "value") for one in objects_of(resource, "identifier") for kind in elements.types(one)}
    if not status or text_of(resource, "intent") in _NOT_ORDERED or not is_imaging(elements, resource, "ACSN" in numbers):
        return
    # A site that numbers no orders still has several of one study: the logical ID tells them apart.
    resource_id = text_of(resource, "id")
    own_number = f"ServiceRequest/{resource_id}" if resource_id and not numbers.keys() & {"PLAC", "FILL"} else ""
    is_cancelled = resource["status"] in _CANCELLED or resource.get("doNotPerform") is True
    yield Order(
        accession_number=numbers.get("ACSN", ""),
        placer=numbers.get("PLAC", own_number),
        filler=numbers.get("FILL", ""),
        priority=STAT if text_of(resource, "priority") in _URGENT else ROUTINE,
        is_cancelled=is_cancelled,
    )
    concepts = objects_of(resource, "reasonCode")
    reasons = (text_of(one, "text") or preferred(elements.codes(one)).meaning for one in concepts)
    own = f"{key}/reason" if key else ""
    withdrawn = "D" if is_cancelled and status not in SUPERSEDING else status
    times = ("authoredOn", "occurrenceDateTime", "occurrencePeriod.start", "meta.lastUpdated")
    if concepts:
        yield from narrative(elements, resource, own, REASON, withdrawn, "\n".join(filter(None, reasons)), times)


def is_imaging(elements: Elements, resource: Json, has_accession_number: bool) -> bool:
    """Whether an order is one of imaging: its category says so, or it has an accession number and no category denies it.

    A laboratory numbers its orders with accession numbers too.
    """
    categories = {code.value for one in objects_of(resource, "category") for code in elements.codes(one)}
    return bool(categories & _IMAGING) or (has_accession_number and not categories & _NOT_IMAGING)


# --- values and statuses


def _says_nothing(code: Code, status: str, *, is_empty: bool) -> bool:
    """Whether there is nothing to tell. What is withdrawn may have lost all but its id: that is enough to withdraw it."""
    return not status or (status not in _WITHDRAWN and (not code.value or (is_empty and status not in SUPERSEDING)))


def _times(names: Sequence[str], status: str) -> tuple[str, ...]:
    """Where to look for when it was; of what is withdrawn it is enough to know when that was said."""
    return (*names, "meta.lastUpdated") if status in _WITHDRAWN else tuple(names)


def status_of(resource: Json, known: Mapping[str, str], name: str = "status") -> str:
    """Return the status as in HL7 table 0085; '' where there is nothing to tell yet."""
    status = text_of(resource, name)
    if status not in known:
        raise RecordError(f"{resource['resourceType']}.{name} is not a known status.")
    return known[status]


def content_of(elements: Elements, part: Json) -> Content:
    """Return value[x]; nothing of the types that are not read."""
    return next((read(elements, part, name) for name, read in _CONTENTS.items() if part.get(name) not in (None, {})), Content())


def _absent(elements: Elements, part: Json) -> str:
    """Why there is no value, as HL7 v2 says "hemolyzed": like any newer result that cannot be used it stands before an older one."""
    reason = object_of(part, "dataAbsentReason")
    code = preferred(elements.codes(reason))
    return text_of(reason, "text") or code.meaning or code.value


def _quantity(_: Elements, part: Json, name: str) -> Content:
    return Content("number", *amount_of(object_of(part, name)))


def _range(_: Elements, part: Json, name: str) -> Content:
    """Read a Range; one with an open end is a number with a comparator."""
    low, high = (amount_of(object_of(object_of(part, name), edge)) for edge in ("low", "high"))
    if low.value is None or high.value is None:
        if high.value is not None:
            return Content("number", high.value, "<=", high.unit)
        return Content("number", low.value, ">=", low.unit) if low.value is not None else Content()
    if low.unit != high.unit:
        raise RecordError("Range.low and Range.high have different units.")
    return Content("range", low.value, unit=low.unit, high=high.value)


def _ratio(_: Elements, part: Json, name: str) -> Content:
    """Read a Ratio. The comparator is that of either part, as HL7 v2 writes a titer, `>^1^:^128`."""
    over, under = (amount_of(object_of(object_of(part, name), edge)) for edge in ("numerator", "denominator"))
    if over.value is None or under.value is None:
        return Content()
    if over.comparator and under.comparator:
        raise RecordError("Ratio.numerator and Ratio.denominator both have a comparator.")
    unit = f"{over.unit or '1'}/{under.unit}" if under.unit not in ("", "1") else over.unit
    return Content("ratio", over.value, over.comparator or under.comparator, unit, high=under.value)


def _concept(elements: Elements, part: Json, name: str) -> Content:
    concept = object_of(part, name)
    code = preferred(elements.codes(concept))
    words = code.meaning or code.value or text_of(concept, "text")
    return Content("coded", text=words, coded=code) if code.value else Content("text", text=words)


def _boolean(_: Elements, part: Json, name: str) -> Content:
    return Content("text", text=str(part[name]).lower()) if isinstance(part[name], bool) else Content()


def _words(_: Elements, part: Json, name: str) -> Content:
    return Content("text", text=clean(raw_of(part, name)).strip("\n"))


def _integer(_: Elements, part: Json, name: str) -> Content:
    return Content("number", number_of(part[name], f"Observation.{name}"))


_CONTENTS: Final[Mapping[str, Callable[[Elements, Json, str], Content]]] = {
    "valueQuantity": _quantity,
    "valueInteger": _integer,
    "valueCodeableConcept": _concept,
    "valueRange": _range,
    "valueRatio": _ratio,
    "valueBoolean": _boolean,
    "valueString": _words,
    "valueDateTime": _words,
    "valueTime": _words,
}

Reader = Callable[[Elements, Json, str], Iterator[Any]]
#: By resourceType; others are passed by.
READERS: Final[Mapping[str, Reader]] = {
    "Observation": observation,
    "DiagnosticReport": report,
    "DocumentReference": document,
    "Condition": condition,
    "Procedure": procedure,
    "MedicationStatement": medication,
    "MedicationRequest": medication,
    "ServiceRequest": request,
}
