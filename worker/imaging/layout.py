"""What the header says of the pixels, its numbers agreeing with each other, before memory is taken for them.

Not here: the bytes themselves (samples.py), what the values mean (values.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from worker.errors import PixelError
from worker.imaging.facts import Elements, integer_of, text_of

#: Photometric Interpretation (PS3.3 §C.7.6.3.1.2) → Samples per Pixel.
SAMPLES: Final = {
    "MONOCHROME1": 1, "MONOCHROME2": 1, "PALETTE COLOR": 1,
    "RGB": 3, "YBR_FULL": 3, "YBR_FULL_422": 3, "YBR_PARTIAL_422": 3, "YBR_ICT": 3, "YBR_RCT": 3,
}  # fmt: skip
GREY: Final = frozenset({"MONOCHROME1", "MONOCHROME2"})
#: PS3.3 §C.7.6.3.1.2: two chrominance samples serve two pixels.
SUBSAMPLED: Final = frozenset({"YBR_FULL_422", "YBR_PARTIAL_422"})
#: A frame may take an eighth of the child's memory (openjpeg works on 4 bytes a sample, beside input and output), all a quarter.
_FRAME_SHARE, _PIXEL_SHARE = 8, 4
#: More frames than an hour of ultrasound has; each has facts of its own.
MAX_FRAMES: Final = 1 << 17


@dataclass(frozen=True, slots=True)
class Layout:
    """Frames, size and samples as the header has them. ``bits_allocated`` is 1, 8, 16 or 32."""

    frames: int
    rows: int
    columns: int
    samples: int
    photometric: str
    planar: int
    bits_allocated: int
    bits_stored: int
    is_signed: bool

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of one sample in memory, where a bit takes a byte."""
        return np.dtype(f"<{'ui'[self.is_signed]}{max(self.bits_allocated // 8, 1)}")

    @property
    def frame_bytes(self) -> int:
        """Size of one decoded frame with all its samples."""
        return self.rows * self.columns * self.samples * self.dtype.itemsize

    @property
    def native_bytes(self) -> int:
        """Size of all frames without compression (PS3.5 §8.1.1), padded to an even length."""
        samples = 2 if self.photometric in SUBSAMPLED else self.samples
        size = -(-self.frames * self.rows * self.columns * samples * self.bits_allocated // 8)
        return size + size % 2


def layout_of(elements: Elements, *, color: str, memory_bytes: int) -> Layout:
    """Return the layout of the pixels, when the header's numbers agree with each other (PS3.3 §C.7.6.3).

    Raises
    ------
    PixelError
        They do not; or the image has colours and `color` is not "luminance"; or it needs more memory than its share.
    """
    frames = integer_of(elements, "NumberOfFrames", default=1)
    if not 1 <= frames <= MAX_FRAMES:
        raise PixelError(f"Number of Frames (0028,0008) is {frames}; from 1 to {MAX_FRAMES} are read.")
    samples, photometric = _color(elements, color)
    rows, columns = integer_of(elements, "Rows"), integer_of(elements, "Columns")
    if not (1 <= rows <= 65535 and 1 <= columns <= 65535):
        raise PixelError(f"Rows x Columns is {rows} x {columns}.")
    if photometric in SUBSAMPLED and columns % 2:
        raise PixelError(f"Chrominance is shared by two pixels, and Columns is {columns}.")
    layout = replace(_bits(elements), frames=frames, rows=rows, columns=columns, samples=samples, photometric=photometric)
    if samples > 1:
        layout = replace(layout, planar=integer_of(elements, "PlanarConfiguration", default=0))
        if layout.planar not in {0, 1} or layout.is_signed or layout.bits_allocated == 1:
            raise PixelError(
                f"Colours in Planar Configuration {layout.planar} at {layout.bits_allocated} bits "
                f"({'signed' if layout.is_signed else 'unsigned'}) are not read."
            )
    _check_fits(layout, memory_bytes)
    return layout


def _color(elements: Elements, color: str) -> tuple[int, str]:
    samples, photometric = integer_of(elements, "SamplesPerPixel"), text_of(elements, "PhotometricInterpretation")
    if SAMPLES.get(photometric) != samples:
        known = photometric if photometric in SAMPLES else "none that is read"
        raise PixelError(f"Samples per Pixel is {samples} and Photometric Interpretation {known}: they are not read together.")
    if photometric not in GREY and color != "luminance":
        raise PixelError(f"The image has colours ({photometric}); only MONOCHROME1 and MONOCHROME2 are analyzed here.")
    return samples, photometric


def _bits(elements: Elements) -> Layout:
    allocated, stored, high = integer_of(elements, "BitsAllocated"), integer_of(elements, "BitsStored"), integer_of(elements, "HighBit")
    representation = integer_of(elements, "PixelRepresentation")
    if (
        allocated not in {1, 8, 16, 32}
        or not 1 <= stored <= allocated
        or high != stored - 1
        or representation not in {0, 1}
        or (allocated == 1 and representation)
    ):
        raise PixelError(
            f"Bits Allocated {allocated}, Bits Stored {stored}, High Bit {high} and Pixel Representation {representation} "
            "are not decoded together."
        )
    return Layout(1, 1, 1, 1, "", 0, allocated, stored, representation == 1)


def _check_fits(layout: Layout, memory_bytes: int) -> None:
    one, every = layout.frame_bytes, layout.frames * layout.rows * layout.columns * layout.dtype.itemsize
    size = f"Rows {layout.rows} x Columns {layout.columns} at {layout.bits_allocated} bits"
    if one > memory_bytes // _FRAME_SHARE:
        raise PixelError(f"{size} are {one} bytes; at most {memory_bytes // _FRAME_SHARE} can be decoded.")
    if every > memory_bytes // _PIXEL_SHARE:
        raise PixelError(f"{layout.frames} frames of {size} are {every} bytes; at most {memory_bytes // _PIXEL_SHARE} can be decoded.")
