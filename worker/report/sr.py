"""Findings → one DICOM Comprehensive 3D SR, TID 1500, as IHE AI Results asks for it: the root of all documents of one analysis.

Whole reports only: findings, "nothing found", or "could not be analysed, because …".
Not here: what is said (content.py), its codes (codes.py), what the images say of the patient (evidence.py), the other forms (forms.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

from highdicom import sr
from pydicom import dcmread
from pydicom.dataset import Dataset

from worker import events
from worker.domain import Document
from worker.ops.log import places
from worker.report import codes, gate, replacing
from worker.report.content import Placed
from worker.report.evidence import references
from worker.report.places import placed, whole_image
from worker.report.result import REFERENCE, Result, about


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
    told, whole = told_places(result, companions)
    root = result.tree(told, whole=whole, replaces=replacing.sentence(result))
    ds = written(result, sr.Comprehensive3DSR, root, "sr")
    # Whatever was made for the requested procedure, and all that the tree names (PS3.3 §C.17.2).
    ds.CurrentRequestedProcedureEvidenceSequence = references([*result.source.instances, *_objects(companions)])
    result.finish(ds)
    ds.SeriesDescriptionCodeSequence = [codes.concept(codes.SERIES)]
    document = result.document(ds, "sr")
    gate.check(document.data, study=result.study)
    return document


def written(
    result: Result, document: type[sr.Comprehensive3DSR | sr.EnhancedSR], root: sr.ContainerContentItem, kind: str, *, what: str = ""
) -> Dataset:
    """Make an unverified, complete, preliminary report of `root`; evidence and patient are the caller's.

    Its predecessor is that of its kind, or where there was none the root report.
    """
    ds = document(
        evidence=[result.source.stand_in],
        content=_bare(root),
        content_date=result.analysed_at.date(),
        content_time=result.analysed_at.time(),
        is_complete=True,
        is_final=False,
        is_verified=False,
        performed_procedure_codes=[codes.concept(result.algorithm.procedure)],
        requested_procedures=result.source.requests or None,
        **about(result, kind, what=what),
    )
    ds.ContentSequence = root.ContentSequence
    if result.previous is not None:
        ds.PredecessorDocumentsSequence = references([*replacing.companions(result.previous, kind), result.previous][:1])
    return ds


def told_places(result: Result, companions: Sequence[Document] = ()) -> tuple[list[Placed], sr.ContentItem | None]:
    """Say where each finding is, and on what image those are that have no place; a place that cannot be told does not cost the report."""
    written = {one.sop_instance_uid for one in companions}
    try:
        return [placed(result, finding, written) for finding in result.findings], whole_image(result)
    except Exception as exc:  # noqa: BLE001  the findings stand without
        events.emit("document.failed", kind="places", bundle=result.algorithm.name, reason=type(exc).__name__, places=places(exc))
        return [Placed()] * len(result.findings), None


def _bare(root: sr.ContainerContentItem) -> sr.ContainerContentItem:
    """Give highdicom the root without its children: it would copy and search the whole tree.

    That is half the time for a radiograph and a third for 200 slices. What it would look for, images that are no
    evidence, cannot be there: both come from the same list.
    """
    bare = sr.ContainerContentItem(root.name)
    if "ContentTemplateSequence" in root:
        bare.ContentTemplateSequence = root.ContentTemplateSequence
    bare.ContentSequence = sr.ContentSequence()
    return bare


def _objects(companions: Sequence[Document]) -> list[Dataset]:
    """What evidence sequences need to know of each; what is no DICOM object cannot be named there."""
    return [dcmread(BytesIO(one.data), specific_tags=list(REFERENCE)) for one in companions if one.sop_class_uid]
