"""What one file holds: checked, parsed and decoded. Runs in a decoding process (child.py), and nowhere else.

::

    open once ─▶ sha256 ─▶ file meta ─▶ header ─▶ layout.py: sizes believed? ─▶ samples.py: decode ─▶ bits stored ─▶ facts

Every size is checked against another witness before memory is taken for it: header against limit, header against length,
header against codestream, decoder's output against header. Whatever does not agree is refused, never repaired.
Sentences say which attribute and which numbers; never a value of one, which could be a patient's.
Not here: geometry (volume.py), rescale (values.py).
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import replace
from functools import lru_cache
from io import BytesIO
from typing import Any, Final

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataelem import DataElement, RawDataElement, convert_raw_data_element
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.tag import BaseTag
from pydicom.uid import ImplicitVRLittleEndian

from worker.errors import PixelError, Retry, StoredFileLost
from worker.imaging.codecs import CODECS, why_not_decoded
from worker.imaging.codestream import frames_of
from worker.imaging.color import palette_luminance
from worker.imaging.facts import OVERLAY_BITS, PLAIN_TAGS, PLAIN_VRS, TAGS, WANTED, Elements, integer_of, values_of
from worker.imaging.functional_groups import facts_of_frames
from worker.imaging.layout import GREY, Layout, layout_of
from worker.imaging.lookup import modality_lut
from worker.imaging.samples import encapsulated, native, sign_extended
from worker.imaging.uptake import uptake_of

#: A file may take a quarter of the child's memory (pydicom copies the pixels out of it).
_FILE_SHARE: Final = 4
#: Bytes of a value that is kept converted.
_SHORT: Final = 256


def read(path: str, digest: str, *, memory_bytes: int, color: str = "refuse") -> tuple[dict[str, Any], list[dict[str, Any]], NDArray[Any]]:
    """Read one file.

    Parameters
    ----------
    color
        "refuse" an image with colours, or reduce it to its "luminance" (PS3.3 §C.7.6.3.1.2), rounded to the stored width.

    Returns
    -------
    shared, frames, pixels
        The facts that all its frames share and those of each frame, both as `Frame` names them; the stored pixel values
        (frames, rows, columns).
    """
    data = _load(path, digest, limit=memory_bytes // _FILE_SHARE)
    elements, transfer_syntax_uid = _parse(data)
    del data  # pydicom copied what is wanted
    value, is_encapsulated = _pixel_data(elements)
    layout = layout_of(elements, color=color, memory_bytes=memory_bytes)
    codec = CODECS[transfer_syntax_uid]
    if is_encapsulated != bool(codec):
        raise PixelError("Pixel Data (7FE0,0010) is encapsulated where the transfer syntax is native, or the other way round.")
    if codec:
        tables = [getattr(elements.get(TAGS[f"ExtendedOffsetTable{part}"]), "value", None) for part in ("", "Lengths")]
        frames = frames_of(value, layout.frames, extended=tables[0], lengths=tables[1], is_rle=codec == "rle")
        pixels = encapsulated(frames, layout, transfer_syntax_uid)
    else:
        pixels = native(value, layout)
    padding = None
    shared, each = facts_of_frames(elements, transfer_syntax_uid, count=layout.frames)
    shared |= uptake_of(elements)
    if layout.photometric in GREY:
        pixels, padding = _bits_stored(pixels, _padding(elements, layout), elements, layout)
        if TAGS["ModalityLUTSequence"] in elements:
            pixels, padding, layout, shared["rescale_type"] = _modality_lut(pixels, padding, elements, layout)
    elif layout.photometric == "PALETTE COLOR":
        table = palette_luminance(elements, is_signed=layout.is_signed)
        pixels, layout = table.apply(pixels), replace(layout, bits_stored=table.bits, is_signed=False)
    shared |= {"padding": padding, "bits_stored": layout.bits_stored, "is_signed": layout.is_signed}
    return shared, each, pixels


def _pixel_data(elements: Elements) -> tuple[bytes, bool]:
    for keyword in ("FloatPixelData", "DoubleFloatPixelData"):
        if TAGS[keyword] in elements:
            raise PixelError("Float Pixel Data (7FE0,0008) and Double Float Pixel Data (7FE0,0009) are not read, only integers are.")
    pixel_data = elements.get(TAGS["PixelData"])
    if pixel_data is None or not isinstance(pixel_data.value, bytes) or not pixel_data.value:
        raise PixelError("Pixel Data (7FE0,0010) is absent or empty, or the file ends before it does.")
    return pixel_data.value, pixel_data.is_undefined_length


def _modality_lut(
    pixels: NDArray[Any], padding: tuple[int, int] | None, elements: Elements, layout: Layout
) -> tuple[NDArray[Any], tuple[int, int] | None, Layout, str]:
    """Apply the Modality LUT (PS3.3 §C.11.1.1), keeping padding apart as -1, which no table gives."""
    if elements.keys() & {TAGS[other] for other in ("RescaleSlope", "RescaleIntercept", "SharedFunctionalGroupsSequence")}:
        raise PixelError("There are both a Modality LUT Sequence (0028,3000) and a rescale or functional groups; only one of them may be.")
    table, unit = modality_lut(elements[TAGS["ModalityLUTSequence"]].value, is_signed=layout.is_signed)
    made = table.apply(pixels)
    if padding is not None:
        made = made.astype(np.int32)
        made[(pixels >= padding[0]) & (pixels <= padding[1])] = -1
        padding = (-1, -1)
    return made, padding, replace(layout, bits_stored=table.bits, is_signed=False), unit


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
    stream = BytesIO(data)  # shares the bytes, and is left where the data set starts
    stream.seek(132)
    meta = read_dataset(stream, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, _vr, _n: tag >> 16 != 2)
    uid = str(meta.get("TransferSyntaxUID", ""))
    if uid not in CODECS:
        # A registered UID says nothing of a patient; anything else is not repeated.
        known, why = pydicom.uid.UID(uid), why_not_decoded(uid)
        name = known.name if known.type == "Transfer Syntax" else "which is absent or unknown"
        raise PixelError(f"The transfer syntax, {name}, is not decoded{': ' + why if why else ''}.")
    dataset = read_dataset(stream, is_implicit_VR=uid == ImplicitVRLittleEndian, is_little_endian=True, specific_tags=list(WANTED))
    return {int(tag): _element(dataset, tag) for tag in dataset.keys()}, uid  # noqa: SIM118  iterating would convert each


def _element(dataset: Dataset, tag: BaseTag) -> DataElement:
    raw: object = dataset.get_item(tag)
    if not isinstance(raw, RawDataElement) or raw.value is None or len(raw.value) > _SHORT:
        return dataset[tag]
    is_plain = raw.VR in PLAIN_VRS or (raw.VR is None and int(tag) in PLAIN_TAGS)
    return _converted(int(tag), raw.VR, raw.value) if is_plain else dataset[tag]


@lru_cache(maxsize=1024)
def _converted(tag: int, vr: str | None, value: bytes) -> DataElement:
    """Convert what depends on nothing else in its file; the slices of a series say most of it alike."""
    return convert_raw_data_element(RawDataElement(BaseTag(tag), vr, len(value), value, 0, vr is None, True))


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
        return (sign_extended(cleared, bits) if layout.is_signed else cleared), padding
    if layout.is_signed and least >= 0 and most < 2**bits:
        ends = None if padding is None else sorted(int(sign_extended(np.array(end, layout.dtype), bits)) for end in padding)
        return sign_extended(pixels, bits), None if ends is None else (ends[0], ends[1])
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
