"""X11, R6, X15: who sent, asked, analysed or was turned away is in the audit trail, and in the repository, whatever happens to that."""

from __future__ import annotations

import base64
import json
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC
from pathlib import Path

import pytest
from pydicom.uid import generate_uid
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RJ

from tests import atna as expected
from tests import factories
from tests.atna import Repository, details, objects, outcome, trail
from tests.conftest import Captured
from tests.dicomweb import Answer, archive, response
from tests.installation import Installation, wait_until
from tests.integration.test_commitment import Site
from tests.peers import dcmtk, orthanc
from tests.pki import Authority, Pair, listening, served
from tests.receivers import receiving
from tests.scu import CT, EXPLICIT, Scu, encoded, slice_of
from worker.config import Audit, Config
from worker.domain import Patient, PatientKey
from worker.errors import Retry
from worker.intake import mllp
from worker.ops import audit, forwarding
from worker.peers import repository_of
from worker.store.database import Store
from worker.tls import server_context

SUBJECT = audit.Subject("1.2.3", Patient(PatientKey("SITE", "P1"), "Doe^Jane"))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A trail that this process writes."""
    audit.begin(tmp_path / "audit", ae_title="SYNOPTIC", limit_bytes=2**24)
    yield tmp_path / "audit"
    audit.end()


# --- received -----------------------------------------------------------------------------------------


@pytest.mark.requirement("X11")
def test_what_an_association_brought_is_a_message_for_each_study_and_outcome(folder: Path, tmp_path: Path) -> None:
    """PS3.15 §A.5.2: what went well and what failed is never one message; what was here already is R, not C."""
    with receiving(tmp_path / "spool") as receiver:
        one, two = slice_of("1.2.1"), slice_of("1.2.2")
        one.PatientID = two.PatientID = "P&<1>"
        with receiver.scu() as scu:
            scu.associate([(CT, [EXPLICIT])])
            for _ in range(3):
                one.SOPInstanceUID = generate_uid()
                assert scu.store(one) == 0
            assert scu.store(one) == 0
            assert scu.store(two) == 0
            receiver.store.fails.append(Retry("The database is away."))
            two.SOPInstanceUID = generate_uid()
            assert scu.store(two) == 0xA700
            assert scu.store(two, data=encoded(two)[:-9]) == 0xC002
            assert scu.release()
        receiver.heard.next("association.closed")
    found = trail(folder, "110104")
    said = [
        (objects(m)[:1], m[0].attrib["EventActionCode"], outcome(m), [s.attrib["NumberOfInstances"] for s in m.iter("SOPClass")])
        for m in found
    ]
    assert said == [
        (["1.2.1"], "C", "0", ["3"]),
        (["1.2.1"], "R", "0", ["1"]),
        (["1.2.2"], "C", "0", ["1"]),
        (["1.2.2"], "C", "4", ["1"]),
        ([], "C", "8", []),
    ]
    assert objects(found[0])[1] == "P&<1>^^^HOSPITAL"
    sender = next(found[0].iter("ActiveParticipant"))
    assert (sender.attrib["AlternativeUserID"], sender.attrib["NetworkAccessPointID"]) == ("AETITLES=SENDER", "127.0.0.1")


def test_an_association_of_endless_studies_does_not_grow_in_memory(folder: Path, tmp_path: Path) -> None:
    with receiving(tmp_path / "spool") as receiver, receiver.scu() as scu:
        scu.associate([(CT, [EXPLICIT])])
        ds = slice_of(rows=4)
        for number in range(300):
            ds.StudyInstanceUID, ds.SOPInstanceUID = f"1.2.{number}", generate_uid()
            assert scu.store(ds) == 0
        assert len(trail(folder, "110104")) == 256, "while it is still open"
        assert scu.release()
        receiver.heard.next("association.closed")
    assert len(trail(folder, "110104")) == 300


# --- turned away --------------------------------------------------------------------------------------


@pytest.mark.requirement("R6")
@pytest.mark.requirement("X15")
@pytest.mark.parametrize(
    ("called", "calling", "allowed"),
    [("OTHER", "SENDER", "127.0.0.1"), ("SYNOPTIC", "STRANGER", "127.0.0.1"), ("SYNOPTIC", "SENDER", "10.0.0.0/8")],
)
def test_a_stranger_and_a_known_title_from_another_address_are_alerts(
    folder: Path, tmp_path: Path, called: str, calling: str, allowed: str
) -> None:
    with receiving(tmp_path / "spool", calling={"SENDER": [allowed]}) as receiver:
        for _ in range(5):
            with receiver.scu() as scu:
                assert isinstance(scu.associate(called=called, calling=calling), A_ASSOCIATE_RJ)
            receiver.heard.next("association.rejected")
        assert receiver.files() == []
    audit.end()
    first, rest = trail(folder, "110113")
    assert first[0][1].attrib["originalText"] == "Node Authentication"
    assert objects(first) == objects(rest) == ["127.0.0.1"]
    assert next(first.iter("ParticipantObjectName")).text == calling
    assert "not recognized" in details(first)["Alert Description"]
    assert details(rest)["Alert Description"].endswith(": 4 more times within 60 s")


def presenting(authority: Authority, pair: Pair | None) -> Callable[[Scu], None]:
    """Wrap a requestor's connection into TLS, showing `pair`."""
    context = ssl.create_default_context(cafile=str(authority.certificate))
    if pair:
        context.load_cert_chain(pair.certificate, pair.key)

    def wrap(scu: Scu) -> None:
        scu.sock = context.wrap_socket(scu.sock, server_hostname="127.0.0.1")

    return wrap


