"""The main job on real input: radiographs and their records in, as many reports in the PACS, nothing else.

Figures are printed as one JSON line each (`pytest -s`); bounds here are what must never be missed,
the aims are in deploy/README.md beside what was measured.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from pydicom import dcmread

from tests import accept
from tests.installation import Installation
from tests.peers import Orthanc, orthanc, require
from worker.store import records

pytestmark = [pytest.mark.peer, pytest.mark.slow, pytest.mark.timeout(2400)]

#: PixelMed needs seconds a report; `make gate` runs it on all of them.
JAVA_SAMPLE = int(os.environ.get("JAVA_SAMPLE", "3"))
#: Every second study of the cohort goes through SQLite, the others through PostgreSQL; `make gate` (1) sends all through both.
STEP = int(os.environ.get("STEP", "2"))


def prepare(tmp_path: Path, **settings: object) -> tuple[Installation, Path]:
    installation = Installation(tmp_path / "worker", bundles=("cxr-severity",), **settings)  # type: ignore[arg-type]
    (tmp_path / "orthanc").mkdir()
    return installation, tmp_path / "orthanc"


def check_reports(pacs: Orthanc, shared: Path, files: dict[str, Path], found: dict[str, list[Path]]) -> None:
    """One report a study, each its own patient's, clean by every gate, with no value of the future."""
    assert set(found) == set(files)
    assert {len(paths) for paths in found.values()} == {1}
    times = accept.study_times(shared)
    late = 0
    for uid, (path,) in found.items():
        report, source = dcmread(path), dcmread(files[uid], stop_before_pixels=True)
        assert (report.PatientID, report.IssuerOfPatientID) == (source.PatientID, source.IssuerOfPatientID)
        used = accept.observation_times(report)
        late += sum(at > times[uid] for at in used)
    assert late == 0
    assert accept.gate(shared, found, files, java=JAVA_SAMPLE) == []
    sample = sorted(files)[:: max(1, len(files) // 5)]
    assert all("(0020,000e)" in accept.find_by_cfind(pacs, uid) for uid in sample)


def test_every_study_that_is_sent_gets_its_report_and_a_second_run_makes_nothing_new(tmp_path: Path, shared: Path) -> None:
    """With SQLite, forwarded by Orthanc as a PACS does, in one burst."""
    require("findscu")
    installation, folder = prepare(tmp_path)
    files = dict(list(accept.cohort(shared).items())[STEP - 1 :: STEP])
    with orthanc(folder, callers={"WORKER": installation.port}) as pacs:
        installation.orthanc = pacs
        accept.upload(pacs, files)
        with installation:
            accept.send_records(installation, shared, files)
            started = time.monotonic()
            accept.forward(pacs, installation, files)
            accept.wait_for_reports(pacs, len(files), timeout_s=300)
            seconds = time.monotonic() - started
            print(
                json.dumps({"bench": "burst", "database": "sqlite", "studies": len(files), "studies_per_s": round(len(files) / seconds, 2)})
            )
            first = accept.fetch(pacs, tmp_path / "reports")
            # Again: images and messages as before. Validators and worker then have a core each.
            accept.send_records(installation, shared, files)
            accept.forward(pacs, installation, files)
            check_reports(pacs, shared, files, first)
            assert any(accept.observation_times(dcmread(paths[0])) for paths in first.values())
            installation.wait_idle()
            again = accept.fetch(pacs, tmp_path / "again")
            assert {uid: [p.name for p in paths] for uid, paths in again.items()} == {
                uid: [p.name for p in paths] for uid, paths in first.items()
            }
            assert installation.events("job.discarded") == []
        assert installation.process is None


def test_the_same_with_postgresql(tmp_path: Path, shared: Path, postgres_url: str) -> None:
    installation, folder = prepare(tmp_path, database=postgres_url)
    files = dict(list(accept.cohort(shared).items())[::STEP])
    with orthanc(folder, callers={"WORKER": installation.port}) as pacs:
        installation.orthanc = pacs
        accept.upload(pacs, files)
        installation.write_config()
        assert installation.cli("migrate").returncode == 0
        with installation:
            accept.send_records(installation, shared, files)
            started = time.monotonic()
            accept.forward(pacs, installation, files)
            accept.wait_for_reports(pacs, len(files), timeout_s=300)
            seconds = time.monotonic() - started
            print(
                json.dumps(
                    {"bench": "burst", "database": "postgresql", "studies": len(files), "studies_per_s": round(len(files) / seconds, 2)}
                )
            )
        check_reports(pacs, shared, files, accept.fetch(pacs, tmp_path / "reports"))


def test_a_study_of_each_issuer_gets_only_its_own_record(tmp_path: Path, shared: Path) -> None:
    """The same patient ID under another issuer is another patient: nothing is joined, and the report says so."""
    installation, folder = prepare(tmp_path, quiet_s=0.5, extra="")
    files = accept.cohort(shared, limit=1)
    ((uid, path),) = files.items()
    with orthanc(folder, callers={"WORKER": installation.port}) as pacs:
        installation.orthanc = pacs
        accept.upload(pacs, files)
        installation.write_config()
        installation.config.write_text(installation.config.read_text().replace("[records]", '[records]\nissuers = { MHH = "OTHER" }'))
        with installation:
            assert accept.send_records(installation, shared, files) > 1
            accept.forward(pacs, installation, files)
            installation.wait_for_event("job.snoozed", timeout_s=30)
            store = installation.store
            with store.read() as conn:
                source = dcmread(path, stop_before_pixels=True)
                study = accept.study_key(source)
                assert records.view(conn, study, as_of=accept.study_times(shared)[uid]) is None
            store.close()
