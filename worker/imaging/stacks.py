"""The frames of one series → its stacks: what may form one volume together, each with a label in words.

::

    frames ─▶ apart by what one volume never mixes: plane, size, spacing, frame of reference, image type, contrast, kilovolts, kernel, echo,
             b-value
           ─▶ where positions still repeat: apart by what explains it, in exactly as many stacks as a position has frames
           ─▶ else together, and geometry.py refuses them: slices stand where another does

A few stray slices are a stack of their own; which stack is used is the bundle's word, never ours. No file order and no name of a
file has a say. Labels hold numbers and words of ours, never a text of the header, which could be a patient's.
Not here: whether a stack is regular (geometry.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Final, Literal

import numpy as np

from worker.imaging.frame import Frame
from worker.imaging.geometry import MIN_SLICES, SAME_PLACE_MM

#: Which stack of several a bundle wants.
Choice = Literal["only", "first", "last", "largest"]
Value = tuple[float, ...] | tuple[str, ...]

#: Two orientations are one when no cosine differs by more; two pixel spacings when they differ by no more than this part.
ORIENTATION_TOLERANCE: Final = 1e-4
SPACING_TOLERANCE: Final = 1e-4
# Vendors write the echo time, the b-value and the voltage that came about, a little off the one that was asked for.
_ECHO_TOLERANCE, _B_VALUE_TOLERANCE, _KV_TOLERANCE = 0.01, 0.02, 0.01
#: Words for value 3 and on of Image Type (PS3.3 §C.8.3.1.1.1, §C.8.13.1.1.1.3, §C.8.16.1) and vendors' for the same.
_IMAGE_TYPES: Final = {
    "M": "magnitude", "MAGNITUDE": "magnitude", "P": "phase", "PHASE": "phase", "R": "real", "REAL": "real", "I": "imaginary",
    "IMAGINARY": "imaginary", "MIP": "maximum intensity projection", "MAX_IP": "maximum intensity projection",
    "MIN_IP": "minimum intensity projection", "PROJECTION IMAGE": "projection", "MPR": "reformat", "ADC": "diffusion coefficient",
    "FA": "fractional anisotropy", "TRACEW": "trace-weighted", "SUB": "subtraction", "SUBTRACTION": "subtraction", "W": "water",
    "WATER": "water", "F": "fat", "FAT": "fat", "IN_PHASE": "in phase", "OUT_PHASE": "out of phase", "OPP_PHASE": "out of phase",
}  # fmt: skip
_PLANES: Final = ("sagittal", "coronal", "axial")
#: Most stacks that a refusal lists.
_LISTED: Final = 6


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """Frames that may form one volume, and what tells them from the others of their series; '' if there are no others."""

    label: str
    frames: tuple[Frame, ...]


@dataclass(frozen=True, slots=True)
class _Mark:
    """One thing by which frames may differ: its name, its value, and the words for the nth of its values."""

    name: str
    of: Callable[[Frame], Value]
    words: Callable[[Value, int], str]
    relative: float = 0.0
    absolute: float = 0.0


def _number(value: float | None) -> Value:
    return () if value is None else (value,)


def _with_unit(name: str, unit: str = "") -> Callable[[Value, int], str]:
    return lambda value, _n: f"{name} {value[0]:g}{unit}" if value else f"no {name}"


def _numbered(name: str) -> Callable[[Value, int], str]:
    return lambda _value, n: f"{name} {n}"


def _plane(value: Value, _n: int) -> str:
    cosines = np.array(value, np.float64)
    normal = np.abs(np.cross(cosines[:3], cosines[3:]))
    return ("" if normal.max() > 0.95 else "oblique ") + _PLANES[int(normal.argmax())]


def _image_type(value: Value, n: int) -> str:
    return next((_IMAGE_TYPES[str(part)] for part in value if part in _IMAGE_TYPES), f"image type {n}")


#: What one volume never mixes, in the order in which a refusal names it.
_NEVER_MIXED: Final = (
    _Mark("orientation", lambda one: one.orientation or (), _plane, absolute=ORIENTATION_TOLERANCE),
    _Mark("Rows x Columns", lambda one: tuple(map(float, one.pixels.shape)), lambda v, _n: f"{v[0]:g} x {v[1]:g} pixels"),
    _Mark("pixel spacing", lambda one: one.pixel_spacing or (), lambda v, _n: f"{v[0]:g} x {v[1]:g} mm", relative=SPACING_TOLERANCE),
    _Mark("Frame of Reference UID", lambda one: (one.frame_of_reference_uid,), _numbered("frame of reference")),
    _Mark("Modality", lambda one: (one.modality,), _numbered("modality")),
    # PS3.3 §C.7.6.1.1.2: value 2 tells images of the patient from reformats and captures made of them.
    _Mark("Image Type value 2", lambda one: one.image_type[1:2], lambda v, _n: "secondary" if "SECONDARY" in v else "primary"),
    _Mark("Image Type from value 3 on", lambda one: one.image_type[2:], _image_type),
    _Mark("Photometric Interpretation", lambda one: (one.photometric,), _numbered("photometric interpretation")),
    # Dual-energy CT, and thin slices of two reconstructions: the same place has other values in each.
    _Mark("KVP", lambda one: _number(one.kilovolts), lambda v, _n: f"{v[0]:g} kV" if v else "no KVP", relative=_KV_TOLERANCE),
    _Mark("Convolution Kernel", lambda one: one.kernel, _numbered("kernel")),
    _Mark("Echo Time", lambda one: _number(one.echo_time), _with_unit("echo time", " ms"), relative=_ECHO_TOLERANCE),
    _Mark("Echo Numbers", lambda one: _number(one.echo_number), _with_unit("echo")),
    _Mark("b-value", lambda one: _number(one.b_value), _with_unit("b-value"), relative=_B_VALUE_TOLERANCE),
    _Mark(
        "Contrast/Bolus Agent",
        lambda one: (float(one.has_contrast),),
        lambda v, _n: "with contrast agent" if v[0] else "without contrast agent",
    ),
)
_ACQUISITION: Final = _Mark("Acquisition Number", lambda one: _number(one.acquisition_number), _with_unit("acquisition"))
_AT: Final = _Mark("Acquisition Time", lambda one: (one.acquired_at,), _numbered("acquisition"))
_TRIGGER: Final = _Mark("Trigger Time", lambda one: _number(one.trigger_time), _numbered("cardiac phase"))
#: What may explain that positions repeat, and means nothing where they do not: each slice has its own acquisition time.
_EXPLAINS: Final = (
    _Mark("Stack ID", lambda one: (one.stack_id,), _numbered("stack")),
    _Mark("Temporal Position", lambda one: _number(one.temporal_position), _with_unit("time point")),
    _Mark("Cardiac Phase", lambda one: _number(one.cardiac_phase), _with_unit("cardiac phase", " %")),
    _TRIGGER,
    _Mark("Diffusion Direction", lambda one: one.diffusion_direction or (), _numbered("diffusion direction")),
    _ACQUISITION,
    _AT,
)
#: Of these, what is said of stacks alone.
_SAYS: Final = _EXPLAINS[:3]


def split(frames: Sequence[Frame]) -> tuple[tuple[Stack, ...], str]:
    """Take the frames of a series apart.

    Returns
    -------
    stacks, cause
        The stacks by the time they were acquired, then by Instance Number, then by UID; and, if there are several, what tells
        them apart, as a sentence.
    """
    # Sorted first: the classes below must not depend on the order in which files came.
    frames = sorted(frames, key=lambda one: (one.sop_instance_uid, one.number))
    groups, cause = _apart(frames)
    found: list[tuple[list[str], list[Frame]]] = []
    repeats = 0
    for words, group in groups:
        parts = _explained(group)
        repeats += len(group) - len(set(_places(group)))
        found += [([*words, *more], part) for more, part in parts]
    found.sort(key=lambda one: min((f.acquired_at, f.instance_number or 0, f.sop_instance_uid, f.number) for f in one[1]))
    if len(found) < 2:
        return tuple(Stack("", tuple(group)) for _, group in found), ""
    labels = [", ".join(words) for words, _ in found]
    often, seen = Counter(labels), Counter[str]()
    for n, label in enumerate(labels):
        seen[label] += 1
        labels[n] = f"{label} ({seen[label]})" if often[label] > 1 else label
    return tuple(Stack(label, tuple(group)) for label, (_, group) in zip(labels, found, strict=True)), (
        cause or (f"{repeats} slices stand where another does." if repeats else "The header tells several stacks apart.")
    )


def listed(stacks: Sequence[Stack], *, of: str = "slice") -> str:
    """Name stacks with the number of slices of each: "2 stacks: axial (30 slices), sagittal (1 slice)"."""
    named = [f"{one.label} ({len(one.frames)} {of}{'s' if len(one.frames) > 1 else ''})" for one in stacks[:_LISTED]]
    more = f" and {len(stacks) - _LISTED} more" if len(stacks) > _LISTED else ""
    return f"{len(stacks)} stacks: {', '.join(named)}{more}"


def _apart(frames: list[Frame]) -> tuple[list[tuple[list[str], list[Frame]]], str]:
    """Take frames apart by what one volume never mixes; each group with the words that tell it, and what differs first."""
    keys: list[tuple[int, ...]] = [()] * len(frames)
    words: list[list[str]] = [[] for _ in frames]
    cause = ""
    for mark in _NEVER_MIXED:
        classes, named = _classes(mark, frames)
        if len(named) == 1:
            continue
        cause = cause or _cause(mark, classes, frames)
        finer = [(*key, number) for key, number in zip(keys, classes, strict=True)]
        if len(set(finer)) > len(set(keys)):  # what tells nothing more apart needs no words
            keys = finer
            for word, number in zip(words, classes, strict=True):
                word.append(named[number])
    groups: dict[tuple[int, ...], tuple[list[str], list[Frame]]] = {}
    for one, key, word in zip(frames, keys, words, strict=True):
        groups.setdefault(key, (word, []))[1].append(one)
    return list(groups.values()), cause


def _classes(mark: _Mark, frames: Sequence[Frame]) -> tuple[list[int], list[str]]:
    """Number the value of each frame by its class, and name the classes; values within the mark's tolerance are one class."""
    values = [mark.of(one) for one in frames]
    number: dict[Value, int] = {}
    firsts: list[Value] = []
    for value in sorted(set(values), key=lambda value: (len(value), value)):
        near = _near(value, firsts, mark) if mark.relative or mark.absolute else -1
        if near < 0:
            near = len(firsts)
            firsts.append(value)
        number[value] = near
    return [number[value] for value in values], [mark.words(value, n) for n, value in enumerate(firsts, start=1)]