@pytest.mark.requirement("X15")
def test_a_known_title_with_the_certificate_of_another_node_is_rejected_and_an_alert(folder: Path, tmp_path: Path) -> None:
    """Both certificates are the hospital's, and the address is right: only the binding of names to the title tells them apart."""
    hospital = Authority(tmp_path / "pki", "hospital")
    context = server_context(listening(hospital.issue("worker"), trusted=hospital), section="receive")
    calling, names = {"SENDER": ["127.0.0.1"], "*": ["127.0.0.1"]}, {"SENDER": ["CT1.hospital.example"]}
    with receiving(tmp_path / "spool", ssl_context=context, calling=calling, tls_names=names) as receiver:
        answers = {}
        for name, hosts in (("ct1", ("ct1.hospital.example",)), ("mr7", ("mr7.hospital.example",)), ("CT1.hospital.example", ())):
            wrap = presenting(hospital, hospital.issue(name, hosts=hosts))
            with receiver.scu() as scu:
                wrap(scu)
                answers[name] = type(scu.associate([(CT, [EXPLICIT])]))
        assert answers == {"ct1": A_ASSOCIATE_AC, "mr7": A_ASSOCIATE_RJ, "CT1.hospital.example": A_ASSOCIATE_AC}
        with receiver.scu() as scu:
            presenting(hospital, hospital.issue("mr7b"))(scu)
            assert isinstance(scu.associate([(CT, [EXPLICIT])], calling="ANOTHER"), A_ASSOCIATE_AC), "no name was asked of it"
    (alert,) = trail(folder, "110113")
    assert "with this certificate" in details(alert)["Alert Description"]


@pytest.mark.requirement("X15")
@pytest.mark.parametrize("listener", ["dicom", "hl7"])
def test_a_node_that_fails_the_handshake_is_an_alert_and_one_that_only_knocks_is_none(folder: Path, tmp_path: Path, listener: str) -> None:
    hospital, stranger = Authority(tmp_path / "a", "hospital"), Authority(tmp_path / "b", "stranger")
    context = server_context(listening(hospital.issue("worker"), trusted=hospital), section="receive")

    def call(address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=5):
            pass
        shown = ssl.create_default_context(cafile=str(hospital.certificate))
        pair = stranger.issue("node")
        shown.load_cert_chain(pair.certificate, pair.key)
        plain = socket.create_connection(address, timeout=5)
        with suppress(OSError), plain, shown.wrap_socket(plain, server_hostname="127.0.0.1") as sock:
            assert sock.recv(1) == b""  # TLS 1.3 refuses after the handshake

    if listener == "dicom":
        with receiving(tmp_path / "spool", ssl_context=context) as receiver:
            call(receiver.scp.address)
            wait_until(lambda: bool(expected.lines(folder)), timeout_s=20, what="an alert")
    else:
        server = mllp.MllpServer(
            ("127.0.0.1", 0),
            apply=lambda _message, _raw: True,
            reject=lambda _reason, _raw: None,
            zone=UTC,
            issuers={},
            allowed_addresses=["127.0.0.1"],
            ssl_context=context,
        )
        server.start()
        call(("127.0.0.1", server.port))
        wait_until(lambda: bool(expected.lines(folder)), timeout_s=20, what="an alert")
        server.stop()
    (alert,) = [one for one in trail(folder, "110113") if "certificate is refused" in details(one)["Alert Description"]]
    assert objects(alert) == ["127.0.0.1"]


