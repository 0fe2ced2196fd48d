"""Regions → DICOM Segmentation: one object per image, one binary segment per region, frames only where there is something.

A segment is what an answer rests on (worker/regions.py), and its codes say so: category "Spatial and relational concept", not an
abnormal structure; the type is our own. Its tracking UID is that of the finding's group in the report.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from highdicom import AlgorithmIdentificationSequence
from highdicom.seg import Segmentation, SegmentDescription
from pydicom.sr.codedict import codes as standard

from worker.domain import Document, Finding, Region
from worker.report import codes, sites
from worker.report.content import MANUFACTURER, percent, tracking_uid
from worker.report.planes import finished, frames_of, grid, in_frame_of_reference, located, position, stand_ins
from worker.report.result import Result, about

_KIND: Final = "seg"


def build(result: Result) -> tuple[Document, ...]:
    """Write the segmentation of each image that has regions; of one without patient coordinates only if it is one frame, a radiograph.

    References
    ----------
    PS3.3 §A.51, §C.8.20.
    """
    images = {
        name: found for name, found in located(result).items() if found[0][1].shape[0] == 1 or in_frame_of_reference(result, found[0][1])
    }
    return tuple(_document(result, name, found, number) for number, (name, found) in enumerate(images.items(), start=1))


def segment_of(result: Result, region: Region) -> tuple[str, int]:
    """SOP Instance UID of the segmentation that holds `region`, if it was written, and the number of its segment."""
    numbers = [one is region for _, one in located(result)[region.image]]
    return result.uid(_KIND, region.image), numbers.index(True) + 1


def _document(result: Result, name: str, found: list[tuple[Finding, Region]], number: int) -> Document:
    any_region = found[0][1]
    ends = [(one.origin[0], one.origin[0] + one.mask.shape[0]) for _, one in found]
    first, last = min(low for low, _ in ends), max(high for _, high in ends)
    pixels = np.zeros((last - first, *any_region.shape[1:], len(found)), np.bool_)
    for segment, (_, region) in enumerate(found):
        cut = tuple(slice(low, low + n) for low, n in zip(region.origin, region.mask.shape, strict=True))
        pixels[slice(cut[0].start - first, cut[0].stop - first), cut[1], cut[2], segment] = region.mask
    planes = range(first, last)
    place = {}
    if any_region.affine is not None:
        place = {**grid(any_region.affine), "plane_positions": [position(any_region.affine, k) for k in planes]}
    sources = stand_ins(result, any_region, planes)
    is_multiframe = frames_of(sources[0]) > 1
    ds = Segmentation(
        source_images=sources[:1] if is_multiframe else sources,
        further_source_images=sources[1:] if is_multiframe else None,
        pixel_array=pixels,
        segmentation_type="BINARY",
        segment_descriptions=[_segment(result, finding, region, n) for n, (finding, region) in enumerate(found, start=1)],
        content_label="SALIENCY",
        content_description="Regions that the answers rest on, not outlined lesions",
        **about(result, _KIND, name, number=number, what="regions"),
        **place,
    )
    if any_region.affine is None:  # required where no Image Orientation (Patient) is (PS3.3 §C.7.6.1): as the film says it
        ds.PatientOrientation = sources[0].get("PatientOrientation", "")
    return finished(result, ds, _KIND)


def _segment(result: Result, finding: Finding, region: Region, number: int) -> SegmentDescription:
    algorithm, site = result.algorithm, sites.of_image(result, region.image)
    return SegmentDescription(
        segment_number=number,
        # The one line that a viewer shows of a segment: which answer, how probable, and that this is no outline.
        segment_label=f"{codes.short(finding.code.meaning or finding.name, 44)} {percent(finding.probability):g} %, saliency",
        segmented_property_category=standard.SCT.SpatialAndRelationalConcept,
        segmented_property_type=codes.concept(codes.REGION),
        algorithm_type="AUTOMATIC",
        algorithm_identification=AlgorithmIdentificationSequence(
            name=codes.short(algorithm.name),
            version=codes.short(algorithm.version),
            family=standard.cid7162.ArtificialIntelligence,
            source=MANUFACTURER,
            parameters={"weights-sha256": algorithm.weights_sha256, "input-sha256": algorithm.input_sha256},
        ),
        tracking_uid=tracking_uid(result.study, algorithm, finding),
        tracking_id=codes.short(finding.name),
        anatomic_regions=[site.region] if site else None,
    )
