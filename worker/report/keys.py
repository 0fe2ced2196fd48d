"""Key Object Selections: the slices that mattered ("keys"), and the note that marks a replaced report ("rejection").

A rejection note is a selection whose title says that what it selects is not to be used any more (IHE Imaging Object Change
Management, RAD-66). Of the four titles "Rejected for Quality Reasons" fits a report that was right when it was written and is
outdated: an archive hides it, or shows it where a site wants to see such. "Patient Safety" takes away for good what must never be
seen, "Incorrect Modality Worklist Entry" says another patient, "Data Retention Policy Expired" deletes.

References: PS3.3 §A.35.4, §C.17.6; PS3.16 TID 2010, CID 7010; IHE RAD TF-3 §4.66 (RAD-66); dcm4chee-arc, wiki "Query Retrieve View".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import pydicom
from highdicom import ko, sr
from pydicom import config
from pydicom.dataset import Dataset
from pydicom.uid import UID

from worker.domain import DICOM_KINDS, Code, Document, Finding, Region
from worker.report import codes, content, replacing
from worker.report.codes import concept
from worker.report.evidence import references
from worker.report.result import Result, about

_TITLES: Final = {"keys": "key images", "rejection": "outdated"}
_CONTAINS: Final = sr.RelationshipTypeValues.CONTAINS


def build(result: Result) -> tuple[Document, ...]:
    """Select of each finding the slice that has most of its region, and say in words which and why."""
    keys = [(finding, region) for finding in result.findings for region in finding.regions]
    if not keys:
        return ()
    chosen: dict[str, list[int]] = {}
    for _, region in keys:
        uid, number = _key(region)
        chosen.setdefault(uid, []).extend([number] if number else [])
    by_uid = {ds.SOPInstanceUID: ds for ds in result.source.instances}
    words = " ".join(_words(result, finding, region) for finding, region in keys)
    items = [_reference(by_uid[uid], sorted({*numbers})) for uid, numbers in chosen.items()]
    return (_document(result, "keys", codes.OF_INTEREST, words, items, [by_uid[uid] for uid in chosen]),)


def reject(result: Result) -> tuple[Document, ...]:
    """Mark the report that this one replaces, and what was made with it, as not to be used any more."""
    if result.previous is None:
        return ()
    # A note that marks an older report stays.
    outdated = [result.previous, *replacing.companions(result.previous, *(kind for kind in DICOM_KINDS if kind != "rejection"))]
    items = sorted((_reference(ds, ()) for ds in outdated), key=lambda item: item.ValueType != "IMAGE")  # TID 2010 is in order
    words = f"Outdated: a new report r{replacing.sentence(result)[1:]}"
    return (_document(result, "rejection", codes.REJECTED, words, items, outdated),)


def _key(region: Region) -> tuple[str, int]:
    """Instance and frame of the plane that has most of `region`; 0 where the instance has no other frame."""
    uid = region.sop_instance_uids[region.key_plane]
    return uid, region.frame_numbers[region.key_plane] if region.sop_instance_uids.count(uid) > 1 else 0


def _words(result: Result, finding: Finding, region: Region) -> str:
    """Say "Pneumonia: positive, 73.21 % (research): most of it in image 34 of series 2."."""
    where = image_in_words(result, *_key(region))
    return f"{content.verdict_in_words(result.algorithm, finding)}: {'most of it in ' if region.shape[0] > 1 else ''}{where}."


def image_in_words(result: Result, uid: str, number: int = 0) -> str:
    """Say "image 34 of series 2", as viewers count, for an analysed instance, of several frames with the `number` of one."""
    wanted = ["InstanceNumber", "SeriesNumber"]
    with config.disable_value_validation():
        ds = pydicom.dcmread(result.source.paths[uid], stop_before_pixels=True, specific_tags=list(wanted))
        image, series = (str(ds.get(keyword) or "without a number") for keyword in wanted)
    return f"{f'frame {number} of ' if number else ''}image {image} of series {series}"


def _reference(ds: Dataset, frames: Sequence[int]) -> sr.ContentItem:
    """Refer to an object; TID 2010 forbids the name that highdicom gives the reference."""
    is_image = "Image Storage" in UID(ds.SOPClassUID).name or "Segmentation" in UID(ds.SOPClassUID).name
    item_of = sr.ImageContentItem if is_image else sr.CompositeContentItem
    item: sr.ContentItem = item_of(concept(codes.SOURCE), ds.SOPClassUID, ds.SOPInstanceUID, relationship_type=_CONTAINS)
    del item.ConceptNameCodeSequence
    if frames:
        item.ReferencedSOPSequence[0].ReferencedFrameNumber = list(frames)
    return item


def _document(result: Result, kind: str, title: Code, words: str, items: Sequence[sr.ContentItem], chosen: Sequence[Dataset]) -> Document:
    root = sr.ContainerContentItem(concept(title), template_id="2010")
    root.ContentSequence = sr.ContentSequence(
        [
            *sr.LanguageOfContentItemAndDescendants(concept(codes.ENGLISH)),
            *content.observer(result.algorithm, device_uid=result.uids.device_uid),
            sr.TextContentItem(concept(codes.KEY_DESCRIPTION), codes.one_line(words), _CONTAINS),
        ]
    )
    ds = ko.KeyObjectSelectionDocument(
        evidence=[result.source.stand_in],
        content=ko.KeyObjectSelection.from_sequence([root]),
        requested_procedures=result.source.requests or None,
        **about(result, kind, what=_TITLES[kind]),
    )
    ds.ContentSequence = [*root.ContentSequence, *items]
    ds.CurrentRequestedProcedureEvidenceSequence = references(chosen)
    result.finish(ds)
    return result.document(ds, kind)
