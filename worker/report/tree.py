"""A structured report as lines of plain text, for a person at a terminal.

Reads any SR, ours or not, and shows every content item; only long lists of images become a count.
Who the patient is, it does not show: the content tree of our reports does not say it either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from pydicom.dataset import Dataset

from worker.report import codes

_INDENT: Final = "  "
_MOST_IMAGES: Final = 3
_REFERENCES: Final = frozenset({"IMAGE", "COMPOSITE", "WAVEFORM"})
_SYMBOLS: Final = {(code.value, code.scheme): symbol for symbol, code in codes.COMPARATORS.items()}
#: Value type → the attribute that holds a value of one piece (PS3.3 §C.17.3.2).
_PLAIN: Final = {
    "TEXT": "TextValue",
    "UIDREF": "UID",
    "DATE": "Date",
    "TIME": "Time",
    "DATETIME": "DateTime",
    "PNAME": "PersonName",
}


@dataclass(frozen=True, slots=True)
class Said:
    """What a report of ours says beside its findings: its sentences by code, and what of the record it was made from.

    ``values``: name, value with unit, when it was drawn (DICOM DT), from where. ``missing``: what the network lacked.
    """

    sentences: dict[str, str] = field(default_factory=dict)
    values: list[tuple[str, str, str, str]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def said(ds: Dataset) -> Said:
    """Read a report of ours back; of another's SR what has the same codes."""
    found = Said()
    _collect(ds, found)
    return found


def _collect(item: Dataset, found: Said) -> None:
    children = list(item.get("ContentSequence") or ())
    by_code = {_key(child.get("ConceptNameCodeSequence")): child for child in children}
    role = by_code.get((codes.GROUP_ROLE.value, codes.GROUP_ROLE.scheme))
    if role is not None and _key(role.get("ConceptCodeSequence")) == (codes.RECORD_INPUT.value, codes.RECORD_INPUT.scheme):
        session = by_code.get(("C67447", "NCIt"))
        origin = str(session.get("TextValue", "")).partition(", from ")[2] if session is not None else ""
        numbers = [child for child in children if child.get("ValueType") == "NUM"]
        found.values.extend((_meaning(one), _number(one), str(one.get("ObservationDateTime", "")), origin) for one in numbers)
        return
    for child in children:
        name = _key(child.get("ConceptNameCodeSequence"))[0]
        if name == codes.RECORD_MISSING.value:
            found.missing.append(_code(child.get("ConceptCodeSequence")).partition(" [")[0])
        elif child.get("ValueType") == "TEXT" and child.get("ObservationDateTime"):
            found.texts.append(str(child.get("TextValue", "")))
        elif child.get("ValueType") == "TEXT":
            found.sentences.setdefault(name, str(child.get("TextValue", "")))
        _collect(child, found)


def _meaning(item: Dataset) -> str:
    return _code(item.get("ConceptNameCodeSequence")).partition(" [")[0]


def _key(sequence: object) -> tuple[str, str]:
    code = next(iter(sequence or ()), Dataset())  # type: ignore[call-overload]
    return str(code.get("CodeValue", "")), str(code.get("CodingSchemeDesignator", ""))


def lines(ds: Dataset) -> list[str]:
    """Write the report `ds`: what it is, then its content tree, two spaces a level, codes in brackets."""
    status = [ds.get(keyword) for keyword in ("CompletionFlag", "VerificationFlag", "PreliminaryFlag", "ContentQualification")]
    when = " ".join(str(ds.get(keyword, "")) for keyword in ("ContentDate", "ContentTime", "TimezoneOffsetFromUTC"))
    replaced = [
        instance.get("ReferencedSOPInstanceUID", "")
        for study in ds.get("PredecessorDocumentsSequence") or ()
        for series in study.get("ReferencedSeriesSequence") or ()
        for instance in series.get("ReferencedSOPSequence") or ()
    ]
    return [
        f"Series: {ds.get('SeriesDescription', '')}",
        f"Status: {', '.join(str(flag) for flag in status if flag)}",
        f"Analysis: {when.strip()}",
        *(f"Replaces: {uid}" for uid in replaced),
        *(f"Summary: {text}" for text in _summaries(ds)),
        *_item(ds, depth=0),
    ]


