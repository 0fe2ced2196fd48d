"""What `synoptic patient` and `synoptic records` say: the record as the network sees it at a time, and where it came from.

::

    store ─▶ gather_patient, gather_feeds: plain facts ─▶ --json
                                                        └▶ record_tables.py

Patient data, for the person who asked: it goes to the terminal and nowhere else, free texts redacted unless asked for whole.
Not here: how it looks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from worker import joining
from worker.domain import Code, Inputs, Observation, PatientKey, Study, is_ahead
from worker.errors import NoSuitableSeries
from worker.inputs import Spec, select_inputs
from worker.redaction import redact, redact_value
from worker.silence import silent
from worker.store import feeds, records, sources
from worker.store.database import Connection

Facts = dict[str, Any]

#: HL7 table 0085, in words.
STATUSES: Final = {"F": "final", "C": "corrected", "P": "preliminary", "D": "deleted", "W": "wrong", "X": "not obtainable"}
#: Messages of ours that withdraw what others said.
_WITHDRAWALS: Final = frozenset({"withdraw", "deleted"})
_USABLE: Final = frozenset({"F", "C"})
#: Nobody alive has a fact from before: a sender's clock, or its way to say that it does not know.
FIRST_YEAR: Final = datetime(1900, 1, 1, tzinfo=UTC)


# --- facts


def gather_patient(
    conn: Connection,
    key: PatientKey,
    *,
    as_of: datetime,
    known_at: datetime | None,
    is_full: bool,
    must_agree: Sequence[str] = joining.MUST_AGREE,
) -> Facts | None:
    """The record of one patient as of a time, as JSON would write it; None where no feed knows the patient."""
    record = records.view(conn, key, as_of=as_of, known_at=known_at)
    if record is None:
        return None
    record = joining.own(record, must_agree)
    told = [one for one in sources.demographics_of(conn, record.keys, known_at=known_at) if one.name or one.birth_date or one.sex]
    names = {one.name for one in told if one.name}
    usable = [one for one in record.observations if one.status in _USABLE]
    why = "only final and corrected results are used"
    withdrawn = [one for one in record.observations if one.status not in _USABLE]
    shown = [*usable, *withdrawn, *record.unusable]
    numbers = [number for number in (*(one.message_id for one in shown), *(one.message_id for one in told)) if number is not None]
    messages = sources.messages(conn, numbers)
    by_hand = {one.number: f"withdrawn by {one.control_id or one.sender}: {one.reason}" for one in messages if one.trigger in _WITHDRAWALS}
    unusable = [(one, by_hand.get(one.message_id or 0) or f"{STATUSES.get(one.status, one.status)}: {why}") for one in withdrawn]
    unusable += [(one, _why_unusable(one)) for one in record.unusable]
    merges = [one for one in records.merges_of(conn, key) if known_at is None or one[3] <= known_at]
    return {
        **_key(key),
        "as_of": as_of,
        "known_at": known_at,
        "demographics": {"name": record.patient.name, "birth_date": record.patient.birth_date, "sex": record.patient.sex},
        "demographics_history": [_told(one) for one in told],
        "keys": [_key(one) for one in record.keys],
        "merges": [
            {"number": number, "survivor": _key(survivor), "retired": _key(retired), "received_at": at, "source": source}
            for number, survivor, retired, at, source in merges
        ],
        "facts": [_fact(one, as_of, names, is_full=is_full) for one in _newest_first(usable)],
        "unusable": [{**_fact(one, as_of, names, is_full=is_full), "because": why} for one, why in unusable],
        "messages": [
            {
                "number": one.number,
                "sender": one.sender,
                "control_id": one.control_id,
                "trigger": one.trigger,
                "received_at": one.received_at,
            }
            for one in messages
        ],
        "texts_are_redacted": not is_full,
    }


def _why_unusable(one: Observation) -> str:
    return "dated after it was received" if is_ahead(one) else "came in another person's name"


def gather_inputs(
    conn: Connection,
    study: Study,
    key: PatientKey,
    spec: Spec,
    *,
    known_at: datetime | None,
    is_full: bool,
    must_agree: Sequence[str] = joining.MUST_AGREE,
) -> Facts:
    """What a bundle would make of the study and this record: used values with their age, and what is missing and why."""
    as_of = later(study.study_at, spec.record.horizon_h)
    record = records.view(conn, key, as_of=as_of, known_at=known_at)
    try:
        inputs = select_inputs(study, joining.own(record, must_agree) if record else None, spec)
    except NoSuitableSeries as exc:
        return {"refused": str(exc)}
    told = sources.demographics_of(conn, record.keys if record else (), known_at=known_at)
    return _inputs(inputs, {*(one.name for one in told if one.name), study.patient.name} - {""}, is_full=is_full)


def _inputs(inputs: Inputs, names: Iterable[str], *, is_full: bool) -> Facts:
    points = [(f"{history.name}[{index}]", one) for history in inputs.histories for index, one in enumerate(history.points)]
    return {
        "images": {name: series.description and redact(series.description, names=[*names]) for name, series in inputs.series.items()},
        "missing_images": list(inputs.missing_images),
        "values": [
            {"name": name, "code": _code(one.code), "value": _finite(one.value), "comparator": one.comparator, "unit": one.unit}
            | {"at": one.at, "age_h": round(one.age_h, 3), "source": one.source}
            for name, one in [*((used.name, used) for used in inputs.values), *points]
        ],
        "texts": [
            {
                "name": one.name,
                "code": _code(one.code),
                "at": one.at,
                "source": one.source,
                "text": _words(one.text, names, is_full=is_full),
            }
            for one in inputs.texts
        ],
        "missing": [{"code": _code(code), "because": why} for code, why in zip(inputs.missing, inputs.missing_causes, strict=True)],
    }


def gather_feeds(conn: Connection, *, rejected: int, silent_after_s: float, now: datetime) -> Facts:
    """Every sender with its messages by result, when it was last heard and how late; the last refused messages without their content."""
    known = feeds.feeds(conn)
    quiet = {one.sender for one in silent(known, after_s=silent_after_s, now=now)}
    return {
        "feeds": [
            {
                "sender": one.sender,
                "messages": {result: one.counts.get(result, 0) for result in ("applied", "ignored", "refused")},
                "last_received_at": one.last_received_at,
                "lag_s": lag_s(one),
                "silent_s": round((now - one.last_received_at).total_seconds(), 1),
                "is_silent": one.sender in quiet,
            }
            for one in known
        ],
        "silent_after_s": silent_after_s,
        "rejected": [
            {"number": number, "received_at": at, "sender": sender, "trigger": trigger, "because": reason}
            for number, at, sender, trigger, reason in (feeds.rejected(conn, limit=rejected) if rejected else ())
        ],
    }


def lag_s(feed: feeds.Feed) -> float | None:
    """Seconds from when the last message was sent, by its sender's clock, until it was received; None if it did not say."""
    try:
        sent_at = datetime.fromisoformat(feed.last_sent_at)
    except ValueError:
        return None
    return round((feed.last_received_at - sent_at).total_seconds(), 1) if sent_at.tzinfo else None


