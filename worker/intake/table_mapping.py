"""The mapping file of a table: which column says what. TOML, strictly read; deploy/tables.example.toml has every key.

Not here: how a row becomes facts (tables.py), how a file is cut into rows (delimited.py).
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from worker.errors import RecordError

#: How a time is written: ISO 8601, a count (of [changed] only), or directives of strptime.
ISO: Final = "iso"
NUMBER: Final = "number"
#: What a time may be made of; the others of strptime (weekdays, locales, zone names) leave the instant open.
_DIRECTIVES: Final = frozenset("YymdbBHIMSfpz%")
#: HL7 table 0085, as far as domain.Observation knows it.
_STATUSES: Final = frozenset("FCPDWX")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PatientColumns:
    """Who the row is about. Several name columns are the components of a DICOM PN: family, given, middle.

    ``admission``: the row says who somebody is, as an ADT message does, with the time of [changed]; else it names the patient in passing.
    """

    id_column: str
    issuer: str = ""
    issuer_column: str = ""
    name_columns: tuple[str, ...] = ()
    birth_date_column: str = ""
    birth_date_formats: tuple[str, ...] = (ISO,)
    sex_column: str = ""
    sex_words: Mapping[str, str] = field(default_factory=dict)
    admission: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeColumn:
    """When the value was drawn or the text written; the first format that fits counts. Without a zone it is the site's."""

    column: str
    formats: tuple[str, ...] = (ISO,)
    zone: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusColumn:
    """What a row's status is, by the site's words for F, C, P, D, W and X of HL7 table 0085; without a column it is F."""

    column: str = ""
    words: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangedColumn:
    """When a row was last changed: a time, or a count. Of a view it is the watermark, which begins at `start`.

    ``overlap`` is read again at each sweep, in seconds or counts: a row may become visible after a later one.
    """

    column: str
    formats: tuple[str, ...] = (ISO,)
    start: datetime | int | str | None = None
    overlap: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueColumns:
    """One fact of each row: a number in `column`, else a text in `text_column`, under a constant code or that of a column."""

    column: str = ""
    text_column: str = ""
    code: tuple[str, ...] = ()
    code_column: str = ""
    scheme: str = ""
    scheme_column: str = ""
    meaning_column: str = ""
    unit: str = ""
    unit_column: str = ""

    @property
    def label(self) -> str:
        """What the mapping calls it; of the columns, never of a row."""
        code = f"{self.code[0]} {self.code[1]}" if self.code else f"code of {self.code_column}"
        return f"{self.column or self.text_column} ({code})"


