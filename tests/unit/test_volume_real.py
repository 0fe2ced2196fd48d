"""Series to volume, on real series: radiographs, references of another converter, series that are no volume; and the bench."""

from __future__ import annotations

import csv
import gzip
import math
import os
import re
import struct
import subprocess
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from tests import factories, peers
from worker.domain import Series, Volume
from worker.errors import GeometryError, PixelError
from worker.imaging import volume
from worker.imaging.decoding import DecoderPool
from worker.imaging.geometry import MIN_SLICES


def _series(files: Sequence[Path]) -> list[Series]:
    found: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        found[str(pydicom.dcmread(path, stop_before_pixels=True).SeriesInstanceUID)].append(path)
    return [Series(uid, "", "", "", tuple(factories.instance_of(path) for path in paths)) for uid, paths in found.items()]


@pytest.mark.slow
def test_all_188_real_radiographs_load(pool: DecoderPool, shared: Path) -> None:
    """Of every transfer syntax, MONOCHROME1 and 2; a chest is dense in its middle, whichever way it was written."""
    folder = shared / "data" / "cxr-severity"
    with (folder / "labels.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 188
    center, border = [], []
    for series in _series(sorted((folder / "dicom").rglob("*.dcm"))):
        one = volume.load(series, kind="radiograph", pool=pool)
        assert np.isfinite(one.array).all()
        assert 0 <= one.array.min() < one.array.max() <= 255
        _, rows, columns = one.array.shape
        center.append(float(one.array[0, rows // 2 :, columns * 3 // 8 : columns * 5 // 8].mean()))
        border.append(float(np.median(one.array[0, : rows // 12])))
    assert len(center) == 188
    assert np.mean(np.array(center) > np.array(border)) > 0.9


def _read_nifti(data: bytes) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the voxels [i, j, k], rescaled, and the RAS affine of a NIfTI-1 file with a single volume."""
    shape, (code,), (offset,) = struct.unpack_from("<3h", data, 42), struct.unpack_from("<h", data, 70), struct.unpack_from("<f", data, 108)
    slope, intercept = struct.unpack_from("<2f", data, 112)
    dtype = {2: "u1", 4: "<i2", 8: "<i4", 16: "<f4", 64: "<f8", 512: "<u2"}[code]
    voxels = np.frombuffer(data, dtype, math.prod(shape), int(offset)).reshape(shape, order="F") * (slope or 1.0) + intercept
    return voxels.astype(np.float64), np.vstack([np.array(struct.unpack_from("<12f", data, 280)).reshape(3, 4), [0, 0, 0, 1]])


def _theirs(one: Volume, nifti: bytes) -> NDArray[np.float64]:
    """Return their voxels in the order of ours: each of ours lies on one of theirs."""
    assert one.affine is not None
    voxels, ras = _read_nifti(nifti)
    assert voxels.size == one.array.size
    to_theirs = np.linalg.inv(ras) @ np.diag([-1.0, -1.0, 1.0, 1.0]) @ one.affine
    index = to_theirs[:3, :3] @ np.indices(one.array.shape).reshape(3, -1)[::-1] + to_theirs[:3, 3:]
    assert np.abs(index - np.rint(index)).max() < 1e-3
    i, j, k = np.rint(index).astype(int)
    assert min(i.min(), j.min(), k.min()) >= 0
    ordered: NDArray[np.float64] = voxels[i, j, k].reshape(one.array.shape)
    return ordered


@pytest.mark.parametrize(
    "name",
    [
        "ge/anatomical/001",
        "ge/anatomical/001_implicit",
        "generic/anatomical/001",
        "generic/anatomical/002_non_isotropic",
        "generic/compressed/001",
        "generic/compressed_jpeg/001",
        "generic/compressed_jpegls/001",
        "generic/compressed_rle/001",
    ],
)
def test_real_series_have_the_voxels_and_places_of_their_reference(pool: DecoderPool, shared: Path, name: str) -> None:
    """dicom2nifti's reference files: each of our voxels lies on one of theirs, with its value."""
    folder = shared / "data" / "dicom" / "dicom2nifti" / name
    (series,) = _series([path for path in sorted(folder.rglob("*")) if path.is_file()])
    one = volume.load(series, kind="volume", pool=pool)
    reference = gzip.decompress(folder.with_name(folder.name + "_ground_truth.nii.gz").read_bytes())
    np.testing.assert_allclose(one.array, _theirs(one, reference), rtol=1e-6)


def _dcm2niix(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Convert the files of one series, and return the NIfTI files."""
    program = peers.require("dcm2niix")
    (folder / "in").mkdir(parents=True)
    for number, path in enumerate(paths):
        (folder / "in" / f"{number}.dcm").symlink_to(path)
    # Not merged, not cropped; the rescale of the header and not Philips' own (-p n).
    options = ["-b", "n", "-z", "n", "-m", "n", "-x", "n", "-p", "n", "-f", "out", "-o", str(folder)]
    done = subprocess.run([program, *options, str(folder / "in")], check=False, capture_output=True, timeout=60)
    assert done.returncode in {0, 2}  # 2: nothing that it can read
    return sorted(folder.glob("*.nii"))


@pytest.mark.peer
@pytest.mark.requirement("P15")
def test_every_real_series_that_is_a_volume_has_the_voxels_and_places_of_dcm2niix(pool: DecoderPool, shared: Path, tmp_path: Path) -> None:
    """What dcm2niix reads, which is no JPEG-LS. It keeps padding, where we take the least real value, and maps to real world values."""
    compared = []
    root = shared / "data" / "dicom"
    by_series: dict[tuple[Path, str], dict[str, Path]] = defaultdict(dict)
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        try:
            instance = factories.instance_of(path)
            uid = str(pydicom.dcmread(path, specific_tags=["SeriesInstanceUID"]).SeriesInstanceUID)
        except Exception:  # noqa: BLE001  damaged headers make pydicom raise anything
            continue
        by_series[path.parent, uid].setdefault(instance.sop_instance_uid, path)
    for number, ((folder, _), paths) in enumerate(by_series.items()):
        if len(paths) < MIN_SLICES:
            continue
        (series,) = _series(list(paths.values()))
        try:
            one = volume.load(series, kind="volume", pool=pool)
        except (GeometryError, PixelError):
            continue
        if (written := _dcm2niix(list(paths.values()), tmp_path / str(number))) != []:
            (nifti,) = written
            theirs = _theirs(one, nifti.read_bytes())
            if mapped := pydicom.dcmread(next(iter(paths.values())), stop_before_pixels=True).get("RealWorldValueMappingSequence"):
                theirs = (theirs - mapped[0].RealWorldValueIntercept) / mapped[0].RealWorldValueSlope
            is_padding = (theirs < one.array.min()) & (one.array == one.array.min())
            np.testing.assert_allclose(one.array[~is_padding], theirs[~is_padding], rtol=1e-5, atol=1e-3)
            compared.append(str(folder.relative_to(root)))
    assert len(compared) == 15, compared


@pytest.mark.peer
@pytest.mark.requirement("P8")
def test_a_corrected_tilt_is_that_of_dcm2niix(pool: DecoderPool, shared: Path, tmp_path: Path) -> None:
    """To the rounding of its integers; but for the row at the edge, of which one neighbor was not scanned and dcm2niix takes the other."""
    folder = shared / "data" / "dicom" / "dicom2nifti" / "failing" / "gantrytilting" / "001"
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    one = volume.load(_series(paths)[0], kind="volume", pool=pool, gantry_tilt="correct")
    (nifti,) = [path for path in _dcm2niix(paths, tmp_path) if "Tilt" in path.name]
    off = abs(one.array - _theirs(one, nifti.read_bytes()))
    assert [int((plane > 0.51).any(axis=1).sum()) for plane in off] == [0, 1, 1, 1]


@pytest.mark.requirement("P8")
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("gantrytilting/001", "gantry tilted by 14.00 degrees"),
        ("notavolume/001", "slices stand where another does"),
        ("slicecount/001", "needs at least 3 slices; the series has 2"),
        ("sliceincrement/001", "gap of 10.00 mm between slices 3 and 4 of 4, where 5.00 mm is usual; 1 missing"),
        ("sliceincrement/002", "gap of 1.50 mm between slices 3 and 4 of 4, where 0.75 mm is usual; 1 missing"),
        ("sliceorientation/001", "normals are up to 90.00 degrees apart"),
    ],
)
def test_real_series_that_are_no_volume_are_refused_with_their_cause(pool: DecoderPool, shared: Path, name: str, sentence: str) -> None:
    folder = shared / "data" / "dicom" / "dicom2nifti" / "failing" / name
    (series,) = _series([path for path in sorted(folder.rglob("*")) if path.is_file()])
    with pytest.raises(GeometryError, match=re.escape(sentence)):
        volume.load(series, kind="volume", pool=pool)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("Brainix/Epi", (22, 256, 256)),
        ("Brainix/Flair", (22, 288, 288)),
        ("Knee/T1", (24, 512, 512)),
        ("Knee/T2", (26, 560, 560)),
    ],
)
def test_real_mr_series_load(pool: DecoderPool, shared: Path, name: str, shape: tuple[int, int, int]) -> None:
    (series,) = _series(sorted((shared / "data" / "dicom" / "orthanc-tests" / name).glob("*.dcm")))
    one = volume.load(series, kind="volume", pool=pool)
    assert one.array.shape == shape
    assert one.array.min() >= 0


def test_a_real_localizer_series_is_refused(pool: DecoderPool, shared: Path) -> None:
    (series,) = _series(sorted((shared / "data" / "dicom" / "orthanc-tests" / "Knix" / "Loc").glob("*.dcm")))
    with pytest.raises(GeometryError, match="18 of 27 slices have another orientation"):
        volume.load(series, kind="volume", pool=pool)


@pytest.mark.slow
def test_bench_a_ct_of_200_slices(pool: DecoderPool, tmp_path: Path) -> None:
    """Print the seconds of loading 200 x 512 x 512, uncompressed, two children; aim 1.2 s on two idle cores."""
    series = factories.spool(factories.make_ct(hu=np.broadcast_to(factories.known_hu(1, 512, 512), (200, 512, 512))), tmp_path)
    took = []
    for _ in range(3):
        started = time.perf_counter()
        one = volume.load(series, kind="volume", pool=pool)
        took.append(time.perf_counter() - started)
    assert one.array.shape == (200, 512, 512)
    print(f"CT, 200 slices: {min(took):.2f} s (best of 3, load {os.getloadavg()[0]:.1f})")
    assert min(took) < 10
