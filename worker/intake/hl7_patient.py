"""PID and MRG of an HL7 v2 message: who it is about, and who was somebody else until now."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import date
from typing import Final, NamedTuple

from worker.domain import Merge, Patient, PatientKey
from worker.errors import RecordError
from worker.intake.facts import MAX_ID, MAX_KEY, bounded
from worker.intake.hl7_fields import TIME, Reader, at

_SEXES: Final = {"M": "M", "F": "F", "O": "O", "A": "O"}  # table 0001 → PS3.3 §C.7.1.1
#: Table 0203: of a patient's identifiers the medical record number is ours, else the patient internal identifier.
_KINDS: Final = {"MR": 0, "PI": 1}


class _Identifier(NamedTuple):
    """One CX: the key it makes, what kind of number it is (CX.5), and whether it was no longer in use (CX.8) when the message was sent."""

    key: PatientKey
    kind: str
    is_expired: bool


def patient(reader: Reader, segments: list[list[str]]) -> Patient:
    """Read the one PID.

    Raises
    ------
    RecordError
        There is not exactly one: whose result it is may not be guessed (ORU^R01 may carry several patients).
    """
    pids = [fields for fields in segments if fields[0] == "PID"]
    if len(pids) != 1:
        raise RecordError(f"There are {len(pids)} PID segments; exactly one is understood.")
    pid = pids[0]
    born = TIME.fullmatch(reader.first(at(pid, 7)) or "0000")
    try:
        birth_date = date(int(born[1]), int(born[2]), int(born[3])).strftime("%Y%m%d") if born and born[3] else ""
    except ValueError:
        born = None
    if born is None:
        raise RecordError("PID-7 is not a date.")
    key = _bounded(_chosen(_identifiers(reader, at(pid, 3), "PID-3")), "PID-3")
    return Patient(key, _name(reader, at(pid, 5)), birth_date, _SEXES.get(reader.first(at(pid, 8)), ""))


def merges(reader: Reader, segments: list[list[str]]) -> tuple[Merge, ...]:
    """Read every pair of PID and MRG: PID-3 survives, MRG-1 (MRG-4 of senders that know no lists) is retired.

    Raises
    ------
    RecordError
        A PID has no MRG or an MRG no PID, or one of them no usable identifier, or both the same.
    """
    found: list[Merge] = []
    survivor: list[str] | None = None
    for fields in segments:
        if fields[0] == "PID":
            if survivor is not None:
                raise RecordError("MRG-1 is missing: a PID segment has no MRG segment of its own.")
            survivor = fields
        if fields[0] == "MRG":
            if survivor is None:
                raise RecordError("An MRG segment has no PID segment of its own: who survives is not said.")
            found += _pairs(reader, survivor, fields)
            survivor = None
    if survivor is not None or not found:
        raise RecordError("MRG-1 is missing: a PID segment has no MRG segment of its own.")
    return tuple(dict.fromkeys(found))


def _pairs(reader: Reader, pid: list[str], mrg: list[str]) -> list[Merge]:
    """Pair the identifiers of one issuer with each other, else the chosen of both."""
    name, field = ("MRG-1", at(mrg, 1)) if _has_identifier(reader, at(mrg, 1)) else ("MRG-4", at(mrg, 4))
    if not _has_identifier(reader, field):
        raise RecordError("MRG-1 has no patient ID, and MRG-4 has none either.")
    survivors, retired = _identifiers(reader, at(pid, 3), "PID-3"), _identifiers(reader, field, name)
    pairs = [
        pair
        for issuer in dict.fromkeys(one.key.issuer for one in retired)
        for pair in _paired(_of(survivors, issuer), _of(retired, issuer))
    ]
    pairs = pairs or _paired(survivors, [_best(retired)])
    if not pairs:
        raise RecordError(f"{name} has no identifier of the kind that PID-3 has.")
    pairs = [pair for pair in pairs if pair.survivor != pair.retired]
    for pair in pairs:
        _bounded(pair.survivor, "PID-3")
        _bounded(pair.retired, name)
    if not pairs:
        raise RecordError(f"{name} is the identifier of PID-3: a patient cannot be merged with itself.")
    return pairs


def _of(identifiers: list[_Identifier], issuer: str) -> list[_Identifier]:
    return [one for one in identifiers if one.key.issuer == issuer]


def _paired(survivors: list[_Identifier], retired: list[_Identifier]) -> list[Merge]:
    """Pair numbers of the kind that we go by; a retired account number may be somebody else's record number of the same issuer."""
    if not survivors:
        return []
    to, kind = _best(survivors), _best(retired).kind
    return [Merge(to.key, one.key) for one in retired if one.kind == kind and _is_alike(to, one)]


