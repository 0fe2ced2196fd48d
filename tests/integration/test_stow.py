"""Delivery by STOW-RS over real sockets: whatever the HTTP status is, the body decides, and a query where it says nothing."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from pathlib import Path

import pytest
import sqlalchemy as sa
from pydicom import dcmread

from tests import peers
from tests.dicomweb import Answer, Raw, archive, response
from tests.integration.test_commitment import Site
from tests.integration.test_cstore import expect_error, make_document
from tests.pki import Authority, served
from worker import config as configuration
from worker import doctor
from worker.config import Config, Destination
from worker.deliver import stow
from worker.deliver.association import Peer
from worker.deliver.breaker import TRIES, Breaker, judge
from worker.deliver.cstore import NO_RESPONSE, Outcome
from worker.deliver.send import deliver
from worker.deliver.web import MAX_BODY
from worker.errors import NotReadBack, PatientConflict, PeerRefused, PeerUnavailable, PeerUnreachable, WorkerError
from worker.peers import peer_of
from worker.store import queue, schema
from worker.store.database import Store

pytestmark = pytest.mark.requirement("L16")

XML = (
    '<?xml version="1.0" encoding="UTF-8"?>{dtd}<NativeDicomModel xmlns="http://dicom.nema.org/PS3.19/models/NativeDICOM">'
    '<DicomAttribute tag="{tag}" vr="SQ" keyword="K"><Item number="1">'
    '<DicomAttribute tag="00081155" vr="UI" keyword="ReferencedSOPInstanceUID"><Value number="1">{uid}</Value></DicomAttribute>'
    '<DicomAttribute tag="00081197" vr="US" keyword="FailureReason"><Value number="1">{code}</Value></DicomAttribute>'
    "</Item></DicomAttribute></NativeDicomModel>"
)
BOMB = '<!DOCTYPE d [<!ENTITY a "aaaaaaaaaaaaaaaa">' + "".join(
    f'<!ENTITY {chr(98 + k)} "{f"&{chr(97 + k)};" * 16}">' for k in range(9)
)  # 16 ** 10 letters


def send_one(peer: Peer) -> Outcome:
    """Send one new document."""
    [outcome] = stow.send([make_document()], peer=peer)
    return outcome


def failing(status: int, reason: int | None) -> Answer:
    """An answer that lists the object among the failed."""
    return Answer(status, lambda uid: response(failed=uid, reason=reason))


def test_documents_are_stored_as_the_bytes_they_are_and_read_back() -> None:
    documents = [make_document(text=f"part {k}" * 5000) for k in range(3)]
    with archive() as web:
        outcomes = stow.send(documents, peer=web.peer())
    assert [(one.delivered, one.status, one.warning) for one in outcomes] == [(True, 0, "")] * 3
    assert web.received == [one.data for one in documents]
    assert [line.split()[0] for line in web.asked] == ["POST", "GET", "GET"] * 3
    assert web.authorizations == {None}


@pytest.mark.parametrize("status", [200, 202, 400, 409, 503])
@pytest.mark.parametrize(
    ("reason", "error"),
    [(0xA700, PeerUnavailable), (0xA900, PeerRefused), (0xC000, PeerRefused), (0x0122, PeerRefused), (0xC122, PeerRefused)]
    + [(code, PeerUnavailable) for code in (0x0110, 0xB000, 0, None)],
)
def test_a_failure_in_the_body_counts_whatever_the_http_status(status: int, reason: int | None, error: type[WorkerError]) -> None:
    with archive(failing(status, reason)) as web:
        outcome = send_one(web.peer())
    expect_error(outcome, error, f"0x{reason if reason not in (0xB000, 0, None) else 0x0110:04X}")
    assert [line.split()[0] for line in web.asked] == ["POST"], "nothing is asked for that is said to have failed"


@pytest.mark.parametrize("tag", ["00081198", "0008119A"])
def test_a_failure_that_names_no_object_is_that_of_the_one_that_was_sent(tag: str) -> None:
    body = json.dumps({tag: {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [0xA900]}}]}}).encode()
    with archive(Answer(200, lambda _uid: body)) as web:
        expect_error(send_one(web.peer()), PeerRefused, "0xA900")


def test_an_object_that_is_both_stored_and_failed_has_failed() -> None:
    with archive(Answer(202, lambda uid: response(stored=uid, failed=uid, reason=0xA700), keeps=True)) as web:
        expect_error(send_one(web.peer()), PeerUnavailable, "0xA700")


@pytest.mark.parametrize("status", [200, 202, 409])
def test_a_warning_in_the_body_is_recorded_and_the_object_counts_as_delivered(status: int) -> None:
    with archive(Answer(status, lambda uid: response(stored=uid, warning=0xB000), keeps=True)) as web:
        outcome = send_one(web.peer())
    assert (outcome.delivered, outcome.status) == (True, 0xB000)
    assert "0xB000: coercion" in outcome.warning


@pytest.mark.parametrize(("tag", "code", "delivered"), [("00081199", 0, True), ("00081198", 0xA900, False)])
def test_a_body_in_xml_is_read_as_well(tag: str, code: int, *, delivered: bool) -> None:
    with archive(Answer(200, lambda uid: XML.format(dtd="", tag=tag, uid=uid, code=code).encode(), keeps=True)) as web:
        outcome = send_one(web.peer(read_back=False))
    assert outcome.delivered == delivered
    assert outcome.status == code


#: Bodies that say nothing of the object, or nothing that can be read.
SILENT: list[Callable[[str], bytes]] = [
    lambda _uid: b"",
    lambda _uid: b"{",
    lambda _uid: b"[1, null, {}]",
    lambda _uid: b'{"00081199": {"Value": {"1": 2}}, "00081198": 7}',
    lambda _uid: b"\xff\xfe{",
    lambda _uid: b"[" * 200_000,
    lambda _uid: b"<html>stored, thank you",
    lambda uid: XML.format(dtd=BOMB + "]>", tag="00081199", uid="&j;" + uid, code=0).encode(),
    lambda uid: (
        XML.format(dtd='<!DOCTYPE d [<!ENTITY j SYSTEM "file:///etc/hostname">]>', tag="00081199", uid="&j;", code=0).encode()
        + uid.encode()
    ),
    lambda _uid: response(stored="1.2.3.4"),
    lambda uid: response(stored=uid) + b" " * MAX_BODY,
]


@pytest.mark.requirement("L15")
@pytest.mark.requirement("X8")
@pytest.mark.parametrize("body", SILENT)
def test_a_body_that_says_nothing_of_the_object_leaves_it_to_a_query(body: Callable[[str], bytes]) -> None:
    """A status of 200 is no proof, nor is its body's silence a failure."""
    with archive(Answer(200, body, keeps=True), Answer(200, body)) as web:
        kept, lost, unasked = send_one(web.peer()), send_one(web.peer()), send_one(replace(web.peer(), read_back=False))
    assert kept.delivered
    assert kept.warning == "no answer said so; a query found the object"
    expect_error(lost, NotReadBack, "HTTP status 200 and does not say what became of the object")
    assert unasked.delivered, "the third is answered as it should be"


