"""Images by formula, the same on every machine: what encoders of the tests are given, and what decoders must give back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def ramp(rows: int = 33, columns: int = 48, *, bits: int, is_signed: bool = False, colors: int = 1) -> NDArray[Any]:
    """Return (rows, columns) or (rows, columns, 3): slopes over the whole range of `bits`, with a grain that lossy coding blurs."""
    j, i = np.mgrid[:rows, :columns].astype(np.int64)
    top = 2**bits - 1
    slope = (j * (columns - 1) + i * (rows - 1)) * top // (2 * (rows - 1) * (columns - 1))
    grain = (7 * j + 13 * i) % 5 * (top // 256)
    planes = [np.clip(plane + grain, 0, top) for plane in (slope, top - slope, slope // 2)][:colors]
    image = np.stack(planes, axis=-1) - (is_signed << (bits - 1))
    image[0, 0], image[-1, -1] = -(is_signed << (bits - 1)), top - (is_signed << (bits - 1))
    width = 1 if bits <= 8 else 2 if bits <= 16 else 4
    return image[..., 0].astype(f"{'ui'[is_signed]}{width}") if colors == 1 else image.astype(f"{'ui'[is_signed]}{width}")
