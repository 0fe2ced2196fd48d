"""A result to the EHR over real sockets: the entries' statuses decide, nothing is created twice, and the patient is the server's own."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests import reports
from tests.fhir_r4 import validated
from tests.fhir_server import FhirServer, Reply, outcome
from tests.integration.test_commitment import Site
from tests.integration.test_cstore import expect_error
from tests.pki import Authority, served
from worker import doctor_peers
from worker.config import Config, Destination, Records
from worker.config import FhirServer as FhirSettings
from worker.config import Site as SiteSettings
from worker.deliver import fhir as door
from worker.deliver.association import Peer
from worker.deliver.cstore import Outcome
from worker.deliver.web import MAX_BODY
from worker.domain import Document
from worker.errors import NotReadBack, PeerRefused, PeerUnavailable, PeerUnreachable, WorkerError
from worker.peers import peer_of, systems_of
from worker.report import fhir
from worker.store.database import Store

SYSTEM = "urn:oid:1.2.40.0.34"
POST = "POST /fhir"


def peer(server: FhirServer, *, timeout_s: float = 5.0, **more: Any) -> Peer:
    """How we call it."""
    known = {"systems": {"FACTORY": SYSTEM}, "url": server.base, "door": "fhir"} | more
    return Peer("the EHR", "", "127.0.0.1", server.port, "", timeout_s=timeout_s, **known)


def document(folder: Path, **made_of: Any) -> Document:
    """The transaction of a radiograph's result."""
    [one] = fhir.build(reports.result([reports.radiograph(folder)], **made_of))
    return one


@pytest.fixture
def ehr() -> Iterator[FhirServer]:
    """An EHR that knows the patient."""
    with FhirServer() as server:
        admit(server)
        yield server


def admit(server: FhirServer, own: str = "77", *, system: str = SYSTEM, value: str = "F-0001") -> None:
    """Make a patient known."""
    server.put({"resourceType": "Patient", "id": own, "identifier": [{"system": system, "value": value}]})


def send_one(one: Document, to: Peer) -> Outcome:
    """Send it."""
    [found] = door.send([one], peer=to)
    return found


def kinds(server: FhirServer) -> list[str]:
    """What it holds beside the patient."""
    return sorted(kind for kind, _ in server.resources if kind != "Patient")


def test_a_result_is_filed_under_the_servers_own_patient_and_once_however_often_it_is_sent(ehr: FhirServer, tmp_path: Path) -> None:
    one = document(tmp_path)
    for _ in range(2):
        assert send_one(one, peer(ehr)).error is None
        assert kinds(ehr) == ["Device", "DiagnosticReport", "Observation", "Observation"]
    for (kind, _), resource in ehr.resources.items():
        validated(resource)
        if kind in ("DiagnosticReport", "Observation"):
            assert resource["subject"] == {"reference": "Patient/77"}
    [report] = [resource for (kind, _), resource in ehr.resources.items() if kind == "DiagnosticReport"]
    assert all(("Observation", one["reference"].split("/")[1]) in ehr.resources for one in report["result"])
    [asked, _] = ehr.asked
    assert (asked.headers["content-type"], asked.headers["prefer"]) == ("application/fhir+json; charset=utf-8", "return=minimal")
    validated(json.loads(asked.body))


def test_a_new_version_is_filed_beside_the_old_one_whichever_comes_first(ehr: FhirServer, tmp_path: Path) -> None:
    first, root = document(tmp_path), reports.of_radiograph(tmp_path).document
    second = document(tmp_path, algorithm=replace(reports.ALGORITHM, input_sha256="01" * 32), predecessor=root)
    for one in (second, first, second):
        assert send_one(one, peer(ehr)).error is None
    found = [resource for (kind, _), resource in ehr.resources.items() if kind == "DiagnosticReport"]
    assert sorted(one["status"] for one in found) == ["amended", "preliminary"]
    [amended], [replaced] = ([one for one in found if one["status"] == status] for status in ("amended", "preliminary"))
    assert amended["extension"][0]["valueReference"]["identifier"] == replaced["identifier"][0]


def answered(*statuses: str) -> Reply:
    """A response with these statuses of its entries."""
    entries = [{"response": {"status": status}} for status in statuses]
    return Reply(200, {"resourceType": "Bundle", "type": "transaction-response", "entry": entries})


