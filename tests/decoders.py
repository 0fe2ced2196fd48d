"""One warm pool of decoders, and reading one file by it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

import pytest
from pydicom.dataset import FileDataset
from pydicom.uid import JPEGBaseline8Bit

from tests import factories
from worker.errors import GeometryError, PixelError
from worker.imaging.decoding import CODECS, DecoderPool
from worker.imaging.frame import Frame

LOSSLESS: Final = [uid for uid in CODECS if uid not in {JPEGBaseline8Bit, "1.2.840.10008.1.2.4.91"}]


def read(pool: DecoderPool, path: Path) -> Frame:
    """Read one file."""
    ((one,),) = pool.read([path], [hashlib.sha256(path.read_bytes()).hexdigest()])
    return one


def refused(pool: DecoderPool, ds: FileDataset, folder: Path) -> str:
    """Return the sentence with which `ds` is refused."""
    with pytest.raises((PixelError, GeometryError)) as caught:
        read(pool, factories.write(ds, folder / "one.dcm"))
    return str(caught.value)
