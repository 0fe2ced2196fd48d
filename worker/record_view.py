"""What `synoptic patient` and `synoptic records` print: the record as the network sees it at a time, and where it came from.

::

    store ─▶ gather_patient, gather_feeds: plain facts ─▶ --json
                                                        └▶ print_patient, print_feeds: tables

Patient data, for the person who asked: it goes to the terminal and nowhere else, free texts redacted unless asked for whole.
What senders wrote is shown without control characters: a name must not move the cursor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta, tzinfo
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from worker.domain import Code, Inputs, Observation, PatientKey, Study
from worker.errors import NoSuitableSeries
from worker.inputs import Spec, select_inputs
from worker.redaction import redact
from worker.silence import silent
from worker.store import feeds, records, sources
from worker.store.database import Connection

Facts = dict[str, Any]

#: HL7 table 0085, in words.
STATUSES: Final = {"F": "final", "C": "corrected", "P": "preliminary", "D": "deleted", "W": "wrong", "X": "not obtainable"}
#: A text this long is a value in a table's cell ("positive"), a longer one a paragraph.
_SHORT: Final = 40
_USABLE: Final = frozenset({"F", "C"})


# --- facts


def gather_patient(conn: Connection, key: PatientKey, *, as_of: datetime, known_at: datetime | None, is_full: bool) -> Facts | None:
    """The record of one patient as of a time, as JSON would write it; None where no feed knows the patient."""
    record = records.view(conn, key, as_of=as_of, known_at=known_at)
    if record is None:
        return None
    told = [one for one in sources.demographics_of(conn, record.keys, known_at=known_at) if one.name or one.birth_date or one.sex]
    names = {one.name for one in told if one.name}
    usable = [one for one in record.observations if one.status in _USABLE]
    why = "only final and corrected results are used"
    unusable = [(one, f"{STATUSES.get(one.status, one.status)}: {why}") for one in record.observations if one.status not in _USABLE]
    unusable += [(one, "dated after it was received") for one in record.unusable]
    merges = [one for one in records.merges_of(conn, key) if known_at is None or one[3] <= known_at]
    shown = [*usable, *(one for one, _ in unusable)]
    numbers = [number for number in (*(one.message_id for one in shown), *(one.message_id for one in told)) if number is not None]
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
            for one in sources.messages(conn, numbers)
        ],
        "texts_are_redacted": not is_full,
    }


def gather_inputs(conn: Connection, study: Study, key: PatientKey, spec: Spec, *, known_at: datetime | None, is_full: bool) -> Facts:
    """What a bundle would make of the study and this record: used values with their age, and what is missing and why."""
    as_of = study.study_at + timedelta(hours=spec.record.horizon_h)
    record = records.view(conn, key, as_of=as_of, known_at=known_at)
    try:
        inputs = select_inputs(study, record, spec)
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
        "text": _words(one.text, names, is_full=is_full),
        "status": one.status,
        "age_s": (as_of - one.at).total_seconds(),
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


# --- tables


def print_patient(out: Console, facts: Mapping[str, Any], *, zone: tzinfo) -> None:
    """The facts of `gather_patient`, and under "inputs" those of `gather_inputs`, for a person."""
    person = facts["demographics"]
    out.print(f"[bold]{_plain(facts['patient_id'])}[/bold] of {_plain(facts['issuer'])}", soft_wrap=True)
    out.print(f"{_plain(person['name']) or 'no name'}, born {_plain(person['birth_date']) or '?'}, sex {_plain(person['sex']) or '?'}")
    known = f", as it was known on {_time(facts['known_at'], zone)}" if facts["known_at"] else ""
    out.print(f"The record as of {_time(facts['as_of'], zone)}{known}; times are {zone}.")
    _print_identity(out, facts, zone)
    texts = [one for one in facts["facts"] if one["kind"] == "text" and (len(one["text"]) > _SHORT or "\n" in one["text"])]
    values = [one for one in facts["facts"] if one not in texts]
    _print_facts(out, values, zone, title="Facts that stand")
    _print_texts(out, texts, zone, is_redacted=facts["texts_are_redacted"])
    if facts["unusable"]:
        _print_facts(out, facts["unusable"], zone, title="Not usable")
    if not facts["facts"] and not facts["unusable"]:
        out.print("\nNo fact is known as of then.")
    if facts.get("inputs"):
        print_inputs(out, facts["inputs"], zone=zone)
    if facts["messages"]:
        table = _table("Messages they came from", "No.", "received", "sender", "trigger", "control ID")
        for one in facts["messages"]:
            cells = (_plain(one[name]) for name in ("sender", "trigger", "control_id"))
            table.add_row(str(one["number"]), _time(one["received_at"], zone), *cells)
        _put(out, table)


def _print_identity(out: Console, facts: Mapping[str, Any], zone: tzinfo) -> None:
    if len(facts["keys"]) > 1:
        out.print("Known as, the surviving first: " + "; ".join(_named(one) for one in facts["keys"]) + ".")
    if facts["merges"]:
        table = _table("Merges", "No.", "received", "survivor", "retired", "from")
        for one in facts["merges"]:
            who = (_named(one["survivor"]), _named(one["retired"]))
            table.add_row(str(one["number"]), _time(one["received_at"], zone), *who, _plain(one["source"]))
        _put(out, table)
    if len(facts["demographics_history"]) > 1:
        table = _table("What was said of the person", "said", "patient ID", "name", "born", "sex", "from", "No.")
        for one in facts["demographics_history"]:
            cells = (_plain(one[name]) for name in ("patient_id", "name", "birth_date", "sex", "source"))
            table.add_row(_time(one["said_at"], zone), *cells, str(one["message"] or ""))
        _put(out, table)


def _print_facts(out: Console, found: Sequence[Mapping[str, Any]], zone: tzinfo, *, title: str) -> None:
    if not found:
        return
    is_unusable = "because" in found[0]
    table = _table(title, "time", "fact", "value", *(("because",) if is_unusable else ("status", "age", "received")), "from")
    for one in found:
        state = (one["because"],) if is_unusable else (_status(one), span(one["age_s"]), _after(one))
        table.add_row(_time(one["at"], zone), _coded(one["code"]), value_words(one), *map(_plain, state), _from(one))
    _put(out, table)


def _print_texts(out: Console, found: Sequence[Mapping[str, Any]], zone: tzinfo, *, is_redacted: bool) -> None:
    if not found:
        return
    out.print(f"\n[bold]Texts[/bold]{' (names, numbers and dates are redacted; --full shows them)' if is_redacted else ''}")
    for one in found:
        origin = f", No. {_from(one)}" if _from(one) else ""
        said = f"{_plain(_status(one))}, age {span(one['age_s'])}, received {_after(one)}{origin}"
        out.print(f"{_time(one['at'], zone)}  {_coded(one['code'])}, {said}")
        for line in one["text"].splitlines():
            out.print(f"  {_plain(line)}")


def print_inputs(out: Console, inputs: Mapping[str, Any], *, zone: tzinfo) -> None:
    """What a bundle would be given."""
    if "refused" in inputs:
        out.print(f"\n[bold]The bundle cannot use the study.[/bold] {_plain(inputs['refused'])}")
        return
    if inputs["values"]:
        table = _table("What the network is given", "name", "value", "time", "age", "from")
        for one in inputs["values"]:
            age = span(one["age_h"] * 3600)
            table.add_row(_plain(one["name"]), value_words({**one, "kind": "number"}), _time(one["at"], zone), age, _plain(one["source"]))
        _put(out, table)
    for one in inputs["texts"]:
        out.print(f"\n{_plain(one['name'])}, written {_time(one['at'], zone)}, from {_plain(one['source'])}:")
        for line in one["text"].splitlines():
            out.print(f"  {_plain(line)}")
    missing = [(_coded(one["code"]), one["because"]) for one in inputs["missing"]] + [
        (f"image {name}", "no suitable series") for name in inputs["missing_images"]
    ]
    if missing:
        table = _table("Missing", "what", "because")
        for what, why in missing:
            table.add_row(what, _plain(why))
        _put(out, table)


def print_feeds(out: Console, facts: Mapping[str, Any], *, zone: tzinfo) -> None:
    """The facts of `gather_feeds` for a person."""
    if not facts["feeds"]:
        out.print("No message has come yet.")
        return
    table = _table("", "sender", "applied", "ignored", "refused", "last received", "lag", "heard")
    for one in facts["feeds"]:
        counts = (str(count) for count in one["messages"].values())
        heard = f"{span(one['silent_s'])} ago"
        heard = f"[red]silent, {heard}[/red]" if one["is_silent"] else heard
        lag = "not told" if one["lag_s"] is None else span(one["lag_s"])
        table.add_row(_plain(one["sender"]) or "(unreadable)", *counts, _time(one["last_received_at"], zone), lag, heard)
    _put(out, table)
    out.print(f"\nTimes are {zone}; lag is from sent to received.")
    if not facts["silent_after_s"]:
        out.print("No alarm is set for a silent feed: \\[records] silent_after_s.")
    if facts["rejected"]:
        table = _table("Refused last", "No.", "received", "sender", "trigger", "because")
        for one in facts["rejected"]:
            cells = (_plain(one[name]) for name in ("sender", "trigger", "because"))
            table.add_row(str(one["number"]), _time(one["received_at"], zone), *cells)
        _put(out, table)
        out.print("The bytes of one: `synoptic records --message NUMBER --out FILE`.")


def value_words(one: Mapping[str, Any]) -> str:
    """A value as one reads it: "<5 mg/L", "3.5 to 5.1 mmol/L", "1 : 40", a code's meaning."""
    kind, unit = one["kind"], _plain(one["unit"])
    if kind == "coded" and one["coded"]:
        return _coded(one["coded"])
    number, high = _number(one["value"]), _number(one.get("high"))
    if kind == "range":
        number = f"{number or '?'} to {high or '?'}"
    elif kind == "ratio":
        number = f"{one['comparator']}{number or '?'} : {high or '?'}"
    elif number:
        number = f"{one['comparator']}{number}"
    else:
        return _plain(one.get("text", "")) or "none"
    return f"{number} {unit}" if unit not in ("", "1") else number


