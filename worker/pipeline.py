"""One study, from leased job to queued delivery. Read this file first.

::

    lease → gather → load → predict → explain → report → settle

A `Case` walks the line. Each stage fills its fields and touches nothing else. A stage that fails leaves
its error on the case; later stages pass it by. What becomes of it is decided once, in `settle`, by the
branch of the error tree it sits on (errors.py). `Unanalysable` is not the end: a report says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Final

from models.bundle import Bundle
from worker import __version__, events, joining, volume
from worker.decoding import DecoderPool
from worker.domain import Code, Document, Finding, Inputs, Job, PatientKey, Study, Volume
from worker.errors import (
    NoSuitableSeries,
    PatientAmbiguous,
    PatientConflict,
    PeerRefused,
    RecordError,
    RecordIncomplete,
    RecordPending,
    Reject,
    Retry,
    Snooze,
    Superseded,
    Unanalysable,
    WorkerError,
)
from worker.fingerprint import digest, record_digest
from worker.infer import Model, Place, Prepared, places
from worker.inputs import select_inputs, takes
from worker.ops.log import places as places_of
from worker.report.sr import Algorithm, build_report
from worker.store import documents, queue, records, studies
from worker.store.database import Connection, Store

#: How soon to look again at a study that was opened again by a late image.
REOPENED_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Line:
    """What the stages need: plain values and open doors, built once by the daemon."""

    store: Store
    models: Mapping[str, Model]
    decoders: DecoderPool
    destinations: tuple[str, ...]
    zone: tzinfo
    clock: Callable[[], datetime]
    #: Below which the instances' files lie.
    instances: Path = Path()
    #: What images and record may not contradict each other in.
    must_agree: tuple[str, ...] = joining.MUST_AGREE
    #: Brings a patient's record from where it is kept; raises Retry where that is away.
    pull: Callable[[PatientKey], None] | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """A job and what is known about it so far; ``seconds`` is what each stage took."""

    job: Job
    study: Study | None = None
    predecessor: Document | None = None
    inputs: Inputs | None = None
    prepared: Prepared | None = None
    #: What `prepared` was made of, by image name.
    places: Mapping[str, Place] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    report: Document | None = None
    input_sha256: str = ""
    #: Of the record's patient: who else they were known to be when we looked.
    stamp: str = ""
    #: When the record had last changed when we looked.
    record_changed_at: datetime | None = None
    #: What it would be made from is what the last report was made from: nothing is to be done.
    is_repeated: bool = False
    error: Exception | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


Stage = Callable[[Line, Case], Case]


def process(line: Line, jobs: Sequence[Job]) -> list[Case]:
    """Take leased jobs down the line together; settle each on its own."""
    cases = [Case(job) for job in jobs]
    cases = each(line, gather, cases)  # rows: study, record, what the network will be given
    cases = each(line, load, cases)  # files: one series → Volume, LPS mm → the network's tensors
    cases = together(line, cases)  # the network: one pass per bundle
    cases = each(line, explain, cases)  # why: each value's share, a map of each image
    cases = each(line, report, cases)  # SR: checked by building it
    return [settle(line, case) for case in cases]  # one transaction each


def each(line: Line, stage: Stage, cases: Iterable[Case]) -> list[Case]:
    """Run `stage` on every case that is still to be reported on; keep its error on the case it broke."""
    return [_guarded(line, stage, case) for case in cases]


def _guarded(line: Line, stage: Stage, case: Case) -> Case:
    if case.is_repeated or (case.error is not None and not (stage is report and isinstance(case.error, Unanalysable))):
        return case
    started = time.perf_counter()
    try:
        case = stage(line, case)
    except Exception as exc:  # noqa: BLE001  the verdict is given in settle()
        case = replace(case, error=exc)
    return replace(case, seconds={**case.seconds, stage.__name__: time.perf_counter() - started})


def gather(line: Line, case: Case) -> Case:
    """Join the study and the patient's record as of the study's time; choose the series and the values."""
    job, model = case.job, line.models[case.job.bundle]
    with line.store.read() as conn:
        study = studies.load(conn, job.study_id, root=line.instances)
    trouble = _pulled(line, study, model.bundle)
    with line.store.read() as conn:
        changed_at = studies.record_changed_at(conn, job.study_id)  # before the view: what comes between is looked at again
        record = joining.record_of(conn, study, model.bundle.record, must_agree=line.must_agree)
        doubt = joining.doubt(conn, study, record, must_agree=line.must_agree)
        earlier = documents.predecessor(conn, job.study_id, bundle=job.bundle, before_version=job.input_version)
    case = replace(case, study=study, predecessor=earlier, stamp=record.stamp if record else "", record_changed_at=changed_at)
    if doubt:
        raise PatientConflict(doubt)
    if not study.is_complete:
        raise Snooze("An image came after the study was complete; its series are being received.", delay_s=REOPENED_S)
    if study.version > job.input_version:
        raise Superseded(f"Version {study.version} of the study is queued.")
    try:
        inputs = select_inputs(study, record, model.bundle)
    except NoSuitableSeries as exc:  # no record would change that: the report need not wait for one
        return replace(case, error=exc)
    if pending := joining.pending(study, record, inputs, model.bundle.record, now=line.clock(), trouble=trouble):
        return replace(case, error=pending)  # not raised: the verdict needs to know of what record
    case = replace(case, inputs=inputs)
    reason = joining.incomplete(inputs, model.bundle.record)
    return replace(case, error=RecordIncomplete(reason)) if reason else _recognized(line, case, inputs)


def _recognized(line: Line, case: Case, inputs: Inputs) -> Case:
    """Spare the network what it answered already; of series that it read in part the digest is another, and is known only then."""
    if case.predecessor is None:
        return case
    instances = {(i.sop_instance_uid, i.sha256) for one in inputs.series.values() for i in one.instances}
    case = replace(case, input_sha256=digest(line.models[case.job.bundle].digest, inputs, sorted(instances), ""))
    with line.store.read() as conn:
        return replace(case, is_repeated=_is_repeated(conn, case))


def _is_repeated(conn: Connection, case: Case) -> bool:
    job = case.job
    return documents.is_repeated(conn, job.study_id, bundle=job.bundle, before_version=job.input_version, input_sha256=case.input_sha256)


def _pulled(line: Line, study: Study, bundle: Bundle) -> str:
    """Ask the site's FHIR server for the patient, if the bundle wants that; what is wrong with the answer, '' if nothing.

    A server that is away or answers nonsense costs the waiting time, not the study; only several patients are a conflict.
    """
    if not bundle.record.pull or line.pull is None or not study.patient.key.issuer:
        return ""
    try:
        line.pull(study.patient.key)
    except PatientAmbiguous as exc:
        raise PatientConflict(str(exc)) from exc
    except (Retry, PeerRefused, RecordError) as exc:
        return str(exc)
    return ""


def load(line: Line, case: Case) -> Case:
    """Read each chosen series into a regular volume or a radiograph, and those into tensors: a batch of volumes would fill the memory."""
    assert case.inputs is not None  # noqa: S101  gather filled it
    model = line.models[case.job.bundle]
    read = load_images(model.bundle, case.inputs, line.decoders)
    return replace(case, prepared=model.prepare(read, case.inputs), places=places(model.bundle, read))


def load_images(bundle: Bundle, inputs: Inputs, pool: DecoderPool) -> dict[str, Volume]:
    """The chosen series as volumes or radiographs, by image name."""
    return {
        spec.name: volume.load(inputs.series[spec.name], kind=spec.kind, views=spec.views, pool=pool)
        for spec in bundle.images
        if spec.name in inputs.series
    }


def together(line: Line, cases: Sequence[Case]) -> list[Case]:
    """Run each bundle's network once over all its cases."""
    done = list(cases)
    for bundle, model in line.models.items():
        started = time.perf_counter()
        ready = [
            (index, case.prepared)
            for index, case in enumerate(done)
            if case.job.bundle == bundle and case.error is None and case.prepared is not None
        ]
        if not ready:
            continue
        try:
            answers: Sequence[tuple[Finding, ...] | Exception] = model.predict([prepared for _, prepared in ready])
        except Exception as exc:  # noqa: BLE001  the verdict is given in settle()
            answers = [exc] * len(ready)
        share = (time.perf_counter() - started) / len(ready)
        for (index, _), answer in zip(ready, answers, strict=True):
            case = replace(done[index], seconds={**done[index].seconds, "predict": share})
            done[index] = replace(case, error=answer) if isinstance(answer, Exception) else replace(case, findings=answer)
    return done


