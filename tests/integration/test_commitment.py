"""Storage commitment over real sockets, both ways: an archive that keeps its word, breaks it, is early, late or silent."""

from __future__ import annotations

import io
import struct
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid
from pynetdicom import AE, build_role
from rich.console import Console

from tests import accept, peers
from tests.conftest import Captured
from tests.installation import Installation, wait_until
from tests.integration.test_cstore import make_document
from tests.peers import ScriptedPacs, free_port, orthanc
from tests.receivers import Receiver, receiving
from tests.scu import CT, DEFLATED, EXPLICIT, P_DATA, command_set, encoded, pdu, pdv, slice_of
from worker import reception, roles, view
from worker.config import Config, Destination
from worker.deliver import commitment
from worker.deliver.association import Peer
from worker.deliver.commitment import STORAGE_COMMITMENT
from worker.deliver.send import deliver
from worker.demo.pacs import forward
from worker.domain import CommitmentReport, CommitmentRequest, Document, PatientKey
from worker.intake.negotiation import Peer as Caller
from worker.store import commitments, documents, erasure, queue, schema
from worker.store.commitments import SENDINGS
from worker.store.database import DatabaseUnavailable, Store

pytestmark = pytest.mark.requirement("L8")

NOW = datetime(2026, 1, 2, 12, tzinfo=UTC)
WELL_KNOWN = "1.2.840.10008.1.20.1.1"
WAIT_S = 600.0
CALLING = {"SCRIPTED": ["127.0.0.1"], "TESTPACS": ["127.0.0.1"], "STRANGER": ["127.0.0.1"]}


