"""The DICOM tree as received, and the volume that is made of it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from worker.domain.record import Patient

#: The plane an image lies in, to within 30 degrees; "" is oblique or not known.
Orientation = Literal["", "axial", "coronal", "sagittal"]

#: View codes of PS3.16 CID 4010 and 4014, SNOMED CT and SNOMED RT → View Position (PS3.3 §C.8.1.1, §C.8.11.7). One table for those who
#: choose a series and those who read it: a lateral film that only one of them knew would be chosen, and then refused.
VIEW_OF_CODE: Final = {
    "399348003": "AP", "R-10206": "AP", "272479007": "PA", "R-40888": "PA", "R-10214": "PA", "399173006": "LL", "R-10236": "LL",
    "399198007": "RL", "R-10232": "RL", "399162004": "CC", "R-10242": "CC", "399368009": "MLO", "R-10226": "MLO",
    "399260004": "ML", "R-10224": "ML", "399352003": "LM", "R-10228": "LM",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What an instance says of its image at the top level of its header, for the rules that choose series.

    "", (), 0 and None: it does not say, or came before this was kept. ``image_type``: the values of Image Type (PS3.3 §C.7.6.1.1.2).
    ``region``: the code of Anatomic Region. ``laterality``: L, R, B or U. ``slice_mm``: distance of slices, else their thickness.
    ``pixel_mm``: (between rows, between columns), else at the detector. ``intent``: Presentation Intent Type (PS3.3 §C.8.11.1).
    """

    image_type: tuple[str, ...] = ()
    body_part: str = ""
    region: str = ""
    laterality: str = ""
    orientation: Orientation = ""
    slice_mm: float = 0.0
    pixel_mm: tuple[float, ...] = ()
    has_contrast: bool | None = None
    kernel: str = ""
    intent: str = ""
    age_years: float | None = None


@dataclass(frozen=True, slots=True)
class Instance:
    """One received SOP instance: where its bytes are and what they hash to.

    ``view`` is its View Position (PS3.3 §C.8.1.1), "" unknown; ``frames`` the Number of Frames it claims, 0 unknown.
    """

    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    path: Path
    sha256: str
    size_bytes: int
    view: str = ""
    frames: int = 0
    facts: ImageFacts = ImageFacts()
    is_removed: bool = False


@dataclass(frozen=True, slots=True)
class Series:
    """One series with its instances, in no particular order.

    ``orientation`` and ``slice_mm`` (distance of slices, else their thickness; 0 unknown) are those of its first instance.
    """

    series_instance_uid: str
    modality: str
    body_part: str
    description: str
    instances: tuple[Instance, ...] = ()
    orientation: Orientation = ""
    slice_mm: float = 0.0


@dataclass(frozen=True, slots=True)
class Study:
    """One study as received so far; ``version`` counts completed inputs (1, 2, …)."""

    study_instance_uid: str
    patient: Patient
    accession_number: str
    study_at: datetime
    description: str
    version: int
    series: tuple[Series, ...] = ()
    completed_at: datetime | None = None
    hold: str = ""
    is_complete: bool = True


@dataclass(frozen=True, slots=True)
class Volume:
    """A regular 3-D image, one radiograph as a single plane, or the frames of a clip.

    ``array`` (K, J, I) float32: HU for CT, rescaled stored values otherwise, bright is dense
    (MONOCHROME1 inverted). ``affine`` (4, 4): index (i, j, k, 1) → LPS mm; None for a projection
    radiograph and a clip, which have no patient coordinates. ``spacing_mm`` (k, j, i); 0 where unknown.

    ``sop_instance_uids`` and ``frame_numbers`` (from 1) name, plane by plane, where it comes from: an enhanced object's planes are
    of one instance. ``stack`` says which of several stacks of the series it is; ``spacing_from`` the attribute that gave the
    spacing in plane; ``view`` and ``laterality`` are a radiograph's. '' where there is nothing to say.
    """

    array: NDArray[np.float32]
    affine: NDArray[np.float64] | None
    spacing_mm: tuple[float, float, float]
    modality: str
    series_instance_uid: str
    sop_instance_uids: tuple[str, ...]
    frame_numbers: tuple[int, ...] = ()
    stack: str = ""
    spacing_from: str = ""
    view: str = ""
    laterality: str = ""


@dataclass(frozen=True, slots=True)
class Header:
    """What the store needs to know of one received instance: attributes of its data set.

    Texts are decoded (Specific Character Set), stripped of padding and control characters. Dates
    are YYYYMMDD or '', times HHMMSS.FFFFFF (or a prefix) or ''; ``timezone_offset`` is ±HHMM or ''.
    The three instance UIDs are 1-64 characters of digits and dots; the patient ID is never empty.
    ``view`` is "" where unknown.
    """

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    study_instance_uid: str
    series_instance_uid: str
    patient: Patient
    accession_number: str = ""
    study_date: str = ""
    study_time: str = ""
    timezone_offset: str = ""
    study_description: str = ""
    modality: str = ""
    series_description: str = ""
    number_of_frames: int = 1
    view: str = ""
    facts: ImageFacts = ImageFacts()


class Received(Enum):
    """What the store made of an instance whose file is durable."""

    STORED = "stored"  # new: row inserted
    DUPLICATE = "duplicate"  # same UID, same bytes: nothing to do
    CONFLICT = "conflict"  # same UID, other bytes: the first stays, this one is quarantined
    OTHER_PATIENT = "other_patient"  # stored, but its study is on hold: two patients in one study
