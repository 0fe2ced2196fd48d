"""A patient's record pulled over real sockets from a FHIR R4 server: whose it is, what is new, and that a file says the same."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from datetime import UTC
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SHARED
from tests.fhir_records import KEY, LONG_AGO, SENTINEL, SYSTEM, crp, fill, person, pull, values
from tests.fhir_server import FhirServer, Reply
from worker.domain import Merge, Observation, PatientKey, RecordUpdate
from worker.errors import PatientAmbiguous, PeerRefused, PeerUnavailable, RecordError
from worker.intake import fhir
from worker.intake.fhir_client import Client

Json = dict[str, Any]
SYNTHEA = sorted((SHARED / "data/fhir").glob("*.json"))
SEVERITY = sorted((SHARED / "data/cxr-severity/fhir").glob("*.json"))


# --- whose record


def test_a_patient_is_found_by_identifier_and_every_page_is_read(server: FhirServer, connect: Callable[..., Client]) -> None:
    fill(server, 7)
    server.put(person("p2", "other"))
    server.put(crp("other", 99.0, subject={"reference": "Patient/p2"}))
    (update,) = pull(connect(page_size=3))
    assert (update.patient.key, update.patient.birth_date, update.at) == (KEY, "19800229", LONG_AGO)
    assert sorted(values([update])) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert len(server.lines("GET /fhir/Observation")) == 3


def test_the_identifier_is_posted_and_so_in_no_access_log(server: FhirServer, connect: Callable[..., Client]) -> None:
    fill(server)
    pull(connect())
    assert server.asked[0].line == "POST /fhir/Patient/_search"
    assert not any(SENTINEL in str(one.query) or SENTINEL in one.line for one in server.asked)


def test_a_server_that_takes_no_post_is_asked_by_get_from_then_on(server: FhirServer, connect: Callable[..., Client]) -> None:
    fill(server)
    server.takes_post = False
    client = connect()
    assert values(pull(client)) == values(pull(client)) == [0.0]
    assert len(server.lines("POST")) == 1


def test_a_patient_id_with_the_search_syntax_in_it_is_still_one_id(server: FhirServer, connect: Callable[..., Client]) -> None:
    """A comma would ask for two patients."""
    server.put(person(value="a,b|c$d\\e"))
    server.put(person("p2", "a"))
    (update,) = connect().pull(PatientKey("HOSP", "a,b|c$d\\e"), issuer_system=SYSTEM)
    assert update.patient.birth_date == "19800229"


def test_a_patient_whom_the_server_does_not_know_gives_nothing(server: FhirServer, connect: Callable[..., Client]) -> None:
    assert pull(connect()) == []
    assert server.lines() == ["POST /fhir/Patient/_search"]


@pytest.mark.requirement("F2")
def test_of_two_patients_with_one_identifier_none_is_chosen(server: FhirServer, connect: Callable[..., Client]) -> None:
    fill(server)
    server.put(person("p2"))
    with pytest.raises(PatientAmbiguous, match="2 patients") as caught:
        pull(connect())
    assert SENTINEL not in str(caught.value)


@pytest.mark.requirement("F5")
@pytest.mark.parametrize(
    "identifier",
    [{"system": SYSTEM, "value": SENTINEL.lower()}, {"system": SYSTEM, "value": SENTINEL, "use": "old"}],
)
def test_a_patient_found_by_what_only_looks_like_the_identifier_is_refused(
    server: FhirServer, connect: Callable[..., Client], identifier: Json
) -> None:
    """A server's search may ignore case; the right patient or none."""
    server.put(person(identifier=[identifier]))
    with pytest.raises(RecordError, match="does not have") as caught:
        pull(connect())
    assert SENTINEL not in str(caught.value)


def test_a_resource_of_another_patient_is_never_taken(server: FhirServer, connect: Callable[..., Client]) -> None:
    """A server that ignores the parameter `patient` answers with everybody's."""
    fill(server)
    stray = crp("stray", 99.0, subject={"reference": "Patient/p2"})
    page = {"resourceType": "Bundle", "type": "searchset", "entry": [{"resource": crp("own")}, {"resource": stray}]}
    server.script("GET /fhir/Observation", Reply(200, page), Reply(200, page))
    with pytest.raises(RecordError, match="not in the bundle"):
        pull(connect())
    said: list[str] = []
    assert values(pull(connect(refused=said.append))) == [3.0]
    assert said == ["The subject of a resource of type Observation is not in the bundle."]


@pytest.mark.requirement("F3")
@pytest.mark.parametrize("kind", ["replaces", "replaced-by"])
def test_a_link_to_a_patient_of_the_same_server_is_a_merge(server: FhirServer, connect: Callable[..., Client], kind: str) -> None:
    server.put(person(link=[{"other": {"reference": "Patient/p2"}, "type": kind}]))
    server.put(person("p2", "other"))
    other = PatientKey("HOSP", "other")
    merges = [merge for update in pull(connect()) for merge in update.merges]
    assert merges == [Merge(KEY, other) if kind == "replaces" else Merge(other, KEY)]


def test_a_type_that_the_server_does_not_know_is_passed_by(server: FhirServer, connect: Callable[..., Client]) -> None:
    fill(server)
    server.known_types -= {"MedicationStatement"}
    assert values(pull(connect())) == [0.0]


