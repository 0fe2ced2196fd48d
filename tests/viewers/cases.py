"""Studies with a region whose place is known, and all documents of their Result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, cast

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, FileDataset, dcmread
from scipy import ndimage

from tests import factories, reports
from tests.peers import require_shared
from tests.unit.test_gsps import region_of
from worker.demo import phantom
from worker.domain import DICOM_KINDS, Code, Document, Region, Saliency
from worker.imaging import volume
from worker.imaging.decoding import DecoderPool
from worker.report import forms
from worker.report.result import Result

#: Hounsfield units of the painted lesion: as bright as bone, in a lung.
_PAINTED_HU: Final = 300


@dataclass(frozen=True, slots=True)
class Case:
    """One study: its image files, where the region lies, and all that is written of it."""

    files: tuple[Path, ...]
    region: Region
    result: Result
    documents: tuple[Document, ...]

    @property
    def study_instance_uid(self) -> str:
        """Of the images."""
        return self.result.study.study_instance_uid

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Of the region on its key plane: first column, first row, one past the last column, one past the last row."""
        plane = self.region.mask[self.region.key_plane - self.region.origin[0]]
        rows, columns = np.nonzero(plane)
        _, j, i = self.region.origin
        return int(columns.min()) + i, int(rows.min()) + j, int(columns.max()) + 1 + i, int(rows.max()) + 1 + j

    def of_kind(self, kind: str) -> list[Document]:
        """The documents of one form."""
        return [one for one in self.documents if one.kind == kind]


def ellipsoid(shape: Sequence[int], centre: Sequence[float], radii: Sequence[float]) -> NDArray[np.bool_]:
    """(K, J, I) about `centre` (k, j, i), with a notch, so that a mirrored or turned one is another."""
    k, j, i = np.indices(shape)
    distances = [((at - c) / r) ** 2 for at, c, r in zip((k, j, i), centre, radii, strict=True)]
    notch = (j < centre[1]) & (i < centre[2])
    made: NDArray[np.bool_] = (sum(distances) <= 1) & ~notch
    return made


def phantom_ct(folder: Path, pool: DecoderPool) -> Case:
    """The demo's CT of the chest, a lesion painted into the left lung."""
    case = phantom.make_case(3)
    mask = ellipsoid((len(case.datasets), phantom.ROWS, phantom.COLUMNS), (12, 52, 88), (3, 13, 8))
    datasets = sorted(case.datasets, key=lambda ds: float(ds.ImagePositionPatient[2]))
    for plane, ds in zip(mask, datasets, strict=True):
        stored = ds.pixel_array.copy()
        stored[plane] = _PAINTED_HU - phantom.INTERCEPT_HU
        ds.PixelData = stored.astype("<u2").tobytes()
    return _case(datasets, mask, folder, pool, procedure=Code("25045-6", "LN", "CT unspecified body region"))


def real_ct(folder: Path, pool: DecoderPool) -> Case:
    """Three slices of a real CT of the liver, nothing painted: the outline alone says where."""
    files = sorted(require_shared("data/dicom/dcmqi/data/segmentations/ct-3slice").glob("*.dcm"))
    datasets = sorted(map(dcmread, files), key=lambda ds: float(ds.ImagePositionPatient[2]))
    mask = ellipsoid((len(datasets), datasets[0].Rows, datasets[0].Columns), (1, 250, 180), (1.2, 60, 40))
    return _case(datasets, mask, folder, pool, procedure=Code("25045-6", "LN", "CT unspecified body region"))


def radiograph(folder: Path, pool: DecoderPool) -> Case:
    """A real radiograph of the chest."""
    path = min(require_shared("data/cxr-severity/dicom").rglob("*.dcm"))
    ds = dcmread(path)
    mask = ellipsoid((1, ds.Rows, ds.Columns), (0, 0.55 * ds.Rows, 0.3 * ds.Columns), (1, 0.12 * ds.Rows, 0.1 * ds.Columns))
    return _case([ds], mask, folder, pool, procedure=reports.ALGORITHM.procedure)


CASES: Final[Mapping[str, Callable[[Path, DecoderPool], Case]]] = {"phantom": phantom_ct, "ct": real_ct, "radiograph": radiograph}


def _case(datasets: Sequence[Dataset], mask: NDArray[np.bool_], folder: Path, pool: DecoderPool, *, procedure: Code) -> Case:
    """`datasets` in the order of the planes of `mask`, which is that of their positions."""
    series = factories.spool(cast(Sequence[FileDataset], datasets), folder)  # it only writes them
    loaded = volume.load(series, kind="radiograph" if len(datasets) == 1 else "volume", pool=pool)
    region = region_of(mask, series, affine=loaded.affine)
    assert loaded.sop_instance_uids == region.sop_instance_uids
    # A network's is coarser; on the image's own grid it can be compared.
    blurred = ndimage.gaussian_filter(mask.astype(np.float32), (0.5, 3, 3)) if loaded.affine is not None else None
    saliency = () if blurred is None else (Saliency(blurred.astype(np.float16), loaded.affine, "image", loaded.sop_instance_uids),)
    made = reports.result(
        [one.path for one in series.instances],
        algorithm=replace(reports.ALGORITHM, procedure=procedure),
        inputs=replace(reports.INPUTS, series={"image": series}, missing_causes=("nothing is known under its code",)),
        findings=[replace(reports.FINDINGS[0], regions=(region,), saliency=saliency), *reports.FINDINGS[1:]],
    )
    planes = {"image": tuple(zip(region.sop_instance_uids, region.frame_numbers, strict=True))}
    result = replace(made, planes=planes, decoders=pool)
    return Case(tuple(one.path for one in series.instances), region, result, forms.author(result, DICOM_KINDS))
