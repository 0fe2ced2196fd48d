"""What a daemon meets in a hospital: each a clear status or a clear line in `synoptic show`, no traceback, nothing lost."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom.uid import generate_uid

from tests import factories
from tests.installation import Installation
from tests.peers import dcmtk, require_shared
from worker.store import studies

pytestmark = [pytest.mark.peer, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """One daemon for all of them: after each it must still serve the next."""
    folder = tmp_path_factory.mktemp("bad")
    with Installation(folder, bundles=("cxr-severity",), quiet_s=0.5, processes=1, extra="") as installation:
        yield installation
        assert "Traceback" not in installation.log.read_text("utf-8")
        assert installation.events("role.restarted") == []


def send(installation: Installation, *paths: Path, called: str = "WORKER", calling: str = "MODALITY") -> subprocess.CompletedProcess[str]:
    return dcmtk("/usr/bin/storescu", "-v", "-R", "-aet", calling, "-aec", called, "127.0.0.1", str(installation.port), *map(str, paths))


def shown(installation: Installation, study_instance_uid: str, *, until: str) -> str:
    """What `synoptic show` prints, once the store holds a history line of this name."""

    def has() -> bool:
        return until in installation.cli("show", study_instance_uid).stdout

    from tests.installation import wait_until

    wait_until(has, timeout_s=60, what=f"{until} of the study", step_s=0.5)
    return installation.cli("show", study_instance_uid).stdout


def radiograph(folder: Path, name: str, **values: object) -> tuple[Path, str]:
    ds = factories.make_radiograph()
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    path = folder / f"{name}.dcm"
    factories.write(ds, path)
    return path, str(ds.StudyInstanceUID)


@pytest.mark.requirement("R6")
def test_a_wrong_ae_title_is_rejected_and_said(running: Installation, tmp_path: Path) -> None:
    path, _ = radiograph(tmp_path, "one")
    assert "Called AE Title Not Recognized" in send(running, path, called="WRONG").stdout
    assert "Calling AE Title Not Recognized" in send(running, path, calling="STRANGER").stdout
    assert len(running.wait_for_event("association.rejected", timeout_s=10, count=2)) >= 2


def test_a_truncated_file_is_refused_and_its_study_goes_on(running: Installation, tmp_path: Path) -> None:
    whole, uid = radiograph(tmp_path, "whole")
    half = tmp_path / "half.dcm"
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    sent = send(running, half)
    with running.store.read() as conn:
        received = studies.find(conn, uid)
    # Either DCMTK does not send it, or we answer a failure; in no case is half an image kept as a whole one.
    assert sent.returncode != 0 or not received or "could not be analysed" in shown(running, uid, until="infer.completed")
    assert send(running, whole).returncode == 0


def test_a_report_sent_to_us_is_stored_and_excluded_by_rule(running: Installation) -> None:
    path = require_shared("tools/sr_air.dcm")
    assert send(running, path).returncode == 0
    from pydicom import dcmread

    uid = str(dcmread(path, stop_before_pixels=True).StudyInstanceUID)
    assert "No bundle takes modality SR." in shown(running, uid, until="study.excluded")


def test_a_study_of_another_modality_is_excluded_by_rule(running: Installation, tmp_path: Path) -> None:
    for number, ds in enumerate(factories.make_ct()):
        factories.write(ds, tmp_path / f"{number}.dcm")
    assert send(running, *sorted(tmp_path.glob("*.dcm"))).returncode == 0
    assert "No bundle takes modality CT." in shown(running, str(ds.StudyInstanceUID), until="study.excluded")


@pytest.mark.requirement("F2")
def test_a_study_with_two_patients_is_held_for_a_person(running: Installation, tmp_path: Path) -> None:
    uid = generate_uid()
    first, _ = radiograph(tmp_path, "first", StudyInstanceUID=uid, PatientID="TWO-1", SOPInstanceUID=generate_uid())
    second, _ = radiograph(tmp_path, "second", StudyInstanceUID=uid, PatientID="TWO-2", SOPInstanceUID=generate_uid())
    assert send(running, first, second).returncode == 0
    said = shown(running, uid, until="infer.discarded")
    assert "two different patients" in said
    assert "TWO-1" not in said + running.log.read_text("utf-8")


def test_a_study_that_cannot_be_analysed_gets_a_report_that_says_why(running: Installation, tmp_path: Path) -> None:
    path, uid = radiograph(tmp_path, "knee", BodyPartExamined="KNEE", SOPInstanceUID=generate_uid(), StudyInstanceUID=generate_uid())
    assert send(running, path).returncode == 0
    assert "failure=" in shown(running, uid, until="infer.completed")


@pytest.mark.requirement("P9")
@pytest.mark.requirement("P13")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"PatientBirthDate": "20150102"}, "The patient is 9 years old; the bundle is meant for 18 to 120 years."),
        ({"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, "SCREEN SAVE, made of other images"),
    ],
    ids=["a child", "a screen capture"],
)
def test_what_the_bundle_is_not_meant_for_gets_a_report_that_says_which_rule_decided(
    running: Installation, tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    path, uid = radiograph(tmp_path, "film", SOPInstanceUID=generate_uid(), StudyInstanceUID=generate_uid(), **changes)
    assert send(running, path).returncode == 0
    said = " ".join(shown(running, uid, until="infer.completed").split())
    assert "failure=" in said
    assert reason in said


@pytest.mark.requirement("S3")
def test_a_full_disk_is_answered_a700_and_nothing_is_lost(tmp_path: Path) -> None:
    """The spool on a file system of 24 MB; when there is room again it goes on by itself."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(small)], check=False).returncode:
        pytest.skip("mounting a tmpfs needs root; CI has it") if not os.environ.get("CI") else pytest.fail("CI cannot mount a tmpfs")
    try:
        with Installation(small, bundles=("cxr-severity",), quiet_s=0.5, processes=1) as installation:
            path, uid = radiograph(tmp_path, "one", SOPInstanceUID=generate_uid(), StudyInstanceUID=generate_uid())
            ballast = small / "ballast"
            ballast.write_bytes(b"x" * (shutil.disk_usage(small).free - 8 * 2**20))
            sent = send(installation, path)
            assert "0xa700" in sent.stdout.lower() or "OutOfResources" in sent.stdout
            with installation.store.read() as conn:
                assert studies.find(conn, uid) == []
            ballast.unlink()
            assert send(installation, path).returncode == 0
            assert "study.received" in installation.cli("show", uid).stdout
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)


