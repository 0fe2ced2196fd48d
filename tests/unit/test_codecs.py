"""Every transfer syntax × width × sign × colour: decoded by us and by a second decoder; the table of deploy/IMAGES.md is this test's.

``UPDATE_TABLES=1 pytest tests/unit/test_codecs.py`` writes the table again. Encoders and second decoders are DCMTK's programs, GDCM for
JPEG 2000, and for HTJ2K the codestreams of tests/golden/htj2k, made by OpenJPH 0.26.3 (imagecodecs 2026.3.6, `htj2k_encode`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.encaps import encapsulate
from pydicom.pixels.processing import apply_color_lut
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID

from tests import factories
from tests.decoders import make_image, read_frames, refused
from tests.images import ramp
from tests.peers import dcmtk, require_shared
from tests.tables import keep
from worker.errors import PixelError
from worker.imaging.codecs import CODECS, NOT_OFFERED, why_not_decoded
from worker.imaging.decoding import DecoderPool

ROOT: Final = Path(__file__).parents[2]
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
        return golden(ds, uid, kind, target)
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


def golden(ds: pydicom.FileDataset, uid: str, kind: Kind, target: Path) -> Path | None:
    """Put the HTJ2K codestream of a column into `ds`; None where there is none."""
    if (name := HTJ2K[uid].get(kind.name)) is None:
        return None
    ds.file_meta.TransferSyntaxUID = UID(uid)
    ds.PixelData = encapsulate([(GOLDEN / f"{name}.j2c").read_bytes()])
    ds["PixelData"].is_undefined_length = True
    if kind.colors == 3:
        ds.PhotometricInterpretation = "YBR_ICT" if "lossy" in name else "YBR_RCT"
    return factories.write(ds, target)


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
    keep("codecs", made)


@pytest.mark.requirement("P11")
def test_the_table_of_transfer_syntaxes_that_are_refused_has_each_that_the_library_knows() -> None:
    refused = [uid for uid in pydicom.uid.AllTransferSyntaxes if uid not in CODECS]
    rows = [f"| {uid.removeprefix(PREFIX)} {uid.name} | {why_not_decoded(uid)} |" for uid in refused]
    keep("refused", ["| Transfer syntax | why |", "|---|---|", *rows])


REAL: Final = (
    "data/dicom/orthanc-tests/TransferSyntaxes",
    "data/dicom/cornerstone/examples/test-images",
    "data/dicom/pydicom/test_files",
)
#: Sentences of the real files that are refused: what they are, not ours to guess.
NOT_READ: Final = ("transfer syntax", "JPEG Extended of 12 bits", "not a JPEG 2000", "Pixel Representation", "states 1024 x 3722445056",
                   "has 8320 bytes", "has 8130 bytes", "Number of Frames", "functional groups", "DICOM prefix")  # fmt: skip


@pytest.mark.peer
@pytest.mark.requirement("P11")
@pytest.mark.parametrize("folder", REAL)
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")  # what real headers are like is no news
def test_real_files_are_what_a_second_decoder_makes_of_them(pool: DecoderPool, tmp_path: Path, folder: str) -> None:
    compared, apart, unread = 0, {}, []
    for path in sorted(path for path in require_shared(folder).glob("*") if path.is_file()):
        ds = pydicom.dcmread(path, force=True)
        if "Rows" not in ds or "PixelData" not in ds:
            continue
        try:
            ours = np.array([one.pixels for one in read_frames(pool, path, color="luminance")])
        except PixelError as exc:
            if not any(sentence in str(exc) for sentence in NOT_READ):
                raise
            continue
        theirs = luminance_by_another(path, ds, tmp_path)
        if theirs is None:
            unread.append(path.name)
            continue
        compared += 1
        if (worst := int(np.abs(ours - theirs).max())) > 0:
            apart[path.name] = worst
    assert compared > 8
    assert apart == dict.fromkeys(apart, 1), "lossy colours may round apart by one"
    assert len(apart) <= 3
    assert set(unread) <= {"SC_rgb_jpeg.dcm"}, "its header is broken, and DCMTK stops at it"


def luminance_by_another(path: Path, ds: pydicom.Dataset, folder: Path) -> NDArray[Any] | None:
    """Decode a real file by DCMTK, or by GDCM for JPEG 2000, and take its luminance; None where that cannot."""
    uid = ds.file_meta.TransferSyntaxUID
    photometric, target = ds.PhotometricInterpretation, folder / "decoded.dcm"
    if uid.startswith(JPEG_2000):
        image = pixel_array(ds, raw=True, decoding_plugin="gdcm")
    else:
        program = ("dcmdjpls",) if uid[-2:] in {"80", "81"} else ("dcmdrle",) if uid.endswith(".5") else ("dcmdjpeg", "+cn")
        if dcmtk(*program, str(path), str(target)).returncode:
            return None
        image = pixel_array(pydicom.dcmread(target), raw=True)
    if photometric == "PALETTE COLOR":
        image = apply_color_lut(image, ds)
    shape = (int(ds.get("NumberOfFrames") or 1), ds.Rows, ds.Columns)
    if image.size == np.prod(shape):
        return image.reshape(shape).astype(float)
    flat = image.reshape(-1, 3)
    return (flat[:, 0] if photometric.startswith("YBR_FULL") else np.rint(flat @ [0.299, 0.587, 0.114])).reshape(shape).astype(float)


@pytest.mark.parametrize(("bits", "is_wide"), [(8, False), (8, True), (16, True)])
@pytest.mark.parametrize("first", [0, 10])
def test_a_palette_is_read_as_the_luminance_of_its_entries(pool: DecoderPool, tmp_path: Path, bits: int, is_wide: bool, first: int) -> None:
    """PS3.3 §C.7.6.3.1.5: values below the first take the first entry, values above the last take the last."""
    table = np.random.default_rng(0).integers(0, 2**bits, (3, 101)).astype("<u2" if is_wide else "u1")
    stored = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    ds = make_image(stored, bits_stored=8, photometric="PALETTE COLOR")
    for name, entries in zip(("Red", "Green", "Blue"), table, strict=True):
        setattr(ds, f"{name}PaletteColorLookupTableDescriptor", [101, first, bits])
        setattr(ds, f"{name}PaletteColorLookupTableData", entries.tobytes() + b"\0" * (entries.nbytes % 2))
    (one,) = read_frames(pool, factories.write(ds, tmp_path / "one.dcm"), color="luminance")
    wanted = np.rint(np.array([0.299, 0.587, 0.114]) @ table)[np.clip(stored[0].astype(int) - first, 0, 100)]
    np.testing.assert_array_equal(one.pixels, wanted)
    assert (one.bits_stored, one.is_signed) == (bits, False)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"RedPaletteColorLookupTableDescriptor": [102, 0, 8]}, "of 102 bytes does not hold 102 entries of 8 bits"),
        ({"RedPaletteColorLookupTableDescriptor": [0, 0, 8]}, "does not hold 65536 entries"),
        ({"RedPaletteColorLookupTableDescriptor": [101, 0, 12]}, "entries of 12 bits"),
        ({"RedPaletteColorLookupTableDescriptor": [101, 1, 8]}, "different descriptors"),
        ({"RedPaletteColorLookupTableData": None}, "is absent; segmented ones are not read"),
    ],
)
def test_a_palette_that_does_not_add_up_is_refused(pool: DecoderPool, tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    ds = make_image(np.zeros((1, 16, 16), np.uint8), bits_stored=8, photometric="PALETTE COLOR")
    for name in ("Red", "Green", "Blue"):
        setattr(ds, f"{name}PaletteColorLookupTableDescriptor", [101, 0, 8])
        setattr(ds, f"{name}PaletteColorLookupTableData", bytes(102))
    for keyword, value in change.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    if change.get("RedPaletteColorLookupTableDescriptor") == [102, 0, 8]:
        ds.RedPaletteColorLookupTableData = bytes(104)
        sentence = "of 104 bytes does not hold 102 entries of 8 bits"
    assert sentence in refused(pool, ds, tmp_path, color="luminance")


@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL"])
def test_native_colours_are_read_in_both_planar_configurations(pool: DecoderPool, tmp_path: Path, photometric: str, planar: int) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (3, 15, 11, 3)).astype("u1")
    ds = make_image(stored, bits_stored=8, photometric=photometric)
    if planar:
        ds.PlanarConfiguration, ds.PixelData = 1, stored.transpose(0, 3, 1, 2).tobytes() + b"\0"
    frames = read_frames(pool, factories.write(ds, tmp_path / "one.dcm"), color="luminance")
    np.testing.assert_array_equal([one.pixels for one in frames], [grey(image, photometric) for image in stored])
    assert refused(pool, ds, tmp_path) == f"The image has colours ({photometric}); only MONOCHROME1 and MONOCHROME2 are analyzed here."


@pytest.mark.parametrize(
    ("photometric", "wanted"), [("YBR_FULL_422", [0, 16, 126, 235, 255, 17]), ("YBR_PARTIAL_422", [0, 0, 128, 255, 255, 1])]
)
def test_shared_chrominance_is_left_out(pool: DecoderPool, tmp_path: Path, photometric: str, wanted: list[int]) -> None:
    """PS3.3 §C.7.6.3.1.2: Y Y Cb Cr; partial luminance runs from 16 to 235."""
    ds = make_image(np.zeros((1, 3, 2, 3), np.uint8), bits_stored=8, photometric=photometric)
    ds.PixelData = bytes([0, 16, 1, 2, 126, 235, 3, 4, 255, 17, 5, 6])
    (one,) = read_frames(pool, factories.write(ds, tmp_path / "one.dcm"), color="luminance")
    assert one.pixels.ravel().tolist() == wanted


@pytest.mark.peer
def test_a_codestream_whose_colours_are_not_the_header_s_is_refused(pool: DecoderPool, tmp_path: Path) -> None:
    """A header that says RGB above YCbCr is a common mistake, and would give a wrong luminance."""
    native = factories.write(make_image(ramp(bits=8, colors=3)[np.newaxis], bits_stored=8, photometric="RGB"), tmp_path / "native.dcm")
    for option, photometric, stated in (("+cy", "RGB", "YCbCr"), ("+cr", "YBR_FULL", "red, green and blue")):
        assert dcmtk("dcmcjpeg", "+eb", option, str(native), str(tmp_path / "made.dcm")).returncode == 0
        ds = pydicom.dcmread(tmp_path / "made.dcm")
        ds.PhotometricInterpretation = photometric
        assert refused(pool, ds, tmp_path, color="luminance").startswith(f"The codestream states {stated}; Photometric Interpretation is")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"PhotometricInterpretation": "YBR_RCT"}, "YBR_RCT belongs to JPEG 2000"),
        ({"PhotometricInterpretation": "YBR_FULL_422", "Columns": 47}, "Columns is 47"),
        ({"PhotometricInterpretation": "YBR_FULL_422", "PlanarConfiguration": 1}, "has no plane of its own"),
        ({"PlanarConfiguration": 2}, "Planar Configuration 2"),
        ({"PixelRepresentation": 1}, "(signed) are not read"),
    ],
)
def test_colours_that_cannot_be_are_refused(pool: DecoderPool, tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    ds = make_image(ramp(bits=8, colors=3)[np.newaxis], bits_stored=8, photometric="RGB")
    for keyword, value in change.items():
        setattr(ds, keyword, value)
    assert sentence in refused(pool, ds, tmp_path, color="luminance")


def test_signed_samples_in_lossy_jpeg_are_refused(pool: DecoderPool, tmp_path: Path) -> None:
    """PS3.5 Table 8.2.1-1: around zero, two's complement jumps from 255 to 0, and the loss would spread it."""
    ds = factories.make_radiograph(bits_stored=8, transfer_syntax=f"{PREFIX}.4.50")
    ds.PixelRepresentation = 1
    assert refused(pool, ds, tmp_path) == "Signed samples are in a lossy JPEG codestream, which has no sign."
