"""What one prediction may be made from: one series of the study, and the record as it stood at the study.

::

    study ──▶ suitable_series ──▶ the one with most instances
    record ─▶ per wanted code: latest usable observation in (study − look-back, study] ─▶ value or text
                                                          └─ none, unit unknown, implausible ─▶ missing, and why

Pure functions of what they are given. Not here: tensors (infer.py), the join of record and study (store/records.py).
A wrong value is worse than none: a newer result that cannot be used is never replaced by an older one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Final, Literal, Protocol

from worker.domain import Code, Inputs, Observation, PatientRecord, Series, Study, UsedText, UsedValue
from worker.errors import NoSuitableSeries

#: HL7 table 0085, best first. Within one key a correction replaces a final result, a withdrawal replaces both
#: unless corrected; only C and F may be used.
_STATUS_RANK: Final = {"C": 0, "D": 1, "W": 1, "X": 1, "F": 2}
_USABLE: Final = frozenset({"F", "C"})


class CodeLike(Protocol):
    """A coded concept of any origin; `models` has its own, for it may not know the worker."""

    @property
    def value(self) -> str: ...  # noqa: D102
    @property
    def scheme(self) -> str: ...  # noqa: D102
    @property
    def meaning(self) -> str: ...  # noqa: D102


class SeriesRule(Protocol):
    """Which series will do; an empty tuple allows any. `exclude_descriptions` are parts of words, case ignored."""

    @property
    def kind(self) -> Literal["volume", "radiograph"]: ...  # noqa: D102
    @property
    def modalities(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def body_parts(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def exclude_descriptions(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def views(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def min_instances(self) -> int: ...  # noqa: D102
    @property
    def required(self) -> int: ...  # noqa: D102


class TextWanted(Protocol):
    """A kind of text, under any of its codes."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def code(self) -> CodeLike: ...  # noqa: D102
    @property
    def synonyms(self) -> tuple[CodeLike, ...]: ...  # noqa: D102


class ValueWanted(TextWanted, Protocol):
    """A laboratory value: `conversions` maps a foreign unit to its factor, `plausible` is in `unit` (UCUM)."""

    @property
    def unit(self) -> str: ...  # noqa: D102
    @property
    def conversions(self) -> Mapping[str, float]: ...  # noqa: D102
    @property
    def plausible(self) -> tuple[float, float]: ...  # noqa: D102


class RecordRule(Protocol):
    """What is wanted of the record, and how old it may be."""

    @property
    def look_back_h(self) -> float: ...  # noqa: D102
    @property
    def values(self) -> tuple[ValueWanted, ...]: ...  # noqa: D102
    @property
    def texts(self) -> tuple[TextWanted, ...]: ...  # noqa: D102


class Spec(Protocol):
    """What a bundle asks for; `models.bundle.Bundle` is one."""

    @property
    def series(self) -> SeriesRule: ...  # noqa: D102
    @property
    def record(self) -> RecordRule: ...  # noqa: D102


def suitable_series(study: Study, rule: SeriesRule) -> tuple[Series, ...]:
    """Return the series that fit `rule`, best first: most instances, then the smaller series UID."""
    fitting = [s for s in study.series if not _misfit(s, rule)]
    return tuple(sorted(fitting, key=lambda s: (-len(s.instances), s.series_instance_uid)))


def select_inputs(study: Study, record: PatientRecord | None, spec: Spec) -> Inputs:
    """Choose what the prediction of `study` is made from.

    Nothing drawn or written after ``study.study_at``, or more than the look-back before it, is ever used. The order
    of the record's observations does not matter.

    Raises
    ------
    NoSuitableSeries
        Fewer series fit the bundle's rule than it needs; the sentence says how each one falls short.
    """
    fitting = suitable_series(study, spec.series)
    if len(fitting) < spec.series.required:
        reasons = sorted({_misfit(s, spec.series) for s in study.series} - {""})
        raise NoSuitableSeries(
            f"{spec.series.required} suitable series needed, {len(fitting)} of {len(study.series)} fit"
            + (f": {'; '.join(reasons)}." if reasons else ".")
        )
    values: list[UsedValue] = []
    texts: list[UsedText] = []
    missing: list[tuple[Code, str]] = []
    known = _standing(record.observations) if record else ()
    for value_wanted in spec.record.values:
        value = _value(_candidates(known, study, value_wanted, spec.record.look_back_h), value_wanted)
        if isinstance(value, UsedValue):
            values.append(value)
        else:
            missing.append((_code(value_wanted.code), value))
    for text_wanted in spec.record.texts:
        text = _text(_candidates(known, study, text_wanted, spec.record.look_back_h), text_wanted)
        if isinstance(text, UsedText):
            texts.append(text)
        else:
            missing.append((_code(text_wanted.code), text))
    return Inputs(
        series=fitting[0],
        values=tuple(values),
        texts=tuple(texts),
        missing=tuple(code for code, _ in missing),
        record_found=record is not None,
        missing_causes=tuple(cause if record else "no patient record" for _, cause in missing),
    )