def _near(value: Value, firsts: Sequence[Value], mark: _Mark) -> int:
    """Return the first of `firsts` within the mark's tolerance of `value`, -1 if there is none."""
    alike = [n for n, first in enumerate(firsts) if len(first) == len(value)]
    if not alike or not value:
        return -1
    table = np.array([firsts[n] for n in alike], np.float64)  # (n, numbers)
    is_near = (abs(table - np.array(value, np.float64)) <= mark.absolute + mark.relative * abs(table)).all(axis=1)
    return alike[int(is_near.argmax())] if is_near.any() else -1


def _cause(mark: _Mark, classes: Sequence[int], frames: Sequence[Frame]) -> str:
    counts = Counter(classes)
    if mark.name == "pixel spacing":
        spacings = np.array([one.pixel_spacing for one in frames], np.float64)
        low, high = spacings.min(axis=0), spacings.max(axis=0)
        return f"The pixel spacing differs between slices: {low[0]:g} to {high[0]:g} by {low[1]:g} to {high[1]:g} mm."
    if mark.name != "orientation":
        return f"{mark.name} differs between slices: {len(counts)} different ones."
    most = counts.most_common(1)[0][0]
    cosines = np.array([one.orientation for one in frames], np.float64)
    normals = np.cross(cosines[:, :3], cosines[:, 3:])
    usual = normals[classes.index(most)]
    degrees = float(np.degrees(np.arccos(np.clip((normals @ usual).min(), -1, 1))))
    return (
        f"{len(frames) - counts[most]} of {len(frames)} slices have another orientation than the others; "
        f"their normals are up to {degrees:.2f} degrees apart."
    )


