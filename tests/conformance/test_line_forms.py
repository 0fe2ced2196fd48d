"""A report that replaces another, on both databases: every form of the new one knows the old, and a viewer can tell which is current."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import sqlalchemy as sa
from pydicom import FileDataset, dcmread

from models.bundle import Bundle
from tests import factories, reports
from tests.conformance.test_line_record import ADA, NAME, NOW, OLD, after, bundle, crp, lease, names, renew, tell
from tests.integration.test_forms import of_groups, of_state, of_text
from tests.unit.test_gsps import region_of
from tests.unit.test_keys import description, referred
from tests.unit.test_sr import named
from worker import pipeline, reissue
from worker.deliver import send
from worker.deliver.cstore import Outcome, Peer
from worker.domain import Document, Header, ImageFacts, Merge, Patient
from worker.errors import PeerUnavailable
from worker.infer import Model
from worker.intake import assembly
from worker.joining import MUST_AGREE
from worker.report import codes, forms
from worker.report.result import Result
from worker.store import commitments, documents, history, ledger, queue, studies, withdrawal
from worker.store.database import Store
from worker.store.schema import commitment, document, job

__all__ = ["bundle"]  # a fixture

KINDS = ("sr", "gsps", "keys", "basic", "rejection")


@dataclass
class Site:
    """A store, a folder of images and a line that asks no network: each analysis finds pneumonia, somewhere."""

    store: Store
    bundle: Bundle
    folder: Path
    patient: Patient = ADA
    model: Model = field(init=False)

    def __post_init__(self) -> None:
        self.use("0.1.0")

    def use(self, version: str) -> None:
        """Have this version of the bundle from now on."""
        self.model = cast("Model", SimpleNamespace(bundle=self.bundle, name=NAME, version=version, digest=version.encode().hex() * 8))

    @property
    def line(self) -> pipeline.Line:
        return cast(
            "pipeline.Line",
            SimpleNamespace(
                store=self.store,
                models={NAME: self.model},
                decoders=None,
                destinations={"pacs": KINDS},
                kinds=frozenset(KINDS),
                clock=lambda: NOW,
                zone=reports.ZONE,
                instances=self.folder,
                must_agree=MUST_AGREE,
                pull=None,
            ),
        )

    def receive(self, *, series: int = 1, images: int = 1) -> int:
        """Take in radiographs of the study as a series, and complete the study; returns its row."""
        for number in range(images):
            ds = factories.make_radiograph(modality="CR", patient=self.patient.key, number=10 * series + number)
            ds.SeriesInstanceUID = f"2.25.{series}"
            one = factories.instance_of(path := factories.write(ds, self.folder / f"{series}-{number}.dcm"))
            header = Header(
                sop_class_uid=str(ds.SOPClassUID),
                sop_instance_uid=str(ds.SOPInstanceUID),
                transfer_syntax_uid=str(ds.file_meta.TransferSyntaxUID),
                study_instance_uid=str(ds.StudyInstanceUID),
                series_instance_uid=str(ds.SeriesInstanceUID),
                patient=self.patient,
                modality="CR",
                facts=ImageFacts(body_part="CHEST"),
                accession_number=str(ds.AccessionNumber),
            )
            with self.store.begin() as conn:
                studies.add_instance(conn, header, path=Path(path.name), sha256=one.sha256, size_bytes=one.size_bytes, calling_ae="CR",
                                     address="", study_at=NOW - timedelta(hours=1), quiet_s=1, now=NOW - timedelta(seconds=10))  # fmt: skip
        assembly.sweep(self.store, wants=[assembly.Wants(NAME, frozenset({"CR"}))], limit_s=100, now=NOW)
        return 1

    def analyze(self) -> dict[str, FileDataset]:
        """Walk the due job down the line; what it made, by kind."""
        (case,) = pipeline.each(self.line, pipeline.gather, [pipeline.Case(lease(self.store))])
        assert case.error is None
        assert case.inputs is not None
        (series,) = case.inputs.series.values()
        ds = dcmread(series.instances[0].path)
        mask = np.zeros((1, ds.Rows, ds.Columns), bool)
        mask[0, 10:20, 10:20] = True
        finding = replace(reports.FINDINGS[0], regions=(region_of(mask, series),))
        if not case.is_repeated:
            case = replace(case, findings=(finding, reports.FINDINGS[1]))
        (case,) = pipeline.each(self.line, pipeline.report, [case])
        assert case.error is None
        pipeline.settle(self.line, case)
        made = (*case.companions, *([case.report] if case.report else []))
        return {one.kind: dcmread(BytesIO(one.data)) for one in made if one.data}


@pytest.fixture
def site(store: Store, bundle: Bundle, tmp_path: Path) -> Site:
    return Site(store, bundle, tmp_path)


def late_series(site: Site) -> None:
    site.receive(series=2, images=2)  # with more images than the first: it is taken


def corrected_value(site: Site) -> None:
    tell(site.store, ADA, crp(50.0, status="C"), now=after(1))
    assert renew(site.store, site.bundle) == 1


def merged_patient(site: Site) -> None:
    tell(site.store, OLD, crp(80.0, hours=1, key="old/1"), now=after(1))
    tell(site.store, ADA, now=after(2), merges=[Merge(survivor=ADA.key, retired=OLD.key)])
    assert renew(site.store, site.bundle) == 1


def new_model(site: Site) -> None:
    site.use("0.2.0")
    with site.store.begin() as conn:
        assert reissue.anew(conn, 1, bundles={NAME}, now=NOW) == 1


CHANGES: dict[str, tuple[Callable[[Site], None], str]] = {
    "late series": (late_series, "2 images came; 1 image that it was made from is not used any more"),
    "corrected value": (corrected_value, "the patient's record changed (C reactive protein"),
    "merged patient": (merged_patient, "the patient's record changed (C reactive protein"),
    "new model": (new_model, "the algorithm is version 0.2.0 now, not 0.1.0"),
}


@pytest.mark.requirement("F3")
@pytest.mark.parametrize("change", CHANGES)
def test_every_form_of_the_new_version_names_the_old_and_says_why_and_they_agree(change: str, site: Site) -> None:
    """Root and text by their predecessors and in words, the note by what it marks; series and numbers tell them apart in any viewer."""
    happens, because = CHANGES[change]
    study_id = site.receive()
    tell(site.store, ADA, crp(5.0))
    old = site.analyze()
    assert "rejection" not in old
    happens(site)
    new = site.analyze()
    assert set(new) == set(KINDS)
    for kind in ("sr", "basic"):
        (replaced,) = new[kind].PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence
        assert replaced.ReferencedSOPInstanceUID == old[kind].SOPInstanceUID
        (item,) = named(new[kind], codes.REPLACES)
        assert because in item.TextValue
    assert {uid for uid, _ in referred(new["rejection"])} == {ds.SOPInstanceUID for ds in old.values()}
    assert because in description(new["rejection"])
    assert of_text(new["basic"]) == of_groups(new["sr"])
    assert of_state(new["gsps"]).items() <= of_groups(new["sr"]).items()
    assert {uid for uid, _ in referred(new["keys"])} == {
        one.ReferencedSOPInstanceUID for one in new["gsps"].ReferencedSeriesSequence[0].ReferencedImageSequence
    }
    for kind in old:  # what has no predecessor of its own is told by series and number, as all are
        assert new[kind].SeriesInstanceUID != old[kind].SeriesInstanceUID
        assert " #2: " in new[kind].SeriesDescription
        assert int(new[kind].InstanceNumber) > int(old[kind].InstanceNumber)
    with site.store.read() as conn:
        filed = documents.of_study(conn, study_id)
        assert [row.kind for row, found in filed if found] == ["sr", "sr"]
        assert documents.predecessor(conn, study_id, bundle=NAME, before_version=9).sop_instance_uid == new["sr"].SOPInstanceUID  # type: ignore[union-attr]


def test_asked_anew_with_the_same_bundle_and_record_nothing_is_sent(site: Site) -> None:
    """The same would be said again."""
    study_id = site.receive()
    tell(site.store, ADA, crp(5.0))
    site.analyze()
    with site.store.begin() as conn:
        assert reissue.anew(conn, study_id, bundles={NAME, "another"}, now=NOW) == 1
        assert reissue.anew(conn, study_id, bundles={"another"}, now=NOW) == 0
    assert site.analyze() == {}
    assert names(site.store, study_id).count("study.renewed") == 1


class Pacs:
    """A door that takes everything but what is refused."""

    def __init__(self, *, refuses: str = "") -> None:
        self.refuses = refuses
        self.taken: list[str] = []

    def __call__(self, batch: list[Document], *, peer: Peer) -> list[Outcome]:
        self.taken += [one.kind for one in batch if one.kind != self.refuses]
        away = PeerUnavailable("It is away.")
        return [Outcome(one.sop_instance_uid, 0, error=away if one.kind == self.refuses else None) for one in batch]


def delivered(site: Site, door: Pacs, monkeypatch: pytest.MonkeyPatch, *, hours: float = 0) -> dict[str, str]:
    """Deliver what is due; the state of each newest delivery by its document's kind."""
    monkeypatch.setattr(send, "DOORS", {"dicom": door})
    now = NOW + timedelta(hours=hours)
    with site.store.begin() as conn:
        jobs = queue.lease(conn, "deliver", owner="me", limit=20, lease_s=60, now=now)
    send.deliver(jobs, store=site.store, peer=Peer("pacs", "PACS", "127.0.0.1", 1, "US"), clock=lambda: now)
    with site.store.read() as conn:
        kinds = {row.id: row.kind for row, _ in documents.of_study(conn, 1)}
        return {kinds[one.document_id]: one.state for one in queue.of_study(conn, 1) if one.kind == "deliver"}


