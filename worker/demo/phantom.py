"""Synthetic patients whose truth is known and needs all three of image, note and laboratory value.

Three independent facts, each a fair coin: a nodule is large (not small), the note tells of a risk history
(not of none), the marker is raised (not normal). The truth is what two of the three say, so one source
alone cannot pass an AUROC of 0.75, whatever reads it, and all three decide it. A second finding, the nodule's size
itself, is in the image alone.

The record also holds what a careless reader falls for: values drawn after the study and older draws that
say the opposite, a withdrawn result, foreign units, detection limits, relatives who smoke, negations.

Not here: anything real. Names, numbers and anatomy are made up; see the card of the bundle `phantom`.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from worker.demo.phantom_record import LabDraw, adt_message, note_text, oru_message

ISSUER: Final = "SYNOPTIC-DEMO"
FINDING: Final = "suspicious_nodule"
LARGE: Final = "large_nodule"
SLICES, ROWS, COLUMNS = 32, 128, 128
SPACING_MM = (6.0, 2.6, 2.6)  # between slices, rows, columns
MISSING_CHANCE = 0.06  # of the marker, and of the note, independently
# Stored value 0 is -1024 HU, as CT scanners write it.
INTERCEPT_HU = -1024

_GIVEN_NAMES: Final = (
    "Ada",
    "Béla",
    "Chloé",
    "Dağhan",
    "Elif",
    "Françoise",
    "Grace",
    "Håkon",
    "Ilse",
    "Jürgen",
    "Katalin",
    "Łukasz",
    "Søren",
    "Zoë",
)


@dataclass(frozen=True, slots=True)
class PhantomCase:
    """One synthetic patient: images, HL7 v2.5.1 messages (segments end in CR) and what is true of them."""

    study_instance_uid: str
    patient_id: str
    study_at: datetime
    datasets: list[Dataset]
    hl7: list[str]
    truth: dict[str, int]
    factors: dict[str, int]
    severities: dict[str, float]
    absent: frozenset[str]


def make_case(seed: int, *, absent: frozenset[str] | None = None) -> PhantomCase:
    """Make patient number `seed`; the same seed makes the same bytes.

    Parameters
    ----------
    absent
        Which of ``"marker"`` and ``"note"`` the record lacks; None lets the seed decide. Without one of them the
        truth is a guess wherever the other two facts disagree.
    """
    rng = np.random.default_rng([seed, 20260101])
    factors = {name: int(rng.integers(2)) for name in ("nodule", "history", "marker")}
    drawn = frozenset(name for name in ("marker", "note") if rng.random() < MISSING_CHANCE)
    absent = drawn if absent is None else absent
    diameter_mm = float(rng.uniform(24, 38) if factors["nodule"] else rng.uniform(5, 9))
    marker = float(np.exp(rng.uniform(np.log(9), np.log(80))) if factors["marker"] else np.exp(rng.uniform(np.log(0.4), np.log(3.6))))
    study_at = datetime(2026, 1, 5, 8) + timedelta(minutes=int(rng.integers(60 * 24 * 150)))  # noqa: DTZ001  DICOM wall time
    patient_id = f"PH{seed:06d}"
    study_uid = _uid(seed, "study")
    volume = _thorax(rng, diameter_mm)
    header = _header(rng, seed, patient_id, study_at)
    return PhantomCase(
        study_instance_uid=study_uid,
        patient_id=patient_id,
        study_at=study_at,
        datasets=[_slice(header, seed, k, plane) for k, plane in enumerate(volume)],
        hl7=_messages(rng, header, study_at, factors, marker, absent),
        truth={FINDING: int(sum(factors.values()) >= 2), LARGE: factors["nodule"]},
        factors=factors,
        severities={"diameter_mm": diameter_mm, "marker_ng_ml": marker},
        absent=absent,
    )


def write_cohort(folder: Path, n: int, first_seed: int) -> None:
    """Write `n` cases: ``dicom/<patient>/*.dcm``, ``hl7/<patient>.hl7`` and ``labels.csv``.

    An .hl7 file holds one message after another, segments ended by CR, each message closed by LF.
    """
    (folder / "hl7").mkdir(parents=True, exist_ok=True)
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(["study_instance_uid", "patient_id", "group", FINDING, LARGE])
        for seed in range(first_seed, first_seed + n):
            case = make_case(seed)
            series = folder / "dicom" / case.patient_id
            series.mkdir(parents=True, exist_ok=True)
            for number, ds in enumerate(case.datasets, start=1):
                ds.save_as(series / f"{number:03d}.dcm", enforce_file_format=True)
            text = "".join(message + "\n" for message in case.hl7)
            (folder / "hl7" / f"{case.patient_id}.hl7").write_bytes(text.encode("utf-8"))
            rows.writerow([case.study_instance_uid, case.patient_id, case.patient_id, case.truth[FINDING], case.truth[LARGE]])


def _uid(seed: int, *what: str) -> str:
    return str(generate_uid(entropy_srcs=["synoptic-phantom", str(seed), *what]))


def _thorax(rng: np.random.Generator, diameter_mm: float) -> NDArray[np.uint16]:
    """A chest in stored values (K, J, I): body, lungs, heart, spine, vessels and one nodule of `diameter_mm`."""
    z, y, x = np.meshgrid(
        *((np.arange(n) - (n - 1) / 2) * s for n, s in zip((SLICES, ROWS, COLUMNS), SPACING_MM, strict=True)),
        indexing="ij",
    )  # mm, LPS axes, origin in the middle
    size = rng.uniform(0.95, 1.05)

    def ellipsoid(center: tuple[float, float, float], radii: tuple[float, float, float]) -> NDArray[np.bool_]:
        terms = ((a - c * size) / (r * size) for a, c, r in zip((x, y, z), center, radii, strict=True))
        return sum(t * t for t in terms) <= 1  # type: ignore[no-any-return]  # sum() of arrays is an array

    hu = np.full((SLICES, ROWS, COLUMNS), -1000.0)
    hu[ellipsoid((0, 0, 0), (152, 112, 400))] = -90  # fat
    hu[ellipsoid((0, 0, 0), (143, 103, 400))] = 45  # muscle
    lungs = ellipsoid((-66, 0, 0), (48, 74, 88)) | ellipsoid((66, 0, 0), (48, 74, 88))
    hu[lungs] = -850
    points = np.stack([x[lungs], y[lungs], z[lungs]])  # (3, N) mm; lung voxels alone, which is five times faster
    air = hu[lungs]
    for _ in range(8):  # vessels: bright and thin, so that a bright voxel alone is no nodule
        start = np.array([rng.choice([-1, 1]) * rng.uniform(30, 45), rng.uniform(-25, 25), rng.uniform(-40, 40)])
        way = rng.normal(size=3)
        way /= np.linalg.norm(way)
        offset = points - start[:, None]
        along = way @ offset
        off_axis = np.sqrt(np.maximum((offset * offset).sum(axis=0) - along * along, 0))
        air[(off_axis < rng.uniform(1.5, 3.0)) & (np.abs(along) < 50)] = 30
    hu[lungs] = air
    hu[ellipsoid((14, -14, -22), (46, 40, 50))] = 40  # heart
    hu[ellipsoid((0, 72, 0), (19, 17, 400))] = 350  # spine
    # In the right lung, clear of the heart.
    center = np.array([-68.0, 0.0, 0.0]) + rng.uniform(-1, 1, 3) * np.array([14.0, 32.0, 36.0])
    distance = np.sqrt((x - center[0] * size) ** 2 + (y - center[1] * size) ** 2 + (z - center[2] * size) ** 2)
    # Partial volume: the edge fades over about one voxel, so that small nodules are seen at all.
    share = np.clip((diameter_mm / 2 - distance) / 3.0 + 0.5, 0, 1)
    hu = hu * (1 - share) + rng.uniform(20, 70) * share
    hu += rng.normal(0, 18, hu.shape)
    stored: NDArray[np.uint16] = np.clip(np.rint(hu) - INTERCEPT_HU, 0, 4095).astype(np.uint16)
    return stored


def _header(rng: np.random.Generator, seed: int, patient_id: str, study_at: datetime) -> Dataset:
    """What all slices share: the patient, study, series, frame of reference and equipment modules."""
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.SOPClassUID = CTImageStorage
    ds.StudyDate = ds.SeriesDate = ds.ContentDate = ds.AcquisitionDate = study_at.strftime("%Y%m%d")
    ds.StudyTime = ds.SeriesTime = ds.ContentTime = ds.AcquisitionTime = study_at.strftime("%H%M%S")
    ds.AccessionNumber = f"PHA{seed:06d}"
    ds.Modality = "CT"
    ds.Manufacturer = "Synoptic"
    ds.ManufacturerModelName = "Phantom"
    ds.ReferringPhysicianName = ""
    ds.StudyDescription = "CT chest phantom"
    ds.SeriesDescription = "Chest axial"
    ds.PatientName = f"Phantom^{_GIVEN_NAMES[int(rng.integers(len(_GIVEN_NAMES)))]}"
    ds.PatientID = patient_id
    ds.IssuerOfPatientID = ISSUER
    ds.PatientBirthDate = f"{int(rng.integers(1935, 1990))}0615"
    ds.PatientSex = str(rng.choice(["F", "M", "O"]))
    ds.BodyPartExamined = "CHEST"
    ds.SliceThickness = SPACING_MM[0]
    ds.KVP = 120
    ds.PatientPosition = "HFS"
    ds.StudyInstanceUID = _uid(seed, "study")
    ds.SeriesInstanceUID = _uid(seed, "series")
    ds.StudyID = str(seed)
    ds.SeriesNumber = 2
    ds.AcquisitionNumber = 1
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.FrameOfReferenceUID = _uid(seed, "frame of reference")
    ds.PositionReferenceIndicator = ""
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows, ds.Columns = ROWS, COLUMNS
    ds.PixelSpacing = [SPACING_MM[1], SPACING_MM[2]]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.BurnedInAnnotation = "NO"
    ds.WindowCenter, ds.WindowWidth = -400, 1500
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = INTERCEPT_HU, 1, "HU"
    return ds


def _slice(header: Dataset, seed: int, k: int, plane: NDArray[np.uint16]) -> Dataset:
    ds = Dataset()
    ds.update(header)
    ds.SOPInstanceUID = _uid(seed, "slice", str(k))
    ds.InstanceNumber = k + 1
    first = [-(COLUMNS - 1) / 2 * SPACING_MM[2], -(ROWS - 1) / 2 * SPACING_MM[1]]
    z_mm = (k - (SLICES - 1) / 2) * SPACING_MM[0]
    ds.ImagePositionPatient = [round(first[0], 3), round(first[1], 3), round(z_mm, 3)]
    ds.SliceLocation = round(z_mm, 3)
    ds.PixelData = plane.astype("<u2").tobytes()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return ds


def _messages(
    rng: np.random.Generator,
    header: Dataset,
    study_at: datetime,
    factors: Mapping[str, int],
    marker: float,
    absent: frozenset[str],
) -> list[str]:
    """An admission, the draw to use, an older one and a later one that say the opposite, and the note."""
    pid = (str(header.PatientID), ISSUER, str(header.PatientName), str(header.PatientBirthDate), str(header.PatientSex))
    opposite = float(rng.uniform(0.5, 3.0) if factors["marker"] else rng.uniform(15, 60))
    before = [study_at - timedelta(hours=float(h)) for h in (rng.uniform(60, 90), rng.uniform(1, 30), rng.uniform(1, 30))]
    after = study_at + timedelta(hours=float(rng.uniform(2, 30)))
    draws = [
        LabDraw(at=before[0], marker=opposite, status="F", others=True),
        LabDraw(at=before[1], marker=marker, status="F", others=bool(rng.random() > 0.1)),
        LabDraw(at=before[1] + timedelta(minutes=20), marker=opposite, status="X", others=False),
        LabDraw(at=after, marker=opposite, status="F", others=True),
    ]
    admitted = study_at - timedelta(hours=100)
    messages = [adt_message(pid, admitted)]
    for number, draw in enumerate(draws):
        use = draw if "marker" not in absent else LabDraw(at=draw.at, marker=None, status=draw.status, others=draw.others)
        if use.marker is not None or use.others:
            messages.append(oru_message(rng, pid, number=number, draw=use))
    if "note" not in absent:
        text = note_text(rng, risk=bool(factors["history"]))
        messages.append(oru_message(rng, pid, number=len(draws), draw=LabDraw(at=before[2], note=text)))
    return messages
