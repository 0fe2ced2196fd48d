"""The OASIS-1 slices of ../shared/data/oasis1 as a cohort folder: a second task that is a bundle folder only.

usage: python -m tests.oasis FOLDER

Each subject becomes one MR study of three series (axial, coronal, sagittal), one image each, an ADT and an ORU message, and a
row of labels.csv: ``dementia`` is CDR > 0. MMSE is left out (it is nearly the label). The decimal points that the table lost are
put back: nWBV is below 1, so 813 is 0.813. Study dates are made up: OASIS has none.
"""

from __future__ import annotations

import csv
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage, generate_uid

#: (letter of the file, Series Description, Image Orientation (Patient)): LPS, rows then columns.
PLANES: Final = (
    ("a", "axial", [1, 0, 0, 0, 1, 0]),
    ("c", "coronal", [1, 0, 0, 0, 0, -1]),
    ("s", "sagittal", [0, 1, 0, 0, 0, -1]),
)
#: Column of the CSV → (local code, unit).
VALUES: Final = {"Educ": ("EDUC", "{score}"), "SES": ("SES", "{score}"), "eTIV": ("ETIV", "mL"), "nWBV": ("NWBV", "1")}
STUDY: Final = datetime(2004, 6, 1, 12, tzinfo=UTC)


def write(source: Path, folder: Path, *, limit: int | None = None) -> int:
    """Write the cohort below `folder`; returns how many studies it has."""
    with (source / "oasis_cross-sectional.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["CDR"] and (source / "images" / f"{row['ID']}_a.jpg").exists()][:limit]
    for name in ("dicom", "hl7"):
        (folder / name).mkdir(parents=True)
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        labels = csv.writer(file)
        labels.writerow(("study_instance_uid", "patient_id", "dementia"))
        for row in rows:
            labels.writerow((_uid(row, "study"), row["ID"], int(float(row["CDR"]) > 0)))
            for letter, plane, orientation in PLANES:
                _slice(row, source / "images" / f"{row['ID']}_{letter}.jpg", plane, orientation).save_as(
                    folder / "dicom" / f"{row['ID']}_{letter}.dcm", enforce_file_format=True
                )
            (folder / "hl7" / f"{row['ID']}.hl7").write_text(_messages(row), "utf-8")
    return len(rows)


def _uid(row: dict[str, str], kind: str) -> UID:
    return generate_uid(entropy_srcs=["oasis1", kind, row["ID"]])


def _birth_date(row: dict[str, str]) -> str:
    return f"{STUDY.year - int(row['Age'])}0101"


def _slice(row: dict[str, str], path: Path, plane: str, orientation: list[int]) -> Dataset:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"), np.uint8)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = MRImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = _uid(row, plane)
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = _uid(row, "study"), _uid(row, f"{plane}/series"), _uid(row, "frame")
    ds.PatientID, ds.IssuerOfPatientID, ds.PatientName = row["ID"], "OASIS", f"OASIS^{row['ID'].replace('_', '')}"
    ds.PatientBirthDate, ds.PatientSex = _birth_date(row), row["M/F"]
    ds.StudyDate, ds.StudyTime, ds.Modality, ds.SeriesDescription = STUDY.strftime("%Y%m%d"), STUDY.strftime("%H%M%S"), "MR", plane
    ds.AccessionNumber = ds.StudyID = ds.ReferringPhysicianName = ""
    ds.SeriesNumber, ds.InstanceNumber, ds.BodyPartExamined = 1, 1, "HEAD"
    ds.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
    ds.ImageOrientationPatient, ds.ImagePositionPatient, ds.PixelSpacing, ds.SliceThickness = orientation, [0, 0, 0], [1, 1], 1
    ds.Rows, ds.Columns = pixels.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelData = 1, "MONOCHROME2", pixels.tobytes()
    return ds


def _messages(row: dict[str, str]) -> str:
    drawn = STUDY.strftime("%Y%m%d060000")
    pid = f"PID|1||{row['ID']}^^^OASIS^MR||OASIS^{row['ID'].replace('_', '')}||{_birth_date(row)}|{row['M/F']}"
    head = rf"MSH|^~\&|OASIS|OASIS|SYNOPTIC|RAD|{drawn}||"
    # Some rows have kept their point.
    known = {**row, "nWBV": row["nWBV"] if "." in row["nWBV"] else f"0.{row['nWBV']}"}
    found = [(code, unit, known[column]) for column, (code, unit) in VALUES.items() if row[column]]
    results = [
        f"OBX|{number}|NM|{code}^{code}^L||{value}|{unit}^{unit}^UCUM|||||F|||{drawn}"
        for number, (code, unit, value) in enumerate(found, 1)
    ]
    admission = [f"{head}ADT^A01^ADT_A01|A{row['ID']}|P|2.5.1", f"EVN|A01|{drawn}", pid, "PV1|1|O"]
    panel = [f"{head}ORU^R01^ORU_R01|L{row['ID']}|P|2.5.1", pid, f"OBR|1||{row['ID']}|MR^MR volumes^L|||{drawn}", *results]
    return "\r".join(admission) + "\r\n\n" + "\r".join(panel) + "\r"


if __name__ == "__main__":
    print(write(Path(__file__).parents[2] / "shared" / "data" / "oasis1", Path(sys.argv[1])), "studies")
