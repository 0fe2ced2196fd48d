"""What one file must look like to be decoded, and the sentence with which any other is refused. In real decoding processes."""

from __future__ import annotations

import hashlib
import os
import re
import struct
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.uid import (
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLSLossless,
    RLELossless,
)

from tests import factories
from tests.decoders import ENCODED, LOSSLESS, make_image, read, read_frames, refused
from worker.errors import GeometryError, PixelError, StoredFileLost, WorkerError
from worker.imaging.codecs import decodable_transfer_syntaxes
from worker.imaging.decoding import DecoderPool

ROOT = Path(__file__).parents[2]


def splice(path: Path, tag: int, vr: bytes, value: bytes) -> None:
    """Give an element with a two-byte length another value, as no library would write it."""
    data, header = path.read_bytes(), struct.pack("<HH2s", tag >> 16, tag & 0xFFFF, vr)
    assert data.count(header) == 1
    at = data.index(header) + len(header)
    (length,) = struct.unpack_from("<H", data, at)
    value += b"\0 "[vr == b"DS" :][:1] * (len(value) % 2)
    path.write_bytes(data[:at] + struct.pack("<H", len(value)) + value + data[at + 2 + length :])


# --- what is read


@pytest.mark.requirement("P11")
@pytest.mark.parametrize("is_signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("transfer_syntax", LOSSLESS)
def test_each_lossless_transfer_syntax_of_one_image_gives_equal_pixels(
    pool: DecoderPool, tmp_path: Path, transfer_syntax: str, is_signed: bool
) -> None:
    ds = factories.make_ct(slices=1, is_signed=is_signed, transfer_syntax=transfer_syntax)[0]
    one = read(pool, factories.write(ds, tmp_path / "one.dcm"))
    np.testing.assert_array_equal(one.pixels, factories.known_hu(slices=1)[0] - factories.INTERCEPT_HU)
    assert one.pixels.dtype == (np.int16 if is_signed else np.uint16)
    assert one.transfer_syntax_uid == transfer_syntax


@pytest.mark.requirement("P11")
@pytest.mark.parametrize(("bits_stored", "dtype"), [(6, "u1"), (7, "i1"), (10, "u2"), (12, "i2"), (14, "i2")])
@pytest.mark.parametrize("transfer_syntax", LOSSLESS)
def test_odd_sample_widths_survive_each_lossless_transfer_syntax(
    pool: DecoderPool, tmp_path: Path, transfer_syntax: str, bits_stored: int, dtype: str
) -> None:
    """GDCM aborts the process on 6 and 7 bits unless it is told the precision of the codestream."""
    low, high = (-(2 ** (bits_stored - 1)), 2 ** (bits_stored - 1)) if dtype[0] == "i" else (0, 2**bits_stored)
    stored = np.random.default_rng(1).integers(low, high, (64, 48)).astype(dtype)
    ds = factories.make_radiograph(stored=stored, bits_stored=bits_stored, transfer_syntax=transfer_syntax)
    np.testing.assert_array_equal(read(pool, factories.write(ds, tmp_path / "one.dcm")).pixels, stored)


@pytest.mark.requirement("P11")
@pytest.mark.parametrize(("transfer_syntax", "bound"), [(JPEGBaseline8Bit, 2), ("1.2.840.10008.1.2.4.91", 2)])
def test_lossy_pixels_are_within_a_bound(pool: DecoderPool, tmp_path: Path, transfer_syntax: str, bound: int) -> None:
    ds = factories.make_radiograph(bits_stored=8, transfer_syntax=transfer_syntax)
    one = read(pool, factories.write(ds, tmp_path / "one.dcm"))
    assert np.abs(one.pixels.astype(int) - factories.known_stored(bits_stored=8)).max() <= bound


@pytest.mark.requirement("P11")
def test_a_real_ct_is_the_same_in_every_transfer_syntax(pool: DecoderPool, shared: Path) -> None:
    folder = shared / "data" / "dicom" / "cornerstone" / "examples" / "test-images"
    reference = read(pool, folder / "CTImage.dcm").pixels.astype(int)
    compared = {}
    for path in sorted(folder.glob("CTImage.dcm_*")):
        uid = path.name.removesuffix(".dcm").rsplit("_", 1)[1]
        if uid in decodable_transfer_syntaxes() and uid != JPEGBaseline8Bit:  # that one was reduced to 8 bits before it was compressed
            compared[uid] = int(np.abs(read(pool, path).pixels - reference).max())
    assert compared == {uid: {"1.2.840.10008.1.2.4.91": 5, "1.2.840.10008.1.2.4.81": 1}.get(uid, 0) for uid in compared}
    assert len(compared) == 9


def test_the_facts_of_a_slice_are_those_of_its_header(pool: DecoderPool, tmp_path: Path) -> None:
    ds = factories.make_ct()[2]
    ds.PixelPaddingValue = 7
    one = read(pool, factories.write(ds, tmp_path / "one.dcm"))
    assert (one.sop_instance_uid, one.sop_class_uid) == (ds.SOPInstanceUID, ds.SOPClassUID)
    assert (one.modality, one.image_type, one.instance_number) == ("CT", ("ORIGINAL", "PRIMARY", "AXIAL"), 3)
    assert (one.position, one.orientation) == ((-10, 20, -25), (1, 0, 0, 0, 1, 0))
    assert (one.pixel_spacing, one.imager_spacing, one.aspect_ratio) == ((0.75, 0.5), None, None)
    assert (one.rescale_slope, one.rescale_intercept, one.rescale_type) == (1, -1024, "HU")
    assert (one.bits_stored, one.is_signed, one.padding) == (12, False, (7, 7))
    assert one.frame_of_reference_uid == ds.FrameOfReferenceUID


def test_many_files_come_back_in_the_order_asked_for(pool: DecoderPool, tmp_path: Path) -> None:
    series = factories.spool(factories.make_ct(slices=21), tmp_path)
    instances = series.instances[::-1]
    slices = pool.read([one.path for one in instances], [one.sha256 for one in instances])
    assert [one.sop_instance_uid for (one,) in slices] == [one.sop_instance_uid for one in instances]


def test_an_odd_number_of_bytes_is_padded_by_one(pool: DecoderPool, tmp_path: Path) -> None:
    ds = factories.make_radiograph(rows=5, columns=5, bits_stored=8)
    assert len(ds.PixelData) == 26
    np.testing.assert_array_equal(read(pool, factories.write(ds, tmp_path / "one.dcm")).pixels, factories.known_stored(5, 5, bits_stored=8))


def test_signed_values_that_were_not_sign_extended_are_extended(pool: DecoderPool, tmp_path: Path) -> None:
    ds = factories.make_radiograph(stored=np.array([[0, 1], [0x0FFF, 0x0800]], np.int16), bits_stored=12)
    assert read(pool, factories.write(ds, tmp_path / "one.dcm")).pixels.tolist() == [[0, 1], [-1, -2048]]


@pytest.mark.requirement("P14")
def test_an_overlay_in_the_unused_bits_is_cleared(pool: DecoderPool, tmp_path: Path) -> None:
    ds = factories.make_radiograph(stored=np.array([[0x1123, 0x0456], [0x0FFF, 0x1000]], np.uint16), bits_stored=12)
    message = refused(pool, ds, tmp_path)
    assert "from 1110 to 4387 do not fit Bits Stored 12" in message
    ds.add_new(0x60000102, "US", 12)
    assert read(pool, factories.write(ds, tmp_path / "one.dcm")).pixels.tolist() == [[0x123, 0x456], [0xFFF, 0]]


@pytest.mark.requirement("P10")
@pytest.mark.parametrize("vr", ["US", "SS"])
def test_padding_counts_by_its_bits_whatever_its_vr(pool: DecoderPool, tmp_path: Path, vr: str) -> None:
    """Vendors write 63536 as US beside signed pixels: it means -2000, also outside Bits Stored."""
    ds = factories.make_radiograph(stored=np.array([[-2000, 5], [6, 7]], np.int16), bits_stored=11)
    ds.add_new(0x00280120, vr, 63536 if vr == "US" else -2000)
    one = read(pool, factories.write(ds, tmp_path / "one.dcm"))
    assert one.padding == (-2000, -2000)
    assert one.pixels.tolist() == [[-2000, 5], [6, 7]]


@pytest.mark.requirement("P11")
@pytest.mark.parametrize("transfer_syntax", LOSSLESS)
def test_every_frame_of_a_file_comes_back_in_turn(pool: DecoderPool, tmp_path: Path, transfer_syntax: str) -> None:
    stored = np.random.default_rng(0).integers(0, 4096, (5, 33, 47)).astype("u2")
    ds = make_image(stored, bits_stored=12, transfer_syntax=transfer_syntax)
    frames = read_frames(pool, factories.write(ds, tmp_path / "one.dcm"))
    np.testing.assert_array_equal([one.pixels for one in frames], stored)
    assert [one.number for one in frames] == [1, 2, 3, 4, 5]
    assert {one.sop_instance_uid for one in frames} == {ds.SOPInstanceUID}


@pytest.mark.requirement("P5")
@pytest.mark.parametrize("table", ["none", "basic", "extended"])
@pytest.mark.parametrize("fragments", [1, 3])
@pytest.mark.parametrize("transfer_syntax", [JPEG2000Lossless, JPEGLSLossless, JPEGLossless])
def test_frames_are_parted_by_their_table_or_by_where_they_start(
    pool: DecoderPool, tmp_path: Path, transfer_syntax: str, fragments: int, table: str
) -> None:
    """PS3.3 §C.7.6.3.1.8: an Extended Offset Table serves frames of one fragment only."""
    stored = np.random.default_rng(0).integers(0, 4096, (4, 33, 47)).astype("u2")
    ds = make_image(stored, bits_stored=12, transfer_syntax=transfer_syntax)
    frames = list(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=4))
    if table == "extended":
        ds.PixelData, ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths = encapsulate_extended(frames)
        if fragments > 1:
            ds.PixelData = encapsulate(frames, fragments_per_frame=fragments, has_bot=False)
            assert "does not point to fragments" in refused(pool, ds, tmp_path)
            return
    else:
        ds.PixelData = encapsulate(frames, fragments_per_frame=fragments, has_bot=table == "basic")
    np.testing.assert_array_equal([one.pixels for one in read_frames(pool, factories.write(ds, tmp_path / "one.dcm"))], stored)