def _summaries(item: Dataset) -> Iterator[str]:
    """Find what is said in one sentence: in TID 1500 it comes last, and a person wants it first."""
    for child in item.get("ContentSequence") or ():
        name = next(iter(child.get("ConceptNameCodeSequence") or ()), Dataset())
        if (name.get("CodeValue"), name.get("CodingSchemeDesignator")) == (codes.SUMMARY.value, codes.SUMMARY.scheme):
            yield str(child.get("TextValue", ""))
        yield from _summaries(child)


def _item(item: Dataset, *, depth: int) -> Iterator[str]:
    """Write `item` and, below it, what it contains."""
    yield _INDENT * depth + line(item)
    yield from _children(item, depth=depth + 1)


def line(item: Dataset) -> str:
    """Write `item` without what it contains: "Probability [122157 DCM]: 73.21 %"."""
    value = told(item)
    return _code(item.get("ConceptNameCodeSequence")) + (": " if value else "") + value


def told(item: Dataset, *, has_code: bool = True) -> str:
    """Write the value of `item` alone, and its time where it has its own: "< 3 mg/L (observed 20240102063000+0100)"."""
    observed = item.get("ObservationDateTime")
    value = _value(item) if has_code or item.ValueType != "CODE" else str(item.ConceptCodeSequence[0].CodeMeaning)
    return " ".join(filter(None, (value, f"(observed {observed})" if observed else "")))


def _children(item: Dataset, *, depth: int) -> Iterator[str]:
    children = list(item.get("ContentSequence") or ())
    references = [child for child in children if child.get("ValueType") in _REFERENCES]
    many = len(references) > _MOST_IMAGES
    for child in children:
        if not (many and child.get("ValueType") in _REFERENCES):
            yield from _item(child, depth=depth)
    if many:
        yield f"{_INDENT * depth}{len(references)} instances, named in the evidence"


def _value(item: Dataset) -> str:
    kind = str(item.get("ValueType", ""))
    if kind in _PLAIN:
        return str(item.get(_PLAIN[kind], ""))
    if kind == "CODE":
        return _code(item.get("ConceptCodeSequence"))
    if kind == "NUM":
        return _number(item)
    if kind in _REFERENCES:
        return ", ".join(str(ref.get("ReferencedSOPInstanceUID", "")) for ref in item.get("ReferencedSOPSequence") or ())
    if kind == "SCOORD3D" and item.get("GraphicType") == "POINT":
        return f"{', '.join(f'{mm:.1f}' for mm in item.GraphicData)} mm (left, posterior, superior)"
    if kind.startswith(("SCOORD", "TCOORD")):
        return str(item.get("GraphicType") or item.get("TemporalRangeType") or "")
    return ""


def _number(item: Dataset) -> str:
    """Write "< 3 mg/L"; a qualifier that is no comparator follows in words; "no value" where there is none."""
    qualifier = next(iter(item.get("NumericValueQualifierCodeSequence") or ()), Dataset())
    symbol = _SYMBOLS.get((qualifier.get("CodeValue", ""), qualifier.get("CodingSchemeDesignator", "")), "")
    words = "" if symbol else str(qualifier.get("CodeMeaning", ""))
    measured = next(iter(item.get("MeasuredValueSequence") or ()), None)
    if measured is None:
        return words or "no value"
    unit = next(iter(measured.get("MeasurementUnitsCodeSequence") or ()), Dataset())
    name = str(unit.get("CodeValue", ""))
    shown = (symbol, str(measured.get("NumericValue", "")), "" if name == codes.NO_UNITS.value else name)
    return " ".join(filter(None, (*shown, f"({words})" if words else "")))


def _code(sequence: object) -> str:
    """Write the first code of `sequence`: "Probability [122157 DCM]"."""
    code = next(iter(sequence or ()), None)  # type: ignore[call-overload]
    if code is None:
        return ""
    value = code.get("CodeValue") or code.get("LongCodeValue") or code.get("URNCodeValue") or ""
    return f"{code.get('CodeMeaning', '')} [{value} {code.get('CodingSchemeDesignator', '')}]"
