"""The receiver and misfortune: peers that vanish, repeat or lie about an instance; a disk or a store that fails; a stop."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RJ

from tests.integration.conftest import Start
from tests.receivers import QUICK, Receiver, hl7_listener, receiving
from tests.scu import ABORT, CT, EXPLICIT, MR, VERIFICATION, Scu, encoded, pdu, slice_of
from worker.domain import Received
from worker.errors import Reject, Retry
from worker.intake import mllp
from worker.intake.scp import StorageScp
from worker.store.database import Store
from worker.store.spool import Incoming, Spool

# --- peers that vanish or repeat ----------------------------------------------------------------------


@pytest.mark.requirement("R7")
@pytest.mark.parametrize("fragments", [0, 1, 5, 9])
@pytest.mark.parametrize("is_polite", [True, False], ids=["abort", "reset"])
def test_a_peer_that_dies_leaves_nothing_and_its_resend_is_taken_once(receiver: Receiver, fragments: int, is_polite: bool) -> None:
    ds = slice_of(rows=128)
    data = encoded(ds)
    step = len(data) // 10 + 1
    with receiver.scu() as scu:
        scu.associate()
        scu.begin_store(ds)
        for index in range(fragments):
            scu.send_data(data[index * step : (index + 1) * step], is_last=False)
        if is_polite:
            scu.sock.sendall(pdu(ABORT, bytes(4)))
    assert receiver.heard.next("association.closed")["end"] == ("aborted" if is_polite else "lost")
    assert receiver.files() == []
    with receiver.scu() as scu:
        scu.associate()
        assert scu.store(ds) == 0x0000
    assert receiver.store.answers == [Received.STORED]


@pytest.mark.requirement("R14")
def test_a_peer_that_dies_before_our_answer_finds_its_instance_stored_once(receiver: Receiver) -> None:
    ds = slice_of()
    receiver.store.gate.clear()
    with receiver.scu() as scu:
        scu.associate()
        scu.begin_store(ds)
        scu.send_data(encoded(ds))
        assert receiver.store.entered.wait(10)
    receiver.store.gate.set()
    assert receiver.heard.next("association.closed")["instances"] == 1
    with receiver.scu() as scu:
        scu.associate()
        assert scu.store(ds) == 0x0000
    assert receiver.store.answers == [Received.STORED, Received.DUPLICATE]
    assert len(receiver.files()) == 1


@pytest.mark.requirement("R8")
def test_identical_duplicates_in_parallel_make_one_row_and_one_file(receiver: Receiver) -> None:
    ds = slice_of(rows=256)

    def send(_: int) -> int:
        with receiver.scu() as scu:
            scu.associate()
            return scu.store(ds)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(send, range(8))) == [0x0000] * 8
    assert sorted(answer.name for answer in receiver.store.answers) == ["DUPLICATE"] * 7 + ["STORED"]
    assert receiver.files() == [receiver.store.rows[ds.SOPInstanceUID].stored.path]


@pytest.mark.requirement("R9")
def test_other_bytes_under_a_known_uid_are_quarantined(receiver: Receiver) -> None:
    first = slice_of(PatientName="First^Version")
    second = slice_of(PatientName="Second^Version", SOPInstanceUID=first.SOPInstanceUID)
    with receiver.scu() as scu:
        scu.associate()
        assert scu.store(first) == 0x0000
        before = receiver.store.rows[first.SOPInstanceUID].stored.path.read_bytes()
        assert scu.store(second) == 0x0000
    assert receiver.heard.next("instance.quarantined")
    assert receiver.store.rows[first.SOPInstanceUID].stored.path.read_bytes() == before
    quarantined = list((receiver.spool.root / "quarantine").iterdir())
    assert [b"Second^Version" in path.read_bytes() for path in quarantined] == [True]


# --- instances that are not what they say -------------------------------------------------------------


@pytest.mark.requirement("R10")
def test_what_does_not_match_the_command_is_refused(receiver: Receiver) -> None:
    with receiver.scu() as scu:
        scu.associate([(CT, [EXPLICIT]), (MR, [EXPLICIT])])
        ds = slice_of()
        assert scu.store(ds, sop_instance="1.2.3") == 0xA900
        assert scu.store(ds, sop_class=MR) == 0xA900  # not the class of the context
        assert scu.store(ds, sop_class=MR, context_id=3) == 0xA900  # not the class of the data set
        assert scu.store(ds) == 0x0000
    assert len(receiver.files()) == 1


@pytest.mark.requirement("R11")
@pytest.mark.requirement("X7")
@pytest.mark.parametrize("uid", ["../../x", "/etc/passwd", "1." + "2" * 63, "1.2\0.3", "a\nb"])
def test_uids_that_are_none_never_reach_the_file_system(receiver: Receiver, uid: str) -> None:
    with receiver.scu() as scu:
        scu.associate()
        assert scu.store(slice_of(), sop_instance=uid) == 0x0117
        assert scu.store(slice_of()) == 0x0000
    assert len(receiver.files()) == 1


@pytest.mark.requirement("X7")
def test_paths_in_titles_ids_and_descriptions_name_no_file(tmp_path: Path) -> None:
    title, path = "../../outside", "../../../outside"
    texts = ("PatientID", "PatientName", "AccessionNumber", "StudyID", "StudyDescription", "SeriesDescription", "StationName")
    with receiving(tmp_path / "a" / "b" / "spool", calling={title: ["127.0.0.1"]}) as receiver, receiver.scu() as scu:
        scu.associate(calling=title)
        for part in (path, "/etc/outside", "C:/outside"):
            assert scu.store(slice_of(rows=8, **dict.fromkeys(texts, part))) == 0x0000
        assert len(receiver.files()) == 3
        assert [one for one in tmp_path.rglob("*") if "outside" in one.name or (one.is_file() and one not in receiver.files())] == []


@pytest.mark.requirement("X7")
def test_paths_in_a_result_name_no_file(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'a' / 'synoptic.db'}")
    (tmp_path / "a").mkdir()
    store.migrate()
    message = (
        "MSH|^~\\&|../../outside|LAB|X|Y|20260101||ORU^R01^ORU_R01|../outside|P|2.5.1\rPID|1||../../outside^^^SITE^MR||../outside^A|||F\r"
        "OBR|1||5|../outside^L^L|||20260101\rOBX|1|NM|1988-5^CRP^LN||5|mg/L|||||F|||20260101\r"
    )
    with hl7_listener(store) as address:
        assert mllp.send(address, [message.encode()]) == ["AA"]
    store.close()
    assert {one.name for one in tmp_path.rglob("*")} <= {"a", "synoptic.db", "synoptic.db-wal", "synoptic.db-shm"}


@pytest.mark.requirement("R11")
def test_what_cannot_be_read_is_refused_with_a_comment_and_an_event_without_patient_data(receiver: Receiver) -> None:
    ds = slice_of(rows=64)
    cases = [
        (encoded(slice_of(SOPInstanceUID=ds.SOPInstanceUID, PatientID=None)), 0xC020),
        (encoded(slice_of(SOPInstanceUID=ds.SOPInstanceUID, StudyInstanceUID=None)), 0xC010),
        (encoded(ds)[:-100], 0xC002),
        (encoded(ds, is_implicit=True), 0xC001),
        (b"", 0xC012),
    ]
    with receiver.scu() as scu:
        scu.associate()
        for data, status in cases:
            assert scu.store(ds, data=data) == status
            facts = receiver.heard.next("instance.refused")
            assert facts["status"] == f"0x{status:04X}"
            assert scu.comment.strip() == facts["reason"]
            assert "P-17" not in str(facts)
            assert "Made" not in str(facts)
        assert scu.store(ds) == 0x0000
    assert len(receiver.files()) == 1


# --- our own misfortunes ------------------------------------------------------------------------------


@pytest.mark.requirement("R15")
def test_a_store_that_fails_costs_one_instance_and_says_when_to_come_again(receiver: Receiver) -> None:
    receiver.store.fails = [KeyError("Made^Up"), Retry("The database is away."), Reject("Never."), OSError(errno.EIO, "disk")]
    with receiver.scu() as scu:
        scu.associate()
        assert [scu.store(slice_of()) for _ in range(5)] == [0xC211, 0xA700, 0xC000, 0xA700, 0x0000]
    facts = receiver.heard.next("instance.refused")
    assert facts["error"] == "KeyError"
    assert "Made" not in str(facts)


class FullDisk(Spool):
    """A spool whose disk is full after so many bytes of a file."""

    room = 100_000

    def begin(self, *, sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str) -> Incoming:
        """Open a file that will not be whole."""
        made = super().begin(sop_class_uid=sop_class_uid, sop_instance_uid=sop_instance_uid, transfer_syntax_uid=transfer_syntax_uid)
        made.__class__ = FullFile
        return made


class FullFile(Incoming):
    """A file on it."""

    def write(self, data: memoryview) -> None:
        """Fail as the system does."""
        if self.size_bytes + len(data) > FullDisk.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(data)


@pytest.mark.requirement("S3")
def test_a_disk_that_fills_up_is_out_of_resources_and_recovers_by_itself(start: Start, tmp_path: Path) -> None:
    receiver = start(spool=FullDisk(tmp_path / "spool", low_water_bytes=0))
    with receiver.scu() as scu:
        scu.associate()
        assert scu.store(slice_of(rows=64)) == 0x0000
        assert scu.store(slice_of(rows=240)) == 0xA700
        assert "errno 28" in scu.comment
        assert scu.store(slice_of(rows=64)) == 0x0000
    assert len(receiver.files()) == 2


@pytest.mark.requirement("S5")
def test_below_the_low_water_mark_nothing_is_written_but_verification_works(start: Start, tmp_path: Path) -> None:
    receiver = start(spool=Spool(tmp_path / "spool", low_water_bytes=1 << 60))
    with receiver.scu() as scu:
        scu.associate([(CT, [EXPLICIT]), (VERIFICATION, [EXPLICIT])])
        assert scu.store(slice_of()) == 0xA700
        assert scu.echo(context_id=3) == 0x0000
    assert receiver.files() == []


@pytest.mark.requirement("R18")
def test_stopping_finishes_the_message_under_way_and_rejects_the_new(receiver: Receiver) -> None:
    ds, address = slice_of(rows=128), receiver.scp.address
    receiver.store.gate.clear()
    with receiver.scu() as scu, receiver.scu() as late, ThreadPoolExecutor(1) as pool:
        scu.associate()
        scu.begin_store(ds)
        scu.send_data(encoded(ds))
        assert receiver.store.entered.wait(10)
        stopped = pool.submit(receiver.scp.stop, 15.0)
        answer = late.associate()
        while isinstance(answer, A_ASSOCIATE_AC):  # the stop had not begun yet
            with receiver.scu() as later:
                answer = later.associate()
        assert isinstance(answer, A_ASSOCIATE_RJ)
        assert answer.result == 2
        receiver.store.gate.set()
        assert scu.status() == 0x0000
        assert scu.read_pdu()[0] == ABORT
        stopped.result(timeout=15)
    assert len(receiver.store.rows) == 1
    with pytest.raises(ConnectionRefusedError):
        Scu(address)


@pytest.mark.requirement("R20")
def test_verification_is_answered_while_every_other_association_stores(receiver: Receiver) -> None:
    receiver.store.gate.clear()
    with ExitStack() as stack:
        busy = [stack.enter_context(receiver.scu()) for _ in range(10)]
        for scu in busy:
            scu.associate()
            ds = slice_of()
            scu.begin_store(ds)
            scu.send_data(encoded(ds))
        with receiver.scu() as scu:
            scu.associate([(VERIFICATION, [EXPLICIT])])
            assert scu.echo(context_id=1) == 0x0000
        receiver.store.gate.set()
        assert [scu.status() for scu in busy] == [0x0000] * 10


def test_receivers_on_one_socket_share_the_associations(receiver: Receiver, tmp_path: Path) -> None:
    """An idle process accepts before a busy one does."""
    parts = receiver.scp, receiver.scp._listener, receiver.scp._policy
    second = StorageScp(parts[1].dup(), policy=parts[2], spool=receiver.spool, sink=receiver.store.sink, limits=QUICK)
    second.start()
    try:
        with ExitStack() as stack:
            for _ in range(6):
                stack.enter_context(receiver.scu()).associate()
            assert receiver.scp.associations + second.associations == 6
            assert min(receiver.scp.associations, second.associations) >= 2
    finally:
        second.stop(0.0)


def test_a_stop_in_the_moment_in_which_a_connection_begins_is_orderly(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that has not begun cannot be waited for: the receiver ended with an error then."""
    begins, may_begin, start = threading.Event(), threading.Event(), threading.Thread.start

    def late(thread: threading.Thread) -> None:
        if thread.name == "scp-association":
            begins.set()
            assert may_begin.wait(30)
        start(thread)

    with ThreadPoolExecutor() as pool:
        monkeypatch.setattr(threading.Thread, "start", late)
        with receiver.scu() as scu:
            assert begins.wait(30)
            stopped = pool.submit(receiver.scp.stop, 0.5)
            wait([stopped], timeout=0.3)
            may_begin.set()
            stopped.result(30)
            assert scu.read_pdu()[0] in (0, ABORT)


def test_a_receiver_process_is_small_and_ends_on_a_signal(tmp_path: Path) -> None:
    """It never imports torch, nor pynetdicom."""
    program = """
import signal, sys, threading
from pathlib import Path
from worker.intake.negotiation import Policy
from worker.intake.scp import StorageScp, listen
from worker.store.spool import Spool
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
scp = StorageScp(listen(("127.0.0.1", 0)), policy=Policy(ae_title="A", calling={}, max_pdu=131072),
                 spool=Spool(Path(sys.argv[1]), low_water_bytes=0), sink=None)
scp.start()
print(sorted({"torch", "pynetdicom", "sqlalchemy"} & set(sys.modules)), flush=True)
stop.wait()
scp.stop(1.0)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "spool")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2], env=dict(os.environ)) as process:
        assert process.stdout is not None
        modules, rss = process.stdout.readline().strip(), psutil.Process(process.pid).memory_info().rss
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0
    assert modules == "[]"
    assert rss < 100 << 20
