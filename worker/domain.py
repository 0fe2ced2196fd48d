"""The nouns: frozen values that travel down the line. Standard library and numpy only.

Not here: how they are stored (store/), read from DICOM (volume.py) or reported (report/).
Frame: LPS, millimetres. Times: aware datetimes. Digests: sha256, lower hex.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

JobKind = Literal["infer", "deliver"]
JobState = Literal["available", "leased", "completed", "discarded", "cancelled"]
Verdict = Literal["positive", "negative", "uncertain"]
#: What an observation's value is: one number, a text, a code, a range (value to high) or a ratio (value : high).
ValueKind = Literal["number", "text", "coded", "range", "ratio"]
#: The plane an image lies in, to within 30 degrees; "" is oblique or not known.
Orientation = Literal["", "axial", "coronal", "sagittal"]

#: Priorities, smallest first. HL7 v2 ORC-7/OBR-27 "S" and DICOM "STAT" map to STAT.
STAT, ROUTINE = 0, 10
#: How far clocks may differ before a time of after its own message is a wrong one.
CLOCKS: Final = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class Code:
    """A coded concept (PS3.3 §8): value, coding scheme designator, meaning."""

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True, slots=True)
class PatientKey:
    """Who: a patient ID means nothing without its issuer (PS3.3 §C.2.2, HL7 CX.4)."""

    issuer: str
    patient_id: str


@dataclass(frozen=True, slots=True)
class Patient:
    """Demographics as DICOM writes them: PN string, YYYYMMDD or '', M/F/O or ''."""

    key: PatientKey
    name: str = ""
    birth_date: str = ""
    sex: str = ""


@dataclass(frozen=True, slots=True)
class Observation:
    """One fact of a patient's record: a value or a text, drawn or written at `at`.

    ``status`` is HL7 table 0085: F final, C corrected, P preliminary, D deleted, W wrong, X cannot be obtained.
    ``key`` names the fact within its source: a later fact with the same key supersedes it.
    ``kind`` says how to read the value: of a "range" `value` to `high`, of a "ratio" `value` : `high`, of a "coded" one `coded`
    with its words in `text`. ``received_at``, ``message_id`` and ``message`` (row and control ID of the source message) are known of
    what comes out of the store, as is ``told``: name, birth date and sex that came with the fact, in a message that was no admission.
    ``said_at``: when this very fact was said, where that is not the update's ``at``.
    """

    code: Code
    at: datetime
    value: float | None = None
    comparator: Literal["", "<", "<=", ">", ">="] = ""
    unit: str = ""
    text: str = ""
    status: str = "F"
    key: str = ""
    source: str = ""
    kind: ValueKind = "number"
    high: float | None = None
    coded: Code | None = None
    received_at: datetime | None = field(default=None, compare=False)
    message_id: int | None = field(default=None, compare=False)
    message: str = field(default="", compare=False)
    said_at: datetime | None = field(default=None, compare=False)
    told: Patient | None = field(default=None, compare=False)


def is_ahead(one: Observation) -> bool:
    """Whether a fact is dated after it was received; of when it is nobody knows."""
    return one.received_at is None or one.at > one.received_at + CLOCKS


@dataclass(frozen=True, slots=True)
class Merge:
    """One patient known under two keys: HL7 v2 ADT^A40, A34 (merge) and A47 (change of identifier). `retired` is no longer issued."""

    survivor: PatientKey
    retired: PatientKey


@dataclass(frozen=True, slots=True)
class Order:
    """An imaging order (ORM^O01, OMI^O23, ServiceRequest): which study it is of, how urgent, whether it stands.

    ``said_at``: when this very order was said, where that is not the update's ``at``.
    """

    accession_number: str
    placer: str = ""
    filler: str = ""
    priority: int = ROUTINE
    is_cancelled: bool = False
    said_at: datetime | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class RecordUpdate:
    """What one HL7 message, FHIR bundle or table says of one patient; applied in one transaction.

    ``at`` is when it was said (EVN-2, MSH-7, meta.lastUpdated), None if not told: of demographics the last said counts, not the last come.
    ``is_at_of_all``: facts and orders without a time of their own were said then too; else (in FHIR it is the Patient's) when they came.
    """

    patient: Patient
    observations: tuple[Observation, ...] = ()
    source: str = ""
    has_demographics: bool = True
    merges: tuple[Merge, ...] = ()
    orders: tuple[Order, ...] = ()
    at: datetime | None = None
    is_at_of_all: bool = field(default=True, repr=False)

    @property
    def named(self) -> list[PatientKey]:
        """All patients that it names, its own first."""
        return [self.patient.key, *(key for one in self.merges for key in (one.survivor, one.retired))]


@dataclass(frozen=True, slots=True)
class PatientRecord:
    """All that is known of a patient, as of a time: nothing in it is later than `as_of`.

    ``keys`` are all that the patient was ever known by, merges followed; ``unusable`` are facts dated after they were received.
    ``stamp`` changes with every merge and its undoing. ``told`` is who the patient is, each once, as messages about something else
    told it: whatever a fact's own `told` says is among it, be the fact in the record or not. ``admissions`` is what admissions said, of
    each key, and when, oldest first.
    """

    patient: Patient
    as_of: datetime
    observations: tuple[Observation, ...] = ()
    keys: tuple[PatientKey, ...] = ()
    unusable: tuple[Observation, ...] = ()
    stamp: str = ""
    told: tuple[Patient, ...] = ()
    admissions: tuple[tuple[datetime, Patient], ...] = ()


@dataclass(frozen=True, slots=True)
class Instance:
    """One received SOP instance: where its bytes are and what they hash to.

    ``view`` is its View Position (PS3.3 §C.8.1.1), "" unknown.
    """

    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    path: Path
    sha256: str
    size_bytes: int
    view: str = ""


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
    """A regular 3-D image, or one radiograph as a single plane.

    ``array`` (K, J, I) float32: HU for CT, rescaled stored values otherwise, bright is dense
    (MONOCHROME1 inverted). ``affine`` (4, 4): index (i, j, k, 1) → LPS mm; None for a projection
    radiograph, which has no patient coordinates. ``spacing_mm`` (k, j, i); 0 where unknown.
    """

    array: NDArray[np.float32]
    affine: NDArray[np.float64] | None
    spacing_mm: tuple[float, float, float]
    modality: str
    series_instance_uid: str
    sop_instance_uids: tuple[str, ...]


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

    ``array`` (K, J, I) of a volume or (rows, columns) of a radiograph, float16 or float32, in [0, 1].
    ``affine``: (4, 4), index (i, j, k, 1) of `array` → LPS mm; of a projection radiograph, which has no patient coordinates,
    (3, 3), (row, column, 1) of `array` → row and column of the image.
    """

    array: NDArray[np.floating]
    affine: NDArray[np.float64] | None
    image: str
    sop_instance_uids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """One coded answer of the network: how probable, what that means, what it rests on.

    ``shapley`` holds each modality's exact share of the log-odds ("image", "values", "text"), ``attributions`` that of each
    used value and text by its name. ``is_atypical``: the study is unlike those the network learned from.
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


@dataclass(frozen=True, slots=True)
class Document:
    """An object we authored: encoded DICOM, ready to be sent as it is."""

    sop_instance_uid: str
    sop_class_uid: str
    kind: str
    data: bytes
    predecessor_uid: str = ""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to work on a job until it expires; ``generation`` fences late owners out."""

    owner: str
    generation: int
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Job:
    """One unit of queued work, leased."""

    id: int
    kind: JobKind
    study_id: int
    bundle: str
    input_version: int
    destination: str
    document_id: int | None
    attempt: int
    priority: int
    started_at: datetime
    lease: Lease


@dataclass(frozen=True, slots=True)
class Header:
    """What the store needs to know of one received instance: attributes of its data set.

    Texts are decoded (Specific Character Set), stripped of padding and control characters. Dates
    are YYYYMMDD or '', times HHMMSS.FFFFFF (or a prefix) or ''; ``timezone_offset`` is ±HHMM or ''.
    The three instance UIDs are 1-64 characters of digits and dots; the patient ID is never empty.
    ``slice_mm`` is 0 where unknown, ``view`` "".
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
    body_part: str = ""
    series_description: str = ""
    number_of_frames: int = 1
    orientation: Orientation = ""
    slice_mm: float = 0.0
    view: str = ""


class Received(Enum):
    """What the store made of an instance whose file is durable."""

    STORED = "stored"  # new: row inserted
    DUPLICATE = "duplicate"  # same UID, same bytes: nothing to do
    CONFLICT = "conflict"  # same UID, other bytes: the first stays, this one is quarantined
    OTHER_PATIENT = "other_patient"  # stored, but its study is on hold: two patients in one study