# --- sent ---------------------------------------------------------------------------------------------


@pytest.mark.requirement("X11")
def test_a_report_sent_by_stow_is_begun_and_ended_and_its_queries_are_recorded_below_their_url(
    folder: Path, store: Store, tmp_path: Path
) -> None:
    site = Site(store, tmp_path)
    site.add(3)
    refused, later = (
        Answer(200, lambda uid: response(failed=uid, reason=0xA900)),
        Answer(200, lambda uid: response(failed=uid, reason=0xA700)),
    )
    with archive(Answer(200, lambda uid: response(stored=uid), keeps=True), refused, later) as web:
        site.deliver(web.peer(), wait_s=None)
    assert [outcome(one) for one in trail(folder, "110102")] == ["0"] * 3
    sent = trail(folder, "110104")
    assert [outcome(one) for one in sent] == ["0", "8", "4"]
    assert {one.attrib["UserID"] for one in list(sent[0].iter("ActiveParticipant"))[1:]} == {web.peer().stow_url}
    first, second = trail(folder, "110112")
    assert objects(first) == objects(second) == [web.peer().stow_url]
    asked = [base64.b64decode(next(one.iter("ParticipantObjectQuery")).text or "").decode() for one in (first, second)]
    assert [("SOPInstanceUID=" in one, "?StudyInstanceUID=" in one) for one in asked] == [(True, False), (False, True)]


# --- the repository -----------------------------------------------------------------------------------


def repository(folder: Path) -> tuple[Repository, Config]:
    """A repository by mutual TLS and the configuration that names it; not started."""
    hospital = Authority(folder / "pki", "hospital")
    server, ours = hospital.issue("repository"), hospital.issue("worker")
    context = served(server, trusted=hospital)
    made = Repository(context)
    made.start()
    settings = Audit(
        syslog_host="127.0.0.1",
        syslog_port=made.port,
        tls_ca=str(hospital.certificate),
        tls_certificate=str(ours.certificate),
        tls_key=str(ours.key),
    )
    return made, Config(audit=settings)


@pytest.mark.requirement("X11")
def test_a_repository_that_is_killed_and_back_misses_nothing(folder: Path, tmp_path: Path, captured: Captured) -> None:
    """Messages go on being written while it is away, and it is killed with messages under way."""
    sink, config = repository(tmp_path)
    forwarder = forwarding.Forwarder(folder, connect=repository_of(config), limit_bytes=2**30)
    forwarder.start()
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.005):
            audit.accessed(SUBJECT, user="b", outcome=audit.SUCCESS)

    writer = threading.Thread(target=work)
    writer.start()
    try:
        for _ in range(2):
            seen = len(sink.received)
            wait_until(lambda seen=seen: len(sink.received) > seen + 50, timeout_s=60, what="messages in the repository")  # type: ignore[misc]
            sink.kill()
            wait_until(lambda: bool(forwarding.state(folder)["trouble"]), timeout_s=60, what="the loss being noticed")
            assert forwarding.state(folder)["waiting_bytes"] > 0
            sink.start()
    finally:
        over.set()
        writer.join()
    wait_until(lambda: set(expected.lines(folder)) <= set(sink.received), timeout_s=60, what="everything in the repository")
    forwarder.stop()
    sink.kill()
    assert [expected.checked(one) for one in sink.received]
    # Once said for each loss, once for each return; and nothing waits.
    assert len(captured.named("audit.unsent")) == len(captured.named("audit.sent")) == 2
    assert forwarding.state(folder) | {"kept_bytes": 0} == {"kept_bytes": 0, "waiting_bytes": 0, "dropped": 0, "trouble": ""}
    again = Counter(sink.received)
    print(json.dumps({"test": "repository killed twice", "messages": len(again), "sent twice": sum(again.values()) - len(again)}))