def test_bits_allocated_1_are_unpacked_across_frames(pool: DecoderPool, tmp_path: Path) -> None:
    """PS3.5 §8.1.1: frames of 35 bits do not start at bytes."""
    stored = np.random.default_rng(0).integers(0, 2, (3, 5, 7)).astype("u1")
    ds = make_image(stored, bits_stored=8)
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 1, 1, 0
    ds.PixelData = np.packbits(stored, bitorder="little").tobytes()
    np.testing.assert_array_equal([one.pixels for one in read_frames(pool, factories.write(ds, tmp_path / "one.dcm"))], stored)


def test_32_bit_integers_are_read(pool: DecoderPool, tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 2**32, (2, 5, 7)).astype("u4")
    ds = make_image(stored, bits_stored=32)
    np.testing.assert_array_equal([one.pixels for one in read_frames(pool, factories.write(ds, tmp_path / "one.dcm"))], stored)


# --- what is refused


@pytest.mark.requirement("S6")
def test_a_file_with_one_other_byte_is_refused(pool: DecoderPool, tmp_path: Path) -> None:
    path = factories.write(factories.make_ct(slices=1)[0], tmp_path / "one.dcm")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoredFileLost, match="changed on our disk"):
        pool.read([path], [digest])


@pytest.mark.requirement("S7")
def test_a_file_that_is_gone_is_refused(pool: DecoderPool, tmp_path: Path) -> None:
    with pytest.raises(StoredFileLost, match="missing"):
        pool.read([tmp_path / "absent.dcm"], ["0" * 64])


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["fifo", "folder"])
def test_what_is_no_file_is_refused_and_does_not_hang(pool: DecoderPool, tmp_path: Path, make: object) -> None:
    assert callable(make)
    make(tmp_path / "odd")
    with pytest.raises(WorkerError):
        pool.read([tmp_path / "odd"], ["0" * 64])