def test_without_read_back_silence_is_no_success() -> None:
    with archive(Answer(200, keeps=True)) as web:
        expect_error(send_one(web.peer(read_back=False)), NotReadBack, "read_back is off")


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, PeerRefused), (406, PeerRefused), (413, PeerRefused), (415, PeerRefused), (422, PeerRefused)]
    + [(408, PeerUnavailable), (500, PeerUnavailable), (507, PeerUnavailable)]
    + [(code, PeerUnreachable) for code in (401, 403, 404, 405, 429, 502, 503, 504)],
)
def test_a_status_without_a_body_tells_the_object_from_the_door(status: int, error: type[WorkerError]) -> None:
    """A wrong URL, an expired token and a proxy before a dead archive are no document's fault: nothing becomes a dead letter for them."""
    with archive(Answer(status)) as web:
        expect_error(send_one(web.peer()), error, f"HTTP status {status}")


def test_a_conflict_without_a_body_is_delivered_if_a_query_finds_it_and_else_refused() -> None:
    with archive(Answer(409, keeps=True), Answer(409)) as web:
        assert send_one(web.peer()).delivered
        expect_error(send_one(web.peer()), PeerRefused, "HTTP status 409")


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(status: int) -> None:
    with archive() as elsewhere, archive(Answer(status, headers=(("Location", elsewhere.url),))) as web:
        outcome = send_one(web.peer(authorization="Bearer secret"))
        expect_error(outcome, PeerUnreachable, f"HTTP status {status}, a redirect, which is not followed")
        assert elsewhere.asked == []


def test_success_that_a_query_does_not_confirm_is_not_delivered() -> None:
    with archive(Answer(200, lambda uid: response(stored=uid))) as web:
        expect_error(send_one(web.peer()), NotReadBack, "does not find the object")


def test_a_study_filed_under_another_patient_is_noticed() -> None:
    with archive(patient_id="OTHER") as web:
        expect_error(send_one(web.peer()), PatientConflict, "another patient ID")


