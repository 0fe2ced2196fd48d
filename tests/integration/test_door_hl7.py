"""A result to the RIS over real sockets: every kind of acknowledgment, a RIS that misbehaves, TLS, and a restart between sending and AA."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hl7.mllp import start_hl7_server

from tests import reports
from tests.integration.test_commitment import Site
from tests.integration.test_cstore import expect_error
from tests.pki import Authority, served
from tests.receivers import hl7_listener
from tests.recipients import END, START, Ris, Step, acknowledged, control_id, hang_up, ris, silence
from worker import doctor_peers
from worker.config import Config, Destination
from worker.deliver import mllp
from worker.deliver.association import Peer
from worker.deliver.cstore import NO_RESPONSE, Outcome
from worker.domain import Document
from worker.errors import PeerRefused, PeerUnavailable, PeerUnreachable, WorkerError
from worker.peers import peer_of
from worker.report import oru
from worker.store import queue
from worker.store.database import Store

_made = 0


def make_message(text: str = "Größe") -> Document:
    """A message of its own."""
    global _made
    _made += 1
    lines = (
        f"MSH|^~\\&|SYNOPTIC||||20261121020203+0100||ORU^R01^ORU_R01|{_made:020}|P|2.5.1||||||UNICODE UTF-8",
        "PID|1||TEST1^^^H||ZZNAME^A",
        "ORC|RE||A1",
        "OBR|1||A1|b^AI^99SYNOPTIC|||20260101120000||||||||||||||||||P",
        f"OBX|1|ST|111001^Algorithm Name^DCM||{text}||||||P",
    )
    return Document(f"2.25.{_made}", "", "oru", "".join(f"{line}\r" for line in lines).encode())


def send_one(peer: Peer) -> Outcome:
    """Send one new message."""
    [outcome] = mllp.send([make_message()], peer=peer)
    return outcome


def test_messages_travel_in_order_over_one_connection_as_the_bytes_they_are() -> None:
    documents = [make_message("part " * 5000) for _ in range(3)]
    with ris() as his:
        outcomes = mllp.send(documents, peer=his.peer())
        assert [(one.sop_instance_uid, one.delivered, one.status) for one in outcomes] == [
            (one.sop_instance_uid, True, 0) for one in documents
        ]
        assert his.received == [document.data for document in documents]
        assert his.connections == 1
        assert mllp.send([], peer=his.peer()) == []
    assert his.connections == 1


def raw(text: str, *, code: str = "AA") -> Step:
    """An acknowledgment as this text has it, with its code and the message's control ID."""
    return lambda message: START + text.format(code=code, of=control_id(message)).encode() + END


