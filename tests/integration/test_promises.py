"""Storage commitment as SCP: senders ask our receiver about their images, and are told the truth, later if they are away."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid
from pynetdicom import AE, build_role, evt

from tests.conformance.test_retention import Site as Images
from tests.conformance.test_store import NOW, add, header
from tests.conftest import Captured
from tests.installation import wait_until
from tests.peers import dcmtk, free_port, orthanc
from tests.receivers import Receiver, receiving
from tests.scu import CT, slice_of
from worker import reception, sweeps
from worker.config import Config, Receive, Sender
from worker.config import Site as SiteSettings
from worker.deliver import association, commitment
from worker.deliver.commitment import STORAGE_COMMITMENT
from worker.domain import CommitmentReport, CommitmentRequest, Received
from worker.intake.commitment import MAX_REQUEST_BYTES
from worker.intake.negotiation import Peer as Caller
from worker.intake.scp import listen
from worker.peers import peer_to_report
from worker.store import history, promises, schema
from worker.store.database import DatabaseUnavailable, Store
from worker.store.spool import Spool

pytestmark = pytest.mark.requirement("L8")

WELL_KNOWN = "1.2.840.10008.1.20.1.1"
MR = "1.2.840.10008.5.1.4.1.1.4"


@dataclass
class Modality:
    """A sender that listens for our report, as SCU; it takes it with `status`."""

    port: int = field(default_factory=free_port)
    status: int = 0
    accepts: bool = True
    told: list[tuple[int, Dataset]] = field(default_factory=list)

    @contextmanager
    def listening(self) -> Iterator[None]:
        ae = AE("MODALITY")
        ae.add_supported_context(STORAGE_COMMITMENT if self.accepts else CT, scu_role=False, scp_role=True)

        def take(event: evt.Event) -> tuple[int, None]:
            self.told.append((int(event.event_type or 0), event.event_information))
            return self.status, None

        server = ae.start_server(("127.0.0.1", self.port), block=False, evt_handlers=[(evt.EVT_N_EVENT_REPORT, take)])
        try:
            yield
        finally:
            assert server is not None
            server.shutdown()

    def outcome(self, index: int = -1) -> dict[str, int]:
        """Instance → failure reason (0: committed), as the report said."""
        _, said = self.told[index]
        kept = {str(one.ReferencedSOPInstanceUID): 0 for one in said.get("ReferencedSOPSequence", ())}
        return kept | {str(one.ReferencedSOPInstanceUID): int(one.FailureReason) for one in said.get("FailedSOPSequence", ())}


@dataclass
class Site:
    """A store with three images, a receiver, one modality, and a clock that stands."""

    images: Images
    modality: Modality = field(default_factory=Modality)
    now: datetime = NOW

    @property
    def config(self) -> Config:
        return Config(senders=(Sender(ae_title="MODALITY", commitment_port=self.modality.port), Sender(ae_title="STRANGER")))

    @property
    def store(self) -> Store:
        return self.images.store

    @contextmanager
    def receiver(self) -> Iterator[Receiver]:
        def take(said: CommitmentReport | CommitmentRequest, caller: Caller) -> str:
            assert isinstance(said, CommitmentRequest)
            return reception.take_request(self.config, self.store, said, caller)

        calling = {"MODALITY": ["127.0.0.1"], "STRANGER": ["127.0.0.1"]}
        with receiving(self.images.spool.root, calling=calling, spool=self.images.spool, reports=take, commits_to=["MODALITY"]) as running:
            yield running

    def sweep(self, *, later: timedelta = timedelta(), store: Store | None = None) -> None:
        """Let time pass, and report what is owed."""
        self.now += later
        commitment.report_all(
            store=store or self.store,
            instances=self.images.spool.root / "instances",
            peer_of=lambda calling_ae, address: peer_to_report(self.config, calling_ae, address),
            clock=lambda: self.now,
        )

    def rows(self) -> list[Any]:
        with self.store.read() as conn:
            return list(conn.execute(sa.select(schema.instance).order_by(schema.instance.c.id)))

    def uids(self) -> list[str]:
        return [row.sop_instance_uid for row in self.rows()]

    def owed(self) -> int:
        with self.store.read() as conn:
            return int(conn.execute(sa.select(sa.func.count()).select_from(schema.promise)).scalar_one())

    def file(self, index: int) -> Path:
        return self.images.spool.root / "instances" / str(self.rows()[index].path)


def made(store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Three images here; the receiver's clock is the site's."""
    site = Site(Images(store, Spool(folder / "spool", low_water_bytes=0)))
    for number in (1, 2, 3):
        site.images.receive(number)
    monkeypatch.setattr(reception, "clock", lambda: site.now)
    return site


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Store]:
    """The embedded database."""
    store = Store(f"sqlite:///{tmp_path / 'synoptic.db'}")
    store.migrate()
    yield store
    store.close()


