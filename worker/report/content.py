"""The content tree of a report: what is said, in TID 1500's shape.

::

    Imaging Measurement Report              TID 1500
    ├── language, device observer, procedure reported
    ├── Image Library                       TID 1600: what was analysed
    ├── Imaging Measurements
    │   ├── Measurement Group               TID 1501: one per finding
    │   └── Measurement Group               TID 1501: one per time and source of the record's values
    └── Qualitative Evaluations             outcome in words and code, intended use, quality, the record

Groups hold numbers and codes; whatever is a sentence stands in Qualitative Evaluations, the one place of
TID 1500 where PS3.16 lets a TEXT of any name be.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime, tzinfo
from itertools import groupby
from typing import Final

from highdicom import sr
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes as standard
from pydicom.sr.coding import Code as DicomCode
from pydicom.uid import UID, generate_uid
from pydicom.valuerep import DT

from worker.domain import Code, Finding, Inputs, Study, UsedText, UsedValue, Verdict
from worker.report import codes
from worker.report.codes import concept
from worker.report.evidence import Evidence

MANUFACTURER: Final = "Synoptic"
RESEARCH_STATEMENT: Final = "For research use only. Not for diagnosis."
CLINICAL_STATEMENT: Final = "Computed by an algorithm and not verified. A physician must judge the images."

ATYPICAL_STATEMENT: Final = "Unlike the studies the network learned from: nothing is called positive or negative."

_CONTAINS: Final = sr.RelationshipTypeValues.CONTAINS
_HAS_CONCEPT_MOD: Final = sr.RelationshipTypeValues.HAS_CONCEPT_MOD
_HAS_ACQ_CONTEXT: Final = sr.RelationshipTypeValues.HAS_ACQ_CONTEXT
_MODALITIES: Final = {code.value: code for code in standard.cid29.concepts.values()}


@dataclass(frozen=True, slots=True)
class Algorithm:
    """What authored the report: a bundle, down to its bytes.

    ``procedure`` is the imaging procedure that was analysed; where it is none of CID 100, Procedure Reported
    says "Imaging procedure" and Performed Procedure Code Sequence says which.
    """

    name: str
    version: str
    title: str
    bundle_sha256: str
    weights_sha256: str
    input_sha256: str
    code_version: str
    code_sha256: str
    procedure: Code
    quality_statement: str
    research_use: bool = True


@dataclass(frozen=True, slots=True)
class ReportUids:
    """The UIDs of a report, derived and not drawn: the same input makes the same object."""

    sop_instance_uid: str
    series_instance_uid: str
    device_uid: str


@dataclass(frozen=True, slots=True)
class Placed:
    """What a report says of where a finding has its place (places.py): parts of its measurement group."""

    sites: Sequence[sr.FindingSite] = ()
    measurements: Sequence[sr.Measurement] = ()
    items: Sequence[sr.ContentItem] = ()


def derive_uid(kind: str, *parts: str) -> str:
    """Derive the UID that `kind` and `parts` always have."""
    return str(generate_uid(entropy_srcs=[f"synoptic/{kind}", *(f"|{part}" for part in parts)]))


def tracking_uid(study: Study, algorithm: Algorithm, finding: Finding) -> str:
    """Derive the UID by which `finding` is tracked: it outlives a new version of the bundle, for it is still the same question."""
    return derive_uid("tracking", study.study_instance_uid, algorithm.name, finding.code.scheme, finding.code.value)


def versions(algorithm: Algorithm) -> list[str]:
    """Software Versions of what we author."""
    return [codes.short(algorithm.version), codes.short(f"code {algorithm.code_version}")]


def tree(
    study: Study,
    *,
    algorithm: Algorithm,
    uids: ReportUids,
    source: Evidence,
    inputs: Inputs | None,
    findings: Sequence[Finding],
    zone: tzinfo,
    failure: str,
    placed: Sequence[Placed],
    whole: sr.ContentItem | None,
    replaces: str = "",
) -> sr.ContainerContentItem:
    """Build the root container. Times are written in `zone`, with their offset.

    `placed` is what is known of where each finding is; those with a place come first. `whole` is what a group without one refers to.
    `replaces` says which report this one stands for, and why.
    """
    told = sorted(zip(findings, placed, strict=True), key=lambda one: not one[1].items)
    groups = [_finding_group(finding, where, study=study, algorithm=algorithm) for finding, where in told]
    said = [*_outcome(findings, failure=failure), *([_text(codes.REPLACES, replaces)] if replaces else []), *_statements(algorithm)]
    if any(finding.is_atypical for finding in findings):
        said.append(_text(codes.ATYPICAL, ATYPICAL_STATEMENT))
    if inputs is not None and not failure:
        groups += _value_groups(_given(inputs), study=study, algorithm=algorithm, zone=zone)
        said += _record(inputs, zone=zone)
    for group in groups[sum(bool(where.items) for where in placed) :] if whole is not None else ():
        group[0].ContentSequence.append(deepcopy(whole))
    root = sr.ContainerContentItem(standard.cid7021.ImagingMeasurementReport, template_id="1500")
    root.ContentSequence = sr.ContentSequence()
    root.ContentSequence.extend(sr.LanguageOfContentItemAndDescendants(concept(codes.ENGLISH)))
    root.ContentSequence.extend(observer(algorithm, device_uid=uids.device_uid))
    root.ContentSequence.append(
        sr.CodeContentItem(standard.DCM.ProcedureReported, concept(codes.reported(algorithm.procedure)), _HAS_CONCEPT_MOD)
    )
    root.ContentSequence.extend(_image_library(source))
    if groups:
        root.ContentSequence.append(_container(standard.DCM.ImagingMeasurements, (item for g in groups for item in g)))
    root.ContentSequence.append(_container(concept(codes.QUALITATIVE_EVALUATIONS), said))
    return root


def _given(inputs: Inputs) -> list[UsedValue]:
    """Every value of the record that the network was given, once, though it may stand in a history too."""
    points = (point for history in inputs.histories for point in history.points)
    return list({(v.code, v.at, v.source, v.value, v.comparator): v for v in (*inputs.values, *points)}.values())


def codes_of(algorithm: Algorithm, findings: Sequence[Finding], inputs: Inputs | None) -> Iterator[Code]:
    """Give every code that comes from outside: their schemes may need identification."""
    yield algorithm.procedure
    yield from (finding.code for finding in findings)
    if inputs is not None:
        yield from (value.code for value in _given(inputs))
        yield from (text.code for text in inputs.texts)
        yield from inputs.missing


def observer(algorithm: Algorithm, *, device_uid: str) -> sr.ObservationContext:
    """Say that an algorithm observed, and which (TID 1001)."""
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=device_uid,
        name=f"{MANUFACTURER} {algorithm.name}",
        manufacturer_name=MANUFACTURER,
        model_name=algorithm.name,
        serial_number=algorithm.bundle_sha256,
    )
    return sr.ObservationContext(observer_device_context=sr.ObserverContext(standard.DCM.Device, observer_identifying_attributes=device))


def _image_library(source: Evidence) -> list[sr.ContainerContentItem]:
    """List what was analysed. Geometry stays in the images: repeated for each slice, it would hide the findings."""
    purpose = concept(codes.SOURCE)
    images: list[sr.ContentItem] = [
        sr.ImageContentItem(purpose, ds.SOPClassUID, ds.SOPInstanceUID, relationship_type=_CONTAINS)
        for ds in source.instances
        if "Image Storage" in UID(ds.SOPClassUID).name
    ]
    if not images:
        return []
    if modality := _MODALITIES.get(source.modality):
        images.insert(0, sr.CodeContentItem(standard.DCM.Modality, modality, _HAS_ACQ_CONTEXT))
    return [_container(standard.DCM.ImageLibrary, [_container(standard.DCM.ImageLibraryGroup, images)])]


def _finding_group(finding: Finding, where: Placed, *, study: Study, algorithm: Algorithm) -> sr.MeasurementsAndQualitativeEvaluations:
    """Say one finding, and where it is."""
    shares = [measurement(codes.shapley(part), round(share, 4), codes.LOG_ODDS) for part, share in finding.shapley.items()]
    group = sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid=tracking_uid(study, algorithm, finding), identifier=finding.name),
        finding_type=concept(finding.code),
        finding_sites=list(where.sites),
        algorithm_id=_identification(algorithm),
        measurements=[
            measurement(codes.PROBABILITY, percent(finding.probability), codes.PERCENT),
            measurement(codes.THRESHOLD, percent(finding.threshold), codes.PERCENT),
            *where.measurements,
            *shares,
        ],
        qualitative_evaluations=[sr.QualitativeEvaluation(concept(codes.VERDICT), concept(codes.VERDICTS[finding.verdict]))],
    )
    group[0].ContentSequence.extend(where.items)
    return group


def percent(probability: float) -> float:
    """Write a probability as percent, in hundredths; only certainty itself is 0 or 100.

    Raises
    ------
    ValueError
        It is not between 0 and 1, or not a number.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"{probability} is no probability.")
    rounded = round(100 * probability, 2)
    return rounded if probability in (0, 1) else min(max(rounded, 0.01), 99.99)


