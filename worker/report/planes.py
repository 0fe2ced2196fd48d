"""The planes of an analysed image as highdicom wants its sources: geometry and references, with nobody's name in them.

highdicom takes patient, study and geometry from whole images. It gets stand-ins: the geometry is the regular grid that was analysed, the
SOP class one that it knows, so that nothing an image says beside it can change or stop what is written. `finished` puts patient, study and
the classes of the images in.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Final

import numpy as np
import pydicom
from highdicom import PixelMeasuresSequence, PlaneOrientationSequence, PlanePositionSequence
from numpy.typing import NDArray
from pydicom import config
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage

from worker.domain import Document, Finding, Region
from worker.report.content import derive_uid
from worker.report.result import Result

_FRAME: Final = ["Rows", "Columns", "NumberOfFrames", "FrameOfReferenceUID", "PositionReferenceIndicator"]
_SPACING: Final = ["PixelSpacing", "ImagerPixelSpacing"]
_COMPRESSED: Final = ["LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"]
#: Where a frame stands that was not analysed, mm: it must match no plane.
_FAR_MM: Final = 1e6


def located(result: Result) -> dict[str, list[tuple[Finding, Region]]]:
    """The findings with a region by image, in order: a segment's number is its place in this list, from 1."""
    found: dict[str, list[tuple[Finding, Region]]] = {}
    for finding in result.findings:
        for region in finding.regions:
            found.setdefault(region.image, []).append((finding, region))
    return found


def header(result: Result, sop_instance_uid: str) -> Dataset:
    """What an analysed instance says of its frames: size, number, frame of reference, spacing; what it does not say is absent."""
    with config.disable_value_validation():
        ds = pydicom.dcmread(
            result.source.paths[sop_instance_uid], stop_before_pixels=True, specific_tags=[*_FRAME, *_SPACING, *_COMPRESSED]
        )
    return Dataset({element.tag: element for element in ds if not element.is_empty})


def in_frame_of_reference(result: Result, region: Region) -> bool:
    """Whether the image has patient coordinates, and says in which frame of reference: without, they are no place for another object."""
    return region.affine is not None and "FrameOfReferenceUID" in header(result, region.sop_instance_uids[region.key_plane])


def frames_of(said: Dataset) -> int:
    """How many frames an instance has that says this of itself."""
    return int(said.get("NumberOfFrames") or 1)


def grid(affine: NDArray[np.float64]) -> dict[str, Any]:
    """Orientation and pixel measures of a regular grid; each plane is as thick as the planes are apart."""
    column_mm, row_mm, step_mm = (float(mm) for mm in np.linalg.norm(affine[:3, :3], axis=0))
    cosines = [*(affine[:3, 0] / column_mm), *(affine[:3, 1] / row_mm)]
    return {
        "plane_orientation": PlaneOrientationSequence("PATIENT", cosines),
        "pixel_measures": PixelMeasuresSequence((row_mm, column_mm), slice_thickness=step_mm, spacing_between_slices=step_mm),
    }


def position(affine: NDArray[np.float64], k: int) -> PlanePositionSequence:
    """Where the first voxel of plane `k` lies."""
    return PlanePositionSequence("PATIENT", [float(mm) for mm in affine[:3, 3] + k * affine[:3, 2]])


def stand_ins(result: Result, region: Region, planes: Sequence[int]) -> list[Dataset]:
    """Stand-ins of the instances that hold `planes` of the image of `region`, in that order."""
    frames: dict[str, dict[int, int]] = {}
    for k in planes:
        frames.setdefault(region.sop_instance_uids[k], {})[region.frame_numbers[k]] = k
    assert region.affine is not None  # noqa: S101  the caller asked
    said = header(result, region.sop_instance_uids[planes[0]])
    references = {str(one.SOPInstanceUID): one for one in result.source.instances}
    return [_stand_in(result, references[uid], region.affine, numbers, said) for uid, numbers in frames.items()]


def _stand_in(result: Result, reference: Dataset, affine: NDArray[np.float64], frames: dict[int, int], said: Dataset) -> Dataset:
    ds = deepcopy(result.source.stand_in)
    ds.update(reference)
    ds.Modality = result.source.modality
    ds.update({element.tag: element for element in said if element.keyword not in _SPACING})
    shared, per_frame = Dataset(), []
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = grid(affine).values()
    if frames_of(said) == 1:
        ds.SOPClassUID = CTImageStorage
        for one in (shared.PlaneOrientationSequence, shared.PixelMeasuresSequence, position(affine, *frames.values())):
            ds.update(one[0])
        return ds
    ds.SOPClassUID = EnhancedCTImageStorage
    for number in range(1, frames_of(said) + 1):
        frame = Dataset()
        far = PlanePositionSequence("PATIENT", [_FAR_MM + number] * 3)
        frame.PlanePositionSequence = position(affine, frames[number]) if number in frames else far
        per_frame.append(frame)
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = [shared], per_frame
    return ds


def finished(result: Result, ds: Dataset, kind: str) -> Document:
    """Encode what highdicom made of stand-ins: with the images' own SOP classes, patient and study, and no UID that was drawn by chance."""
    classes = {str(one.SOPInstanceUID): one.SOPClassUID for one in result.source.instances}

    def restore(item: Dataset, element: DataElement) -> None:
        if element.keyword == "ReferencedSOPInstanceUID" and element.value in classes:
            item.ReferencedSOPClassUID = classes[element.value]

    ds.walk(restore)
    for item in (*ds.DimensionOrganizationSequence, *ds.DimensionIndexSequence):
        item.DimensionOrganizationUID = derive_uid("dimensions", str(ds.SOPInstanceUID))
    result.finish(ds)
    return result.document(ds, kind)
