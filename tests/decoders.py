"""One warm pool of decoders, and reading one file by it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Final

import pytest
from numpy.typing import NDArray
from pydicom.dataset import FileDataset
from pydicom.uid import HTJ2K, JPEG2000, ExplicitVRLittleEndian, HTJ2KLossless, HTJ2KLosslessRPCL, JPEGBaseline8Bit, JPEGExtended12Bit

from tests import factories
from worker.errors import GeometryError, PixelError
from worker.imaging.codecs import decodable_transfer_syntaxes
from worker.imaging.decoding import DecoderPool
from worker.imaging.frame import Frame

_LOSSY: Final = {JPEGBaseline8Bit, JPEGExtended12Bit, JPEG2000, HTJ2K}
#: Nothing here encodes HTJ2K: its codestreams are golden files (tests/unit/test_codecs.py).
ENCODED: Final = [uid for uid in decodable_transfer_syntaxes() if uid not in {HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K}]
LOSSLESS: Final = [uid for uid in ENCODED if uid not in _LOSSY]


def read(pool: DecoderPool, path: Path, *, color: str = "refuse") -> Frame:
    """Read one file of one frame."""
    (one,) = read_frames(pool, path, color=color)
    return one


def read_frames(pool: DecoderPool, path: Path, *, color: str = "refuse") -> tuple[Frame, ...]:
    """Read one file."""
    (frames,) = pool.read([path], [hashlib.sha256(path.read_bytes()).hexdigest()], color=color)
    return frames


def refused(pool: DecoderPool, ds: FileDataset, folder: Path, *, color: str = "refuse") -> str:
    """Return the sentence with which `ds` is refused."""
    with pytest.raises((PixelError, GeometryError)) as caught:
        read(pool, factories.write(ds, folder / "one.dcm"), color=color)
    return str(caught.value)


def make_image(
    stored: NDArray[Any], *, bits_stored: int, photometric: str = "MONOCHROME2", transfer_syntax: str = ExplicitVRLittleEndian
) -> FileDataset:
    """Make an image of `stored` (frames, rows, columns) or (frames, rows, columns, 3), colour by pixel, in a transfer syntax."""
    ds = factories.make_radiograph(stored=stored[0, :, :, 0] if stored.ndim == 4 else stored[0], bits_stored=bits_stored)
    ds.NumberOfFrames, ds.PhotometricInterpretation = len(stored), photometric
    if stored.ndim == 4:
        ds.SamplesPerPixel, ds.PlanarConfiguration = 3, 0
    data = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
    ds.PixelData = data + b"\0" * (len(data) % 2)
    return factories.encode(ds, transfer_syntax)
