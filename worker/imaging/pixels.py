"""What one file holds: checked, parsed and decoded. Runs in a decoding process (child.py), and nowhere else.

::

    open once ─▶ sha256 ─▶ file meta ─▶ header ─▶ sizes believed? ─▶ codestream's own header ─▶ decode ─▶ bits stored

Every size is checked against another witness before memory is taken for it: header against limit, header against length,
header against codestream, decoder's output against header. Whatever does not agree is refused, never repaired.
Sentences say which attribute and which numbers; never a value of one, which could be a patient's.
Not here: geometry, rescale and photometric interpretation (volume.py).
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from importlib import import_module
from io import BytesIO
from typing import Any, Final

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels.decoders.base import get_decoder

from worker.errors import PixelError, Retry, StoredFileLost
from worker.imaging.codestream import fragments_of_one_frame, stated_by_codestream
from worker.imaging.decoding import CODECS
from worker.imaging.facts import OVERLAY_BITS, TAGS, WANTED, Elements, integer_of, text_of, values_of
from worker.imaging.functional_groups import frames_of

# pydicom's name for the plug-in around each decoding module.
_PLUGINS: Final = {"gdcm": "gdcm", "jpeg_ls": "pyjpegls", "openjpeg": "pylibjpeg", "rle": "pylibjpeg"}
#: A file may take a quarter of the child's memory (pydicom copies the pixels out of it), its pixels an eighth
#: (openjpeg works on 4 bytes a sample, beside input and output).
_FILE_SHARE, _PIXEL_SHARE = 4, 8
# PS3.5 §G.3.1: two bytes make at most 128, so no image is more than 64 times its RLE stream.
_RLE_MAX_RATIO: Final = 64


@dataclass(frozen=True, slots=True)
class Layout:
    """What the header says of the pixels, its numbers agreeing with each other. ``dtype`` is Bits Allocated wide."""

    rows: int
    columns: int
    bits_stored: int
    dtype: np.dtype[Any]

    @property
    def bits_allocated(self) -> int:
        """8 or 16."""
        return 8 * self.dtype.itemsize

    @property
    def is_signed(self) -> bool:
        """Pixel Representation is 1."""
        return self.dtype.kind == "i"

    @property
    def size_bytes(self) -> int:
        """Size of the decoded pixels, without a pad byte."""
        return self.rows * self.columns * self.dtype.itemsize


def read(path: str, digest: str, *, memory_bytes: int) -> tuple[dict[str, Any], list[dict[str, Any]], NDArray[Any]]:
    """Read one file.

    Returns
    -------
    shared, frames, pixels
        The facts that all its frames share and those of each frame, both as `Frame` names them; the stored pixel values
        (frames, rows, columns).
    """
    data = _load(path, digest, limit=memory_bytes // _FILE_SHARE)
    elements, transfer_syntax_uid = _parse(data)
    pixel_data = elements.get(TAGS["PixelData"])
    if pixel_data is None or not isinstance(pixel_data.value, bytes) or not pixel_data.value:
        raise PixelError("Pixel Data (7FE0,0010) is absent or empty, or the file ends before it does.")
    _check_is_one_grey_frame(elements)
    layout = _layout(elements, limit=memory_bytes // _PIXEL_SHARE)
    codec = CODECS[transfer_syntax_uid]
    if pixel_data.is_undefined_length != bool(codec):
        raise PixelError("Pixel Data (7FE0,0010) is encapsulated where the transfer syntax is native, or the other way round.")
    pixels = _decode(pixel_data.value, layout, transfer_syntax_uid) if codec else _native(pixel_data.value, layout)
    pixels, padding = _bits_stored(pixels, _padding(elements, layout), elements, layout)
    shared, frames = frames_of(elements, transfer_syntax_uid, count=1)
    return shared | {"padding": padding}, frames, pixels[np.newaxis]


def _load(path: str, digest: str, *, limit: int) -> bytes:
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise PixelError("The stored file is not a regular file.")
            if status.st_size > limit:
                raise PixelError(f"The stored file has {status.st_size} bytes; at most {limit} can be decoded.")
            data = file.read(status.st_size + 1)
    except FileNotFoundError as exc:
        raise StoredFileLost("A stored file is missing: have the study sent again, then retry it.") from exc
    except OSError as exc:
        raise Retry(f"The stored file cannot be read now (errno {exc.errno}).") from exc
    if hashlib.sha256(data).hexdigest() != digest:
        raise StoredFileLost("A stored file changed on our disk: have the study sent again, then retry it.")
    return data


def _parse(data: bytes) -> tuple[Elements, str]:
    """Parse file meta and data set (PS3.10 §7); the transfer syntax is judged before pydicom would inflate a deflated one."""
    if data[128:132] != b"DICM":
        raise PixelError("The stored file has no DICOM prefix at byte 128.")
    meta = pydicom.filereader.read_dataset(
        BytesIO(data[132 : 132 + 65536]), is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, _vr, _n: tag >> 16 != 2
    )
    uid = str(meta.get("TransferSyntaxUID", ""))
    if uid not in CODECS:
        # A registered UID says nothing of a patient; anything else is not repeated.
        known = pydicom.uid.UID(uid)
        name = known.name if known in pydicom.uid.AllTransferSyntaxes else "which is absent or unknown"
        raise PixelError(f"The transfer syntax, {name}, is not decoded.")
    return {int(element.tag): element for element in pydicom.dcmread(BytesIO(data), specific_tags=list(WANTED))}, uid


def _check_is_one_grey_frame(elements: Elements) -> None:
    frames = integer_of(elements, "NumberOfFrames", default=1)
    if frames != 1:
        raise PixelError(f"Multi-frame objects are not analyzed: Number of Frames (0028,0008) is {frames}.")
    samples = integer_of(elements, "SamplesPerPixel")
    photometric = text_of(elements, "PhotometricInterpretation")
    if samples != 1 or photometric not in {"MONOCHROME1", "MONOCHROME2"}:
        raise PixelError(f"Only MONOCHROME1 and MONOCHROME2 images are analyzed; this one is neither, with {samples} samples per pixel.")


def _layout(elements: Elements, *, limit: int) -> Layout:
    """Return the layout of the pixels, when the header's numbers agree with each other (PS3.3 §C.7.6.3)."""
    rows, columns = integer_of(elements, "Rows"), integer_of(elements, "Columns")
    allocated, stored, high = integer_of(elements, "BitsAllocated"), integer_of(elements, "BitsStored"), integer_of(elements, "HighBit")
    representation = integer_of(elements, "PixelRepresentation")
    if not (1 <= rows <= 65535 and 1 <= columns <= 65535):
        raise PixelError(f"Rows x Columns is {rows} x {columns}.")
    if allocated not in {8, 16} or not 1 <= stored <= allocated or high != stored - 1 or representation not in {0, 1}:
        raise PixelError(
            f"Bits Allocated {allocated}, Bits Stored {stored}, High Bit {high} and Pixel Representation {representation} "
            "are not decoded together."
        )
    layout = Layout(rows, columns, stored, np.dtype(f"<{'ui'[representation]}{allocated // 8}"))
    if layout.size_bytes > limit:
        raise PixelError(
            f"Rows {rows} x Columns {columns} at {allocated} bits are {layout.size_bytes} bytes; at most {limit} can be decoded."
        )
    return layout


