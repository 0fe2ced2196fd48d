"""A report rests on a record that may change: a late or corrected value, a merge, its undoing. What then becomes of the study.

::

    records.apply marks the patient's complete studies ─▶ sweep: would the bundle now be given something else?
        no  ─▶ nothing
        yes ─▶ a line in the study's history and, by policy, a new input version: its report names the old one as its predecessor

Needs no torch: only what the network would be given is compared, by its hash.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta

from worker import events
from worker.domain import Study
from worker.errors import NoSuitableSeries
from worker.fingerprint import record_digest
from worker.inputs import Spec, select_inputs
from worker.store import documents, history, queue, records, studies
from worker.store.database import Connection, Store

_UNFINISHED = frozenset({"available", "leased"})


def sweep(store: Store, specs: Mapping[str, Spec], *, within: timedelta, is_wanted: bool, now: datetime) -> int:
    """Look at every study whose record changed since it was complete; returns how many get a new version.

    Parameters
    ----------
    specs
        What each bundle asks for, by its name.
    within
        How long after a study was complete a change still counts; older reports stay as they are, and their history says so.
    is_wanted
        Whether reports are made anew; else the history alone says that they rest on another record.
    """
    with store.read() as conn:
        pending = studies.record_changed(conn)
    return sum(_look(store, study_id, changed_at, specs, within=within, is_wanted=is_wanted, now=now) for study_id, changed_at in pending)


def _look(
    store: Store, study_id: int, changed_at: datetime, specs: Mapping[str, Spec], *, within: timedelta, is_wanted: bool, now: datetime
) -> bool:
    with store.begin() as conn:
        study = studies.load(conn, study_id)
        jobs = queue.of_version(conn, study_id, input_version=study.version)
        if any(job.state in _UNFINISHED for job in jobs):
            return False  # it is not known yet what the report will rest on
        studies.note_record_seen(conn, study_id, changed_at=changed_at)
        if not study.is_complete:
            return False  # the next version is on its way
        changed = sorted(_outdated(conn, study_id, study, specs))
        if not changed:
            return False
        is_late = study.completed_at is None or now - study.completed_at > within
        is_renewed = is_wanted and not is_late
        history.note(conn, study_id, name="report.outdated", now=now, version=study.version, bundles=changed, is_renewed=is_renewed)
        if is_renewed:
            version = studies.new_version(conn, study_id, now=now, cause="the patient's record changed")
            for job in jobs:
                if job.bundle in specs:
                    queue.enqueue_infer(
                        conn, study_id, bundle=job.bundle, input_version=version, priority=min(j.priority for j in jobs), now=now
                    )
    events.emit("report.outdated", study=study_id, version=study.version, bundles=changed, is_renewed=is_renewed)
    return is_renewed


def _outdated(conn: Connection, study_id: int, study: Study, specs: Mapping[str, Spec]) -> list[str]:
    """The bundles whose last report rests on another record than there is now."""
    made_of = documents.record_digests(conn, study_id, input_version=study.version)
    return [bundle for bundle, before in made_of.items() if bundle in specs and _now(conn, study, specs[bundle]) != before]


def _now(conn: Connection, study: Study, spec: Spec) -> str:
    record = records.view(conn, study.patient.key, as_of=study.study_at + timedelta(hours=spec.record.horizon_h))
    try:
        return record_digest(select_inputs(study, record, spec))
    except NoSuitableSeries:
        return ""
