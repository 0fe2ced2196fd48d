"""Seconds from the files of one CT series to a float32 volume with its affine, and on to the network's tensor: ours and the peers.

``python -m tests.bench.load [--slices 300] [--rounds 5] [--scratch DIR]`` prints one JSON line a figure. The readers take turns in one run,
files in the page cache; what is quoted is the median of the rounds and each reader's ratio to ours. Ours has warm
decoding processes, as in the daemon, checks each file's digest, and proves the geometry; the others do neither.

"volume": float32 (K, J, I) in HU, and the affine. "tensor": the (1, X, Y, Z) that a bundle's network gets, by our transforms or MONAI's.
"bare decoder": the codestreams, already in memory and apart, through the codec and nothing else, in as many processes as cores.
MONAI Deploy's loader (`monai-deploy-app-sdk`) is not installed and not compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pydicom
import torch
from numpy.typing import NDArray
from pydicom.encaps import generate_frames
from pydicom.pixels.decoders.base import DecodeRunner
from pydicom.pixels.decoders.gdcm import _decode_frame
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLosslessSV1

from models.image_spec import ImageSpec
from models.transforms import volume_tensor
from tests import factories
from worker.domain import Series, Volume
from worker.imaging import volume
from worker.imaging.decoding import DecoderPool

SYNTAXES: Final = {"uncompressed": ExplicitVRLittleEndian, "JPEG lossless (.70)": JPEGLosslessSV1, "JPEG 2000 lossless": JPEG2000Lossless}
SPEC: Final = ImageSpec("image", "volume", ("CT",), (128, 128, 96), spacing_mm=(2.5, 2.5, 3.0), window_hu=(-1000, 400))
SPACING_MM: Final = (1.0, 0.7, 0.7)
#: What a reader made, and the object that it lies in.
Made = tuple[NDArray[np.float32], object]
Read = Callable[[Series, Path], Made]
Then = Callable[[Any], Any]


def phantom(slices: int, *, size: int = 512) -> NDArray[np.float32]:
    """Return (slices, size, size) of whole HU: air, a body, lungs, ribs, vessels; noise of 12 HU in air and 35 in the body.

    With it JPEG 2000 comes down to about half of 16 bits a pixel, as abdominal and lung CT of thin slices does.
    """
    rng = np.random.default_rng(5)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j].astype(np.float32)
    made = np.empty((slices, size, size), np.float32)
    for k in range(slices):
        at = k / slices
        body = (x / 0.85) ** 2 + (y / 0.6) ** 2 < 1
        lungs = ((abs(x) - 0.38) / 0.25) ** 2 + (y / (0.42 - 0.2 * at)) ** 2 < 1
        ribs = abs(np.hypot(x / 0.8, y / 0.55) - 1) < 0.03 * (np.sin(20 * np.arctan2(y, x) + 9 * at) > 0.3)
        vessels = lungs & (np.sin(40 * x + 5 * at) * np.sin(37 * y) > 0.9)
        hu = np.select([vessels, ribs, lungs, body], [40, 700, -850, 30 + 20 * np.sin(9 * x) * np.cos(7 * y)], -1000.0)
        noise = rng.standard_normal((size, size), np.float32) * np.where(body, 35, 12)
        made[k] = np.clip(np.rint(hu + noise), -1024, 3071)
    return made


def spooled(name: str, folder: Path, slices: int) -> Series:
    """Make the series in one transfer syntax, or find it in `folder` as an earlier run left it."""
    paths = [folder / f"{k:05d}.dcm" for k in range(slices)]
    if not all(path.exists() for path in paths):
        plain = factories.make_ct(hu=phantom(slices), spacing_mm=SPACING_MM, is_signed=True)
        with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
            encoded = pool.map(partial(factories.encode, transfer_syntax=SYNTAXES[name]), plain, chunksize=8)
            for ds, path in zip(encoded, paths, strict=True):
                factories.write(ds, path)
    first = pydicom.dcmread(paths[0], stop_before_pixels=True)
    return Series(str(first.SeriesInstanceUID), "CT", "CHEST", "", tuple(factories.instance_of(path) for path in paths))


def checked(affine: NDArray[np.float64], array: NDArray[np.float32], owner: object = None) -> Made:
    """Check that a volume is of float32 and has a voxel of the right size."""
    voxel_mm = sorted(np.linalg.norm(affine[:3, :3], axis=0))
    assert np.allclose(voxel_mm, sorted(SPACING_MM), atol=1e-3), voxel_mm
    assert array.dtype == np.float32, array.dtype
    return array, owner


def by_monai(series: Series, folder: Path, reader: Any) -> Made:
    """Load with LoadImage and PydicomReader, as its documentation does."""
    image = reader(folder)
    return checked(image.affine.numpy(), image.numpy(), image)


def by_simpleitk(series: Series, folder: Path) -> Made:
    """Load with ImageSeriesReader, the rescale in float32; the names ordered by GDCM."""
    import SimpleITK as sitk  # noqa: N813  its usual name

    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    reader.SetOutputPixelType(sitk.sitkFloat32)
    image = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return checked(affine, sitk.GetArrayViewFromImage(image), image)  # a view: no copy


def by_dcm2niix(series: Series, folder: Path) -> Made:
    """Load with dcm2niix into an uncompressed NIfTI file, and that with nibabel."""
    import nibabel

    with tempfile.TemporaryDirectory() as made:
        subprocess.run(["dcm2niix", "-z", "n", "-b", "n", "-f", "made", "-o", made, str(folder)], check=True, capture_output=True)
        image = nibabel.load(Path(made, "made.nii"))
        return checked(image.affine, image.get_fdata(dtype=np.float32))


def by_us(series: Series, folder: Path, pool: DecoderPool) -> Made:
    """Load as the daemon does."""
    made = volume.load(series, kind="volume", pool=pool)
    assert made.affine is not None
    return checked(made.affine, made.array, made)


def our_tensor(made: Volume) -> torch.Tensor:
    """Transform as the daemon does."""
    assert made.affine is not None
    return volume_tensor(made.array, made.affine, SPEC)


def monai_tensor() -> Then:
    """Return the same steps with MONAI's transforms alone."""
    from monai.transforms import Compose, EnsureChannelFirst, Orientation, Resize, ResizeWithPadOrCrop, ScaleIntensityRange

    view = [round(n * mm / by) for n, mm, by in zip(SPEC.size, SPEC.spacing_mm, SPACING_MM[::-1], strict=True)]
    steps: Then = Compose(
        [
            EnsureChannelFirst(channel_dim="no_channel"),
            Orientation("RAS", labels=None),
            ScaleIntensityRange(*SPEC.window_hu, 0.0, 1.0, clip=True),
            ResizeWithPadOrCrop(view),
            Resize(SPEC.size, mode="area"),
        ]
    )
    return steps


