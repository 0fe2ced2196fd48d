"""One synthetic patient on the fake FHIR server, and clients that ask for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from tests.fhir_server import FhirServer, Json
from worker.domain import PatientKey, RecordUpdate
from worker.intake.fhir_client import Client

SYSTEM = "urn:hospital"
SENTINEL = "ZZ4711SENTINEL"
KEY = PatientKey("HOSP", SENTINEL)
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


@contextlib.contextmanager
def connecting(server: FhirServer) -> Iterator[Callable[..., Client]]:
    """Make clients that do not sleep, and close them."""
    made: list[Client] = []

    def make(**changes: Any) -> Client:
        settings: dict[str, Any] = {"zone": UTC, "issuers": {SYSTEM: "HOSP"}, "timeout_s": 5.0, "sleep": lambda _: None}
        made.append(Client(changes.pop("url", server.base), **(settings | changes)))
        return made[-1]

    try:
        yield make
    finally:
        for client in made:
            client.close()


def person(name: str = "p1", value: str = SENTINEL, **changes: object) -> Json:
    identifier = [{"system": SYSTEM, "value": value}]
    return {"resourceType": "Patient", "id": name, "identifier": identifier, "birthDate": "1980-02-29"} | changes


def crp(name: str, value: float = 3.0, **changes: object) -> Json:
    code = {"coding": [{"system": "http://loinc.org", "code": "1988-5"}]}
    return {
        "resourceType": "Observation",
        "id": name,
        "status": "final",
        "code": code,
        "subject": {"reference": "Patient/p1"},
        "effectiveDateTime": "2020-05-06T06:30:00+01:00",
        "valueQuantity": {"value": value, "unit": "mg/L"},
    } | changes


def fill(server: FhirServer, count: int = 1) -> None:
    server.put(person(), at=LONG_AGO)
    for number in range(count):
        server.put(crp(f"o{number}", float(number)), at=LONG_AGO)


def pull(client: Client) -> list[RecordUpdate]:
    return client.pull(KEY, issuer_system=SYSTEM)


def values(updates: list[RecordUpdate]) -> list[float]:
    return [one.value for update in updates for one in update.observations if one.value is not None]