@dataclass
class Site:
    """A store with one study, its documents and their deliveries, and a clock that stands."""

    store: Store
    folder: Path
    now: datetime = NOW
    #: One for each N-ACTION: its transaction and what it asks about.
    asked: list[tuple[str, list[str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        with self.store.begin() as conn:
            values = {
                "issuer": "H",
                "patient_id": "TEST1",
                "created_at": NOW,
                "last_received_at": NOW,
                "quiet_until": NOW,
                "state": "complete",
            }
            one = sa.insert(schema.study).values(study_instance_uid="1.2", **values).returning(schema.study.c.id)
            self.study_id = int(conn.execute(one).scalar_one())

    def add(self, count: int = 1, *documents: Document) -> list[str]:
        """Queue so many new documents, or `documents`; returns their UIDs."""
        made = documents or [make_document() for _ in range(count)]
        with self.store.begin() as conn:
            for one in made:
                values = {"study_id": self.study_id, "kind": one.kind, "input_version": 1, "sha256": "", "created_at": NOW}
                values |= {"sop_instance_uid": one.sop_instance_uid, "sop_class_uid": one.sop_class_uid, "data": one.data}
                number = conn.execute(sa.insert(schema.document).values(**values).returning(schema.document.c.id)).scalar_one()
                queue.enqueue_deliver(
                    conn, self.study_id, document_id=number, bundle="b", input_version=1, destination="pacs", priority=1, now=NOW
                )
        return [one.sop_instance_uid for one in made]

    def deliver(self, peer: Peer, *, wait_s: float | None = WAIT_S) -> int:
        """Send all that is due, as the role does; returns how many that were."""
        with self.store.begin() as conn:
            jobs = queue.lease(conn, "deliver", owner="me", limit=16, lease_s=60, now=self.now, destination="pacs")
        if jobs:
            deliver(jobs, store=self.store, peer=replace(peer, name="pacs"), clock=lambda: self.now, commitment_wait_s=wait_s)
        return len(jobs)

    def look(self, peer: Peer, *, later: timedelta = timedelta(seconds=WAIT_S)) -> None:
        """Let time pass, and look for what was not answered."""
        self.now += later
        commitment.look(store=self.store, peer=replace(peer, name="pacs"), clock=lambda: self.now)

    def rows(self) -> dict[str, tuple[str, str]]:
        """Document → state of the last word on it, and its reason."""
        with self.store.read() as conn:
            (reports, found) = documents.of_study(conn, self.study_id), {}
            for one, _ in reports:
                for row in commitments.of_document(conn, one.id):
                    found[one.sop_instance_uid] = (row.state, row.reason)
        return found

    def states(self) -> list[str]:
        """The states, in the order of the documents."""
        return [state for state, _ in self.rows().values()]

    def jobs(self) -> list[tuple[str, str]]:
        """States and reasons of the deliveries."""
        with self.store.read() as conn:
            return [(row.state, row.reason) for row in queue.of_study(conn, self.study_id)]

    def shown(self) -> str:
        """What `synoptic show` prints."""
        text = io.StringIO()
        view.show(Console(width=400, file=text), self.store, self.study_id, with_report=False)
        return text.getvalue()

    def note(self, asked: Dataset) -> int:
        """An archive that is asked, and will answer later. The row must be there already: its report may be quicker than its answer."""
        transaction = str(asked.TransactionUID)
        with self.store.read() as conn:
            assert conn.execute(sa.select(schema.commitment.c.state).where(schema.commitment.c.transaction_uid == transaction)).first()
        self.asked.append((transaction, [str(item.ReferencedSOPInstanceUID) for item in asked.ReferencedSOPSequence]))
        return 0

    @contextmanager
    def receiver(self, store: Store | None = None) -> Iterator[Receiver]:
        """Our receiver, which takes reports of SCRIPTED and TESTPACS and lets STRANGER in too."""

        def take(said: CommitmentReport | CommitmentRequest, archive: Caller) -> str:
            assert isinstance(said, CommitmentReport)
            return reception.take_report(config, store or self.store, said, archive)

        pacs = [Destination(name="pacs", ae_title=title, host="127.0.0.1", port=1, commitment=True) for title in ("SCRIPTED", "TESTPACS")]
        config = Config(destinations=tuple(pacs))
        with receiving(self.folder / "spool", calling=CALLING, reports=take) as running:
            yield running


@pytest.fixture
def site(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """One study, nothing to send yet; the receiver's clock is the site's."""
    made = Site(store, tmp_path)
    monkeypatch.setattr(reception, "clock", lambda: made.now)
    return made


def information(transaction: str, committed: Collection[str] = (), failed: Mapping[str, int] | None = None) -> Dataset:
    """Return the Event Information of a report."""
    ds = Dataset()
    ds.TransactionUID = transaction
    if committed:
        ds.ReferencedSOPSequence = [_item(uid) for uid in committed]
    if failed:
        ds.FailedSOPSequence = [_item(uid, reason) for uid, reason in failed.items()]
    return ds


def _item(uid: str, reason: int | None = None) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = peers.COMPREHENSIVE_3D_SR, uid
    if reason is not None:
        item.FailureReason = reason
    return item


def report(
    receiver: Receiver,
    said: Dataset,
    *,
    event_type: int = 1,
    ae_title: str = "SCRIPTED",
    instance: str = WELL_KNOWN,
    syntax: str = ExplicitVRLittleEndian,
) -> int:
    """Report as an archive does, over an association of its own; returns our status."""
    ae = AE(ae_title)
    ae.add_requested_context(STORAGE_COMMITMENT, syntax)
    role = build_role(STORAGE_COMMITMENT, scp_role=True)
    line = ae.associate(*receiver.scp.address, ae_title="SYNOPTIC", ext_neg=[role])
    assert line.is_established
    (context,) = line.accepted_contexts
    assert (context.as_scp, context.as_scu) == (True, False)
    answer, _ = line.send_n_event_report(said, event_type, STORAGE_COMMITMENT, instance)
    line.release()
    return int(answer.Status)


def test_a_report_that_the_archive_commits_to_is_shown_as_committed(site: Site, captured: Captured) -> None:
    uids = site.add(2)
    with ScriptedPacs(commits=site.note) as pacs, site.receiver() as receiver:
        site.deliver(pacs.peer)
        ((transaction, asked),) = site.asked
        assert asked == uids
        assert "pacs: asked to commit at 2026-01-02 12:00:00Z, no answer yet" in site.shown()
        site.now += timedelta(seconds=3)
        assert report(receiver, information(transaction, uids)) == 0
    assert site.states() == ["committed", "committed"]
    assert site.shown().count("pacs: committed by the PACS at 2026-01-02 12:00:03Z") == 2
    assert [state for state, _ in site.jobs()] == ["completed", "completed"]
    assert len(captured.named("commitment.given")) == 2
    site.look(pacs.peer)
    assert site.states() == ["committed", "committed"], "nothing is looked for that was promised"


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_a_report_that_comes_before_the_answer_to_our_request_counts(site: Site, syntax: str) -> None:
    (uid,) = site.add()
    with site.receiver() as receiver:

        def early(asked: Dataset) -> int:
            assert report(receiver, information(str(asked.TransactionUID), [uid]), syntax=syntax) == 0
            return 0

        with ScriptedPacs(commits=early) as pacs:
            site.deliver(pacs.peer)
    assert site.states() == ["committed"]


def test_a_report_that_comes_hours_later_still_counts(site: Site, captured: Captured) -> None:
    (uid,) = site.add()
    with ScriptedPacs(commits=site.note) as pacs, site.receiver() as receiver:
        site.deliver(pacs.peer)
        site.look(pacs.peer, later=timedelta(seconds=WAIT_S - 1))
        assert site.states() == ["asked"]
        site.look(pacs.peer, later=timedelta(seconds=1))
        assert site.rows() == {uid: ("found", "pacs did not say within 600 s whether it commits.")}
        assert "pacs: found by a query at 2026-01-02 12:10:00Z, not committed" in site.shown()
        assert len(captured.named("commitment.missing")) == 1
        site.now += timedelta(hours=2)
        assert report(receiver, information(site.asked[0][0], [uid])) == 0
    assert "committed by the PACS at 2026-01-02 14:10:00Z" in site.shown()


def test_a_report_that_comes_twice_changes_nothing_the_second_time(site: Site, captured: Captured) -> None:
    """Neither a repetition nor a contradiction under the same transaction: the first word stands."""
    (uid,) = site.add()
    with ScriptedPacs(commits=site.note) as pacs, site.receiver() as receiver:
        site.deliver(pacs.peer)
        said = information(site.asked[0][0], [uid])
        assert [report(receiver, said), report(receiver, said)] == [0, 0]
        assert report(receiver, information(site.asked[0][0], failed={uid: 0x0110}), event_type=2) == 0
    assert site.states() == ["committed"]
    assert len(captured.named("commitment.given")) == 1
    assert site.jobs() == [("completed", "")]


def test_a_report_that_comes_after_our_restart_finds_its_row(site: Site) -> None:
    (uid,) = site.add()
    with ScriptedPacs(commits=site.note) as pacs:
        site.deliver(pacs.peer)
    again = Store(site.store.engine.url.render_as_string(hide_password=False))
    with site.receiver(again) as receiver:
        assert report(receiver, information(site.asked[0][0], [uid])) == 0
    again.close()
    assert site.states() == ["committed"]


@pytest.mark.parametrize(("ae_title", "is_known"), [("STRANGER", True), ("TESTPACS", True), ("SCRIPTED", False)])
def test_a_report_of_another_or_of_an_unknown_transaction_is_turned_away(
    site: Site, captured: Captured, ae_title: str, *, is_known: bool
) -> None:
    """A title that may send images, and another archive of ours: neither may speak for the one that was asked."""
    (uid,) = site.add()
    with ScriptedPacs(commits=site.note) as pacs:
        site.deliver(pacs.peer)
    with site.receiver() as receiver:
        if ae_title == "TESTPACS":
            with site.store.begin() as conn:
                conn.execute(sa.update(schema.job).values(destination="elsewhere"))
        transaction = site.asked[0][0] if is_known else generate_uid()
        for event_type, said in ((1, information(transaction, [uid])), (2, information(transaction, failed={uid: 0x0112}))):
            assert report(receiver, said, event_type=event_type, ae_title=ae_title) == 0x0115
    assert site.states() == ["asked"]
    assert site.jobs() == [("completed", "")]
    turned_away = captured.named("commitment.turned_away")
    assert [(one["calling_ae"], one["status"]) for one in turned_away] == [(ae_title, "0x0115")] * 2
    assert "was not asked of this AE title" in str(turned_away[0]["reason"])


def test_what_the_archive_does_not_keep_is_sent_again_and_what_it_keeps_is_not(site: Site, captured: Captured) -> None:
    lost, kept = site.add(2)
    with ScriptedPacs(commits=site.note) as pacs, site.receiver() as receiver:
        site.deliver(pacs.peer)
        said = information(site.asked[0][0], [kept], {lost: 0x0112})
        assert report(receiver, said, event_type=2) == 0
        assert site.rows()[lost] == ("refused", "pacs does not commit to the document: 0x0112, no such object instance.")
        assert [state for state, _ in site.jobs()] == ["available", "completed"]
        assert site.deliver(pacs.peer) == 0, "not at once"
        site.now += timedelta(seconds=60)
        assert site.deliver(pacs.peer) == 1
        (first, _), (second, again) = site.asked
        assert (again, first != second) == ([lost], True)
        assert report(receiver, said, event_type=2) == 0, "the old transaction says nothing new"
        assert report(receiver, information(second, [lost])) == 0
    assert site.states() == ["committed", "committed"]
    assert [one["reason"] for one in captured.named("commitment.denied")] == [
        "pacs does not commit to the document: 0x0112, no such object instance."
    ]


def test_a_document_that_is_lost_again_and_again_becomes_a_dead_letter_that_says_why(site: Site, captured: Captured) -> None:
    (uid,) = site.add()
    with ScriptedPacs(commits=site.note) as pacs, site.receiver() as receiver:
        for _ in range(SENDINGS):
            assert site.deliver(pacs.peer) == 1
            assert report(receiver, information(site.asked[-1][0], failed={uid: 0x0213}), event_type=2) == 0
            site.now += timedelta(hours=1)
        assert site.deliver(pacs.peer) == 0
        words = "pacs does not commit to the document: 0x0213, resource limitation. It was sent 3 times."
        assert site.jobs() == [("discarded", words)]
        assert [one["reason"] for one in captured.named("job.discarded")] == [words]
        assert len(pacs.received) == SENDINGS
        with site.store.begin() as conn:
            assert queue.operator_retry(conn, site.study_id, now=site.now) == 1
        assert site.deliver(pacs.peer) == 1
        assert report(receiver, information(site.asked[-1][0], [uid])) == 0
    assert site.states() == ["committed"]


def test_a_refusal_that_comes_after_the_document_was_sent_again_sends_it_no_third_time(site: Site) -> None:
    (uid,) = site.add()
    with ScriptedPacs(commits=site.note) as pacs, site.receiver() as receiver:
        site.deliver(pacs.peer)
        with site.store.begin() as conn:
            conn.execute(sa.update(schema.job).values(state="available"))  # as a rescue or an operator does
        site.deliver(pacs.peer)
        assert report(receiver, information(site.asked[0][0], failed={uid: 0x0110}), event_type=2) == 0
    assert site.jobs() == [("completed", "")]
    assert site.states() == ["asked"]


def test_a_document_that_no_query_finds_either_is_sent_again(site: Site) -> None:
    (uid,) = site.add()
    with ScriptedPacs(commits=site.note) as pacs:
        site.deliver(pacs.peer)
        pacs.kept.clear()
        site.look(pacs.peer)
        words = "pacs did not say within 600 s whether it commits. A query does not find the document."
        assert site.rows() == {uid: ("refused", words)}
        assert site.jobs() == [("available", words)]


def test_an_archive_that_is_away_when_it_should_be_queried_is_queried_later(site: Site) -> None:
    site.add(3)
    with ScriptedPacs(commits=site.note) as pacs:
        site.deliver(pacs.peer)
        site.look(replace(pacs.peer, port=free_port()))
        assert site.states() == ["asked"] * 3
        site.look(pacs.peer, later=timedelta(seconds=59))
        assert site.states() == ["asked"] * 3
        site.look(pacs.peer, later=timedelta(seconds=1))
    assert site.states() == ["found"] * 3


def test_an_archive_that_answers_no_query_leaves_a_document_unproven(site: Site) -> None:
    (uid,) = site.add()
    with ScriptedPacs(commits=site.note, finding="unsupported") as pacs:
        site.deliver(replace(pacs.peer, read_back=False))
        site.look(pacs.peer)
    assert site.rows() == {uid: ("unproven", "pacs did not say within 600 s whether it commits.")}
    assert "neither committed nor found" in site.shown()
    assert site.jobs() == [("completed", "")]


@pytest.mark.parametrize("status", [None, 0x0110, 0x0122, 0x0211])
def test_an_archive_that_will_not_commit_is_queried_at_once(site: Site, status: int | None) -> None:
    (uid,) = site.add()
    commits = None if status is None else (lambda _asked: status)
    with ScriptedPacs(commits=commits) as pacs:
        site.deliver(pacs.peer)
        site.look(pacs.peer, later=timedelta())
    words = "does not accept Storage Commitment." if status is None else f"answers the request for commitment with 0x{status:04X}."
    assert site.rows() == {uid: ("found", f"pacs {words}")}


def test_a_request_whose_answer_is_lost_is_waited_for_as_if_it_had_arrived(site: Site) -> None:
    """Also what a crash between the verdict on the delivery and the request leaves: a row."""
    (uid,) = site.add()
    stopped = threading.Event()

    def silent(asked: Dataset) -> int:
        site.note(asked)
        stopped.wait(5)
        return 0

    with ScriptedPacs(commits=silent, timeout_s=0.5) as pacs, site.receiver() as receiver:
        site.deliver(pacs.peer)
        stopped.set()
        site.look(pacs.peer, later=timedelta())
        assert site.states() == ["asked"]
        assert report(receiver, information(site.asked[0][0], [uid])) == 0
    assert site.states() == ["committed"]


def test_a_destination_without_commitment_is_not_asked(site: Site) -> None:
    site.add()
    with ScriptedPacs(commits=site.note) as pacs:
        site.deliver(pacs.peer, wait_s=None)
    assert (site.asked, site.states()) == ([], [])


def test_a_document_that_was_not_delivered_is_not_asked_about(site: Site) -> None:
    refused, sent = site.add(2)
    with ScriptedPacs(commits=site.note, steps=[0xA900]) as pacs:
        site.deliver(pacs.peer)
    assert [uids for _, uids in site.asked] == [[sent]]
    assert refused not in site.rows()


def _without_transaction(transaction: str) -> Dataset:
    said = information(transaction, ["1.2.3"])
    del said.TransactionUID
    return said


def _named_by_no_uid(transaction: str) -> Dataset:
    return information(transaction, [""])


def _endless(transaction: str) -> Dataset:
    return information(transaction, [generate_uid() for _ in range(3000)])


@pytest.mark.parametrize(
    ("make", "event_type", "instance", "status"),
    [
        (_without_transaction, 1, WELL_KNOWN, 0x0115),
        (_named_by_no_uid, 1, WELL_KNOWN, 0x0115),
        (_endless, 1, WELL_KNOWN, 0x0213),
        (information, 3, WELL_KNOWN, 0x0113),
        (information, 1, "1.2.3", 0x0112),
    ],
)
def test_a_report_that_is_none_is_refused_by_its_own_status_and_the_next_is_taken(
    site: Site, captured: Captured, make: Callable[[str], Dataset], event_type: int, instance: str, status: int
) -> None:
    (uid,) = site.add()
    with ScriptedPacs(commits=site.note) as pacs, site.receiver() as receiver:
        site.deliver(pacs.peer)
        transaction = site.asked[0][0]
        assert report(receiver, make(transaction), event_type=event_type, instance=instance) == status
        assert site.states() == ["asked"]
        assert report(receiver, information(transaction, [uid])) == 0
    assert [one["status"] for one in captured.named("commitment.turned_away")] == [f"0x{status:04X}"]


def test_a_report_while_the_database_is_away_is_to_come_again(tmp_path: Path) -> None:
    def away(_said: CommitmentReport | CommitmentRequest, _archive: Caller) -> str:
        raise DatabaseUnavailable("The database is away.")

    with receiving(tmp_path / "spool", calling=CALLING, reports=away) as receiver:
        assert report(receiver, information(generate_uid(), ["1.2.3"])) == 0x0213


def test_each_context_serves_its_own_class_alone(tmp_path: Path) -> None:
    """No image is stored through the door of reports, no report taken through that of images, and garbage costs one status."""
    with receiving(tmp_path / "spool", reports=lambda _said, _archive: "") as receiver, receiver.scu() as scu:
        scu.associate([(STORAGE_COMMITMENT, [DEFLATED, EXPLICIT]), (CT, [EXPLICIT])], scp_of=[STORAGE_COMMITMENT])
        assert scu.contexts == {1: (0, EXPLICIT), 3: (0, EXPLICIT)}
        assert scu.store(slice_of(), context_id=1, sop_class=STORAGE_COMMITMENT) == 0x0122
        command = event_report_command()
        for context_id, data, status in ((3, b"\0" * 64, 0x0211), (1, b"\0" * 64, 0x0115), (1, encoded(information("1.2", ["1.3"])), 0)):
            scu.sock.sendall(pdu(P_DATA, pdv(context_id, 3, command)))
            scu.send_data(data, context_id=context_id)
            assert scu.status() == status
        assert scu.store(slice_of(), context_id=3) == 0


def event_report_command() -> bytes:
    """Return the command set of an N-EVENT-REPORT of type 1, with a data set."""
    command = command_set(0x0100, has_data_set=True, sop_class=STORAGE_COMMITMENT, sop_instance=WELL_KNOWN)
    event_type = struct.pack("<HHLH", 0, 0x1002, 2, 1)
    return command[:8] + struct.pack("<L", len(command) - 12 + len(event_type)) + command[12:] + event_type


@pytest.mark.parametrize(("scp_role", "takes"), [(False, True), (True, False)])
def test_a_caller_that_may_not_ask_or_is_not_to_report_is_offered_nothing(tmp_path: Path, *, scp_role: bool, takes: bool) -> None:
    """Without the role of SCP it would ask, which needs `commits_to` (test_promises.py); and no site gets a door it did not ask for."""
    ae = AE("SENDER")
    ae.add_requested_context(STORAGE_COMMITMENT)
    role = build_role(STORAGE_COMMITMENT, scu_role=not scp_role, scp_role=scp_role)
    with receiving(tmp_path / "spool", reports=(lambda _said, _archive: "") if takes else None) as receiver:
        line = ae.associate(*receiver.scp.address, ae_title="SYNOPTIC", ext_neg=[role])
        assert [context.result for context in line.rejected_contexts] == [3]
        line.abort()


def test_a_patient_is_erased_with_what_was_promised(site: Site) -> None:
    site.add(2)
    with ScriptedPacs(commits=site.note) as pacs:
        site.deliver(pacs.peer)
    with site.store.begin() as conn:
        assert erasure.erase(conn, PatientKey("H", "TEST1"), now=NOW)["counts"]["commitments"] == 2
        assert conn.execute(sa.select(sa.func.count()).select_from(schema.commitment)).scalar() == 0


@pytest.mark.peer
def test_orthanc_commits_to_what_it_keeps_and_not_to_what_it_lost(site: Site, tmp_path: Path) -> None:
    """A real archive: it opens its association to our receiver, as SCP by role selection."""
    site.add(3)
    (tmp_path / "orthanc").mkdir()
    with (
        site.receiver() as receiver,
        orthanc(tmp_path / "orthanc", callers={"SYNOPTIC": receiver.scp.address[1]}, StorageCommitmentReportsSize=100) as pacs,
    ):
        peer = pacs.peer("SYNOPTIC")
        site.deliver(peer)
        for _ in range(3):
            receiver.heard.next("commitment.given", timeout_s=30)
        assert site.states() == ["committed"] * 3
        for one in pacs.instances():
            pacs.delete(f"/instances/{one}")
        transaction = generate_uid()
        with site.store.begin() as conn:
            conn.execute(sa.insert(schema.commitment).values(job_id=1, transaction_uid=transaction, asked_at=NOW, look_at=NOW))
            lost = documents.load(conn, 1)
        assert commitment.request([lost], transaction_uid=transaction, peer=peer) == ""
        assert "0x0112, no such object instance" in str(receiver.heard.next("commitment.denied", timeout_s=30)["reason"])
        site.now += timedelta(seconds=60)
        assert site.deliver(peer) == 1
        receiver.heard.next("commitment.given", timeout_s=30)
        assert len(pacs.instances()) == 1
    assert site.states() == ["committed"] * 3


@pytest.mark.peer
@pytest.mark.timeout(300)
def test_a_whole_installation_asks_orthanc_and_shows_its_word(tmp_path: Path, shared: Path) -> None:
    """The roles as they run: deliver asks, receive takes the report, each its own process."""
    (tmp_path / "orthanc").mkdir()
    site = Installation(tmp_path / "worker", bundles=("cxr-severity",), quiet_s=0.5, processes=1, extra="commitment = true\n")
    ((_, path),) = accept.cohort(shared, limit=1).items()
    with orthanc(tmp_path / "orthanc", callers={"WORKER": site.port}) as pacs:
        site.orthanc = pacs
        with site:
            accept.send_records(site, shared, {"": path})
            forward([path], peer=Peer("worker", "WORKER", "127.0.0.1", site.port, "MODALITY"))
            site.wait_for_event("commitment.given", timeout_s=90)
            shown = site.cli("show", "1").stdout
    assert "pacs: committed by the PACS at 2" in shown
    assert "commitment.committed" in shown


def test_an_archive_that_is_never_heard_again_is_queried_by_the_role_itself(
    site: Site, monkeypatch: pytest.MonkeyPatch, captured: Captured
) -> None:
    """The delivering thread looks between two leases."""
    monkeypatch.setattr(roles, "clock", lambda: datetime.now(UTC))
    monkeypatch.setattr(reception, "clock", lambda: datetime.now(UTC))
    monkeypatch.setattr(roles, "LOOK_S", 0.05)
    (uid,) = site.add()
    stop = threading.Event()
    with ScriptedPacs(commits=site.note) as pacs:
        one = Destination(name="pacs", ae_title="SCRIPTED", host="127.0.0.1", port=pacs.peer.port, commitment=True, commitment_wait_s=0.2)
        thread = threading.Thread(target=roles.deliver, args=(Config(destinations=(one,)), site.store, stop))
        thread.start()
        try:
            wait_until(lambda: bool(captured.named("commitment.missing")), timeout_s=20, what="a query", step_s=0.05)
        finally:
            stop.set()
            thread.join()
    assert site.rows() == {uid: ("found", "pacs did not say within 0.2 s whether it commits.")}
