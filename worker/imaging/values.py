"""Stored pixel values → values with a meaning: rescaled, padding out of the way, bright is dense.

Not here: where the pixels lie (volume.py), how they are stored (pixels.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from worker.errors import PixelError
from worker.imaging.frame import Frame

#: Of one injection and one scan there is one factor.
_SAME_FACTOR: Final = 1 + 1e-6
_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)
#: Up to here float32 holds every whole number.
_FLOAT32_WHOLE: Final = 2**24
_THREADS: Final = min(os.cpu_count() or 1, 4)
#: Values of these modalities are physical, whatever their display: PS3.3 §C.8.2.1 (HU), §C.8.9.1 (Units).
_HAVE_UNITS: Final = frozenset({"CT", "PT"})


def values(slices: Sequence[Frame], *, unit: str = "") -> NDArray[np.float32]:
    """Rescale every slice (PS3.3 §C.11.1) by its own rescale into one (K, J, I) array; padding takes the least real value.

    Parameters
    ----------
    unit
        "HU" or "SUVbw" (g/ml), refused where the header does not allow it; "" for what the rescale gives, which is HU for CT.

    Raises
    ------
    PixelError
        The rescale is incomplete, zero, overflows, is not in the unit or not in that of the other slices; every pixel is padding,
        or padding lies between the values of real pixels.
    """
    rescales = [_rescale(one, unit) for one in slices]
    _check_alike(slices, unit)
    array = np.empty((len(slices), *slices[0].pixels.shape), np.float32)
    # NumPy lets go of the interpreter in its loops.
    with ThreadPoolExecutor(min(_THREADS, len(slices)), thread_name_prefix="rescale") as threads:
        made = list(threads.map(partial(_rescaled, array, slices, rescales), range(len(slices))))
    ends = [end for _, both in made for end in both]
    if not ends:
        raise PixelError("Every pixel is padding.")
    for k, (pad, _) in enumerate(made):
        if pad is not None:
            array[k][pad] = min(ends)
    return array


def _rescaled(
    array: NDArray[np.float32], slices: Sequence[Frame], rescales: Sequence[tuple[float, float]], k: int
) -> tuple[NDArray[np.bool_] | None, tuple[float, ...]]:
    """Rescale slice `k` into `array`, and return its padding and the ends of its real values, none if all is padding."""
    one, (slope, intercept) = slices[k], rescales[k]
    pad = _padding(one)
    real = one.pixels if pad is None else one.pixels[~pad]
    ends: tuple[float, ...] = ()
    if real.size:
        if pad is not None:
            _check_outside(one, real)
        # Linear, so the ends of the stored values are the ends of the rescaled ones.
        ends = (slope * int(real.min()) + intercept, slope * int(real.max()) + intercept)
        if not max(map(abs, ends)) <= _FLOAT32_MAX:
            raise PixelError(f"Rescaled pixel values of slice {k + 1} of {len(slices)} are not finite.")
    largest = abs(slope) * 2 ** (8 * one.pixels.itemsize) + abs(intercept)
    if largest <= _FLOAT32_WHOLE and slope == round(slope) and intercept == round(intercept):
        # Every number on the way is whole and float32 holds it: the same as in float64, without going there.
        plane = array[k]
        if slope == 1:
            np.add(one.pixels, np.float32(intercept), out=plane)
        else:
            np.multiply(one.pixels, np.float32(slope), out=plane)
            np.add(plane, np.float32(intercept), out=plane)
    else:  # rescaled in float64, rounded once
        exact = np.multiply(one.pixels, slope, dtype=np.float64)
        np.add(exact, intercept, out=array[k], casting="same_kind")
    return pad, ends


def _check_alike(slices: Sequence[Frame], unit: str) -> None:
    """Refuse slices whose values are not of one kind: without its rescale, one slice would be brighter or darker than its neighbors."""
    without = sum(one.rescale_slope is None and not one.has_modality_lut for one in slices)
    if 0 < without < len(slices):
        raise PixelError(f"{without} of {len(slices)} slices have no rescale, and the others do.")
    kinds = {one.rescale_type or ("HU" if one.modality == "CT" else "") for one in slices}
    if len(kinds) > 1:
        raise PixelError(f"The slices are in {len(kinds)} different units: Rescale Type (0028,1054) or Units (0054,1001) differs.")
    factors = [one.suv_factor for one in slices if one.suv_factor is not None]
    if unit == "SUVbw" and factors and max(factors) > min(factors) * _SAME_FACTOR:
        raise PixelError("The slices have different standardized uptake values for one activity: weight, dose or times differ.")


def _padding(one: Frame) -> NDArray[np.bool_] | None:
    if one.padding is None:
        return None
    pad: NDArray[np.bool_] = (one.pixels >= one.padding[0]) & (one.pixels <= one.padding[1])
    return pad if pad.any() else None


def _check_outside(one: Frame, real: NDArray[np.integer]) -> None:
    """Refuse padding with real values on both sides: it cannot be told from anatomy, whose pixels would become holes."""
    first, last = one.padding or (0, 0)
    if int(real.min()) < first and last < int(real.max()):
        raise PixelError(
            f"Padding from {first} to {last} lies between the values of real pixels, {int(real.min())} to {int(real.max())}: "
            "what is padding and what is image cannot be told."
        )


def _rescale(one: Frame, unit: str) -> tuple[float, float]:
    """Return slope and intercept (PS3.3 §C.11.1), inverting for MONOCHROME1, when they are as the unit we promise needs them."""
    if (one.rescale_slope is None) != (one.rescale_intercept is None):
        raise PixelError("Only one of Rescale Slope (0028,1053) and Rescale Intercept (0028,1052) is there.")
    # PS3.3 §C.8.2.1: both are of type 1 in a CT image, and the unit is HU unless Rescale Type says otherwise.
    is_ct = one.modality == "CT"
    is_hu = (one.rescale_slope is not None and is_ct and one.rescale_type == "") or one.rescale_type == "HU"
    if (is_ct or unit == "HU") and not (is_hu and (one.has_modality_lut or one.rescale_slope is not None)):
        which = "A CT image" if is_ct else "The image"
        raise PixelError(f"{which} has no rescale to Hounsfield units: Rescale Slope (0028,1053) is absent or Rescale Type not HU.")
    slope = 1.0 if one.rescale_slope is None else one.rescale_slope
    intercept = one.rescale_intercept or 0.0
    if slope == 0 or (slope < 0 and is_ct):  # no CT counts downwards: air would be bone
        raise PixelError(f"Rescale Slope (0028,1053) is {slope:g}.")
    if unit == "SUVbw":
        if one.suv_factor is None:
            raise PixelError(f"There is no standardized uptake value: {one.suv_reason}")
        slope, intercept = slope * one.suv_factor, intercept * one.suv_factor
    if _is_inverted(one):
        # v → least + most - v over the range of Bits Stored: the same as inverting after the rescale.
        return -slope, intercept + slope * (-1 if one.is_signed else 2**one.bits_stored - 1)
    return slope, intercept


def _is_inverted(one: Frame) -> bool:
    """Tell whether small values are meant to be bright (PS3.3 §C.7.6.3.1.2)."""
    if (one.photometric, one.presentation_lut_shape) in {("MONOCHROME2", "INVERSE"), ("MONOCHROME1", "IDENTITY")}:
        # PS3.3 §C.8.11.3.1.2 pairs INVERSE with MONOCHROME1: this says bright is dense, and that it is not. Viewers differ.
        raise PixelError("Presentation LUT Shape (2050,0020) contradicts Photometric Interpretation (0028,0004).")
    return one.photometric == "MONOCHROME1" and one.modality not in _HAVE_UNITS
