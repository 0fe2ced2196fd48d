"""What a compressed frame says of itself, read before any decoder sees it.

Encapsulated Pixel Data → the fragments of each frame (PS3.5 §A.4), and the size, precision and sign in the header of a JPEG, JPEG-LS or
JPEG 2000 codestream. Not here: decoding (pixels.py). Pure functions of bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from worker.errors import PixelError

_APP0, _APP14 = 0xE0, 0xEE
_ITEM, _DELIMITER = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
_SOI: Final = b"\xff\xd8"  # ISO/IEC 10918-1 Table B.1, and 14495-1
_SOC_SIZ: Final = b"\xff\x4f\xff\x51"  # ISO/IEC 15444-1 §A.2: SIZ comes right after SOC
# SOF0-3, 5-7, 9-11, 13-15 (10918-1 Table B.1) and SOF55 (14495-1 §C.1.1)
_FRAME_HEADERS: Final = frozenset({0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7})


@dataclass(frozen=True, slots=True)
class Stated:
    """What a codestream states; ``is_signed`` is None where the format knows no sign, ``is_ybr`` where it does not say."""

    rows: int
    columns: int
    components: int
    precision: int
    is_signed: bool | None
    is_ybr: bool | None = None


def frames_of(value: bytes, count: int, *, extended: bytes | None, lengths: bytes | None, is_rle: bool) -> list[list[memoryview]]:
    """Part encapsulated Pixel Data into the fragments of each of its `count` frames, without a copy.

    By the Extended Offset Table (PS3.3 §C.7.6.3.1.8) or the Basic one (PS3.5 §A.4) if there is one, else one fragment a frame, or
    by where codestreams start. Tables must point to fragments, and codestreams must start where frames do and nowhere else.

    Raises
    ------
    PixelError
        The items do not add up, a table points elsewhere, or there is another number of frames.
    """
    (_, table), *items = _items(value) or [(0, memoryview(b""))]
    if not any(len(fragment) for _, fragment in items):
        raise PixelError(f"Encapsulated Pixel Data of {len(value)} bytes holds no frame.")
    fragments = [fragment for _, fragment in items]
    starts = _starts(items, count, table=bytes(table), extended=extended, is_rle=is_rle)
    frames = [fragments[start:end] for start, end in zip(starts, [*starts[1:], len(fragments)], strict=True)]
    if len(frames) != count or (is_rle and len(fragments) != count):  # PS3.5 §A.4.2: an RLE frame is one fragment
        raise PixelError(f"Number of Frames is {count}, but Pixel Data holds {len(fragments) if is_rle else len(frames)} frames.")
    if extended and [len(one) for one in frames] != [1] * count:
        raise PixelError("The Extended Offset Table (7FE0,0001) serves frames of several fragments, which it may not.")
    if extended and not _lengths_agree(lengths, fragments):
        raise PixelError("The Extended Offset Table Lengths (7FE0,0002) are absent or not those of the fragments.")
    if not is_rle:
        heads = [[_is_start(fragment) for fragment in one] for one in frames]
        if any(any(head[1:]) for head in heads):
            raise PixelError(f"Number of Frames is {count}, but Pixel Data holds {sum(map(sum, heads))} frames.")
    return frames


def _starts(items: list[tuple[int, memoryview]], count: int, *, table: bytes, extended: bytes | None, is_rle: bool) -> list[int]:
    """Return the index of the first fragment of each frame."""
    if table and extended:
        raise PixelError("Pixel Data has a Basic and an Extended Offset Table; one of them must be empty.")
    if not table and not extended:
        if is_rle or len(items) == count:
            return list(range(len(items)))
        # A first fragment that is no start is the codestream check's to refuse.
        return [0, *(index for index, (_, fragment) in enumerate(items[1:], 1) if _is_start(fragment))]
    offsets = _numbers(extended, 8) if extended else _numbers(table, 4)
    if len(offsets) != count:
        raise PixelError(f"Number of Frames is {count}, but Pixel Data holds {len(offsets)} frames.")
    index_at = {at - items[0][0]: index for index, (at, _) in enumerate(items)}
    starts = [index_at.get(offset, -1) for offset in offsets]
    if starts[0] != 0 or any(later <= start for start, later in pairwise(starts)):
        raise PixelError(f"The offset table of {count} frames does not point to fragments of Pixel Data in turn.")
    return starts


def _numbers(data: bytes, width: int) -> list[int]:
    return [int.from_bytes(data[at : at + width], "little") for at in range(0, len(data), width)]


def _lengths_agree(lengths: bytes | None, fragments: list[memoryview]) -> bool:
    # The pad byte of an odd frame is in the fragment and not in its length.
    sizes = _numbers(lengths or b"", 8)
    return len(sizes) == len(fragments) and all(size + size % 2 == len(one) for size, one in zip(sizes, fragments, strict=True))


def _is_start(fragment: memoryview) -> bool:
    return bytes(fragment[:4]).startswith((_SOI, _SOC_SIZ))


def _items(value: bytes) -> list[tuple[int, memoryview]]:
    """Return where each item starts, and what it holds."""
    items, at, view = [], 0, memoryview(value)
    while at + 8 <= len(value):
        tag, (length,) = value[at : at + 4], struct.unpack_from("<I", value, at + 4)
        if tag == _DELIMITER:
            break
        if tag != _ITEM or at + 8 + length > len(value):
            raise PixelError(f"Encapsulated Pixel Data is broken at byte {at} of {len(value)}.")
        items.append((at, view[at + 8 : at + 8 + length]))
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
    if stream[42 : 42 + 3 * components] != stream[42:45] * components:
        raise PixelError(f"The {components} JPEG 2000 components differ in precision, sign or sampling.")
    return Stated(height - top, width - left, components, (precision & 0x7F) + 1, bool(precision & 0x80))


def _jpeg(stream: bytes) -> Stated:
    # ISO/IEC 10918-1 §B.2: markers and segments until a frame header.
    if not stream.startswith(_SOI):
        raise PixelError("The pixel data are not a JPEG codestream.")
    at, is_ybr = 2, None
    while True:
        if stream[at] != 0xFF:
            raise PixelError(f"The JPEG codestream is broken at byte {at}.")
        marker = stream[at + 1]
        if marker == 0xFF:  # §B.1.1.2: fill bytes may precede a marker
            at += 1
            continue
        (length,) = struct.unpack_from(">H", stream, at + 2)
        if marker == _APP0 and stream[at + 4 : at + 9] == b"JFIF\0" and is_ybr is None:  # ISO/IEC 10918-5 §6.2: always YCbCr
            is_ybr = True
        if marker == _APP14 and stream[at + 4 : at + 9] == b"Adobe" and length == 14:  # ISO/IEC 10918-6 §6.5.3: the colour transform
            is_ybr = stream[at + 15] == 1
        if marker in _FRAME_HEADERS:
            precision, rows, columns, components = struct.unpack_from(">BHHB", stream, at + 4)
            return Stated(rows, columns, components, precision, None, is_ybr)
        at += 2 + length