def _explained(frames: list[Frame]) -> list[tuple[list[str], list[Frame]]]:
    """Take frames of one grid apart where positions repeat, if something in their headers says why; else leave them together."""
    places = _places(frames)
    most = max(Counter(places).values())
    if most == 1:
        return _told_apart(frames)
    found = {mark.name: _classes(mark, frames) for mark in _EXPLAINS}
    for size in (1, 2):
        for marks in combinations(_EXPLAINS, size):
            keys = list(zip(*(found[mark.name][0] for mark in marks), strict=True))
            if len(set(keys)) == most and len(set(zip(keys, places, strict=True))) == len(frames):
                return _grouped(frames, keys, {key: [found[m.name][1][n] for m, n in zip(marks, key, strict=True)] for key in keys})
    for mark, is_in_passes in ((_TRIGGER, False), (_AT, True)):
        ranks = _ranks(frames, places, mark, is_in_passes=is_in_passes)
        if ranks:
            return _grouped(frames, ranks, {rank: [mark.words((), rank[0] + 1)] for rank in ranks})
    return [([], frames)]


def _told_apart(frames: list[Frame]) -> list[tuple[list[str], list[Frame]]]:
    """Take apart frames none of which repeats a position, when the header says outright that they are of several stacks.

    Two phases half a gap apart would else pass for one volume of thin slices. A value that each slice has for itself says nothing,
    and acquisition numbers only in CT: one volume of MR is often acquired in two passes, odd slices and even.
    """
    for mark in _SAYS:
        classes, named = _classes(mark, frames)
        if len(named) > 1 and max(Counter(classes).values()) >= MIN_SLICES:
            return _grouped(frames, [(n,) for n in classes], {(n,): [named[n]] for n in classes})
    classes, named = _classes(_ACQUISITION, frames)
    # A CT scans one range after the other: acquisitions whose slices alternate are two scans of one range.
    if frames[0].modality == "CT" and min(Counter(classes).values()) >= MIN_SLICES:
        along = [n for _, n in sorted(zip(_places(frames), classes, strict=True))]
        if sum(a != b for a, b in pairwise(along)) >= len(named):
            return _grouped(frames, [(n,) for n in classes], {(n,): [named[n]] for n in set(classes)})
    return [([], frames)]