def _value_groups(
    values: Iterable[UsedValue], *, study: Study, algorithm: Algorithm, zone: tzinfo
) -> list[sr.MeasurementsAndQualitativeEvaluations]:
    """Repeat the record's values that the network was given, one group for each time and source."""
    in_order = sorted(values, key=_drawn)
    return [_value_group(list(drawn), study=study, algorithm=algorithm, zone=zone) for _, drawn in groupby(in_order, key=_drawn)]


def _drawn(value: UsedValue) -> tuple[datetime, str, str]:
    return value.at, value.source, value.message


def _value_group(
    values: Sequence[UsedValue], *, study: Study, algorithm: Algorithm, zone: tzinfo
) -> sr.MeasurementsAndQualitativeEvaluations:
    at, source, message = _drawn(values[0])
    return sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(
            uid=derive_uid("record", study.study_instance_uid, algorithm.name, _dicom_time(at, zone=zone), source, message),
            identifier=f"Patient record, {_clock_time(at, zone=zone)}",
        ),
        session=f"Patient record{_origin(source, message)}",
        time_point_context=sr.TimePointContext(time_point=_clock_time(at, zone=zone)),
        finding_type=concept(codes.LABORATORY_FINDING),
        algorithm_id=_identification(algorithm, "role:given to the algorithm, not measured by it"),
        measurements=[_value(value, zone=zone) for value in values],
        qualitative_evaluations=[sr.QualitativeEvaluation(concept(codes.GROUP_ROLE), concept(codes.RECORD_INPUT))],
    )


