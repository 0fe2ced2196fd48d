"""What a compressed frame says of itself, read before any decoder sees it.

Encapsulated Pixel Data → one frame's bytes (PS3.5 §A.4), and the size, precision and sign in the header of a JPEG, JPEG-LS or
JPEG 2000 codestream. Not here: decoding (pixels.py). Pure functions of bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from worker.errors import PixelError

_ITEM, _DELIMITER = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
_SOI: Final = b"\xff\xd8"  # ISO/IEC 10918-1 Table B.1, and 14495-1
_SOC_SIZ: Final = b"\xff\x4f\xff\x51"  # ISO/IEC 15444-1 §A.2: SIZ comes right after SOC
# SOF0-3, 5-7, 9-11, 13-15 (10918-1 Table B.1) and SOF55 (14495-1 §C.1.1)
_FRAME_HEADERS: Final = frozenset({0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7})


@dataclass(frozen=True, slots=True)
class Stated:
    """What a codestream states; ``is_signed`` is None where the format knows no sign."""

    rows: int
    columns: int
    components: int
    precision: int
    is_signed: bool | None


def fragments_of_one_frame(value: bytes, *, is_rle: bool) -> bytes:
    """Join the fragments of the only frame in encapsulated Pixel Data.

    Raises
    ------
    PixelError
        The items do not add up, or there is more than one frame.
    """
    items = _items(value)
    if len(items) < 2 or not any(items[1:]):
        raise PixelError(f"Encapsulated Pixel Data of {len(value)} bytes holds no frame.")
    table, fragments = items[0], items[1:]
    # PS3.5 §A.4: one offset a frame; §A.4.2: an RLE frame is one fragment; a second start of image is a second frame.
    starts = sum(fragment.startswith((_SOI, _SOC_SIZ)) for fragment in fragments)
    if len(table) > 4 or starts > 1 or (is_rle and len(fragments) != 1):
        frames = max(len(table) // 4, starts, len(fragments) if is_rle else 1)
        raise PixelError(f"Number of Frames is 1, but Pixel Data holds {frames} frames.")
    return b"".join(fragments)


def _items(value: bytes) -> list[bytes]:
    items, at = [], 0
    while at + 8 <= len(value):
        tag, (length,) = value[at : at + 4], struct.unpack_from("<I", value, at + 4)
        if tag == _DELIMITER:
            break
        if tag != _ITEM or at + 8 + length > len(value):
            raise PixelError(f"Encapsulated Pixel Data is broken at byte {at} of {len(value)}.")
        items.append(value[at + 8 : at + 8 + length])
        at += 8 + length
    return items


def stated_by_codestream(stream: bytes, *, is_jpeg_2000: bool) -> Stated:
    """Read the frame header of a codestream.

    Raises
    ------
    PixelError
        There is none.
    """
    try:
        return _jpeg_2000(stream) if is_jpeg_2000 else _jpeg(stream)
    except (struct.error, IndexError) as exc:
        raise PixelError(f"A codestream of {len(stream)} bytes ends before its frame header.") from exc


def _jpeg_2000(stream: bytes) -> Stated:
    # ISO/IEC 15444-1 §A.5.1; PS3.5 §A.4.4: the bare codestream, no JP2 boxes around it.
    if not stream.startswith(_SOC_SIZ):
        raise PixelError("The pixel data are not a JPEG 2000 codestream.")
    width, height, left, top = struct.unpack_from(">4I", stream, 8)
    (components,) = struct.unpack_from(">H", stream, 40)
    precision, across, down = stream[42], stream[43], stream[44]
    if (across, down) != (1, 1):
        raise PixelError(f"The JPEG 2000 component is subsampled by {across} x {down}.")
    return Stated(height - top, width - left, components, (precision & 0x7F) + 1, bool(precision & 0x80))


def _jpeg(stream: bytes) -> Stated:
    # ISO/IEC 10918-1 §B.2: markers and segments until a frame header.
    if not stream.startswith(_SOI):
        raise PixelError("The pixel data are not a JPEG codestream.")
    at = 2
    while True:
        if stream[at] != 0xFF:
            raise PixelError(f"The JPEG codestream is broken at byte {at}.")
        marker = stream[at + 1]
        if marker == 0xFF:  # §B.1.1.2: fill bytes may precede a marker
            at += 1
            continue
        (length,) = struct.unpack_from(">H", stream, at + 2)
        if marker in _FRAME_HEADERS:
            precision, rows, columns, components = struct.unpack_from(">BHHB", stream, at + 4)
            return Stated(rows, columns, components, precision, None)
        at += 2 + length