@dataclass(frozen=True, slots=True, kw_only=True)
class TableMapping:
    """How one table is read. ``key_columns`` name a row for ever: a row read twice is one fact, a changed row supersedes."""

    name: str
    key_columns: tuple[str, ...]
    patient: PatientColumns
    time: TimeColumn
    values: tuple[ValueColumns, ...] = ()
    status: StatusColumn = field(default_factory=StatusColumn)
    changed: ChangedColumn | None = None
    delimiter: str = ","
    quote: str = '"'
    encoding: str = "utf-8"
    decimal: str = "."
    missing: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column it reads."""
        one = [*self.key_columns, self.patient.id_column, self.patient.issuer_column, *self.patient.name_columns]
        one += [self.patient.birth_date_column, self.patient.sex_column, self.time.column, self.status.column]
        one += [self.changed.column] if self.changed else []
        for value in self.values:
            one += [value.column, value.text_column, value.code_column, value.scheme_column, value.meaning_column, value.unit_column]
        return tuple(dict.fromkeys(name for name in one if name))


def read_mapping(path: Path) -> TableMapping:
    """Read a mapping file.

    Raises
    ------
    RecordError
        Naming the section and the key, and what would be right.
    """
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except OSError as exc:
        raise RecordError(f"The mapping file {path} cannot be read: {exc.strerror}.") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise RecordError(f"The mapping file {path} is not TOML: {exc}.") from exc
    mapping: TableMapping = _build(TableMapping, table, where="")
    _check(mapping)
    return mapping


def _build(cls: type[Any], table: Mapping[str, Any], *, where: str) -> Any:
    hints = typing.get_type_hints(cls)
    for key in table:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(hints)}."
            raise RecordError(f"The mapping has the unknown key {key!r} in [{where or 'top level'}].{hint}")
    for one in dataclasses.fields(cls):
        if one.name not in table and one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            raise RecordError(f"The mapping's [{where or 'top level'}] needs the key {one.name!r}.")
    return cls(**{key: _convert(hints[key], value, where=f"{where}.{key}".strip(".")) for key, value in table.items()})


def _convert(hint: Any, value: Any, *, where: str) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        section = next((one for one in inner if dataclasses.is_dataclass(one)), None)
        return _convert(section, value, where=where) if section else _point(inner, value, where=where)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast("type[Any]", hint), _of(value, Mapping, f"a section: [{where}]", where=where), where=where)
    if origin is tuple:
        return tuple(_convert(inner[0], one, where=where) for one in _of(value, list, "a list, in square brackets", where=where))
    if origin is not None:
        words = _of(value, Mapping, "a table: { word = value }", where=where)
        return {key: _convert(inner[1], one, where=f"{where}.{key}") for key, one in words.items()}
    if hint is float:
        return float(_of(value, (int, float), "a number", where=where))
    if hint is bool and isinstance(value, bool):
        return value
    return _of(value, hint, "true or false" if hint is bool else "text in quotes", where=where)


def _point(inner: tuple[Any, ...], value: Any, *, where: str) -> Any:
    """Where a watermark begins: of the type that its column has."""
    kinds = tuple(one for one in inner if one is not types.NoneType)
    return _of(value, kinds, "a TOML date and time, a whole number or text in quotes", where=where)


def _of(value: Any, kind: Any, words: str, *, where: str) -> Any:
    if isinstance(value, kind) and not isinstance(value, bool):
        return value
    raise RecordError(f"The mapping's {where} must be {words}.")


def _check(mapping: TableMapping) -> None:
    if not _NAME.fullmatch(mapping.name):
        raise RecordError("The mapping's name must be 1 to 64 letters, digits, '-', '_' or '.': facts carry it for ever.")
    if not any(mapping.key_columns):
        raise RecordError("The mapping's key_columns must name at least one column; without it a row read twice would be two facts.")
    if bool(mapping.patient.issuer) == bool(mapping.patient.issuer_column):
        raise RecordError("The mapping's [patient] needs issuer or issuer_column, one of them: a patient ID alone names nobody.")
    _check_words(mapping)
    _check_admission(mapping)
    for value in mapping.values:
        _check_value(value)
    labels = [value.column or value.text_column for value in mapping.values]
    if len(set(labels)) != len(labels):
        raise RecordError("Two of the mapping's [[values]] read the same column.")
    _check_formats(mapping)
    _check_writing(mapping)


def _check_admission(mapping: TableMapping) -> None:
    who, changed = mapping.patient, mapping.changed
    if not who.admission:
        if not mapping.values:
            raise RecordError("The mapping needs [[values]], at least once, unless its [patient] has admission = true.")
        return
    if not (who.name_columns or who.birth_date_column or who.sex_column):
        raise RecordError("The mapping's [patient] admission needs name_columns, birth_date_column or sex_column: it says who somebody is.")
    if changed is None or changed.formats == (NUMBER,):
        raise RecordError("The mapping's [patient] admission needs [changed] with a time: the last said of who somebody is counts.")


def _check_words(mapping: TableMapping) -> None:
    if strange := set(mapping.patient.sex_words.values()) - {"M", "F", "O", ""}:
        raise RecordError(f"The mapping's [patient] sex_words give {min(strange)!r}, which is none of M, F, O and ''.")
    if strange := set(mapping.status.words.values()) - _STATUSES:
        raise RecordError(f"The mapping's [status] words give {min(strange)!r}, which is none of F, C, P, D, W, X.")


def _check_value(value: ValueColumns) -> None:
    where = "[[values]]" + (f" of column {value.column or value.text_column!r}" if value.column or value.text_column else "")
    if not (value.column or value.text_column):
        raise RecordError(f"The mapping's {where} needs column (a number) or text_column, or both.")
    if bool(value.code) == bool(value.code_column):
        raise RecordError(f"The mapping's {where} needs code = [code, scheme, meaning] or code_column, one of them.")
    if value.code and (len(value.code) != 3 or not all(value.code[:2]) or value.scheme or value.scheme_column or value.meaning_column):
        raise RecordError(f"The mapping's {where}: code is [code, scheme, meaning], and no column says more of it.")
    if value.code_column and bool(value.scheme) == bool(value.scheme_column):
        raise RecordError(f"The mapping's {where}: beside code_column it needs scheme or scheme_column, one of them.")
    if value.unit and value.unit_column:
        raise RecordError(f"The mapping's {where} has unit and unit_column; one of them is meant.")


def _check_formats(mapping: TableMapping) -> None:
    several = [("[time]", mapping.time.formats), ("[patient] birth_date_formats", mapping.patient.birth_date_formats)]
    if mapping.changed and mapping.changed.formats != (NUMBER,):
        several.append(("[changed]", mapping.changed.formats))
    for where, formats in several:
        if not formats:
            raise RecordError(f"The mapping's {where} has no format.")
        for one in formats:
            found = re.findall("%(.?)", one)
            if one != ISO and (not set(found) <= _DIRECTIVES or not {"Y", "y"} & set(found)):
                raise RecordError(f"The mapping's {where}: {one!r} is neither 'iso' nor a format like '%d.%m.%Y %H:%M'.")
    zone_of(mapping)


def zone_of(mapping: TableMapping) -> ZoneInfo | None:
    """The zone of times without an offset, None where the mapping leaves it to the site."""
    try:
        return ZoneInfo(mapping.time.zone) if mapping.time.zone else None
    except (ZoneInfoNotFoundError, ValueError, OSError) as exc:
        raise RecordError(f"The mapping's [time] zone: there is no zone {mapping.time.zone!r}; write one like Europe/Berlin.") from exc


def _check_writing(mapping: TableMapping) -> None:
    for name in ("delimiter", "quote"):
        if len(getattr(mapping, name)) != 1 or getattr(mapping, name) in "\r\n\0":
            raise RecordError(f'The mapping\'s {name} must be one character; a tab is written "\\t".')
    if mapping.delimiter == mapping.quote or mapping.decimal not in {".", ","}:
        raise RecordError("The mapping's decimal is '.' or ',', and delimiter and quote are not the same character.")
    sample = "id,0;\n"
    try:
        is_readable = mapping.encoding.lower().startswith(("utf-16", "utf-32")) or sample.encode(mapping.encoding) == sample.encode()
        b"".decode(mapping.encoding)
    except LookupError:
        is_readable = False
    if not is_readable:
        raise RecordError(f"The mapping's encoding: {mapping.encoding!r} is none that is known; write one like utf-8 or cp1252.")
