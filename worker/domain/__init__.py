"""The nouns: frozen values that travel down the line. Standard library and numpy only.

::

    record.py   who, and what is said of them        images.py   the DICOM tree, a volume
    answers.py  inputs, findings, documents          jobs.py     leases
    people.py   who may use the page

Not here: how they are stored (store/), read from DICOM (imaging/) or reported (report/).
Frame: LPS, millimetres. Times: aware datetimes. Digests: sha256, lower hex.
"""

from worker.domain.answers import (
    DICOM_KINDS,
    KINDS_OF_DOOR,
    CommitmentReport,
    CommitmentRequest,
    Document,
    Finding,
    Inputs,
    Region,
    Saliency,
    UsedHistory,
    UsedText,
    UsedValue,
    Verdict,
)
from worker.domain.images import Header, ImageFacts, Instance, Orientation, Received, Series, Study, Volume
from worker.domain.jobs import Job, JobKind, JobState, Lease
from worker.domain.people import ROLES, Account
from worker.domain.record import (
    CLOCKS,
    OWN_APPLICATION,
    ROUTINE,
    STAT,
    Code,
    Merge,
    Observation,
    Order,
    Patient,
    PatientKey,
    PatientRecord,
    RecordUpdate,
    ValueKind,
    is_ahead,
)

__all__ = [
    "CLOCKS",
    "DICOM_KINDS",
    "KINDS_OF_DOOR",
    "OWN_APPLICATION",
    "ROLES",
    "ROUTINE",
    "STAT",
    "Account",
    "Code",
    "CommitmentReport",
    "CommitmentRequest",
    "Document",
    "Finding",
    "Header",
    "ImageFacts",
    "Inputs",
    "Instance",
    "Job",
    "JobKind",
    "JobState",
    "Lease",
    "Merge",
    "Observation",
    "Order",
    "Orientation",
    "Patient",
    "PatientKey",
    "PatientRecord",
    "Received",
    "RecordUpdate",
    "Region",
    "Saliency",
    "Series",
    "Study",
    "UsedHistory",
    "UsedText",
    "UsedValue",
    "ValueKind",
    "Verdict",
    "Volume",
    "is_ahead",
]
