"""How `synoptic patient` and `synoptic records` look on a terminal, of 80 columns too.

::

    record_view.gather_… ─▶ print_patient, print_inputs, print_feeds

What senders wrote is shown by `plain` alone: a name must not move the cursor, and an ID must not turn its line round.
Not here: which facts there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, tzinfo
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from worker.record_view import FIRST_YEAR, STATUSES

#: A text this long is a value in a table's cell ("positive"), a longer one a paragraph.
_SHORT: Final = 40
#: From so many columns on there is room for whole times beside a sender's name.
_WIDE: Final = 100
#: A lag this long is a clock or a message sent again; how long exactly tells nothing.
_LAG_S: Final = 30 * 86400
_REDACTED: Final = "names, numbers and dates are redacted; --full shows them"


def print_patient(out: Console, facts: Mapping[str, Any], *, zone: tzinfo) -> None:
    """The facts of `gather_patient`, and under "inputs" those of `gather_inputs`, for a person."""
    person = facts["demographics"]
    out.print(f"[bold]{plain(facts['patient_id'])}[/bold] of {plain(facts['issuer'])}", soft_wrap=True)
    out.print(f"{plain(person['name']) or 'no name'}, born {plain(person['birth_date']) or '?'}, sex {plain(person['sex']) or '?'}")
    known = f", as it was known on {_time(facts['known_at'], zone)}" if facts["known_at"] else ""
    out.print(f"The record as of {_time(facts['as_of'], zone)}{known}; times are {zone}.")
    _print_identity(out, facts, zone)
    texts = [one for one in facts["facts"] if one["kind"] == "text" and (len(one["text"]) > _SHORT or "\n" in one["text"])]
    values = [one for one in facts["facts"] if one not in texts]
    _print_facts(out, values, zone, title="Facts that stand", is_redacted=facts["texts_are_redacted"])
    _print_texts(out, texts, zone, is_redacted=facts["texts_are_redacted"])
    if facts["unusable"]:
        _print_facts(out, facts["unusable"], zone, title="Not usable", is_redacted=facts["texts_are_redacted"])
    if not facts["facts"] and not facts["unusable"]:
        out.print("\nNo fact is known as of then.")
    if facts.get("inputs"):
        print_inputs(out, facts["inputs"], zone=zone)
    if facts["messages"]:
        table = _table("Messages they came from", "No.", "received", "sender", "trigger", "control ID")
        for one in facts["messages"]:
            cells = (plain(one[name]) for name in ("sender", "trigger", "control_id"))
            table.add_row(str(one["number"]), _time(one["received_at"], zone), *cells)
        _put(out, table)


def _print_identity(out: Console, facts: Mapping[str, Any], zone: tzinfo) -> None:
    if len(facts["keys"]) > 1:
        out.print("Known as, the surviving first: " + "; ".join(_named(one) for one in facts["keys"]) + ".")
    if facts["merges"]:
        table = _table("Merges", "No.", "received", "survivor", "retired", "from")
        for one in facts["merges"]:
            who = (_named(one["survivor"]), _named(one["retired"]))
            table.add_row(str(one["number"]), _time(one["received_at"], zone), *who, plain(one["source"]))
        _put(out, table)
    if len(facts["demographics_history"]) > 1:
        table = _table("What was said of the person", "said", "patient ID", "name", "born", "sex", "from", "No.")
        for one in facts["demographics_history"]:
            cells = (plain(one[name]) for name in ("patient_id", "name", "birth_date", "sex", "source"))
            # Results name the patient in passing; that is no time at which somebody said who it is.
            said_at = _time(one["said_at"], zone) if one["said_at"] != FIRST_YEAR else "in passing"
            table.add_row(said_at, *cells, str(one["message"] or ""))
        _put(out, table)


def _print_facts(out: Console, found: Sequence[Mapping[str, Any]], zone: tzinfo, *, title: str, is_redacted: bool) -> None:
    if not found:
        return
    if is_redacted and any(one["text"] for one in found):
        title += f" (in texts {_REDACTED})"
    is_unusable = "because" in found[0]
    states = ("because",) if is_unusable else ("status", "age", "received") if out.width >= _WIDE else ("status", "age")
    table = _table(title, "time", "fact", "value", *states, "from")
    for one in found:
        # An age of two thousand years reads like a number; nobody looks twice at a number.
        age = one["doubt"] or span(one["age_s"])
        because = ", ".join(filter(None, (one.get("because"), one["doubt"])))
        state = (because,) if is_unusable else (_status(one), age, "" if one["doubt"] else _after(one))[: len(states)]
        table.add_row(_time(one["at"], zone), _coded(one["code"]), value_words(one), *map(plain, state), _from(one))
    _put(out, table)


def _print_texts(out: Console, found: Sequence[Mapping[str, Any]], zone: tzinfo, *, is_redacted: bool) -> None:
    if not found:
        return
    out.print(f"\n[bold]Texts[/bold]{f' ({_REDACTED})' if is_redacted else ''}")
    for one in found:
        origin = f", No. {_from(one)}" if _from(one) else ""
        age = one["doubt"] or f"age {span(one['age_s'])}, received {_after(one)}"
        said = f"{plain(_status(one))}, {age}{origin}"
        out.print(f"{_time(one['at'], zone)}  {_coded(one['code'])}, {said}")
        for line in one["text"].splitlines():
            out.print(f"  {plain(line)}")


def print_inputs(out: Console, inputs: Mapping[str, Any], *, zone: tzinfo) -> None:
    """What a bundle would be given."""
    if "refused" in inputs:
        out.print(f"\n[bold]The bundle cannot use the study.[/bold] {plain(inputs['refused'])}")
        return
    if inputs["values"]:
        table = _table("What the network is given", "name", "value", "time", "age", "from")
        for one in inputs["values"]:
            age = span(one["age_h"] * 3600)
            table.add_row(plain(one["name"]), value_words({**one, "kind": "number"}), _time(one["at"], zone), age, plain(one["source"]))
        _put(out, table)
    for one in inputs["texts"]:
        out.print(f"\n{plain(one['name'])}, written {_time(one['at'], zone)}, from {plain(one['source'])}:")
        for line in one["text"].splitlines():
            out.print(f"  {plain(line)}")
    missing = [(_coded(one["code"]), one["because"]) for one in inputs["missing"]] + [
        (f"image {plain(name)}", "no suitable series") for name in inputs["missing_images"]
    ]
    if missing:
        table = _table("Missing", "what", "because")
        for what, why in missing:
            table.add_row(what, plain(why))
        _put(out, table)


def print_feeds(out: Console, facts: Mapping[str, Any], *, zone: tzinfo) -> None:
    """The facts of `gather_feeds` for a person."""
    if not facts["feeds"]:
        out.print("No message has come yet.")
        return
    is_wide = out.width >= _WIDE
    table = _table("", "sender", "applied", "ignored", "refused", *(("last received",) if is_wide else ()), "lag", "heard")
    for one in facts["feeds"]:
        counts = (str(count) for count in one["messages"].values())
        heard = f"[red]silent {span(one['silent_s'])}[/red]" if one["is_silent"] else f"{span(one['silent_s'])} ago"
        at = (_time(one["last_received_at"], zone),) if is_wide else ()
        table.add_row(plain(one["sender"]) or "(unreadable)", *counts, *at, _lag(one["lag_s"]), heard)
    _put(out, table)
    out.print(f"\nTimes are {zone}; lag is from sent to received, ? where it does not say, or the last was refused.")
    if not facts["silent_after_s"]:
        out.print("No alarm is set for a silent feed: \\[records] silent_after_s.")
    if facts["rejected"]:
        out.print("\n[bold]Refused last[/bold]")
        for one in facts["rejected"]:
            who = ", ".join(filter(None, (plain(one["sender"]), plain(one["trigger"]))))
            out.print(f"No. {one['number']}, {_time(one['received_at'], zone)}{f', {who}' if who else ''}", soft_wrap=True)
            out.print(Padding(plain(one["because"]), (0, 0, 0, 4)))
        out.print("The bytes of one: `synoptic records --message NUMBER --out FILE`.")
        out.print("When its cause is mended: `synoptic records --apply NUMBER`.")


def value_words(one: Mapping[str, Any]) -> str:
    """A value as one reads it: "<5 mg/L", "3.5 to 5.1 mmol/L", "1 : 40", a code's meaning."""
    kind, unit = one["kind"], plain(one["unit"])
    if kind == "coded" and one["coded"]:
        return _coded(one["coded"])
    number, high = _number(one["value"]), _number(one.get("high"))
    if kind == "range":
        number = f"{number or '?'} to {high or '?'}"
    elif kind == "ratio":
        number = f"{plain(one['comparator'])}{number or '?'} : {high or '?'}"
    elif number:
        number = f"{plain(one['comparator'])}{number}"
    else:
        return plain(one.get("text", "")) or "none"
    return f"{number} {unit}" if unit not in ("", "1") else number


