"""Regions → Grayscale Softcopy Presentation States: each finding's outline and its words on the original images.

::

    finding ─▶ regions ─▶ planes ─▶ outlines along the pixels' edges ─▶ the frame's own pixels ─┐
    frame ─▶ how it is shown: rescale, window, polarity, size ─────────────────────────────────┴▶ one state an image, or look

A state replaces an image's grayscale pipeline, so all of it is repeated from the image: what is seen under the outline is what was
seen before. Images in color have no such state and none is made.

References: PS3.3 §A.33.1, §C.10.4 (Displayed Area), §C.10.5 (Graphic Annotation), §C.11.1, §C.11.2, §C.11.6; PS3.4 §N.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Final

import numpy as np
import pydicom
from highdicom import pr
from highdicom.color import CIELabColor
from highdicom.content import PresentationLUTTransformation
from numpy.typing import NDArray
from pydicom import config
from pydicom.dataset import Dataset
from pydicom.filewriter import correct_ambiguous_vr

from worker.domain import Document, Finding, Region, Verdict
from worker.report import codes
from worker.report.content import tracking_uid, verdict_in_words
from worker.report.result import Result, about

#: A closed line of corners (N, 2), column and row, whose first is its last.
Outline = NDArray[np.float64]

_MODALITY_LUT: Final = ("RescaleIntercept", "RescaleSlope", "RescaleType", "ModalityLUTSequence")
_VOI_LUT: Final = ("WindowCenter", "WindowWidth", "WindowCenterWidthExplanation", "VOILUTFunction", "VOILUTSequence")
_SPACING: Final = ("PixelSpacing", "ImagerPixelSpacing")
_PLACE: Final = ("ImagePositionPatient", "ImageOrientationPatient", *_SPACING)
_PART: Final = ("BodyPartExamined", "Laterality")
_IMAGE: Final = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "SamplesPerPixel",
                 "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns", "PixelRepresentation")  # fmt: skip
_GROUPS: Final = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
#: What is shown as it is stored, or turned round (PS3.3 §C.11.6).
_SHAPES: Final = {"MONOCHROME1": "INVERSE", "MONOCHROME2": "IDENTITY"}
#: Orange, yellow and blue of Okabe and Ito, which nobody confuses: https://jfly.uni-koeln.de/color/
_COLORS: Final[Mapping[Verdict, tuple[int, int, int]]] = {
    "positive": (230, 159, 0),
    "uncertain": (240, 228, 66),
    "negative": (86, 180, 233),
}
#: PS3.5 §6.2: Graphic Data is FL, whose explicit length has 16 bits; so many corners fit.
_MOST_CORNERS: Final = 8191
#: Lines of text on an image from top to bottom.
_LINES: Final = 24


@dataclass(frozen=True, slots=True)
class _Frame:
    """One frame of the analysed images, as a classic header describes it, and what is drawn on it."""

    image: str
    header: Dataset
    number: int
    marks: list[tuple[Finding, list[Outline]]] = field(default_factory=list)
    #: Where lines of text stand on it already, rows.
    lines: list[float] = field(default_factory=list)

    @property
    def look(self) -> str:
        """Equal for those that may share a state: they have one size, one rescale, one polarity."""
        return str([self.header.get(keyword) for keyword in ("Rows", "Columns", "PhotometricInterpretation", *_SPACING, *_MODALITY_LUT)])


def build(result: Result) -> tuple[Document, ...]:
    """Write one state an image of the bundle; one a look, where an image's slices are not rescaled alike, as in PET."""
    frames = sorted(_frames(result), key=lambda one: (one.image, one.look))  # stable: slices stay in their order
    alike = [list(of_look) for _, of_look in groupby(frames, key=lambda one: (one.image, one.look))]
    return tuple(_document(result, shown, number=number) for number, shown in enumerate(alike, start=1))


def outlines(mask: NDArray[np.bool_]) -> list[Outline]:
    """Follow the edges of the pixels in `mask` (J, I), clockwise about what is inside, counterclockwise about holes.

    Corners are (column, row), 0 being the edge of the first pixel and 1 that between it and the second. Pixels that touch at a corner alone
    are apart.
    """
    padded = np.pad(mask, 1)
    inside = padded[1:-1, 1:-1]
    # Neighbor outside → where the edge to it begins, seen from the pixel's corner, and in which direction it goes, (column, row).
    edges = ((padded[:-2, 1:-1], (0, 0), (1, 0)), (padded[1:-1, 2:], (1, 0), (0, 1)), (padded[2:, 1:-1], (1, 1), (-1, 0)),
             (padded[1:-1, :-2], (0, 1), (0, -1)))  # fmt: skip
    ways: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for neighbor, start, way in edges:
        for j, i in np.argwhere(inside & ~neighbor).tolist():
            ways.setdefault((i + start[0], j + start[1]), []).append(way)
    found = []
    for j, i in np.argwhere(inside & ~padded[:-2, 1:-1]).tolist():  # each line has an upper edge, and begins at its leftmost end
        if (1, 0) in ways.get((i, j), ()):
            found.append(_followed(ways, (i, j)))
    return found