SHAPES: dict[str, Step] = {
    "minimal": raw("MSH|^~\\&|||||||ACK\rMSA|{code}|{of}"),
    "enhanced": acknowledged("CA"),
    "line feeds": acknowledged("AA", end="\r\n"),
    "segments around": raw("MSH|^~\\&|||||||ACK^R01|1|P|2.3\rSFT|x\rMSA|{code}|{of}|ok\rERR|^^^0\r"),
    "other separators": raw("MSH#*~\\&#######ACK*R01\rMSA#{code}#{of}#ok\r"),
    "byte order mark": raw("\ufeffMSH|^~\\&|||||||ACK\rMSA|{code}|{of}\r"),
    "no MSH": raw("MSA|{code}|{of}\r"),
    "bytes before it": lambda message: b"\r\n\0" + (acknowledged()(message) or b""),
    "Latin-1 words": lambda message: (acknowledged()(message) or b"").replace(b"ZZNAME", "Größe".encode("latin-1")),
    "accepted twice": lambda message: (acknowledged("CA")(message) or b"") + (acknowledged("AA")(message) or b""),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_an_acknowledgment_counts_however_it_is_written(shape: str) -> None:
    """The second message tells whether the first answer was read to its end."""
    with ris(SHAPES[shape], SHAPES[shape]) as his:
        outcomes = mllp.send([make_message(), make_message()], peer=his.peer())
        assert [one.error for one in outcomes] == [None, None]
        assert his.connections == 1


@pytest.mark.parametrize(
    ("step", "error", "words"),
    [
        (acknowledged("AE"), PeerUnavailable, "answers AE: it cannot take the message now"),
        (acknowledged("CE"), PeerUnavailable, "answers CE"),
        (acknowledged("AR"), PeerRefused, "answers AR: it refuses the message"),
        (acknowledged("CR"), PeerRefused, "answers CR"),
        (acknowledged("AR", more="ERR||PID^1^3|204^Unknown key identifier^HL70357|E"), PeerRefused, "answers AR, ERR-3 204"),
        (acknowledged("AR", more="ERR|||207^Application internal error^HL70357|E"), PeerUnavailable, "answers AR, ERR-3 207"),
        (raw("MSH|^~\\&\rMSA|AR|{of}||||206^locked\r"), PeerUnavailable, "ERR-3 206"),
        (acknowledged("AA", of="00000000000000000000"), PeerUnavailable, "acknowledges another message"),
        (raw("MSH|^~\\&\rMSA|AA|\r"), PeerUnavailable, "acknowledges another message"),
        (acknowledged("OK"), PeerUnavailable, "no acknowledgment"),
        (raw("MSH|^~\\&|||||||ORU^R01\rPID|1||ZZNAME\r"), PeerUnavailable, "no acknowledgment"),
        (lambda _m: START + END, PeerUnavailable, "no acknowledgment"),
        (hang_up, PeerUnavailable, "closed the connection without an acknowledgment"),
        (lambda _m: START + b"MSH|^~\\&\rMSA|AA", PeerUnavailable, "closed the connection|did not acknowledge"),
    ],
)
def test_what_is_no_acceptance_says_why_and_whether_it_is_tried_again(step: Step, error: type[WorkerError], words: str) -> None:
    with ris(step) as his:
        outcome = send_one(his.peer(timeout_s=0.5))
    assert type(outcome.error) is error
    assert any(one in str(outcome.error) for one in words.split("|"))
    assert "ZZNAME" not in str(outcome.error)
    assert not outcome.delivered


def test_a_refused_message_does_not_hold_up_the_next() -> None:
    """Nor do several: who answers is there, and each answer is of its own message alone."""
    with ris(acknowledged("AR"), acknowledged("AE"), acknowledged("AE"), acknowledged("AE")) as his:
        outcomes = mllp.send([make_message() for _ in range(5)], peer=his.peer())
        assert [type(one.error) for one in outcomes] == [PeerRefused, *[PeerUnavailable] * 3, type(None)]
        assert his.connections == 1


@pytest.mark.parametrize(
    "step",
    [silence, lambda _m: b"x" * 10, lambda _m: START + b"MSH|"],
    ids=["deaf", "bytes outside a frame", "half an answer"],
)
def test_a_deaf_or_half_answering_ris_is_left_in_time_and_the_rest_waits(step: Step) -> None:
    """Two lost connections are the peer's fault; the third message is not even tried."""
    with ris(*[step] * 3) as his:
        began = time.monotonic()
        outcomes = mllp.send([make_message() for _ in range(3)], peer=his.peer(timeout_s=0.3))
        assert time.monotonic() - began < 3.0
        assert his.connections == 2
    for one in outcomes:
        expect_error(one, PeerUnavailable, "did not acknowledge the message within 0.3")
        assert one.status == NO_RESPONSE


def drip(one: socket.socket) -> None:
    """Send a byte each 50 ms, for ever."""
    while True:
        one.sendall(b"x")
        time.sleep(0.05)


@pytest.mark.requirement("L15")
@pytest.mark.parametrize(("serve", "words"), [(drip, "within 0.4"), (lambda one: one.sendall(b"x" * 2**24), "more than 65536 bytes")])
def test_endless_bytes_are_bounded_in_number_and_in_time(serve: Callable[[socket.socket], None], words: str) -> None:
    his = Ris()
    his.serve = serve  # type: ignore[method-assign, assignment]
    with his:
        began = time.monotonic()
        expect_error(send_one(his.peer(timeout_s=0.4)), PeerUnavailable, words)
        assert time.monotonic() - began < 2.0


@pytest.mark.requirement("L10")
def test_a_ris_that_does_not_read_is_left_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mllp, "_SLOWEST_BYTES_PER_S", 2**30)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = Peer("the RIS", "", "127.0.0.1", listener.getsockname()[1], "", timeout_s=0.3, door="hl7")
        [outcome] = mllp.send([make_message("x" * 2**23)], peer=replace(peer, timeout_s=0.3))
    assert isinstance(outcome.error, PeerUnavailable)


def test_a_ris_that_is_down_is_unreachable_and_costs_one_try() -> None:
    with ris() as his:
        peer = his.peer()
    outcomes = mllp.send([make_message() for _ in range(3)], peer=peer)
    for one in outcomes:
        expect_error(one, PeerUnreachable, "cannot be reached")


def test_a_late_acknowledgment_is_not_taken_for_that_of_the_next_message() -> None:
    first, second = make_message(), make_message()

    def both(message: bytes) -> bytes:
        answers = [acknowledged(of=control_id(one))(message) or b"" for one in (first.data, message)]
        return b"".join(answers)

    with ris(acknowledged(), both, acknowledged("AR")) as his:
        outcomes = mllp.send([first, second, make_message()], peer=his.peer())
    assert [type(one.error) for one in outcomes] == [type(None), type(None), PeerRefused]


@pytest.mark.requirement("X5")
def test_by_tls_both_show_certificates_and_a_stranger_gets_nothing(tmp_path: Path) -> None:
    ours = Authority(tmp_path)
    pair, shown = ours.issue("client"), ours.issue("ris", hosts=("ris.example",))
    context = served(shown, trusted=ours)
    with ris(tls=context) as his:
        known: dict[str, Any] = {"tls_ca": str(ours.certificate), "tls_certificate": str(pair.certificate), "tls_key": str(pair.key)}
        settings = Destination(name="ris", hl7_host="127.0.0.1", hl7_port=his.port, tls=True, tls_server_name="ris.example", timeout_s=5.0)
        trusted = replace(settings, **known)
        assert send_one(peer_of(trusted, own_ae_title="US")).delivered
        expect_error(send_one(peer_of(replace(trusted, tls_server_name=""), own_ae_title="US")), PeerUnreachable, "certificate is refused")
        assert len(his.received) == 1


