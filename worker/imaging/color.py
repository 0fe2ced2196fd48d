"""Colours → luminance, as a network that was taught on grey images needs it (PS3.3 §C.7.6.3.1.2).

Not here: decoding (samples.py). Nothing leaves the stored width: luminance is rounded to the bits it came in.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from worker.errors import PixelError
from worker.imaging.facts import TAGS, Elements, values_of
from worker.imaging.lookup import Table, table_of

#: PS3.3 §C.7.6.3.1.2, the first row of YBR_FULL; the same as ITU-R BT.601.
WEIGHTS: Final = (0.2990, 0.5870, 0.1140)
# Decoders give these three components back as red, green and blue.
_RED_GREEN_BLUE: Final = frozenset({"RGB", "YBR_ICT", "YBR_RCT"})


def luminance(samples: NDArray[Any], photometric: str) -> NDArray[Any]:
    """Return the luminance (rows, columns) of one frame (rows, columns, 3), or of its Y alone where nothing else is needed.

    YBR_PARTIAL is stretched from 16 to 235 onto 0 to 255, its footroom and headroom cut off.
    """
    if photometric in _RED_GREEN_BLUE:
        return _rounded(*(samples[..., part] for part in range(3))).astype(samples.dtype)
    first = samples[..., 0]
    if photometric == "YBR_PARTIAL_422":
        return np.rint((first.astype(np.float32) - 16) * (255 / 219)).clip(0, 255).astype(samples.dtype)
    return first


def _rounded(red: NDArray[Any], green: NDArray[Any], blue: NDArray[Any]) -> NDArray[np.float64]:
    exact: NDArray[np.float64] = WEIGHTS[0] * red + WEIGHTS[1] * green + WEIGHTS[2] * blue
    return np.rint(exact, out=exact)


def palette_luminance(elements: Elements, *, is_signed: bool) -> Table:
    """Return the table from the indices of a palette to the luminance of each entry, 8 or 16 bits wide (PS3.3 §C.7.9).

    Raises
    ------
    PixelError
        A table is absent, segmented, not as long as its descriptor says, or the three do not go together.
    """
    tables = []
    for name in ("Red", "Green", "Blue"):
        descriptor = values_of(elements, f"{name}PaletteColorLookupTableDescriptor")
        data = getattr(elements.get(TAGS[f"{name}PaletteColorLookupTableData"]), "value", None)
        tables.append(table_of(descriptor, data, is_signed=is_signed, name="Palette Color Lookup Table (0028,1201)"))
    first, bits, length = tables[0].first, tables[0].bits, tables[0].entries.size
    if {(one.first, one.bits, one.entries.size) for one in tables} != {(first, bits, length)} or bits not in {8, 16}:
        raise PixelError("The three Palette Color Lookup Tables have different descriptors, or entries of neither 8 nor 16 bits.")
    return Table(first, bits, _rounded(*(one.entries for one in tables)).astype(f"u{bits // 8}"))
