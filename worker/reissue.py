"""A report rests on a record that may change: a late or corrected value, a merge, its undoing. What then becomes of the study.

::

    records.apply marks the patient's studies ─▶ sweep: whose study is it now, and would the bundle be given something else?
        nobody can say      ─▶ a line in the study's history: its reports may be another person's
        it can be said now  ─▶ analyses that were discarded for that are put back
        something else      ─▶ a line and, by policy, a new input version: its report names the old one as its predecessor

Needs no torch: only what the network would be given is compared, by its hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from models.spec import RecordRule
from worker import events, joining
from worker.domain import ROUTINE, PatientRecord, Study
from worker.errors import NoSuitableSeries, PatientConflict, WorkerError
from worker.fingerprint import record_digest
from worker.inputs import Spec, select_inputs
from worker.ops.log import places
from worker.store import documents, history, queue, studies
from worker.store.database import Connection, Store
from worker.store.schema import AnyRow

_UNFINISHED = frozenset({"available", "leased"})
#: Whose a record is can be asked without any fact of it.
_NOTHING = RecordRule(wait_s=0.0, look_back_h=0.0)
_CHANGED = "The patient's record changed."


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What a changed record means for one version of a study.

    ``outdated`` are the bundles whose last report rests on another record, ``cause`` says why, ``record`` is a hash of what it
    would rest on now; ``stopped`` are the bundles whose analysis was discarded for a doubt that is gone; ``is_cleared`` says that
    the study's history tells of one.
    """

    outdated: tuple[str, ...] = ()
    cause: str = ""
    record: str = ""
    stopped: tuple[str, ...] = ()
    is_renewed: bool = False
    is_cleared: bool = False


def sweep(
    store: Store,
    specs: Mapping[str, Spec],
    *,
    within: timedelta,
    is_wanted: bool,
    now: datetime,
    must_agree: Sequence[str] = joining.MUST_AGREE,
) -> int:
    """Look at every complete study whose record changed; returns how many get a new version. What one study does harms no other.

    Parameters
    ----------
    specs
        What each bundle asks for, by its name.
    within
        How long after a study was complete a change still counts; older reports stay as they are, and their history says so, once.
    is_wanted
        Whether reports are made anew; else the history alone says that they rest on another record.
    must_agree
        What images and record may not contradict each other in.
    """
    with store.read() as conn:
        pending = studies.record_changed(conn)
    renewed = 0
    for study_id, changed_at in pending:
        try:
            renewed += _look(store, study_id, changed_at, specs, within=within, is_wanted=is_wanted, now=now, must_agree=must_agree)
        except Exception as exc:  # noqa: BLE001  the study stays marked, and the others have their turn
            reason = str(exc) if isinstance(exc, WorkerError) else type(exc).__name__
            events.emit("sweep.failed", sweep="renew", study=study_id, reason=reason, places=places(exc))
    return renewed


def anew(conn: Connection, study_id: int, *, bundles: Collection[str], now: datetime) -> int:
    """Queue the analyses of a study again, of those of `bundles` that have one; returns how many.

    A bundle that is, with its input, that of its last report sends nothing. What is unfinished of the version before gives way to this one.
    """
    _, version = studies.standing(conn, study_id)
    jobs = [job for job in queue.of_version(conn, study_id, input_version=version) if job.bundle in bundles]
    if jobs:
        version = studies.new_version(conn, study_id, now=now, cause="An operator asked for it.")
    for job in jobs:
        queue.enqueue_infer(conn, study_id, bundle=job.bundle, input_version=version, priority=job.priority, now=now)
    return len(jobs)


