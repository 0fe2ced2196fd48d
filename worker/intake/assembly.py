"""When is a study complete? DICOM has no word for it, so three signs are taken, in order of trust.

::

    the sender's own count (C-FIND NumberOfStudyRelatedInstances) is reached   → at once
    quiet for the modality's period, and what a bundle needs is there          → at the period's end
    quiet, but a bundle's modality is there and too few of it                  → after the limit

A study with no series that any bundle takes is excluded by rule, in words. A late image opens the
study again (store/studies.py); it completes again as a new input version. The sweeps are idempotent:
the study's row and its jobs are written in one transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from worker import events
from worker.selection import holds_image, is_capture, takes
from worker.store import history, queue, records, studies
from worker.store.database import Store
from worker.store.studies import Pending


@dataclass(frozen=True, slots=True)
class Wants:
    """What a bundle needs before it can run; without `modalities`, of any that has images."""

    bundle: str
    modalities: frozenset[str]
    min_instances: int = 1
    takes_captures: bool = False

    def images(self, pending: Pending) -> int:
        """How many of the study's images this bundle may be for; reports, raw data and the like are none."""
        return sum(
            count
            for (modality, sop_class_uid), count in pending.classes.items()
            if takes(self.modalities, modality) and holds_image(sop_class_uid) and (self.takes_captures or not is_capture(sop_class_uid))
        )

    def takes(self, pending: Pending) -> bool:
        """Whether the study has anything for this bundle."""
        return self.images(pending) > 0

    def is_met(self, pending: Pending) -> bool:
        """Whether it has enough."""
        return self.images(pending) >= self.min_instances


def sweep(store: Store, *, wants: Sequence[Wants], limit_s: float, now: datetime) -> int:
    """Complete what is complete; returns how many studies that were."""
    with store.read() as conn:
        pending = studies.receiving(conn)
    done = 0
    for one in pending:
        cause = _cause(one, wants=wants, limit_s=limit_s, now=now)
        if cause:
            done += _complete(store, one, wants=wants, cause=cause, now=now)
    return done


def _cause(one: Pending, *, wants: Sequence[Wants], limit_s: float, now: datetime) -> str:
    # An answer older than the last image says nothing of the images that are still on their way.
    is_fresh = one.asked_at is not None and one.asked_at >= one.last_received_at
    if is_fresh and one.expected_instances is not None and one.instances >= one.expected_instances:
        return f"the sender counts {one.expected_instances} instances"
    if now < one.quiet_until:
        return ""
    takers = [want for want in wants if want.takes(one)]
    if all(want.is_met(one) for want in takers):
        return "quiet period"
    if now >= one.last_received_at + timedelta(seconds=limit_s):
        return "limit for incomplete studies"
    return ""


def _complete(store: Store, one: Pending, *, wants: Sequence[Wants], cause: str, now: datetime) -> bool:
    takers = [want for want in wants if want.takes(one)]
    with store.begin() as conn:
        version = studies.complete(conn, one, cause=cause, now=now)
        if version is None:
            return False
        priority = records.priority_of(conn, one.patient, one.accession_number)
        for want in takers:
            queue.enqueue_infer(conn, one.id, bundle=want.bundle, input_version=version, priority=priority, now=now)
        reason = f"No bundle takes modality {'/'.join(sorted({modality for modality, _ in one.classes})) or 'none'}."
        if not one.classes:  # each came under the UID of an image that another study has
            reason = "No image of it was kept: each has the SOP Instance UID of an image of another study, and is in quarantine."
        elif not any(holds_image(sop_class_uid) and not is_capture(sop_class_uid) for _, sop_class_uid in one.classes):
            reason += " It holds reports, raw data or captures alone."
        if not takers:
            history.note(conn, one.id, name="study.excluded", now=now, reason=reason)
    if takers:
        events.emit("study.completed", study=one.id, version=version, instances=one.instances, cause=cause)
    else:
        events.emit("study.excluded", study=one.id, reason=reason)
    return True


def ask_senders(store: Store, *, ask: Callable[[Pending], int | None], after_s: float, now: datetime) -> None:
    """Ask each sender once after its last image how many instances the study has.

    `ask` returns None if the sender is not one we may ask, or does not know.
    """
    with store.read() as conn:
        pending = studies.receiving(conn)
    for one in pending:
        is_fresh = now < one.last_received_at + timedelta(seconds=after_s)
        if is_fresh or (one.asked_at is not None and one.asked_at >= one.last_received_at):
            continue
        expected = ask(one)
        with store.begin() as conn:
            studies.note_expected(conn, one.id, expected=expected, now=now)