def test_a_server_without_patients_is_a_wrong_url_and_not_an_unknown_patient(server: FhirServer, connect: Callable[..., Client]) -> None:
    with pytest.raises(PeerRefused, match="404"):
        pull(connect(url=f"{server.origin}/elsewhere"))


def test_a_medication_that_is_a_resource_of_its_own_comes_along(server: FhirServer, connect: Callable[..., Client]) -> None:
    fill(server, 0)
    code = {"coding": [{"system": "http://www.nlm.nih.gov/research/umls/rxnorm", "code": "11289", "display": "warfarin"}]}
    server.put({"resourceType": "Medication", "id": "m1", "code": code})
    order = {"resourceType": "MedicationRequest", "id": "r1", "status": "active", "intent": "order", "authoredOn": "2020-05-06"}
    server.put(order | {"medicationReference": {"reference": "Medication/m1"}, "subject": {"reference": "Patient/p1"}})
    (update,) = pull(connect())
    assert [(one.code.value, one.code.scheme, one.value) for one in update.observations] == [("11289", "RXNORM", 1.0)]


def test_two_servers_of_one_site_do_not_share_the_names_of_their_facts(server: FhirServer, connect: Callable[..., Client]) -> None:
    """Each counts its resources from 1."""
    fill(server)
    (update,) = pull(connect())
    host = server.origin.split("/")[2].split(":")[0]
    assert update.source == f"FHIR {host}"
    assert [(one.source, one.key) for one in update.observations] == [(f"FHIR {host}", f"FHIR {host}/Observation/o0")]
    (update,) = pull(connect(source="HIS"))
    assert [one.key for one in update.observations] == ["HIS/Observation/o0"]


# --- later pulls


def test_a_later_pull_asks_only_for_what_is_new(server: FhirServer, connect: Callable[..., Client]) -> None:
    fill(server, 2)
    client = connect()
    assert values(pull(client)) == [0.0, 1.0]
    client.committed(KEY)
    server.put(crp("o1", 8.0, status="corrected"))
    (update,) = pull(client)
    assert [(one.value, one.status, one.key) for one in update.observations] == [(8.0, "C", f"{client.source}/Observation/o1")]
    assert update.patient.birth_date == "19800229"
    read = [one.headers.get("if-none-match") for one in server.asked if one.line == "GET /fhir/Patient/p1"]
    assert read == [None, 'W/"1"']


def test_what_was_not_committed_is_asked_for_again(server: FhirServer, connect: Callable[..., Client]) -> None:
    """Else a database that was down for a minute would lose facts for ever."""
    fill(server, 2)
    client = connect()
    assert values(pull(client)) == values(pull(client)) == [0.0, 1.0]
    client.committed(KEY)
    server.script("GET /fhir/Observation", Reply(500))
    with pytest.raises(PeerUnavailable):
        pull(client)
    client.committed(KEY)  # of a pull that failed there is nothing to note
    assert values(pull(client)) == []


def test_new_demographics_come_with_a_new_version(server: FhirServer, connect: Callable[..., Client]) -> None:
    fill(server)
    client = connect()
    pull(client)
    client.committed(KEY)
    server.put(person(birthDate="1981-02-28"))
    (update,) = pull(client)
    assert update.patient.birth_date == "19810228"


def test_an_identifier_that_moved_to_another_patient_begins_anew(server: FhirServer, connect: Callable[..., Client]) -> None:
    fill(server)
    client = connect()
    pull(client)
    client.committed(KEY)
    server.put(person(value="moved"))
    server.put(person("p2"), at=LONG_AGO)
    server.put(crp("n1", 5.0, subject={"reference": "Patient/p2"}), at=LONG_AGO)
    assert values(pull(client)) == [5.0]


# --- real bundles


def facts(updates: list[RecordUpdate]) -> dict[PatientKey, Counter[Observation]]:
    return {one.patient.key: Counter(one.observations) for one in updates}


def same_by_file_and_by_server(paths: list[Path], *, system: str, issuer: str) -> int:
    """Compare what a pull gives with what the import of the same bundle gives; return how many facts there were."""
    compared = 0
    with FhirServer() as server:
        server.max_page = 50
        for path in paths:
            server.load(json.loads(path.read_bytes()))
        client = Client(server.base, zone=UTC, issuers={system: issuer}, schemes={"urn:mhh:lab": "L"}, source="FHIR")
        for path in paths:
            imported = fhir.parse(path.read_bytes(), zone=UTC, issuers={system: issuer}, schemes={"urn:mhh:lab": "L"})
            (key,) = facts(imported)
            pulled = client.pull(key, issuer_system=system)
            assert facts(pulled) == facts(imported)
            assert [one.patient for one in pulled] == [one.patient for one in imported]
            compared += sum(len(one.observations) for one in pulled)
        client.close()
    return compared


@pytest.mark.usefixtures("shared")
def test_every_synthetic_bundle_gives_the_same_facts_by_file_and_by_server() -> None:
    assert len(SYNTHEA) == 14
    assert same_by_file_and_by_server(SYNTHEA, system="http://hospital.smarthealthit.org", issuer="SYNTHEA") > 900


@pytest.mark.usefixtures("shared")
def test_every_real_bundle_gives_the_same_facts_by_file_and_by_server() -> None:
    system = json.loads(SEVERITY[0].read_bytes())["entry"][0]["resource"]["identifier"][0]["system"]
    assert same_by_file_and_by_server(SEVERITY, system=system, issuer="MHH") == 635