def explain(line: Line, case: Case) -> Case:
    """Say what the findings rest on; a finding that cannot be explained is still reported."""
    assert case.prepared is not None  # noqa: S101  load filled it
    model = line.models[case.job.bundle]
    try:
        findings = model.explain(case.prepared, case.findings, case.places)
    except Exception as exc:  # noqa: BLE001  the findings stand without
        events.emit("explanation.failed", job=case.job.id, study=case.job.study_id, reason=type(exc).__name__, places=places_of(exc))
        findings = case.findings
    return replace(case, findings=findings, prepared=None)


def report(line: Line, case: Case) -> Case:
    """Author the report: the findings, or why there are none."""
    assert case.study is not None  # noqa: S101  gather filled it
    model, study = line.models[case.job.bundle], case.study
    bundle = model.bundle
    failure = str(case.error) if case.error is not None else ""
    # Without a chosen series all that the bundle could have taken was looked at, never a report of our own that came back.
    if case.inputs:
        # Two images may be of one series.
        looked_at = list({s.series_instance_uid: s for s in case.inputs.series.values()}.values())
    else:
        looked_at = [s for s in study.series if any(takes(image.modalities, s.modality) for image in bundle.images)]
    # A volume may leave localizers out.
    loaded = {uid for place in case.places.values() for uid in place.sop_instance_uids}
    analysed = tuple(i for s in looked_at for i in s.instances if not loaded or i.sop_instance_uid in loaded)
    input_sha256 = digest(model.digest, case.inputs, [(i.sop_instance_uid, i.sha256) for i in analysed], failure)
    algorithm = Algorithm(
        name=model.name,
        version=model.version,
        title=bundle.title,
        bundle_sha256=model.digest,
        weights_sha256=bundle.weights.sha256,
        input_sha256=input_sha256,
        code_version=__version__,
        procedure=Code(bundle.procedure.value, bundle.procedure.scheme, bundle.procedure.meaning),
        quality_statement=bundle.quality_statement,
        research_use=bundle.research_use,
    )
    document = build_report(
        study,
        algorithm=algorithm,
        evidence=[i.path for i in analysed],
        inputs=case.inputs,
        findings=case.findings,
        analysed_at=case.job.started_at,
        failure=failure,
        predecessor=case.predecessor,
        zone=line.zone,
    )
    return replace(case, report=document, input_sha256=input_sha256)


def settle(line: Line, case: Case) -> Case:
    """Give the verdict in one transaction (commit 4): report, findings, deliveries and the job, or none of them."""
    started = time.perf_counter()
    facts: dict[str, object] = {}
    try:
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
    return replace(case, seconds=seconds)


def _settle(line: Line, case: Case, facts: dict[str, object]) -> str:
    now = line.clock()
    with line.store.begin() as conn:
        error = _last_look(conn, line, case)
        if error is None and case.is_repeated and not _is_repeated(conn, case):
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
    if _is_repeated(conn, case):
        queue.complete(conn, job, now=now, findings=_summary(case), failure=failure, is_repeated=True)
        return False
    assert case.report is not None  # noqa: S101  asked by the caller
    document_id = documents.add(
        conn,
        job,
        report=case.report,
        findings=case.findings,
        input_sha256=case.input_sha256,
        record_sha256=record_digest(case.inputs),
        failure=failure,
        now=now,
    )
    for destination in line.destinations:
        queue.enqueue_deliver(
            conn,
            job.study_id,
            document_id=document_id,
            bundle=job.bundle,
            input_version=job.input_version,
            destination=destination,
            priority=job.priority,
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
