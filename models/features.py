"""Classical features of one image, for the baselines that the network has to beat.

::

    (1, H, W) in [0, 1] ────────────────────────────────────┐
    (1, X, Y, Z) in [0, 1] ─ its three middle planes, each ─┴─▶ intensity · texture · edges · shape ─▶ (F,)

Every measure is scikit-image's; what stands here is which ones, at which settings. It sees the very tensor that the network sees.
A volume is described by its middle sagittal, coronal and axial plane, in pixels of the tensor, however many mm those are.

A quarter turn or a mirror changes none of the intensity, co-occurrence, Sobel and "bright share" features, but for rounding. It
does change the gradients by cell and direction: they are there to say where and which way. Resolution changes nearly all: compare
images of one size only.
"""
# mypy: untyped-calls-exclude="skimage"
# scikit-image says it is typed; its functions are not.

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kurtosis, skew
from skimage.feature import canny, graycomatrix, graycoprops, hog, local_binary_pattern
from skimage.filters import sobel, threshold_otsu
from skimage.measure import label, regionprops, shannon_entropy
from torch import Tensor

FloatArray = NDArray[np.float64]

#: The planes of a volume (1, X, Y, Z) in RAS, in the order of the axes that they are perpendicular to.
PLANES: Final = ("sagittal", "coronal", "axial")
#: Fewest pixels along a side: the co-occurrence reaches 4 pixels far, and the gradient grid needs a few pixels a cell.
SMALLEST: Final = 16

PERCENTILES: Final = (5, 10, 25, 50, 75, 90, 95)
LEVELS: Final = 32
DISTANCES: Final = (1, 2, 4)  # pixels
ANGLES: Final = (0.0, np.pi / 4, np.pi / 2, 3 * np.pi / 4)  # rad
PROPERTIES: Final = ("contrast", "homogeneity", "energy", "correlation", "entropy")
RADII: Final = (1, 3)  # pixels
NEIGHBORS: Final = 8
#: A 2 x 2 grid of cells: upper and lower half, one side and the other.
GRID: Final = 2
ORIENTATIONS: Final = 8  # of the gradient, in half a turn; 0 degrees is along a row, as across a vertical edge
#: Canny's thresholds as gradient per pixel of an image in [0, 1]; below the weak one is what remains of noise after smoothing.
WEAK, STRONG, SMOOTHING_PIXELS = 0.05, 0.1, 2.0
#: A standard deviation below this is rounding: the moments above the second are then 0, not noise.
FLAT: Final = 1e-6


class _Region(NamedTuple):
    """The largest connected region on one side of Otsu's threshold; `area` and `extent` are shares, `eccentricity` 0 is a circle."""

    area: float
    eccentricity: float
    extent: float
    solidity: float


def feature_names(dims: int) -> tuple[str, ...]:
    """Name the F numbers of `features`, in their order; `dims` is 2 for images (1, H, W) and 3 for volumes (1, X, Y, Z).

    Raises
    ------
    ValueError
        `dims` is neither.
    """
    if dims not in (2, 3):
        raise ValueError(f"Features are of images with 2 or 3 dimensions, not {dims}.")
    names = tuple(_plane_features(np.zeros((SMALLEST, SMALLEST))))
    return names if dims == 2 else tuple(f"{plane}: {name}" for plane in PLANES for name in names)