@pytest.mark.requirement("X11")
def test_what_waits_for_a_repository_is_bounded_and_what_goes_is_counted(tmp_path: Path, captured: Captured) -> None:
    sink, config = repository(tmp_path)
    sink.kill()
    folder = tmp_path / "audit"
    folder.mkdir()
    message = b"<85>1 x</AuditMessage>\n"
    for name in ("2026-01-01.log", "2026-01-02.log", "2026-01-03.log"):
        (folder / name).write_bytes(message * 1000)
    forwarder = forwarding.Forwarder(folder, connect=repository_of(config), limit_bytes=2000 * len(message), keep_days=1)
    forwarder.start()
    wait_until(lambda: bool(captured.named("audit.dropped")), timeout_s=30, what="the oldest day going")
    assert [path.name for path in sorted(folder.glob("*.log"))] == ["2026-01-02.log", "2026-01-03.log"], "old, but not sent yet"
    said = forwarding.state(folder)
    assert (said["dropped"], said["waiting_bytes"]) == (1000, 2000 * len(message))
    assert "audit repository cannot be reached" in said["trouble"]
    sink.start()
    wait_until(lambda: len(sink.received) == 2000, timeout_s=60, what="what is left in the repository")
    wait_until(lambda: not (folder / "2026-01-02.log").exists(), timeout_s=30, what="the day that was sent going")
    forwarder.stop()
    sink.kill()


@pytest.mark.requirement("X11")
def test_days_larger_than_what_is_sent_at_once_arrive_whole_and_what_is_no_message_is_passed_by(tmp_path: Path) -> None:
    """A batch that ends within a line leaves that line for the next; the zeros of a power cut are nobody's message."""
    sink, config = repository(tmp_path)
    folder = tmp_path / "audit"
    folder.mkdir()
    written = []
    for day, count in (("2026-01-01", 4202), ("2026-01-02", 4202), ("2026-01-03", 10)):  # 708 octets less than 4 MiB: less than a line
        messages = [f"<85>1 {day} {number:04} {'x' * 960}</AuditMessage>" for number in range(count)]
        (folder / f"{day}.log").write_bytes(b"".join(one.encode() + b"\n" for one in messages) + b"\0" * 7)
        written += messages
    forwarder = forwarding.Forwarder(folder, connect=repository_of(config), limit_bytes=2**30)
    forwarder.start()
    wait_until(lambda: len(sink.received) == len(written), timeout_s=60, what="everything in the repository")
    forwarder.stop()
    sink.kill()
    assert sink.received == written


@pytest.mark.requirement("X11")
def test_a_day_that_was_removed_and_began_again_is_sent_from_its_beginning(folder: Path, tmp_path: Path) -> None:
    """Somebody made room by hand; what was sent of the file before says nothing of this one."""
    sink, config = repository(tmp_path)
    forwarder = forwarding.Forwarder(folder, connect=repository_of(config), limit_bytes=2**30)
    forwarder.start()
    for _ in range(20):
        audit.accessed(SUBJECT, user="b", outcome=audit.SUCCESS)
    wait_until(
        lambda: len(sink.received) == 20 and forwarding.state(folder)["waiting_bytes"] == 0, timeout_s=30, what="the first of the day"
    )
    next(folder.glob("*.log")).unlink()
    audit.accessed(SUBJECT, user="after", outcome=audit.SUCCESS)
    wait_until(lambda: len(sink.received) == 21, timeout_s=30, what="the first of the new file")
    forwarder.stop()
    sink.kill()


