"""The main job on real input: cxr-severity from Orthanc and over MLLP, and 188 reports back in Orthanc."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from datetime import datetime, timedelta, timezone
from pathlib import Path

from pydicom import Dataset, dcmread

from tests.installation import Installation, wait_until
from tests.peers import Orthanc
from worker.domain import PatientKey
from worker.intake import mllp

ZONE = timezone(timedelta(hours=1))


def cohort(shared: Path, *, limit: int | None = None) -> dict[str, Path]:
    """Study Instance UID → file, in a stable order."""
    paths = sorted((shared / "data" / "cxr-severity" / "dicom").rglob("*.dcm"))[:limit]
    return {str(dcmread(path, stop_before_pixels=True, specific_tags=["StudyInstanceUID"]).StudyInstanceUID): path for path in paths}


def upload(orthanc: Orthanc, files: dict[str, Path]) -> None:
    """Put the studies into Orthanc, by its REST interface."""
    for path in files.values():
        orthanc.post("/instances", path.read_bytes())


def send_records(installation: Installation, shared: Path, files: dict[str, Path]) -> int:
    """The patients' HL7 over MLLP; returns how many messages were answered AA."""
    patients = sorted({path.parent.name for path in files.values()})
    messages = [
        m for name in patients for m in mllp.split_messages((shared / "data" / "cxr-severity" / "hl7" / f"{name}.hl7").read_bytes())
    ]
    codes = mllp.send(("127.0.0.1", installation.mllp_port), messages, timeout_s=60)
    assert set(codes) <= {"AA", "CA"}, set(codes)
    return len(codes)


def forward(orthanc: Orthanc, installation: Installation, files: dict[str, Path], *, patient: bool = True) -> None:
    """As a PACS does: Orthanc sends each study to our AE title, again until it was taken."""
    for uid in files:
        body = f'{{"Resources": ["{_lookup(orthanc, uid)}"], "Synchronous": true, "Permissive": false}}'.encode()
        for _ in range(200):
            request = urllib.request.Request(f"http://127.0.0.1:{orthanc.http_port}/modalities/worker/store", data=body, method="POST")
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    response.read()
                    break
            except urllib.error.HTTPError:
                if not patient:
                    raise
                time.sleep(0.25)
        else:
            raise AssertionError("The worker took no association within 50 s.")


def _lookup(orthanc: Orthanc, uid: str) -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{orthanc.http_port}/tools/lookup", data=uid.encode(), method="POST")
    with urllib.request.urlopen(request, timeout=30) as response:
        found = [one["ID"] for one in json.load(response) if one["Type"] == "Study"]
    return str(found[0])


def reports(orthanc: Orthanc) -> dict[str, list[str]]:
    """Study Instance UID → SOP Instance UIDs of its reports, by QIDO-RS."""
    found: dict[str, list[str]] = {}
    for row in orthanc.qidos("instances", Modality="SR", limit="100000"):
        found.setdefault(row["0020000D"]["Value"][0], []).append(row["00080018"]["Value"][0])
    return found


def wait_for_reports(orthanc: Orthanc, count: int, *, timeout_s: float) -> None:
    """Until so many studies have a report."""
    wait_until(lambda: len(reports(orthanc)) >= count, timeout_s=timeout_s, what=f"{count} studies with a report in Orthanc", step_s=0.5)


def fetch(orthanc: Orthanc, folder: Path) -> dict[str, list[Path]]:
    """Every report as Orthanc holds it, as files: Study Instance UID → paths."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Path]] = {}
    for orthanc_id in orthanc.instances():
        data = orthanc.file(orthanc_id)
        ds = dcmread(io.BytesIO(data), stop_before_pixels=True, specific_tags=["Modality", "StudyInstanceUID"])
        if ds.Modality == "SR":
            path = folder / f"{orthanc_id}.dcm"
            path.write_bytes(data)
            found.setdefault(str(ds.StudyInstanceUID), []).append(path)
    return found


def gate(shared: Path, found: dict[str, list[Path]], files: dict[str, Path], *, java: int) -> list[str]:
    """srgate.py on every report with its source; with PixelMed (seconds each) on the first `java` of them."""
    sys.path.insert(0, str(shared / "tools"))
    import srgate  # type: ignore[import-not-found]

    tasks = [(str(path), str(files[uid]), index < java) for index, (uid, paths) in enumerate(sorted(found.items())) for path in paths]
    complaints: list[str] = []

    def work(share: list[tuple[str, str, bool]]) -> None:
        for report, source, with_java in share:
            complaints.extend(f"{tool}: {said}" for tool, said in srgate.validate(report, [source], with_java))

    threads = [threading.Thread(target=work, args=(tasks[n :: os.cpu_count() or 2],)) for n in range(os.cpu_count() or 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return complaints


def content(ds: Dataset) -> list[Dataset]:
    """All content items of a report, in order."""
    items: list[Dataset] = []
    for item in ds.get("ContentSequence") or []:
        items += [item, *content(item)]
    return items


def study_times(shared: Path) -> dict[str, datetime]:
    """Study Instance UID → when it was made."""
    with (shared / "data" / "cxr-severity" / "labels.csv").open() as file:
        return {
            row["study_instance_uid"]: datetime.fromisoformat(row["study_datetime"]).replace(tzinfo=ZONE) for row in csv.DictReader(file)
        }


def find_by_cfind(orthanc: Orthanc, uid: str) -> str:
    """What DCMTK's findscu prints for the SR series of a study."""
    command = ["/usr/bin/findscu", "-S", "-aet", "WORKER", "-aec", orthanc.ae_title, "-k", "QueryRetrieveLevel=SERIES"]
    command += ["-k", f"StudyInstanceUID={uid}", "-k", "Modality=SR", "-k", "SeriesInstanceUID", "127.0.0.1", str(orthanc.dicom_port)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stderr


def observation_times(ds: Dataset) -> list[datetime]:
    """When each record value that the report names was observed (Observation DateTime, PS3.3 §C.17.3)."""
    found = []
    for item in content(ds):
        text = str(item.get("ObservationDateTime", ""))
        if text and item.ValueType == "NUM":
            offset = text[-5:] if text[-5:-4] in ("+", "-") else "+0100"
            found.append(datetime.strptime(text.removesuffix(offset).split(".")[0] + offset, "%Y%m%d%H%M%S%z"))
    return found


def study_key(ds: Dataset) -> PatientKey:
    """Whose images these are."""
    return PatientKey(str(ds.IssuerOfPatientID), str(ds.PatientID))