def later(at: datetime, hours: float) -> datetime:
    """So many hours after `at`, but never past the calendar's end."""
    try:
        return at + timedelta(hours=hours)
    except OverflowError:
        return datetime.max.replace(tzinfo=UTC)


def _key(key: PatientKey) -> Facts:
    return {"issuer": key.issuer, "patient_id": key.patient_id}


def _code(code: Code | None) -> Facts | None:
    return {"value": code.value, "scheme": code.scheme, "meaning": code.meaning} if code else None


def _told(one: sources.Told) -> Facts:
    return {
        **_key(one.key),
        "name": one.name,
        "birth_date": one.birth_date,
        "sex": one.sex,
        "said_at": one.at,
        "received_at": one.received_at,
        "source": one.source,
        "message": one.message_id,
    }


def _fact(one: Observation, as_of: datetime, names: Iterable[str], *, is_full: bool) -> Facts:
    return {
        "at": one.at,
        "code": _code(one.code),
        "kind": one.kind,
        "value": _finite(one.value),
        "high": _finite(one.high),
        "comparator": one.comparator,
        "unit": one.unit,
        "coded": _code(one.coded),
        "text": one.text if is_full else redact_value(one.text, names=[*names]),
        "status": one.status,
        "age_s": (as_of - one.at).total_seconds(),
        "doubt": "date cannot be" if one.at < FIRST_YEAR else "",
        "received_at": one.received_at,
        "source": one.source,
        "message": one.message_id,
    }


def _words(text: str, names: Iterable[str], *, is_full: bool) -> str:
    return text if is_full else redact(text, names=[*names])


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


def _newest_first(found: Sequence[Observation]) -> list[Observation]:
    return sorted(found, key=lambda one: (one.at, one.code.value), reverse=True)
