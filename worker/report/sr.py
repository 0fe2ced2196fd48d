"""Findings → one DICOM Comprehensive 3D SR, TID 1500, as IHE AI Results asks for it: the root of all documents of one analysis.

Whole reports only: findings, "nothing found", or "could not be analysed, because …".
Not here: what is said (content.py), its codes (codes.py), what the images say of the patient (evidence.py), the other forms (forms.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from io import BytesIO

import highdicom as hd
from highdicom import sr
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes as standard
from pydicom.uid import ExplicitVRLittleEndian

from worker.domain import Document
from worker.report import codes, content, gate
from worker.report.content import MANUFACTURER, Algorithm
from worker.report.evidence import references
from worker.report.result import REFERENCE, SERIES_NUMBERS, Result, stamp


def build(result: Result, companions: Sequence[Document] = ()) -> Document:
    """Write the root report: the same result and companions give the same bytes.

    Parameters
    ----------
    companions
        The other documents of the result, which it refers to.

    Raises
    ------
    ReportInvalid, PatientConflict
        What was written may not be sent (gate.py).
    ValueError
        A number is not one.

    References
    ----------
    PS3.16 TID 1500, 1501, 300, 1600; PS3.3 §A.35.13; IHE RAD AI Results (AIR).
    """
    study, algorithm, source, uids = result.study, result.algorithm, result.source, result.uids
    root = content.tree(
        study,
        algorithm=algorithm,
        uids=uids,
        source=source,
        inputs=result.inputs,
        findings=result.findings,
        zone=result.zone,
        failure=result.failure,
    )
    use = "research, not for diagnosis" if algorithm.research_use else "not verified"
    ds = sr.Comprehensive3DSR(
        evidence=[source.stand_in],
        content=_bare(root),
        series_instance_uid=uids.series_instance_uid,
        series_number=SERIES_NUMBERS["sr"],
        sop_instance_uid=uids.sop_instance_uid,
        instance_number=max(1, study.version),
        series_description=f"{codes.short(f'AI {algorithm.name} {algorithm.version}', 35)}: {use}",
        manufacturer=MANUFACTURER,
        manufacturer_model_name=codes.short(algorithm.name),
        software_versions=versions(algorithm),
        device_serial_number=codes.short(algorithm.bundle_sha256),
        content_qualification="RESEARCH" if algorithm.research_use else "PRODUCT",
        content_date=result.analysed_at.date(),
        content_time=result.analysed_at.time(),
        coding_schemes=codes.identification(content.codes_of(algorithm, result.findings, result.inputs)),
        is_complete=True,
        is_final=False,
        is_verified=False,
        performed_procedure_codes=[codes.concept(algorithm.procedure)],
        requested_procedures=source.requests or None,
        contributing_equipment=[_equipment(algorithm, device_uid=uids.device_uid, at=result.analysed_at)],
        specific_character_set="ISO_IR 192",
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    ds.ContentSequence = root.ContentSequence
    # Whatever was made for the requested procedure, and all that the tree names (PS3.3 §C.17.2).
    ds.CurrentRequestedProcedureEvidenceSequence = references([*source.instances, *_objects(companions)])
    if result.previous is not None:
        ds.PredecessorDocumentsSequence = references([result.previous])
    result.finish(ds)
    ds.SeriesDescriptionCodeSequence = [codes.concept(codes.SERIES)]
    document = result.document(ds, "sr")
    gate.check(document.data, study=study)
    return document


def _bare(root: sr.ContainerContentItem) -> sr.ContainerContentItem:
    """Give highdicom the root without its children: it would copy and search the whole tree.

    That is half the time for a radiograph and a third for 200 slices. What it would look for, images that are no
    evidence, cannot be there: both come from the same list.
    """
    bare = sr.ContainerContentItem(root.name, template_id="1500")
    bare.ContentSequence = sr.ContentSequence()
    return bare


def _objects(companions: Sequence[Document]) -> list[Dataset]:
    """What evidence sequences need to know of each; what is no DICOM object cannot be named there."""
    return [dcmread(BytesIO(one.data), specific_tags=list(REFERENCE)) for one in companions if one.sop_class_uid]


def versions(algorithm: Algorithm) -> list[str]:
    """Software Versions of what we author."""
    return [codes.short(algorithm.version), codes.short(f"code {algorithm.code_version}")]


def _equipment(algorithm: Algorithm, *, device_uid: str, at: datetime) -> hd.ContributingEquipment:
    """Name the algorithm; its Device UID changes with every byte of the bundle (IHE AIR)."""
    item = hd.ContributingEquipment(
        manufacturer=MANUFACTURER,
        purpose_of_reference=standard.DCM.ProcessingEquipment,
        manufacturer_model_name=codes.short(algorithm.name),
        software_versions=versions(algorithm),
        device_serial_number=codes.short(algorithm.bundle_sha256),
        contribution_datetime=stamp(at),
        contribution_description=f"Processing algorithm, weights-sha256:{algorithm.weights_sha256}",
    )
    item.DeviceUID = device_uid
    return item
