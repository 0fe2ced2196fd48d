"""One study, from leased job to queued delivery. Read this file first.

::

    lease → gather → load → predict → explain → report → settle

A `Case` walks the line. Each stage fills its fields and touches nothing else. A stage that fails leaves
its error on the case; later stages pass it by. What becomes of it is decided once, in `settle`, by the
branch of the error tree it sits on (errors.py). `Unanalysable` is not the end: a report says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Final

from models.bundle import Bundle
from worker import __version__, checks, events, joining
from worker.case import Case, Line
from worker.domain import Code, Finding, Inputs, Instance, Job, Study, Volume
from worker.errors import (
    NoSuitableSeries,
    OutsideIntendedUse,
    PatientAmbiguous,
    PatientConflict,
    PeerRefused,
    RecordError,
    RecordIncomplete,
    Retry,
    Snooze,
    StoredFileLost,
    Superseded,
    Unanalysable,
)
from worker.fingerprint import code_digest, digest
from worker.imaging import volume
from worker.imaging.decoding import DecoderPool
from worker.infer import places
from worker.inputs import select_inputs
from worker.ops.log import places as places_of
from worker.report import forms
from worker.report.content import Algorithm
from worker.report.result import result_of
from worker.selection import takes
from worker.settling import is_repeated, settle
from worker.store import documents, studies

__all__ = ["Case", "Line", "Stage", "each", "explain", "gather", "load", "load_images", "process", "report", "settle", "together"]

#: How soon to look again at a study that was opened again by a late image.
REOPENED_S: Final = 1.0


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
    # Who is known to be too young need not wait for the record either; of whom it may still tell, it is asked below.
    if reason := checks.patient(study, record, inputs.series.values(), replace(model.bundle.patients, unknown="accept")):
        return replace(case, inputs=inputs, error=OutsideIntendedUse(reason))
    if pending := joining.pending(study, record, inputs, model.bundle.record, now=line.clock(), trouble=trouble):
        return replace(case, error=pending)  # not raised: the verdict needs to know of what record
    case = replace(case, inputs=inputs)
    if reason := checks.patient(study, record, inputs.series.values(), model.bundle.patients):
        return replace(case, error=OutsideIntendedUse(reason))
    reason = joining.incomplete(inputs, model.bundle.record)
    return replace(case, error=RecordIncomplete(reason)) if reason else _recognized(line, case, inputs)


def _recognized(line: Line, case: Case, inputs: Inputs) -> Case:
    """Spare the network what it answered already; of series that it read in part the digest is another, and is known only then."""
    if case.predecessor is None:
        return case
    instances = {(i.sop_instance_uid, i.sha256) for one in inputs.series.values() for i in one.instances}
    case = replace(case, input_sha256=digest(line.models[case.job.bundle].digest, inputs, sorted(instances), ""))
    with line.store.read() as conn:
        return replace(case, is_repeated=is_repeated(conn, case))


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
    _check_kept(i for one in case.inputs.series.values() for i in one.instances)
    read = load_images(model.bundle, case.inputs, line.decoders)
    return replace(case, prepared=model.prepare(read, case.inputs), places=places(model.bundle, read))


def _check_kept(instances: Iterable[Instance]) -> None:
    if gone := sum(one.is_removed for one in instances):
        raise StoredFileLost(f"{gone} of the images were removed under [retention]: have the study sent again, then retry it.")


def load_images(bundle: Bundle, inputs: Inputs, pool: DecoderPool) -> dict[str, Volume]:
    """The chosen series as volumes or radiographs, by image name."""
    return {
        spec.name: volume.load(
            inputs.series[spec.name],
            kind=spec.kind,
            pool=pool,
            views=spec.views,
            laterality=spec.laterality,
            gantry_tilt=spec.gantry_tilt,
            stack=spec.stack,
            color=spec.color,
            unit=spec.unit,
        )
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
    """Author the documents: the findings, or why there are none, in each form that a destination wants."""
    assert case.study is not None  # noqa: S101  gather filled it
    model, study = line.models[case.job.bundle], case.study
    bundle = model.bundle
    failure = str(case.error) if case.error is not None else ""
    # Without a chosen series all that the bundle could have taken was looked at, never a report of our own that came back.
    if case.inputs:
        looked_at = list(case.inputs.series.values())  # two images may be of one series, but no instance serves both
    else:
        looked_at = [s for s in study.series if any(takes(image.modalities, s.modality) for image in bundle.images)]
    # A volume may leave localizers out.
    loaded = {uid for place in case.places.values() for uid in place.sop_instance_uids}
    analysed = tuple(i for s in looked_at for i in s.instances if not loaded or i.sop_instance_uid in loaded)
    _check_kept(analysed)  # where nothing was loaded
    input_sha256 = digest(model.digest, case.inputs, [(i.sop_instance_uid, i.sha256) for i in analysed], failure)
    algorithm = Algorithm(
        name=model.name,
        version=model.version,
        title=bundle.title,
        bundle_sha256=model.digest,
        weights_sha256=bundle.weights.sha256,
        input_sha256=input_sha256,
        code_version=__version__,
        code_sha256=code_digest(),
        procedure=Code(bundle.procedure.value, bundle.procedure.scheme, bundle.procedure.meaning),
        quality_statement=bundle.quality_statement,
        research_use=bundle.research_use,
    )
    result = result_of(
        study,
        algorithm=algorithm,
        evidence=[i.path for i in analysed],
        inputs=case.inputs,
        findings=case.findings,
        analysed_at=case.job.started_at,
        failure=failure,
        predecessor=case.predecessor,
        zone=line.zone,
        planes={name: tuple(zip(one.sop_instance_uids, one.frame_numbers, strict=True)) for name, one in case.places.items()},
        decoders=line.decoders,
    )
    *companions, root = forms.author(result, line.kinds)
    return replace(case, report=root, companions=tuple(companions), input_sha256=input_sha256)