@pytest.mark.requirement("X11")
def test_nothing_is_sent_to_a_repository_that_cannot_be_trusted(folder: Path, tmp_path: Path, captured: Captured) -> None:
    sink, config = repository(tmp_path)
    other = Authority(tmp_path / "other", "stranger").issue("repository")
    sink.context = served(other)
    audit.accessed(SUBJECT, user="b", outcome=audit.SUCCESS)
    forwarder = forwarding.Forwarder(folder, connect=repository_of(config), limit_bytes=2**30)
    forwarder.start()
    wait_until(lambda: bool(captured.named("audit.unsent")), timeout_s=30, what="the refusal")
    forwarder.stop()
    sink.kill()
    assert "certificate is refused" in str(captured.named("audit.unsent")[0]["reason"])
    assert sink.received == []


# --- the whole line -----------------------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.requirement("X11")
def test_each_receipt_inference_and_sending_of_a_day_is_in_the_trail_and_at_the_repository(tmp_path: Path) -> None:
    """One good study, an admission before it and a stranger; the patient is in the trail and not in the log."""
    sink, config = repository(tmp_path)
    (tmp_path / "orthanc").mkdir()
    keys = "".join(f'{key} = "{getattr(config.audit, key)}"\n' for key in ("syslog_host", "tls_ca", "tls_certificate", "tls_key"))
    installation = Installation(
        tmp_path / "worker",
        bundles=("cxr-severity",),
        quiet_s=0.5,
        processes=1,
        extra=f"[audit]\n{keys}syslog_port = {sink.port}\n",
    )
    ds = factories.make_radiograph(patient=PatientKey("SITE", "P-4711"), accession_number="ACC9")
    factories.write(ds, tmp_path / "image.dcm")
    name = str(ds.PatientName)
    admission = (
        "MSH|^~\\&|ADT|SITE|X|Y|20240101||ADT^A08^ADT_A01|M1|P|2.5.1\rEVN||20240101\r"
        f"PID|1||P-4711^^^SITE^MR||{name}||{ds.PatientBirthDate}|{ds.PatientSex}\r"
    )
    folder = installation.folder / "data" / "audit"

    def send(ae_title: str) -> int:
        to = ("-aet", ae_title, "-aec", "WORKER", "127.0.0.1", str(installation.port))
        return dcmtk("/usr/bin/storescu", "-R", *to, str(tmp_path / "image.dcm")).returncode

    with orthanc(tmp_path / "orthanc", callers={"WORKER": installation.port}) as pacs:
        installation.orthanc = pacs
        with installation:
            mllp.send(("127.0.0.1", installation.mllp_port), [admission.encode()], timeout_s=30)
            assert send("MODALITY") == 0
            assert send("EVIL") != 0
            installation.wait_for_event("job.completed", timeout_s=90, count=2)
            installation.wait_idle()
            status = installation.cli("status", "--json").stdout
            told = installation.cli("audit", "--study", "1").stdout
    assert json.loads(status)["audit"]["kept_bytes"] > 0
    uid = str(ds.StudyInstanceUID)
    whole = [(m[0][0].attrib["originalText"], m[0].attrib["EventActionCode"], outcome(m)) for m in trail(folder) if uid in objects(m)]
    assert whole == [
        ("DICOM Instances Transferred", "C", "0"),
        ("DICOM Instances Accessed", "R", "0"),
        ("Begin Transferring DICOM Instances", "E", "0"),
        ("DICOM Instances Transferred", "C", "0"),
    ]
    counts = Counter(m[0][0].attrib["originalText"] for m in trail(folder))
    assert counts["Query"] >= 2, "the report was looked for after it was sent"
    assert counts["Security Alert"] == 1
    assert {m[0].attrib["EventActionCode"] for m in trail(folder, "110110")} == {"R", "U"}
    assert counts["Application Activity"] == 8, "four processes started and stopped"
    assert all("P-4711^^^SITE" in objects(m) for m in trail(folder, "110110"))
    assert len(told.splitlines()) == 4
    assert "P-4711" in told
    wait_until(lambda: set(expected.lines(folder)) <= set(sink.received), timeout_s=30, what="everything in the repository")
    sink.kill()
    log = installation.log.read_text("utf-8")
    assert not [planted for planted in (name.split("^")[0], "P-4711", "ACC9", uid) if planted in log]
