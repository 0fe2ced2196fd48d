"""Peers that stall in all the places there are, while an honest one comes: it is let in, and who works is left alone."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC
from pathlib import Path

import psutil
import pytest
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RJ

from tests.installation import wait_until
from tests.integration.conftest import Start
from tests.receivers import QUICK, Receiver
from tests.scu import CT, EXPLICIT, Scu, encoded, pdu, pdv, slice_of
from worker.errors import PeerUnavailable
from worker.intake import mllp, places, scp
from worker.store.spool import Spool

pytestmark = pytest.mark.requirement("X14")

#: Four places, and deadlines that no test waits for.
FOUR = replace(QUICK, associations=4, per_address=4, request_s=60.0, pdu_s=60.0, idle_s=60.0)
MESSAGE = b"MSH|^~\\&|HIS|A|SYNOPTIC|B|20260101||ADT^A08^ADT_A01|1|P|2.5.1\rPID|||1^^^A\r"


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "PATIENCE_S", 0.5)


@pytest.fixture
def four(start: Start) -> Receiver:
    return start(limits=FOUR)


def half_a_pdu(scu: Scu) -> None:
    scu.begin_store(ds := slice_of())
    scu.sock.sendall(pdu(4, pdv(1, 2, encoded(ds)))[:2_000])


def silence(_scu: Scu) -> None:
    """Say nothing after the association."""


@pytest.mark.parametrize("stall", [half_a_pdu, silence], ids=["half a PDU", "silence"])
def test_an_honest_modality_gets_the_place_of_one_that_stalls(four: Receiver, stall: Callable[[Scu], None]) -> None:
    with ExitStack() as stack:
        stalled = [stack.enter_context(four.scu()) for _ in range(4)]
        for scu in stalled:
            assert isinstance(scu.associate(), A_ASSOCIATE_AC)
            stall(scu)
        assert store_until_taken(four) == 0x0000
        assert "wanted its place" in str(closed_by_us(four)["reason"])
    # The others kept their places, and what they had begun until they left.
    wait_until(lambda: [path.suffix for path in four.files()] == [".dcm"], timeout_s=30, what="only the honest instance in the spool")
    assert len(four.store.rows) == 1


def test_a_trickle_of_bytes_is_no_work_and_gives_way(four: Receiver) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(four.scu()) for _ in range(4)]
        for scu in slow:
            scu.associate()
            half_a_pdu(scu)
        came: list[int] = []

        def is_in() -> bool:
            for scu in slow:
                scu.sock.sendall(b"\0") if not came else None
            with four.scu() as modality:
                if isinstance(modality.associate(), A_ASSOCIATE_AC):
                    came.append(modality.store(slice_of()))
            return bool(came)

        wait_until(is_in, timeout_s=30, what="a place for the honest modality")
        assert came == [0x0000]


def test_who_waits_for_us_keeps_its_place_and_the_newcomer_is_told_to_come_again(four: Receiver) -> None:
    """A slow database is no fault of the modalities that wait for it."""
    four.store.gate.clear()
    with ExitStack() as stack:
        busy = [stack.enter_context(four.scu()) for _ in range(4)]
        for scu in busy:
            scu.associate()
            scu.begin_store(ds := slice_of())
            scu.send_data(encoded(ds))
        wait_until(lambda: len(four.files()) == 4, timeout_s=15, what="four files before their rows")
        time.sleep(1.0)  # twice the patience: that nothing happens is what is tested
        with four.scu() as late:
            answer = late.associate()
            assert isinstance(answer, A_ASSOCIATE_RJ)
            assert (answer.result, answer.reason_diagnostic) == (2, 2)
        four.store.gate.set()
        assert [scu.status() for scu in busy] == [0x0000] * 4


def test_a_stranger_takes_nobodys_place(four: Receiver) -> None:
    with ExitStack() as stack:
        quiet = [stack.enter_context(four.scu()) for _ in range(4)]
        for scu in quiet:
            scu.associate()
        time.sleep(1.0)  # twice the patience
        for _ in range(8):
            with four.scu() as stranger:
                answer = stranger.associate(calling="STRANGER")
                assert isinstance(answer, A_ASSOCIATE_RJ)
                assert answer.result == 1
        assert [scu.store(slice_of()) for scu in quiet] == [0x0000] * 4


def test_a_flood_of_connections_that_ask_for_nothing_keeps_nobody_out(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scp, "_MAX_CONNECTIONS", 16)
    receiver = start(limits=FOUR)
    with ExitStack() as stack:
        for _ in range(16):
            mute = stack.enter_context(receiver.scu())
            mute.sock.sendall(struct.pack(">BxL", 1, 200) + bytes(100))
        assert store_until_taken(receiver) == 0x0000


class Filling(Spool):
    """A disk that comes to its mark while a data set is being written."""

    looks = 0

    @property
    def is_low(self) -> bool:
        """Low from the third look on."""
        self.looks += 1
        return self.looks > 2


@pytest.mark.requirement("S5")
def test_a_data_set_without_an_end_is_stopped_at_the_disks_mark(start: Start, tmp_path: Path) -> None:
    receiver = start(spool=Filling(tmp_path / "spool", low_water_bytes=0))
    before = psutil.Process().memory_info().rss
    with receiver.scu() as scu:
        scu.associate([(CT, [EXPLICIT])])
        scu.begin_store(slice_of())
        for _ in range(1024):
            scu.send_data(bytes(1 << 16), is_last=False)
        scu.send_data(b"", is_last=True)
        assert scu.status() == 0xA700
    assert receiver.files() == []
    assert psutil.Process().memory_info().rss - before < 20 << 20


@pytest.fixture
def listener() -> Iterator[mllp.MllpServer]:
    """An HL7 listener with four places."""
    server = mllp.MllpServer(
        ("127.0.0.1", 0),
        apply=lambda _message, _raw: True,
        reject=lambda _reason, _raw: None,
        zone=UTC,
        issuers={},
        allowed_addresses=("127.0.0.0/8",),
        max_connections=4,
    )
    server.start()
    yield server
    server.stop()


@pytest.mark.parametrize("said", [b"", b"\x0bMSH|half a message"], ids=["silence", "half a message"])
def test_a_hospital_system_gets_the_place_of_an_hl7_peer_that_stalls(listener: mllp.MllpServer, said: bytes) -> None:
    address = ("127.0.0.1", listener.port)
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(socket.create_connection(address)).sendall(said)
        codes: list[str] = []

        def is_answered() -> bool:
            try:
                codes.extend(mllp.send(address, [MESSAGE]))
            except PeerUnavailable:
                return False
            return True

        wait_until(is_answered, timeout_s=30, what="an answer")
        assert codes == ["AA"]


def store_until_taken(receiver: Receiver) -> int:
    """Come again, as a modality does, until there is a place; return the status of what it stores."""
    statuses: list[int] = []

    def is_taken() -> bool:
        with receiver.scu() as modality:
            try:
                answer = modality.associate()
            except (OSError, struct.error):
                return False  # closed unread
            if isinstance(answer, A_ASSOCIATE_AC):
                statuses.append(modality.store(slice_of()))
        return bool(statuses)

    wait_until(is_taken, timeout_s=30, what="a place for the honest modality")
    return statuses[0]


def closed_by_us(receiver: Receiver) -> dict[str, object]:
    """Return the first association that ended at a time-out."""
    while (facts := receiver.heard.next("association.closed"))["end"] != "timeout":
        continue
    return facts