def readers(pool: DecoderPool) -> dict[str, Read]:
    """Return ours and each peer that is here, with a line for each that is not."""
    from monai.transforms import LoadImage

    load = LoadImage(reader="PydicomReader", image_only=True, dtype=np.float32)
    found: dict[str, Read] = {"ours": partial(by_us, pool=pool), "MONAI": partial(by_monai, reader=load)}
    if importlib.util.find_spec("SimpleITK"):
        found["SimpleITK"] = by_simpleitk
    else:
        say(missing="SimpleITK", install="pip install .[bench]")
    if shutil.which("dcm2niix") and importlib.util.find_spec("nibabel"):
        found["dcm2niix + nibabel"] = by_dcm2niix
    else:
        say(missing="dcm2niix and nibabel", install="apt-get install dcm2niix; pip install .[bench]")
    return found


def decode_bare(streams: Sequence[bytes], syntax: str) -> float:
    """Return the seconds that the codec takes for all of these codestreams, without anything else."""
    if syntax == JPEG2000Lossless:
        import openjpeg

        start = time.perf_counter()
        for stream in streams:
            openjpeg.decode(stream, j2k_format=0, reshape=False)
        return time.perf_counter() - start
    run = DecodeRunner(pydicom.uid.UID(syntax))
    options: dict[str, Any] = {
        "rows": 512, "columns": 512, "samples_per_pixel": 1, "bits_allocated": 16, "bits_stored": 16, "pixel_representation": 1,
        "photometric_interpretation": "MONOCHROME2", "number_of_frames": 1, "pixel_keyword": "PixelData",
    }  # fmt: skip
    run.set_options(**options)
    start = time.perf_counter()
    for stream in streams:
        _decode_frame(stream, run)
    return time.perf_counter() - start


