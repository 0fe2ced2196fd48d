"""A planted patient goes through the whole line; nothing of him may be in the log or in a file's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import factories
from tests.installation import Installation
from tests.peers import dcmtk, orthanc
from worker.domain import PatientKey
from worker.intake import mllp

pytestmark = [pytest.mark.peer, pytest.mark.timeout(300)]

NAME, IDENTITY, BIRTH, ACCESSION = "Zzyzxplant^Quillon", "PLANTED-77345", "19330224", "ACC-PLANT-9"


@pytest.mark.requirement("X1")
def test_a_planted_patient_is_in_no_log_line_and_no_file_name(tmp_path: Path) -> None:
    """Good and bad input alike, at DEBUG, with a PACS that refuses: errors are where names leak."""
    (tmp_path / "orthanc").mkdir()
    installation = Installation(tmp_path / "worker", bundles=("cxr-severity",), quiet_s=0.5, processes=1, extra='[log]\nlevel = "DEBUG"\n')
    good = factories.make_radiograph(patient=PatientKey("SITE", IDENTITY), accession_number=ACCESSION)
    good.PatientName, good.PatientBirthDate = NAME, BIRTH
    factories.write(good, tmp_path / "good.dcm")
    bad = factories.make_radiograph(patient=PatientKey("SITE", IDENTITY), accession_number=ACCESSION, seed=1)
    bad.PatientName, bad.PatientBirthDate, bad.BodyPartExamined = NAME, BIRTH, "KNEE"
    factories.write(bad, tmp_path / "bad.dcm")
    head = "MSH|^~\\&|LAB|SITE|X|Y|20240102||ORU^R01^ORU_R01|{}|P|2.5.1\rPID|1||" + f"{IDENTITY}^^^SITE^MR||{NAME}||{BIRTH}|M\r"
    messages = [
        (head.format(1) + "OBR|1||5|LAB^L^L|||20240102060000\rOBX|1|NM|1988-5^CRP^LN||7|mg/L^mg/L^UCUM|||||F|||20240102060000\r").encode(),
        (head.format(2) + f"OBR|1||6|LAB^L^L|||{NAME}\rOBX|1|NM|1988-5^CRP^LN||{NAME}|mg/L|||||F|||{NAME}\r").encode(),
        f"MSH|^~\\&|LAB|SITE|X|Y|{NAME}||{NAME}|3|P|2.5.1\rPID|1||{IDENTITY}\r".encode(),
    ]
    # A PACS that refuses reports from us.
    with orthanc(tmp_path / "orthanc", callers={"SOMEBODY": 1}) as pacs:
        installation.orthanc = pacs
        with installation:
            mllp.send(("127.0.0.1", installation.mllp_port), messages, timeout_s=30)
            for name in ("good.dcm", "bad.dcm"):
                sent = dcmtk(
                    "/usr/bin/storescu",
                    "-R",
                    "-aet",
                    "MODALITY",
                    "-aec",
                    "WORKER",
                    "127.0.0.1",
                    str(installation.port),
                    str(tmp_path / name),
                )
                assert sent.returncode == 0, sent.stdout
            installation.wait_for_event("job.completed", timeout_s=90, count=2)
            installation.wait_for_event("job.retried", timeout_s=60)
            shown = installation.cli("studies").stdout + installation.cli("show", "1").stdout + installation.cli("status", "--json").stdout
    said = installation.log.read_text("utf-8") + shown
    names = "\n".join(str(path.relative_to(tmp_path)) for path in (tmp_path / "worker").rglob("*"))
    for planted in (*NAME.split("^"), IDENTITY, BIRTH, ACCESSION):
        assert planted not in said
        assert planted not in names
    database = (tmp_path / "worker" / "data" / "synoptic.db").read_bytes()
    assert IDENTITY.encode() in database, "the plant never arrived: the test would prove nothing"