def span(seconds: float) -> str:
    """A duration as one says it: "12 s", "5 min", "6.5 h", "12 d", "3.1 a"."""
    size, sign = abs(seconds), "-" if seconds < 0 else ""
    for unit, length, until in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172800), ("d", 86400, 63072000)):
        if size < until:
            return f"{sign}{size / length:.0f} {unit}" if unit != "h" else f"{sign}{size / length:.1f} {unit}"
    return f"{sign}{size / 86400 / 365.25:.1f} a"


def _status(one: Mapping[str, Any]) -> str:
    return STATUSES.get(one["status"], str(one["status"]))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.12g}"


def _time(at: datetime, zone: tzinfo) -> str:
    return f"{at.astimezone(zone):%Y-%m-%d %H:%M}"


def _after(one: Mapping[str, Any]) -> str:
    return f"+{span(seconds)}" if (seconds := (one["received_at"] - one["at"]).total_seconds()) >= 0 else span(seconds)


def _from(one: Mapping[str, Any]) -> str:
    """The message's number, else what else it came from."""
    return str(one["message"]) if one["message"] is not None else _plain(one["source"])


def _coded(code: Mapping[str, str]) -> str:
    return _plain(" ".join(part for part in (code["value"], code["scheme"], code["meaning"]) if part))


def _named(key: Mapping[str, str]) -> str:
    return f"{_plain(key['patient_id'])} of {_plain(key['issuer'])}"


def _plain(text: str) -> str:
    """Without control characters, and without rich's own markup."""
    return escape("".join(char if char.isprintable() else " " for char in text))


def _table(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), title=f"[bold]{title}[/bold]" if title else None)
    table.title_justify, table.title_style = "left", ""
    for name in columns:
        is_count = name in ("age", "No.", "applied", "ignored", "refused", "lag")
        is_fixed = is_count or name in ("time", "received", "last received", "said", "sex", "born", "status")
        table.add_column(name, no_wrap=is_fixed, overflow="fold", justify="right" if is_count else "left")
    return table


def _put(out: Console, table: Table) -> None:
    out.print()
    out.print(table)