@pytest.mark.requirement("D6")
def test_an_absent_database_is_one_sentence_and_an_exit_code(tmp_path: Path) -> None:
    installation = Installation(tmp_path, database="postgresql+psycopg://nobody@127.0.0.1:1/none")
    installation.write_config()
    for verb in ("all", "status"):
        done = installation.cli(verb)
        assert done.returncode == 69
        assert "The database is not available" in done.stderr
        assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.requirement("D6")
def test_a_lost_database_beside_a_full_spool_is_never_replaced_by_an_empty_one(tmp_path: Path) -> None:
    installation = Installation(tmp_path)
    installation.write_config()
    path = tmp_path / "data" / "spool" / "instances" / "00" / "x.dcm"
    path.parent.mkdir(parents=True)
    path.touch()
    for verb in ("migrate", "all"):  # `synoptic status` names the first; the second would then start, and put the images away
        done = installation.cli(verb)
        assert done.returncode == 69, verb
        assert "restore it from its backup" in done.stderr


@pytest.mark.requirement("D6")
@pytest.mark.parametrize("what", ["file", "page"])
def test_a_damaged_database_is_one_sentence_for_every_verb(tmp_path: Path, what: str) -> None:
    """The header, which ends the start, and a page of studies, which is met by whoever reads them: a receiver answers 0xA700 then."""
    installation = Installation(tmp_path, bundles=())
    installation.write_config()
    installation.cli("migrate")
    path = tmp_path / "data" / "synoptic.db"
    with sqlite3.connect(path) as conn:
        ((page,), (size,)) = (
            conn.execute(sql).fetchone() for sql in ("SELECT rootpage FROM sqlite_master WHERE name = 'study'", "PRAGMA page_size")
        )
    conn.close()
    start, end = (0, 100) if what == "file" else ((page - 1) * size, page * size)
    whole = path.read_bytes()
    path.write_bytes(whole[:start] + b"\x55" * (end - start) + whole[end:])
    for verb in ("all", "status") if what == "file" else ("status",):
        done = installation.cli(verb)
        assert done.returncode == 69
        assert "Restore it from its backup" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, "no traceback"
