"""TXA and OBX of an HL7 v2 message: one document, its words one observation.

A document is known by its unique number (TXA-12): a later message of the same number, or one that replaces it, supersedes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Final

from worker.domain import Code, Observation
from worker.errors import RecordError
from worker.intake.facts import MAX_CONTROL_ID, MAX_ID, bounded, preferred, token
from worker.intake.hl7_fields import Reader, at
from worker.intake.hl7_results import NO_RESULT, content, status_of

#: HL7 v2.5.1 §9.6: edited, replaced; cancelled; an addendum to another document.
_CORRECTING: Final = frozenset({"MDM^T08", "MDM^T10"})
_CANCELLING: Final = "MDM^T11"
_REPLACING: Final = "MDM^T10"
_ADDING: Final = "MDM^T06"

# HL7 v2.5.1 table 0271: only what somebody signed is final.
_STATUSES: Final = {"AU": "F", "LA": "F", "DI": "P", "DO": "P", "IP": "P", "IN": "P", "PA": "P"}
# Table 0273: deleted, obsolete; not available for the care of patients.
_GONE: Final = frozenset({"CA", "OB"})
_UNAVAILABLE: Final = "UN"


def document(reader: Reader, segments: list[list[str]]) -> tuple[Observation, ...]:
    """Read the one TXA and the texts below it; of a document that replaces another, the withdrawal of that one too.

    Returns
    -------
    tuple of Observation
        () where no text can be read: a picture, a PDF.

    Raises
    ------
    RecordError
        There is not one TXA, its status is none, or what it cancels has no number.
    """
    headers = [fields for fields in segments if fields[0] == "TXA"]
    if len(headers) != 1:
        raise RecordError(f"There are {len(headers)} TXA segments; exactly one is understood.")
    txa = headers[0]
    trigger = reader.envelope.trigger
    is_cancelled = trigger == _CANCELLING
    texts = segments[segments.index(txa) + 1 :]
    number, parent = (token(reader.unescaped(at(txa, index))).rstrip(reader.envelope.separators[1]) for index in (12, 13))
    if is_cancelled and not number:
        raise RecordError("TXA-12 has no document number: which document is cancelled is not said.")
    code = _code(reader, txa, texts)
    bounded(code.value, MAX_ID, "TXA-2")
    for name, text in (("TXA-12", number), ("TXA-13", parent)):
        bounded(text, MAX_CONTROL_ID, name)
    if not code.value:
        raise RecordError("TXA-2 has no document type.")
    when = max(_times(reader, txa), default=reader.said_at)
    words = "" if is_cancelled else "\n".join(_texts(reader, texts))
    status = "W" if is_cancelled else _status(reader, txa, texts)
    if not words and status not in "DW":
        return ()
    key = reader.key("document", *((number,) if number else ("", code.value, when.isoformat())))
    if trigger == _ADDING and number == parent:  # an addendum under its document's own number must not hide the document
        key = f"{key}/addendum/{when.isoformat()}"
    found = [Observation(code, when, text=words, status=status, key=key, source=reader.sender, kind="text")]
    if trigger == _REPLACING and parent not in ("", number):
        key = reader.key("document", parent)
        found.append(Observation(code, when, status="D", key=key, source=reader.sender, kind="text"))
    return tuple(found)


def _code(reader: Reader, txa: list[str], texts: list[list[str]]) -> Code:
    """Choose LOINC, else SNOMED CT, of TXA-2 and of the first text's OBX-3; else TXA-2, whose codes are of table 0270."""
    obx = next((fields for fields in texts if fields[0] == "OBX"), [])
    return preferred((reader.code(at(txa, 2), "HL70270"), reader.code(at(obx, 3))))


def _status(reader: Reader, txa: list[str], texts: list[list[str]]) -> str:
    """Return TXA-17 and TXA-19 as a status of domain.Observation; without TXA-17 it is the first text's OBX-11."""
    completion, availability = reader.first(at(txa, 17)), reader.first(at(txa, 19))
    if completion and completion not in _STATUSES:
        raise RecordError("TXA-17 is not a document completion status.")
    if availability in _GONE:
        return "D"
    if reader.envelope.trigger in _CORRECTING:
        return "C"
    if availability == _UNAVAILABLE:
        return "P"
    if completion:
        return _STATUSES[completion]
    told = (status_of(reader, fields) for fields in texts if fields[0] == "OBX")
    if status := next(filter(None, told), ""):
        return status
    raise RecordError("TXA-17 has no document completion status.")


def _times(reader: Reader, txa: list[str]) -> Iterator[datetime]:
    """Yield when it was told (TXA-4), made (TXA-6), typed (TXA-7) and edited (TXA-8): what it says counts from the last of them."""
    for index in (4, 6, 7, 8):
        for one in reader.split(at(txa, index), 2):
            if first := reader.first(one):
                yield reader.moment(first, f"TXA-{index}")


def _texts(reader: Reader, segments: list[list[str]]) -> Iterator[str]:
    """Yield the words of each OBX that has any; numbers, pictures and withdrawn lines are counted."""
    for fields in segments:
        if fields[0] != "OBX":
            continue
        said = content(reader, at(fields, 2), at(fields, 5))
        is_void = reader.value(at(fields, 11)) in NO_RESULT or status_of(reader, fields) in ("D", "W", "X")
        if said.text and not is_void:
            yield said.text
        else:
            reader.skipped += 1