@pytest.mark.requirement("P3")
@pytest.mark.requirement("P5")
@pytest.mark.parametrize(
    ("keyword", "value", "sentence"),
    [
        ("Rows", 0, "Rows x Columns is 0 x 48"),
        ("Columns", 65535, "has 6144 bytes where Number of Frames, Rows, Columns and Bits Allocated need 8388480"),
        ("BitsStored", 17, "Bits Stored 17"),
        ("BitsStored", 0, "Bits Stored 0"),
        ("BitsAllocated", 32, "need 12288"),
        ("BitsAllocated", 64, "Bits Allocated 64"),
        ("BitsAllocated", 12, "Bits Allocated 12"),
        ("HighBit", 15, "High Bit 15"),
        ("PixelRepresentation", 2, "Pixel Representation 2"),
        ("SamplesPerPixel", 0, "Samples per Pixel is 0"),
        ("SamplesPerPixel", 3, "Samples per Pixel is 3"),
        ("PhotometricInterpretation", "PALETTE COLOR", "MONOCHROME1 and MONOCHROME2"),
        ("PhotometricInterpretation", "RGB", "Samples per Pixel is 1 and Photometric Interpretation RGB"),
        ("PhotometricInterpretation", "HSV", "none that is read"),
        ("NumberOfFrames", 2, "has 6144 bytes where Number of Frames, Rows, Columns and Bits Allocated need 12288"),
        ("NumberOfFrames", 0, r"Number of Frames \(0028,0008\) is 0"),
        ("NumberOfFrames", -1, r"Number of Frames \(0028,0008\) is -1"),
        ("NumberOfFrames", 2000000, "is 2000000"),
        ("NumberOfFrames", 100000, "100000 frames of .* are 614400000 bytes; at most 536870912"),
        ("RescaleSlope", ["1", "2"], r"Rescale Slope \(0028,1053\) is not one finite number"),
        ("ImagePositionPatient", ["1", "2"], r"Image Position \(Patient\) \(0020,0032\) does not hold 3"),
    ],
)
def test_a_header_that_cannot_be_true_is_refused(pool: DecoderPool, tmp_path: Path, keyword: str, value: object, sentence: str) -> None:
    ds = factories.make_radiograph()
    setattr(ds, keyword, value)
    assert re.search(sentence, refused(pool, ds, tmp_path))


