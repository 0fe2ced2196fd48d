"""The closed list of things that happen, and the one way to say that one did.

Logs and metrics listen (ops/); nobody calls them. Rows of the ``event`` table, which
``synoptic show`` prints, are written by the store in the transaction they speak of.
Facts are numbers, states, codes and reasons: never a name, a birth date or a patient ID.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

NAMES: Final = frozenset(
    {
        "association.closed",  # one canonical line per association
        "association.rejected",
        "instance.refused",  # a C-STORE status other than 0x0000
        "instance.quarantined",  # same UID, other bytes
        "message.accepted",  # one line per HL7 message
        "message.refused",
        "feed.silent",  # once a silence
        "feed.heard",
        "study.completed",
        "study.excluded",
        "study.reopened",
        "job.completed",  # one canonical line per attempt, whatever the verdict
        "job.snoozed",
        "job.retried",
        "job.discarded",
        "job.cancelled",
        "job.rescued",
        "job.fenced",  # a late owner's verdict was turned away
        "heartbeat.died",  # leases are renewed no more: the process stops after the work in hand
        "commitment.given",  # an archive promised to keep a document
        "commitment.denied",  # it did not, and the document is sent again
        "commitment.missing",  # no report in time; a query found the document, or was not answered
        "commitment.turned_away",  # a report that changed nothing: a stranger's, of an unknown transaction, not to be read
        "commitment.promised",  # a sender took our report on what it asked us to keep
        "commitment.unreported",  # it did not: at the first try, and when it is given up
        "report.outdated",  # the record changed after it
        "record.expired",  # retention
        "images.removed",  # retention
        "document.failed",  # one form of a result could not be written: the root report is sent without it, its deliveries are dead letters
        "explanation.failed",  # the findings are reported all the same
        "glyphs.missing",  # no font here has some characters of a summary page; it says so itself
        "spool.swept",
        "file.damaged",  # found by reading it again, once each time round
        "destination.down",  # not reached several times in a row: left alone between tries
        "destination.reached",
        "certificate.expires",  # once a day, from 30 days before
        "certificate.reloaded",
        "certificate.unusable",  # a new file cannot be used; what was loaded before stays
        "codec.missing",  # at start: a decoder cannot be loaded, and its transfer syntaxes are not offered
        "host.exposed",  # at start: root, or a secret that every user can read
        "role.started",
        "role.stopped",
        "role.restarted",
        "sweep.failed",
        "page.failed",  # a fault of ours while a page was made
        "audit.failed",  # the trail cannot be written: what happens goes unrecorded, and is counted
        "audit.unsent",  # the repository is lost; the trail keeps what it will be sent
        "audit.sent",  # it is back
        "audit.dropped",  # the trail is full: its oldest day went, perhaps before it was sent
        "clock.jumped",  # by a minute and more; nothing is removed for its age for a day
    }
)

Listener = Callable[[str, dict[str, object]], None]
_listeners: list[Listener] = []


def listen(listener: Listener) -> None:
    """Call `listener(name, facts)` for everything that happens from now on."""
    _listeners.append(listener)


def unlisten(listener: Listener) -> None:
    """Stop calling `listener`."""
    _listeners.remove(listener)


def emit(name: str, **facts: object) -> None:
    """Say that `name` happened. Unknown names are a bug of ours and raise at once."""
    if name not in NAMES:
        raise ValueError(f"Unknown event {name!r}: add it to worker.events.NAMES.")
    for listener in tuple(_listeners):
        listener(name, facts)