def _followed(ways: dict[tuple[int, int], list[tuple[int, int]]], start: tuple[int, int]) -> Outline:
    """Walk from `start` to the right and back to it, taking the edges away; to the right, too, where two pixels touch at a corner."""
    at, way, corners = start, (1, 0), [start]
    while True:
        ways[at].remove(way)
        at = (at[0] + way[0], at[1] + way[1])
        turn = (-way[1], way[0])
        if at == start and turn not in ways[at]:
            return np.array([*corners, start], np.float64)
        ahead = turn if turn in ways[at] else ways[at][0]
        if ahead != way:
            corners.append(at)
        way = ahead


def _frames(result: Result) -> list[_Frame]:
    """Draw every region on its frames; those in color are left out."""
    frames: dict[tuple[str, str, int], _Frame] = {}
    read: dict[str, Dataset] = {}
    for finding, region in ((one, region) for one in result.findings for region in one.regions):
        for plane in np.flatnonzero(region.mask.any(axis=(1, 2))).tolist():
            k = plane + region.origin[0]
            uid, number = region.sop_instance_uids[k], region.frame_numbers[k]
            if uid not in read:
                read[uid] = _read(result, uid)
            one = frames.setdefault((region.image, uid, number), _Frame(region.image, _flat(read[uid], number), number))
            one.marks.append((finding, _on_frame(region, plane, one.header)))
    return [one for one in frames.values() if one.header.get("PhotometricInterpretation") in _SHAPES]


def _read(result: Result, uid: str) -> Dataset:
    wanted = [*_IMAGE, *_PART, *_PLACE, *_MODALITY_LUT, *_VOI_LUT, *_GROUPS]
    with config.disable_value_validation():
        ds = pydicom.dcmread(result.source.paths[uid], stop_before_pixels=True, specific_tags=list(wanted))
        correct_ambiguous_vr(ds, is_little_endian=True)  # of a lookup table: away from its image nothing says it
    return ds


def _flat(ds: Dataset, number: int) -> Dataset:
    """The header of one frame: what its functional groups say stands before what the object says (PS3.3 §C.7.6.16)."""
    flat = Dataset()
    flat.update({element.tag: element for element in ds if element.keyword not in _GROUPS and not element.is_empty})
    shared, each = (list(ds.get(keyword) or ()) for keyword in _GROUPS)
    for groups in (*shared[:1], *each[number - 1 : number]):
        for group in (one for one in groups if one.VR == "SQ"):
            for element in (said for item in group.value[:1] for said in item if said.keyword in (*_PLACE, *_MODALITY_LUT, *_VOI_LUT)):
                flat[element.tag] = element
    for one, other in (("WindowCenter", "WindowWidth"), ("WindowWidth", "WindowCenter")):  # neither means anything alone
        if other not in flat:
            flat.pop(one, None)
    return flat


def _on_frame(region: Region, plane: int, header: Dataset) -> list[Outline]:
    """The outlines of one plane of `region` in the pixels of its frame, of which 0 is the first one's outer edge (PS3.3 §C.10.5).

    The planes of a tilted gantry were sheared to make the volume; there, and only there, they are put back by their place in the patient.
    """
    size = int(header.Rows), int(header.Columns)
    found = [line + np.array(region.origin[:0:-1]) for line in outlines(region.mask[plane])]
    if region.affine is None or region.shape[1:] == size:
        return found
    position = np.array(header.ImagePositionPatient, float)
    row, column = np.array(header.ImageOrientationPatient, float).reshape(2, 3)
    between_rows, between_columns = (float(mm) for mm in header.PixelSpacing)
    placed = []
    for line in found:
        index = np.column_stack([line - 0.5, np.full(len(line), plane + region.origin[0]), np.ones(len(line))])  # middles of voxels
        offset = (index @ region.affine.T)[:, :3] - position  # (N, 3) mm
        pixels = np.column_stack([offset @ row / between_columns, offset @ column / between_rows]) + 0.5
        placed.append(np.clip(pixels, 0, size[::-1]))
    return placed