def span(seconds: float) -> str:
    """A duration as one says it: "12 s", "5 min", "6.5 h", "12 d", "3.1 a"."""
    size, sign = abs(seconds), "-" if seconds < 0 else ""
    for unit, length, until in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172800), ("d", 86400, 63072000)):
        if size < until:
            return f"{sign}{size / length:.{int(unit == 'h' and size < 36000)}f} {unit}"
    return f"{sign}{size / 86400 / 365.25:.1f} a"


def _lag(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    return span(seconds) if abs(seconds) < _LAG_S else f"{'-' if seconds < 0 else ''}>{span(_LAG_S)}"


def _status(one: Mapping[str, Any]) -> str:
    return STATUSES.get(one["status"], str(one["status"]))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.12g}"


def _time(at: datetime, zone: tzinfo) -> str:
    # By isoformat: strftime writes the year 1 as "1".
    try:
        return at.astimezone(zone).replace(tzinfo=None).isoformat(" ", "minutes")
    except OverflowError:  # the calendar's first and last day are over its edge in some zones
        return at.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "minutes") + " UTC"


def _after(one: Mapping[str, Any]) -> str:
    return f"+{span(seconds)}" if (seconds := (one["received_at"] - one["at"]).total_seconds()) >= 0 else span(seconds)


def _from(one: Mapping[str, Any]) -> str:
    """The message's number, else what else it came from."""
    return str(one["message"]) if one["message"] is not None else plain(one["source"])


def _coded(code: Mapping[str, str]) -> str:
    return plain(" ".join(part for part in (code["value"], code["scheme"], code["meaning"]) if part))


def _named(key: Mapping[str, str]) -> str:
    return f"{plain(key['patient_id'])} of {plain(key['issuer'])}"


def plain(text: str) -> str:
    """A text from outside for `Console.print`: no control characters, nothing that turns the writing round, no markup of rich's own."""
    return escape("".join(char if char.isprintable() else " " for char in text))


def _table(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), title=f"[bold]{title}[/bold]" if title else None)
    table.title_justify, table.title_style = "left", ""
    for name in columns:
        is_count = name in ("age", "No.", "applied", "ignored", "refused", "lag")
        is_fixed = is_count or name in ("time", "received", "last received", "said", "sex", "born", "status", "heard")
        table.add_column(name, no_wrap=is_fixed, overflow="fold", justify="right" if is_count else "left")
    return table


def _put(out: Console, table: Table) -> None:
    out.print()
    out.print(table)