@pytest.mark.requirement("P3")
def test_rows_of_another_vr_are_refused(pool: DecoderPool, tmp_path: Path) -> None:
    ds = factories.make_radiograph()
    del ds.Rows
    ds.add_new(0x00280010, "UL", 64)
    assert refused(pool, ds, tmp_path) == "Rows (0028,0010) is absent or not one whole number."


@pytest.mark.requirement("P6")
@pytest.mark.parametrize("number", ["nan", "inf", "1e999", "abc"])
def test_a_rescale_that_is_no_finite_number_is_refused(pool: DecoderPool, tmp_path: Path, number: str) -> None:
    path = factories.write(factories.make_ct(slices=1)[0], tmp_path / "one.dcm")
    splice(path, 0x00281053, b"DS", number.encode())
    with pytest.raises(PixelError) as caught:
        read(pool, path)
    assert number not in str(caught.value)


@pytest.mark.requirement("P4")
@pytest.mark.parametrize("change", [-2, -1, 1, 2, 1000, 64 * 48 * 2])
def test_native_pixels_of_another_length_are_refused(pool: DecoderPool, tmp_path: Path, change: int) -> None:
    ds = factories.make_radiograph()
    data = ds.PixelData
    ds.PixelData = data[:change] if change < 0 else data + b"\0" * change
    even = len(ds.PixelData) + len(ds.PixelData) % 2
    if even == len(data):  # an odd length is padded on writing: nothing is missing then
        assert read(pool, factories.write(ds, tmp_path / "one.dcm")).pixels.size == 64 * 48
    else:
        assert refused(pool, ds, tmp_path).startswith(f"Pixel Data (7FE0,0010) has {even} bytes")


