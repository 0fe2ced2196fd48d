"""Where a finding has its place: the saliency about its peak, as voxels of the image that was analysed.

::

    Saliency (its own, coarser grid) ─▶ at least half of the peak ─▶ what hangs together with the peak ─▶ the image's voxels ─▶ Region

It is what the answer rests on, not the outline of anything: nobody has drawn it. Not here: the saliency (models/explanation.py),
what is written of a region (report/).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from worker.domain import Region, Saliency

#: The contour at half of the maximum is where the edge of a blurred spot lies (full width at half maximum), and what positron emission
#: tomography outlines by where nobody draws (doi:10.1007/s00259-014-2961-x, the 50 % isocontour). A choice, not a measurement: a saliency
#: has no edge.
_OF_PEAK: Final = 0.5
#: A region larger than half of the image, or of what the network saw of it, leaves less out than it takes in: it points nowhere.
_MOST: Final = 0.5
#: A map is made parallel to its image (models/explanation.py, `to_patient`); more than rounding beside the diagonal is another map.
_PARALLEL: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Place:
    """Of one image: the shape (K, J, I) or (rows, columns) of its array, index → LPS mm if it has one, and its planes.

    ``sop_instance_uids`` and ``frame_numbers`` (from 1) name them, k by k.
    """

    shape: tuple[int, ...]
    affine: NDArray[np.float64] | None
    sop_instance_uids: tuple[str, ...]
    frame_numbers: tuple[int, ...]


def regions(saliencies: Sequence[Saliency], places: Mapping[str, Place]) -> tuple[Region, ...]:
    """The region of each map that points somewhere; `places` by image name."""
    found = (region(one, places[one.image]) for one in saliencies if one.image in places)
    return tuple(one for one in found if one is not None)


def region(saliency: Saliency, place: Place) -> Region | None:
    """The voxels of the image nearest to those of the map that are at least half of its peak and hang together with it.

    None where the map points nowhere: it is flat or not finite, what it points at is more than half of the image, or lies
    outside of it (a map reaches over the edge of an image that is smaller than what the network takes).

    Raises
    ------
    ValueError
        The map is not parallel to its image.
    """
    values = np.asarray(saliency.array, np.float32)
    peak = float(values.max(initial=0.0))
    if not (np.isfinite(peak) and peak > 0):
        return None
    labels, _ = ndimage.label(values >= _OF_PEAK * peak, ndimage.generate_binary_structure(values.ndim, values.ndim))
    inside = labels == labels[np.unravel_index(int(values.argmax()), values.shape)]
    if inside.mean() > _MOST:
        return None
    (box,) = ndimage.find_objects(inside.astype(np.uint8))
    origin, nearest = [], []  # along each axis: the first voxel of the image that is in the box, and what each of them is nearest to
    for length, cut, (step, start) in zip(place.shape, box, _steps(saliency, place), strict=True):
        index = np.floor((np.arange(length) - start) / step + 0.5).astype(np.int64)
        within = np.flatnonzero((index >= cut.start) & (index < cut.stop))
        origin.append(int(within[0]) if len(within) else 0)
        nearest.append(index[within])
    mask, shape = inside[np.ix_(*nearest)], place.shape
    if not mask.any() or mask.sum() > _MOST * np.prod(shape):
        return None
    (box,) = ndimage.find_objects(mask.astype(np.uint8))  # smaller, where the image ends within the region
    mask, origin = mask[box], [low + cut.start for low, cut in zip(origin, box, strict=True)]
    if mask.ndim == 2:  # a radiograph is one plane
        mask, origin, shape = mask[np.newaxis], [0, *origin], (1, *shape)
    return Region(
        mask=np.ascontiguousarray(mask),
        origin=(origin[0], origin[1], origin[2]),
        shape=(shape[0], shape[1], shape[2]),
        affine=place.affine,
        image=saliency.image,
        sop_instance_uids=place.sop_instance_uids,
        frame_numbers=place.frame_numbers,
    )


def _steps(saliency: Saliency, place: Place) -> list[tuple[float, float]]:
    """Along each axis of the arrays: how many voxels of the image one of the map spans, and the image's index of the map's first."""
    if saliency.affine is None:
        raise ValueError(f"The map of image {saliency.image!r} has no place in it.")
    to_image = saliency.affine if place.affine is None else np.linalg.inv(place.affine) @ saliency.affine
    linear = to_image[:-1, :-1]
    if np.abs(linear - np.diag(np.diag(linear))).max() > _PARALLEL * np.abs(linear).max() or np.diag(linear).min() <= 0:
        raise ValueError(f"The map of image {saliency.image!r} is not parallel to it.")
    steps = [(float(linear[axis, axis]), float(to_image[axis, -1])) for axis in range(len(linear))]
    return steps if place.affine is None else steps[::-1]  # an affine counts (i, j, k), an array (k, j, i)
