"""The FHIR server as a feed: whose record is asked for, how long a server that is away may hold up a study, what the log says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from models.bundle import Bundle
from tests.conftest import Captured
from tests.installation import BUNDLES
from worker import fhir_feed, pipeline, record_feeds
from worker.config import Config, FhirServer, Site
from worker.domain import Patient, PatientKey, RecordUpdate, Study
from worker.errors import PatientAmbiguous, PatientConflict, PeerRefused, PeerUnavailable, RecordError
from worker.fhir_feed import Puller
from worker.store.database import Store

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
ADA, BOB = PatientKey("SITE", "A-1"), PatientKey("SITE", "B-2")
CONFIG = Config(site=Site(issuer="SITE"), fhir=FhirServer(url="http://127.0.0.1:1/fhir", issuer_system="urn:site", timeout_s=4.0))


class Clinic:
    """A client that answers what it is told, and remembers what it was asked and how it was made."""

    def __init__(self) -> None:
        self.answer: list[RecordUpdate] | Exception = []
        self.asked: list[PatientKey] = []
        self.settings: dict[str, Any] = {}

    def __call__(self, _url: str, **settings: Any) -> Clinic:
        self.settings = settings
        return self

    def pull(self, key: PatientKey, *, issuer_system: str) -> list[RecordUpdate]:
        assert issuer_system == "urn:site"
        self.asked.append(key)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def committed(self, key: PatientKey) -> None:
        """Nothing to remember."""


@pytest.fixture
def clinic(monkeypatch: pytest.MonkeyPatch) -> Clinic:
    made = Clinic()
    monkeypatch.setattr(fhir_feed, "Client", made)
    return made


@contextmanager
def at(monkeypatch: pytest.MonkeyPatch, seconds: float) -> Iterator[None]:
    with monkeypatch.context() as later:
        later.setattr(record_feeds, "clock", lambda: NOW + timedelta(seconds=seconds))
        yield


def test_a_server_that_failed_is_left_alone_for_half_a_minute_whoever_the_patient_is(
    clinic: Clinic, monkeypatch: pytest.MonkeyPatch, captured: Captured
) -> None:
    pull = Puller(CONFIG, cast("Store", None))
    clinic.answer = PeerUnavailable("No answer.")
    with at(monkeypatch, 0), pytest.raises(PeerUnavailable, match="No answer"):
        pull(ADA)
    with at(monkeypatch, 29), pytest.raises(PeerUnavailable, match="No answer"):
        pull(BOB)
    assert clinic.asked == [ADA]
    assert [one["result"] for one in captured.named("message.refused")] == ["failed"]
    clinic.answer = []
    with at(monkeypatch, 31):
        pull(BOB)
    with at(monkeypatch, 32):
        pull(ADA)
    assert clinic.asked == [ADA, BOB, ADA]


def test_an_answer_that_cannot_be_understood_keeps_nobody_else_from_being_asked_for(clinic: Clinic, captured: Captured) -> None:
    pull = Puller(CONFIG, cast("Store", None))
    clinic.answer = RecordError("Patient.birthDate is not a date.")
    with pytest.raises(RecordError):
        pull(ADA)
    clinic.answer = []
    pull(BOB)
    assert clinic.asked == [ADA, BOB]
    assert [one["result"] for one in captured.named("message.refused")] == ["refused", "not found"]


def test_a_pull_takes_at_most_three_times_the_time_out(clinic: Clinic) -> None:
    Puller(CONFIG, cast("Store", None))
    assert (clinic.settings["timeout_s"], clinic.settings["deadline_s"]) == (4.0, 12.0)


def test_linked_patients_are_of_the_issuer_that_is_asked_for(clinic: Clinic) -> None:
    Puller(CONFIG, cast("Store", None))
    assert clinic.settings["issuers"] == {"urn:site": "SITE"}
    told = replace(CONFIG, records=replace(CONFIG.records, issuers={"urn:site": "OTHER"}))
    Puller(told, cast("Store", None))(ADA)
    assert clinic.settings["issuers"] == {"urn:site": "OTHER"}
    assert clinic.asked == []  # the server's patients are of another issuer


def pulled(error: Exception) -> str:
    """What gather makes of a pull that raises."""

    def pull(_key: PatientKey) -> None:
        raise error

    bundle = Bundle.read(BUNDLES / "cxr-severity")
    bundle = replace(bundle, record=replace(bundle.record, pull=True))
    study = Study("2.25.1", Patient(ADA), "", NOW, "", 1)
    return pipeline._pulled(cast("pipeline.Line", SimpleNamespace(pull=pull, instances=Path())), study, bundle)


@pytest.mark.requirement("F2")
def test_only_two_patients_under_one_identifier_are_a_conflict() -> None:
    for error in (PeerUnavailable("Away."), PeerRefused("No."), RecordError("Observation.code is missing.")):
        assert pulled(error) == str(error)
    with pytest.raises(PatientConflict, match="2 patients"):
        pulled(PatientAmbiguous("2 patients have it."))
