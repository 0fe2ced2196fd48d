"""A late image makes a new version and a report that names its predecessor; a file import is a network message's twin."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import generate_uid

from tests import accept, factories
from tests.installation import Installation, wait_until
from tests.peers import Orthanc, orthanc
from worker.deliver.cstore import Peer
from worker.demo.pacs import forward

pytestmark = [pytest.mark.peer, pytest.mark.timeout(300)]


def store(installation: Installation, path: Path) -> None:
    sent = forward([path], peer=Peer("worker", "WORKER", "127.0.0.1", installation.port, "MODALITY"))
    assert set(sent.statuses) == {0}


def reports(pacs: Orthanc) -> list[Dataset]:
    found = [dcmread(io.BytesIO(pacs.file(one))) for one in pacs.instances()]
    return sorted((ds for ds in found if ds.Modality == "SR"), key=lambda ds: str(ds.ContentDate) + str(ds.ContentTime))


@pytest.mark.requirement("R19")
def test_a_late_series_makes_a_new_report_that_names_its_predecessor(tmp_path: Path, shared: Path) -> None:
    (tmp_path / "orthanc").mkdir()
    installation = Installation(tmp_path / "worker", bundles=("cxr-severity",), quiet_s=0.5, processes=1)
    ((_, path),) = accept.cohort(shared, limit=1).items()
    late = dcmread(path)
    late.SOPInstanceUID = late.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    late.SeriesInstanceUID = "1." + str(late.SeriesInstanceUID)[2:]  # sorts first, so that the network is given this one
    late.save_as(tmp_path / "late.dcm", enforce_file_format=True)
    with orthanc(tmp_path / "orthanc", callers={"WORKER": installation.port}) as pacs:
        installation.orthanc = pacs
        with installation:
            accept.send_records(installation, shared, {"": path})
            store(installation, path)
            wait_until(lambda: len(reports(pacs)) == 1, timeout_s=60, what="the first report")
            store(installation, tmp_path / "late.dcm")
            wait_until(lambda: len(reports(pacs)) == 2, timeout_s=60, what="the second report")
            shown = installation.cli("show", "1").stdout
        first, second = reports(pacs)
    assert "study.reopened" in shown
    referenced = second.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
    assert referenced.ReferencedSOPInstanceUID == first.SOPInstanceUID
    assert "PredecessorDocumentsSequence" not in first


def test_files_imported_twice_are_one_study_one_record_and_no_report_more(tmp_path: Path, shared: Path) -> None:
    """FHIR for the record, a folder for the images; the second import changes nothing."""
    installation = Installation(tmp_path / "worker", bundles=("cxr-severity",), extra='[log]\nlevel = "INFO"\n', quiet_s=0.5, processes=1)
    installation.write_config()
    installation.config.write_text(installation.config.read_text().replace("[records]", '[records]\nschemes = { "urn:mhh:lab" = "L" }'))
    ((_, path),) = accept.cohort(shared, limit=1).items()
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "image").write_bytes(path.read_bytes())
    (folder / "record.json").write_bytes((shared / "data" / "cxr-severity" / "fhir" / f"{path.parent.name}.json").read_bytes())
    (folder / "notes.txt").write_text("neither DICOM, HL7 nor FHIR")
    assert installation.cli("migrate").returncode == 0
    first = installation.cli("import", str(folder))
    assert first.returncode == 1
    assert "Neither DICOM" in first.stdout
    assert "instance stored" in first.stdout
    with installation:
        installation.wait_for_event("job.completed", timeout_s=60)
        again = installation.cli("import", str(folder))
        assert "instance duplicate" in again.stdout
        assert re.search(r"fact added\s+│\s+0\s", again.stdout)
        installation.wait_idle()
        assert len(installation.events("job.completed")) == 1
        shown = installation.cli("show", "1", "--report").stdout
    assert "C reactive protein" in shown


@pytest.mark.requirement("Q5")
def test_the_same_input_makes_the_same_bytes(tmp_path: Path, shared: Path) -> None:
    """Retried by an operator, the job writes the very object it wrote before: same UID, same digest."""
    installation = Installation(tmp_path / "worker", bundles=("cxr-severity",), quiet_s=0.5, processes=1)
    files = accept.cohort(shared, limit=1)
    with installation:
        accept.send_records(installation, shared, files)
        store(installation, next(iter(files.values())))
        installation.wait_for_event("job.completed", timeout_s=60)
        opened = installation.store
        with opened.begin() as conn:
            before = conn.exec_driver_sql("SELECT sop_instance_uid, sha256 FROM document").one()
            conn.exec_driver_sql("DELETE FROM finding")
            conn.exec_driver_sql("DELETE FROM document")
            conn.exec_driver_sql("UPDATE job SET state = 'available', finished_at = NULL")
        installation.wait_for_event("job.completed", timeout_s=60, count=2)
        with opened.read() as conn:
            after = conn.exec_driver_sql("SELECT sop_instance_uid, sha256 FROM document").one()
        opened.close()
    assert tuple(before) == tuple(after)


def test_generated_uids_of_the_factories_differ() -> None:
    """The tests above would prove nothing if all their images were one."""
    uids = {ds.SOPInstanceUID for seed in range(5) for ds in factories.make_ct(seed=seed)}
    assert len(uids) == 20


@pytest.mark.requirement("S6")
def test_a_file_damaged_on_our_disk_is_a_dead_letter_that_a_resend_and_a_retry_heal(tmp_path: Path, shared: Path) -> None:
    """Our disk's fault is nobody's finding: no report says so, and the study gets its analysis in the end."""
    installation = Installation(tmp_path / "worker", bundles=("cxr-severity",), quiet_s=2.0, processes=1)
    ((_, path),) = accept.cohort(shared, limit=1).items()
    with installation:
        accept.send_records(installation, shared, {"": path})
        store(installation, path)
        (stored,) = (installation.folder / "data" / "spool" / "instances").rglob("*.dcm")
        whole = stored.read_bytes()
        stored.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        (lost,) = installation.wait_for_event("job.discarded", timeout_s=60)
        assert "have the study sent again, then retry" in str(lost["reason"])
        assert installation.events("job.completed") == []
        store(installation, path)
        assert stored.read_bytes() == whole
        assert installation.cli("retry", "1").returncode == 0
        installation.wait_for_event("job.completed", timeout_s=60)
