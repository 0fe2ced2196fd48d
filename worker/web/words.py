"""Names, times, states and events in words. Values in, text out; nothing here knows a request."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta, tzinfo
from typing import Any, Final

#: State → what it is called, and what it means.
STATES: Final[Mapping[str, tuple[str, str]]] = {
    "receiving": ("Receiving", "Images are coming, or more are expected."),
    "waiting": ("Waiting", "Waits for its turn, or for the patient's record."),
    "analysing": ("Analysing", "The network has it."),
    "sending": ("Sending", "Its report is on the way."),
    "failed": ("Failed", "Somebody must look."),
    "held": ("Held", "A person must decide whose it is."),
    "delivered": ("Delivered", "The last report is at every destination."),
    "excluded": ("Excluded", "No bundle takes it."),
    "lost": ("Lost", "No account has it: tell us, with synoptic status --ledger."),
}
JOBS: Final[Mapping[str, str]] = {
    "available": "waiting",
    "leased": "in hand",
    "completed": "done",
    "discarded": "given up",
    "cancelled": "cancelled",
}
KINDS: Final[Mapping[str, str]] = {
    "sr": "Structured Report",
    "seg": "Segmentation",
    "map": "Parametric Map",
    "summary": "Summary image",
    "pdf": "PDF",
    "gsps": "Presentation State",
    "keys": "Key images",
    "basic": "Basic Text report",
    "rejection": "Rejection note",
    "oru": "HL7 result",
    "fhir": "FHIR report",
    "notice": "Notice",
}
#: Event of a study's history → in words, and how grave: "" | "good" | "bad". Braces are its facts.
_EVENTS: Final[Mapping[str, tuple[str, str]]] = {
    "study.received": ("First image came from {calling_ae}", ""),
    "study.completed": ("Complete, images: {instances}; {cause}", ""),
    "study.reopened": ("A late image opened it again", ""),
    "study.renewed": ("New input, version {version}: {cause}", ""),
    "study.excluded": ("Excluded: {reason}", ""),
    "study.held": ("Held: {reason}", "bad"),
    "instance.quarantined": ("An image was quarantined: {reason}", "bad"),
    "document.received": ("A document came, {reason}", ""),
    "images.removed": ("Its files went under retention", ""),
    "images.returned": ("Its files came again", ""),
    "report.outdated": ("The record changed after the report: {reason}", "bad"),
    "report.cleared": ("The record agrees with the report again", ""),
    "infer.completed": ("Analysed by {bundle}", "good"),
    "infer.retried": ("Analysis by {bundle} failed, tried again: {reason}", "bad"),
    "infer.snoozed": ("Analysis by {bundle} waits: {reason}", ""),
    "infer.discarded": ("Analysis by {bundle} given up: {reason}", "bad"),
    "infer.cancelled": ("Analysis by {bundle} cancelled: {reason}", ""),
    "infer.rescued": ("A worker stopped in the analysis by {bundle}", "bad"),
    "infer.revived": ("Analyses put back, for their cause is gone: {jobs}", ""),
    "deliver.completed": ("{form} delivered to {destination}", "good"),
    "deliver.retried": ("{destination} did not take the {form}, tried again: {reason}", "bad"),
    "deliver.snoozed": ("{form} for {destination} waits: {reason}", ""),
    "deliver.discarded": ("{form} for {destination} given up: {reason}", "bad"),
    "deliver.cancelled": ("{form} for {destination} cancelled: {reason}", ""),
    "deliver.withdrawn": ("{by} withdrew {form} for {destination}", ""),
    "deliver.rescued": ("A worker stopped in the delivery to {destination}", "bad"),
    "deliver.reopened": ("To be sent to {destination} again: {reason}", "bad"),
    "commitment.committed": ("{destination} promised to keep it", "good"),
    "commitment.refused": ("{destination} does not keep it: {reason}", "bad"),
    "commitment.found": ("{destination} made no promise, but a query finds it", ""),
    "commitment.unproven": ("{destination} neither promised nor answered a query", "bad"),
    "operator.retried": ("{by} put jobs back: {jobs}", ""),
    "operator.cancelled": ("{by} cancelled jobs: {jobs}", ""),
    "operator.prioritized": ("{by} moved jobs to the front: {jobs}", ""),
    "finding.agreed": ("{by} agrees with “{finding}”: {verdict}", ""),
    "finding.corrected": ("{by} corrected “{finding}” to {verdict}", ""),
}
#: Facts that stand beside the words as they are.
_BESIDE: Final = ("attempt", "version", "delay_s", "failure")


class _Facts(dict[str, object]):
    def __missing__(self, key: str) -> str:
        return "An operator" if key == "by" else "?"


def event(name: str, facts: Mapping[str, object]) -> tuple[str, str, str]:
    """An event of a study's history in words; how grave it is; and what stands beside it."""
    sentence, tone = _EVENTS.get(name, (name, ""))
    given = _Facts({key: value for key, value in facts.items() if value not in ("", None)})
    given["form"] = KINDS.get(str(facts.get("document")), "Document")
    text = sentence.format_map(given).rstrip(": ")
    if facts.get("failure") and tone == "good":
        tone = "bad"
    beside = [f"{_FACT[key]} {facts[key]}{' s' if key == 'delay_s' else ''}" for key in _BESIDE if facts.get(key) not in ("", None)]
    return text, tone, " · ".join(beside)


