"""The summary page as objects that an archive takes: Secondary Capture, dark as viewers are, and Encapsulated PDF, light as paper is.

::

    Result ─▶ picture.py ─▶ page.py ─┬─ PNG ─▶ RGB, RLE ─▶ Secondary Capture Image   (PS3.3 §A.8.1)
                                     └─ PDF/A ──────────▶ Encapsulated PDF           (PS3.3 §A.45.1)
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Final

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import EncapsulatedPDFStorage, ExplicitVRLittleEndian, RLELossless, SecondaryCaptureImageStorage

from worker.domain import Document
from worker.report import codes, page
from worker.report.content import MANUFACTURER, versions
from worker.report.picture import Picture, key_picture
from worker.report.result import SERIES_NUMBERS, Result, about

_PDF: Final = "application/pdf"


def summary(result: Result) -> Sequence[Document]:
    """Write the page as one color image, losslessly compressed.

    Raises
    ------
    ReportInvalid
        The page could not be set.
    """
    picture = key_picture(result)
    with Image.open(BytesIO(page.render(result, picture, theme="dark", form="png"))) as image:
        pixels = np.asarray(image.convert("RGB"))
    ds = _object(result, "summary", SecondaryCaptureImageStorage)
    ds.Modality = "OT"
    ds.ImageType = ["DERIVED", "SECONDARY"]
    ds.PatientOrientation = ds.Laterality = None
    ds.SourceImageSequence = [_source(result, picture)]
    ds.SourceImageSequence[0].PurposeOfReferenceCodeSequence = [codes.concept(codes.SOURCE_IMAGE)]
    if picture and picture.frame_number:
        ds.SourceImageSequence[0].ReferencedFrameNumber = picture.frame_number
    ds.DerivationDescription = f"Summary of the results of {codes.short(result.algorithm.name, 40)}, with one of the analysed images"
    ds.LossyImageCompression = "00"
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
    ds.Rows, ds.Columns = pixels.shape[:2]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.PixelData = pixels.tobytes()
    ds.compress(RLELossless, generate_instance_uid=False)
    return [result.document(ds, "summary")]


def pdf(result: Result) -> Sequence[Document]:
    """Write the page as PDF/A-2a: its text can be searched, and its figure has words for who cannot see it.

    Raises
    ------
    ReportInvalid
        The page could not be set.
    """
    picture = key_picture(result)
    data = page.render(result, picture, theme="light", form="pdf")
    ds = _object(result, "pdf", EncapsulatedPDFStorage)
    ds.Modality = "DOC"
    ds.AcquisitionDateTime = None
    ds.SourceInstanceSequence = [_source(result, picture)]
    ds.DocumentTitle = codes.short(f"AI summary: {result.algorithm.title or result.algorithm.name}")
    ds.ConceptNameCodeSequence = [codes.concept(codes.REPORT)]
    ds.MIMETypeOfEncapsulatedDocument = _PDF
    ds.EncapsulatedDocumentLength = len(data)
    ds.EncapsulatedDocument = data + b"\0" * (len(data) % 2)
    return [result.document(ds, "pdf")]


def _object(result: Result, kind: str, sop_class_uid: str) -> Dataset:
    """What both have in common: whose it is and who made it."""
    algorithm = result.algorithm
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = sop_class_uid, result.uid(kind)
    ds.StudyInstanceUID, ds.SeriesInstanceUID = result.study.study_instance_uid, result.series_uid(kind)
    ds.SeriesNumber, ds.InstanceNumber = SERIES_NUMBERS[kind], max(1, result.study.version)
    ds.SeriesDescription = about(result, kind, what="summary")["series_description"]
    ds.SeriesDescriptionCodeSequence = [codes.concept(codes.SERIES)]
    ds.Manufacturer, ds.ManufacturerModelName = MANUFACTURER, codes.short(algorithm.name)
    ds.SoftwareVersions, ds.DeviceSerialNumber = versions(algorithm), codes.short(algorithm.bundle_sha256)
    ds.ConversionType = "WSD"
    ds.BurnedInAnnotation = "YES"
    ds.ContentDate = ds.ContentTime = ""  # `finish` knows the one clock
    result.finish(ds)
    return ds


def _source(result: Result, picture: Picture | None) -> Dataset:
    """Refer to the image that is shown, else to the first that was looked at."""
    first, item = result.source.instances[0], Dataset()
    item.ReferencedSOPClassUID = picture.sop_class_uid if picture else first.SOPClassUID
    item.ReferencedSOPInstanceUID = picture.sop_instance_uid if picture else first.SOPInstanceUID
    return item
