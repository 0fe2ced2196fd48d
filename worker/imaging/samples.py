"""Pixel Data → samples: native bytes seen in place, encapsulated frames decoded by the one module that CODECS names.

::

    frames apart ─▶ every codestream's own header against ours ─▶ memory taken ─▶ decode ─▶ bytes against both ─▶ luminance

Not here: the header (layout.py), Bits Stored and padding (pixels.py).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder

from worker.errors import PixelError, Retry
from worker.imaging.codecs import CODECS, PLUGINS
from worker.imaging.codestream import stated_by_codestream
from worker.imaging.color import luminance
from worker.imaging.layout import GREY, SUBSAMPLED, Layout

# PS3.5 §G.3.1: two bytes make at most 128, so no image is more than 64 times its RLE stream.
_RLE_MAX_RATIO: Final = 64
_JPEG_EXTENDED: Final = "1.2.840.10008.1.2.4.51"
_LOSSY_JPEG: Final = frozenset({"1.2.840.10008.1.2.4.50", _JPEG_EXTENDED})
_JPEG_2000_ONLY: Final = frozenset({"YBR_ICT", "YBR_RCT"})


def native(value: bytes, layout: Layout) -> NDArray[Any]:
    """Return native pixels (frames, rows, columns), one sample each, without a copy where there is one (PS3.5 §8.1.1)."""
    shape, size = (layout.frames, layout.rows, layout.columns), layout.native_bytes
    if layout.photometric in _JPEG_2000_ONLY:
        raise PixelError(f"Photometric Interpretation {layout.photometric} belongs to JPEG 2000; the pixels are native.")
    if layout.photometric in SUBSAMPLED and layout.planar:
        raise PixelError(f"{layout.photometric} in Planar Configuration 1: shared chrominance has no plane of its own.")
    if len(value) != size:
        raise PixelError(
            f"Pixel Data (7FE0,0010) has {len(value)} bytes where Number of Frames, Rows, Columns and Bits Allocated need {size}."
        )
    if layout.bits_allocated == 1:
        bits = np.frombuffer(value, np.uint8)
        return np.unpackbits(bits, count=layout.frames * layout.rows * layout.columns, bitorder="little").reshape(shape)
    if layout.photometric in SUBSAMPLED:  # Y Y Cb Cr: two of four samples are the luminance of two pixels
        pairs = np.frombuffer(value, layout.dtype, layout.frames * layout.rows * layout.columns * 2).reshape(-1, 4)
        return luminance(pairs[:, :2].reshape(*shape, 1), layout.photometric)
    whole = np.frombuffer(value, layout.dtype, layout.frames * layout.rows * layout.columns * layout.samples)
    if layout.samples == 1:
        return whole.reshape(shape)
    pixels = np.empty(shape, layout.dtype)
    for number, one in enumerate(whole.reshape(layout.frames, -1)):
        pixels[number] = luminance(_pixel_by_pixel(one, layout, layout.planar), layout.photometric)
    return pixels


def encapsulated(frames: list[list[memoryview]], layout: Layout, transfer_syntax_uid: str) -> NDArray[Any]:
    """Decode encapsulated frames (PS3.5 §A.4), each a list of fragments, into (frames, rows, columns), one sample each."""
    codec = CODECS[transfer_syntax_uid]
    if layout.bits_allocated not in ({8, 16, 32} if codec == "rle" else {8, 16}):
        raise PixelError(f"Compressed pixels of Bits Allocated {layout.bits_allocated} are not decoded.")
    precisions = [_checked(b"".join(fragments), layout, transfer_syntax_uid) for fragments in frames]
    pixels = np.empty((layout.frames, layout.rows, layout.columns), layout.dtype)
    for number, (fragments, precision) in enumerate(zip(frames, precisions, strict=True)):
        samples = _decode(b"".join(fragments), layout, transfer_syntax_uid, precision)
        pixels[number] = samples[..., 0] if layout.samples == 1 else luminance(samples, layout.photometric)
    return pixels


def _pixel_by_pixel(flat: NDArray[Any], layout: Layout, planar: int) -> NDArray[Any]:
    if planar == 1:  # PS3.3 §C.7.6.3.1.3
        return flat.reshape(layout.samples, layout.rows, layout.columns).transpose(1, 2, 0)
    return flat.reshape(layout.rows, layout.columns, layout.samples)


def _checked(stream: bytes, layout: Layout, transfer_syntax_uid: str) -> int:
    """Return the bits of a sample in this codestream, when what it states agrees with the header."""
    if CODECS[transfer_syntax_uid] != "rle":
        return _precision(stream, layout, transfer_syntax_uid)
    if len(stream) * _RLE_MAX_RATIO < layout.frame_bytes:
        raise PixelError(f"An RLE stream of {len(stream)} bytes cannot hold {layout.frame_bytes} bytes of pixels.")
    return layout.bits_stored


def _decode(stream: bytes, layout: Layout, transfer_syntax_uid: str, precision: int) -> NDArray[Any]:
    """Decode one frame into (rows, columns, samples)."""
    codec = CODECS[transfer_syntax_uid]
    container = layout.dtype
    if codec in {"jpeg_ls", "openjpeg"}:  # these two size their samples by the precision of the codestream, and JPEG-LS has no sign
        container = np.dtype(f"<{'i' if layout.is_signed and codec == 'openjpeg' else 'u'}{(precision + 7) // 8}")
    buffer, planar = _run_codec(stream, layout, transfer_syntax_uid, precision=precision)
    size = layout.rows * layout.columns * layout.samples * container.itemsize
    if len(buffer) != size:
        raise PixelError(f"The decoder {codec} made {len(buffer)} bytes where the header and the codestream state {size}.")
    pixels = _pixel_by_pixel(np.frombuffer(buffer, container), layout, planar).astype(layout.dtype, copy=False)
    # JPEG-LS gives back the two's complement of `precision` bits.
    return sign_extended(pixels, precision) if codec == "jpeg_ls" and layout.is_signed else pixels


def _run_codec(stream: bytes, layout: Layout, transfer_syntax_uid: str, *, precision: int) -> tuple[bytes | bytearray | memoryview, int]:
    codec = CODECS[transfer_syntax_uid]
    try:
        import_module(codec)
        buffer, made = get_decoder(pydicom.uid.UID(transfer_syntax_uid)).as_buffer(
            encapsulate([stream], has_bot=False),
            index=0,
            decoding_plugin=PLUGINS[codec],
            rows=layout.rows,
            columns=layout.columns,
            number_of_frames=1,
            samples_per_pixel=layout.samples,
            bits_allocated=layout.bits_allocated,
            bits_stored=precision,  # GDCM aborts when Bits Stored is not the precision of the codestream
            pixel_representation=int(layout.is_signed),
            photometric_interpretation="MONOCHROME2" if layout.photometric == "PALETTE COLOR" else layout.photometric,
            planar_configuration=0,  # that of what comes out, not of what went in
            pixel_keyword="PixelData",
        )
    except (MemoryError, RecursionError, KeyboardInterrupt, SystemExit):
        raise
    except ImportError as exc:
        raise Retry(f"The decoder {codec} is not installed.") from exc
    # Code of other languages fed by strangers raises what it likes, and its text may quote the file; a panic of Rust is no Exception.
    except BaseException as exc:
        raise PixelError(f"The pixel data cannot be decoded by {codec} ({type(exc).__name__}).") from exc
    return buffer, int(made.get("planar_configuration", 0))


def _precision(stream: bytes, layout: Layout, transfer_syntax_uid: str) -> int:
    """Return the bits a sample of the codestream, when its size, components and sign agree with the header."""
    stated = stated_by_codestream(stream, is_jpeg_2000=CODECS[transfer_syntax_uid] == "openjpeg")
    if (stated.rows, stated.columns, stated.components) != (layout.rows, layout.columns, layout.samples):
        raise PixelError(
            f"The codestream states {stated.rows} x {stated.columns} with {stated.components} components; "
            f"the header {layout.rows} x {layout.columns} with {layout.samples}."
        )
    if transfer_syntax_uid == _JPEG_EXTENDED and stated.precision > 8:
        raise PixelError(f"JPEG Extended of {stated.precision} bits is not decoded, only that of 8 bits: no decoder here knows it.")
    if transfer_syntax_uid in _LOSSY_JPEG and layout.is_signed:  # PS3.5 Table 8.2.1-1; around 0 two's complement would be torn apart
        raise PixelError("Signed samples are in a lossy JPEG codestream, which has no sign.")
    if stated.is_signed is not None and stated.is_signed != layout.is_signed:
        sign = "signed" if stated.is_signed else "unsigned"
        raise PixelError(f"The codestream is {sign} at {stated.precision} bits; Pixel Representation says otherwise.")
    if not 1 <= stated.precision <= layout.bits_allocated:
        raise PixelError(f"The codestream has {stated.precision} bits a sample; Bits Allocated is {layout.bits_allocated}.")
    if stated.is_signed is None and layout.is_signed and stated.precision not in {layout.bits_stored, layout.bits_allocated}:
        raise PixelError(f"Signed samples of {layout.bits_stored} bits are in a codestream of {stated.precision} bits that has no sign.")
    if layout.photometric not in GREY and stated.is_ybr is not None and stated.is_ybr != layout.photometric.startswith("YBR"):
        raise PixelError(
            f"The codestream states {'YCbCr' if stated.is_ybr else 'red, green and blue'}; "
            f"Photometric Interpretation is {layout.photometric}."
        )
    return stated.precision


def sign_extended(pixels: NDArray[Any], bits: int) -> NDArray[Any]:
    """Read values as `bits` wide two's complement, whatever their high bits hold."""
    shift = 8 * pixels.dtype.itemsize - bits
    return (pixels << shift) >> shift