@pytest.fixture
def site(sqlite: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A site with the embedded database."""
    return made(sqlite, tmp_path, monkeypatch)


@pytest.fixture
def either(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A site with each kind of database."""
    return made(store, tmp_path, monkeypatch)


def request(uids: Sequence[str], *, transaction: str = "", sop_class: str = CT) -> Dataset:
    """Return the Action Information of a request."""
    ds = Dataset()
    ds.TransactionUID = transaction or generate_uid()
    ds.ReferencedSOPSequence = []
    for uid in uids:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, uid
        ds.ReferencedSOPSequence.append(item)
    return ds


def ask(
    receiver: Receiver,
    wanted: Dataset,
    *,
    ae_title: str = "MODALITY",
    syntax: str = ExplicitVRLittleEndian,
    action: int = 1,
    instance: str = WELL_KNOWN,
    roles_of: tuple[bool, bool] | None = None,
) -> int | None:
    """Ask as a modality does; returns our status, or None where the context is refused."""
    ae = AE(ae_title)
    ae.add_requested_context(STORAGE_COMMITMENT, syntax)
    negotiated: list[Any] = [build_role(STORAGE_COMMITMENT, scu_role=roles_of[0], scp_role=roles_of[1])] if roles_of else []
    line = ae.associate(*receiver.scp.address, ae_title="SYNOPTIC", ext_neg=negotiated)
    if not line.accepted_contexts:
        line.abort()
        return None
    answer, _ = line.send_n_action(wanted, action, STORAGE_COMMITMENT, instance)
    line.release()
    return int(answer.Status)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("roles_of", [None, (True, False), (True, True)])
def test_a_sender_that_asks_is_answered_at_once_and_told_what_is_here(
    site: Site, captured: Captured, syntax: str, roles_of: tuple[bool, bool] | None
) -> None:
    wanted = request(site.uids())
    with site.receiver() as receiver, site.modality.listening():
        assert ask(receiver, wanted, syntax=syntax, roles_of=roles_of) == 0
        assert (site.owed(), site.modality.told) == (1, [])
        site.sweep()
    ((event_type, said),) = site.modality.told
    assert (event_type, str(said.TransactionUID)) == (1, str(wanted.TransactionUID))
    assert site.modality.outcome() == dict.fromkeys(site.uids(), 0)
    assert site.owed() == 0
    with site.store.read() as conn:
        (noted,) = [one.facts for one in history.of_study(conn, 1) if one.name == "commitment.promised"]
    assert noted == {"instances": 3, "calling_ae": "MODALITY"}
    assert [(one["instances"], one["failed"]) for one in captured.named("commitment.promised")] == [(3, 0)]


def _never_came(_site: Site) -> int:
    return 0x0112


def _file_gone(site: Site) -> int:
    site.file(0).unlink()
    return 0x0112


def _file_changed(site: Site) -> int:
    whole = site.file(0).read_bytes()
    site.file(0).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    return 0x0112


def _removed_by_retention(site: Site) -> int:
    """The mark alone: the file may outlive it for a while."""
    with site.store.begin() as conn:
        conn.execute(sa.update(schema.instance).where(schema.instance.c.sop_instance_uid == site.uids()[0]).values(removed_at=NOW))
    return 0x0112


def _came_with_other_bytes_too(site: Site) -> int:
    """Who sent the second version must not delete it: what is kept is the first."""
    site.images.receive(1, study="2.25.1")
    row = site.rows()[0]
    with site.store.begin() as conn:
        facts = {"instance": row.id, "reason": "same SOP Instance UID, other bytes"}
        history.note(conn, 1, name="instance.quarantined", now=NOW, **facts)
    return 0x0110


def _came_with_other_bytes_in_another_study(site: Site) -> int:
    other = replace(header(1), study_instance_uid="2.25.9", series_instance_uid="2.25.9.1")
    assert add(site.store, other, sha256="other") is Received.CONFLICT
    return 0x0110


def _file_unreadable(site: Site) -> int:
    """As on a disk that fails: whatever the system says, the rest is told."""
    site.file(0).unlink()
    site.file(0).mkdir()
    return 0x0112


HAPPENED = [_never_came, _file_gone, _file_changed, _file_unreadable, _removed_by_retention]


@pytest.mark.parametrize("happens", [*HAPPENED, _came_with_other_bytes_too, _came_with_other_bytes_in_another_study])
def test_what_is_not_here_as_it_came_is_not_promised_and_the_rest_is(site: Site, happens: Callable[[Site], int]) -> None:
    first, *others = site.uids()
    reason = happens(site)
    if happens is _never_came:
        first = "2.25.404"
    with site.receiver() as receiver, site.modality.listening():
        assert ask(receiver, request([first, *others])) == 0
        site.sweep()
    assert site.modality.told[0][0] == 2
    assert site.modality.outcome() == {first: reason, **dict.fromkeys(others, 0)}


def test_the_receiver_notes_which_instance_came_with_other_bytes(site: Site) -> None:
    row = site.rows()[0]
    with site.store.begin() as conn:
        conn.execute(sa.update(schema.instance).where(schema.instance.c.id == row.id).values(sha256="other"))
    site.images.receive(1)
    with site.store.read() as conn:
        (noted,) = [one.facts for one in history.of_study(conn, 1) if one.name == "instance.quarantined"]
    assert noted["instance"] == row.id


def test_an_instance_that_is_here_as_another_class_is_a_conflict(site: Site) -> None:
    with site.receiver() as receiver, site.modality.listening():
        assert ask(receiver, request(site.uids(), sop_class=MR)) == 0
        site.sweep()
    assert (site.modality.told[0][0], set(site.modality.outcome().values())) == (2, {0x0119})
    assert "ReferencedSOPSequence" not in site.modality.told[0][1]


@pytest.mark.parametrize("failure", ["away", "refuses the context", "answers 0x0110"])
def test_a_sender_that_does_not_take_the_report_is_told_later_after_a_restart_too(site: Site, captured: Captured, failure: str) -> None:
    """Hours with back-off; what is true is looked at when it is told, not when it was asked."""
    uids, modality = site.uids(), site.modality
    with site.receiver() as receiver:
        assert ask(receiver, request(uids)) == 0
    modality.accepts, modality.status = failure != "refuses the context", 0x0110 if failure == "answers 0x0110" else 0
    for number in range(24 * 4):
        if failure == "away":
            site.sweep(later=timedelta(minutes=15))
        elif number < 3:
            with modality.listening():
                site.sweep(later=timedelta(minutes=15))
    assert site.owed() == 1
    assert len(captured.named("commitment.unreported")) == 1, "the first try alone is said"
    site.file(2).unlink()
    modality.accepts, modality.status = True, 0
    modality.told.clear()
    again = Store(site.store.engine.url.render_as_string(hide_password=False))
    with modality.listening():
        site.sweep(later=timedelta(minutes=15), store=again)
    again.close()
    assert modality.outcome() == {uids[0]: 0, uids[1]: 0, uids[2]: 0x0112}
    assert site.owed() == 0


def test_a_sender_that_is_away_for_days_is_given_up_and_that_is_said(either: Site, captured: Captured) -> None:
    site = either
    with site.receiver() as receiver:
        assert ask(receiver, request(site.uids())) == 0
    site.sweep()
    site.sweep(later=promises.GIVE_UP)
    assert site.owed() == 0
    assert [one["is_final"] for one in captured.named("commitment.unreported")] == [False, True]


def test_a_sender_that_asks_again_is_told_again_and_one_that_contradicts_itself_is_refused(either: Site) -> None:
    wanted = request(either.uids()[:1], transaction="2.25.77")
    other = request(either.uids(), transaction="2.25.77")
    site = either
    with site.receiver() as receiver:
        assert [ask(receiver, wanted), ask(receiver, wanted), ask(receiver, other)] == [0, 0, 0x0115]
        assert site.owed() == 1
        with site.modality.listening():
            site.sweep()
            assert ask(receiver, wanted) == 0
            site.sweep()
    assert len(site.modality.told) == 2


def test_one_sender_that_is_away_holds_up_no_other_and_is_tried_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, tried = free_port(), []
    settings = (Sender(ae_title="GONE", commitment_port=gone), *site.config.senders)
    monkeypatch.setattr(Site, "config", Config(senders=settings))
    with site.store.begin() as conn:
        for title in ("GONE", "GONE", "GONE", "MODALITY"):
            asked = CommitmentRequest(str(generate_uid()), ((CT, site.uids()[0]),))
            assert promises.ask(conn, asked, calling_ae=title, address="127.0.0.1", now=NOW)
    real = association.associate

    def counted(peer: Any, *arguments: Any, **options: Any) -> Any:
        tried.append(peer.ae_title)
        return real(peer, *arguments, **options)

    monkeypatch.setattr(commitment, "associate", counted)
    with site.modality.listening():
        site.sweep()
    assert tried == ["GONE", "MODALITY"]
    assert len(site.modality.told) == 1
    assert site.owed() == 3


def _owe(site: Site, titles: Sequence[str]) -> None:
    with site.store.begin() as conn:
        for title in titles:
            asked = CommitmentRequest(str(generate_uid()), ((CT, site.uids()[0]),))
            assert promises.ask(conn, asked, calling_ae=title, address="127.0.0.1", now=NOW)


@pytest.mark.parametrize("title", ["", "A\\B"])
def test_a_sender_whose_title_cannot_be_called_holds_up_no_other(
    site: Site, captured: Captured, monkeypatch: pytest.MonkeyPatch, title: str
) -> None:
    """Where any title may ask, one that is none was an error at each look, before all the others."""
    monkeypatch.setattr(Site, "config", Config(senders=(Sender(ae_title="*", commitment_port=site.modality.port),)))
    _owe(site, [title, "MODALITY"])
    with site.modality.listening():
        site.sweep()
    assert (len(site.modality.told), site.owed()) == (1, 1)
    (said,) = captured.named("commitment.unreported")
    assert str(said["reason"]).startswith("Internal error (ValueError) at ")


def test_a_sender_that_is_away_with_many_requests_is_tried_once_and_then_the_others_are_told(
    either: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some modalities ask for each image: each look would meet nobody else for hours."""
    site, gone = either, free_port()
    monkeypatch.setattr(Site, "config", Config(senders=(Sender(ae_title="GONE", commitment_port=gone), *site.config.senders)))
    _owe(site, ["GONE"] * 40 + ["MODALITY"])
    with site.modality.listening():
        site.sweep()
        site.sweep()
    assert (len(site.modality.told), site.owed()) == (1, 40)
    site.sweep(later=promises.GIVE_UP)
    assert site.owed() == 0


@pytest.mark.parametrize(("ae_title", "roles_of"), [("STRANGER", None), ("STRANGER", (True, False))])
def test_who_may_not_ask_is_offered_no_context(site: Site, ae_title: str, roles_of: tuple[bool, bool] | None) -> None:
    with site.receiver() as receiver:
        assert ask(receiver, request(site.uids()), ae_title=ae_title, roles_of=roles_of) is None


def _nothing() -> Dataset:
    return request([])


def _no_transaction() -> Dataset:
    wanted = request(["1.2.3"])
    del wanted.TransactionUID
    return wanted


def _no_uid() -> Dataset:
    wanted = request(["1.2.3"])
    wanted.ReferencedSOPSequence[0].ReferencedSOPInstanceUID = "1.2.3"
    del wanted.ReferencedSOPSequence[0].ReferencedSOPClassUID
    return wanted


def _endless() -> Dataset:
    wanted = request(["1.2.3"])
    wanted.add_new(0x00091001, "UN", bytes(MAX_REQUEST_BYTES))
    return wanted


@pytest.mark.parametrize(
    ("make", "action", "instance", "status"),
    [
        (_nothing, 1, WELL_KNOWN, 0x0115),
        (_no_transaction, 1, WELL_KNOWN, 0x0115),
        (_no_uid, 1, WELL_KNOWN, 0x0115),
        (_endless, 1, WELL_KNOWN, 0x0213),
        (lambda: request(["1.2.3"]), 2, WELL_KNOWN, 0x0123),
        (lambda: request(["1.2.3"]), 1, "1.2.3", 0x0112),
    ],
)
def test_a_request_that_is_none_is_refused_by_its_own_status_and_the_next_is_taken(
    site: Site, make: Callable[[], Dataset], action: int, instance: str, status: int
) -> None:
    with site.receiver() as receiver:
        assert ask(receiver, make(), action=action, instance=instance) == status
        assert site.owed() == 0
        assert ask(receiver, request(site.uids())) == 0


def test_a_request_while_the_database_is_away_is_to_come_again(tmp_path: Path) -> None:
    def away(_said: object, _caller: Caller) -> str:
        raise DatabaseUnavailable("The database is away.")

    calling = {"MODALITY": ["127.0.0.1"]}
    with receiving(tmp_path / "spool", calling=calling, reports=away, commits_to=["*"]) as receiver:
        assert ask(receiver, request(["1.2.3"])) == 0x0213


@pytest.mark.peer
def test_orthanc_stores_asks_and_is_told(sqlite: Store, tmp_path: Path) -> None:
    """A real archive as the sender, our receiver and sweeps as they run: what it sent is promised, what it did not is not."""
    (tmp_path / "orthanc").mkdir()
    path, stop, listener = tmp_path / "image.dcm", threading.Event(), listen(("127.0.0.1", 0))
    image = slice_of()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.save_as(path, enforce_file_format=True)
    uid = str(dcmread(path).SOPInstanceUID)
    callers = {"SYNOPTIC": listener.getsockname()[1], "STORESCU": free_port()}
    with orthanc(tmp_path / "orthanc", callers=callers, StorageCommitmentReportsSize=100) as pacs:
        config = Config(
            site=SiteSettings(data=tmp_path),
            receive=Receive(low_water_mb=0),
            senders=(Sender(ae_title="*", commitment_port=pacs.dicom_port),),
        )
        periodic = sweeps.scheduler(config, sqlite, Spool(config.spool, low_water_bytes=0), sweeps.Clock())
        receiver = threading.Thread(target=reception.receive, args=(config, sqlite, listener, stop))
        receiver.start()
        periodic.start()
        try:
            sent = dcmtk("storescu", "-aet", "STORESCU", "-aec", "TESTPACS", "127.0.0.1", str(pacs.dicom_port), str(path))
            assert sent.returncode == 0, sent.stdout
            pacs.post("/modalities/synoptic/store", pacs.instances()[0])
            wanted = [{"SOPClassUID": CT, "SOPInstanceUID": one} for one in (uid, "2.25.404")]
            where = str(pacs.post("/modalities/synoptic/storage-commitment", json.dumps({"DicomInstances": wanted}))["Path"])
            wait_until(lambda: pacs.get(where)["Status"] != "Pending", timeout_s=60, what="Orthanc has our report")
            said = pacs.get(where)
        finally:
            stop.set()
            receiver.join()
            periodic.stop(wait=True)
    assert said["Status"] == "Failure"
    assert [one["SOPInstanceUID"] for one in said["Success"]] == [uid]
    assert [(one["SOPInstanceUID"], one["FailureReason"]) for one in said["Failures"]] == [("2.25.404", 0x0112)]
