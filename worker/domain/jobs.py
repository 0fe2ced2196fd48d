"""Units of queued work."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

JobKind = Literal["infer", "deliver"]
JobState = Literal["available", "leased", "completed", "discarded", "cancelled"]


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to work on a job until it expires; ``generation`` fences late owners out."""

    owner: str
    generation: int
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Job:
    """One unit of queued work, leased; ``document`` is the kind of what a delivery brings."""

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
    document: str = ""
