"""Findings with a place: lesions at known mm, painted into a saliency on a network's own grid, and all that is written of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from models.explanation import to_patient
from models.spec import ImageSpec
from tests import factories, reports
from worker.domain import Finding, Region, Saliency, Series, Volume
from worker.regions import Place, region
from worker.report.result import Result

#: A network's grid that has no voxel of the phantoms.
SPEC = ImageSpec("image", "volume", ("CT",), size=(40, 36, 32), spacing_mm=(1.0, 1.1, 1.3))
FILM = ImageSpec("image", "radiograph", ("DX",), size=(32, 32))


def place_of(volume: Volume) -> Place:
    """What the line remembers of an image."""
    shape = volume.array.shape if volume.affine is not None or len(volume.array) > 1 else volume.array.shape[1:]
    return Place(shape, volume.affine, volume.sop_instance_uids, volume.frame_numbers)


def painted(volume: Volume, lesion_mm: Sequence[float], radius_mm: float, spec: ImageSpec = SPEC) -> Saliency:
    """A saliency on the grid of `spec`: 0.9 in a ball about `lesion_mm` (LPS), its peak in the middle, 0.2 elsewhere."""
    array, affine = to_patient(torch.full(spec.size, 0.2), spec, volume.array.shape, volume.affine)
    k, j, i = np.indices(array.shape)
    at = np.stack([i, j, k, np.ones_like(i)], -1) @ affine.T
    distance = np.linalg.norm(at[..., :3] - np.asarray(lesion_mm), axis=-1)
    array[distance <= radius_mm] = 0.9
    array[np.unravel_index(distance.argmin(), array.shape)] = 1.0
    return Saliency(array.astype(np.float16), affine, spec.name, volume.sop_instance_uids)


def painted_on_film(shape: tuple[int, int], center: tuple[float, float], radius: float, spec: ImageSpec = FILM) -> Saliency:
    """The same on a radiograph of `shape`: a disc about `center`, (row, column) of its pixels."""
    array, affine = to_patient(torch.full(spec.size, 0.2), spec, shape)
    rows, columns = np.indices(array.shape)
    at = np.stack([rows, columns, np.ones_like(rows)], -1) @ affine.T
    distance = np.linalg.norm(at[..., :2] - np.asarray(center), axis=-1)
    array[distance <= radius] = 0.9
    array[np.unravel_index(distance.argmin(), array.shape)] = 1.0
    return Saliency(array.astype(np.float16), affine, spec.name, ())


def finding_at(saliency: Saliency, place: Place, base: Finding = reports.FINDINGS[0]) -> Finding:
    """A finding with this map and the region that it makes."""
    found = region(saliency, place)
    assert found is not None
    return replace(base, saliency=(saliency,), regions=(found,))


def result_with(series: Series, findings: Sequence[Finding], *, image: str = "image") -> Result:
    """What the documents of `findings` on `series` are written from, with a negative finding and the record's values beside them."""
    return reports.result(
        [one.path for one in series.instances],
        inputs=replace(reports.INPUTS, series={image: series}),
        findings=[*findings, reports.FINDINGS[1]],
    )


def voxels_mm(where: Region) -> NDArray[np.float64]:
    """(N, 3): the middle of each voxel of a region, LPS mm."""
    assert where.affine is not None
    k, j, i = (np.argwhere(where.mask) + where.origin).T
    return np.asarray((np.stack([i, j, k, np.ones(len(i))], 1) @ where.affine.T)[:, :3])


def film(folder: Path, *, rows: int = 96, columns: int = 80, modality: str = "DX") -> Series:
    """One radiograph as a series."""
    return factories.spool([factories.make_radiograph(rows=rows, columns=columns, modality=modality)], folder)
