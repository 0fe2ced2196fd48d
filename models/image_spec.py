"""What a bundle says of one image: which series it is made of, how it is read, what it must look like, and its network's eyes.

Plain values, checked when the bundle is read. Not here: how a series is judged by them (worker/selection.py), how pixels are
(worker/checks.py), or what becomes of them (transforms.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, Literal

#: Keys of a sample that are no image (transforms.py), and the modalities of the record.
RESERVED: Final = frozenset({"values", "history", "text", "genes", "numbers", "signs", "number", "ages", "words", "context"})
_NAME: Final = re.compile(r"[a-z][a-z0-9_]*")
#: Of an array: its first, 50th and 99th percentile, its mean and its standard deviation.
STATISTICS: Final = ("p1", "p50", "p99", "mean", "sd")
#: Of a description, so much is looked at (LO, PS3.5 §6.2), and a regular expression is no longer than that.
LOOKED_AT: Final = 64
#: What can be repeated costs a power of the length: with four, a hostile description costs some milliseconds, with ten, hours.
MOST_REPEATS: Final = 4
#: PS3.5 §9.1, and a keyword of PS3.6 Annex A.
_CLASS: Final = re.compile(r"[0-9.]{1,64}|[A-Z][A-Za-z0-9]*Storage[A-Za-z0-9]*")


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """One image the network reads: which series it is made of, and what becomes of it. An empty tuple allows any.

    What a series does not say of itself excludes it only where a rule below says so. Words are compared without their case.

    Which series: `kind` says one radiograph (or one slice), a volume, or the frames of a clip. `modalities`; `sop_classes`: UIDs or
    keywords of PS3.6 ("CTImageStorage"). `image_types`: one of these must be a value of Image Type; `exclude_image_types`: none may.
    `derived`: whether images that were computed from others will do, screen captures and projections among them; by itself a volume
    may not be, while a radiograph or clip may be DERIVED, as most are, but not SECONDARY. `body_parts`: defined terms of Body Part
    Examined or codes of Anatomic Region; both spellings of a part are one. `descriptions`, `exclude_descriptions` (Series Description),
    `kernels` (Convolution Kernel, which must be there then): parts of words, or /regular expressions/. `contrast`: "with" needs a contrast
    agent in the header, "without" none. `slice_mm`, `pixel_mm`: least and greatest distance of slices and of pixels, in the header and
    again in what was read. `min_instances`, `max_instances` (0: any): images, each frame counts.
    Of several series that fit, the one wins that most patterns of `prefer` are found in (description, kernel or Image Type), then the
    one with most images, then the smaller series UID.

    How it is read: `gantry_tilt`, `stack`, `color`, `unit` as `worker.imaging.volume.load` documents them.

    What it must look like: `intensity`, least and greatest of statistics of the pixels in their unit, `tensor` of what the network
    gets, 0 to 1: ``{ p1 = [-1100, -500], sd = [100, 900] }``. A volume in Hounsfield units without `intensity` must hold air and tissue.

    What the network gets: `size` is (H, W) of a radiograph, (X, Y, Z) of a volume in RAS, (X, Y, T) of a clip, X along its rows;
    `spacing_mm` (volumes only) is the spacing those voxels stand for and `window_hu` what becomes 0 and 1, in the volume's unit.
    `grid`: token places along each axis. `like` names an earlier image whose encoder, weights included, this one shares.
    """

    name: str
    kind: Literal["volume", "radiograph", "frames"]
    modalities: tuple[str, ...]
    size: tuple[int, ...]
    sop_classes: tuple[str, ...] = ()
    image_types: tuple[str, ...] = ()
    exclude_image_types: tuple[str, ...] = ("LOCALIZER",)
    derived: bool | None = None
    body_parts: tuple[str, ...] = ()
    laterality: Literal["", "L", "R", "B", "U"] = ""
    descriptions: tuple[str, ...] = ()
    exclude_descriptions: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    contrast: Literal["", "with", "without"] = ""
    views: tuple[str, ...] = ()
    orientation: Literal["", "axial", "coronal", "sagittal"] = ""
    slice_mm: tuple[float, ...] = ()
    pixel_mm: tuple[float, ...] = ()
    min_instances: int = 1
    max_instances: int = 0
    prefer: tuple[str, ...] = ()
    required: bool = True
    gantry_tilt: Literal["refuse", "correct"] = "refuse"
    stack: Literal["only", "first", "last", "largest"] = "only"
    color: Literal["refuse", "luminance"] = "refuse"
    unit: Literal["", "HU", "SUVbw"] = ""
    intensity: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    tensor: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    spacing_mm: tuple[float, ...] = ()
    window_hu: tuple[float, ...] = ()
    encoder: Literal["residual", "resnet", "densenet"] = "residual"
    channels: tuple[int, ...] = (16, 32, 48, 64)
    grid: int = 4
    like: str = ""


def matches(pattern: str, text: str) -> bool:
    """Whether the first 64 characters of `text` hold `pattern`: words as they stand, or a regular expression written /…/. Case ignored."""
    text = text[:LOOKED_AT]
    return bool(_compiled(pattern).search(text)) if _is_expression(pattern) else pattern.casefold() in text.casefold()


def _is_expression(pattern: str) -> bool:
    return len(pattern) > 2 and pattern[0] == pattern[-1] == "/"


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern[1:-1], re.IGNORECASE)


def _is_bounded(pattern: str) -> bool:
    """Whether a pattern is words, or an expression that no description can keep busy: short, few repeats, none of a group."""
    if not pattern.strip():
        return False
    if not _is_expression(pattern):
        return True
    # What is escaped or in brackets repeats nothing, and "(?" opens a group.
    bare = re.sub(r"\(\?", "(", re.sub(r"\[\]?[^]]*\]", "x", re.sub(r"\\.", "x", pattern[1:-1])))
    try:
        _compiled(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    repeats = len(re.findall(r"[*+?{]", bare))
    return len(pattern) <= LOOKED_AT and repeats <= MOST_REPEATS and not re.search(r"\)\s*[*+{?]", bare) and "(P=" not in bare


def broken_image(image: ImageSpec, earlier: Sequence[ImageSpec]) -> list[str]:
    """What an image says that cannot be, each as a sentence's rest."""
    volume = image.kind == "volume"
    shared = next((one for one in earlier if one.name == image.like), None)
    rules = {
        "name must be lower-case letters, digits and _, and none of the record's modalities": bool(_NAME.fullmatch(image.name))
        and image.name not in RESERVED
        and not image.name.endswith("_mask"),
        "size needs 2 numbers for a radiograph, 3 for a volume or frames, each from 1 to 4096": len(image.size)
        == (2 if image.kind == "radiograph" else 3)
        and all(1 <= side <= 4096 for side in image.size),
        "spacing_mm and window_hu belong to a volume, and it needs both": (len(image.spacing_mm), len(image.window_hu))
        == ((3, 2) if volume else (0, 0)),
        "spacing_mm must be positive and finite": all(0 < mm < math.inf for mm in image.spacing_mm),
        "window_hu must be finite and increase": all(map(math.isfinite, image.window_hu))
        and sorted(set(image.window_hu)) == [*image.window_hu],
        "min_instances and grid must be at least 1, grid at most 64": image.min_instances >= 1 and 1 <= image.grid <= 64,
        "like must name an earlier image of the same kind, grid and encoder": not image.like
        or (shared is not None and (shared.kind, shared.grid, shared.encoder, shared.like) == (image.kind, image.grid, image.encoder, "")),
        "gantry_tilt, stack, slice_mm and orientation belong to slices, not to frames": image.kind != "frames"
        or (image.gantry_tilt, image.stack, image.slice_mm, image.orientation) == ("refuse", "only", (), ""),
        "gantry_tilt and stack belong to a volume": volume or (image.gantry_tilt, image.stack) == ("refuse", "only"),
    }
    return [rule for rule, holds in (rules | _broken_choice(image)).items() if not holds]


