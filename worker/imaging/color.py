"""Colours → luminance, as a network that was taught on grey images needs it (PS3.3 §C.7.6.3.1.2).

Not here: decoding (samples.py). Nothing leaves the stored width: luminance is rounded to the bits it came in.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from worker.errors import PixelError
from worker.imaging.facts import TAGS, Elements, values_of

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


def palette_luminance(elements: Elements, *, is_signed: bool) -> tuple[int, NDArray[Any]]:
    """Return the first value that the palette maps and the luminance of each entry (PS3.3 §C.7.9), 8 or 16 bits wide.

    Raises
    ------
    PixelError
        A table is absent, segmented, or not as long as its descriptor says.
    """
    tables, descriptors = [], set()
    for name in ("Red", "Green", "Blue"):
        descriptor = values_of(elements, f"{name}PaletteColorLookupTableDescriptor")
        data = elements.get(TAGS[f"{name}PaletteColorLookupTableData"])
        if len(descriptor) != 3 or data is None or not isinstance(data.value, bytes):
            raise PixelError("A Palette Color Lookup Table (0028,1201) or its descriptor is absent; segmented ones are not read.")
        count, first, bits = (int(value) & 0xFFFF for value in descriptor)
        descriptors.add((count, first, bits))
        count = count or 65536
        # PS3.3 §C.7.6.3.1.6: 8-bit entries are packed two a word; older writers gave each a word.
        width = 2 if bits == 16 or len(data.value) == 2 * count else 1
        if bits not in {8, 16} or len(data.value) != count * width + count * width % 2:
            raise PixelError(f"A Palette Color Lookup Table of {len(data.value)} bytes does not hold {count} entries of {bits} bits.")
        tables.append(np.frombuffer(data.value, f"<u{width}", count))
        if bits == 8 and int(tables[-1].max()) > 255:
            raise PixelError("Entries of a Palette Color Lookup Table are wider than the 8 bits that its descriptor states.")
    if len(descriptors) != 1:
        raise PixelError("The three Palette Color Lookup Tables have different descriptors.")
    ((_, first, bits),) = descriptors
    return first - (first >> 15 << 16 if is_signed else 0), _rounded(*tables).astype(f"u{bits // 8}")
