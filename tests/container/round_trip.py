"""Phantom patients into an Orthanc, on to a worker and back, on this host: `python -m tests.container.round_trip FIRST_SEED COUNT`."""

from __future__ import annotations

import json
import sys
import time
from io import BytesIO

from pydicom import Dataset, dcmread

from tests.peers import Orthanc
from worker.demo.phantom import PhantomCase, make_case
from worker.demo.show import faults_of
from worker.intake import mllp

#: As deploy/compose.yaml publishes them, and as Debian's packages have them.
ORTHANC = Orthanc(dicom_port=4242, http_port=8042, ae_title="ORTHANC")
MLLP = ("127.0.0.1", 2575)
REPORT_S = 60.0


def round_trip(first_seed: int, count: int) -> list[str]:
    """Send `count` patients' records and images, wait for their reports in the Orthanc; what is wrong with them, in words."""
    faults: list[str] = []
    cases = [make_case(seed, absent=frozenset()) for seed in range(first_seed, first_seed + count)]
    for case in cases:
        codes = mllp.send(MLLP, [message.encode() for message in case.hl7], timeout_s=20)
        faults += [f"an HL7 message was answered {code}" for code in codes if code not in {"AA", "CA"}]
        ORTHANC.post("/modalities/synoptic/store", _stored(case))
    for case in cases:
        report = _report(case.study_instance_uid, until=time.monotonic() + REPORT_S)
        faults += faults_of(case, report)
    return faults


def _stored(case: PhantomCase) -> str:
    """Put the images into the Orthanc; its name of the study."""
    named: set[str] = set()
    for ds in case.datasets:
        data = BytesIO()
        ds.save_as(data, enforce_file_format=True)
        named.add(ORTHANC.post("/instances", data.getvalue())["ParentStudy"])
    (study,) = named
    return study


def _report(study_instance_uid: str, *, until: float) -> Dataset | None:
    query = {"Level": "Instance", "Query": {"StudyInstanceUID": study_instance_uid, "Modality": "SR"}}
    while time.monotonic() < until:
        if found := ORTHANC.post("/tools/find", json.dumps(query)):
            return dcmread(BytesIO(ORTHANC.file(found[0])))
        time.sleep(0.25)
    return None


if __name__ == "__main__":
    wrong = round_trip(int(sys.argv[1]), int(sys.argv[2]))
    print("\n".join(wrong) or "all right")
    sys.exit(bool(wrong))
