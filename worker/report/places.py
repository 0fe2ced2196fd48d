"""What the report says of where a finding has its place: the region as coordinates and numbers, and the segment that holds it.

::

    Measurement Group (TID 1501) of the finding
    ├── finding site                              what part of the body the image shows
    ├── NUM   area on the key plane, volume
    ├── SCOORD POLYLINE on the key plane          ◀─ selected from the image: what viewers draw, so it comes first
    ├── IMAGE, a segment of our segmentation      where that was written
    ├── SCOORD3D POLYGON, the outline in the patient
    └── SCOORD3D POINT, the center

All of it hangs in the one group that says the finding (PS3.16 TID 1501 rows 10b to 10e), under names that say what it is: what the answer
rests on. The templates of outlined regions, TID 1410 and 1411, each allow one of these forms, and would make findings without a region
invalid beside them for PixelMed's validator.
"""

# mypy: untyped-calls-exclude="skimage"

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final

import numpy as np
import pydicom
from highdicom import sr
from highdicom.spatial import ReferenceToImageTransformer
from numpy.typing import NDArray
from pydicom import config
from pydicom.dataset import Dataset
from pydicom.uid import UID, SegmentationStorage
from skimage.measure import approximate_polygon, find_contours

from worker.domain import Code, Finding, Region
from worker.report import codes, sites
from worker.report.codes import concept
from worker.report.content import Placed, measurement
from worker.report.planes import frames_of, header
from worker.report.result import Result
from worker.report.seg import segment_of

#: An outline may leave that of the voxels by this, in voxels: a staircase becomes a line, and none is lost.
_SMOOTH: Final = 0.25
_CONTAINS: Final = sr.RelationshipTypeValues.CONTAINS


def placed(result: Result, finding: Finding, written: Collection[str]) -> Placed:
    """What the group of `finding` says of its place; `written` are the SOP Instance UIDs of the result's other documents."""
    images = {one.image for one in finding.regions} or set(result.inputs.series if result.inputs else ())
    site = sites.of_image(result, min(images)) if len(images) == 1 else None  # of several images none is known to be the one
    found = [(region, header(result, region.sop_instance_uids[region.key_plane])) for region in finding.regions]
    return Placed(
        sites=[sr.FindingSite(site.region, laterality=site.laterality)] if site else [],
        measurements=[one for region, said in found for one in _measured(region, said)],
        items=[item for region, said in found for item in _shown(result, region, said, written)],
    )


