"""The README's first command, smaller: the daemon in its own processes, phantom patients, reports back and right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from worker.demo.show import BUNDLE


@pytest.mark.timeout(180)
def test_the_demo_ends_with_every_report_there_and_right(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "worker", "demo", "--cases", "4", "--folder", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert "4 of 4 reports are there and right." in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]
    assert done.returncode == 0
    assert "Imaging Measurement Report" in done.stdout
    assert "marker" in done.stdout, "the fourth patient lacks a value, and the table says so"


@pytest.mark.timeout(180)
def test_a_demo_whose_reports_are_wrong_says_so_and_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check must be able to fail: a truth turned round is a fault, and a missing report is one."""
    from pydicom import Dataset

    from worker.demo import show
    from worker.demo.phantom import make_case

    assert BUNDLE.is_dir()
    case = make_case(1, absent=frozenset())
    report = Dataset()
    report.StudyInstanceUID, report.PatientID = case.study_instance_uid, "SOMEBODY-ELSE"
    assert show.faults_of(case, None) == ["no report arrived"]
    faults = show.faults_of(case, report)
    assert "the report is of another study or patient" in faults
    assert any("missing" in fault for fault in faults)


def test_a_demo_whose_daemon_does_not_come_up_names_the_role_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from worker.demo import show
    from worker.errors import PeerUnavailable

    monkeypatch.setattr(show, "READY_S", 0.2)
    log = tmp_path / "daemon.log"
    log.write_text('{"event": "role.started", "role": "receive"}\n')
    with pytest.raises(PeerUnavailable, match=r"not ready within 0\.2 s, for want of deliver, run; "):
        show._wait_ready(log, roles={"receive", "run", "deliver"})
