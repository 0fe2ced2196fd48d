"""How a text, a time, a number and a code become those of an Observation, whichever door they came through.

Shared by hl7.py and fhir.py, so that both say the same of the same fact. Not here: either's syntax.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Final, Literal

from worker.domain import Code
from worker.errors import RecordError

Comparator = Literal["", "<", "<=", ">", ">="]

#: HL7 v2.5.1 §2.A.74 (SN.1) and FHIR's quantity-comparator, as far as domain.Observation knows them.
COMPARATORS: Final[dict[str, Comparator]] = {"": "", "=": "", "<": "<", "<=": "<=", ">": ">", ">=": ">="}
#: What may name somebody or something, in characters. The database's indices take no more, and nothing that is meant to be one has more.
MAX_ID: Final = 64
MAX_CONTROL_ID: Final = 199
MAX_SENDER: Final = 200
MAX_KEY: Final = 512
#: A fact of these statuses says something even when it is empty: it replaces or withdraws an earlier one.
SUPERSEDING: Final = frozenset("CDWX")

_NUMBER: Final = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,2})?")
_BREAKS: Final = re.compile("\r\n?|\x0b|\x0c|\x85|\u2028|\u2029")
# PostgreSQL takes no NUL and UTF-8 no lone surrogate; the other control characters belong to terminals.
_UNPRINTABLE: Final = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
_SURROGATES: Final = re.compile("[\ud800-\udfff]")
_PREFERENCE: Final = {"LN": 0, "SCT": 1}


def clean(text: str) -> str:
    """Return `text` with line breaks as newlines and without control characters and lone surrogates."""
    if text.isprintable():  # nearly always
        return text
    return _SURROGATES.sub("�", _UNPRINTABLE.sub("", _BREAKS.sub("\n", text)))


def token(text: str) -> str:
    """Return `text` on one line, without blanks at its ends, as an identifier or a code is compared.

    Blanks at the ends are padding in DICOM (PS3.5 §6.2, LO); leading zeros, case and wide digits are not ours to touch.
    """
    if not text.isprintable():
        text = clean(text).replace("\n", " ").replace("\t", " ")
    return text.strip(" ")


def number(text: str) -> float | None:
    """Return a plain decimal number; None for anything else, 'nan', '1_000' and wide digits included."""
    return float(text) if len(text) <= 64 and _NUMBER.fullmatch(text) else None


def bounded(text: str, limit: int, name: str) -> str:
    """Return `text`.

    Raises
    ------
    RecordError
        It has more than `limit` characters; the sentence says so of the field `name`.
    """
    if len(text) > limit:
        raise RecordError(f"{name} has {len(text)} characters; the limit is {limit}.")
    return text


def part(text: str) -> str:
    """Return `text` as one part of a fact's key, whose parts "/" divides.

    A withdrawal takes back what begins with its own key and "/": document 77 must not take back document 77/2.
    """
    return text.replace("%", "%25").replace("/", "%2F")


def preferred(codes: Iterable[Code]) -> Code:
    """Return the LOINC code, else the SNOMED CT code, else the first that has a value; without one an empty code."""
    return min((code for code in codes if code.value), key=lambda code: _PREFERENCE.get(code.scheme, 2), default=Code("", "", ""))


def latest_instant(parts: Sequence[str | None], zone: tzinfo) -> datetime:
    """Return the last instant that year, month, day, hour, minute, second, fraction may mean, in UTC.

    A day is its last second: a value known by its day alone may have been drawn after that day's study, and must not
    be used in it. Seconds left out are zero; an hour that the clock shows twice is the second one.

    Raises
    ------
    ValueError, OverflowError
        There is no such day or time.
    """
    year, month, day, hour, minute, second = (int(part) if part else None for part in parts[:6])
    micro = int((parts[6] or "").ljust(6, "0")[:6])
    at = datetime(year or 0, month or 1, day or 1, hour or 0, minute or 0, second or 0, micro, tzinfo=zone, fold=1)
    if month is None:
        at = at.replace(month=12, day=31, hour=23, minute=59, second=59)
    elif day is None:  # four days after the 28th it is the next month, whatever this one's length
        at = (at.replace(day=28) + timedelta(days=4)).replace(day=1) - timedelta(seconds=1)
    elif hour is None:
        at = at.replace(hour=23, minute=59, second=59)
    elif minute is None:
        at = at.replace(minute=59, second=59)
    return at.astimezone(UTC).replace(fold=0)