def _document(result: Result, shown: Sequence[_Frame], *, number: int) -> Document:
    """Write the state of frames that look alike."""
    marked = [(one, finding, drawn) for one in shown for finding, drawn in one.marks]
    layers = {
        finding.name: pr.GraphicLayer(
            f"FINDING_{order}",
            order=order,
            description=codes.short(verdict_in_words(result.algorithm, finding)),
            display_color=CIELabColor.from_rgb(*_COLORS[finding.verdict]),
        )
        for order, finding in enumerate(result.findings, start=1)
        if any(finding is other for _, other, _ in marked)
    }
    images = {one.header.SOPInstanceUID: _stand_in(result, one.header) for one in shown}
    ds = pr.GrayscaleSoftcopyPresentationState(
        referenced_images=list(images.values()),
        content_label="AI_REGIONS",
        content_description="Regions that the answers rest on, not outlined lesions",
        graphic_layers=list(layers.values()),
        graphic_annotations=[
            pr.GraphicAnnotation([images[one.header.SOPInstanceUID]], layers[finding.name], **_drawn(result, one, finding, drawn))
            for one, finding, drawn in marked
        ],
        presentation_lut_transformation=PresentationLUTTransformation(
            presentation_lut_shape=_SHAPES[shown[0].header.PhotometricInterpretation]
        ),
        **about(result, "gsps", str(number), number=number, what="outlines"),
    )
    # highdicom was given stand-ins of another class, and knows no frames.
    ds.ReferencedSeriesSequence[0].ReferencedImageSequence = _references(shown)
    for annotation, (one, *_) in zip(ds.GraphicAnnotationSequence, marked, strict=True):
        annotation.ReferencedImageSequence = _references([one])
    _keep_look(ds, shown)
    ds.ContentCreatorName = ""
    result.finish(ds)
    return result.document(ds, "gsps")


def _drawn(result: Result, one: _Frame, finding: Finding, drawn: Sequence[Outline]) -> dict[str, Any]:
    """The lines and the words of one finding on one frame."""
    tracked: dict[str, Any] = {"tracking_id": finding.name, "tracking_uid": tracking_uid(result.study, result.algorithm, finding)}
    box = _box(one, np.concatenate(drawn))
    return {
        "graphic_objects": [pr.GraphicObject("POLYLINE", part, "PIXEL", **tracked) for corners in drawn for part in _short_enough(corners)],
        "text_objects": [
            pr.TextObject(verdict_in_words(result.algorithm, finding), "PIXEL", bounding_box=box, text_justification="LEFT", **tracked)
        ],
    }


def _keep_look(ds: Dataset, shown: Sequence[_Frame]) -> None:
    """Repeat how the images are shown: rescale, windows (of each frame its own), pixels that are no squares; and of which part they are."""
    first = shown[0].header
    ds.update({first[keyword].tag: first[keyword] for keyword in (*_PART, *_MODALITY_LUT) if keyword in first})
    if "RescaleIntercept" in ds and not ds.get("RescaleType"):
        ds.RescaleType = "US"  # PS3.3 §C.11.1: required here, unlike in the image; unspecified
    windows: dict[str, list[_Frame]] = {}
    for one in shown:
        windows.setdefault(str([one.header.get(keyword) for keyword in _VOI_LUT]), []).append(one)
    items = []
    for alike in windows.values():
        item = Dataset()
        item.update({alike[0].header[keyword].tag: alike[0].header[keyword] for keyword in _VOI_LUT if keyword in alike[0].header})
        if len(item):
            item.ReferencedImageSequence = _references(alike)
            items.append(item)
    if items:
        ds.SoftcopyVOILUTSequence = items
    if spacing := next((first[keyword].value for keyword in _SPACING if first.get(keyword)), None):
        (area,) = ds.DisplayedAreaSelectionSequence
        area.PresentationPixelSpacing = spacing
        del area.PresentationPixelAspectRatio


def _references(frames: Sequence[_Frame]) -> list[Dataset]:
    """An item an instance; of one with several frames, which."""
    items: dict[str, Dataset] = {}
    numbers: dict[str, list[int]] = {}
    for one in frames:
        item = items.setdefault(one.header.SOPInstanceUID, Dataset())
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = one.header.SOPClassUID, one.header.SOPInstanceUID
        if int(one.header.get("NumberOfFrames") or 1) > 1:
            numbers.setdefault(one.header.SOPInstanceUID, []).append(one.number)
            item.ReferencedFrameNumber = numbers[one.header.SOPInstanceUID]
    return list(items.values())


def _short_enough(corners: Outline) -> Iterator[Outline]:
    """A line that one element cannot hold goes on in another, from where it stopped."""
    for start in range(0, len(corners) - 1, _MOST_CORNERS - 1):
        yield corners[start : start + _MOST_CORNERS]


def _box(one: _Frame, corners: Outline) -> tuple[float, float, float, float]:
    """Where a text stands: as near above its outline, or else below, as no other text of the frame does."""
    rows, columns = float(one.header.Rows), float(one.header.Columns)
    height = rows / _LINES
    (left, top), bottom = corners.min(axis=0), corners[:, 1].max()
    near = (*(top - height * n for n in (1, 2, 3)), *(bottom + height * n for n in (0, 1, 2)), *(height * n for n in range(_LINES)))
    free = (row for row in near if 0 <= row <= rows - height and all(abs(row - taken) >= height for taken in one.lines))
    one.lines.append(upper := float(next(free, 0.0)))
    return float(min(left, columns / 3)), upper, columns, upper + height


def _stand_in(result: Result, header: Dataset) -> Dataset:
    """What highdicom must know of an image: whose it is comes later, and the look it would copy its own way."""
    image = deepcopy(result.source.stand_in)
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "SamplesPerPixel", "Rows", "Columns"):
        image[keyword] = header[keyword]
    return image