def _misfit(series: Series, rule: SeriesRule) -> str:
    """Why `series` does not fit, or ''. The words of a description may name a person: they are not repeated."""
    description = series.description.lower()
    if rule.modalities and series.modality not in rule.modalities:
        return f"modality {series.modality or 'unknown'} is not {' or '.join(rule.modalities)}"
    # Body Part Examined is optional (PS3.3 §C.7.3.1): an absent one is no reason to refuse.
    if rule.body_parts and series.body_part and series.body_part.upper() not in rule.body_parts:
        return f"body part is not {' or '.join(rule.body_parts)}"
    if word := next((w for w in rule.exclude_descriptions if w.lower() in description), ""):
        return f"the series description holds the excluded word {word!r}"
    if len(series.instances) < rule.min_instances:
        return f"{len(series.instances)} instances are fewer than {rule.min_instances}"
    return ""


def _standing(observations: Iterable[Observation]) -> tuple[Observation, ...]:
    """Leave one observation per source and key: the one its status ranks first; keyless ones stand alone."""
    alone: list[Observation] = []
    best: dict[tuple[str, str, str, str], Observation] = {}
    for one in observations:
        if not one.key:
            alone.append(one)
            continue
        fact = (one.source, one.key, one.code.scheme, one.code.value)
        if fact not in best or _rank(one) < _rank(best[fact]):
            best[fact] = one
    return (*alone, *best.values())


def _rank(one: Observation) -> tuple[object, ...]:
    """A total order, best first, so that no answer depends on the order of arrival."""
    numeric = (0, one.value) if one.value is not None and math.isfinite(one.value) else (1, 0.0)
    return (_STATUS_RANK.get(one.status, 3), -one.at.timestamp(), numeric, one.comparator, one.unit, one.text, one.source, one.key)


def _candidates(known: Iterable[Observation], study: Study, wanted: TextWanted, look_back_h: float) -> Iterator[Observation]:
    """Usable observations under the wanted codes, drawn in time; the best is the smallest by `_latest`."""
    codes = {(c.scheme, c.value) for c in (wanted.code, *wanted.synonyms)}
    first = study.study_at - timedelta(hours=look_back_h)
    for one in known:
        if (one.code.scheme, one.code.value) in codes and one.status in _USABLE and first <= one.at <= study.study_at:
            yield one


def _latest(one: Observation, wanted: TextWanted) -> tuple[object, ...]:
    primary = (one.code.scheme, one.code.value) == (wanted.code.scheme, wanted.code.value)
    return (-one.at.timestamp(), one.status != "C", not primary, *_rank(one))


def _value(candidates: Iterable[Observation], wanted: ValueWanted) -> UsedValue | str:
    """The latest value in the wanted unit, or why there is none."""
    latest = min(candidates, key=lambda one: _latest(one, wanted), default=None)
    if latest is None:
        return "no result in time"
    if latest.value is None or not math.isfinite(latest.value):
        return "the latest result is not a number"
    factor = 1.0 if latest.unit == wanted.unit else wanted.conversions.get(latest.unit)
    if factor is None:
        return f"the latest result is in {latest.unit or 'no unit'}, which does not convert to {wanted.unit}"
    value = latest.value * factor
    low, high = wanted.plausible
    if not low <= value <= high:
        return f"the latest result is not plausible (outside {low:g} to {high:g} {wanted.unit})"
    return UsedValue(
        name=wanted.name,
        code=_code(wanted.code),
        value=value,
        comparator=latest.comparator,
        unit=wanted.unit,
        at=latest.at,
        source=latest.source,
    )


def _text(candidates: Iterable[Observation], wanted: TextWanted) -> UsedText | str:
    """The latest text with words in it, or why there is none."""
    written = (one for one in candidates if one.text.strip())
    latest = min(written, key=lambda one: _latest(one, wanted), default=None)
    if latest is None:
        return "no text in time"
    return UsedText(name=wanted.name, code=_code(wanted.code), text=latest.text, at=latest.at, source=latest.source)


def _code(code: CodeLike) -> Code:
    return Code(value=code.value, scheme=code.scheme, meaning=code.meaning)