@contextmanager
def python_hl7() -> Iterator[tuple[int, list[str]]]:
    """The MLLP server of python-hl7 on loopback: its port, and the control IDs that it has read."""
    read: list[str] = []
    loop, ready = asyncio.new_event_loop(), threading.Event()

    async def answer(reader: Any, writer: Any) -> None:
        while not reader.at_eof():
            try:
                message = await reader.readmessage()
            except asyncio.IncompleteReadError:
                break
            read.append(str(message.segment("MSH")(10)))
            writer.writemessage(message.create_ack())
            await writer.drain()
        writer.close()

    server = loop.run_until_complete(start_hl7_server(answer, "127.0.0.1", 0, encoding="utf-8"))
    loop.call_soon(ready.set)
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    ready.wait(5)
    yield server.sockets[0].getsockname()[1], read
    server.close()
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
    loop.close()


def test_the_server_of_another_library_takes_what_we_send_and_we_its_acknowledgment(tmp_path: Path) -> None:
    documents = [*oru.build(reports.result([reports.radiograph(tmp_path)])), make_message()]
    with python_hl7() as (port, read):
        peer = Peer("python-hl7", "", "127.0.0.1", port, "", timeout_s=5.0, door="hl7")
        assert [one.error for one in mllp.send(documents, peer=peer)] == [None, None]
        assert read == [control_id(one.data) for one in documents]


def test_our_own_listener_takes_what_we_send(store: Store) -> None:
    """Two implementations of MLLP that share no code: that of the door, and that of the feed."""
    with hl7_listener(store) as (host, port):
        peer = Peer("ourselves", "", host, port, "", timeout_s=5.0, door="hl7")
        message = make_message()
        for _ in range(2):  # the second is acknowledged as a repetition
            [outcome] = mllp.send([message], peer=peer)
            assert outcome.error is None


# --- the job


def test_a_restart_between_sending_and_its_acknowledgment_files_one_result(store: Store, tmp_path: Path) -> None:
    """The message was filed, the AA never came; the job is tried again with the same control ID, which the RIS knows."""
    site = Site(store, tmp_path)
    site.add(1, make_message())
    with ris(hang_up) as his:
        assert site.deliver(his.peer(), wait_s=None) == 1
        assert site.jobs() == [("available", "pacs closed the connection without an acknowledgment.")]
        site.now += timedelta(hours=1)
        assert site.deliver(his.peer(), wait_s=None) == 1
        assert site.jobs()[0][0] == "completed"
        assert (len(his.received), len(his.orders)) == (2, 1)


def test_a_refused_message_is_a_dead_letter_that_a_person_may_send_again(store: Store, tmp_path: Path) -> None:
    site = Site(store, tmp_path)
    site.add(1, make_message())
    with ris(acknowledged("AR", more="ERR|||101^Required field missing^HL70357|E")) as his:
        site.deliver(his.peer(), wait_s=None)
        assert site.jobs() == [("discarded", "pacs answers AR, ERR-3 101: it refuses the message.")]
        with store.begin() as conn:
            assert queue.operator_retry(conn, site.study_id, now=site.now) == 1
        site.deliver(his.peer(), wait_s=None)
        assert site.jobs()[0][0] == "completed"


def test_a_message_that_waited_is_not_sent_after_a_later_one_of_its_study(store: Store, tmp_path: Path) -> None:
    """A RIS keeps what came last: an older result must not take a newer one's place."""
    site = Site(store, tmp_path)
    site.add(1, make_message())
    with ris(acknowledged("AE")) as his:
        site.deliver(his.peer(), wait_s=None)
        later = make_message()
        site.add(1, later)
        site.now += timedelta(hours=1)
        site.deliver(his.peer(), wait_s=None)
        assert [state for state, _ in site.jobs()] == ["cancelled", "completed"]
        assert site.jobs()[0][1] == "A later result of the study is sent instead."
        assert his.received[1:] == [later.data]


def test_doctor_connects_to_the_ris() -> None:
    def found(port: int) -> tuple[str, bool]:
        one = Destination(name="ris", hl7_host="127.0.0.1", hl7_port=port, timeout_s=5.0)
        told = doctor_peers.checks(Config(destinations=(one,)))
        [(text, is_well)] = [(text, is_well) for what, text, is_well in told if what == "HL7 ris"]
        return text, is_well

    with ris() as his:
        port = his.port
        text, is_well = found(port)
        assert (is_well, text.startswith(f"127.0.0.1:{port}, ")) == (True, True)
    assert found(port)[1] is False
    assert his.received == []