@pytest.mark.requirement("P16")
@pytest.mark.parametrize("transfer_syntax", ENCODED)
def test_a_file_cut_anywhere_is_refused(pool: DecoderPool, tmp_path: Path, transfer_syntax: str) -> None:
    whole = factories.write(factories.make_radiograph(bits_stored=8, transfer_syntax=transfer_syntax), tmp_path / "whole.dcm").read_bytes()
    for part in (0, 100, 140, len(whole) // 3, len(whole) // 2, len(whole) - 200, len(whole) - 20):
        path = tmp_path / "cut.dcm"
        path.write_bytes(whole[:part])
        with pytest.raises(PixelError):
            read(pool, path)


@pytest.mark.requirement("P4")
@pytest.mark.requirement("P5")
@pytest.mark.parametrize("transfer_syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless, JPEGLossless])
def test_a_second_frame_that_the_header_does_not_count_is_refused(pool: DecoderPool, tmp_path: Path, transfer_syntax: str) -> None:
    ds = factories.make_radiograph(transfer_syntax=transfer_syntax)
    frame = pydicom.encaps.get_frame(ds.PixelData, 0, number_of_frames=1)
    ds.PixelData = encapsulate([frame, frame], has_bot=False)
    assert refused(pool, ds, tmp_path) == "Number of Frames is 1, but Pixel Data holds 2 frames."


@pytest.mark.requirement("P5")
@pytest.mark.parametrize("table", ["none", "basic", "extended"])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transfer_syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless, JPEGLossless])
def test_a_number_of_frames_that_lies_is_refused(pool: DecoderPool, tmp_path: Path, transfer_syntax: str, count: int, table: str) -> None:
    stored = np.random.default_rng(0).integers(0, 4096, (3, 33, 47)).astype("u2")
    ds = make_image(stored, bits_stored=12, transfer_syntax=transfer_syntax)
    frames = list(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=3))
    ds.PixelData = encapsulate(frames, has_bot=table == "basic")
    if table == "extended":
        ds.PixelData, ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths = encapsulate_extended(frames)
    ds.NumberOfFrames = count
    assert refused(pool, ds, tmp_path) == f"Number of Frames is {count}, but Pixel Data holds 3 frames."


@pytest.mark.requirement("P4")
@pytest.mark.requirement("P5")
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("bits", [1, 8, 16])
def test_native_frames_of_another_number_are_refused(pool: DecoderPool, tmp_path: Path, count: int, bits: int) -> None:
    stored = np.zeros((3, 32, 48), "u2" if bits == 16 else "u1")
    ds = make_image(stored, bits_stored=max(bits, 8))
    if bits == 1:
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelData = 1, 1, 0, bytes(3 * 32 * 6)
    ds.NumberOfFrames = count
    assert refused(pool, ds, tmp_path).startswith(f"Pixel Data (7FE0,0010) has {3 * 32 * 6 * bits} bytes where Number of Frames")


@pytest.mark.requirement("P5")
@pytest.mark.parametrize("offsets", [[0, 2, 4], [8, 16, 24], [0, 0, 0], "reversed"])
def test_a_table_that_does_not_point_to_fragments_is_refused(pool: DecoderPool, tmp_path: Path, offsets: list[int] | str) -> None:
    stored = np.random.default_rng(0).integers(0, 4096, (3, 33, 47)).astype("u2")
    ds = make_image(stored, bits_stored=12, transfer_syntax=JPEG2000Lossless)
    frames = list(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=3))
    data = encapsulate(frames, has_bot=True)
    put = struct.unpack_from("<3I", data, 8)[::-1] if isinstance(offsets, str) else offsets
    ds.PixelData = data[:8] + struct.pack("<3I", *put) + data[20:]
    assert refused(pool, ds, tmp_path) == "The offset table of 3 frames does not point to fragments of Pixel Data in turn."


