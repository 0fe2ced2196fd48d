"""Regions → DICOM Segmentation: one object per image, or more where it would be large; one binary segment per region.

Only frames with something in them are written. A segment is what an answer rests on (worker/regions.py), and its codes say so: category
"Spatial and relational concept", not an abnormal structure; the type is our own. Its tracking UID is that of the finding's group in the
report.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
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
#: Of all segments of one object together: a byte each, and as much again for what highdicom makes of them.
_MOST_VOXELS: Final = 2**27


def build(result: Result) -> tuple[Document, ...]:
    """Write the segmentation of each image in patient coordinates that has regions.

    None of a radiograph, though PS3.3 has it: OHIF's (3.13.2) whole page goes black at one without plane orientation (measured).

    References
    ----------
    PS3.3 §A.51, §C.8.20.
    """
    return tuple(
        _document(result, part, number) for number, part in enumerate(_parts(result), start=1) if in_frame_of_reference(result, part[0][1])
    )


def segment_of(result: Result, region: Region) -> tuple[str, int]:
    """SOP Instance UID of the segmentation that holds `region`, if it was written, and the number of its segment."""
    return next(
        (result.uid(_KIND, str(number)), segment)
        for number, part in enumerate(_parts(result), start=1)
        for segment, (_, one) in enumerate(part, start=1)
        if one is region
    )


def _parts(result: Result) -> list[list[tuple[Finding, Region]]]:
    """The regions by object: those of one image together, as long as the voxels that highdicom is given at once stay few."""
    parts: list[list[tuple[Finding, Region]]] = []
    for found in located(result).values():
        parts.append([])
        for one in found:
            more = [*parts[-1], one]
            if parts[-1] and len(_planes(more)) * prod(one[1].shape[1:]) * len(more) > _MOST_VOXELS:
                parts.append([])
            parts[-1].append(one)
    return parts


def _planes(part: Sequence[tuple[Finding, Region]]) -> range:
    """The planes from the first to the last that hold something."""
    return range(min(one.origin[0] for _, one in part), max(one.origin[0] + len(one.mask) for _, one in part))


def _document(result: Result, part: Sequence[tuple[Finding, Region]], number: int) -> Document:
    any_region, planes = part[0][1], _planes(part)
    assert any_region.affine is not None  # noqa: S101  `build` looked
    pixels = np.zeros((len(planes), *any_region.shape[1:], len(part)), np.bool_)
    for segment, (_, region) in enumerate(part):
        k, j, i = (slice(low, low + n) for low, n in zip(region.origin, region.mask.shape, strict=True))
        pixels[k.start - planes.start : k.stop - planes.start, j, i, segment] = region.mask
    sources = stand_ins(result, any_region, planes)
    is_multiframe = frames_of(sources[0]) > 1
    ds = Segmentation(
        source_images=sources[:1] if is_multiframe else sources,
        further_source_images=sources[1:] if is_multiframe else None,
        pixel_array=pixels,
        plane_positions=[position(any_region.affine, k) for k in planes],
        segmentation_type="BINARY",
        segment_descriptions=[_segment(result, finding, region, n) for n, (finding, region) in enumerate(part, start=1)],
        content_label="SALIENCY",
        content_description="Regions that the answers rest on, not outlined lesions",
        **about(result, _KIND, str(number), number=number, what="regions"),
        **grid(any_region.affine),
    )
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