def whole_image(result: Result) -> sr.ContentItem | None:
    """The corners of one analysed image, for the groups that have no place; None where there is no image.

    OHIF (3.13.2) shows a black viewport for a report in which one measurement group has no coordinates, as a negative finding and the
    values of the record have none. Of points in the corners it draws four dots, and the image (measured).
    """
    images = [(str(one.SOPInstanceUID), 0) for one in result.source.instances if "Image Storage" in UID(one.SOPClassUID).name]
    keys = [(one.sop_instance_uids[one.key_plane], one.frame_numbers[one.key_plane]) for f in result.findings for one in f.regions]
    if not images:
        return None
    uid, number = keys[0] if keys else images[len(images) // 2]
    said = header(result, uid)
    if not (said.get("Rows") and said.get("Columns")):
        return None
    frame = number or frames_of(said) // 2 + 1
    right, bottom = said.Columns - 0.5, said.Rows - 0.5
    corners = np.array([[0.5, 0.5], [right, 0.5], [right, bottom], [0.5, bottom]])
    return _on(result, uid, frame if frames_of(said) > 1 else None, codes.WHOLE_IMAGE, "MULTIPOINT", corners)


def _on(result: Result, uid: str, frame: int | None, name: Code, kind: str, points: NDArray[np.float64]) -> sr.ContentItem:
    """Graphic `points` (N, 2) of column and row on one image, or on one frame of it."""
    item = sr.ScoordContentItem(concept(name), kind, points, relationship_type=_CONTAINS)
    sop_class = next(one.SOPClassUID for one in result.source.instances if uid == one.SOPInstanceUID)
    image = sr.SourceImageForRegion(sop_class, uid, referenced_frame_numbers=[frame] if frame else None)
    item.ContentSequence = sr.ContentSequence([image])
    return item


def outline(region: Region) -> NDArray[np.float64]:
    """The outer edge of what is largest of `region` on its key plane: (N, 2) of (i, j), closed; (0, 0) is the middle of the first pixel."""
    plane = np.pad(region.mask[region.key_plane - region.origin[0]], 1)
    curves = find_contours(plane.astype(np.float32), 0.5)
    curve = approximate_polygon(max(curves, key=_enclosed), _SMOOTH)
    edge = curve[:, ::-1] - 1 + np.array([region.origin[2], region.origin[1]])
    return np.ascontiguousarray(edge, np.float64)


def _enclosed(curve: NDArray[np.float64]) -> float:
    """The area within a closed curve, by the shoelace formula."""
    y, x = curve.T
    return abs(float(x[:-1] @ y[1:] - x[1:] @ y[:-1])) / 2


def on_image(result: Result, region: Region, said: Dataset) -> NDArray[np.float64]:
    """The outline as Graphic Data of the key plane's own image: (N, 2) of column, row; 0, 0 is the corner of the first pixel.

    The planes of a tilted gantry were put straight for the analysis, which moved their pixels: their image says where it lies itself.

    References
    ----------
    PS3.3 §C.18.6.1.1.
    """
    edge = outline(region)
    if region.affine is None or (said.Rows, said.Columns) == region.shape[1:]:
        return edge + 0.5
    k = region.key_plane
    with config.disable_value_validation():
        ds = pydicom.dcmread(result.source.paths[region.sop_instance_uids[k]], stop_before_pixels=True)
        if frames_of(said) > 1:
            to_image = ReferenceToImageTransformer.for_image(ds, frame_number=region.frame_numbers[k])
        else:  # not for_image: it asks for a frame of reference
            to_image = ReferenceToImageTransformer(ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing)
    return np.asarray(to_image(in_patient(region, edge))[:, :2])


def in_patient(region: Region, edge: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn points (N, 2) of (i, j) on the key plane into LPS mm (N, 3)."""
    assert region.affine is not None  # noqa: S101  the caller asked
    ones = np.ones(len(edge))
    return np.asarray((np.stack([*edge.T, ones * region.key_plane, ones], axis=1) @ region.affine.T)[:, :3])


def _shown(result: Result, region: Region, said: Dataset, written: Collection[str]) -> Iterator[sr.ContentItem]:
    k = region.key_plane
    frame = region.frame_numbers[k] if frames_of(said) > 1 else None
    yield _on(result, region.sop_instance_uids[k], frame, codes.REGION, "POLYLINE", on_image(result, region, said))
    uid, segment = segment_of(result, region)
    if uid in written:
        yield sr.ImageContentItem(
            concept(codes.REGION), SegmentationStorage, uid, referenced_segment_numbers=[segment], relationship_type=_CONTAINS
        )
    if region.affine is None or region.centre_mm is None or "FrameOfReferenceUID" not in said:
        return
    points = {
        codes.REGION: ("POLYGON", in_patient(region, outline(region))),
        codes.REGION_CENTRE: ("POINT", region.centre_mm[np.newaxis]),
    }
    for name, (kind, data) in points.items():
        yield sr.Scoord3DContentItem(concept(name), kind, data, said.FrameOfReferenceUID, relationship_type=_CONTAINS)


def _measured(region: Region, said: Dataset) -> Iterator[sr.Measurement]:
    area = _pixel_mm2(region, said) * int(region.mask[region.key_plane - region.origin[0]].sum())
    if area:
        yield measurement(codes.REGION_AREA, float(f"{area:.4g}"), codes.SQUARE_MM)
    if region.volume_mm3 is not None:
        yield measurement(codes.REGION_VOLUME, float(f"{region.volume_mm3:.4g}"), codes.CUBIC_MM)


def _pixel_mm2(region: Region, said: Dataset) -> float:
    """The area of a pixel; of a radiograph as it calls it itself, at the detector if it knows no other. 0 where it is not known."""
    if region.affine is not None:
        return float(np.prod(np.linalg.norm(region.affine[:3, :2], axis=0)))
    spacing = said.get("PixelSpacing") or said.get("ImagerPixelSpacing") or (0, 0)
    return float(spacing[0]) * float(spacing[1])