def bare(series: Series, processes: int) -> float:
    """Return the seconds that the bare decoder takes on all cores: those of the slowest process."""
    datasets = [pydicom.dcmread(one.path) for one in series.instances]
    streams = [next(generate_frames(ds.PixelData, number_of_frames=1)) for ds in datasets]
    syntax = series.instances[0].transfer_syntax_uid
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(decode_bare, [streams[:1]] * processes, [syntax] * processes))  # imported, warm
        return max(pool.map(decode_bare, [streams[n::processes] for n in range(processes)], [syntax] * processes))


def say(**figure: object) -> None:
    print(json.dumps(figure), flush=True)


def main() -> None:
    """Make the series, take turns, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=SYNTAXES, nargs="*", default=list(SYNTAXES))
    parser.add_argument("--readers", nargs="*", help="of those that are here; all if not given")
    parser.add_argument("--scratch", type=Path, help="keep the series here and use them again")
    asked = parser.parse_args()
    processes = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as made, DecoderPool(processes=processes) as pool:
        pool.warm()
        ways = {name: read for name, read in readers(pool).items() if not asked.readers or name in asked.readers}
        for name in asked.only:
            folder = (asked.scratch or Path(made)) / SYNTAXES[name] / str(asked.slices)
            one_syntax(spooled(name, folder, asked.slices), folder, ways, name=name, rounds=asked.rounds, processes=processes)


def one_syntax(series: Series, folder: Path, ways: dict[str, Read], *, name: str, rounds: int, processes: int) -> None:
    """Measure the readers in turns, and compare what they made."""
    seconds: dict[str, list[float]] = defaultdict(list)
    decoder: list[float] = []
    then: dict[str, Then] = {"ours": our_tensor, "MONAI": monai_tensor()}
    for _ in range(rounds):
        sums: dict[str, float] = {}
        for way, read in ways.items():
            start = time.perf_counter()
            array, owner = read(series, folder)
            seconds[way].append(time.perf_counter() - start)
            sums[way] = float(array.sum(dtype=np.float64))
            if way in then:
                start = time.perf_counter()
                then[way](owner)
                seconds[f"{way}, tensor"].append(seconds[way][-1] + time.perf_counter() - start)
            del array, owner
        say(round={way: round(times[-1], 3) for way, times in seconds.items()}, of=name)
        assert len(set(sums.values())) <= 1, sums  # every reader made the same voxels
        if SYNTAXES[name] != ExplicitVRLittleEndian:
            decoder.append(bare(series, processes))
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    size = sum(one.size_bytes for one in series.instances)
    pixels = len(series.instances) * 512 * 512
    figure: dict[str, object] = {"bench": f"series to volume, {name}", "slices": len(series.instances), "rounds": rounds}
    figure |= {"compressed_to": round(size / (2 * pixels), 2), "torch_threads": torch.get_num_threads(), "processes": processes}
    figure["seconds"] = {way: round(median, 3) for way, median in medians.items()}
    figure["best_seconds"] = {way: round(min(times), 3) for way, times in seconds.items()}
    figure["times_ours"] = {
        way: round(median / medians[base], 2)
        for way, median in medians.items()
        if (base := "ours, tensor" if "tensor" in way else "ours") in medians and base != way
    }
    if decoder and "ours" in medians:
        figure["bare_decoder_s"] = round(statistics.median(decoder), 3)
        figure["share_of_bare_decoder"] = round(statistics.median(decoder) / medians["ours"], 2)
    say(**figure)


if __name__ == "__main__":
    main()