@pytest.mark.parametrize(
    ("reply", "error", "words"),
    [
        (Reply(400, outcome(code="invalid", diagnostics="ZZNAME")), PeerRefused, "HTTP status 400"),
        (Reply(422, outcome()), PeerRefused, "422"),
        (Reply(413), PeerRefused, "413"),
        (Reply(404, outcome(code="not-found")), PeerUnavailable, "404"),
        (Reply(409, outcome(code="conflict")), PeerUnavailable, "409"),
        (Reply(412, outcome(code="multiple-matches")), PeerUnavailable, "412"),
        (Reply(423), PeerUnavailable, "423"),
        (Reply(500, outcome()), PeerUnavailable, "500"),
        (Reply(404, b"<html>nothing here"), PeerUnreachable, "404"),
        (Reply(429), PeerUnreachable, "429"),
        (Reply(401), PeerUnreachable, "401"),
        (Reply(503), PeerUnreachable, "503"),
        (Reply(302, headers={"Location": "http://elsewhere.example/"}), PeerUnreachable, "302, a redirect, which is not followed"),
        (Reply(200, b""), NotReadBack, "does not say what became of its 4 entries"),
        (Reply(200, b"{"), NotReadBack, "4 entries"),
        (Reply(200, b"[" * 100_000), NotReadBack, "4 entries"),
        (Reply(200, b"x" * (MAX_BODY + 1)), NotReadBack, "4 entries"),
        (Reply(200, {"resourceType": "Bundle", "type": "searchset", "entry": []}), NotReadBack, "4 entries"),
        (answered(*["fine"] * 4), PeerUnavailable, "of an entry with 500"),
    ],
)  # fmt: skip
def test_what_is_no_success_says_why_and_whether_it_is_tried_again(
    ehr: FhirServer, reply: Reply, error: type[WorkerError], words: str, tmp_path: Path
) -> None:
    ehr.script(POST, reply)
    result = send_one(document(tmp_path), peer(ehr))
    expect_error(result, error, words)
    assert "ZZNAME" not in str(result.error)


@pytest.mark.parametrize(
    ("statuses", "error"),
    [
        (("201 Created", "200", "200 OK", "201"), None),
        (("201", "201", "422 Unprocessable", "201"), PeerRefused),
        (("201", "409 Conflict", "201", "400"), PeerRefused),
        (("201", "409 Conflict", "201", "201"), PeerUnavailable),
        (("201", "201", "201", "404"), PeerUnavailable),
        (("201", "201", "201"), NotReadBack),
        (("201", "201", "201", "fine"), PeerUnavailable),
    ],
)
def test_the_status_of_each_entry_decides_under_200(
    ehr: FhirServer, statuses: tuple[str, ...], error: type[WorkerError] | None, tmp_path: Path
) -> None:
    ehr.script(POST, answered(*statuses))
    assert type(send_one(document(tmp_path), peer(ehr)).error) is (error or type(None))


def test_a_patient_who_is_not_known_yet_is_waited_for_and_never_created(ehr: FhirServer, tmp_path: Path) -> None:
    ehr.delete("Patient", "77")
    one = document(tmp_path)
    expect_error(send_one(one, peer(ehr)), PeerUnavailable, "404")
    assert kinds(ehr) == []
    admit(ehr)
    assert send_one(one, peer(ehr)).error is None
    assert sum(kind == "Patient" for kind, _ in ehr.resources) == 1


def test_two_patients_under_one_identifier_get_nothing(ehr: FhirServer, tmp_path: Path) -> None:
    admit(ehr, "78")
    expect_error(send_one(document(tmp_path), peer(ehr)), PeerUnavailable, "412")
    assert kinds(ehr) == []


@pytest.mark.requirement("F2")
def test_the_same_id_of_another_issuer_is_another_patient(ehr: FhirServer, tmp_path: Path) -> None:
    """A patient ID means nothing without its issuer: without a system for it the result stays here."""
    expect_error(
        send_one(document(tmp_path), peer(ehr, systems={"OTHER": SYSTEM})), PeerRefused, "is not configured: see [records] issuers"
    )
    assert ehr.asked == []
    expect_error(send_one(document(tmp_path), peer(ehr, systems={"FACTORY": "urn:oid:9.9"})), PeerUnavailable, "404")


