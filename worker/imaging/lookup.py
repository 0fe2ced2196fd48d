"""Lookup tables of one file, palette and modality LUT: parsed, checked against their descriptors, applied.

Not here: colours (color.py), when a table counts (pixels.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from worker.errors import PixelError

_MODALITY_LUT_BITS: Final = range(8, 17)  # PS3.3 §C.11.1.1.1


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Entries (n,) u1 or u2, ``bits`` wide; stored value ``first`` takes the first, those beyond the ends take the end's."""

    first: int
    bits: int
    entries: NDArray[Any]

    def apply(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """Map stored values (frames, rows, columns)."""
        made = np.empty(pixels.shape, self.entries.dtype)
        for number, one in enumerate(pixels):
            np.take(self.entries, one.astype(np.int64) - self.first, mode="clip", out=made[number])
        return made


def table_of(descriptor: Sequence[Any], data: object, *, is_signed: bool, name: str) -> Table:
    """Return a table as its descriptor has it (PS3.3 §C.11.1.1.1, §C.7.6.3.1.5): entries, first value mapped, bits.

    Raises
    ------
    PixelError
        It is absent, not as long as its descriptor says, or has entries wider than that says.
    """
    if isinstance(data, list | tuple):  # VR US, where OW was not used
        data = np.array([int(value) & 0xFFFF for value in data], "<u2").tobytes()
    if len(descriptor) != 3 or not isinstance(data, bytes):
        raise PixelError(f"A {name} or its descriptor is absent; segmented ones are not read.")
    count, first, bits = (int(value) & 0xFFFF for value in descriptor)
    count = count or 65536
    # 8-bit entries are packed two a word; older writers gave each a word.
    width = 2 if bits > 8 or len(data) == 2 * count else 1
    if bits not in _MODALITY_LUT_BITS or len(data) != count * width + count * width % 2:
        raise PixelError(f"A {name} of {len(data)} bytes does not hold {count} entries of {bits} bits.")
    entries = np.frombuffer(data, f"<u{width}", count)
    if int(entries.max()) >= 2**bits:
        raise PixelError(f"Entries of a {name} are wider than the {bits} bits that its descriptor states.")
    return Table(first - (first >> 15 << 16 if is_signed else 0), bits, entries)


def modality_lut(items: Sequence[Dataset], *, is_signed: bool) -> tuple[Table, str]:
    """Return the Modality LUT (PS3.3 §C.11.1.1) and what its output is, a Modality LUT Type such as HU or OD."""
    if len(items) != 1:
        raise PixelError(f"The Modality LUT Sequence (0028,3000) has {len(items)} items; one is read.")
    descriptor, data = items[0].get("LUTDescriptor") or (), items[0].get("LUTData")
    data = data if isinstance(data, bytes) else list(data or ()) or None
    return table_of(tuple(descriptor), data, is_signed=is_signed, name="Modality LUT (0028,3006)"), str(
        items[0].get("ModalityLUTType") or ""
    )[:16]