@pytest.mark.requirement("P5")
def test_lengths_of_an_extended_table_that_are_not_the_fragments_are_refused(pool: DecoderPool, tmp_path: Path) -> None:
    ds = make_image(np.zeros((3, 33, 47), "u2"), bits_stored=12, transfer_syntax=JPEG2000Lossless)
    frames = list(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=3))
    ds.PixelData, ds.ExtendedOffsetTable, lengths = encapsulate_extended(frames)
    ds.ExtendedOffsetTableLengths = lengths[8:] + b"\x05" + b"\0" * 7
    assert "(7FE0,0002)" in refused(pool, ds, tmp_path)


@pytest.mark.requirement("P1")
def test_frames_that_together_exceed_the_limit_are_refused_before_one_is_decoded(pool: DecoderPool, tmp_path: Path) -> None:
    """An RLE frame of zeros is small; 30 kB of them claim a gigabyte."""
    ds = make_image(np.zeros((1, 1024, 1024), "u2"), bits_stored=16, transfer_syntax=RLELossless)
    frame = pydicom.encaps.get_frame(ds.PixelData, 0, number_of_frames=1)
    ds.PixelData, ds.NumberOfFrames = encapsulate([frame] * 512), 512
    assert "512 frames of" in refused(pool, ds, tmp_path)


def test_float_pixels_are_refused_by_name(pool: DecoderPool, tmp_path: Path) -> None:
    ds = factories.make_radiograph()
    ds.FloatPixelData = bytes(64 * 48 * 4)
    assert refused(pool, ds, tmp_path).startswith("Float Pixel Data (7FE0,0008)")


@pytest.mark.requirement("P1")
@pytest.mark.parametrize("transfer_syntax", [JPEG2000Lossless, JPEGLSLossless, JPEGLossless, JPEGBaseline8Bit])
def test_a_codestream_larger_than_its_header_is_refused_before_it_is_decoded(
    pool: DecoderPool, tmp_path: Path, transfer_syntax: str
) -> None:
    ds = factories.make_radiograph(bits_stored=8, transfer_syntax=transfer_syntax)
    ds.Rows = 32
    assert refused(pool, ds, tmp_path) == "The codestream states 64 x 48 with 1 components; the header 32 x 48 with 1."


@pytest.mark.requirement("P1")
def test_an_rle_stream_too_short_for_its_image_is_refused(pool: DecoderPool, tmp_path: Path) -> None:
    ds = factories.make_radiograph(transfer_syntax=RLELossless)
    ds.Rows, ds.Columns = 8000, 8000
    assert re.fullmatch(r"An RLE stream of \d+ bytes cannot hold 128000000 bytes of pixels.", refused(pool, ds, tmp_path))


