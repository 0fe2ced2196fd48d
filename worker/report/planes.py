"""The planes of an analysed image as highdicom wants its sources: geometry and references, with nobody's name in them.

highdicom takes patient, study and geometry from whole images. It gets stand-ins: the geometry is the regular grid that was analysed, so
that nothing an image says beside it can change or stop what is written; patient and study come in by `Result.finish`.
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
from pydicom.dataset import Dataset

from worker.domain import Finding, Region
from worker.report.result import Result

_FRAME: Final = ["Rows", "Columns", "NumberOfFrames", "FrameOfReferenceUID", "PositionReferenceIndicator", "PatientOrientation"]
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
    said = header(result, region.sop_instance_uids[planes[0]])
    references = {str(one.SOPInstanceUID): one for one in result.source.instances}
    return [_stand_in(result, references[uid], region.affine, numbers, said) for uid, numbers in frames.items()]


def _stand_in(result: Result, reference: Dataset, affine: NDArray[np.float64] | None, frames: dict[int, int], said: Dataset) -> Dataset:
    ds = deepcopy(result.source.stand_in)
    ds.update(reference)
    ds.Modality = result.source.modality
    ds.update({element.tag: element for element in said if element.keyword not in _SPACING})
    if affine is None:  # a radiograph: its frame of reference, if it names one, says nothing of where its pixels lie
        ds.pop("FrameOfReferenceUID", None)
        return ds
    shared, per_frame = Dataset(), []
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = grid(affine).values()
    if "NumberOfFrames" not in said:
        ds.ImagePositionPatient = position(affine, *frames.values())[0].ImagePositionPatient
        for one in (shared.PlaneOrientationSequence[0], shared.PixelMeasuresSequence[0]):
            ds.update(one)
        return ds
    for number in range(1, int(said.NumberOfFrames) + 1):
        frame = Dataset()
        far = PlanePositionSequence("PATIENT", [_FAR_MM + number] * 3)
        frame.PlanePositionSequence = position(affine, frames[number]) if number in frames else far
        per_frame.append(frame)
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = [shared], per_frame
    return ds
