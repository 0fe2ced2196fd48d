"""OBR and OBX of an HL7 v2 message: each result one observation, the lines of one text joined."""

from __future__ import annotations

import base64
import binascii
import re
from collections import Counter
from dataclasses import replace
from typing import Final, NamedTuple

from worker.domain import Code, Observation, ValueKind
from worker.errors import RecordError
from worker.intake.facts import COMPARATORS, MAX_ID, SUPERSEDING, Comparator, bounded, clean, number, preferred, token
from worker.intake.hl7_fields import Reader, at

# HL7 v2.5.1 table 0085 → the statuses of domain.Observation. Not here: I, N, O (there is no result yet or at all).
_STATUSES: Final = {"F": "F", "U": "F", "V": "F", "C": "C", "A": "C", "B": "C", "P": "P", "S": "P", "R": "P", "D": "D", "W": "W", "X": "X"}
NO_RESULT: Final = frozenset("INO")

# HL7 v2.3 to v2.8 table 0125, as far as a value or a text can be made of it without guessing. Not here, so counted: addresses, names,
# numbers of accounts and telephones (AD CK CN CP CX DR HD MA MO NA PN TN XAD XCN XON XPN XTN), and pointers (RP).
_NARRATIVE: Final = frozenset({"TX", "FT", "ED"})
_STRINGS: Final = frozenset({"ST", "TX", "FT", "DT", "TM", "TS", "DTM", "IS", "ID"})
_CODED: Final = frozenset({"CE", "CWE", "CNE", "CF"})
#: Their repeats under one key are lines of one text.
_LINES: Final = _STRINGS | {"ED"}

#: HL7 v2.5.1 §2.A.74, SN.3.
_RATIOS: Final = frozenset(":/")
#: Where a number should be: what programs write for none. A person can read "haemolyzed", and nothing out of these.
_NOT_A_NUMBER: Final = re.compile(r"[<>=]*[+-]?(nan|inf|infinity|1\.?#(ind|inf|qnan|snan)[0-9]*)", re.IGNORECASE)
_NUMERIC: Final = frozenset({"NM", "SN", "NR"})
#: HL7 v2.5.1 tables 0191 (ED.2) and 0291 (ED.3), in small letters: these are text as it stands; HTML, RTF and XML are not.
_TEXT_TYPES: Final = frozenset({"text", "tx", "ft", "text/plain"})
_PLAIN: Final = frozenset({"", "plain", "text", "txt", "text/plain", "x-hl7-text"})


class Content(NamedTuple):
    """What OBX-5 says, in the words of domain.Observation; without value and text it says nothing."""

    value: float | None = None
    comparator: Comparator = ""
    text: str = ""
    kind: ValueKind = "number"
    high: float | None = None
    coded: Code | None = None


_NOTHING: Final = Content()


def observations(reader: Reader, segments: list[list[str]]) -> tuple[Observation, ...]:
    """Read every OBX below its OBR; strings under one key are lines of one text, other repeats facts of their own."""
    facts: dict[str, Observation] = {}
    lines: dict[str, list[str]] = {}
    repeats: Counter[str] = Counter()
    obr: list[str] = []
    for fields in segments:
        if fields[0] == "OBR":
            obr = fields
        if fields[0] != "OBX":
            continue
        if (fact := _observation(reader, fields, obr)) is None:
            reader.skipped += 1
            continue
        if fields[2] in _NUMERIC and fact.kind == "text" and _NOT_A_NUMBER.fullmatch(fact.text):
            reader.skipped += 1  # kept, so that it replaces an earlier value, and counted
        earlier = facts.get(fact.key)
        if earlier and earlier.status == fact.status and fields[2] in _LINES and earlier.kind == "text":
            lines.setdefault(fact.key, [earlier.text]).append(fact.text)
            continue
        # A correction below what it corrects takes its place; below another correction it is one of the repeats, as their finals were.
        if earlier and (fact.status not in SUPERSEDING or earlier.status in SUPERSEDING):
            repeats[fact.key] += 1
            fact = replace(fact, key=f"{fact.key}#{repeats[fact.key]}")
        facts[fact.key] = fact
        lines.pop(fact.key, None)
    return tuple(replace(fact, text="\n".join(lines[key])) if key in lines else fact for key, fact in facts.items())


