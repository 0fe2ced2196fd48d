"""Synthetic DICOM with known Hounsfield units and a known affine; no patient data, ever.

::

    make_ct(slices=20)  ─▶ datasets ─▶ spool(datasets, folder) ─▶ worker.domain.Series
    known_hu(...)       what `volume.load` must give back, exactly
    known_affine(...)

Every dataset is complete enough for a PACS to take and for a report to refer to. UIDs are derived from `seed` and the patient, so
two calls with the same arguments are the same study.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import gdcm
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    JPEG2000,
    UID,
    ComputedRadiographyImageStorage,
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    generate_uid,
)

from worker.domain import Instance, PatientKey, Series

#: Nobody: the patient of every synthetic study unless another is asked for.
PATIENT = PatientKey("FACTORY", "F-0001")
INTERCEPT_HU = -1024
_GDCM_SYNTAXES = {
    JPEGBaseline8Bit: gdcm.TransferSyntax.JPEGBaselineProcess1,
    JPEGLossless: gdcm.TransferSyntax.JPEGLosslessProcess14,
    JPEGLosslessSV1: gdcm.TransferSyntax.JPEGLosslessProcess14_1,
}


def known_hu(slices: int = 4, rows: int = 40, columns: int = 48, *, seed: int = 0) -> NDArray[np.float32]:
    """Return (slices, rows, columns) of whole HU in [-1024, 2000]: air around a noisy ball, a different value everywhere it matters."""
    rng = np.random.default_rng(seed)
    k, j, i = np.meshgrid(*(np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in (slices, rows, columns)), indexing="ij")
    inside = k**2 + j**2 + i**2 < 0.8
    hu = np.where(inside, rng.integers(-50, 2000, inside.shape), -1000).astype(np.float32)
    hu[:, 0, 0] = np.arange(slices)  # each slice can be told from the others
    hu[:, 0, 1] = INTERCEPT_HU
    return hu


def known_affine(
    *,
    spacing_mm: tuple[float, float, float] = (2.5, 0.75, 0.5),
    orientation: Sequence[float] = (1, 0, 0, 0, 1, 0),
    origin_mm: Sequence[float] = (-10.0, 20.0, -30.0),
) -> NDArray[np.float64]:
    """Return the affine (4, 4), index (i, j, k, 1) → LPS mm, of what `make_ct` makes with the same arguments; spacing is (k, j, i)."""
    along_row, along_column = np.array(orientation[:3], float), np.array(orientation[3:], float)
    affine = np.eye(4)
    affine[:3, 0] = along_row * spacing_mm[2]
    affine[:3, 1] = along_column * spacing_mm[1]
    affine[:3, 2] = np.cross(along_row, along_column) * spacing_mm[0]
    affine[:3, 3] = origin_mm
    return affine


def make_ct(
    *,
    slices: int = 4,
    rows: int = 40,
    columns: int = 48,
    spacing_mm: tuple[float, float, float] = (2.5, 0.75, 0.5),
    orientation: Sequence[float] = (1, 0, 0, 0, 1, 0),
    origin_mm: Sequence[float] = (-10.0, 20.0, -30.0),
    hu: NDArray[np.float32] | None = None,
    is_signed: bool = False,
    transfer_syntax: str = ExplicitVRLittleEndian,
    patient: PatientKey = PATIENT,
    accession_number: str = "A-0001",
    study_date: str = "20240102",
    study_time: str = "103000",
    series_number: int = 1,
    description: str = "CT CHEST",
    body_part: str = "CHEST",
    seed: int = 0,
) -> list[FileDataset]:
    """Make one axial CT series, 12 bit unsigned or 16 bit signed, slope 1 and intercept -1024.

    Parameters
    ----------
    spacing_mm
        Between slices, rows and columns (k, j, i).
    hu
        (slices, rows, columns), whole numbers in [-1024, 3071]; `known_hu` with the same seed if not given.
    """
    values = known_hu(slices, rows, columns, seed=seed) if hu is None else hu
    affine = known_affine(spacing_mm=spacing_mm, orientation=orientation, origin_mm=origin_mm)
    stored = (values - INTERCEPT_HU).astype(np.int16 if is_signed else np.uint16)
    made = []
    for k in range(len(values)):
        uid = _Uids(patient, accession_number, seed, f"CT/{series_number}")
        ds = _instance(CTImageStorage, uid, study_date, study_time, number=k + 1)
        ds.SeriesNumber = series_number
        ds.Modality, ds.SeriesDescription, ds.BodyPartExamined = "CT", description, body_part
        ds.StudyDescription = description
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.FrameOfReferenceUID, ds.PositionReferenceIndicator = uid("frame"), ""
        ds.ImagePositionPatient = [round(float(x), 6) for x in affine[:3, 3] + k * affine[:3, 2]]
        ds.ImageOrientationPatient = [float(x) for x in orientation]
        ds.PixelSpacing, ds.SliceThickness = [spacing_mm[1], spacing_mm[2]], spacing_mm[0]
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, INTERCEPT_HU, "HU"
        ds.WindowCenter, ds.WindowWidth, ds.KVP, ds.AcquisitionNumber = 40, 400, 120, 1
        set_pixels(ds, stored[k], bits_stored=16 if is_signed else 12)
        made.append(encode(ds, transfer_syntax))
    return made


def make_tilted_ct(*, degrees: float, lesions_mm: Sequence[Sequence[float]], slices: int = 12, seed: int = 0) -> list[FileDataset]:
    """Make a CT of a gantry tilted about the patient's left-right axis: 1000 HU in balls of 6 mm about `lesions_mm` (LPS), air around.

    The table moves along z by 4 mm a slice while the planes lean, as PS3.3 §C.8.2.1 has it for Gantry/Detector Tilt.
    """
    lean = np.radians(degrees)
    along_row, along_column = np.array([1.0, 0, 0]), np.array([0, np.cos(lean), np.sin(lean)])
    j, i = np.meshgrid(np.arange(96), np.arange(80), indexing="ij")
    hu = np.full((slices, 96, 80), -1000, np.float32)
    starts = [np.array([-40.0, 0, 4.0 * k]) - 48 * along_column for k in range(slices)]
    for k, start in enumerate(starts):
        at = start + i[..., np.newaxis] * along_row + j[..., np.newaxis] * along_column  # (rows, columns, 3), pixels of 1 mm
        for lesion in lesions_mm:
            hu[k][np.linalg.norm(at - np.array(lesion), axis=-1) < 6] = 1000
    datasets = make_ct(hu=hu, spacing_mm=(4, 1, 1), orientation=[*along_row, *along_column], seed=seed)
    for ds, start in zip(datasets, starts, strict=True):
        ds.ImagePositionPatient, ds.GantryDetectorTilt = [float(x) for x in start], degrees
    return datasets


def in_one_series(*series: Sequence[FileDataset]) -> list[FileDataset]:
    """Put the instances of several series into the first, as scanners do with phases, echoes and b-values; Instance Numbers run on."""
    first, joined = series[0][0], [ds for one in series for ds in one]
    for number, ds in enumerate(joined, start=1):
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.InstanceNumber = first.StudyInstanceUID, first.SeriesInstanceUID, number
        ds.FrameOfReferenceUID = first.FrameOfReferenceUID
    return joined


def make_enhanced(datasets: Sequence[FileDataset]) -> FileDataset:
    """Make the enhanced object (PS3.3 §A.38, §A.36, §A.56) of a classic CT, MR or PET series: a frame of each slice, in the order given.

    What all slices say alike goes into the shared functional groups, the rest into those of each frame.
    """
    first = datasets[0]
    uid = "1.2.840.10008.5.1.4.1.1." + {"CT": "2.1", "MR": "4.1", "PT": "130"}[first.Modality]
    ds = deepcopy(first)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = UID(uid)
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[one.SOPInstanceUID for one in datasets])
    for keyword in _PER_FRAME:
        if keyword in ds:
            delattr(ds, keyword)
    groups = [_groups(one) for one in datasets]
    alike = {name for name in groups[0] if all(one[name] == groups[0][name] for one in groups)}
    ds.SharedFunctionalGroupsSequence = [_item(**{name: [groups[0][name]] for name in sorted(alike)})]
    ds.PerFrameFunctionalGroupsSequence = [_item(**{name: [one[name]] for name in sorted(one.keys() - alike)}) for one in groups]
    ds.NumberOfFrames, ds.InstanceNumber = len(datasets), 1
    ds.PixelData = b"".join(one.PixelData for one in datasets)
    return ds


_PER_FRAME = (
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SliceLocation", "RescaleSlope",
    "RescaleIntercept", "RescaleType", "WindowCenter", "WindowWidth", "EchoTime", "DiffusionBValue", "AcquisitionNumber",
    "AcquisitionDate", "AcquisitionTime", "TemporalPositionIdentifier", "TriggerTime", "GantryDetectorTilt",
    "KVP", "ConvolutionKernel",
)  # fmt: skip


def _groups(ds: Dataset) -> dict[str, Dataset]:
    kind = {"CT": "CTImageFrameTypeSequence", "MR": "MRImageFrameTypeSequence", "PT": "PETFrameTypeSequence"}[ds.Modality]
    content = _item(FrameAcquisitionDateTime=ds.AcquisitionDate + ds.AcquisitionTime, FrameAcquisitionNumber=int(ds.AcquisitionNumber))
    if "TemporalPositionIdentifier" in ds:
        content.TemporalPositionIndex = int(ds.TemporalPositionIdentifier)
    groups = {
        kind: _item(FrameType=list(ds.ImageType)),
        "FrameContentSequence": content,
        "PlanePositionSequence": _item(ImagePositionPatient=list(ds.ImagePositionPatient)),
        "PlaneOrientationSequence": _item(ImageOrientationPatient=list(ds.ImageOrientationPatient)),
        "PixelMeasuresSequence": _item(PixelSpacing=list(ds.PixelSpacing), SliceThickness=ds.SliceThickness),
        "PixelValueTransformationSequence": _item(
            RescaleSlope=ds.RescaleSlope, RescaleIntercept=ds.RescaleIntercept, RescaleType=ds.RescaleType
        ),
    }
    if "EchoTime" in ds:
        groups["MREchoSequence"] = _item(EffectiveEchoTime=float(ds.EchoTime))
    if "ConvolutionKernel" in ds:
        groups["CTReconstructionSequence"] = _item(ConvolutionKernel=ds.ConvolutionKernel)
    if "KVP" in ds and ds.Modality == "CT":
        groups["CTXRayDetailsSequence"] = _item(KVP=ds.KVP)
    if "DiffusionBValue" in ds:
        groups["MRDiffusionSequence"] = _item(DiffusionBValue=float(ds.DiffusionBValue))
    return groups


def _item(**said: object) -> Dataset:
    ds = Dataset()
    for keyword, value in said.items():
        setattr(ds, keyword, value)
    return ds


def make_radiograph(
    *,
    rows: int = 64,
    columns: int = 48,
    stored: NDArray[np.generic] | None = None,
    bits_stored: int = 12,
    photometric: str = "MONOCHROME2",
    modality: str = "DX",
    spacing_mm: tuple[float, float] | None = (0.15, 0.15),
    transfer_syntax: str = ExplicitVRLittleEndian,
    patient: PatientKey = PATIENT,
    accession_number: str = "A-0002",
    study_date: str = "20240102",
    study_time: str = "113000",
    description: str = "CHEST AP",
    body_part: str = "CHEST",
    number: int = 1,
    seed: int = 0,
) -> FileDataset:
    """Make one radiograph, DX or CR; `stored` (rows, columns) are its stored values, `spacing_mm` its Imager Pixel Spacing (j, i)."""
    if stored is None:
        stored = known_stored(rows, columns, bits_stored=bits_stored, seed=seed)
    sop_class = DigitalXRayImageStorageForPresentation if modality == "DX" else ComputedRadiographyImageStorage
    ds = _instance(sop_class, _Uids(patient, accession_number, seed, modality), study_date, study_time, number=number)
    ds.SeriesNumber = 1
    ds.Modality, ds.SeriesDescription, ds.BodyPartExamined, ds.StudyDescription = modality, description, body_part, description
    ds.ImageType, ds.ViewPosition, ds.PatientOrientation = ["ORIGINAL", "PRIMARY"], "AP", ["L", "F"]
    if spacing_mm is not None:
        ds.ImagerPixelSpacing = list(spacing_mm)
    if modality == "DX":
        ds.PresentationIntentType, ds.PixelIntensityRelationship, ds.PixelIntensityRelationshipSign = "FOR PRESENTATION", "LOG", 1
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, 0, "US"
        ds.PresentationLUTShape = "INVERSE" if photometric == "MONOCHROME1" else "IDENTITY"
        ds.WindowCenter, ds.WindowWidth = 2 ** (bits_stored - 1), 2**bits_stored
        ds.BurnedInAnnotation, ds.LossyImageCompression, ds.ImageLaterality = "NO", "00", "U"
        ds.DetectorType, ds.PositionerType = "DIRECT", "NONE"
    set_pixels(ds, stored, bits_stored=bits_stored)
    ds.PhotometricInterpretation = photometric
    return encode(ds, transfer_syntax)


def known_stored(rows: int = 64, columns: int = 48, *, bits_stored: int = 12, seed: int = 0) -> NDArray[np.uint8 | np.uint16]:
    """Return (rows, columns) of stored values that span the whole range of `bits_stored`."""
    top = 2**bits_stored - 1
    stored = np.random.default_rng(seed).integers(0, top, (rows, columns), endpoint=True)
    stored[0, 0], stored[-1, -1] = 0, top
    return stored.astype(np.uint8 if bits_stored <= 8 else np.uint16)


def set_pixels(ds: Dataset, stored: NDArray[np.generic], *, bits_stored: int) -> None:
    """Write stored values (rows, columns) and the Image Pixel module (PS3.3 §C.7.6.3) that fits them, native little endian."""
    ds.Rows, ds.Columns = stored.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8 * stored.dtype.itemsize, bits_stored, bits_stored - 1
    ds.PixelRepresentation = int(stored.dtype.kind == "i")
    data = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
    ds.PixelData = data + b"\0" * (len(data) % 2)
    ds["PixelData"].VR = "OW" if ds.BitsAllocated > 8 else "OB"


def encode(ds: FileDataset, transfer_syntax: str) -> FileDataset:
    """Return `ds` in another transfer syntax, encoded by pydicom's encoders, or by GDCM for JPEG."""
    if transfer_syntax in _GDCM_SYNTAXES:
        return _encode_with_gdcm(ds, _GDCM_SYNTAXES[UID(transfer_syntax)])
    if transfer_syntax in {ExplicitVRLittleEndian, ImplicitVRLittleEndian}:
        ds.file_meta.TransferSyntaxUID = UID(transfer_syntax)
        return ds
    if transfer_syntax == JPEG2000:  # with so little loss that 12 bits come back almost unchanged
        ds.compress(transfer_syntax, generate_instance_uid=False, j2k_psnr=[100])
    else:
        ds.compress(transfer_syntax, generate_instance_uid=False)
    return ds


