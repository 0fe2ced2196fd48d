"""What is said of a patient, and the order that a study answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, Literal

#: What an observation's value is: one number, a text, a code, a range (value to high) or a ratio (value : high).
ValueKind = Literal["number", "text", "coded", "range", "ratio"]

#: MSH-3 of our own messages: a RIS may forward them to whoever listens, to us too.
OWN_APPLICATION: Final = "SYNOPTIC"
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