@pytest.mark.parametrize(
    ("issuer", "patient_id", "systems", "expected"),
    [
        ("FACTORY", "F-0001", {"FACTORY": SYSTEM}, f"Patient?identifier={SYSTEM}|F-0001"),
        ("1.2.3", "1", {}, "Patient?identifier=urn:oid:1.2.3|1"),
        ("http://h.example/ids", "1", {}, "Patient?identifier=http://h.example/ids|1"),
        ("H", "a,b|c$d\\e", {"H": "urn:x"}, "Patient?identifier=urn:x|a%5C%2Cb%5C%7Cc%5C%24d%5C%5Ce"),
        ("H", "Größe &x=1", {"H": "urn:x"}, "Patient?identifier=urn:x|Gr%C3%B6%C3%9Fe%20%26x%3D1"),
        ("", "1", {"": "urn:x"}, "Patient?identifier=urn:x|1"),
    ],
)
def test_the_patient_is_asked_for_by_system_and_value(issuer: str, patient_id: str, systems: dict[str, str], expected: str) -> None:
    identifier: dict[str, Any] = {"value": patient_id} | ({"assigner": {"display": issuer}} if issuer else {})
    assert door._patient(identifier, peer=Peer("the EHR", "", "h", 1, "", systems=systems)) == expected


def test_systems_are_those_that_the_feeds_know_the_other_way_round() -> None:
    config = Config(
        site=SiteSettings(issuer="H"),
        fhir=FhirSettings(url="https://h.example/fhir", issuer_system="urn:oid:1"),
        records=Records(issuers={"HIS": "H", "urn:oid:2": "H", "urn:oid:3": "LAB"}),
    )
    assert systems_of(config) == {"H": "urn:oid:1", "LAB": "urn:oid:3"}


def test_an_ehr_that_is_down_or_deaf_costs_one_try_or_two(ehr: FhirServer, tmp_path: Path) -> None:
    one = document(tmp_path)
    ehr.script(POST, *[Reply(200, b"x" * 200, drip_s=0.05)] * 3)
    began = time.monotonic()
    for found in door.send([one] * 3, peer=peer(ehr, timeout_s=0.3)):
        expect_error(found, PeerUnavailable, "gives no answer by HTTP")
    assert time.monotonic() - began < 3
    assert len(ehr.asked) == 2
    gone = replace(peer(ehr), port=1)
    for found in door.send([one] * 3, peer=gone):
        expect_error(found, PeerUnreachable, "cannot be reached")


def test_a_restart_between_the_commit_and_its_answer_creates_nothing_twice(ehr: FhirServer, store: Store, tmp_path: Path) -> None:
    """The server kept it all, and its answer was lost."""
    site, one = Site(store, tmp_path), document(tmp_path)
    site.add(1, one)
    ehr._transact(json.loads(door._addressed(one, peer=peer(ehr))[0]))
    before = dict(ehr.resources)
    ehr.script(POST, Reply(hangs_up=True))
    site.deliver(peer(ehr), wait_s=None)
    assert site.jobs()[0][0] == "available"
    site.now += timedelta(hours=1)
    site.deliver(peer(ehr), wait_s=None)
    assert site.jobs()[0][0] == "completed"
    assert ehr.resources == before


@pytest.mark.requirement("X10")
def test_by_tls_the_secret_is_sent_to_who_shows_the_right_certificate(tmp_path: Path) -> None:
    ours = Authority(tmp_path)
    shown = ours.issue("ehr")
    context = served(shown)
    one = document(tmp_path)
    with FhirServer(context=context) as server:
        admit(server)
        settings = Destination(name="ehr", fhir_url=server.base, fhir_secret="user:hush", timeout_s=5.0, tls_ca=str(ours.certificate))
        assert "hush" not in repr(settings)
        to = peer_of(settings, own_ae_title="US", systems={"FACTORY": SYSTEM})
        assert "hush" not in repr(to)
        assert send_one(one, to).error is None
        assert server.asked[0].headers["authorization"] == "Basic dXNlcjpodXNo"
        expect_error(send_one(one, peer_of(replace(settings, tls_ca=""), own_ae_title="US")), PeerRefused, "is not configured")
        strange = peer_of(replace(settings, tls_ca=""), own_ae_title="US", systems={"FACTORY": SYSTEM})
        expect_error(send_one(one, strange), PeerUnreachable, "certificate is refused")
        assert len(server.asked) == 1


def test_doctor_asks_the_ehr_what_it_is(ehr: FhirServer) -> None:
    def found() -> tuple[str, bool]:
        one = Destination(name="ehr", fhir_url=ehr.base, timeout_s=5.0)
        told = doctor_peers.checks(Config(destinations=(one,)))
        [(text, is_well)] = [(text, is_well) for what, text, is_well in told if what == "FHIR ehr"]
        return text, is_well

    assert found()[1] is True
    ehr.script("GET /fhir/metadata", Reply(401), Reply(200, {"resourceType": "CapabilityStatement", "fhirVersion": "5.0.0"}))
    assert found()[1] is True
    assert found() == ("ehr answers /metadata with HTTP status 200 and not as a FHIR R4 server does.", False)