def features(image: Tensor) -> FloatArray:
    """Describe one image (1, H, W) or volume (1, X, Y, Z) in [0, 1] by F finite numbers; the same image gives the same numbers.

    Parameters
    ----------
    image
        As models/transforms.py makes it; what lies outside [0, 1] is clipped. Each side of a plane has at least 16 pixels.

    Raises
    ------
    ValueError
        The shape is another, a side is shorter, or a pixel is not finite.

    References
    ----------
    Haralick et al., doi:10.1109/TSMC.1973.4309314. Ojala et al., doi:10.1109/TPAMI.2002.1017623. Canny,
    doi:10.1109/TPAMI.1986.4767851. Dalal and Triggs, doi:10.1109/CVPR.2005.177. Otsu, doi:10.1109/TSMC.1979.4310076.
    """
    array = image.detach().cpu().numpy().astype(np.float64)
    if array.ndim not in (3, 4) or len(array) != 1 or min(array.shape[1:]) < SMALLEST:
        raise ValueError(f"(1, H, W) or (1, X, Y, Z) of at least {SMALLEST} pixels a side is expected, found {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError("A pixel of the image is not finite.")
    body = array[0].clip(0.0, 1.0)
    planes = [body] if body.ndim == 2 else [body.take(size // 2, axis) for axis, size in enumerate(body.shape)]
    return np.array([value for plane in planes for value in _plane_features(plane).values()], np.float64)


def _plane_features(plane: FloatArray) -> dict[str, float]:
    """All features of one plane (H, W) in [0, 1], by name."""
    levels = np.minimum(plane * LEVELS, LEVELS - 1).astype(np.uint8)
    return {**_intensity(plane, levels), **_texture(levels), **_edges(plane), **_shape(plane)}


def _intensity(plane: FloatArray, levels: NDArray[np.uint8]) -> dict[str, float]:
    flat = float(plane.std()) < FLAT
    return {
        "intensity mean": float(plane.mean()),
        "intensity deviation": float(plane.std()),
        "intensity skewness": 0.0 if flat else float(skew(plane, axis=None)),
        "intensity kurtosis": 0.0 if flat else float(kurtosis(plane, axis=None)),
        "intensity entropy": float(shannon_entropy(levels)),  # bits
        **{f"intensity percentile {p}": float(v) for p, v in zip(PERCENTILES, np.percentile(plane, PERCENTILES), strict=True)},
    }


def _texture(levels: NDArray[np.uint8]) -> dict[str, float]:
    matrix = graycomatrix(levels, DISTANCES, ANGLES, levels=LEVELS, symmetric=True, normed=True)
    found: dict[str, float] = {}
    for name in PROPERTIES:
        for distance, by_angle in zip(DISTANCES, graycoprops(matrix, name), strict=True):
            found[f"co-occurrence {name} at {distance}, mean"] = float(by_angle.mean())
            found[f"co-occurrence {name} at {distance}, range"] = float(np.ptp(by_angle))
    for radius in RADII:
        patterns = local_binary_pattern(levels, NEIGHBORS, radius, method="uniform")
        # "uniform" has NEIGHBORS + 1 rotation-invariant patterns, and one bin for all others.
        shares = np.bincount(patterns.astype(np.int64).ravel(), minlength=NEIGHBORS + 2) / patterns.size
        found |= {f"binary pattern {index} at {radius}": float(share) for index, share in enumerate(shares)}
    return found


def _edges(plane: FloatArray) -> dict[str, float]:
    gradient = sobel(plane)
    edges = canny(plane, sigma=SMOOTHING_PIXELS, low_threshold=WEAK, high_threshold=STRONG)
    height, width = plane.shape
    cells: Any = hog(
        plane,
        orientations=ORIENTATIONS,
        pixels_per_cell=(height // GRID, width // GRID),
        cells_per_block=(GRID, GRID),  # one block: each number is relative to the whole plane
        block_norm="L2",
        feature_vector=False,
    )
    return {
        "sobel mean": float(gradient.mean()),
        "sobel deviation": float(gradient.std()),
        "sobel percentile 95": float(np.percentile(gradient, 95)),
        "canny density": float(edges.mean()),
        **{
            f"gradient {180 / ORIENTATIONS * orientation:g} degrees in cell {row}, {column}": float(cells[0, 0, row, column, orientation])
            for row in range(GRID)
            for column in range(GRID)
            for orientation in range(ORIENTATIONS)
        },
    }


def _shape(plane: FloatArray) -> dict[str, float]:
    """The largest bright and the largest dark region: of a radiograph the soft tissue, and lungs or air."""
    bright = plane > threshold_otsu(plane)
    found = {"bright share": float(bright.mean())}
    for side, mask in (("bright", bright), ("dark", ~bright)):
        found |= {f"{side} region {name}": value for name, value in _largest(mask)._asdict().items()}
    return found


def _largest(mask: NDArray[np.bool_]) -> _Region:
    regions = regionprops(label(mask))
    if not regions:
        return _Region(0.0, 0.0, 0.0, 0.0)
    # Among equals the first in reading order, so that the answer is one.
    region = max(regions, key=lambda r: r.area)
    return _Region(region.area / mask.size, region.eccentricity, region.extent, region.solidity)
