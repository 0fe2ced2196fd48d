"""What one answer is made from, and the answer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from worker.domain.images import Series
from worker.domain.record import Code

Verdict = Literal["positive", "negative", "uncertain"]

#: Kinds of documents, as `[[destinations]] documents` names them: those that an archive takes, and those of the other doors.
DICOM_KINDS: Final = ("sr", "seg", "map", "summary", "pdf", "gsps", "keys", "basic", "rejection")
KINDS_OF_DOOR: Final = {
    "dicom": DICOM_KINDS,
    "stow": DICOM_KINDS,
    "hl7": ("oru",),
    "fhir": ("fhir",),
    "webhook": ("notice",),
    "mail": ("notice",),
}


@dataclass(frozen=True, slots=True)
class UsedValue:
    """A value the network was given, and where it came from: who said it, in which message (its control ID, which the sender knows too).

    `age_h` is hours before the study, negative after it.
    """

    name: str
    code: Code
    value: float
    comparator: str
    unit: str
    at: datetime
    source: str
    age_h: float = 0.0
    message: str = ""


@dataclass(frozen=True, slots=True)
class UsedHistory:
    """How one value went before the study: every point the network was given, oldest first."""

    name: str
    code: Code
    points: tuple[UsedValue, ...]


@dataclass(frozen=True, slots=True)
class UsedText:
    """A text the network was given."""

    name: str
    code: Code
    text: str
    at: datetime
    source: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one prediction is made from: the chosen series and the record's view at the study.

    ``series`` is by image name, in the bundle's order; ``missing_images`` names the images without one.
    ``missing_causes`` says, entry by entry, why each code of ``missing`` is missing.
    """

    series: Mapping[str, Series]
    values: tuple[UsedValue, ...] = ()
    texts: tuple[UsedText, ...] = ()
    missing: tuple[Code, ...] = ()
    record_found: bool = False
    missing_causes: tuple[str, ...] = ()
    histories: tuple[UsedHistory, ...] = ()
    missing_images: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Saliency:
    """Where in one image a finding comes from; equal only to itself, as arrays are.

    ``array`` (K, J, I) of a volume, (rows, columns) of a radiograph or (T, rows, columns) of a clip, float16 or float32, in [0, 1].
    ``affine``: (4, 4), index (i, j, k, 1) of `array` → LPS mm. Without patient coordinates (row, column, 1) → row and column of a
    radiograph (3, 3), (t, row, column, 1) → frame, row and column of a clip (4, 4).
    """

    array: NDArray[np.floating]
    affine: NDArray[np.float64] | None
    image: str
    sop_instance_uids: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """Where in one image a finding has its place: voxels of the analysed image itself, cut to their bounding box.

    ``mask`` (K, J, I) bool, (1, rows, columns) of a radiograph, with something True; ``origin`` (k, j, i) of its first voxel in the
    image, ``shape`` (K, J, I) that of the whole image. ``affine`` (4, 4): index (i, j, k, 1) of the image → LPS mm; None without patient
    coordinates. ``image`` is the bundle's name of it; ``sop_instance_uids`` and ``frame_numbers`` (from 1) name its planes, k by k. Equal
    only to itself.
    """

    mask: NDArray[np.bool_]
    origin: tuple[int, int, int]
    shape: tuple[int, int, int]
    affine: NDArray[np.float64] | None
    image: str
    sop_instance_uids: tuple[str, ...]
    frame_numbers: tuple[int, ...]

    @property
    def centre_index(self) -> NDArray[np.float64]:
        """The centre of mass, (i, j, k) in voxels of the whole image; (0, 0, 0) is the middle of its first voxel."""
        inside = np.argwhere(self.mask).mean(axis=0) + np.asarray(self.origin)
        return np.ascontiguousarray(inside[::-1])

    @property
    def centre_mm(self) -> NDArray[np.float64] | None:
        """The centre of mass, LPS mm; None without patient coordinates."""
        return None if self.affine is None else (self.affine @ np.append(self.centre_index, 1.0))[:3]

    @property
    def volume_mm3(self) -> float | None:
        """None without patient coordinates."""
        return None if self.affine is None else float(self.mask.sum() * abs(np.linalg.det(self.affine[:3, :3])))

    @property
    def key_plane(self) -> int:
        """The k, in the whole image, of the plane that has most of it; the first of several."""
        return int(self.mask.sum(axis=(1, 2)).argmax()) + self.origin[0]


@dataclass(frozen=True, slots=True)
class Finding:
    """One coded answer of the network: how probable, what that means, what it rests on.

    ``shapley`` holds each modality's exact share of the log-odds ("image", "values", "text"), ``attributions`` that of each
    used value and text by its name. ``is_atypical``: the study is unlike those the network learned from. ``is_critical``: the bundle says
    that somebody must know at once if it is positive. ``regions`` are made of ``saliency``; neither of these two is kept.
    """

    name: str
    code: Code
    probability: float
    threshold: float
    verdict: Verdict
    shapley: Mapping[str, float] = field(default_factory=dict)
    attributions: Mapping[str, float] = field(default_factory=dict)
    is_atypical: bool = False
    saliency: tuple[Saliency, ...] = field(default=(), compare=False, repr=False)
    regions: tuple[Region, ...] = field(default=(), compare=False, repr=False)
    is_critical: bool = field(default=False, compare=False)

    @property
    def is_alarming(self) -> bool:
        """Whether somebody must know at once."""
        return self.is_critical and self.verdict == "positive"


@dataclass(frozen=True, slots=True)
class Document:
    """An object we authored, ready to be sent as it is: encoded DICOM, or with an empty ``sop_class_uid`` a message of another kind.

    ``kind`` is one of `KINDS_OF_DOOR`; ``sop_instance_uid`` is derived from what it was made of, and is its own whatever it is. Without
    ``data`` it could not be written: it stands in the place of what its destinations miss.
    """

    sop_instance_uid: str
    sop_class_uid: str
    kind: str
    data: bytes
    predecessor_uid: str = ""
    #: Of `data` when it was written, lower hex; '' where that is not kept.
    sha256: str = field(default="", compare=False)

    @property
    def is_whole(self) -> bool:
        """Whether `data` is what was written."""
        return self.sha256 in ("", hashlib.sha256(self.data).hexdigest())


@dataclass(frozen=True, slots=True)
class CommitmentRequest:
    """What a sender asks us to keep (PS3.4 §J.3.2): SOP class and instance UID of each instance."""

    transaction_uid: str
    instances: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class CommitmentReport:
    """What an archive says of the instances of one transaction (PS3.4 §J.3.3): those it keeps, and why not the others."""

    transaction_uid: str
    committed: frozenset[str]
    failed: Mapping[str, int]
