"""What one prediction may be made from: a series of the study for each image, and the record as it stood at the study.

::

    study ──▶ a series for each image (selection.py)
          └─▶ age, sex, descriptions
    record ─▶ per wanted code: latest usable observation in [study − look-back, study + horizon] ─▶ value or text
          │                                              └─ none, of no such unit, implausible … ─▶ missing, and why
          └─▶ per history: every usable observation in [study − its look-back, study], oldest first

Pure functions of what they are given. Not here: which series (selection.py), tensors (infer.py), the join of record and study
(store/records.py).
A wrong value is worse than none: a newer result that cannot be used is never replaced by an older one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Final, Protocol

from models.spec import Code as WantedCode
from models.spec import ImageSpec, RecordRule, TextSpec, ValueSpec
from worker.domain import Code, Inputs, Observation, PatientRecord, Series, Study, UsedHistory, UsedText, UsedValue, is_ahead
from worker.selection import choose
from worker.units import factor, readable

#: HL7 table 0085, best first. Within one key a correction replaces a final result, a withdrawal replaces both
#: unless corrected; only C and F may be used.
_STATUS_RANK: Final = {"C": 0, "D": 1, "W": 1, "X": 1, "F": 2}
_USABLE: Final = frozenset({"F", "C"})
_NO_RECORD: Final = "no patient record"
_AHEAD: Final = "the latest result is dated after it was received"
_OF_ANOTHER: Final = "the latest result came in another person's name"
_KINDS: Final = {"range": "range", "ratio": "ratio", "coded": "code", "text": "text"}

#: LOINC codes that demographics answer.
AGE: Final = ("30525-0", "LN")
SEX: Final = ("46098-0", "LN")
_SEXES: Final = {"F": 1.0, "M": 0.0}
#: UCUM's year, "a".
_DAYS_A_YEAR: Final = 365.25
#: Nobody of whom it is proven grew older than 122; a birth date says more when its century is mistyped.
_OLDEST_YEARS: Final = 125


class Spec(Protocol):
    """What a bundle asks for; `models.bundle.Bundle` is one."""

    @property
    def images(self) -> Sequence[ImageSpec]: ...  # noqa: D102
    @property
    def record(self) -> RecordRule: ...  # noqa: D102


def select_inputs(study: Study, record: PatientRecord | None, spec: Spec) -> Inputs:
    """Choose what the prediction of `study` is made from.

    Nothing drawn or written later than the horizon after ``study.study_at``, or earlier than the look-back before it, is
    ever used, and no point of a history that is later than the study. The order of the record's observations does not
    matter. Age (in years of 365.25 days, as of the study) and sex (1 female, 0 male) come from the study's demographics,
    else from the record's, before any observation under their codes.

    Raises
    ------
    NoSuitableSeries
        An image the bundle requires has no series, or none has; the sentence says how each series falls short.
    """
    series = choose(study, spec.images)
    rule = spec.record
    recent, before = _windows(study, record, rule)
    missing: list[tuple[Code, str]] = []
    values: list[UsedValue] = []
    for value_wanted in rule.values:
        value = _value(recent, record, value_wanted)
        if isinstance(value, UsedValue):
            values.append(value)
        else:
            missing.append((_code(value_wanted.code), value))
    histories: list[UsedHistory] = []
    for value_wanted in rule.histories:
        history = _history(before, value_wanted)
        if isinstance(history, UsedHistory):
            histories.append(history)
        elif _code(value_wanted.code) not in (code for code, _ in missing):
            missing.append((_code(value_wanted.code), history))
    texts: list[UsedText] = []
    for text_wanted in rule.texts:
        text = _of_images(study, series, text_wanted) if text_wanted.attribute else _text(recent, text_wanted)
        if isinstance(text, UsedText):
            texts.append(text)
        else:
            missing.append((_code(text_wanted.code), text))
    return Inputs(
        series=series,
        values=tuple(values),
        texts=tuple(texts),
        missing=tuple(code for code, _ in missing),
        record_found=record is not None,
        missing_causes=tuple(cause for _, cause in missing),
        histories=tuple(histories),
        missing_images=tuple(image.name for image in spec.images if image.name not in series),
    )


def unanswered(study: Study, record: PatientRecord | None, rule: RecordRule) -> list[TextSpec | ValueSpec]:
    """What no usable result in time answers: why it is missing may be told by older ones alone."""
    recent, before = _windows(study, record, rule)
    # Demographics answer without the record's facts, or say themselves why not.
    several: tuple[TextSpec | ValueSpec, ...] = (*rule.values, *rule.record_texts)
    asked = [one for one in several if (one.code.value, one.code.scheme) not in (AGE, SEX)]
    return [one for one in asked if not recent.candidates(one)] + [one for one in rule.histories if not before.candidates(one)]


def _of_images(study: Study, series: dict[str, Series], wanted: TextSpec) -> UsedText | str:
    """The text of an attribute of the images: the study's, or that of the first image's series."""
    text = study.description if wanted.attribute == "StudyDescription" else next(iter(series.values())).description
    if not text.strip():
        return f"the images have no {wanted.attribute}"
    return UsedText(name=wanted.name, code=_code(wanted.code), text=text, at=study.study_at, source="images")


# --- the record ----------------------------------------------------------------------------------


def _standing(observations: Iterable[Observation]) -> tuple[Observation, ...]:
    """Leave one observation per source and key: the one its status ranks first; keyless ones stand alone."""
    alone: list[Observation] = []
    best: dict[tuple[str, str], Observation] = {}
    for one in observations:
        if not one.key:
            alone.append(one)
            continue
        fact = (one.source, one.key)
        if fact not in best or _rank(one) < _rank(best[fact]):
            best[fact] = one
    return (*alone, *best.values())


def _rank(one: Observation) -> tuple[object, ...]:
    """A total order, best first, so that no answer depends on the order of arrival."""
    numeric = (0, one.value) if one.value is not None and math.isfinite(one.value) else (1, 0.0)
    return (_STATUS_RANK.get(one.status, 3), -one.at.timestamp(), numeric, one.comparator, one.unit, one.text, one.source, one.key)


@dataclass(frozen=True, slots=True)
class _Window:
    """The standing facts of a record, and from when to when a bundle takes them.

    ``unusable`` says why some, by their ids, cannot be used: dated after they were received, of when they are nobody knows. By their
    own date they stand before older ones like any such result; where there is no other they are the reason.
    """

    study: Study
    has_record: bool
    look_back_h: float
    first: datetime
    last: datetime
    by_code: Mapping[tuple[str, str], Sequence[Observation]]
    unusable: Mapping[int, str]

    @classmethod
    def of(
        cls, study: Study, record: PatientRecord | None, known: Iterable[Observation], *, look_back_h: float, horizon_h: float
    ) -> _Window:
        first, last = study.study_at - timedelta(hours=look_back_h), study.study_at + timedelta(hours=horizon_h)
        unusable = {id(one): _AHEAD if is_ahead(one) else _OF_ANOTHER for one in record.unusable} if record else {}
        by_code: dict[tuple[str, str], list[Observation]] = {}
        for one in known:
            # What is of after the horizon may not even be a reason.
            if one.at <= last or id(one) in unusable:
                by_code.setdefault((one.code.scheme, one.code.value), []).append(one)
        return cls(study, record is not None, look_back_h, first, last, by_code, unusable)

    def candidates(self, wanted: TextSpec | ValueSpec) -> list[Observation]:
        """Of these the smallest by `_latest` is the answer, be it of use or not."""
        return [one for one in self._under(wanted) if one.status in _USABLE and self.first <= one.at <= self.last]

    def absence(self, wanted: TextSpec | ValueSpec) -> str:
        """Why there is no candidate."""
        if not self.has_record:
            return _NO_RECORD
        under = self._under(wanted)
        usable = [one for one in under if one.status in _USABLE]
        if causes := [self.unusable[id(one)] for one in usable if id(one) in self.unusable]:
            return min(causes)
        if any(one.status not in _USABLE and self.first <= one.at for one in under):
            return "all that is known in time is preliminary or withdrawn"
        if usable:
            hours = (self.study.study_at - max(one.at for one in usable)).total_seconds() / 3600
            # Rounded up: 24.01 h must not read as within 24 h.
            return f"the latest is {math.ceil(hours * 10) / 10:g} h before the study, and the bundle looks back {self.look_back_h:g} h"
        return "all that is known is preliminary or withdrawn" if under else "nothing is known under its code"

    def _under(self, wanted: TextSpec | ValueSpec) -> list[Observation]:
        codes = {(c.scheme, c.value) for c in (wanted.code, *wanted.synonyms)}
        return [one for code in codes for one in self.by_code.get(code, ())]


def _windows(study: Study, record: PatientRecord | None, rule: RecordRule) -> tuple[_Window, _Window]:
    """That of values and texts, and that of histories."""
    known = _standing((*record.observations, *record.unusable)) if record else ()
    recent = _Window.of(study, record, known, look_back_h=rule.look_back_h, horizon_h=rule.horizon_h)
    return recent, _Window.of(study, record, known, look_back_h=rule.history_h, horizon_h=0.0)


def _latest(one: Observation, wanted: TextSpec | ValueSpec) -> tuple[object, ...]:
    primary = (one.code.scheme, one.code.value) == (wanted.code.scheme, wanted.code.value)
    return (-one.at.timestamp(), one.status != "C", not primary, *_rank(one))


def _value(window: _Window, record: PatientRecord | None, wanted: ValueSpec) -> UsedValue | str:
    """The latest value in the wanted unit, or why there is none; demographics answer first where they are asked for."""
    told = _demographics(window, record, wanted)
    if isinstance(told, UsedValue):
        return told
    latest = min(window.candidates(wanted), key=lambda one: _latest(one, wanted), default=None)
    if latest is None:
        return told or window.absence(wanted)
    return _used(latest, window, wanted)


def _history(window: _Window, wanted: ValueSpec) -> UsedHistory | str:
    """Every usable value, oldest first, or why there is none. Of several at one time only that counts which would be the latest value's."""
    best: dict[datetime, Observation] = {}
    for one in window.candidates(wanted):
        if one.at not in best or _latest(one, wanted) < _latest(best[one.at], wanted):
            best[one.at] = one
    if not best:
        return window.absence(wanted)
    tried = [_used(best[at], window, wanted) for at in sorted(best)]
    points = tuple(point for point in tried if isinstance(point, UsedValue))
    return UsedHistory(wanted.name, _code(wanted.code), points) if points else f"no result in time can be used: {tried[-1]}"