def _native(value: bytes, layout: Layout) -> NDArray[Any]:
    size = layout.size_bytes + layout.size_bytes % 2
    if len(value) != size:
        raise PixelError(f"Pixel Data (7FE0,0010) has {len(value)} bytes where Rows, Columns and Bits Allocated need {size}.")
    return np.frombuffer(value, layout.dtype, layout.rows * layout.columns).reshape(layout.rows, layout.columns)


def _decode(value: bytes, layout: Layout, transfer_syntax_uid: str) -> NDArray[Any]:
    """Decode one encapsulated frame (PS3.5 §A.4) with the one plug-in that CODECS names."""
    codec = CODECS[transfer_syntax_uid]
    stream = fragments_of_one_frame(value, is_rle=codec == "rle")
    container, precision = layout.dtype, layout.bits_stored
    if codec == "rle":
        if len(stream) * _RLE_MAX_RATIO < layout.size_bytes:
            raise PixelError(f"An RLE stream of {len(stream)} bytes cannot hold {layout.size_bytes} bytes of pixels.")
    else:
        precision = _precision(stream, layout, is_jpeg_2000=codec == "openjpeg")
        if codec != "gdcm":  # these two size their samples by the precision of the codestream, and JPEG-LS has no sign
            container = np.dtype(f"<{'i' if layout.is_signed and codec == 'openjpeg' else 'u'}{(precision + 7) // 8}")
    buffer = _run_codec(value, layout, transfer_syntax_uid, precision=precision)
    if len(buffer) != layout.rows * layout.columns * container.itemsize:
        raise PixelError(
            f"The decoder {codec} made {len(buffer)} bytes where the header and the codestream state "
            f"{layout.rows * layout.columns * container.itemsize}."
        )
    pixels: NDArray[Any] = np.frombuffer(buffer, container).reshape(layout.rows, layout.columns).astype(layout.dtype, copy=False)
    # JPEG-LS gives back the two's complement of `precision` bits.
    return _sign_extended(pixels, precision) if codec == "jpeg_ls" and layout.is_signed else pixels


def _run_codec(value: bytes, layout: Layout, transfer_syntax_uid: str, *, precision: int) -> bytes | bytearray | memoryview:
    codec = CODECS[transfer_syntax_uid]
    try:
        import_module(codec)
        buffer, _ = get_decoder(pydicom.uid.UID(transfer_syntax_uid)).as_buffer(
            value,
            index=0,
            decoding_plugin=_PLUGINS[codec],
            rows=layout.rows,
            columns=layout.columns,
            number_of_frames=1,
            samples_per_pixel=1,
            bits_allocated=layout.bits_allocated,
            bits_stored=precision,  # GDCM aborts when Bits Stored is not the precision of the codestream
            pixel_representation=int(layout.is_signed),
            photometric_interpretation="MONOCHROME2",
            pixel_keyword="PixelData",
        )
    except (MemoryError, RecursionError):
        raise
    except ImportError as exc:
        raise Retry(f"The decoder {codec} is not installed.") from exc
    except Exception as exc:  # C code fed by strangers raises what it likes, and its text may quote the file
        raise PixelError(f"The pixel data cannot be decoded by {codec} ({type(exc).__name__}).") from exc
    return buffer


