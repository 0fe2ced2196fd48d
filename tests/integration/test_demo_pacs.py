"""The demo PACS as others see it: DCMTK's tools, our own senders, a restart."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from tests import peers
from worker.deliver import cstore
from worker.deliver.wire import open_file
from worker.demo.pacs import DemoPacs, Stored, forward
from worker.domain import Document


def make_slices(folder: Path, *, count: int, study: str, patient_name: str = "Phantom^One") -> list[Path]:
    """Write a series of tiny CT slices."""
    paths, series = [], generate_uid()
    for k in range(count):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SpecificCharacterSet = "ISO_IR 100"
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, generate_uid()
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.Modality = study, series, "CT"
        ds.PatientID, ds.PatientName, ds.StudyDate, ds.InstanceNumber = "TEST1", patient_name, "20260102", k + 1
        ds.Rows, ds.Columns, ds.PixelData = 2, 2, bytes(8)
        ds["PixelData"].VR = "OW"
        path = folder / f"{study}.{k}.dcm"
        ds.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[DemoPacs]:
    """Return a running demo PACS."""
    with DemoPacs(tmp_path / "pacs") as running:
        yield running


def test_what_is_forwarded_is_stored_announced_and_counted(pacs: DemoPacs, tmp_path: Path) -> None:
    """The demo's clock runs from the last response to the report's arrival: both must be told."""
    study, statuses = generate_uid(), list[int]()
    paths = make_slices(tmp_path, count=5, study=study)
    sent = forward(paths, peer=pacs.peer("SENDER"), on_response=statuses.append)
    assert pacs.wait_for(lambda: len(pacs.instances(study)) == 5, timeout_s=10)
    assert list(sent.statuses) == statuses == [0] * 5
    stored = pacs.instances(study)
    assert [open_file(s.path.read_bytes()).data for s in stored] == [open_file(p.read_bytes()).data for p in paths]
    assert stored[-1].arrived_at <= sent.responded_at
    assert cstore.count_instances(pacs.peer("ANYBODY"), study_instance_uid=study) == 5


def test_waiting_for_what_does_not_come_ends(pacs: DemoPacs) -> None:
    """A demo that waits for ever tells nobody that a report is missing."""
    assert not pacs.wait_for(lambda: bool(pacs.instances()), timeout_s=0.01)


def test_each_new_instance_is_announced_once(tmp_path: Path) -> None:
    """The same object again is Success without a second file; other bytes under its UID are a duplicate."""
    seen: list[Stored] = []
    [path] = make_slices(tmp_path, count=1, study=generate_uid())
    ds = dcmread(path)
    ds.PatientName = "Phantom^Two"
    changed = tmp_path / "changed.dcm"
    ds.save_as(changed)
    with DemoPacs(tmp_path / "pacs", on_store=seen.append) as pacs:
        sent = forward([path, path, changed], peer=pacs.peer("SENDER"))
        assert sent.statuses == (0, 0, 0x0111)
        assert list(seen) == list(pacs.instances())
    assert len(seen) == 1


def test_a_study_is_forwarded_from_pacs_to_pacs_as_it_is(pacs: DemoPacs, tmp_path: Path) -> None:
    """A routing rule does the same; the worker's receiver stands where the second PACS does."""
    study = generate_uid()
    forward(make_slices(tmp_path, count=3, study=study), peer=pacs.peer("MODALITY"))
    forward(make_slices(tmp_path, count=2, study=generate_uid()), peer=pacs.peer("MODALITY"))
    with DemoPacs(tmp_path / "other", ae_title="OTHER") as other:
        assert pacs.forward(study, peer=other.peer("IGNORED")).statuses == (0, 0, 0)
        assert [s.sop_instance_uid for s in other.instances()] == [s.sop_instance_uid for s in pacs.instances(study)]


def test_files_from_before_are_served_again(pacs: DemoPacs, tmp_path: Path) -> None:
    """A user who looks at the demo's folder the next day finds a PACS that knows it."""
    forward(make_slices(tmp_path, count=2, study=generate_uid()), peer=pacs.peer("MODALITY"))
    before = {s.sop_instance_uid for s in pacs.instances()}
    assert {s.sop_instance_uid for s in DemoPacs(pacs.folder).instances()} == before


def test_a_report_is_delivered_and_read_back(pacs: DemoPacs) -> None:
    """The demo's own last step, with the worker's own sender."""
    data = peers.require_shared("tools/sr_air.dcm").read_bytes()
    document = Document(open_file(data).sop_instance_uid, peers.COMPREHENSIVE_3D_SR, "sr", data)
    assert cstore.send([document], peer=pacs.peer("WORKER"))[0].delivered
    assert [s.modality for s in pacs.instances()] == ["SR"]


@pytest.mark.peer
def test_dcmtk_stores_finds_and_gets(pacs: DemoPacs, tmp_path: Path) -> None:
    """Three programs of another house speak with it, in names of more than ASCII too."""
    study = generate_uid()
    paths = make_slices(tmp_path, count=3, study=study, patient_name="Müller^Jürgen")
    forward(make_slices(tmp_path, count=1, study=generate_uid()), peer=pacs.peer("MODALITY"))
    called = ["-aet", "DCMTK", "-aec", pacs.ae_title]
    address = ["127.0.0.1", str(pacs.port)]
    stored = peers.dcmtk("storescu", *called, *address, *map(str, paths))
    assert stored.returncode == 0, stored.stdout
    keys = {"QueryRetrieveLevel": "STUDY", "PatientName": "M*", "StudyDate": "20260101-20260131", "StudyInstanceUID": ""}
    keys |= {"NumberOfStudyRelatedInstances": "", "NumberOfStudyRelatedSeries": "", "ModalitiesInStudy": ""}
    options = [part for key, value in keys.items() for part in ("-k", f"{key}={value}")]
    answers = tmp_path / "answers"
    answers.mkdir()
    asked = peers.dcmtk("findscu", "-S", "-X", "-od", str(answers), *called, *options, *address)
    assert asked.returncode == 0, asked.stdout
    [answer] = [dcmread(path) for path in answers.iterdir()]
    assert answer.StudyInstanceUID == study
    assert answer.PatientName == "Müller^Jürgen"
    assert (answer.NumberOfStudyRelatedInstances, answer.NumberOfStudyRelatedSeries, answer.ModalitiesInStudy) == (3, 1, "CT")
    got = tmp_path / "got"
    got.mkdir()
    options = ["-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={study}"]
    fetched = peers.dcmtk("getscu", "-S", "-od", str(got), *called, *options, *address)
    assert fetched.returncode == 0, fetched.stdout
    sent = {dcmread(BytesIO(path.read_bytes())).SOPInstanceUID for path in paths}
    assert {dcmread(path).SOPInstanceUID for path in got.iterdir()} == sent


@pytest.mark.peer
def test_a_wrong_title_is_turned_away(pacs: DemoPacs) -> None:
    """The commonest mistake of an installation behaves here as it does with a real PACS."""
    answer = peers.dcmtk("echoscu", "-aet", "DCMTK", "-aec", "WRONG", "127.0.0.1", str(pacs.port))
    assert answer.returncode != 0
    assert "Called AE Title Not Recognized" in answer.stdout
