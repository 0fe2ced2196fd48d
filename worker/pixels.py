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
import math
import os
import stat
from collections.abc import Sequence
from importlib import import_module
from io import BytesIO
from typing import Any, Final

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.datadict import dictionary_description, tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.tag import Tag

from worker.codestream import fragments_of_one_frame, stated_by_codestream
from worker.decoding import CODECS
from worker.errors import GeometryError, PixelError, Retry

# pydicom's name for the plug-in around each decoding module.
_PLUGINS: Final = {"gdcm": "gdcm", "jpeg_ls": "pyjpegls", "openjpeg": "pylibjpeg", "rle": "pylibjpeg"}
#: A file may take a quarter of the child's memory (pydicom copies the pixels out of it), its pixels an eighth
#: (openjpeg works on 4 bytes a sample, beside input and output).
_FILE_SHARE, _PIXEL_SHARE = 4, 8
# PS3.5 §G.3.1: two bytes make at most 128, so no image is more than 64 times its RLE stream.
_RLE_MAX_RATIO: Final = 64

_KEYWORDS: Final = (
    "SOPInstanceUID", "SOPClassUID", "SeriesInstanceUID", "Modality", "ImageType", "InstanceNumber", "FrameOfReferenceUID",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio",
    "SamplesPerPixel", "PhotometricInterpretation", "PresentationLUTShape", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "RescaleSlope", "RescaleIntercept", "RescaleType", "WindowCenter", "WindowWidth",
    "ModalityLUTSequence", "SharedFunctionalGroupsSequence", "PixelData",
)  # fmt: skip
# Overlay Bit Position of each overlay group (PS3.3 §C.9.2): which of the unused high bits older files put an overlay into.
_OVERLAY_BITS: Final = tuple((group << 16) | 0x0102 for group in range(0x6000, 0x6020, 2))
_TAGS: Final = [Tag(tag_for_keyword(keyword) or 0) for keyword in _KEYWORDS] + [Tag(tag) for tag in _OVERLAY_BITS]