def _value(value: UsedValue, *, zone: tzinfo) -> sr.Measurement:
    """Write one value, with its own time. A comparator is both qualifier and modifier: no viewer shows "3" for "<3"."""
    comparator = codes.COMPARATORS[value.comparator] if value.comparator else None
    made = measurement(value.code, value.value, codes.unit(value.unit), qualifier=comparator)
    item = made[0]
    _observed(item, value.at, zone=zone)
    if comparator:
        # PS3.16 TID 300 row 2: a modifier of the concept.
        modifier = sr.CodeContentItem(concept(codes.COMPARATOR), concept(comparator), _HAS_CONCEPT_MOD)
        item.ContentSequence = sr.ContentSequence([modifier])
    return made


def measurement(name: Code, value: float, unit: Code, *, qualifier: Code | None = None) -> sr.Measurement:
    """Write a number as people write it: highdicom makes "3.0" of 3, which claims a digit that nobody measured."""
    if not math.isfinite(value):
        raise ValueError("A number in a report must be finite.")
    made = sr.Measurement(concept(name), float(value), concept(unit), qualifier=concept(qualifier) if qualifier else None)
    # PS3.5 §6.2: a DS has 16 characters; the exact value stands beside it as Floating Point Value.
    made[0].MeasuredValueSequence[0].NumericValue = f"{value:.10g}"
    return made


def _identification(algorithm: Algorithm, *more: str) -> sr.AlgorithmIdentification:
    return sr.AlgorithmIdentification(
        name=algorithm.name,
        version=algorithm.version,
        parameters=[
            f"bundle-sha256:{algorithm.bundle_sha256}",
            f"weights-sha256:{algorithm.weights_sha256}",
            f"input-sha256:{algorithm.input_sha256}",
            f"code:{algorithm.code_version}",
            f"code-sha256:{algorithm.code_sha256}",
            *more,
        ],
    )


def outcome(findings: Sequence[Finding], *, failure: str) -> tuple[Code, str]:
    """How it ended, in code and in words: silence is not an answer."""
    if failure:
        return codes.FAILED, f"Could not be analysed, because {clause(failure)}. No finding is stated."
    if all(finding.verdict == "negative" for finding in findings):
        return codes.NOTHING_FOUND, f"Nothing found. {_named('Negative', findings, 'negative')}"
    by_verdict: tuple[tuple[str, Verdict], ...] = (
        ("Positive", "positive"),
        ("Uncertain", "uncertain"),
        ("Negative", "negative"),
    )
    return codes.FOUND, " ".join(filter(None, (_named(heading, findings, verdict) for heading, verdict in by_verdict)))


