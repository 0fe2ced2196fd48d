"""Every transfer syntax × width × sign × colour: decoded by us and by a second decoder; the table of deploy/IMAGES.md is this test's.

``UPDATE_TABLES=1 pytest tests/unit/test_codecs.py`` writes the table again. Encoders and second decoders are DCMTK's programs, GDCM for
JPEG 2000, and for HTJ2K the codestreams of tests/golden/htj2k, made by OpenJPH 0.26.3 (imagecodecs 2026.3.6, `htj2k_encode`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.encaps import encapsulate
from pydicom.pixels import pixel_array
from pydicom.uid import UID

from tests import factories
from tests.decoders import make_image, read_frames
from tests.images import ramp
from tests.peers import dcmtk
from worker.errors import PixelError
from worker.imaging.decoding import CODECS, NOT_OFFERED, DecoderPool

ROOT: Final = Path(__file__).parents[2]
DOCUMENT: Final = ROOT / "deploy" / "IMAGES.md"
GOLDEN: Final = ROOT / "tests" / "golden" / "htj2k"
JPEG_2000, PREFIX = "1.2.840.10008.1.2.4.9", "1.2.840.10008.1.2"
LOSSY: Final = {f"{PREFIX}.4.{end}" for end in (50, 51, 81, 91, 203)}


class Kind(NamedTuple):
    """A column of the table."""

    name: str
    bits: int
    is_signed: bool = False
    colors: int = 1


KINDS: Final = (
    Kind("1/1", 1), Kind("8/8", 8), Kind("8/8 signed", 8, True), Kind("16/10", 10), Kind("16/12", 12), Kind("16/12 signed", 12, True),
    Kind("16/16", 16), Kind("16/16 signed", 16, True), Kind("32/32", 32), Kind("8/8 RGB", 8, colors=3), Kind("16/16 RGB", 16, colors=3),
)  # fmt: skip
#: Transfer syntax → how DCMTK encodes it.
ENCODERS: Final = {
    f"{PREFIX}": ("dcmconv", "+ti"),
    f"{PREFIX}.1": ("dcmconv", "+te"),
    f"{PREFIX}.4.50": ("dcmcjpeg", "+eb"),
    f"{PREFIX}.4.51": ("dcmcjpeg", "+ee"),
    f"{PREFIX}.4.57": ("dcmcjpeg", "+el"),
    f"{PREFIX}.4.70": ("dcmcjpeg", "+e1"),
    f"{PREFIX}.4.80": ("dcmcjpls", "+el"),
    f"{PREFIX}.4.81": ("dcmcjpls", "+en"),
    f"{PREFIX}.5": ("dcmcrle",),
}
#: The program that encodes → the one that decodes, without a change of colours.
DECODERS: Final = {
    "dcmconv": ("dcmconv", "+te"),
    "dcmcjpeg": ("dcmdjpeg", "+cn", "+px"),
    "dcmcjpls": ("dcmdjpls", "+px"),
    "dcmcrle": ("dcmdrle",),
}
#: The HTJ2K codestreams that there are, by transfer syntax and column.
HTJ2K: Final = {
    f"{PREFIX}.4.{end}": {"8/8": "u8", "16/16": "u16", "16/16 signed": "i16", "8/8 RGB": "rgb8", "16/16 RGB": "rgb16"} for end in (201, 202)
} | {f"{PREFIX}.4.203": {"16/16": "lossy_u16", "8/8 RGB": "lossy_rgb8"}}


def encoded(uid: str, kind: Kind, folder: Path) -> Path | None:
    """Write the image of a column in a transfer syntax; None where no encoder makes it."""
    stored = ramp(bits=kind.bits, is_signed=kind.is_signed, colors=kind.colors)
    ds = make_image(stored[np.newaxis], bits_stored=kind.bits, photometric="RGB" if kind.colors == 3 else "MONOCHROME2")
    if kind.bits == 1:
        ds.BitsAllocated = 1
        ds.PixelData = np.packbits(stored, bitorder="little").tobytes()
    target = folder / "encoded.dcm"
    if uid in HTJ2K:
        name = HTJ2K[uid].get(kind.name)
        if name is None:
            return None
        ds.file_meta.TransferSyntaxUID = UID(uid)
        ds.PixelData = encapsulate([(GOLDEN / f"{name}.j2c").read_bytes()])
        ds["PixelData"].is_undefined_length = True
        if kind.colors == 3:
            ds.PhotometricInterpretation = "YBR_ICT" if "lossy" in name else "YBR_RCT"
        return factories.write(ds, target)
    if uid.startswith(JPEG_2000):
        if kind.bits in {1, 32}:
            return None
        if kind.colors == 3:
            ds.PhotometricInterpretation = "YBR_RCT" if uid.endswith("90") else "YBR_ICT"
        return factories.write(factories.encode(ds, uid), target)
    program, *options = ENCODERS[uid]
    source = factories.write(ds, folder / "native.dcm")
    if dcmtk(program, *options, str(source), str(target)).returncode:
        return None
    made = pydicom.dcmread(target)
    # DCMTK shifts signed pixels, and scales wide ones, before lossy JPEG: what it makes then is another column's.
    return target if (made.PixelRepresentation, made.BitsStored) == (kind.is_signed, kind.bits) else None


def second(uid: str, path: Path, kind: Kind, folder: Path) -> NDArray[Any]:
    """Decode by another decoder, without a change of colours."""
    if uid in HTJ2K:
        return ramp(bits=kind.bits, is_signed=kind.is_signed, colors=kind.colors)
    ds = pydicom.dcmread(path)
    if uid.startswith(JPEG_2000):
        return pixel_array(ds, raw=True, decoding_plugin="gdcm")
    target = folder / "decoded.dcm"
    done = dcmtk(*DECODERS[ENCODERS[uid][0]], str(path), str(target))
    assert done.returncode == 0, done.stdout
    return pixel_array(pydicom.dcmread(target), raw=True)


def grey(image: NDArray[Any], photometric: str) -> NDArray[Any]:
    """PS3.3 §C.7.6.3.1.2, written down a second time."""
    if image.ndim == 2:
        return image
    return image[..., 0] if photometric.startswith("YBR_FULL") else np.rint(image.astype(float) @ [0.299, 0.587, 0.114])


def cell(pool: DecoderPool, uid: str, kind: Kind, folder: Path) -> str:
    """Decode one image twice and say how near the two are; checks them against what was encoded."""
    path = encoded(uid, kind, folder)
    if path is None:
        return ""
    try:
        (one,) = read_frames(pool, path, color="luminance")
    except PixelError:
        return "refused"
    ours = one.pixels.astype(float)
    theirs = grey(second(uid, path, kind, folder), one.photometric).astype(float)
    source = grey(ramp(bits=kind.bits, is_signed=kind.is_signed, colors=kind.colors), "RGB")
    apart, lost = np.abs(ours - theirs).max(), np.abs(ours - source).max()
    if uid in LOSSY:
        assert lost <= max(0.06 * 2**kind.bits, 2), (uid, kind, lost)
    else:
        assert lost == 0, (uid, kind, lost)
    return "=" if apart == 0 else f"±{apart:.0f}"


def table(cells: Callable[[str, Kind], str]) -> list[str]:
    """Lay the matrix out as the document has it."""
    lines = ["| Transfer syntax | " + " | ".join(kind.name for kind in KINDS) + " | decoder |"]
    lines.append("|---" * (len(KINDS) + 2) + "|")
    for uid, codec in CODECS.items():
        name = UID(uid).name.split(" (")[0].split(",")[0].replace("High-Throughput JPEG 2000", "HTJ2K").replace(" Image Compression", "")
        short = uid.removeprefix(PREFIX) or "(1.2.840.10008.1.2)"
        row = [cells(uid, kind) for kind in KINDS]
        lines.append(
            f"| {short} {name}{'' if uid not in NOT_OFFERED else ', not offered'} | " + " | ".join(row) + f" | {codec or 'none needed'} |"
        )
    return lines


@pytest.mark.peer
@pytest.mark.requirement("P11")
def test_the_table_of_codecs_is_what_two_decoders_make_of_each_cell(pool: DecoderPool, tmp_path: Path) -> None:
    made = table(lambda uid, kind: cell(pool, uid, kind, tmp_path))
    text = DOCUMENT.read_text()
    head, rest = text.split("<!-- codecs -->\n")[0], text.split("<!-- /codecs -->")[1]
    wanted = f"{head}<!-- codecs -->\n" + "\n".join(made) + f"\n<!-- /codecs -->{rest}"
    if os.environ.get("UPDATE_TABLES"):
        DOCUMENT.write_text(wanted)
    assert wanted == DOCUMENT.read_text(), "run again with UPDATE_TABLES=1 and read what changed"
