"""One row of a table → what it says of its patient: cells to keys, times, numbers and codes, as a mapping tells.

Cells are text in a file, and what the driver makes of them in a view. Not here: where rows come from, batches (tables.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, tzinfo
from decimal import Decimal
from typing import Final
from uuid import UUID

from worker.domain import Code, Observation, Patient, PatientKey, RecordUpdate
from worker.errors import RecordError
from worker.intake.facts import COMPARATORS, SUPERSEDING, Comparator, clean, latest_instant, number, token
from worker.intake.table_mapping import ISO, NUMBER, TableMapping, ValueColumns, zone_of

#: What a row's cells hold.
Row = Sequence[object]

# PS3.5 §6.2, LO: a longer patient ID fits no image.
_MAX_ID: Final = 64
_MAX_KEY: Final = 400
#: As large as a number of text may be: two digits of exponent (facts.number).
_MAX_NUMBER: Final = 1e100

_ISO: Final = re.compile(
    r"([0-9]{4})-([0-9]{2})(?:-([0-9]{2})(?:[T ]([0-9]{2}):([0-9]{2})(?::([0-9]{2})(?:[.,]([0-9]{1,9}))?)?"
    r" ?(Z|[+-][0-9]{2}(?::?[0-9]{2})?)?)?)?"
)
_VALUE: Final = re.compile(r"(<=|>=|=|<|>|≤|≥)? *(.*)")
_WIDE: Final = {"≤": "<=", "≥": ">="}
_SEXES: Final = {"": "", "M": "M", "F": "F", "O": "O", "m": "M", "f": "F", "o": "O", "male": "M", "female": "F", "other": "O"}
# "/" divides the parts of a key, and a withdrawn fact withdraws those whose keys go on after it.
_ESCAPES: Final = str.maketrans({"%": "%25", "/": "%2F", "|": "%7C"})


@dataclass(frozen=True, slots=True)
class Words:
    """What is the site's, not the table's: the zone of times without one, and its names for issuers and coding schemes."""

    zone: tzinfo = UTC
    issuers: Mapping[str, str] = field(default_factory=dict)
    schemes: Mapping[str, str] = field(default_factory=dict)


class RowReader:
    """Reads the rows of one table with these columns.

    Raises
    ------
    RecordError
        Two columns have one name, or one that the mapping reads is not there. File headers are not repeated: a file without a
        header begins with a patient.
    """

    def __init__(self, mapping: TableMapping, columns: Sequence[str], words: Words) -> None:
        names = [token(name) for name in columns]
        if any("\0" in name for name in columns):
            raise RecordError(f"The header holds NUL bytes: the file is not {mapping.encoding}, or not text.")
        first: dict[str, int] = {}
        for position, name in enumerate(names, start=1):
            if name and first.setdefault(name, position) != position:
                raise RecordError(f"Columns {first[name]} and {position} have the same name; which one is meant cannot be known.")
        for name in mapping.columns:
            if name not in first:
                raise RecordError(f"There is no column {name!r}, which the mapping reads; the header has {len(names)} columns.")
        self.mapping, self._words = mapping, words
        self._zone = zone_of(mapping) or words.zone
        self._at = {name: first[name] - 1 for name in mapping.columns}
        self._width = len(names)
        self._missing = frozenset(mapping.missing)
        self._sexes = {**_SEXES, **mapping.patient.sex_words}
        self._labels = {(one.column or one.text_column).translate(_ESCAPES): one.label for one in mapping.values}

    def position(self, column: str) -> int:
        """Where a column is, from 0."""
        return self._at[column]

    def label(self, fact: Observation) -> str:
        """Which of the mapping's [[values]] a fact is of; says nothing of the row."""
        return self._labels[fact.key.rsplit("/", 1)[1]]

    def update(self, row: Row) -> RecordUpdate:
        """What one row says.

        Raises
        ------
        RecordError
            Naming the column, never what is in it.
        """
        if len(row) != self._width:
            raise RecordError(f"The row has {len(row)} fields, the header has {self._width}.")
        patient = self._patient(row)
        key = self._key(row)
        facts = list(self._facts(row, key))
        is_admission = self.mapping.patient.admission and bool(patient.name or patient.birth_date or patient.sex)
        return RecordUpdate(patient, tuple(facts), self.mapping.name, has_demographics=is_admission, at=self._changed(row))

    # --- cells

    def _text(self, row: Row, column: str) -> str:
        """A cell as a token; '' for an empty one, for a word that means so, and for no column."""
        if not column:
            return ""
        text = token(_as_text(row[self._at[column]], column))
        return "" if text in self._missing else text

    def _required(self, row: Row, column: str) -> str:
        text = self._text(row, column)
        if not text:
            raise RecordError(f"Column {column!r} is empty.")
        return text

    def _identifier(self, row: Row, column: str) -> str:
        if isinstance(row[self._at[column]], float):
            raise RecordError(f"Column {column!r} is a floating-point number; an identifier must be text or a whole number.")
        return self._text(row, column)

    def _instant(self, row: Row, column: str, formats: Sequence[str]) -> datetime:
        """The last instant that a cell may mean, UTC."""
        cell = row[self._at[column]]
        try:
            if isinstance(cell, datetime):
                return (cell if cell.tzinfo else cell.replace(tzinfo=self._zone, fold=1)).astimezone(UTC)
            if isinstance(cell, date):
                return latest_instant([*cell.isoformat().split("-"), None, None, None, None], self._zone)
            parts, offset = _parts(self._required(row, column), formats)
            return latest_instant(parts, offset or self._zone)
        except (ValueError, OverflowError):
            raise RecordError(f"Column {column!r} is no time of the mapping's formats.") from None

    # --- what they mean

    def _patient(self, row: Row) -> Patient:
        names = self.mapping.patient
        issuer = names.issuer or self._required(row, names.issuer_column)
        patient_id = self._identifier(row, names.id_column)
        if not patient_id:
            raise RecordError(f"Column {names.id_column!r} is empty; a row without a patient ID is nobody's.")
        if len(patient_id) > _MAX_ID or len(issuer) > _MAX_KEY:
            raise RecordError(f"Column {names.id_column!r} or the issuer's has more than {_MAX_ID} or {_MAX_KEY} characters.")
        parts = [self._text(row, column) for column in names.name_columns]
        if len(parts) > 1:  # PS3.5 §6.2.1: these characters divide a PN
            parts = [re.sub(r"[\^=\\]", " ", part) for part in parts]
        sex = self._text(row, names.sex_column)
        if sex not in self._sexes:
            raise RecordError(f"Column {names.sex_column!r} has a word that sex_words do not name.")
        key = PatientKey(self._words.issuers.get(issuer, issuer), patient_id)
        return Patient(key, "^".join(parts).rstrip("^"), self._birth_date(row), self._sexes[sex])

    def _birth_date(self, row: Row) -> str:
        column = self.mapping.patient.birth_date_column
        cell = row[self._at[column]] if column else None
        if isinstance(cell, date):  # a datetime is one
            return f"{cell.year:04}{cell.month:02}{cell.day:02}"
        if not (text := self._text(row, column)):
            return ""
        try:
            year, month, day, *_ = (int(part or 0) for part in _parts(text, self.mapping.patient.birth_date_formats)[0])
            return date(year, month, day).strftime("%Y%m%d").zfill(8)
        except ValueError:
            raise RecordError(f"Column {column!r} is no date of the mapping's birth_date_formats.") from None

    def _key(self, row: Row) -> str:
        parts = [self._identifier(row, column) for column in self.mapping.key_columns]
        if not any(parts):
            raise RecordError("The key columns are empty; a row without a key could not be told from another.")
        key = "|".join(part.translate(_ESCAPES) for part in parts)
        if len(key) > _MAX_KEY:
            raise RecordError(f"The key columns have more than {_MAX_KEY} characters.")
        return f"{self.mapping.name}/{key}"

    def _changed(self, row: Row) -> datetime | None:
        changed = self.mapping.changed
        if changed is None or changed.formats == (NUMBER,) or isinstance(row[self._at[changed.column]], (int, float, Decimal)):
            if self.mapping.patient.admission:
                raise RecordError("The column of the mapping's [changed] is a number; a row that says who somebody is needs a time.")
            return None
        return self._instant(row, changed.column, changed.formats)

    def _status(self, row: Row) -> str:
        column, words = self.mapping.status.column, self.mapping.status.words
        if not column:
            return "F"
        word = self._text(row, column)
        status = words.get(word, word if word in ("F", "C", "P", "D", "W", "X") else "")
        if not status:
            raise RecordError(f"Column {column!r} has a word that the mapping's [status] words do not name.")
        return status

    def _facts(self, row: Row, key: str) -> Iterator[Observation]:
        status = self._status(row)
        for columns in self.mapping.values:
            value, comparator = self._number(row, columns.column)
            text = "" if value is not None or not columns.text_column else self._words_of(row, columns.text_column)
            if value is None and not text and status not in SUPERSEDING:
                continue
            yield Observation(
                code=self._code(row, columns),
                at=self._instant(row, self.mapping.time.column, self.mapping.time.formats),
                value=value,
                comparator=comparator,
                unit=(columns.unit or self._text(row, columns.unit_column)) if value is not None else "",
                text=text,
                status=status,
                key=f"{key}/{(columns.column or columns.text_column).translate(_ESCAPES)}",
                source=self.mapping.name,
                kind="text" if text else "number",
            )

    def _words_of(self, row: Row, column: str) -> str:
        text = clean(_as_text(row[self._at[column]], column)).strip("\n ")
        return "" if text in self._missing else text

    def _code(self, row: Row, columns: ValueColumns) -> Code:
        if columns.code:
            return Code(*columns.code)
        scheme = columns.scheme or self._required(row, columns.scheme_column)
        value = self._required(row, columns.code_column)
        if isinstance(row[self._at[columns.code_column]], float):
            raise RecordError(f"Column {columns.code_column!r} is a floating-point number; a code must be text or a whole number.")
        return Code(value, self._words.schemes.get(scheme, scheme), self._text(row, columns.meaning_column))

    def _number(self, row: Row, column: str) -> tuple[float | None, Comparator]:
        """A cell's number and what stands before it ("<5"); no number is guessed from thousands separators."""
        cell = row[self._at[column]] if column else None
        if isinstance(cell, (int, float, Decimal)) and not isinstance(cell, bool):
            # A Decimal may be a signaling NaN, which cannot be compared and has no float.
            if (isinstance(cell, Decimal) and not cell.is_finite()) or not -_MAX_NUMBER < cell < _MAX_NUMBER:
                raise RecordError(f"Column {column!r} is no finite number.")
            return float(cell), ""
        if not (text := self._text(row, column)):
            return None, ""
        found = _VALUE.fullmatch(text)
        sign, digits = found.groups() if found else ("", "")
        if self.mapping.decimal == ",":
            digits = "" if "." in digits else digits.replace(",", ".")
        if (value_or_none := number(digits)) is None:
            raise RecordError(f"Column {column!r} is no number with {self.mapping.decimal!r} as its decimal sign.")
        return value_or_none, COMPARATORS[_WIDE.get(sign, sign) if sign else ""]