def _used(one: Observation, window: _Window, wanted: ValueSpec) -> UsedValue | str:
    """Return `one` in the wanted unit, or why it cannot be used. The bundle's own conversions come before UCUM's."""
    if id(one) in window.unusable:
        return window.unusable[id(one)]
    if one.kind != "number":
        return f"the latest result is a {_KINDS[one.kind]}, not a number"
    if one.value is None or not math.isfinite(one.value):
        return "the latest result is not a number"
    times = 1.0 if one.unit == wanted.unit else wanted.conversions.get(one.unit) or factor(one.unit, wanted.unit)
    if times is None:
        return f"the latest result is in {readable(one.unit)}, which does not convert to {wanted.unit}"
    value = one.value * times
    low, high = wanted.plausible
    if not low <= value <= high:
        return f"the latest result is not plausible (outside {low:g} to {high:g} {wanted.unit})"
    return UsedValue(
        name=wanted.name,
        code=_code(wanted.code),
        value=value,
        comparator=one.comparator,
        unit=wanted.unit,
        at=one.at,
        source=one.source,
        age_h=(window.study.study_at - one.at).total_seconds() / 3600,
        message=one.message,
    )


def _text(window: _Window, wanted: TextSpec) -> UsedText | str:
    """The latest text with words in it, or why there is none."""
    found = window.candidates(wanted)
    written = [one for one in found if one.text.strip()]
    if not written:
        return "the texts in time are empty" if found else window.absence(wanted)
    latest = min(written, key=lambda one: _latest(one, wanted))
    if id(latest) in window.unusable:
        return window.unusable[id(latest)]
    return UsedText(name=wanted.name, code=_code(wanted.code), text=latest.text, at=latest.at, source=latest.source, message=latest.message)