def read(path: str, digest: str, *, memory_bytes: int) -> tuple[dict[str, Any], NDArray[Any]]:
    """Return the facts of one file, as `decoding.Slice` names them, and its stored pixel values (rows, columns)."""
    data = _load(path, digest, limit=memory_bytes // _FILE_SHARE)
    ds, transfer_syntax_uid = _parse(data)
    _check_is_one_grey_frame(ds)
    shape, dtype = _check_layout(ds, limit=memory_bytes // _PIXEL_SHARE)
    value = ds["PixelData"].value if "PixelData" in ds else None
    if not isinstance(value, bytes) or not value:
        raise PixelError("Pixel Data (7FE0,0010) is absent or empty, or the file ends before it does.")
    is_undefined_length = bool(ds["PixelData"].is_undefined_length)
    if is_undefined_length != (CODECS[transfer_syntax_uid] != "" or pydicom.uid.UID(transfer_syntax_uid).is_encapsulated):
        raise PixelError("Pixel Data (7FE0,0010) is encapsulated where the transfer syntax is native, or the other way round.")
    if CODECS[transfer_syntax_uid]:
        pixels = _decode(value, ds, transfer_syntax_uid, shape=shape, dtype=dtype)
    else:
        pixels = _native(value, shape=shape, dtype=dtype)
    padding = _padding(ds, dtype)
    pixels, padding = _bits_stored(pixels, padding, ds)
    return _facts(ds, transfer_syntax_uid) | {"padding": padding}, pixels


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
        raise PixelError("The stored file is missing.") from exc
    except OSError as exc:
        raise Retry(f"The stored file cannot be read now (errno {exc.errno}).") from exc
    if hashlib.sha256(data).hexdigest() != digest:
        raise PixelError(f"The stored file changed: its {len(data)} bytes do not have the sha256 they were received with.")
    return data


def _parse(data: bytes) -> tuple[Dataset, str]:
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
    return pydicom.dcmread(BytesIO(data), specific_tags=list(_TAGS)), uid


def _check_is_one_grey_frame(ds: Dataset) -> None:
    frames = _integer(ds, "NumberOfFrames", default=1)
    if frames != 1:
        raise PixelError(f"Multi-frame objects are not analyzed: Number of Frames (0028,0008) is {frames}.")
    samples = _integer(ds, "SamplesPerPixel")
    photometric = _text(ds, "PhotometricInterpretation")
    if samples != 1 or photometric not in {"MONOCHROME1", "MONOCHROME2"}:
        raise PixelError(f"Only MONOCHROME1 and MONOCHROME2 images are analyzed; this one is neither, with {samples} samples per pixel.")


def _check_layout(ds: Dataset, *, limit: int) -> tuple[tuple[int, int], np.dtype[Any]]:
    """Return shape and type of the decoded pixels, when the header's numbers agree with each other (PS3.3 §C.7.6.3)."""
    rows, columns = _integer(ds, "Rows"), _integer(ds, "Columns")
    allocated, stored, high = _integer(ds, "BitsAllocated"), _integer(ds, "BitsStored"), _integer(ds, "HighBit")
    representation = _integer(ds, "PixelRepresentation")
    if not (1 <= rows <= 65535 and 1 <= columns <= 65535):
        raise PixelError(f"Rows x Columns is {rows} x {columns}.")
    if allocated not in {8, 16} or not 1 <= stored <= allocated or high != stored - 1 or representation not in {0, 1}:
        raise PixelError(
            f"Bits Allocated {allocated}, Bits Stored {stored}, High Bit {high} and Pixel Representation {representation} "
            "are not decoded together."
        )
    size = rows * columns * allocated // 8
    if size > limit:
        raise PixelError(f"Rows {rows} x Columns {columns} at {allocated} bits are {size} bytes; at most {limit} can be decoded.")
    return (rows, columns), np.dtype(f"<{'ui'[representation]}{allocated // 8}")


def _native(value: bytes, *, shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
    size = shape[0] * shape[1] * dtype.itemsize
    if len(value) != size + size % 2:
        raise PixelError(f"Pixel Data (7FE0,0010) has {len(value)} bytes where Rows, Columns and Bits Allocated need {size + size % 2}.")
    return np.frombuffer(value, dtype, shape[0] * shape[1]).reshape(shape)


def _decode(value: bytes, ds: Dataset, transfer_syntax_uid: str, *, shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Decode one encapsulated frame (PS3.5 §A.4) with the one plug-in that CODECS names."""
    codec = CODECS[transfer_syntax_uid]
    stream = fragments_of_one_frame(value, is_rle=codec == "rle")
    size = shape[0] * shape[1] * dtype.itemsize
    precision, is_signed = ds.BitsStored, dtype.kind == "i"
    if codec == "rle":
        if len(stream) * _RLE_MAX_RATIO < size:
            raise PixelError(f"An RLE stream of {len(stream)} bytes cannot hold {size} bytes of pixels.")
    else:
        precision, is_signed = _check_codestream(stream, ds, codec, shape=shape)
    container = np.dtype(f"<{'ui'[is_signed]}{dtype.itemsize if codec in {'gdcm', 'rle'} else (precision + 7) // 8}")
    try:
        import_module(codec)
        buffer, _ = get_decoder(pydicom.uid.UID(transfer_syntax_uid)).as_buffer(
            value,
            index=0,
            decoding_plugin=_PLUGINS[codec],
            rows=shape[0],
            columns=shape[1],
            number_of_frames=1,
            samples_per_pixel=1,
            bits_allocated=8 * dtype.itemsize,
            bits_stored=ds.BitsStored,
            pixel_representation=int(dtype.kind == "i"),
            photometric_interpretation="MONOCHROME2",
            pixel_keyword="PixelData",
        )
    except (MemoryError, RecursionError):
        raise
    except ImportError as exc:
        raise Retry(f"The decoder {codec} is not installed.") from exc
    except Exception as exc:  # C code fed by strangers raises what it likes, and its text may quote the file
        raise PixelError(f"The pixel data cannot be decoded by {codec} ({type(exc).__name__}).") from exc
    if len(buffer) != shape[0] * shape[1] * container.itemsize:
        raise PixelError(f"The decoder {codec} made {len(buffer)} bytes where {shape[0] * shape[1] * container.itemsize} were stated.")
    pixels: NDArray[Any] = np.frombuffer(buffer, container).reshape(shape)
    if codec == "jpeg_ls" and dtype.kind == "i":
        # JPEG-LS has no sign: what comes out is the two's complement of `precision` bits.
        pixels = _sign_extended(pixels.astype(dtype), precision)
    return pixels.astype(dtype, copy=False)


def _check_codestream(stream: bytes, ds: Dataset, codec: str, *, shape: tuple[int, int]) -> tuple[int, bool]:
    """Return precision and sign as the codestream states them, when size, components and sign agree with the header."""
    stated = stated_by_codestream(stream, is_jpeg_2000=codec == "openjpeg")
    if (stated.rows, stated.columns, stated.components) != (*shape, 1):
        raise PixelError(
            f"The codestream states {stated.rows} x {stated.columns} with {stated.components} components; "
            f"the header {shape[0]} x {shape[1]} with 1."
        )
    is_signed = ds.PixelRepresentation == 1
    if stated.is_signed is not None and stated.is_signed != is_signed:
        sign = "signed" if stated.is_signed else "unsigned"
        raise PixelError(f"The codestream is {sign} at {stated.precision} bits; Pixel Representation says otherwise.")
    if not 1 <= stated.precision <= ds.BitsAllocated:
        raise PixelError(f"The codestream has {stated.precision} bits a sample; Bits Allocated is {ds.BitsAllocated}.")
    if stated.is_signed is None and is_signed and stated.precision not in {ds.BitsStored, ds.BitsAllocated}:
        raise PixelError(f"Signed samples of {ds.BitsStored} bits are in a codestream of {stated.precision} bits that has no sign.")
    return stated.precision, is_signed if stated.is_signed is None else stated.is_signed


def _padding(ds: Dataset, dtype: np.dtype[Any]) -> tuple[int, int] | None:
    """Return the closed range of padding; a value's bits count, for writers confuse its VRs US and SS (PS3.3 §C.7.5.1.1.2)."""
    first, last = _bits(ds, "PixelPaddingValue", dtype), _bits(ds, "PixelPaddingRangeLimit", dtype)
    if first is None:
        return None
    return (first, first) if last is None else (min(first, last), max(first, last))


def _bits(ds: Dataset, keyword: str, dtype: np.dtype[Any]) -> int | None:
    if not _has(ds, keyword):
        return None
    value = ds[keyword].value
    bits = int.from_bytes(value, "little") if isinstance(value, bytes) else _integer(ds, keyword)
    return int(np.array(bits & (2 ** (8 * dtype.itemsize) - 1), f"u{dtype.itemsize}").view(dtype))


def _bits_stored(pixels: NDArray[Any], padding: tuple[int, int] | None, ds: Dataset) -> tuple[NDArray[Any], tuple[int, int] | None]:
    """Read each value as `BitsStored` wide (PS3.5 §8.1.1), or refuse what can be read in two ways.

    Values that fit are left alone. Padding may lie outside. High bits that an overlay declares as its own are cleared.
    Signed values whose high bits are all zero were not sign-extended by their writer, and are.
    """
    stored, is_signed = int(ds.BitsStored), pixels.dtype.kind == "i"
    low, high = (-(2 ** (stored - 1)), 2 ** (stored - 1) - 1) if is_signed else (0, 2**stored - 1)
    least, most = int(pixels.min()), int(pixels.max())
    if low <= least and most <= high:
        return pixels, padding
    real = pixels if padding is None else pixels[(pixels < padding[0]) | (pixels > padding[1])]
    if real.size == 0 or (low <= int(real.min()) and int(real.max()) <= high):
        return pixels, padding
    overlaid = {int(ds[tag].value) for tag in _OVERLAY_BITS if tag in ds and ds[tag].value}
    if overlaid and min(overlaid) >= stored:
        unsigned = np.dtype(f"u{pixels.dtype.itemsize}")
        cleared = pixels.view(unsigned) & np.array(sum(1 << bit for bit in range(16) if bit not in overlaid), "u4").astype(unsigned)
        if int(cleared.max()) < 2**stored:
            return (_sign_extended(cleared.view(pixels.dtype), stored) if is_signed else cleared), padding
    if is_signed and least >= 0 and most < 2**stored:
        extended = None if padding is None else tuple(int(_sign_extended(np.array(v, pixels.dtype), stored)) for v in padding)
        return _sign_extended(pixels, stored), None if extended is None else (min(extended), max(extended))
    raise PixelError(f"Pixel values from {least} to {most} do not fit Bits Stored {stored} ({'signed' if is_signed else 'unsigned'}).")


def _sign_extended(pixels: NDArray[Any], bits: int) -> NDArray[Any]:
    shift = 8 * pixels.dtype.itemsize - bits
    return (pixels << shift) >> shift


def _facts(ds: Dataset, transfer_syntax_uid: str) -> dict[str, Any]:
    return {
        "sop_instance_uid": _text(ds, "SOPInstanceUID"),
        "sop_class_uid": _text(ds, "SOPClassUID"),
        "series_instance_uid": _text(ds, "SeriesInstanceUID"),
        "transfer_syntax_uid": transfer_syntax_uid,
        "modality": _text(ds, "Modality"),
        "image_type": [str(part) for part in _values(ds, "ImageType")],
        "instance_number": _integer(ds, "InstanceNumber") if _has(ds, "InstanceNumber") else None,
        "photometric": _text(ds, "PhotometricInterpretation"),
        "presentation_lut_shape": _text(ds, "PresentationLUTShape"),
        "bits_stored": _integer(ds, "BitsStored"),
        "is_signed": _integer(ds, "PixelRepresentation") == 1,
        "is_enhanced": "SharedFunctionalGroupsSequence" in ds,
        "has_modality_lut": "ModalityLUTSequence" in ds,
        "rescale_slope": _number(ds, "RescaleSlope"),
        "rescale_intercept": _number(ds, "RescaleIntercept"),
        "rescale_type": _text(ds, "RescaleType"),
        "position": _numbers(ds, "ImagePositionPatient", 3),
        "orientation": _numbers(ds, "ImageOrientationPatient", 6),
        "pixel_spacing": _numbers(ds, "PixelSpacing", 2),
        "imager_spacing": _numbers(ds, "ImagerPixelSpacing", 2),
        "aspect_ratio": _numbers(ds, "PixelAspectRatio", 2),
        "frame_of_reference_uid": _text(ds, "FrameOfReferenceUID"),
        "window": _window(ds),
    }


def _named(keyword: str) -> str:
    tag = Tag(tag_for_keyword(keyword) or 0)
    return f"{dictionary_description(tag)} ({tag.group:04X},{tag.element:04X})"


def _has(ds: Dataset, keyword: str) -> bool:
    return keyword in ds and ds[keyword].value not in (None, "", b"", [])


def _values(ds: Dataset, keyword: str) -> Sequence[Any]:
    if not _has(ds, keyword):
        return ()
    value = ds[keyword].value
    return tuple(value) if isinstance(value, list | pydicom.multival.MultiValue) else (value,)


def _text(ds: Dataset, keyword: str) -> str:
    values = _values(ds, keyword)
    return str(values[0]).strip() if values else ""


def _integer(ds: Dataset, keyword: str, *, default: int | None = None) -> int:
    values = _values(ds, keyword)
    if not values and default is not None:
        return default
    # The VR must be the dictionary's: a Rows of VR UL is how sizes overflow (Orthanc CVE-2026-5437 ff.).
    if len(values) == 1 and isinstance(values[0], int) and ds[keyword].VR in {"US", "SS", "IS"}:
        return int(values[0])
    raise PixelError(f"{_named(keyword)} is absent or not one whole number.")


def _number(ds: Dataset, keyword: str) -> float | None:
    if not _has(ds, keyword):
        return None
    numbers = _floats(_values(ds, keyword))
    if len(numbers) != 1:
        raise PixelError(f"{_named(keyword)} is not one finite number.")
    return numbers[0]


def _numbers(ds: Dataset, keyword: str, count: int) -> list[float] | None:
    if not _has(ds, keyword):
        return None
    numbers = _floats(_values(ds, keyword))
    if len(numbers) != count:
        raise GeometryError(f"{_named(keyword)} does not hold {count} finite numbers.")
    return numbers


def _window(ds: Dataset) -> list[tuple[float, float]]:
    centers, widths = _floats(_values(ds, "WindowCenter")), _floats(_values(ds, "WindowWidth"))
    return list(zip(centers, widths, strict=True)) if len(centers) == len(widths) else []


def _floats(values: Sequence[Any]) -> list[float]:
    """Return the values as floats; none at all if one of them is not a finite number."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        return []
    return numbers if all(math.isfinite(number) for number in numbers) else []