def _observation(reader: Reader, obx: list[str], obr: list[str]) -> Observation | None:
    """Read one OBX; None if nothing usable is in it."""
    is_narrative = at(obx, 2) in _NARRATIVE
    code, status = _code(reader, at(obx, 3), obr, is_narrative=is_narrative), reader.value(at(obx, 11))
    said = content(reader, at(obx, 2), at(obx, 5))
    is_empty = said.value is None and not said.text
    if not code.value or status in NO_RESULT or (is_empty and status not in SUPERSEDING):
        return None
    bounded(code.value, MAX_ID, "OBX-3")
    if status not in _STATUSES:
        raise RecordError("OBX-11 is not an observation result status." if status else "OBX-11 has no status.")
    # OBR-22, when the result was reported, is later than when it was drawn: late, but never too early.
    times = [("OBX-14", at(obx, 14)), ("OBR-7", at(obr, 7)), ("OBR-22", at(obr, 22))]
    times = [(name, first) for name, first in ((name, reader.first(time)) for name, time in times) if first]
    if not times:
        raise RecordError("Neither OBX-14 nor OBR-7 nor OBR-22 has a time.")
    # A value counts from when it was drawn, a narrative from when it was written: the report on a study must not
    # be an input to that study, though its OBX-14 is the time of the images.
    found = [reader.moment(time, name) for name, time in (times if is_narrative else times[:1])]
    order = token(reader.unescaped(at(obr, 3) or at(obr, 2)))
    return Observation(
        code=code,
        at=max(found),
        value=said.value,
        comparator=said.comparator,
        unit=reader.unit(at(obx, 6)) if said.value is not None else "",
        text=said.text,
        status=_STATUSES[status],
        key=reader.key(order, code.scheme, code.value, reader.value(at(obx, 4)), "" if order else found[0].isoformat()),
        source=reader.sender,
        kind=said.kind,
        high=said.high,
        coded=said.coded,
    )


def _code(reader: Reader, text: str, obr: list[str], *, is_narrative: bool) -> Code:
    """Choose of OBX-3; a narrative may leave it to OBR-4 or OBR-24 and name only the part of the report."""
    if not is_narrative:
        return reader.code(text)
    # HL7 v2.5.1 §7.1, suffixes of narrative reports: '&IMP' (impression), '&GDT' (description) … of what OBR-4 names, here one report.
    identifier, *rest = reader.split(text, 1)
    base = reader.split(identifier, 4)[0]
    code = reader.code(reader.envelope.separators[1].join((base, *rest)))
    if code.value:
        return code
    return preferred((reader.code(at(obr, 4)), reader.code(reader.first(at(obr, 24)), "HL70074")))


def status_of(reader: Reader, obx: list[str]) -> str:
    """OBX-11 as a status of domain.Observation; '' for one that is none, or of no result."""
    return _STATUSES.get(reader.value(at(obx, 11)), "")


def content(reader: Reader, value_type: str, text: str) -> Content:
    """Read OBX-5; Content() where it is empty or of a type that is not read."""
    if value_type == "NM":
        value = number(reader.value(text))
        # Not a number after all ("haemolyzed"): kept as a text, so that it still replaces an earlier value.
        return Content(value) if value is not None else _text(reader.lines(text))
    if value_type == "SN":
        return _structured(*(reader.value(part) for part in reader.split(text, 1)))
    if value_type in _STRINGS:
        return _text(reader.lines(text))
    if value_type in _CODED:
        return _concept(reader, text)
    if value_type == "NR":
        return _range([reader.value(part) for part in reader.split(text, 1)])
    if value_type == "ED":
        return _text(_encapsulated(reader, reader.split(text, 1)))
    return _NOTHING


def _text(words: str) -> Content:
    return Content(text=words, kind="text") if words else _NOTHING


def _structured(comparator: str, *rest: str) -> Content:
    """Read a structured numeric (HL7 v2.5.1 §2.A.74): number, comparison, range or ratio; else its words, as '2+'."""
    parts = [*rest, "", "", ""]
    value, high = number(parts[0]), number(parts[2])
    if value is not None and comparator in COMPARATORS and not any(parts[3:]):
        known = COMPARATORS[comparator]
        if not parts[1] and not parts[2]:
            return Content(value, known)
        if high is not None and parts[1] in _RATIOS:
            return Content(value, known, kind="ratio", high=high)
        if high is not None and parts[1] == "-" and not known and value <= high:
            return Content(value, kind="range", high=high)
    return _text("".join((comparator, *rest)))


def _range(parts: list[str]) -> Content:
    """Read a numeric range (data type NR); one without an end is a comparison."""
    low, high = number(at(parts, 0)), number(at(parts, 1))
    if low is not None and high is not None and low <= high:
        return Content(low, kind="range", high=high)
    if low is not None and not at(parts, 1):
        return Content(low, ">=")
    if high is not None and not at(parts, 0):
        return Content(high, "<=")
    return _text(" - ".join(part for part in parts if part))


def _concept(reader: Reader, text: str) -> Content:
    """Read a coded value; of several repetitions there are only the words, or one code would stand for all."""
    words = reader.words(text)
    if not words or sum(bool(one.strip()) for one in reader.split(text, 2)) != 1:
        return _text(words)
    coded = reader.code(text)
    return Content(text=words, kind="coded", coded=coded) if coded.value else _text(words)


def _encapsulated(reader: Reader, parts: list[str]) -> str:
    """Return the words of an ED that is plain text (HL7 v2.5.1 §2.A.24); '' for pictures, PDF and what is not what it says."""
    kind, subtype, encoding = (reader.value(at(parts, index)).lower() for index in (1, 2, 3))
    if kind not in _TEXT_TYPES or subtype not in _PLAIN:
        return ""
    data = at(parts, 4)
    if encoding in ("", "a"):
        return reader.lines(data)
    try:
        if encoding == "base64":
            raw = base64.b64decode("".join(reader.unescaped(data).split()), validate=True)
        elif encoding == "hex":
            raw = bytes.fromhex(data)
        else:
            return ""
        return clean(raw.decode(reader.codec)).strip("\n")
    except (binascii.Error, ValueError):
        return ""