def _places(frames: Sequence[Frame]) -> list[int]:
    """Number the heights along the normal, those within SAME_PLACE_MM of the one below being one."""
    cosines = np.median(np.array([one.orientation for one in frames], np.float64), axis=0)
    heights = np.array([one.position for one in frames], np.float64) @ np.cross(cosines[:3], cosines[3:])
    order = np.argsort(heights, kind="stable")
    places = np.empty(len(frames), int)
    places[order] = np.cumsum(np.diff(heights[order], prepend=heights[order[0]]) >= SAME_PLACE_MM)
    return [int(place) for place in places]


def _ranks(frames: Sequence[Frame], places: Sequence[int], mark: _Mark, *, is_in_passes: bool) -> list[tuple[int, ...]]:
    """Number the frames of each place by the mark's value, when each place has as many and no two alike; else nothing.

    A heart's phases come at slightly different times in each slice; of acquisitions, one must end before the next begins.
    """
    values, _ = _classes(mark, frames)  # in the order of what they stand for
    at: dict[int, list[int]] = {}
    for n, place in enumerate(places):
        at.setdefault(place, []).append(n)
    counts = {len(of) for of in at.values()}
    if (
        len(counts) > 1
        or any(mark.of(one) in {(), ("",)} for one in frames)
        or any(len({values[n] for n in of}) < len(of) for of in at.values())
    ):
        return []
    ranks: list[tuple[int, ...]] = [()] * len(frames)
    for of in at.values():
        for rank, n in enumerate(sorted(of, key=lambda n: values[n])):
            ranks[n] = (rank,)
    passes = [[value for value, rank in zip(values, ranks, strict=True) if rank == (r,)] for r in range(max(counts))]
    if is_in_passes and any(max(one) >= min(after) for one, after in pairwise(passes)):
        return []
    return ranks


def _grouped(
    frames: Sequence[Frame], keys: Sequence[tuple[int, ...]], words: dict[tuple[int, ...], list[str]]
) -> list[tuple[list[str], list[Frame]]]:
    groups: dict[tuple[int, ...], list[Frame]] = {key: [] for key in sorted(set(keys))}
    for one, key in zip(frames, keys, strict=True):
        groups[key].append(one)
    return [(words[key], group) for key, group in groups.items()]
