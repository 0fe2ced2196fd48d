"""A case on the line, and the line it walks: what the stages of pipeline.py and settling.py are given. No behaviour."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, tzinfo
from pathlib import Path

from worker import joining
from worker.domain import Document, Finding, Inputs, Job, PatientKey, Study
from worker.imaging.decoding import DecoderPool
from worker.infer import Model, Prepared
from worker.regions import Place
from worker.store.database import Store


@dataclass(frozen=True, slots=True)
class Line:
    """What the stages need: plain values and open doors, built once by the daemon."""

    store: Store
    models: Mapping[str, Model]
    decoders: DecoderPool
    #: Destination → the kinds of documents (report/forms.py) that it is sent.
    destinations: Mapping[str, tuple[str, ...]]
    zone: tzinfo
    clock: Callable[[], datetime]
    #: Below which the instances' files lie.
    instances: Path = Path()
    #: What images and record may not contradict each other in.
    must_agree: tuple[str, ...] = joining.MUST_AGREE
    #: Brings a patient's record from where it is kept; raises Retry where that is away.
    pull: Callable[[PatientKey], None] | None = None

    @property
    def kinds(self) -> frozenset[str]:
        """All that is to be authored."""
        return frozenset(kind for kinds in self.destinations.values() for kind in kinds)


@dataclass(frozen=True, slots=True)
class Case:
    """A job and what is known about it so far; ``seconds`` is what each stage took."""

    job: Job
    study: Study | None = None
    predecessor: Document | None = None
    inputs: Inputs | None = None
    prepared: Prepared | None = None
    #: What `prepared` was made of, by image name.
    places: Mapping[str, Place] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    report: Document | None = None
    #: The other forms of the same result.
    companions: tuple[Document, ...] = ()
    input_sha256: str = ""
    #: Of the record's patient: who else they were known to be when we looked.
    stamp: str = ""
    #: When the record had last changed when we looked.
    record_changed_at: datetime | None = None
    #: What it would be made from is what the last report was made from: nothing is to be done.
    is_repeated: bool = False
    error: Exception | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
