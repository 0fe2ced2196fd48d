"""X5, by certificates of every kind of wrong: our listeners refuse such callers, and our sender refuses such peers."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC
from pathlib import Path
from typing import Any

import pytest

from tests import peers
from tests.integration.test_cstore import expect_error, make_document, send_one
from tests.pki import Authority, Pair, calling, listening, served
from tests.receivers import receiving
from worker.config import Records
from worker.deliver import association, cstore, web
from worker.deliver.association import Peer
from worker.errors import PeerUnavailable, PeerUnreachable
from worker.intake.hl7 import ParsedMessage
from worker.intake.mllp import MllpServer
from worker.peers import peer_of
from worker.tls import Credentials, server_context

pytestmark = pytest.mark.requirement("X5")

MESSAGE = b"MSH|^~\\&|HIS|A|SYNOPTIC|B|20240102030405+0000||ADT^A08^ADT_A01|1|P|2.5.1\rPID|||P-1||TEST^ONLY||20000101|F\r"
Client = Callable[[Authority, Authority], ssl.SSLContext]
#: What RFC 9325 leaves: TLS 1.3's suites, and of TLS 1.2 those with ECDHE and AEAD; and the signal of renegotiation.
MODERN = {0x1301, 0x1302, 0x1303, 0xC02B, 0xC02C, 0xC02F, 0xC030, 0xCCA8, 0xCCA9, 0x00FF}
RC4, TRIPLE_DES, CBC, STATIC_RSA, GOOD = 0x0005, 0x000A, 0xC013, 0x009C, 0xC02F


@pytest.fixture
def hospital(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "hospital", "hospital")


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "stranger", "stranger")


# --- who may call us -----------------------------------------------------------------------------------


def client(trusted: Authority, pair: Pair | None, *, newest: ssl.TLSVersion | None = None, suites: str = "") -> ssl.SSLContext:
    """A caller that agrees to anything, however old, unless told otherwise."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(trusted.certificate)
    context.set_ciphers(f"{suites or 'ALL'}:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        if newest:
            context.maximum_version = newest
    if pair:
        context.load_cert_chain(pair.certificate, pair.key)
    return context


def good(hospital: Authority, _stranger: Authority) -> ssl.SSLContext:
    """A caller with the hospital's certificate."""
    return client(hospital, hospital.issue("modality"))


WRONG: dict[str, Client] = {
    "TLS 1.0": lambda ours, _: client(ours, ours.issue("modality"), newest=ssl.TLSVersion.TLSv1),
    "TLS 1.1": lambda ours, _: client(ours, ours.issue("modality"), newest=ssl.TLSVersion.TLSv1_1),
    "CBC": lambda ours, _: client(ours, ours.issue("modality"), newest=ssl.TLSVersion.TLSv1_2, suites="ECDHE-RSA-AES128-SHA"),
    "no forward secrecy": lambda ours, _: client(ours, ours.issue("modality"), newest=ssl.TLSVersion.TLSv1_2, suites="AES128-GCM-SHA256"),
    "expired": lambda ours, _: client(ours, ours.issue("modality", days=-1)),
    "another authority": lambda ours, theirs: client(ours, theirs.issue("modality")),
    "no certificate": lambda ours, _: client(ours, None),
}


@contextmanager
def dicom_listener(folder: Path, tls: Credentials) -> Iterator[Callable[[ssl.SSLContext | None], bool]]:
    """Run the Storage SCP; yields what tells whether a caller gets an association."""

    def call(context: ssl.SSLContext | None) -> bool:
        port = receiver.scp.address[1]
        peer = Peer("us", "SYNOPTIC", "127.0.0.1", port, "SENDER", timeout_s=5, tls=(lambda: context) if context else None)
        try:
            cstore.echo(peer)
        except PeerUnavailable:
            return False
        return True

    with receiving(folder, ssl_context=tls) as receiver:
        yield call


@contextmanager
def hl7_listener(_folder: Path, tls: Credentials) -> Iterator[Callable[[ssl.SSLContext | None], bool]]:
    """Run the HL7 listener; yields what tells whether a caller's message is taken."""
    kept: list[bytes] = []

    def apply(_message: ParsedMessage, raw: bytes) -> bool:
        kept.append(raw)
        return True

    def call(context: ssl.SSLContext | None) -> bool:
        before = len(kept)
        try:
            with socket.create_connection(("127.0.0.1", listener.port), timeout=5) as plain:
                connection = context.wrap_socket(plain, server_hostname="127.0.0.1") if context else plain
                with connection:
                    connection.sendall(b"\x0b" + MESSAGE + b"\x1c\r")
                    said = connection.recv(65536)
        except OSError:
            said = b""
        assert (b"MSA" in said) == (len(kept) > before)
        return b"MSA|AA|1" in said

    listener = MllpServer(
        ("127.0.0.1", 0),
        apply=apply,
        reject=lambda _reason, _raw: None,
        zone=UTC,
        issuers={"": "SITE"},
        allowed_addresses=("127.0.0.0/8",),
        message_deadline_s=2.0,
        ssl_context=tls,
    )
    listener.start()
    try:
        yield call
    finally:
        listener.stop()


def credentials(pair: Pair, trusted: Authority) -> Credentials:
    """What a listener shows and asks for."""
    made = server_context(listening(pair, trusted=trusted), section="receive")
    assert made is not None
    return made


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("listener", [dicom_listener, hl7_listener])
def test_a_caller_that_is_wrong_in_one_thing_is_refused_and_the_right_one_is_served(
    hospital: Authority, stranger: Authority, tmp_path: Path, listener: Callable[..., object], wrong: str
) -> None:
    ours = hospital.issue("worker", is_rsa=True)  # so that a suite without forward secrecy could be agreed on
    with listener(tmp_path / "spool", credentials(ours, hospital)) as call:  # type: ignore[attr-defined]
        assert not call(None)
        assert not call(WRONG[wrong](hospital, stranger))
        assert call(good(hospital, stranger))


@pytest.mark.parametrize("wrong", [name for name in WRONG if name not in {"expired", "another authority", "no certificate"}])
def test_the_old_callers_of_these_tests_could_agree_with_an_old_listener(hospital: Authority, stranger: Authority, wrong: str) -> None:
    """Else this OpenSSL would refuse them by itself, and the tests above would prove nothing."""
    pair = hospital.issue("old", is_rsa=True)
    context = served(pair)
    weaken(context)
    with peers.ScriptedPacs(tls=context) as pacs:
        assert cstore.echo(replace(pacs.peer, tls=lambda: WRONG[wrong](hospital, stranger))) > 0


def weaken(context: ssl.SSLContext, *, newest: ssl.TLSVersion | None = None, suites: str = "ALL") -> ssl.SSLContext:
    """Let a context agree to anything old."""
    context.set_ciphers(f"{suites}:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        if newest:
            context.maximum_version = newest
    return context


def client_hello(suite: int) -> bytes:
    """A TLS 1.2 ClientHello (RFC 5246 §7.4.1.2) that offers one suite; OpenSSL has no RC4 and 3DES to offer any more."""
    groups = struct.pack(">HHHHH", 10, 6, 4, 0x0017, 0x001D)
    signatures = struct.pack(">HHHHHH", 13, 8, 6, 0x0401, 0x0804, 0x0201)
    extensions = groups + signatures
    body = b"\x03\x03" + bytes(32) + b"\0" + struct.pack(">HH", 2, suite) + b"\x01\0" + struct.pack(">H", len(extensions)) + extensions
    handshake = b"\x01" + len(body).to_bytes(3) + body
    return b"\x16\x03\x01" + len(handshake).to_bytes(2) + handshake


@pytest.mark.parametrize(("suite", "answer"), [(RC4, 0x15), (TRIPLE_DES, 0x15), (CBC, 0x15), (STATIC_RSA, 0x15), (GOOD, 0x16)])
def test_a_suite_that_is_broken_is_answered_with_an_alert(hospital: Authority, tmp_path: Path, suite: int, answer: int) -> None:
    tls = credentials(hospital.issue("worker", is_rsa=True), hospital)
    with receiving(tmp_path, ssl_context=tls) as receiver, socket.create_connection(receiver.scp.address, timeout=5) as line:
        line.sendall(client_hello(suite))
        assert line.recv(1) == bytes((answer,))


def test_the_log_says_why_a_caller_was_refused_and_nothing_of_it(hospital: Authority, tmp_path: Path) -> None:
    with receiving(tmp_path, ssl_context=credentials(hospital.issue("worker"), hospital)) as receiver:
        context = client(hospital, hospital.issue("secretname", days=-1))
        with pytest.raises(PeerUnreachable, match="certificate expired"):
            cstore.echo(Peer("us", "SYNOPTIC", "127.0.0.1", receiver.scp.address[1], "SENDER", timeout_s=5, tls=lambda: context))
        said = receiver.heard.next("association.rejected")
    assert "certificate has expired" in str(said["reason"])
    assert "secretname" not in str(said)


# --- whom we call --------------------------------------------------------------------------------------


def server(pair: Pair, *, trusted: Authority | None = None) -> ssl.SSLContext:
    """A PACS that agrees to anything."""
    return weaken(served(pair, trusted=trusted))


def ours(pacs: peers.ScriptedPacs, pair: Pair | None, trusted: Authority, **settings: str) -> Peer:
    """How we call a scripted PACS by TLS, through the configuration."""
    port = pacs.peer.port
    return peer_of(calling(pair, trusted=trusted, port=port, **settings), own_ae_title="WORKER")


UNFIT: dict[str, tuple[Callable[[Authority, Authority], ssl.SSLContext], str]] = {
    "TLS 1.0": (lambda a, _: weaken(server(a.issue("pacs")), newest=ssl.TLSVersion.TLSv1), "protocol version"),
    "TLS 1.1": (lambda a, _: weaken(server(a.issue("pacs")), newest=ssl.TLSVersion.TLSv1_1), "protocol version"),
    "CBC": (
        lambda a, _: weaken(server(a.issue("pacs", is_rsa=True)), newest=ssl.TLSVersion.TLSv1_2, suites="ECDHE-RSA-AES128-SHA"),
        "handshake failure",
    ),
    "expired": (lambda a, _: server(a.issue("pacs", days=-1)), "certificate has expired"),
    "another authority": (lambda _, b: server(b.issue("pacs")), "unable to get local issuer certificate"),
    "another host": (lambda a, _: server(a.issue("pacs", hosts=("pacs.example",))), "IP address mismatch"),
    "does not trust us": (lambda a, b: server(a.issue("pacs"), trusted=b), "unknown ca"),
}


@pytest.mark.parametrize("wrong", UNFIT)
def test_a_peer_that_is_wrong_in_one_thing_gets_no_byte_of_a_report(hospital: Authority, stranger: Authority, wrong: str) -> None:
    make, words = UNFIT[wrong]
    with peers.ScriptedPacs(tls=make(hospital, stranger)) as pacs:
        outcome = send_one(ours(pacs, hospital.issue("worker"), hospital))
        expect_error(outcome, PeerUnreachable, words)
        assert (pacs.associations, pacs.received) == (0, [])


def test_a_peer_that_asks_for_a_certificate_refuses_us_without_one(hospital: Authority) -> None:
    with peers.ScriptedPacs(tls=server(hospital.issue("pacs"), trusted=hospital)) as pacs:
        outcome = send_one(ours(pacs, None, hospital))
        assert type(outcome.error) is PeerUnreachable
        assert (pacs.associations, pacs.received) == (0, [])
        assert send_one(ours(pacs, hospital.issue("worker"), hospital)).delivered


def test_nothing_is_sent_in_the_clear_to_a_peer_that_was_to_speak_tls(hospital: Authority) -> None:
    """No silent fallback: a PACS whose TLS was switched off gets no report."""
    with peers.ScriptedPacs() as pacs:
        outcome = send_one(ours(pacs, hospital.issue("worker"), hospital))
        assert type(outcome.error) is PeerUnreachable
        assert (pacs.associations, pacs.received) == (0, [])


def _shaken(hospital: Authority) -> tuple[ssl.SSLSocket, ssl.SSLSocket]:
    """Both ends of one TLS connection, ours first."""
    here, there = socket.socketpair()
    theirs = server(hospital.issue("pacs")).wrap_socket(there, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=theirs.do_handshake)
    thread.start()
    mine = client(hospital, None).wrap_socket(here, server_hostname="localhost")
    thread.join()
    return mine, theirs


def test_an_archive_that_is_cut_off_for_its_slowness_is_sent_nothing_in_the_clear(
    hospital: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A TLS socket's own shutdown ends TLS first: the thread that writes the report would go on without."""
    mine, theirs = _shaken(hospital)
    end = socket.socket.shutdown

    def end_late(sock: socket.socket, how: int) -> None:
        mine.send(b"the rest of a report")  # as its own thread does at this very moment
        end(sock, how)

    with mine, theirs:
        monkeypatch.setattr(socket.socket, "shutdown", end_late)
        web._cut(mine)
        monkeypatch.undo()
        assert b"report" not in socket.socket.recv(theirs, 65536)


def test_a_receiver_that_stops_ends_connections_without_ending_their_tls_first(
    hospital: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[int] = []
    end = ssl.SSLSocket.shutdown

    def noted(sock: ssl.SSLSocket, how: int) -> None:
        ends.append(how)
        end(sock, how)

    monkeypatch.setattr(ssl.SSLSocket, "shutdown", noted)
    context = server_context(listening(hospital.issue("worker"), trusted=hospital), section="receive")
    with receiving(tmp_path, ssl_context=context) as receiver:
        plain = socket.create_connection(receiver.scp.address)
        with client(hospital, hospital.issue("modality")).wrap_socket(plain, server_hostname="localhost") as caller:
            receiver.scp.stop(0.0)
            assert caller.recv(1) == b""
    assert socket.SHUT_RDWR not in ends


def test_a_certificate_that_says_another_name_than_the_host_counts_where_that_name_is_configured(hospital: Authority) -> None:
    with peers.ScriptedPacs(tls=server(hospital.issue("pacs", hosts=("pacs.example",)), trusted=hospital)) as pacs:
        pair = hospital.issue("worker")
        assert send_one(ours(pacs, pair, hospital, server_name="pacs.example")).delivered
        expect_error(send_one(ours(pacs, pair, hospital, server_name="ris.example")), PeerUnreachable, "Hostname mismatch")


def test_a_report_and_the_query_for_it_travel_by_tls(hospital: Authority) -> None:
    documents = [make_document(text="x" * 300_000), make_document()]
    with peers.ScriptedPacs(tls=server(hospital.issue("pacs"), trusted=hospital)) as pacs:
        outcomes = cstore.send(documents, peer=ours(pacs, hospital.issue("worker"), hospital))
        assert [one.delivered for one in outcomes] == [True, True]
        assert len(pacs.kept) == 2


def test_we_offer_no_suite_that_is_broken(hospital: Authority) -> None:
    offered: list[int] = []
    heard = threading.Event()

    def read_hello(connection: socket.socket) -> None:
        head = connection.recv(5, socket.MSG_WAITALL)
        hello = connection.recv(int.from_bytes(head[3:]), socket.MSG_WAITALL)
        start = 39 + hello[38]  # message head, version and random; then the session's identifier
        count = int.from_bytes(hello[start : start + 2])
        offered.extend(struct.unpack_from(f">{count // 2}H", hello, start + 2))
        heard.set()

    with peers.raw_peer(read_hello) as peer:
        section = calling(None, trusted=hospital, port=peer.port)
        expect_error(
            send_one(replace(peer_of(section, own_ae_title="WORKER"), timeout_s=0.5)), PeerUnreachable, "TLS handshake within 0.5 s"
        )
        assert heard.wait(5)
    assert set(offered) <= MODERN
    assert {0x1301, GOOD} <= set(offered)


def drip(connection: socket.socket) -> None:
    """Promise a long TLS record and send it a byte at a time: each byte comes in time, the whole never."""
    connection.sendall(b"\x16\x03\x03\x40\x00")
    while True:
        connection.sendall(b"\x02")
        time.sleep(0.1)


@pytest.mark.requirement("L10")
@pytest.mark.parametrize("script", [lambda _: None, drip])
def test_a_peer_that_never_finishes_the_handshake_costs_its_deadline(hospital: Authority, script: Callable[[socket.socket], None]) -> None:
    with peers.raw_peer(script) as peer:
        section = calling(None, trusted=hospital, port=peer.port)
        began = time.monotonic()
        outcomes = cstore.send([make_document() for _ in range(5)], peer=replace(peer_of(section, own_ae_title="WORKER"), timeout_s=0.5))
        assert time.monotonic() - began < 2
        for outcome in outcomes:
            expect_error(outcome, PeerUnreachable, "did not finish the TLS handshake within 0.5 s")


class RecordByRecord(ssl.SSLSocket):
    """A TLS socket to a peer that takes one record every 0.1 s; its `sendall` is the library's, without a deadline of its own."""

    def __new__(cls) -> RecordByRecord:
        """Make one that is connected to nobody."""
        return socket.socket.__new__(cls)

    def __init__(self) -> None:
        """Count records."""
        socket.socket.__init__(self)
        self.records = 0
        self._sslobj = object()  # the library: "shaken hands"

    def send(self, data: Any, flags: int = 0) -> int:
        """Take 100 bytes, late."""
        time.sleep(0.1)
        self.records += 1
        return min(len(data), 100)

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """Say nothing more."""
        raise TimeoutError

    def close(self) -> None:
        """Close the plain socket."""
        socket.socket.close(self)


@pytest.mark.requirement("L10")
def test_a_peer_that_takes_record_after_record_late_costs_the_deadline_and_not_that_of_each_record() -> None:
    sock = RecordByRecord()
    line = association.Association(sock, Peer("the slow peer", "SLOW", "127.0.0.1", 104, "WORKER", timeout_s=0.5))
    with pytest.raises(PeerUnavailable, match=r"did not answer within 0\.5 s"):
        line.negotiate([(f"1.2.3.{k}", ("1.2.840.10008.1.2",)) for k in range(100)])
    assert sock.records <= 6


# --- DCMTK and Orthanc ---------------------------------------------------------------------------------


@pytest.mark.peer
def test_storescp_of_dcmtk_takes_a_report_by_its_bcp_195_profile(hospital: Authority, tmp_path: Path) -> None:
    pair = hospital.issue("pacs", is_rsa=True)
    options = ("+tls", str(pair.key), str(pair.certificate), "+cf", str(hospital.certificate), "--require-peer-cert", "+py")
    folder = tmp_path / "received"
    folder.mkdir()
    with peers.storescp(folder, *options) as peer:
        section = calling(hospital.issue("worker", is_rsa=True), trusted=hospital, port=peer.port)
        outcome = send_one(replace(peer_of(section, own_ae_title="WORKER"), read_back=False))
        assert outcome.delivered, outcome.error
        bare = send_one(peer_of(calling(None, trusted=hospital, port=peer.port), own_ae_title="WORKER"))
        assert type(bare.error) is PeerUnreachable
    assert len(list(folder.glob("*"))) == 2  # the report, and the log


@pytest.mark.peer
def test_orthanc_takes_a_report_by_tls_and_gives_it_back(hospital: Authority, tmp_path: Path) -> None:
    pair = hospital.issue("pacs", is_rsa=True)
    settings: dict[str, Any] = {
        "DicomTlsEnabled": True,
        "DicomTlsCertificate": str(pair.certificate),
        "DicomTlsPrivateKey": str(pair.key),
        "DicomTlsTrustedCertificates": str(hospital.certificate),
        "DicomTlsRemoteCertificateRequired": True,
    }
    with peers.orthanc(tmp_path, **settings) as orthanc:
        section = calling(hospital.issue("worker", is_rsa=True), trusted=hospital, port=orthanc.dicom_port)
        section = replace(section, ae_title=orthanc.ae_title, own_ae_title="WORKER")
        outcome = send_one(peer_of(section, own_ae_title="WORKER"))
        assert outcome.delivered, outcome.error
        assert len(orthanc.instances()) == 1


# --- what the configuration may not say ----------------------------------------------------------------


def test_the_listeners_share_one_context_of_tls(hospital: Authority) -> None:
    pair = hospital.issue("worker")
    settings = Records(tls_certificate=str(pair.certificate), tls_key=str(pair.key), tls_client_ca=str(hospital.certificate))
    made = server_context(settings, section="records")
    assert made is not None
    assert made().verify_mode == ssl.CERT_REQUIRED
    assert made().minimum_version == ssl.TLSVersion.TLSv1_2
    assert all(one["aead"] and (one["kea"] == "kx-ecdhe" or one["protocol"] == "TLSv1.3") for one in made().get_ciphers())