def _encode_with_gdcm(ds: FileDataset, syntax: int) -> FileDataset:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.dcm"), Path(folder, "out.dcm")
        write(ds, source)
        reader = gdcm.ImageReader()
        reader.SetFileName(str(source))
        assert reader.Read()
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer = gdcm.ImageWriter()
        writer.SetFileName(str(target))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        encoded = pydicom.dcmread(target)
        encoded.PixelData  # noqa: B018  read before the folder goes
        return encoded


def write(ds: FileDataset, path: Path) -> Path:
    """Write `ds` as a DICOM file (PS3.10 §7): zeroed preamble, file meta, data set."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


def spool(datasets: Sequence[FileDataset], folder: Path) -> Series:
    """Write the instances of one series into `folder` and return them as the store would: paths, digests, sizes."""
    instances = []
    for number, ds in enumerate(datasets):
        path = write(ds, folder / f"{number:05d}.dcm")
        instances.append(instance_of(path))
    first = datasets[0]
    return Series(
        series_instance_uid=str(first.SeriesInstanceUID),
        modality=str(first.Modality),
        body_part=str(first.get("BodyPartExamined", "")),
        description=str(first.get("SeriesDescription", "")),
        instances=tuple(instances),
    )


def instance_of(path: Path) -> Instance:
    """Describe a DICOM file as the store would; its headers are read, its pixels not."""
    data = path.read_bytes()
    ds = pydicom.dcmread(path, specific_tags=["SOPInstanceUID", "SOPClassUID"])
    return Instance(
        sop_instance_uid=str(ds.SOPInstanceUID),
        sop_class_uid=str(ds.SOPClassUID),
        transfer_syntax_uid=str(ds.file_meta.TransferSyntaxUID),
        path=path,
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
    )


@dataclass(frozen=True, slots=True)
class _Uids:
    """UIDs that follow from who, which study and which series."""

    patient: PatientKey
    accession_number: str
    seed: int
    series: str

    def __call__(self, what: str, *, of_study: bool = False) -> UID:
        series = "" if of_study else self.series
        sources = [self.patient.issuer, self.patient.patient_id, self.accession_number, str(self.seed), series, what]
        return generate_uid(entropy_srcs=["synoptic-factory", *sources])


def _instance(sop_class: str, uid: _Uids, study_date: str, study_time: str, *, number: int) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = UID(sop_class), uid(f"instance/{number}")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.StudyInstanceUID, ds.SeriesInstanceUID = uid("study", of_study=True), uid("series")
    ds.PatientID, ds.IssuerOfPatientID = uid.patient.patient_id, uid.patient.issuer
    ds.PatientName, ds.PatientBirthDate, ds.PatientSex = "Test^Factory", "19700101", "O"
    ds.AccessionNumber, ds.StudyID, ds.ReferringPhysicianName = uid.accession_number, "1", ""
    ds.StudyDate = ds.SeriesDate = ds.ContentDate = ds.AcquisitionDate = study_date
    ds.StudyTime = ds.SeriesTime = ds.ContentTime = ds.AcquisitionTime = study_time
    ds.InstanceNumber, ds.Manufacturer, ds.PatientPosition = number, "Synoptic tests", "HFS"
    return ds
