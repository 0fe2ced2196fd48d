"""Findings → one DICOM Comprehensive 3D SR, TID 1500, as IHE AI Results asks for it.

Whole reports only: findings, "nothing found", or "could not be analysed, because …".
Not here: what is said (content.py), its codes (codes.py), what the images say of the patient (evidence.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta, timezone, tzinfo
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Final

import highdicom as hd
import pydicom
from highdicom import sr
from pydicom import config
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes as standard
from pydicom.uid import Comprehensive3DSRStorage, ExplicitVRLittleEndian
from pydicom.valuerep import DA, DT, TM

from worker.domain import Document, Finding, Inputs, Study
from worker.report import codes, content, gate
from worker.report.content import MANUFACTURER, Algorithm, ReportUids, derive_uid
from worker.report.evidence import Evidence, read, references

__all__ = ["Algorithm", "ReportUids", "build_report", "report_uids"]

# A misspelt keyword would otherwise be dropped from the report without a word (STANDARDS.md §0.11).
config.INVALID_KEYWORD_BEHAVIOR = "RAISE"

SERIES_NUMBER: Final = 9001
_UNIX_EPOCH_YEAR: Final = 1970


def report_uids(
    study_instance_uid: str, *, bundle_sha256: str, input_sha256: str, is_failure: bool = False, predecessor_uid: str = ""
) -> ReportUids:
    """Derive the UIDs of the report that this bundle makes of this input of this study, after that predecessor.

    All reports of one bundle on one study share a series. A failure has its own instance UID: what failed once
    may succeed when it is tried again, and is another document then. So is an input that was there before another one
    (a merge that was undone): it is filed after that other, which would else remain the last word.
    """
    kind = "failure" if is_failure else "report"
    after = (predecessor_uid,) if predecessor_uid else ()
    return ReportUids(
        sop_instance_uid=derive_uid(kind, study_instance_uid, bundle_sha256, input_sha256, *after),
        series_instance_uid=derive_uid("series", study_instance_uid, bundle_sha256),
        device_uid=derive_uid("device", bundle_sha256),
    )


def build_report(
    study: Study,
    *,
    algorithm: Algorithm,
    evidence: Sequence[Path],
    inputs: Inputs | None,
    findings: Sequence[Finding],
    analysed_at: datetime,
    zone: tzinfo,
    failure: str = "",
    predecessor: Document | None = None,
) -> Document:
    """Write the report of one analysis: the same arguments give the same bytes.

    Parameters
    ----------
    evidence
        Files of the instances that were analysed (or that were tried, if it failed), in any order.
    inputs
        None when the analysis failed before the patient's record was asked.
    analysed_at
        Aware; when the analysis began (IHE AIR: Content Date and Time).
    zone
        The site's zone: that of the times in the text, and of images without Timezone Offset From UTC.
    failure
        Why there are no findings, as words that follow "because"; empty if the analysis succeeded.
    predecessor
        The last report on an earlier version of this study, which this one replaces.

    Raises
    ------
    PatientConflict
        An analysed instance is of another patient or study.
    PixelError
        An analysed instance has no readable header.
    ReportInvalid
        What was written may not be sent (gate.py).
    ValueError
        Findings and failure contradict each other, or a number is not one.

    References
    ----------
    PS3.16 TID 1500, 1501, 300, 1600; PS3.3 §A.35.13; IHE RAD AI Results (AIR).
    """
    if bool(failure) == bool(findings):
        raise ValueError("A report has either findings or a reason why there are none.")
    source = read(evidence, study=study)
    local = analysed_at.astimezone(_document_zone(source, study=study, analysed_at=analysed_at, zone=zone))
    derive = partial(
        report_uids,
        study.study_instance_uid,
        bundle_sha256=algorithm.bundle_sha256,
        input_sha256=algorithm.input_sha256,
        is_failure=bool(failure),
    )
    uids = derive()
    previous = _previous(predecessor, own_uid=uids.sop_instance_uid)
    if previous:
        uids = derive(predecessor_uid=str(previous[0].SOPInstanceUID))
    root = content.tree(
        study,
        algorithm=algorithm,
        uids=uids,
        source=source,
        inputs=inputs,
        findings=findings,
        zone=zone,
        failure=failure,
    )
    use = "research, not for diagnosis" if algorithm.research_use else "not verified"
    ds = sr.Comprehensive3DSR(
        evidence=[source.stand_in],
        content=_bare(root),
        series_instance_uid=uids.series_instance_uid,
        series_number=SERIES_NUMBER,
        sop_instance_uid=uids.sop_instance_uid,
        instance_number=max(1, study.version),
        series_description=f"{codes.short(f'AI {algorithm.name} {algorithm.version}', 35)}: {use}",
        manufacturer=MANUFACTURER,
        manufacturer_model_name=codes.short(algorithm.name),
        software_versions=_versions(algorithm),
        device_serial_number=codes.short(algorithm.bundle_sha256),
        content_qualification="RESEARCH" if algorithm.research_use else "PRODUCT",
        content_date=local.date(),
        content_time=local.time(),
        coding_schemes=codes.identification(content.codes_of(algorithm, findings, inputs)),
        is_complete=True,
        is_final=False,
        is_verified=False,
        performed_procedure_codes=[codes.concept(algorithm.procedure)],
        requested_procedures=source.requests or None,
        contributing_equipment=[_equipment(algorithm, device_uid=uids.device_uid, at=local)],
        specific_character_set="ISO_IR 192",
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    ds.ContentSequence = root.ContentSequence
    ds.CurrentRequestedProcedureEvidenceSequence = references(source.instances)
    if previous:
        ds.PredecessorDocumentsSequence = references(previous)
    _complete(ds, source=source, local=local)
    with BytesIO() as buffer:
        ds.save_as(buffer, enforce_file_format=True)
        data = buffer.getvalue()
    gate.check(data, study=study)
    return Document(
        sop_instance_uid=uids.sop_instance_uid,
        sop_class_uid=str(Comprehensive3DSRStorage),
        kind="sr",
        data=data,
        predecessor_uid=str(previous[0].SOPInstanceUID) if previous else "",
    )


def _bare(root: sr.ContainerContentItem) -> sr.ContainerContentItem:
    """Give highdicom the root without its children: it would copy and search the whole tree.

    That is half the time for a radiograph and a third for 200 slices. What it would look for, images that are no
    evidence, cannot be there: both come from the same list.
    """
    bare = sr.ContainerContentItem(root.name, template_id="1500")
    bare.ContentSequence = sr.ContentSequence()
    return bare


def _document_zone(source: Evidence, *, study: Study, analysed_at: datetime, zone: tzinfo) -> timezone:
    """Choose the one offset that all dates of the document are in, the study's among them (PS3.3 §C.12.1.1.8).

    The images' own where they name one; else the site's on the day of the study, not today's: with
    today's, summer time would move the time of a winter's study.
    """
    moment = study.study_at if study.study_at.year >= _UNIX_EPOCH_YEAR else analysed_at
    site = moment.astimezone(zone).utcoffset() or timedelta()
    return timezone(site if source.utc_offset is None else source.utc_offset)


def _versions(algorithm: Algorithm) -> list[str]:
    return [codes.short(algorithm.version), codes.short(f"code {algorithm.code_version}")]


def _equipment(algorithm: Algorithm, *, device_uid: str, at: datetime) -> hd.ContributingEquipment:
    """Name the algorithm; its Device UID changes with every byte of the bundle (IHE AIR)."""
    item = hd.ContributingEquipment(
        manufacturer=MANUFACTURER,
        purpose_of_reference=standard.DCM.ProcessingEquipment,
        manufacturer_model_name=codes.short(algorithm.name),
        software_versions=_versions(algorithm),
        device_serial_number=codes.short(algorithm.bundle_sha256),
        contribution_datetime=_stamp(at),
        contribution_description=f"Processing algorithm, weights-sha256:{algorithm.weights_sha256}",
    )
    item.DeviceUID = device_uid
    return item


def _previous(predecessor: Document | None, *, own_uid: str) -> list[Dataset]:
    """Read what Predecessor Documents Sequence needs; a report that is made again does not precede itself."""
    if predecessor is None or predecessor.sop_instance_uid == own_uid:
        return []
    wanted = ["SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"]
    return [pydicom.dcmread(BytesIO(predecessor.data), specific_tags=wanted)]


def _complete(ds: Dataset, *, source: Evidence, local: datetime) -> None:
    """Add what highdicom has no argument for, and put one clock in place of the several that it reads."""
    for element in source.copied:
        ds[element.tag] = element
    ds.TimezoneOffsetFromUTC = local.strftime("%z")
    ds.InstanceCreationDate = DA(local.date())
    ds.InstanceCreationTime = TM(local.time())
    ds.SeriesDescriptionCodeSequence = [codes.concept(codes.SERIES)]
    for item in ds.ContributingEquipmentSequence:
        if "ContributionDateTime" in item:
            item.ContributionDateTime = _stamp(local)


def _stamp(at: datetime) -> DT:
    return DT(at.strftime("%Y%m%d%H%M%S.%f%z"))
