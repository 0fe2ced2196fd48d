"""ORC, TQ1, OBR and IPC of an HL7 v2 message: the imaging orders in it, and why each was ordered.

::

    ORC ─┬ TQ1 ×n ── how urgent
         └ OBR ───── what, how urgent, why ── IPC ── accession number (OMI)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from worker.domain import ROUTINE, STAT, Code, Observation, Order
from worker.intake.facts import MAX_CONTROL_ID, bounded, token
from worker.intake.hl7_fields import Reader, at

#: LOINC, as the documents of radiology name them.
REASON: Final = Code("18785-6", "LN", "Radiology Reason for study (narrative)")
CLINICAL: Final = Code("55752-0", "LN", "Clinical information")

# HL7 v2.5.1 table 0119: the order stands; it does not (any longer). The rest asks, answers or holds, and changes nothing.
_STANDING: Final = frozenset({"NW", "SN", "XO", "XX", "XR", "RO", "PA", "CH", "SC", "RE", "NA", "OK"})
_CANCELLED: Final = frozenset({"CA", "OC", "CR", "DC", "OD", "DR", "RP", "RU", "RQ"})

# HL7 v2.5.1 table 0074, and the modalities (PS3.16 CID 29) that many senders put in OBR-24; not PT, RT, SR and ES, which mean other things.
_IMAGING: Final = frozenset({"CT", "CTH", "CUS", "NMR", "NMS", "OUS", "RAD", "RUS", "RX", "VUS", "XRC"}) | frozenset(
    {"CR", "DX", "MG", "MR", "NM", "RF", "US", "XA"}
)
# HL7 v2.5.1 table 0485 and DICOM's (0040,1003). ASAP goes with STAT: there is no class between it and routine, and behind a day of
# routine work nothing is as soon as possible.
_URGENT: Final = frozenset({"S", "STAT", "A", "ASAP", "HIGH"})


@dataclass(slots=True)
class _Group:
    """The segments of one order; [] where it has none."""

    orc: list[str]
    obr: list[str] = field(default_factory=list)
    ipc: list[str] = field(default_factory=list)
    timings: list[list[str]] = field(default_factory=list)

    def number(self, field: int) -> str:
        """The placer's (2) or the filler's (3) number, which ORC and OBR have at the same place."""
        return at(self.orc, field) or at(self.obr, field)


def orders(reader: Reader, segments: list[list[str]]) -> tuple[tuple[Order, ...], tuple[Observation, ...]]:
    """Read the imaging orders, and their reasons as observations; other orders are counted."""
    found: list[Order] = []
    reasons: list[Observation] = []
    is_imaging_message = reader.envelope.trigger == "OMI^O23"
    for group in _groups(segments):
        control, state = reader.value(at(group.orc, 1)), reader.value(at(group.orc, 5))
        is_cancelled = control in _CANCELLED or (control in _STANDING and state == "CA")  # table 0038: a status that is told
        if not (control in _STANDING or is_cancelled) or not (is_imaging_message or _is_imaging(reader, group, control)):
            reader.skipped += 1
            continue
        order = Order(
            accession_number=bounded(_accession(reader, group), MAX_CONTROL_ID, "The accession number"),
            placer=bounded(reader.first(group.number(2)), MAX_CONTROL_ID, "ORC-2"),
            filler=bounded(reader.first(group.number(3)), MAX_CONTROL_ID, "ORC-3"),
            priority=_priority(reader, group),
            is_cancelled=is_cancelled,
        )
        found.append(order)
        reasons += _reasons(reader, group, order)
    return tuple(found), tuple(reasons)


def _groups(segments: list[list[str]]) -> list[_Group]:
    """Split at each ORC, and at each OBR that follows another below one ORC: that one goes by its own numbers."""
    groups: list[_Group] = []
    for fields in segments:
        if fields[0] == "ORC":
            groups.append(_Group(fields))
        elif not groups:
            continue
        elif fields[0] == "OBR":
            if groups[-1].obr:
                orc = groups[-1].orc
                groups.append(_Group([*orc[:2], "", "", *orc[4:]]))
            groups[-1].obr = fields
        elif fields[0] == "IPC":
            groups[-1].ipc = groups[-1].ipc or fields
        elif fields[0] == "TQ1":
            groups[-1].timings.append(fields)
    return groups


def _is_imaging(reader: Reader, group: _Group, control: str) -> bool:
    """Whether OBR-24 says so, or, where it is silent, an accession number; a bare cancellation may be of any order that it names."""
    if not group.obr:
        return control in _CANCELLED and bool(reader.first(at(group.orc, 2)) or reader.first(at(group.orc, 3)))
    section = reader.first(at(group.obr, 24)).upper()
    return section in _IMAGING if section else bool(group.ipc or reader.first(at(group.obr, 18)))


def _accession(reader: Reader, group: _Group) -> str:
    """Return IPC-1, else OBR-18 (IHE RAD TF-2 §4.4), else the filler's number, which many sites print as the accession number.

    Not OBR-20: IHE has the scheduled procedure step there. It only ever chooses among the patient's own studies.
    """
    return reader.first(at(group.ipc, 1)) or reader.first(at(group.obr, 18)) or reader.first(group.number(3))


def _priority(reader: Reader, group: _Group) -> int:
    """Return the most urgent of TQ1-9, ORC-7.6, OBR-27.6 and OBR-5: one left at its default must not hide the other."""
    told = [reader.first(one) for timing in group.timings for one in reader.split(at(timing, 9), 2)]
    told += [reader.value(at(reader.split(one, 1), 5)) for text in (at(group.orc, 7), at(group.obr, 27)) for one in reader.split(text, 2)]
    told.append(reader.first(at(group.obr, 5)))
    return STAT if any(one.upper() in _URGENT for one in told) else ROUTINE


def _reasons(reader: Reader, group: _Group, order: Order) -> Iterator[Observation]:
    """Give OBR-31 and OBR-13 as observations; those of a cancelled order, which may have been the wrong patient's, are withdrawn."""
    number = token(reader.unescaped(group.number(2) or group.number(3))) or order.accession_number
    said = (("ORC-9", reader.first(at(group.orc, 9))), ("OBR-7", reader.first(at(group.obr, 7))))
    when = next((reader.moment(text, name) for name, text in said if text), reader.sent_at)
    for code, words in ((REASON, reader.words(at(group.obr, 31))), (CLINICAL, _information(reader, at(group.obr, 13)))):
        key = reader.key(number, code.scheme, code.value) if number else ""
        if order.is_cancelled and key:
            yield Observation(code, when, status="D", key=key, source=reader.sender, kind="text")
        elif words and not order.is_cancelled:
            yield Observation(code, when, text=words, key=key, source=reader.sender, kind="text")


def _information(reader: Reader, text: str) -> str:
    """Read OBR-13: a string, since v2.7 a list of codes."""
    return reader.words(text) if at(reader.split(text, 1), 2) else reader.lines(text)
