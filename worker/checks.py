"""What is checked before the network is asked: whom and what it is meant for. A confident answer to the wrong question is the worst.

::

    study, record ─▶ patient: age and sex within what the bundle is meant for
    Volume ─▶ image: finite, spacing and statistics as the bundle says; in HU: air and tissue are there
    tensor ─▶ tensor: finite, statistics as the bundle says

Modality, body part, view, contrast and what else a header says are rules of selection.py. In training and in service alike.
Sentences hold numbers, never a birth date: an age is said in full years.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Final

import numpy as np
from numpy.typing import NDArray

from models.spec import ImageSpec, PatientRule
from worker.domain import PatientRecord, Series, Study, Volume
from worker.errors import Implausible, PixelError
from worker.inputs import age_of

#: HU of air in and around a patient, lung included, lie below; fat, the least dense of tissues, above (-120 to -30 HU).
AIR_BELOW_HU: Final = -200.0
#: HU of soft tissue, blood and fat lie between.
TISSUE_HU: Final = (-200.0, 300.0)
#: So large a part of a volume must at least be each of them. Without the rescale intercept nothing lies below -200.
LEAST_SHARE: Final = 0.004
#: Voxels looked at for statistics; of more, an even sample. A percentile of a million is good to 0.1 %.
SAMPLED: Final = 2**20

#: The axis of LPS that runs along the normal of each plane, to within 30 degrees.
_NORMALS: Final = {"sagittal": 0, "coronal": 1, "axial": 2}
_PLANE: Final = math.cos(math.radians(30))
_SEX: Final = {"F": "female", "M": "male", "O": "other"}
_WORDS: Final = {"p1": "first percentile", "p50": "median", "p99": "99th percentile", "mean": "mean", "sd": "standard deviation"}


def patient(study: Study, record: PatientRecord | None, series: Iterable[Series], rule: PatientRule) -> str:
    """Why the bundle is not meant for the patient, '' if it is; age and sex as the study tells, else the record, else Patient's Age."""
    people = (study.patient, record.patient) if record else (study.patient,)
    if rule.age_years:
        born = (_full_years(one.birth_date, study.study_at) for one in people)
        told = (i.facts.age_years for one in series for i in one.instances)
        age = next((years for years in (*born, *told) if years is not None), None)
        least, most = rule.age_years
        if age is None and rule.unknown == "refuse":
            return f"The patient's age is not known, and the bundle is meant for {least:g} to {most:g} years."
        if age is not None and not least <= math.floor(age) <= most:
            return f"The patient is {math.floor(age)} years old; the bundle is meant for {least:g} to {most:g} years."
    sex = next((one.sex for one in people if one.sex), "")
    if rule.sexes and sex not in rule.sexes and (sex or rule.unknown == "refuse"):
        meant = " or ".join(_SEX[one] for one in rule.sexes)
        return f"The patient's sex is {_SEX.get(sex, 'not known')}, and the bundle is meant for {meant}."
    return ""


def _full_years(birth_date: str, at: datetime) -> float | None:
    if age_of(birth_date, at) is None:
        return None
    return float(max(0, int(f"{at:%Y%m%d}") - int(birth_date)) // 10_000)


def image(volume: Volume, spec: ImageSpec) -> None:
    """Refuse pixels that cannot be what the bundle takes.

    Raises
    ------
    PixelError
        A pixel is infinite or undefined.
    Implausible
        Spacing, orientation or statistics are not what the bundle says, or a CT holds no air or no tissue.
    """
    array = volume.array
    # A sum is finite unless an element is not, but for an overflow; looking at each takes a second array of the same size.
    with np.errstate(all="ignore"):
        is_suspect = not math.isfinite(float(array.sum(dtype=np.float64)))
    if is_suspect and (count := int((~np.isfinite(array)).sum())):
        raise PixelError(f"{count} pixels of the series are not finite numbers.")
    _check_spacing(volume, spec)
    _check_orientation(volume, spec)
    if spec.intensity:
        _check_statistics(array, spec.intensity, "The pixels'")
    elif spec.kind == "volume" and (spec.unit == "HU" or volume.modality == "CT"):
        _check_hu(array)


def tensor(array: NDArray[np.float32], spec: ImageSpec) -> None:
    """Refuse what the network would be given, (1, *size), if it is not finite or not what the bundle says (PixelError, Implausible)."""
    if not np.isfinite(array).all():
        raise PixelError(f"{int((~np.isfinite(array)).sum())} numbers of the network's input are not finite.")
    _check_statistics(array, spec.tensor, "The network's input is not like those it learned from: its")


def _check_spacing(volume: Volume, spec: ImageSpec) -> None:
    between, *pixels = volume.spacing_mm
    for what, limits, lengths in (("slices", spec.slice_mm, [between]), ("pixels", spec.pixel_mm, pixels)):
        # A part in a thousand: headers are decimal strings, positions are subtracted.
        wrong = [mm for mm in lengths if limits and mm and not limits[0] * 0.999 <= mm <= limits[1] * 1.001]
        if wrong:
            raise Implausible(f"The {what} are {wrong[0]:.4g} mm apart, and the bundle takes {limits[0]:g} to {limits[1]:g} mm.")


def _check_orientation(volume: Volume, spec: ImageSpec) -> None:
    """Judge the plane by what was read: an enhanced object says it of each frame, where the choice of a series cannot see it."""
    if not spec.orientation or volume.affine is None:
        return
    row, column = (volume.affine[:3, n] / np.linalg.norm(volume.affine[:3, n]) for n in (0, 1))
    normal = np.abs(np.cross(row, column))  # LPS
    if normal[_NORMALS[spec.orientation]] < _PLANE:
        raise Implausible(f"The slices are not {spec.orientation}, and the bundle takes no others.")


def _check_hu(array: NDArray[np.float32]) -> None:
    values = _sample(array)
    air = float((values < AIR_BELOW_HU).mean())
    tissue = float(((values >= TISSUE_HU[0]) & (values <= TISSUE_HU[1])).mean())
    for what, share, limits in (
        ("air", air, f"below {AIR_BELOW_HU:g} HU"),
        ("tissue", tissue, f"from {TISSUE_HU[0]:g} to {TISSUE_HU[1]:g} HU"),
    ):
        if share < LEAST_SHARE:
            raise Implausible(
                f"The values are not plausible Hounsfield units: {share:.2%} are {what} ({limits}), and {LEAST_SHARE:.1%} are the least; "
                f"they lie from {float(array.min()):g} to {float(array.max()):g}."
            )


def _check_statistics(array: NDArray[np.float32], limits: Mapping[str, Sequence[float]], whose: str) -> None:
    if not limits:
        return
    values = _sample(array).astype(np.float64)
    percentiles = dict(zip(("p1", "p50", "p99"), np.percentile(values, (1, 50, 99)).tolist(), strict=True))
    found = {**percentiles, "mean": float(values.mean()), "sd": float(values.std())}
    for name, (low, high) in limits.items():
        if not low <= found[name] <= high:
            raise Implausible(f"{whose} {_WORDS[name]} is {found[name]:.4g}, and the bundle takes {low:g} to {high:g}.")


def _sample(array: NDArray[np.float32]) -> NDArray[np.float32]:
    # A prime step, so that no axis' length divides it and each column of the image is met.
    flat, step = array.reshape(-1), 1
    if flat.size > SAMPLED:
        step = next(n for n in range(flat.size // SAMPLED + 1, flat.size) if all(n % d for d in range(2, math.isqrt(n) + 1)))
    return flat[::step]