def _as_text(cell: object, column: str) -> str:
    """What a driver gave, as text."""
    if cell is None:
        return ""
    if isinstance(cell, str):
        if "\0" in cell:
            raise RecordError(f"Column {column!r} holds NUL bytes.")
        return cell
    if isinstance(cell, (date, UUID)):
        return cell.isoformat() if isinstance(cell, date) else str(cell)
    if isinstance(cell, (int, float)):
        return str(int(cell)) if isinstance(cell, bool) else str(cell)
    if isinstance(cell, Decimal):
        return format(cell, "f")
    raise RecordError(f"Column {column!r} is neither text, number nor time, but {type(cell).__name__}.")


def _parts(text: str, formats: Sequence[str]) -> tuple[list[str | None], tzinfo | None]:
    """Year to fraction as far as they are written, and the offset if one is. ValueError if no format fits."""
    for one in formats:
        if one == ISO:
            if found := _ISO.fullmatch(text):
                *parts, offset = found.groups()
                return list(parts), _offset(offset)
            continue
        try:
            at = datetime.strptime(text, one)  # noqa: DTZ007  its zone is put on by latest_instant
        except ValueError:
            continue
        has = [any(f"%{letter}" in one for letter in letters) for letters in ("Yy", "mbB", "d", "HI", "M", "S", "f")]
        values = (f"{at.year:04}", str(at.month), str(at.day), str(at.hour), str(at.minute), str(at.second), f"{at.microsecond:06}")
        return [value if is_there else None for value, is_there in zip(values, has, strict=True)], at.tzinfo
    raise ValueError


def _offset(text: str | None) -> tzinfo | None:
    if not text:
        return None
    if text == "Z":
        return UTC
    return datetime.strptime(text if len(text) > 3 else f"{text}00", "%z").tzinfo or UTC