# --- demographics --------------------------------------------------------------------------------


def _demographics(window: _Window, record: PatientRecord | None, wanted: ValueSpec) -> UsedValue | str:
    """Age or sex as a value, or why it is not known; '' when something else is wanted."""
    study = window.study
    code = (wanted.code.value, wanted.code.scheme)
    people = (study.patient, record.patient) if record else (study.patient,)
    if code == AGE:
        value = age_of(next((one.birth_date for one in people if one.birth_date), ""), study.study_at)
        unit, unknown = "a", "no plausible birth date"
    elif code == SEX:
        value = _SEXES.get(next((one.sex for one in people if one.sex), ""))
        unit, unknown = wanted.unit, "the sex is neither female nor male, or not known"
    else:
        return ""
    if value is None:
        return unknown
    return _used(Observation(_code(wanted.code), study.study_at, value, unit=unit, source="demographics"), window, wanted)


def age_of(birth_date: str, at: datetime) -> float | None:
    """Years, to two digits, from YYYYMMDD to `at`; None for no such day, one after `at`, or an age nobody reaches."""
    try:
        born = date.fromisoformat(f"{birth_date[:4]}-{birth_date[4:6]}-{birth_date[6:8]}")
    except ValueError:
        return None
    days = (at.date() - born).days
    years = round(max(0, days) / _DAYS_A_YEAR, 2)
    # `at` is UTC: east of it a child born this morning has tomorrow's date.
    return years if days >= -1 and years <= _OLDEST_YEARS else None


def _code(code: WantedCode) -> Code:
    return Code(value=code.value, scheme=code.scheme, meaning=code.meaning)