def _broken_choice(image: ImageSpec) -> dict[str, bool]:
    """The rules on what chooses a series and judges its pixels."""
    patterns = (*image.descriptions, *image.exclude_descriptions, *image.kernels, *image.prefer)
    return {
        "slice_mm must be [least, greatest]": _is_range(image.slice_mm) or not image.slice_mm,
        "pixel_mm must be [least, greatest]": _is_range(image.pixel_mm) or not image.pixel_mm,
        "max_instances must be 0, which is any, or at least min_instances": image.max_instances == 0
        or image.max_instances >= image.min_instances,
        "sop_classes must be UIDs, or keywords such as CTImageStorage": all(_CLASS.fullmatch(one) for one in image.sop_classes),
        "image_types and exclude_image_types must not share a value, nor hold an empty one": not _upper(image.image_types)
        & _upper(image.exclude_image_types)
        and "" not in _upper(image.image_types) | _upper(image.exclude_image_types),
        f"descriptions, exclude_descriptions, kernels and prefer must be words, or /expressions/ of at most {LOOKED_AT} characters with "
        f"at most {MOST_REPEATS} repeats and none of a group": all(map(_is_bounded, patterns)),
        f"intensity and tensor hold [least, greatest] of {', '.join(STATISTICS)}": all(
            name in STATISTICS and _is_range(limits) for limits_of in (image.intensity, image.tensor) for name, limits in limits_of.items()
        ),
    }


def _is_range(limits: Sequence[float]) -> bool:
    return len(limits) == 2 and limits[0] <= limits[1]  # NaN is no limit


def _upper(words: Iterable[str]) -> set[str]:
    return {word.strip().upper() for word in words}