def _outcome(findings: Sequence[Finding], *, failure: str) -> list[sr.ContentItem]:
    code, words = outcome(findings, failure=failure)
    return [sr.CodeContentItem(concept(codes.OUTCOME), concept(code), _CONTAINS), _text(codes.SUMMARY, words)]


def clause(sentence: str) -> str:
    """Turn "No series fits." into what can follow "because"; "CT" stays as it is."""
    bare = sentence.strip().rstrip(".")
    return bare if bare[1:2].isupper() else bare[:1].lower() + bare[1:]


def verdict_in_words(algorithm: Algorithm, finding: Finding) -> str:
    """Say "Pneumonia: positive, 73.21 % (research)"."""
    use = "research" if algorithm.research_use else "not verified"
    return codes.one_line(f"{finding.code.meaning or finding.name}: {finding.verdict}, {percent(finding.probability):g} % ({use})")


def _named(heading: str, findings: Sequence[Finding], verdict: Verdict) -> str:
    """List the findings of one verdict: "Positive: Pneumonia (73.2 %)."; nothing where there is none."""
    listed = [f"{f.code.meaning or f.name} ({percent(f.probability):g} %)" for f in findings if f.verdict == verdict]
    return f"{heading}: {', '.join(listed)}." if listed else ""


def statements(algorithm: Algorithm) -> list[tuple[Code, str]]:
    """What must be said with every result: what it may be used for, and how good the network is."""
    use = RESEARCH_STATEMENT if algorithm.research_use else CLINICAL_STATEMENT
    stated = [(codes.INTENDED_USE, f"{algorithm.title}. {use}" if algorithm.title else use)]
    return [*stated, (codes.QUALITY, algorithm.quality_statement)] if algorithm.quality_statement else stated


def _statements(algorithm: Algorithm) -> list[sr.ContentItem]:
    return [_text(code, words) for code, words in statements(algorithm)]


def _record(inputs: Inputs, *, zone: tzinfo) -> list[sr.ContentItem]:
    """Say what of the patient's record the network had and what it lacked; texts by title and time, not content."""
    found = codes.YES if inputs.record_found else codes.NO
    return [
        sr.CodeContentItem(concept(codes.RECORD_FOUND), concept(found), _CONTAINS),
        *(sr.CodeContentItem(concept(codes.RECORD_MISSING), concept(code), _CONTAINS) for code in inputs.missing),
        *(_text_given(text, zone=zone) for text in inputs.texts),
    ]


def _text_given(text: UsedText, *, zone: tzinfo) -> sr.TextContentItem:
    when = _clock_time(text.at, zone=zone)
    item = _text(text.code, f"{text.name}, written {when}{_origin(text.source, text.message)}: given to the network, not repeated here.")
    _observed(item, text.at, zone=zone)
    return item


def _observed(item: Dataset, at: datetime, *, zone: tzinfo) -> None:
    """Give `item` its own time, where it is not the document's (PS3.3 §C.17.3, Document Relationship Macro)."""
    item.ObservationDateTime = DT(_dicom_time(at, zone=zone))


def _origin(source: str, message: str) -> str:
    told = f", from {codes.one_line(source)}" if source.strip() else ""
    return f"{told}, message {codes.one_line(message)}" if message.strip() else told


def _text(name: Code, value: str) -> sr.TextContentItem:
    return sr.TextContentItem(concept(name), codes.one_line(value), _CONTAINS)


def _container(name: DicomCode | sr.CodedConcept, items: Iterable[sr.ContentItem]) -> sr.ContainerContentItem:
    container = sr.ContainerContentItem(name, relationship_type=_CONTAINS)
    container.ContentSequence = sr.ContentSequence(list(items))
    return container


def _clock_time(at: datetime, *, zone: tzinfo) -> str:
    return at.astimezone(zone).isoformat(sep=" ", timespec="minutes")


def _dicom_time(at: datetime, *, zone: tzinfo) -> str:
    return at.astimezone(zone).strftime("%Y%m%d%H%M%S%z")
