"""Saliency → DICOM Parametric Map: one object per finding and image, on the map's own grid in the images' frame of reference.

Stored are thousandths of the peak in 16 bits: float pixels, which PS3.3 §A.75 would allow, are what archives and viewers show least.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from highdicom import VOILUTTransformation
from highdicom.pm import ParametricMap, RealWorldValueMapping

from worker.domain import Document, Finding, Region, Saliency
from worker.report import codes
from worker.report.planes import finished, grid, in_frame_of_reference, located, position, stand_ins
from worker.report.result import Result, about

_KIND: Final = "map"
_STEPS: Final = 1000


def build(result: Result) -> tuple[Document, ...]:
    """Write the map of each region in patient coordinates: one that points nowhere has no region, and shows nothing.

    References
    ----------
    PS3.3 §A.75, §C.8.32.
    """
    made = [
        (finding, region, saliency)
        for found in located(result).values()
        for finding, region in found
        for saliency in finding.saliency
        if saliency.image == region.image and in_frame_of_reference(result, region)
    ]
    return tuple(_document(result, *one, number=number) for number, one in enumerate(made, start=1))


def _document(result: Result, finding: Finding, region: Region, saliency: Saliency, *, number: int) -> Document:
    assert saliency.affine is not None  # noqa: S101  that of an image with patient coordinates
    label = codes.short(finding.code.meaning or finding.name, 50)
    ds = ParametricMap(
        source_images=stand_ins(result, region, [region.key_plane]),
        pixel_array=np.rint(saliency.array.astype(np.float32) * _STEPS).astype(np.uint16),
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[
            RealWorldValueMapping(
                lut_label="SALIENCY",
                lut_explanation=codes.SALIENCY.meaning,
                unit=codes.concept(codes.NO_UNITS),
                value_range=(0, _STEPS),
                slope=1 / _STEPS,
                intercept=0,
                quantity_definition=codes.concept(codes.SALIENCY),
            )
        ],
        voi_lut_transformations=[VOILUTTransformation(window_center=_STEPS / 2, window_width=_STEPS)],
        plane_positions=[position(saliency.affine, k) for k in range(len(saliency.array))],
        content_label="SALIENCY",
        content_description=f"Saliency: {label}",
        derived_pixel_contrast="NONE",
        **grid(saliency.affine),
        **about(result, _KIND, region.image, finding.name, number=number, what="saliency"),
    )
    ds.Laterality = ""  # required where the body part may be paired (PS3.3 §C.7.3.1); highdicom has no argument for it
    return finished(result, ds, _KIND)