@pytest.mark.requirement("P18")
def test_an_rle_segment_that_runs_over_is_refused_and_costs_no_child(pool: DecoderPool, tmp_path: Path) -> None:
    """pylibjpeg-rle panics at it, which in Python is no Exception (found by `make fuzz`)."""
    ds = factories.make_radiograph(transfer_syntax=RLELossless)
    segment = bytes([257 - 64, 7]) * (ds.Rows * ds.Columns // 64)  # PS3.5 §G.3.1: a byte, 64 times
    longer = bytes([257 - 2, 7]) + segment
    ds.PixelData = encapsulate([struct.pack("<16L", 2, 64, 64 + len(longer), *[0] * 13) + longer + segment])
    before = pool.pids()
    assert refused(pool, ds, tmp_path) == "The pixel data cannot be decoded by rle (PanicException)."
    assert set(pool.pids()) == set(before)


@pytest.mark.requirement("P1")
def test_an_image_larger_than_the_limit_is_refused_from_its_header(pool: DecoderPool, tmp_path: Path) -> None:
    ds = factories.make_radiograph()
    ds.Rows, ds.Columns = 60000, 60000
    assert "are 7200000000 bytes; at most 268435456 can be decoded" in refused(pool, ds, tmp_path)


@pytest.mark.requirement("P1")
@pytest.mark.parametrize("uid", ["1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.4.55", "1.2.3.4"])
def test_a_transfer_syntax_that_is_not_decoded_is_refused_by_its_name(pool: DecoderPool, tmp_path: Path, uid: str) -> None:
    """A deflated data set is refused before a byte of it is inflated: what follows the meta here is no deflate stream."""
    path = factories.write(factories.make_radiograph(), tmp_path / "one.dcm")
    splice(path, 0x00020010, b"UI", uid.encode())
    with pytest.raises(PixelError, match=r"^The transfer syntax, .*, is not decoded(: .*)?\.$") as caught:
        read(pool, path)
    assert uid not in str(caught.value)


@pytest.mark.requirement("P2")
@pytest.mark.parametrize("depth", [300, 20000])
def test_sequences_nested_beyond_reason_are_refused(pool: DecoderPool, tmp_path: Path, depth: int) -> None:
    path = factories.write(factories.make_radiograph(), tmp_path / "one.dcm")
    pixel_data = struct.pack("<HH2s", 0x7FE0, 0x0010, b"OW")
    opened = struct.pack("<HH2sHI", 0x0040, 0xA730, b"SQ", 0, 0xFFFFFFFF) + struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    closed = struct.pack("<HHI", 0xFFFE, 0xE00D, 0) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    head, tail = path.read_bytes().split(pixel_data)
    path.write_bytes(head + opened * depth + closed * depth + pixel_data + tail)
    with pytest.raises(PixelError, match="nested deeper"):
        read(pool, path)


@pytest.mark.requirement("P2")
@pytest.mark.parametrize("depth", [300, 5000])
@pytest.mark.parametrize(("tag", "sentence"), [(0x00283000, "Modality LUT"), (0x00540016, ""), (0x52009229, "")])
def test_deep_sequences_of_defined_length_are_stepped_over_or_cost_one_error(
    pool: DecoderPool, tmp_path: Path, tag: int, sentence: str, depth: int
) -> None:
    """A table, a dose, functional groups: what is wanted of them is on the first levels, and no reader goes further down."""
    value = b""
    for level in range(depth):
        item = struct.pack("<HHI", 0xFFFE, 0xE000, len(value)) + value
        group, element = divmod(tag if level == depth - 1 else 0x0040A730, 0x10000)
        value = struct.pack("<HH2sHI", group, element, b"SQ", 0, len(item)) + item
    path, pixel_data = factories.write(factories.make_radiograph(), tmp_path / "one.dcm"), struct.pack("<HH2s", 0x7FE0, 0x0010, b"OW")
    path.write_bytes(path.read_bytes().replace(pixel_data, value + pixel_data))
    before = pool.pids()
    if sentence:
        with pytest.raises(PixelError, match=sentence):
            read(pool, path)
    else:
        np.testing.assert_array_equal(read(pool, path).pixels, factories.known_stored())
    assert set(pool.pids()) == set(before)


@pytest.mark.requirement("X1")
def test_no_refusal_quotes_the_file(pool: DecoderPool, tmp_path: Path) -> None:
    """A sentinel in every text of the header never shows in an error, whatever is wrong with the file."""
    sentences = []
    for tag, vr, value in [
        (0x00080060, b"CS", b"SENTINEL" * 20),
        (0x00280004, b"CS", b"SENTINEL"),
        (0x00280010, b"US", b"\0\0"),
        (0x00280101, b"US", b"SENTINEL"),
        (0x00281053, b"DS", b"SENTINEL"),
        (0x00181164, b"DS", b"SENTINEL"),
        (0x00020010, b"UI", b"SENTINEL"),
    ]:
        ds = factories.make_radiograph()
        ds.PatientName = ds.PatientID = ds.AccessionNumber = ds.SeriesDescription = "SENTINEL"
        path = factories.write(ds, tmp_path / "one.dcm")
        splice(path, tag, vr, value)
        with pytest.raises((PixelError, GeometryError)) as caught:
            read(pool, path)
        sentences.append(str(caught.value))
    assert not [sentence for sentence in sentences if "SENTINEL" in sentence]
    assert len(sentences) == 7