def _look(
    store: Store,
    study_id: int,
    changed_at: datetime,
    specs: Mapping[str, Spec],
    *,
    within: timedelta,
    is_wanted: bool,
    now: datetime,
    must_agree: Sequence[str],
) -> bool:
    with store.read() as conn:  # a long view must hold up nobody who writes
        study = studies.load(conn, study_id)
        jobs = queue.of_version(conn, study_id, input_version=study.version)
        if any(job.state in _UNFINISHED for job in jobs):
            return False  # it is not known yet what the report will rest on
        is_late = study.completed_at is None or now - study.completed_at > within
        # Without its images nothing can be made anew.
        is_late = is_late or any(one.is_removed for part in study.series for one in part.instances)
        found = _judged(conn, study_id, study, jobs, specs, is_late=is_late, is_wanted=is_wanted, must_agree=must_agree)
    with store.begin() as conn:
        if not studies.note_record_seen(conn, study_id, changed_at=changed_at, version=study.version):
            return False
        _carry_out(conn, study_id, study.version, jobs, found, bundles=specs, now=now)
    if found.outdated:
        said = {"bundles": list(found.outdated), "is_renewed": found.is_renewed, "cause": found.cause}
        events.emit("report.outdated", study=study_id, version=study.version, **said)
    return found.is_renewed


def _carry_out(
    conn: Connection, study_id: int, version: int, jobs: Sequence[AnyRow], found: _Verdict, *, bundles: Collection[str], now: datetime
) -> None:
    if found.is_cleared:
        history.note(conn, study_id, name="report.cleared", now=now, version=version)
    if found.outdated:
        said = {"bundles": list(found.outdated), "is_renewed": found.is_renewed, "cause": found.cause, "record": found.record}
        history.note(conn, study_id, name="report.outdated", now=now, version=version, **said)
    if found.is_renewed:
        made = studies.new_version(conn, study_id, now=now, cause=found.cause)
        urgency = min((job.priority for job in jobs), default=ROUTINE)
        for bundle in {*found.outdated, *(job.bundle for job in jobs)} & {*bundles}:
            queue.enqueue_infer(conn, study_id, bundle=bundle, input_version=made, priority=urgency, now=now)
    elif found.stopped:
        queue.revive(conn, study_id, input_version=version, bundles=found.stopped, now=now)


def _judged(
    conn: Connection,
    study_id: int,
    study: Study,
    jobs: Sequence[AnyRow],
    specs: Mapping[str, Spec],
    *,
    is_late: bool,
    is_wanted: bool,
    must_agree: Sequence[str],
) -> _Verdict:
    past = history.of_study(conn, study_id)
    noted = next((one.facts for one in reversed(past) if one.name in {"report.outdated", "report.cleared"}), {})
    stopped = tuple(
        job.bundle
        for job in jobs
        if job.state == "discarded" and history.is_discarded_for(past, PatientConflict, bundle=job.bundle, version=study.version)
    )

    def view(rule: RecordRule) -> PatientRecord | None:
        return joining.record_of(conn, study, rule, must_agree=must_agree)

    doubt = joining.doubt(conn, study, view(_NOTHING), must_agree=must_agree)
    is_cleared = not doubt and noted.get("cause", _CHANGED) != _CHANGED
    if is_late and noted.get("cause") == _CHANGED and noted.get("version") == study.version and not (doubt or stopped):
        return _Verdict()  # its history says so already, and nothing more will be done
    made_of = documents.record_digests(conn, study_id)
    if doubt:
        changed, stopped = dict.fromkeys(made_of, doubt), ()
    else:
        compared = {bundle: (before, _now(study, view, specs[bundle])) for bundle, before in made_of.items() if bundle in specs}
        changed = {bundle: after for bundle, (before, after) in compared.items() if before is not None and after != before}
    record = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:16]
    # A report that never came of the last renewal would else be asked for again with every message.
    is_answered = noted.get("version") != study.version and all(job.state == "completed" for job in jobs)
    if not changed or (noted.get("record") == record and not is_answered):
        return _Verdict(stopped=stopped, is_cleared=is_cleared)
    is_renewed = is_wanted and not is_late and not doubt
    return _Verdict(tuple(sorted(changed)), doubt or _CHANGED, record, stopped, is_renewed=is_renewed, is_cleared=is_cleared)


def _now(study: Study, view: Callable[[RecordRule], PatientRecord | None], spec: Spec) -> str:
    try:
        return record_digest(select_inputs(study, view(spec.record), spec))
    except NoSuitableSeries:
        return ""