def _precision(stream: bytes, layout: Layout, *, is_jpeg_2000: bool) -> int:
    """Return the bits a sample of the codestream, when its size, components and sign agree with the header."""
    stated = stated_by_codestream(stream, is_jpeg_2000=is_jpeg_2000)
    if (stated.rows, stated.columns, stated.components) != (layout.rows, layout.columns, 1):
        raise PixelError(
            f"The codestream states {stated.rows} x {stated.columns} with {stated.components} components; "
            f"the header {layout.rows} x {layout.columns} with 1."
        )
    if stated.is_signed is not None and stated.is_signed != layout.is_signed:
        sign = "signed" if stated.is_signed else "unsigned"
        raise PixelError(f"The codestream is {sign} at {stated.precision} bits; Pixel Representation says otherwise.")
    if not 1 <= stated.precision <= layout.bits_allocated:
        raise PixelError(f"The codestream has {stated.precision} bits a sample; Bits Allocated is {layout.bits_allocated}.")
    if stated.is_signed is None and layout.is_signed and stated.precision not in {layout.bits_stored, layout.bits_allocated}:
        raise PixelError(f"Signed samples of {layout.bits_stored} bits are in a codestream of {stated.precision} bits that has no sign.")
    return stated.precision


def _padding(elements: Elements, layout: Layout) -> tuple[int, int] | None:
    """Return the closed range of padding, if there is one (PS3.3 §C.7.5.1.1.2)."""
    first, last = _bits(elements, "PixelPaddingValue", layout), _bits(elements, "PixelPaddingRangeLimit", layout)
    if first is None:
        return None
    return (first, first) if last is None else (min(first, last), max(first, last))


def _bits(elements: Elements, keyword: str, layout: Layout) -> int | None:
    """Return a value by its bits, read like a pixel: writers confuse its VRs US and SS."""
    value = next(iter(values_of(elements, keyword)), None)
    if value is None:
        return None
    bits = int.from_bytes(value, "little") if isinstance(value, bytes) else integer_of(elements, keyword)
    return int(np.array(bits & (2**layout.bits_allocated - 1), f"u{layout.dtype.itemsize}").view(layout.dtype))


def _bits_stored(
    pixels: NDArray[Any], padding: tuple[int, int] | None, elements: Elements, layout: Layout
) -> tuple[NDArray[Any], tuple[int, int] | None]:
    """Read each value as Bits Stored wide (PS3.5 §8.1.1), or refuse what can be read in two ways.

    Values that fit are left alone. Padding may lie outside. High bits that an overlay declares as its own are cleared.
    Signed values whose high bits are all zero were not sign-extended by their writer, and are.
    """
    bits = layout.bits_stored
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if layout.is_signed else (0, 2**bits - 1)
    least, most = int(pixels.min()), int(pixels.max())
    if low <= least and most <= high:
        return pixels, padding
    real = pixels if padding is None else pixels[(pixels < padding[0]) | (pixels > padding[1])]
    if real.size == 0 or (low <= int(real.min()) and int(real.max()) <= high):
        return pixels, padding
    cleared = _without_overlays(pixels, elements, layout)
    if cleared is not None:
        return (_sign_extended(cleared, bits) if layout.is_signed else cleared), padding
    if layout.is_signed and least >= 0 and most < 2**bits:
        ends = None if padding is None else sorted(int(_sign_extended(np.array(end, layout.dtype), bits)) for end in padding)
        return _sign_extended(pixels, bits), None if ends is None else (ends[0], ends[1])
    sign = "signed" if layout.is_signed else "unsigned"
    raise PixelError(f"Pixel values from {least} to {most} do not fit Bits Stored {bits} ({sign}).")


def _without_overlays(pixels: NDArray[Any], elements: Elements, layout: Layout) -> NDArray[Any] | None:
    """Return the pixels without the high bits that overlays declare as theirs, if then they fit; else None."""
    positions = {int(elements[tag].value) for tag in OVERLAY_BITS if tag in elements and elements[tag].value}
    if not positions or min(positions) < layout.bits_stored:
        return None
    unsigned = np.dtype(f"u{layout.dtype.itemsize}")
    keep = sum(1 << bit for bit in range(layout.bits_allocated) if bit not in positions)
    cleared = pixels.view(unsigned) & np.array(keep, unsigned)
    return cleared.view(layout.dtype) if int(cleared.max()) < 2**layout.bits_stored else None


def _sign_extended(pixels: NDArray[Any], bits: int) -> NDArray[Any]:
    shift = 8 * pixels.dtype.itemsize - bits
    return (pixels << shift) >> shift
