r"""One HL7 v2 message: bytes → what it says of one patient.

::

    MSH ── who sent it, when, under which control ID, in which character set
    PID ── the patient key and, in ADT^A01/A04/A08, the demographics
    OBR ─┬ order number and default time          (ORU^R01)
         └ OBX ×n ── one observation each; lines of one text are joined

Every other trigger is read as far as MSH: its ``update`` is None and nothing of it is guessed.

Not here: sockets and answers (mllp.py), rows (store/records.py).

Why no library reads the fields: python-hl7 0.4.5 takes 7 s and 465 MiB for 1 MiB of separators, writes the text of
fields it cannot unescape to the log and drops them, and reads \Xhh\ as Latin-1 whatever MSH-18 says; hl7apy 1.3.5
parses 40 messages a second. Fields are split only where they are read; a test compares them with python-hl7's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta, timezone, tzinfo
from typing import Final

from worker.domain import Code, Observation, Patient, PatientKey, RecordUpdate
from worker.errors import RecordError
from worker.intake.envelope import BOM, Envelope, read_envelope
from worker.intake.facts import COMPARATORS, SUPERSEDING, Comparator, clean, latest_instant, number, preferred, token

DEMOGRAPHICS: Final = frozenset({"ADT^A01", "ADT^A04", "ADT^A08"})
RESULTS: Final = frozenset({"ORU^R01"})

# HL7 v2.5.1 table 0211. UTF-16 and UTF-32 would break the framing; ISO 2022 switching is refused.
_CODECS: Final = {
    "ASCII": "ascii",
    "UNICODE UTF-8": "utf-8",
    "GB 18030-2000": "gb18030",
    "KS X 1001": "euc_kr",
    "BIG-5": "big5",
    **{f"8859/{part}": f"iso8859-{part}" for part in (1, 2, 3, 4, 5, 6, 7, 8, 9, 15)},
}

# HL7 v2.5.1 table 0085 → the statuses of domain.Observation. Not here: I, N, O (there is no result yet or at all).
_STATUSES: Final = {"F": "F", "U": "F", "V": "F", "C": "C", "A": "C", "B": "C", "P": "P", "S": "P", "R": "P", "D": "D", "W": "W", "X": "X"}
_NO_RESULT: Final = frozenset("INO")

# HL7 v2.5.1 table 0125, as far as a value or a text can be made of it without guessing.
_NARRATIVE: Final = frozenset({"TX", "FT"})
_STRINGS: Final = frozenset({"ST", "TX", "FT", "DT", "TM", "TS", "DTM", "IS", "ID"})
_CODED: Final = frozenset({"CE", "CWE", "CNE", "CF"})

_SEXES: Final = {"M": "M", "F": "F", "O": "O", "A": "O"}  # table 0001 → PS3.3 §C.7.1.1
_SEGMENT: Final = re.compile(r"[A-Z][A-Z0-9]{2}")
_READ: Final = frozenset({"MSH", "PID", "OBR", "OBX"})
#: Escape sequence (§2.7.1) → which of the separators it stands for.
_ESCAPED: Final = {"F": 0, "S": 1, "R": 2, "E": 3, "T": 4}
_TIME: Final = re.compile(
    r"([0-9]{4})(?:([0-9]{2})(?:([0-9]{2})(?:([0-9]{2})(?:([0-9]{2})(?:([0-9]{2})(?:\.([0-9]{1,6})[0-9]*)?)?)?)?)?)?([+-][0-9]{4})?"
)


@dataclass(frozen=True, slots=True)
class ParsedMessage:
    """What one message says. ``update`` is None for a trigger we know not to use.

    ``skipped`` counts its observations of which no value and no text could be made, and those without a code.
    """

    control_id: str
    sender: str
    sent_at: datetime
    trigger: str
    update: RecordUpdate | None
    skipped: int = 0


def parse(
    raw: bytes, *, zone: tzinfo, issuers: Mapping[str, str], schemes: Mapping[str, str] | None = None, encoding: str = "utf-8"
) -> ParsedMessage:
    """Read one message.

    Parameters
    ----------
    raw
        Without the bytes of the framing. Segments end with CR; LF and CR LF are understood.
    zone
        Of times without an offset, where MSH-7 has none either (HL7 v2.5.1 §2.15.9.7).
    issuers
        Name of an assigning authority (CX.4.1, or CX.4.2) → issuer of patient ID. Others are kept as they are; the
        name '' stands for an authority left out, which is refused without it.
    schemes
        Name of a coding system (table 0396) → coding scheme designator. Others are kept; one left out is local, 'L'.
    encoding
        Of messages without MSH-18.

    Raises
    ------
    RecordError
        What is needed cannot be understood; the text names the field and never repeats its content.
    """
    envelope = read_envelope(raw)
    codec = _codec(envelope, encoding)
    if b"\x1b" in raw:
        raise RecordError("The message switches character sets by ISO 2022, which is not supported.")
    try:
        text = raw.removeprefix(BOM).decode(codec)
    except UnicodeDecodeError as exc:
        raise RecordError(f"Byte {exc.start} is not {codec}, which MSH-18 or, where it is empty, the configuration names.") from None
    return _Reader(envelope, text, codec, zone, issuers, schemes or {}).parsed()


def _codec(envelope: Envelope, encoding: str) -> str:
    declared = envelope.raw(18).split(envelope.separators[2])[0].strip()
    if declared and declared not in _CODECS:
        raise RecordError("MSH-18 names a character set that is not supported.")
    return _CODECS.get(declared, encoding)


def _segments(text: str, separator: str) -> Iterator[list[str]]:
    """Split into segments, and those that are read into fields: field n is at index n, but for MSH, where it is at n - 1."""
    for position, padded in enumerate(re.split("\r\n?" if "\r" in text else "\n", text), start=1):
        if not (line := padded.strip("\n ")):
            continue
        if not _SEGMENT.match(line) or line[3:4] not in ("", separator):
            raise RecordError(f"Line {position} is not a segment.")
        if line[:3] in _READ:
            yield line.split(separator)


@dataclass(slots=True)
class _Reader:
    """One message being read."""

    envelope: Envelope
    text: str
    codec: str
    zone: tzinfo
    issuers: Mapping[str, str]
    schemes: Mapping[str, str]
    escape: re.Pattern[str] = field(init=False)
    sender: str = field(init=False, default="")
    skipped: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        mark = re.escape(self.envelope.separators[3])
        self.escape = re.compile(f"{mark}([^{mark}\r\n]*){mark}")

    def parsed(self) -> ParsedMessage:
        """Read the segments that the trigger calls for."""
        segments = list(_segments(self.text, self.envelope.separators[0]))
        msh = segments[0]
        if sum(fields[0] == "MSH" for fields in segments) != 1:
            raise RecordError("There is more than one MSH segment in the message.")
        if len(msh) != len(self.envelope.fields):
            raise RecordError("MSH cannot be split before it is decoded: a name in it holds a separator's byte.")
        control_id = self.value(_at(msh, 9))
        if not control_id:
            raise RecordError("MSH-10 has no message control ID.")
        sent = self.first(_at(msh, 6))
        sent_at = self.moment(sent, "MSH-7")
        if sent[-5:-4] in ("+", "-"):
            offset = _offset(sent[-5:])
            # A site that writes its own zone's offset means its zone: a winter draw sent in summer has winter's offset.
            if sent_at.astimezone(self.zone).utcoffset() != offset.utcoffset(None):
                self.zone = offset
        self.sender = "|".join(self.authority(_at(msh, index), 1)[0] for index in (2, 3))
        trigger = self.envelope.trigger
        update = None
        if trigger in DEMOGRAPHICS | RESULTS:
            patient = self.patient([fields for fields in segments if fields[0] == "PID"])
            facts = self.observations(segments) if trigger in RESULTS else ()
            # A laboratory's copy of the demographics is older than the admission office's.
            update = RecordUpdate(patient, facts, self.sender, has_demographics=trigger in DEMOGRAPHICS)
        return ParsedMessage(control_id, self.sender, sent_at, trigger, update, self.skipped)

    # --- fields

    def split(self, text: str, level: int) -> list[str]:
        """Split at the component (1), repetition (2) or subcomponent (4) separator."""
        return text.split(self.envelope.separators[level])

    def value(self, text: str) -> str:
        """Return one escaped piece as a token; the null value '""' is empty (HL7 v2.5.1 §2.5.3)."""
        return "" if text == '""' else token(self.unescaped(text))

    def first(self, text: str) -> str:
        """Return the first component of the first repetition."""
        return self.value(self.split(self.split(text, 2)[0], 1)[0])

    def unescaped(self, text: str) -> str:
        """Replace escape sequences (HL7 v2.5.1 §2.7); what is not one stays as it is."""
        return self.escape.sub(self._character, text) if self.envelope.separators[3] in text else text

    def _character(self, match: re.Match[str]) -> str:
        body = match.group(1)
        if body in _ESCAPED:
            return self.envelope.separators[_ESCAPED[body]]
        if body in ("H", "N"):  # highlighting on and off
            return ""
        if body[:1] not in (".", "X", "C", "M"):  # local (Z) or no escape sequence at all
            return match.group()
        if body.startswith("."):  # formatting commands, §2.7.6: these three break the line, the others indent it
            return "\n" if body[1:3] in ("br", "sp", "ce") else ""
        if re.fullmatch("X([0-9A-Fa-f]{2})+", body):
            try:
                return bytes.fromhex(body[1:]).decode(self.codec)
            except UnicodeDecodeError:
                raise RecordError("A hexadecimal escape is not in the message's character set.") from None
        if re.fullmatch("[CM]([0-9A-Fa-f]{2}){2,3}", body):
            raise RecordError("An escape sequence switches the character set, which is not supported.")
        return match.group()

    def moment(self, text: str, name: str) -> datetime:
        """Read a DTM (HL7 v2.5.1 §2.A.22); `name` is the field's, for the error."""
        match = _TIME.fullmatch(text)
        if match is None:
            raise RecordError(f"{name} is not a time." if text else f"{name} has no time.")
        try:
            return latest_instant(match.groups()[:7], _offset(match[8]) if match[8] else self.zone)
        except (ValueError, OverflowError):
            raise RecordError(f"{name} is not a time.") from None

    # --- PID

    def authority(self, text: str, level: int) -> tuple[str, str]:
        """Return the name and the universal ID of an HD, whose parts are split at `level`; the name may be that ID."""
        parts = [self.value(part) for part in self.split(text, level)]
        return parts[0] or _at(parts, 1), _at(parts, 1)

    def patient(self, segments: list[list[str]]) -> Patient:
        """Read the one PID."""
        if len(segments) != 1:  # ORU^R01 may carry several patients; whose result it is may not be guessed
            raise RecordError(f"There are {len(segments)} PID segments; exactly one is understood.")
        pid = segments[0]
        born = _TIME.fullmatch(self.first(_at(pid, 7)) or "0000")
        try:
            birth_date = date(int(born[1]), int(born[2]), int(born[3])).strftime("%Y%m%d") if born and born[3] else ""
        except ValueError:
            born = None
        if born is None:
            raise RecordError("PID-7 is not a date.")
        return Patient(self.key(_at(pid, 3)), self.name(_at(pid, 5)), birth_date, _SEXES.get(self.first(_at(pid, 8)), ""))

    def key(self, text: str) -> PatientKey:
        """Choose of PID-3 the medical record number (MR), else the patient internal identifier (PI), else the first."""
        numbers = [parts for parts in (self.split(one, 1) for one in self.split(text, 2)) if self.value(parts[0])]
        if not numbers:
            raise RecordError("PID-3.1 has no patient ID.")
        chosen = min(numbers, key=lambda parts: {"MR": 0, "PI": 1}.get(self.value(_at(parts, 4)), 2))
        names = [name for name in self.authority(_at(chosen, 3), 4) if name] or [""]
        if not (issuer := next((self.issuers[name] for name in names if name in self.issuers), names[0])):
            raise RecordError("PID-3.4 has no assigning authority.")
        return PatientKey(issuer, self.value(chosen[0]))

    def name(self, text: str) -> str:
        """Return PID-5 as DICOM writes names: family^given^middle^prefix^suffix (PS3.5 §6.2, PN)."""
        names = [self.split(one, 1) for one in self.split(text, 2)]
        chosen = min(names, key=lambda parts: self.value(_at(parts, 6)) != "L")
        # XPN has the suffix before the prefix, and the family name's own parts as subcomponents.
        parts = [self.value(self.split(_at(chosen, i), 4)[0]) for i in (0, 1, 2, 4, 3)]
        return "^".join(re.sub(r"[\^=\\]", " ", part) for part in parts).rstrip("^")

    # --- OBR, OBX

    def observations(self, segments: list[list[str]]) -> tuple[Observation, ...]:
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
            if (fact := self.observation(fields, obr)) is None:
                self.skipped += 1
                continue
            earlier = facts.get(fact.key)
            if earlier and earlier.status == fact.status and fields[2] in _STRINGS:
                lines[fact.key].append(fact.text)
                continue
            if earlier and fact.status not in SUPERSEDING:
                repeats[fact.key] += 1
                fact = replace(fact, key=f"{fact.key}#{repeats[fact.key]}")
            facts[fact.key], lines[fact.key] = fact, [fact.text]
        return tuple(replace(fact, text="\n".join(lines[key])) for key, fact in facts.items())

    def observation(self, obx: list[str], obr: list[str]) -> Observation | None:
        """Read one OBX; None if nothing usable is in it."""
        code, status = self.code(_at(obx, 3)), self.value(_at(obx, 11))
        value, comparator, text = self.content(_at(obx, 2), _at(obx, 5))
        is_empty = value is None and not text
        if not code.value or status in _NO_RESULT or (is_empty and status not in SUPERSEDING):
            return None
        if status not in _STATUSES:
            raise RecordError("OBX-11 is not an observation result status." if status else "OBX-11 has no status.")
        # OBR-22, when the result was reported, is later than when it was drawn: late, but never too early.
        times = [("OBX-14", _at(obx, 14)), ("OBR-7", _at(obr, 7)), ("OBR-22", _at(obr, 22))]
        times = [(name, first) for name, first in ((name, self.first(time)) for name, time in times) if first]
        if not times:
            raise RecordError("Neither OBX-14 nor OBR-7 nor OBR-22 has a time.")
        # A value counts from when it was drawn, a narrative from when it was written: the report on a study must not
        # be an input to that study, though its OBX-14 is the time of the images.
        found = [self.moment(time, name) for name, time in (times if _at(obx, 2) in _NARRATIVE else times[:1])]
        order = token(self.unescaped(_at(obr, 3) or _at(obr, 2)))
        return Observation(
            code=code,
            at=max(found),
            value=value,
            comparator=comparator,
            unit=self.unit(_at(obx, 6)) if value is not None else "",
            text=text,
            status=_STATUSES[status],
            key="/".join((self.sender, order, code.scheme, code.value, self.value(_at(obx, 4)), "" if order else found[0].isoformat())),
            source=self.sender,
        )

    def content(self, value_type: str, text: str) -> tuple[float | None, Comparator, str]:
        """Return value, comparator and text of OBX-5; (None, '', '') where it is empty or of a type that is not read."""
        if value_type == "NM":
            value = number(self.value(text))
            # Not a number after all ("haemolyzed"): kept as a text, so that it still replaces an earlier value.
            return value, "", "" if value is not None else self.lines(text)
        if value_type == "SN":
            comparator, *rest = (self.value(part) for part in self.split(text, 1))
            value = number(_at(rest, 0))
            if value is not None and comparator in COMPARATORS and not any(rest[1:]):
                return value, COMPARATORS[comparator], ""
            return None, "", "".join((comparator, *rest))  # a range, a titer, a "2+"
        if value_type in _STRINGS:
            return None, "", self.lines(text)
        if value_type in _CODED:
            codes = ([self.value(part) for part in self.split(one, 1)] for one in self.split(text, 2))
            words = (_at(parts, 1) or _at(parts, 8) or parts[0] for parts in codes)
            return None, "", "\n".join(word for word in words if word)
        return None, "", ""

    def lines(self, text: str) -> str:
        """Return the repetitions of a string as lines."""
        pieces = ("" if piece == '""' else clean(self.unescaped(piece)) for piece in self.split(text, 2))
        return "\n".join(piece.rstrip() for piece in pieces).strip("\n")

    def codings(self, text: str) -> list[tuple[str, str, str]]:
        """Return identifier, text and system of a CE or CWE and of its alternate."""
        parts = [self.value(part) for part in self.split(self.split(text, 2)[0], 1)[:6]]
        return [(_at(parts, start), _at(parts, start + 1), _at(parts, start + 2)) for start in (0, 3)]

    def code(self, text: str) -> Code:
        """Choose of OBX-3 the LOINC code, else the SNOMED CT code, else the first."""
        return preferred(Code(value, self.schemes.get(system, system or "L"), words) for value, words, system in self.codings(text))

    def unit(self, text: str) -> str:
        """Choose of OBX-6 the UCUM unit, else the first."""
        units = self.codings(text)
        return next((value for value, _, system in units if system == "UCUM" and value), units[0][0] or units[0][1])


def _offset(text: str) -> timezone:
    """Return the zone of '+HHMM'. Whole days and more raise ValueError."""
    minutes = int(text[1:3]) * 60 + int(text[3:5])
    return timezone(timedelta(minutes=-minutes if text[0] == "-" else minutes))


def _at(parts: list[str], index: int) -> str:
    """Return the part at `index`; '' where the sender left it out."""
    return parts[index] if index < len(parts) else ""