@pytest.mark.parametrize("status", [400, 401, 500, 503])
def test_a_query_that_fails_leaves_the_object_undelivered(status: int) -> None:
    with archive(query_status=status) as web:
        expect_error(send_one(web.peer()), PeerUnavailable, f"answers QIDO-RS with HTTP status {status}")


def _hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.flush()


def _no_http(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"220 mail.example ESMTP\r\n")


def _drip(handler: BaseHTTPRequestHandler) -> None:
    for letter in b"HTTP/1.1 200 OK\r\nX-Long: " + b"a" * 600:
        handler.wfile.write(bytes((letter,)))
        time.sleep(0.02)


def _endless(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/dicom+json\r\n\r\n")
    for _ in range(4096):
        handler.wfile.write(b"[" * 65536)


@pytest.mark.requirement("L15")
@pytest.mark.parametrize("script", [_hang_up, _no_http, _drip, _endless])
def test_an_answer_that_is_none_or_does_not_end_is_bounded_and_left_to_a_query(script: Raw) -> None:
    """The document may have arrived; the second of two lost answers ends the call."""
    started = time.monotonic()
    with archive(script, script) as web:
        outcomes = stow.send([make_document() for _ in range(3)], peer=web.peer(timeout_s=1.0))
    assert time.monotonic() - started < 20
    assert not any(one.delivered for one in outcomes[:2])
    assert all(one.status == NO_RESPONSE for one in outcomes[:2])
    if script is _endless:
        assert [type(one.error) for one in outcomes] == [NotReadBack, NotReadBack, type(None)]
    else:
        assert [type(one.error) for one in outcomes] == [PeerUnavailable] * 3


def test_an_object_that_arrived_although_the_answer_was_lost_is_delivered() -> None:
    document = make_document()
    with archive(_hang_up) as web:
        web.kept[document.sop_instance_uid] = dcmread(BytesIO(document.data))
        [outcome] = stow.send([document], peer=web.peer())
    assert outcome.delivered
    assert outcome.warning == "no answer said so; a query found the object"


def test_an_archive_that_is_down_is_unreachable_and_costs_one_try() -> None:
    with archive() as web:
        peer = web.peer()
    outcomes = stow.send([make_document() for _ in range(3)], peer=peer)
    for one in outcomes:
        expect_error(one, PeerUnreachable, "cannot be reached")


def test_by_tls_the_archive_and_we_show_certificates_and_the_secret_is_sent(tmp_path: Path) -> None:
    """The same Credentials as for C-STORE: the authority, our certificate, a name of its own."""
    ours = Authority(tmp_path)
    pair, shown = ours.issue("client"), ours.issue("archive", hosts=("archive.example",))
    context = served(shown, trusted=ours)
    with archive(tls=context) as web:
        settings = Destination(
            name="web",
            stow_url=web.url,
            stow_secret="user:secret",
            timeout_s=5.0,
            tls_ca=str(ours.certificate),
            tls_certificate=str(pair.certificate),
            tls_key=str(pair.key),
            tls_server_name="archive.example",
        )
        assert "secret" not in repr(settings)
        peer = peer_of(settings, own_ae_title="US")
        assert "secret" not in repr(peer)
        assert send_one(peer).delivered
        assert web.authorizations == {"Basic dXNlcjpzZWNyZXQ="}
        assert send_one(peer_of(replace(settings, stow_secret="t0ken"), own_ae_title="US")).delivered
        assert web.authorizations == {"Basic dXNlcjpzZWNyZXQ=", "Bearer t0ken"}
        stored = len(web.received)
        other = peer_of(replace(settings, tls_server_name=""), own_ae_title="US")
        expect_error(send_one(other), PeerUnreachable, f"by TLS at 127.0.0.1:{web.port}: its certificate is refused")
        assert len(web.received) == stored


def test_doctor_asks_the_web_archive(tmp_path: Path) -> None:
    def found(url: str) -> tuple[str, bool]:
        config = Config(site=configuration.Site(data=tmp_path), destinations=(Destination(name="web", stow_url=url, timeout_s=5.0),))
        [(text, is_well)] = [
            (text, is_well) for what, text, is_well in doctor.checks(config, tmp_path / "s.toml") if what == "DICOMweb web"
        ]
        return text, is_well

    with archive() as web:
        text, is_well = found(web.url)
        assert is_well, text
        assert text.startswith(f"{web.url} answers QIDO-RS, ")
    assert found(web.url)[1] is False
    with archive(query_status=401) as web:
        assert found(web.url) == ("web answers QIDO-RS with HTTP status 401.", False)


def test_orthanc_takes_documents_by_stow_and_gives_them_back_by_qido(tmp_path: Path) -> None:
    with peers.orthanc(tmp_path) as pacs:
        url = f"http://127.0.0.1:{pacs.http_port}/dicom-web/studies"
        peer = peer_of(Destination(name="web", stow_url=url), own_ae_title="US")
        document = make_document()
        for _ in range(2):  # the second is a duplicate, of which Orthanc says nothing
            [outcome] = stow.send([document], peer=peer)
            assert (outcome.error, outcome.status, outcome.warning) == (None, 0, "")
        assert len(pacs.instances()) == 1
        [found] = stow.send([replace(document, data=b"\0" * 128 + b"DICM" + document.data[132:])], peer=peer)
        assert found.delivered


def test_orthanc_that_discards_what_it_takes_by_stow_is_found_out(tmp_path: Path) -> None:
    """A filter: the answer's body fails the object, or a query does not find it; never delivered."""
    with peers.orthanc(tmp_path, lua="function ReceivedInstanceFilter(dicom, origin) return false end") as pacs:
        url = f"http://127.0.0.1:{pacs.http_port}/dicom-web/studies"
        [outcome] = stow.send([make_document()], peer=peer_of(Destination(name="web", stow_url=url), own_ae_title="US"))
        assert pacs.instances() == []
        assert isinstance(outcome.error, (NotReadBack, PeerUnavailable, PeerRefused)), outcome


@pytest.mark.requirement("L9")
def test_a_report_whose_stored_bytes_changed_is_not_sent_and_the_others_are(store: Store, tmp_path: Path) -> None:
    """SQLite has no check sums: a byte that a disk changed would be another value, or another patient."""
    site = Site(store, tmp_path)
    changed, kept = site.add(2)
    with store.begin() as conn:
        mine = schema.document.c.sop_instance_uid == changed
        data = bytes(conn.execute(sa.select(schema.document.c.data).where(mine)).scalar_one())
        written = {"sha256": hashlib.sha256(data).hexdigest(), "data": data.replace(b"TEST1", b"TEST2")}
        conn.execute(sa.update(schema.document).where(mine).values(**written))
    with archive() as web:
        site.deliver(web.peer(), wait_s=None)
        assert list(web.kept) == [kept]
    words = "The stored report is not as it was written, its sha256 is another: it is not sent."
    assert site.jobs() == [("discarded", words), ("completed", "")]


@pytest.mark.requirement("L11")
def test_the_report_of_a_study_that_was_held_since_is_not_sent(store: Store, tmp_path: Path) -> None:
    """Another patient's image came while the archive was away: whose study it is, nobody knows."""
    site = Site(store, tmp_path)
    site.add()
    with store.begin() as conn:
        conn.execute(sa.update(schema.study).values(hold="The images of this study name two different patients."))
    breaker = Breaker()
    breaker.failed()
    with store.begin() as conn:
        jobs = queue.lease(conn, "deliver", owner="me", limit=1, lease_s=60, now=site.now, destination="pacs")
    with archive() as web:
        judge(breaker, deliver(jobs, store=store, peer=web.peer(), clock=lambda: site.now), store=store, destination="pacs", now=site.now)
        assert web.asked == []
    assert breaker.failures == 1, "an archive that was not asked was not reached"
    words = "The study is held, its report is not sent: The images of this study name two different patients."
    assert site.jobs() == [("discarded", words)]


@pytest.mark.requirement("L12")
def test_jobs_of_a_web_destination_are_settled_and_left_alone_as_those_of_any_other(store: Store, tmp_path: Path) -> None:
    site, breaker = Site(store, tmp_path), Breaker()
    stored, refused, later = site.add(3)
    with archive(Answer(200, lambda uid: response(stored=uid), keeps=True), failing(200, 0xA900), failing(200, 0xA700)) as web:
        site.deliver(web.peer(), wait_s=None)
        words = "pacs refuses the object with 0xA900."
        assert site.jobs() == [("completed", ""), ("discarded", words), ("available", "pacs cannot store now: 0xA700.")]
        assert stored in web.kept
        assert refused not in web.kept
        peer = web.peer()
    for _ in range(TRIES):
        site.now += timedelta(hours=1)
        with site.store.begin() as conn:
            jobs = queue.lease(conn, "deliver", owner="me", limit=1, lease_s=60, now=site.now, destination="pacs")
        outcomes = deliver(jobs, store=store, peer=peer, clock=lambda: site.now)
        judge(breaker, outcomes, store=store, destination="pacs", now=site.now)
    assert breaker.is_open
    assert site.jobs()[2][0] == "available"
    with archive() as web:
        site.now += timedelta(hours=1)
        assert site.deliver(web.peer(), wait_s=None) == 1
        assert list(web.kept) == [later]