def _is_alike(one: _Identifier, other: _Identifier) -> bool:
    return one.kind == other.kind or "" in (one.kind, other.kind) or {one.kind, other.kind} <= _KINDS.keys()


def _has_identifier(reader: Reader, text: str) -> bool:
    return any(reader.value(reader.split(one, 1)[0]) for one in reader.split(text, 2))


def _identifiers(reader: Reader, text: str, name: str) -> list[_Identifier]:
    """Return the identifiers of a list of CX that name their issuer, as they come."""
    numbers = [parts for parts in (reader.split(one, 1) for one in reader.split(text, 2)) if reader.value(parts[0])]
    if not numbers:
        raise RecordError(f"{name}.1 has no patient ID.")
    found = [
        _Identifier(
            PatientKey(_issuer(reader, at(parts, 3)), reader.value(parts[0])), reader.value(at(parts, 4)), _is_expired(reader, parts)
        )
        for parts in numbers
    ]
    # One without an issuer may be passed over only where it is not the one that we would take.
    if not _best(found).key.issuer:
        raise RecordError(f"{name}.4 has no assigning authority.")
    return [one for one in found if one.key.issuer]


def _is_expired(reader: Reader, parts: list[str]) -> bool:
    until = TIME.fullmatch(reader.value(at(parts, 7)))
    # As digits: 99991231 is no time in every zone, and one that cannot be read is no reason to refuse a message.
    day = "".join(filter(None, until.groups()[:3])) if until else ""
    return day < reader.sent_at.astimezone(reader.zone).strftime("%Y%m%d")[: len(day)]


def _bounded(key: PatientKey, name: str) -> PatientKey:
    bounded(key.patient_id, MAX_ID, f"{name}.1")
    bounded(key.issuer, MAX_KEY, f"{name}.4")
    return key


def _issuer(reader: Reader, text: str) -> str:
    names = [name for name in reader.authority(text, 4) if name] or [""]
    return next((reader.issuers[name] for name in names if name in reader.issuers), names[0])


def _best(identifiers: Iterable[_Identifier]) -> _Identifier:
    return min(identifiers, key=lambda one: (one.is_expired, _KINDS.get(one.kind, 2)))


def _chosen(identifiers: list[_Identifier]) -> PatientKey:
    """Choose of PID-3, of those in use, the medical record number (MR), else the patient internal identifier (PI), else the first."""
    return _best(identifiers).key


def _name(reader: Reader, text: str) -> str:
    """Return PID-5 as DICOM writes names: family^given^middle^prefix^suffix (PS3.5 §6.2, PN)."""
    names = [reader.split(one, 1) for one in reader.split(text, 2)]
    chosen = min(names, key=lambda parts: reader.value(at(parts, 6)) != "L")
    # XPN has the suffix before the prefix, and the family name's own parts as subcomponents.
    parts = [reader.value(reader.split(at(chosen, i), 4)[0]) for i in (0, 1, 2, 4, 3)]
    return "^".join(re.sub(r"[\^=\\]", " ", part) for part in parts).rstrip("^")
