r"""The fields of one HL7 v2 message: segments, separators, escapes, character sets, times, codes.

What a data type says whichever segment it stands in; what the segments mean is in the hl7_*.py beside this one.

Why no library reads the fields: python-hl7 0.4.5 takes 7 s and 465 MiB for 1 MiB of separators, writes the text of
fields it cannot unescape to the log and drops them, and reads \Xhh\ as Latin-1 whatever MSH-18 says; hl7apy 1.3.5
parses 40 messages a second. Fields are split only where they are read; a test compares them with python-hl7's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone, tzinfo
from typing import Final

from worker.domain import Code
from worker.errors import RecordError
from worker.intake.envelope import BOM, Envelope
from worker.intake.facts import MAX_KEY, bounded, clean, latest_instant, part, preferred, token

# HL7 v2.5.1 table 0211. UTF-16 and UTF-32 would break the framing.
_CODECS: Final = {
    "ASCII": "ascii",
    "UNICODE UTF-8": "utf-8",
    "GB 18030-2000": "gb18030",
    "KS X 1001": "euc_kr",
    "BIG-5": "big5",
    **{f"8859/{part}": f"iso8859-{part}" for part in (1, 2, 3, 4, 5, 6, 7, 8, 9, 15)},
}
# The same table's Japanese sets, between which a message switches by ISO 2022: one codec knows them all.
_JAPANESE: Final = frozenset({"ISO IR13", "ISO IR14", "ISO IR87", "ISO IR159"})
_ISO_2022: Final = "iso2022_jp_ext"

_SEGMENT: Final = re.compile(r"[A-Z][A-Z0-9]{2}")
_READ: Final = frozenset({"MSH", "EVN", "PID", "MRG", "ORC", "TQ1", "OBR", "IPC", "OBX", "TXA"})
#: Escape sequence (§2.7.1) → which of the separators it stands for.
_ESCAPED: Final = {"F": 0, "S": 1, "R": 2, "E": 3, "T": 4}
#: What is left of a unit behind "10^": an exponent and what it is divided by.
_POWER: Final = re.compile(r"[0-9]{1,2}/[A-Za-z][A-Za-z0-9]*")
TIME: Final = re.compile(
    r"([0-9]{4})(?:([0-9]{2})(?:([0-9]{2})(?:([0-9]{2})(?:([0-9]{2})(?:([0-9]{2})(?:\.([0-9]{1,6})[0-9]*)?)?)?)?)?)?([+-][0-9]{4})?"
)


def decoded(raw: bytes, envelope: Envelope, encoding: str) -> tuple[str, str]:
    """Return the text of a message and the codec that it was decoded with: that of MSH-18, else `encoding`.

    Raises
    ------
    RecordError
        The character set is not one of those above, or the bytes are not in it.
    """
    codec = _codec(envelope, encoding)
    try:
        text = raw.removeprefix(BOM).decode(codec)
    except UnicodeDecodeError as exc:
        raise RecordError(f"Byte {exc.start} is not {codec}, which MSH-18 or, where it is empty, the configuration names.") from None
    if "\x1b" in text:  # one that the codec did not take for a switch
        raise RecordError("The message switches character sets by ISO 2022, which is supported only among the Japanese sets of MSH-18.")
    return text, codec


def _codec(envelope: Envelope, encoding: str) -> str:
    declared, *others = (one.strip() for one in envelope.raw(18).split(envelope.separators[2]))
    if declared in _JAPANESE or (declared in ("", "ASCII", "ISO IR6") and _JAPANESE & {*others}):
        if _JAPANESE.issuperset({declared, *others} - {"", "ASCII", "ISO IR6"}):
            return _ISO_2022
        raise RecordError("MSH-18 names character sets that are not supported together.")
    if declared and declared not in _CODECS:
        raise RecordError("MSH-18 names a character set that is not supported.")
    return _CODECS.get(declared, encoding)


def segments(text: str, separator: str) -> Iterator[list[str]]:
    """Split into segments, and those that are read into fields: field n is at index n, but for MSH, where it is at n - 1."""
    for position, padded in enumerate(re.split("\r\n?" if "\r" in text else "\n", text), start=1):
        if not (line := padded.strip("\n ")):
            continue
        if not _SEGMENT.match(line) or line[3:4] not in ("", separator):
            raise RecordError(f"Line {position} is not a segment.")
        if line[:3] in _READ:
            yield line.split(separator)


def at(parts: list[str], index: int) -> str:
    """Return the part at `index`; '' where the sender left it out."""
    return parts[index] if index < len(parts) else ""


def offset_of(text: str) -> timezone:
    """Return the zone of '+HHMM'. Whole days and more raise ValueError."""
    minutes = int(text[1:3]) * 60 + int(text[3:5])
    return timezone(timedelta(minutes=-minutes if text[0] == "-" else minutes))


@dataclass(slots=True)
class Reader:
    """One message being read: how its fields are written, and what all its segments need to know.

    ``sender`` is MSH-3 and MSH-4, ``sent_at`` MSH-7, ``said_at`` EVN-2 or MSH-7. ``skipped`` counts what was not read.
    """

    envelope: Envelope
    codec: str
    zone: tzinfo
    issuers: Mapping[str, str]
    schemes: Mapping[str, str]
    sent_at: datetime = field(init=False)
    said_at: datetime = field(init=False)
    escape: re.Pattern[str] = field(init=False)
    sender: str = field(init=False, default="")
    skipped: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        mark = re.escape(self.envelope.separators[3])
        self.escape = re.compile(f"{mark}([^{mark}\r\n]*){mark}")

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
        match = TIME.fullmatch(text)
        if match is None:
            raise RecordError(f"{name} is not a time." if text else f"{name} has no time.")
        try:
            return latest_instant(match.groups()[:7], offset_of(match[8]) if match[8] else self.zone)
        except (ValueError, OverflowError):
            raise RecordError(f"{name} is not a time.") from None

    def key(self, *parts: str) -> str:
        """Return the key of a fact of this sender."""
        key = "/".join(part(one) for one in (self.sender, *parts))
        return bounded(key, MAX_KEY, "The sender's name with the numbers and codes of a fact")

    def authority(self, text: str, level: int) -> tuple[str, str]:
        """Return the name and the universal ID of an HD, whose parts are split at `level`; the name may be that ID."""
        parts = [self.value(part) for part in self.split(text, level)]
        return parts[0] or at(parts, 1), at(parts, 1)

    def lines(self, text: str) -> str:
        """Return the repetitions of a string as lines."""
        pieces = ("" if piece == '""' else clean(self.unescaped(piece)) for piece in self.split(text, 2))
        return "\n".join(piece.rstrip() for piece in pieces).strip("\n")

    def words(self, text: str) -> str:
        """Return of each repetition of a CE or CWE its text, else its original text, else its identifier, as lines."""
        codes = ([self.value(part) for part in self.split(one, 1)] for one in self.split(text, 2))
        words = (at(parts, 1) or at(parts, 8) or parts[0] for parts in codes)
        return "\n".join(word for word in words if word)

    def codings(self, text: str) -> list[tuple[str, str, str]]:
        """Return identifier, text and system of a CE or CWE and of its alternate."""
        parts = [self.value(part) for part in self.split(self.split(text, 2)[0], 1)[:6]]
        return [(at(parts, start), at(parts, start + 1), at(parts, start + 2)) for start in (0, 3)]

    def code(self, text: str, system_left_out: str = "L") -> Code:
        """Choose of a CE or CWE the LOINC code, else the SNOMED CT code, else the first."""
        codings = self.codings(text)
        return preferred(Code(value, self.schemes.get(system, system or system_left_out), words) for value, words, system in codings)

    def unit(self, text: str) -> str:
        """Choose of OBX-6 the UCUM unit, else the first; "10^9/L", whose power should have been escaped, is put together again."""
        units = self.codings(text)
        base, rest, system = units[0]
        first = f"10*{rest}" if base == "10" and not system and _POWER.fullmatch(rest) else base or rest
        return next((value for value, _, system in units if system == "UCUM" and value), first)