def test_the_old_report_is_marked_only_when_the_new_one_is_there(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two a radiologist would see no report at all."""
    site.receive()
    tell(site.store, ADA, crp(5.0))
    site.analyze()
    delivered(site, Pacs(), monkeypatch)
    corrected_value(site)
    site.analyze()
    states = delivered(site, slow := Pacs(refuses="sr"), monkeypatch)
    assert (states["sr"], states["rejection"], states["basic"]) == ("available", "available", "completed")
    assert "rejection" not in slow.taken
    assert delivered(site, Pacs(), monkeypatch, hours=1)["sr"] == "completed"
    assert versions_asked_for(site) == {1, 2}
    assert delivered(site, Pacs(), monkeypatch, hours=2)["rejection"] == "completed"
    assert versions_asked_for(site) == {2}


def versions_asked_for(site: Site) -> set[int]:
    """Of the delivered documents, those versions that `synoptic check --pacs` looks for."""
    with site.store.read() as conn:
        version = {row.id: row.input_version for row, _ in documents.of_study(conn, 1)}
        return {version[one.document_id] for one in documents.delivered(conn, destination="pacs", since=NOW - timedelta(days=1))}


def test_an_old_report_that_is_late_is_marked_when_it_is_there(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The PACS was away when it was made: what comes after its note would stand beside the new report, and look as good."""
    site.receive()
    tell(site.store, ADA, crp(5.0))
    site.analyze()
    assert delivered(site, Pacs(refuses="sr"), monkeypatch)["sr"] == "available"
    corrected_value(site)
    site.analyze()
    with site.store.begin() as conn:
        old = sa.select(document.c.id).where(document.c.kind == "sr", document.c.input_version == 1)
        conn.execute(sa.update(job).where(job.c.document_id.in_(old)).values(not_before=NOW + timedelta(hours=2)))
    delivered(site, Pacs(), monkeypatch)
    states = delivered(site, first := Pacs(), monkeypatch, hours=1)
    assert (states["sr"], states["rejection"], "rejection" in first.taken) == ("completed", "available", False)
    delivered(site, late := Pacs(), monkeypatch, hours=3)
    assert late.taken == ["sr"]
    assert delivered(site, Pacs(), monkeypatch, hours=4)["rejection"] == "completed"


def test_what_a_note_has_marked_is_not_missed_and_not_sent_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive hides it as it was asked to: to a query it is lost, and it will not have it back."""
    study_id = site.receive()
    tell(site.store, ADA, crp(5.0))
    site.analyze()
    delivered(site, Pacs(), monkeypatch)
    with site.store.begin() as conn:
        (old,) = (one for one in documents.delivered(conn, destination="pacs", since=NOW) if kind_of(conn, one.document_id) == "sr")
        owed = sa.select(job).where(job.c.id == old.id)
        held = conn.execute(owed).one()
        conn.execute(sa.insert(commitment).values(job_id=held.id, transaction_uid="2.25.7", state="asked", asked_at=NOW, look_at=NOW))
    corrected_value(site)
    site.analyze()
    delivered(site, Pacs(), monkeypatch)
    with site.store.read() as conn:
        assert len(documents.delivered(conn, destination="pacs", since=NOW)) == len(KINDS) - 1 + len(KINDS) - 1
    assert delivered(site, Pacs(), monkeypatch, hours=1)["rejection"] == "completed"
    with site.store.begin() as conn:
        there = documents.delivered(conn, destination="pacs", since=NOW)
        assert sorted(kind_of(conn, one.document_id) for one in there) == sorted(KINDS)
        (late,) = commitments.overdue(conn, destination="pacs", limit=9, now=NOW)
        commitments.looked(conn, late[0], is_found=False, now=NOW)
        assert conn.execute(owed).one().state == "completed"
        assert study_id == old.study_id


def test_a_dead_letter_that_is_put_back_after_its_note_is_not_sent(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """`synoptic retry` puts back all of a study: an old report would come last, unmarked."""
    study_id = site.receive()
    tell(site.store, ADA, crp(5.0))
    site.analyze()
    assert delivered(site, Pacs(refuses="sr"), monkeypatch)["sr"] == "available"
    old = sa.select(document.c.id).where(document.c.kind == "sr", document.c.input_version == 1)
    with site.store.begin() as conn:
        conn.execute(sa.update(job).where(job.c.document_id.in_(old)).values(state="discarded"))
    corrected_value(site)
    site.analyze()
    delivered(site, Pacs(), monkeypatch)
    assert delivered(site, Pacs(), monkeypatch, hours=1)["rejection"] == "completed"
    with site.store.begin() as conn:
        assert queue.operator_retry(conn, study_id, now=NOW) == 1
    delivered(site, door := Pacs(), monkeypatch, hours=2)
    assert door.taken == []
    with site.store.read() as conn:
        assert conn.execute(sa.select(job.c.state).where(job.c.document_id.in_(old))).scalars().all() == ["cancelled"]
        assert conn.execute(sa.select(ledger.standing().c.account)).scalars().all() == ["delivered"]


@pytest.mark.parametrize("state", ["discarded", "available", "leased", "completed"])
def test_what_a_destination_is_not_to_get_any_more_is_owed_to_nobody(state: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A form that a PACS refuses: its dead letters go with the kind from `documents`. What is in hand or done stays as it is."""
    study_id = site.receive()
    tell(site.store, ADA, crp(5.0))
    site.analyze()
    delivered(site, Pacs(refuses="keys"), monkeypatch)
    of_keys = job.c.document_id.in_(sa.select(document.c.id).where(document.c.kind == "keys"))
    with site.store.begin() as conn:
        conn.execute(sa.update(job).where(of_keys).values(state=state, lease_expires_at=NOW if state == "leased" else None))
        (number,) = conn.scalars(sa.select(job.c.id).where(of_keys))
        conn.execute(sa.insert(commitment).values(job_id=number, transaction_uid="2.25.7", state="refused", asked_at=NOW, look_at=NOW))
    is_taken_back = state in {"discarded", "available"}
    with site.store.read() as conn:
        assert withdrawal.unnamed(conn, {"pacs": KINDS}) == []
        owed = withdrawal.unnamed(conn, {"pacs": {*KINDS} - {"keys"}, "another": ()})
        assert [(row.destination, row.kind, row.available + row.discarded) for row in owed] == [("pacs", "keys", 1)] * is_taken_back
    assert sum(withdrawal.take_back(site.store, "another", kinds={"sr"}, now=NOW)) == 0
    assert sum(withdrawal.take_back(site.store, "pacs", kinds=KINDS, now=NOW)) == 0
    assert sum(withdrawal.take_back(site.store, "pacs", kinds={*KINDS} - {"keys"}, now=NOW)) == is_taken_back
    with site.store.read() as conn:
        kinds = sorted(one.document for one in queue.of_study(conn, study_id) if one.kind == "deliver")
        assert kinds == sorted({*KINDS} - {"rejection"} - ({"keys"} if is_taken_back else set()))
        assert conn.scalar(sa.select(ledger.standing().c.account)) == ("in flight" if state == "leased" else "delivered")
        said = [one.facts for one in history.of_study(conn, study_id) if one.name == "deliver.withdrawn"]
        assert [(one["document"], one["destination"], one["was"]) for one in said] == ([("keys", "pacs", state)] if is_taken_back else [])


def kind_of(conn: sa.Connection, document_id: int) -> str:
    return documents.load(conn, document_id).kind


def test_the_old_report_stays_unmarked_where_the_new_one_was_given_up(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A person looks at one dead letter and finds both; `synoptic retry` puts both back."""
    site.receive()
    tell(site.store, ADA, crp(5.0))
    site.analyze()
    delivered(site, Pacs(), monkeypatch)
    corrected_value(site)
    site.analyze()
    with site.store.begin() as conn:
        root = sa.select(document.c.id).where(document.c.kind == "sr", document.c.input_version == 2)
        conn.execute(sa.update(job).where(job.c.document_id.in_(root)).values(state="discarded"))
    assert delivered(site, door := Pacs(), monkeypatch)["rejection"] == "discarded"
    assert "rejection" not in door.taken


def test_a_form_that_could_not_be_written_is_a_dead_letter_and_the_study_no_delivered_one(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a notice nobody was told what is critical, of a message the RIS has nothing: a line in the log is not enough."""

    def fails(_result: Result) -> tuple[Document, ...]:
        raise KeyError("Rows")

    monkeypatch.setitem(cast("dict[str, object]", forms.BUILDERS), "keys", fails)
    site.receive()
    tell(site.store, ADA, crp(5.0))
    site.analyze()
    states = delivered(site, door := Pacs(), monkeypatch)
    assert (states["keys"], states["sr"], states["gsps"]) == ("discarded", "completed", "completed")
    assert "keys" not in door.taken
    with site.store.read() as conn:
        one = ledger.standing()
        (row,) = conn.execute(sa.select(one.c.account, one.c.reason)).all()
    assert row.account == "failed"
    assert row.reason == "This form of the result, keys, could not be written and is not sent; the log says where it failed."
