"""The end of the line: one verdict a case, in one transaction (commit 4).

::

    case ─▶ last look: did study or patient change meanwhile? ─▶ report, findings, deliveries and the job's completion, or a verdict

Not here: the stages before it (pipeline.py).
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from datetime import datetime
from typing import Final

from worker import events, joining
from worker.case import Case, Line
from worker.domain import STAT
from worker.errors import (
    PatientConflict,
    RecordPending,
    Reject,
    Retry,
    Snooze,
    Superseded,
    Unanalysable,
    WorkerError,
)
from worker.fingerprint import record_digest
from worker.ops import audit
from worker.ops.log import places as places_of
from worker.store import documents, queue, records, studies
from worker.store.database import Connection


def settle(line: Line, case: Case) -> Case:
    """Give the verdict in one transaction (commit 4): report, findings, deliveries and the job, or none of them."""
    started = time.perf_counter()
    facts: dict[str, object] = {}
    try:
        try:
            name = _settle(line, case, facts)
        except WorkerError:
            raise
        except Exception as exc:  # noqa: BLE001  what the database refuses of one study is that job's verdict, not the end of the process
            case, facts = replace(case, error=exc), {}
            name = _settle(line, case, facts)
    except queue.LeaseLost:
        name = "job.fenced"
    seconds = {**case.seconds, "settle": time.perf_counter() - started}
    job = case.job
    events.emit(
        name,
        kind=job.kind,
        job=job.id,
        study=job.study_id,
        bundle=job.bundle,
        version=job.input_version,
        attempt=job.attempt,
        seconds={stage: round(taken, 3) for stage, taken in seconds.items()},
        **facts,
    )
    if name in _OUTCOMES:
        _audit(case, _OUTCOMES[name], str(facts.get("reason", "")))
    return replace(case, seconds=seconds)


#: What was only put off analysed nothing.
_OUTCOMES: Final = {"job.completed": audit.SUCCESS, "job.retried": audit.AGAIN, "job.discarded": audit.FAILED}


def _audit(case: Case, outcome: str, reason: str) -> None:
    study, inputs = case.study, case.inputs
    if study is None:
        return
    read = Counter(one.sop_class_uid for series in (inputs.series.values() if inputs else ()) for one in series.instances)
    subject = audit.Subject(study.study_instance_uid, study.patient, study.accession_number, read)
    if inputs is not None and inputs.record_found:
        audit.record("R", [study.patient], outcome=audit.SUCCESS, user=case.job.bundle)
    # A report that says why there is no answer is a failure of the analysis, told once.
    audit.accessed(subject, user=case.job.bundle, outcome=audit.FAILED if reason and outcome == audit.SUCCESS else outcome, reason=reason)


def _settle(line: Line, case: Case, facts: dict[str, object]) -> str:
    now = line.clock()
    with line.store.begin() as conn:
        error = _last_look(conn, line, case)
        if error is None and case.is_repeated and not is_repeated(conn, case):
            error = Snooze("The last report is another one by now.", delay_s=0.0)
        if error is not None:
            facts["reason"] = str(error) if isinstance(error, WorkerError) else type(error).__name__
        if (case.report is not None or case.is_repeated) and (error is None or isinstance(error, Unanalysable)):
            if not _file(conn, line, case, failure=str(error or ""), now=now):
                facts["is_repeated"] = True
            return "job.completed"
        return _verdict(conn, case, error or RuntimeError("no report and no error"), facts, now=now)


def _last_look(conn: Connection, line: Line, case: Case) -> Exception | None:
    """What happened to the study and its patient while we worked outweighs what came of the work."""
    hold, version = studies.standing(conn, case.job.study_id)
    if hold:
        return PatientConflict(hold)
    if version > case.job.input_version:
        return Superseded(f"Version {version} of the study is queued.")
    if case.study is None or not (case.error is None or isinstance(case.error, Unanalysable)):
        return case.error
    doubt = joining.ambiguous(case.study, records.issuers_of(conn, case.study.patient.key.patient_id))
    if not doubt and _has_moved(conn, case):
        rule = line.models[case.job.bundle].bundle.record
        record = joining.record_of(conn, case.study, rule, must_agree=line.must_agree)
        doubt = joining.doubt(conn, case.study, record, must_agree=line.must_agree)
    if doubt:
        return PatientConflict(doubt)
    if case.inputs is not None and records.stamp_of(conn, case.study.patient.key) != case.stamp:
        return Snooze("The patient was merged with another, or parted, while the study was analysed.", delay_s=0.0)
    return case.error


def _has_moved(conn: Connection, case: Case) -> bool:
    """Whether the patient's record changed since we looked."""
    return studies.record_changed_at(conn, case.job.study_id) != case.record_changed_at


def _file(conn: Connection, line: Line, case: Case, *, failure: str, now: datetime) -> bool:
    """The outbox: report, findings and deliveries with the job's completion; False if the last report says it all already."""
    job = case.job
    if is_repeated(conn, case):
        queue.complete(conn, job, now=now, findings=_summary(case), failure=failure, is_repeated=True)
        return False
    assert case.report is not None  # noqa: S101  asked by the caller
    priority = STAT if any(finding.is_alarming for finding in case.findings) else job.priority
    # The root report last: what it refers to goes before it.
    for document in (*case.companions, case.report):
        document_id = documents.add(
            conn,
            job,
            report=document,
            findings=case.findings if document is case.report else (),
            input_sha256=case.input_sha256,
            record_sha256=record_digest(case.inputs),
            failure=failure,
            now=now,
        )
        for destination, kinds in line.destinations.items():
            if document.kind not in kinds:
                continue
            queue.enqueue_deliver(
                conn,
                job.study_id,
                document_id=document_id,
                bundle=job.bundle,
                input_version=job.input_version,
                destination=destination,
                priority=priority,
                now=now,
            )
    queue.complete(conn, job, now=now, findings=_summary(case), failure=failure)
    return True


def _verdict(conn: Connection, case: Case, error: Exception, facts: dict[str, object], *, now: datetime) -> str:
    job = case.job
    match error:
        case Superseded():
            queue.cancel(conn, job, reason=str(error), now=now)
            return "job.cancelled"
        case Snooze():
            # The record, or what was lacking in it, may have come between our look and now; nobody would wake us then.
            is_known = isinstance(error, RecordPending) and case.study is not None and records.is_known(conn, case.study.patient.key)
            is_here = is_known or (case.study is not None and _has_moved(conn, case))
            queue.snooze(conn, job, delay_s=0.0 if is_here else error.delay_s, reason=str(error), now=now)
            return "job.snoozed"
        case Reject():
            queue.discard(conn, job, error=error, now=now)
            return "job.discarded"
    if not isinstance(error, Retry):
        facts["places"] = places_of(error)
    return "job.retried" if queue.retry(conn, job, error=error, now=now) else "job.discarded"


def _summary(case: Case) -> dict[str, float]:
    return {finding.name: round(finding.probability, 4) for finding in case.findings}


def is_repeated(conn: Connection, case: Case) -> bool:
    """Whether the bundle's last report on the study rests on this very input."""
    job = case.job
    return documents.is_repeated(conn, job.study_id, bundle=job.bundle, before_version=job.input_version, input_sha256=case.input_sha256)