_FACT: Final = {"attempt": "attempt", "version": "version", "delay_s": "after", "failure": "reported that it could not be analysed:"}


def person(name: str) -> str:
    """A DICOM person name (PS3.5 §6.2.1) as people write it: "Doe, Jane"; the ideographic group follows in brackets."""
    groups = [group for group in (_group(part) for part in name.split("=")[:2]) if group]
    return f"{groups[0]} ({groups[1]})" if len(groups) > 1 else groups[0] if groups else "No name"


def _group(text: str) -> str:
    family, given, middle, prefix, suffix, *_ = (*(part.strip() for part in text.split("^")), "", "", "", "", "")
    return ", ".join(filter(None, (family, " ".join(filter(None, (prefix, given, middle, suffix))))))


def day(text: str) -> str:
    """A DICOM date as 1971-01-31; what is none stays as it is."""
    return f"{text[:4]}-{text[4:6]}-{text[6:8]}" if len(text) == 8 and text.isdecimal() else text


def age(born: str, on: datetime | None) -> str:
    """How old somebody born then was at a time: "54 y", "7 mo", "3 d"; '' where that is not known."""
    try:
        begin = datetime.strptime(born, "%Y%m%d").replace(tzinfo=UTC).date()
    except ValueError:
        return ""
    return _age(begin, on.date()) if on and on.year > 1900 and on.date() >= begin else ""


def _age(begin: date, end: date) -> str:
    months = (end.year - begin.year) * 12 + end.month - begin.month - (end.day < begin.day)
    return f"{months // 12} y" if months >= 24 else f"{months} mo" if months else f"{(end - begin).days} d"


def at(when: datetime | None, zone: tzinfo, style: str = "minutes") -> str:
    """A time in the site's zone; '' for none, or for a study without a date."""
    if when is None or when.year <= 1900:
        return ""
    try:
        there = when.astimezone(zone)
    except OverflowError:  # a scanner whose clock is at the end of the calendar
        return ""
    return f"{there:%Y-%m-%d %H:%M:%S}" if style == "seconds" else f"{there:%H:%M:%S}" if style == "clock" else f"{there:%Y-%m-%d %H:%M}"


def dicom_time(text: str) -> str:
    """A DICOM DT (PS3.5 §6.2) as 2024-01-01 06:30, in the zone it is written in."""
    return f"{day(text[:8])} {text[8:10]}:{text[10:12]}" if len(text) >= 12 and text[:12].isdecimal() else text


def lasted(seconds: float) -> str:
    """A duration: "0.4 s", "12 s", "3 min", "5 h", "2 d"."""
    if not seconds:
        return "0"
    for limit, unit, of in ((60, "s", 1), (3600, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / of:.1f} {unit}" if seconds / of < 10 and unit == "s" else f"{seconds / of:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def ago(span: timedelta) -> str:
    """How long ago, as "3 min ago"."""
    return f"{lasted(max(0.0, span.total_seconds()))} ago"


def percent(value: float) -> str:
    """A probability: "73 %", "0.4 %", "> 99.9 %"."""
    share = 100 * value
    if 0 < share < 0.1 or 99.9 < share < 100:
        return "< 0.1 %" if share < 50 else "> 99.9 %"
    return f"{share:.0f} %" if 10 <= share <= 90 else f"{share:.1f} %"


def plural(count: int, one: str, several: str = "") -> str:
    """A number with its noun: "1 job", "3 jobs"."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def ending(name: str, facts: Mapping[str, Any]) -> str:
    """What an action did, for the page after it."""
    count = int(facts.get("jobs", 0))
    if not count:
        return {
            "retry": "Nothing to retry: no job is given up, cancelled or waiting.",
            "cancel": "Nothing to cancel: no job is unfinished.",
            "prioritize": "Nothing to move: no unfinished job is behind.",
        }.get(name, "")
    done = {"retry": "put back", "cancel": "cancelled", "prioritize": "moved to the front"}.get(name, "changed")
    return f"{plural(count, 'job')} {done}."
