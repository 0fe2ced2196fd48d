"""The receiver and peers that stall or break PS3.8: cut within their deadline, while others are served."""

from __future__ import annotations

import ssl
import struct
import subprocess
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from pynetdicom.pdu import A_ASSOCIATE_AC

from tests import peers
from tests.integration.conftest import Start
from tests.receivers import QUICK, Receiver
from tests.scu import ABORT, CT, EXPLICIT, MR, P_DATA, VERIFICATION, command_set, encoded, pdu, pdv, slice_of

# --- peers that stall ---------------------------------------------------------------------------------


@pytest.mark.requirement("R1")
def test_two_hundred_half_pdus_are_cut_while_a_modality_stores(receiver: Receiver) -> None:
    with ExitStack() as stack:
        stalled = [stack.enter_context(receiver.scu()) for _ in range(200)]
        for scu in stalled:
            scu.sock.sendall(struct.pack(">BxL", 1, 200) + bytes(100))
        with receiver.scu() as modality:
            modality.associate()
            assert modality.store(slice_of()) == 0x0000
        assert [scu.read_pdu() for scu in stalled] == [(0, b"")] * 200


@pytest.mark.requirement("R1")
def test_half_a_pdu_in_an_open_association_is_cut_and_leaves_nothing(receiver: Receiver) -> None:
    ds = slice_of(rows=256)
    with receiver.scu() as scu:
        scu.associate()
        scu.begin_store(ds)
        scu.sock.sendall(pdu(P_DATA, pdv(1, 2, encoded(ds)))[:50_000])
        assert scu.read_pdu()[0] == ABORT
    assert receiver.heard.next("association.closed")["end"] == "timeout"
    assert receiver.files() == []


@pytest.mark.requirement("R4")
def test_a_trickle_is_cut_at_the_deadline_of_its_pdu(receiver: Receiver) -> None:
    with receiver.scu() as scu:
        scu.associate()
        scu.begin_store(slice_of())
        scu.sock.sendall(pdu(P_DATA, pdv(1, 0, bytes(10_000)))[:100])
        assert scu.is_closed_after_trickle(every_s=0.05, limit_s=10)
    assert "not complete" in str(receiver.heard.next("association.closed")["reason"])
    assert receiver.files() == []


@pytest.mark.requirement("R4")
def test_silence_in_an_open_association_ends_it(start: Start) -> None:
    receiver = start(limits=replace(QUICK, idle_s=0.5))
    with receiver.scu() as scu:
        scu.associate()
        assert scu.read_pdu()[0] == ABORT
    assert "silent" in str(receiver.heard.next("association.closed")["reason"])


@pytest.mark.requirement("R2")
def test_clients_that_never_shake_hands_do_not_stop_the_others(start: Start, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = [peers.require("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, "-days", "1", "-subj", "/CN=localhost"], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    receiver = start(ssl_context=lambda: context)
    client = ssl.create_default_context(cafile=certificate)
    client.check_hostname = False
    with ExitStack() as stack:
        silent = [stack.enter_context(receiver.scu()) for _ in range(50)]
        with receiver.scu() as scu:
            scu.sock = client.wrap_socket(scu.sock)
            assert isinstance(scu.associate(), A_ASSOCIATE_AC)
            assert scu.store(slice_of(rows=256)) == 0x0000
            assert scu.release()
        assert [scu.read_pdu() for scu in silent] == [(0, b"")] * 50


# --- peers that break the protocol --------------------------------------------------------------------


@pytest.mark.requirement("R3")
@pytest.mark.parametrize("kind", [1, 4])
def test_a_giant_pdu_is_refused_before_it_is_read(receiver: Receiver, kind: int) -> None:
    before = psutil.Process().memory_info().rss
    with receiver.scu() as scu:
        if kind == P_DATA:
            scu.associate()
        scu.sock.sendall(struct.pack(">BxL", kind, 0xFFFFFFF0))
        assert scu.read_pdu() == (ABORT, bytes((0, 0, 2, 6)))
        assert scu.read_pdu() == (0, b"")
    assert psutil.Process().memory_info().rss - before < 20 << 20


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (pdu(9, bytes(4)), 1),
        (pdu(2, bytes(4)), 2),
        (pdu(1, bytes(100)), 2),
        (pdu(P_DATA, pdv(99, 3, b"")), 5),
        (pdu(P_DATA, pdv(1, 2, b"data before any command")), 5),
        (pdu(P_DATA, struct.pack(">LBB", 1000, 1, 3)), 6),
        (pdu(P_DATA, struct.pack(">LBB", 1, 1, 3)), 6),
        (pdu(P_DATA, b"\0\0"), 6),
        (pdu(P_DATA, pdv(1, 3, b"not a command set")), 6),
        (pdu(P_DATA, pdv(1, 1, bytes(40_000))) * 2, 6),
        (pdu(P_DATA, pdv(1, 3, command_set(1, has_data_set=True, sop_instance="1.2"))) * 2, 5),
        (pdu(P_DATA, pdv(1, 3, command_set(1, has_data_set=True, sop_instance="1.2")) + pdv(3, 2, b"other context")), 5),
    ],
    ids=[
        "type", "accept", "request", "context", "data-first", "too-long", "too-short", "no-header", "garbage", "long", "twice", "mixed",
    ],
)  # fmt: skip
def test_broken_protocol_is_aborted_with_its_reason(receiver: Receiver, stream: bytes, reason: int) -> None:
    with receiver.scu() as scu:
        scu.associate([(CT, [EXPLICIT]), (MR, [EXPLICIT])])
        scu.sock.sendall(stream)
        assert scu.read_pdu() == (ABORT, bytes((0, 0, 2, reason)))
    assert receiver.heard.next("association.closed")["end"] == "protocol error"
    assert receiver.files() == []


@pytest.mark.parametrize(
    "stream",
    [pdu(4, bytes(6)), b"GET / HTTP/1.1\r\n\r\n", pdu(1, bytes(20)), pdu(1, bytes(68) + b"\x20\0\0\1x")],
    ids=["data", "http", "short", "item"],
)
def test_what_is_no_association_request_is_aborted(receiver: Receiver, stream: bytes) -> None:
    with receiver.scu() as scu:
        scu.sock.sendall(stream)
        assert scu.read_pdu()[0] in (ABORT, 3)
    assert receiver.heard.next("association.rejected")


def test_other_services_are_answered_as_unrecognized_and_the_association_lives(receiver: Receiver) -> None:
    with receiver.scu() as scu:
        scu.associate([(CT, [EXPLICIT]), (VERIFICATION, [EXPLICIT])])
        scu.sock.sendall(pdu(P_DATA, pdv(1, 3, command_set(0x0020, has_data_set=True)) + pdv(1, 2, b"identifier")))
        assert scu.status() == 0x0211
        scu.sock.sendall(pdu(P_DATA, pdv(1, 3, command_set(0x0FFF, has_data_set=False))))  # C-CANCEL has no answer
        assert scu.echo(context_id=3) == 0x0000
        assert scu.store(slice_of(), context_id=3) == 0x0122
        assert scu.store(slice_of()) == 0x0000


def test_a_sender_that_was_silent_for_its_allowed_time_may_send_its_next_header_in_two_pieces(start: Start) -> None:
    """A PACS keeps its association open between studies; the silence must not be held against the next message."""
    receiver = start(limits=replace(QUICK, idle_s=30.0, pdu_s=0.5))
    with receiver.scu() as scu:
        scu.associate(((CT, (EXPLICIT,)), (VERIFICATION, (EXPLICIT,))))
        assert scu.store(slice_of(rows=4)) == 0
        time.sleep(1.5)  # silence is what is tested
        message = pdu(P_DATA, pdv(3, 3, command_set(0x30, has_data_set=False, sop_class=VERIFICATION)))
        scu.sock.sendall(message[:3])
        time.sleep(0.1)
        scu.sock.sendall(message[3:])
        assert scu.status() == 0
