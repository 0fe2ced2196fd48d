"""The header: the right values of honest data sets, a typed refusal of every other."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import generate_uid

from tests.scu import CT, EXPLICIT, IMPLICIT, encoded, slice_of, with_raw
from worker.domain import Header, ImageFacts
from worker.intake.header import InstanceRefused, is_uid, read_header
from worker.intake.image_facts import first_code
from worker.intake.negotiation import TRANSFER_SYNTAXES


def header_of(ds: Dataset, *, is_implicit: bool = False) -> Header:
    return read_header(encoded(ds, is_implicit=is_implicit), IMPLICIT if is_implicit else EXPLICIT)


def refusal(data: bytes, transfer_syntax: str = EXPLICIT) -> InstanceRefused:
    with pytest.raises(InstanceRefused) as caught:
        read_header(data, transfer_syntax)
    assert len(caught.value.comment) <= 64, "an Error Comment is LO"
    assert caught.value.comment.isascii()
    return caught.value


def nested(depth: int) -> bytes:
    """Sequences of undefined length inside each other, explicit VR."""
    begin = struct.pack("<HH2sHL", 0x0040, 0xA730, b"SQ", 0, 0xFFFFFFFF) + struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)
    end = struct.pack("<HHL", 0xFFFE, 0xE00D, 0) + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    return begin * depth + end * depth


@pytest.mark.parametrize("is_implicit", [False, True])
def test_every_wanted_attribute_is_read_in_both_encodings(is_implicit: bool) -> None:
    ds = slice_of(
        StudyDescription="Thorax ",
        SeriesDescription="axial",
        BodyPartExamined="CHEST",
        PatientBirthDate="19500102",
        PatientSex="F",
        TimezoneOffsetFromUTC="+0100",
        NumberOfFrames=3,
        ReferencedStudySequence=[slice_of(PixelData=None)],
    )
    header = header_of(ds, is_implicit=is_implicit)
    assert header.sop_class_uid == CT
    assert (header.sop_instance_uid, header.study_instance_uid) == (ds.SOPInstanceUID, ds.StudyInstanceUID)
    assert header.series_instance_uid == ds.SeriesInstanceUID
    assert (header.patient.key.patient_id, header.patient.key.issuer) == ("P-17", "HOSPITAL")
    assert (header.patient.name, header.patient.birth_date, header.patient.sex) == ("Made^Up", "19500102", "F")
    assert (header.study_date, header.study_time, header.timezone_offset) == ("20260102", "101112", "+0100")
    assert (header.accession_number, header.modality, header.facts.body_part) == ("A-1", "CT", "CHEST")
    assert (header.study_description, header.series_description, header.number_of_frames) == ("Thorax", "axial", 3)


@pytest.mark.parametrize(
    ("charset", "raw", "expected"),
    [
        (None, b"M\xfcller^Eva", "Müller^Eva"),  # undeclared: kept apart from others, not replaced
        ("ISO_IR 100", b"M\xfcller^Eva", "Müller^Eva"),
        ("ISO_IR 192", "Wang^小东".encode(), "Wang^小东"),
        ("ISO_IR 192", b"M\xfcller", "Müller"),  # declared wrongly
        ("GB18030", "王^小东".encode("gb18030"), "王^小东"),
        ("ISO_IR 144", "Люкceмбypг".encode("iso8859_5"), "Люкceмбypг"),
        ("\\ISO 2022 IR 87", b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B", "Yamada^Tarou=山田^太郎"),
        ("\\ISO 2022 IR 149", b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7", "Hong^Gildong=洪^吉洞"),
        ("\\ISO 2022 IR 58", b"Zhang=\x1b$)A\xd5\xc5^\x1b$)A\xd0\xa1", "Zhang=张^小"),
        ("ISO IR 100", b"M\xfcller", "Müller"),  # misspelt terms are common
        ("NO SUCH SET", b"M\xfcller", "Müller"),
    ],
)
def test_texts_are_decoded_by_their_character_set(charset: str | None, raw: bytes, expected: str) -> None:
    values = {0x00100010: raw} | ({0x00080005: charset.encode()} if charset else {})
    assert read_header(with_raw(slice_of(), values), EXPLICIT).patient.name == expected


def test_two_undecodable_patient_ids_stay_two_patients() -> None:
    values = [{0x00080005: b"ISO_IR 192", 0x00100020: b"P" + byte} for byte in (b"\xe4", b"\xf6")]
    assert len({read_header(with_raw(slice_of(), value), EXPLICIT).patient.key for value in values}) == 2


def test_values_that_are_not_what_they_should_be_read_as_unknown() -> None:
    values = {0x00080020: b"2026.01.", 0x00080030: b"noon", 0x00100030: b"unknown", 0x00100040: b"X ", 0x00280008: b"-3"}
    header = read_header(with_raw(slice_of(), values), EXPLICIT)
    assert (header.study_date, header.study_time, header.patient.birth_date, header.patient.sex, header.number_of_frames) == (
        "",
        "",
        "",
        "",
        1,
    )


@pytest.mark.parametrize(
    ("raw", "view"),
    [(b"PA", "PA"), (b"ll", "LL"), (b" AP ", "AP"), (b"", ""), (b"AP\\PA ", ""), (b"?", ""), (b"A" * 18, ""), (b"\xb2 ", "")],
)
def test_the_view_of_a_film_is_known_if_it_is_one(raw: bytes, view: str) -> None:
    assert read_header(with_raw(slice_of(), {0x00185101: raw}), EXPLICIT).view == view


def test_films_of_one_series_keep_their_own_views() -> None:
    uid = generate_uid()
    films = (slice_of(SeriesInstanceUID=uid, ViewPosition=view) for view in ("PA", "LL", ""))
    assert [header_of(film).view for film in films] == ["PA", "LL", ""]


@pytest.mark.parametrize("is_implicit", [False, True])
@pytest.mark.parametrize(
    ("spacing", "thickness", "slice_mm"), [(2.5, 5, 2.5), (None, 5, 5.0), ("", 1.25, 1.25), (0, 3, 3.0), (None, None, 0.0)]
)
def test_the_distance_of_slices_comes_before_their_thickness(
    is_implicit: bool, spacing: object, thickness: object, slice_mm: float
) -> None:
    told: dict[str, Any] = {"SpacingBetweenSlices": spacing, "SliceThickness": thickness}
    ds = slice_of(**{keyword: value for keyword, value in told.items() if value is not None})
    assert header_of(ds, is_implicit=is_implicit).facts.slice_mm == slice_mm


@pytest.mark.parametrize(
    ("row", "column", "expected"),
    [
        ((1, 0, 0), (0, 1, 0), "axial"),
        ((-1, 0, 0), (0, 1, 0), "axial"),
        ((1, 0, 0), (0, 0, -1), "coronal"),
        ((0, 1, 0), (0, 0, -1), "sagittal"),
        ((0, -1, 0), (0, 0, 1), "sagittal"),
    ],
)
def test_an_image_along_the_patients_axes_is_of_the_plane_known(row: tuple[int, ...], column: tuple[int, ...], expected: str) -> None:
    assert header_of(slice_of(ImageOrientationPatient=[*row, *column])).facts.orientation == expected


@given(st.floats(0, 89), st.sampled_from([0, 1, 2]), st.sampled_from([1, 2]), st.floats(0, 360))
def test_the_plane_is_that_of_the_axis_within_30_degrees_of_the_normal(tilt_deg: float, axis: int, step: int, turn_deg: float) -> None:
    """However the image is turned in its plane; between the axes it is of none."""
    normal, aside = np.eye(3)[axis], np.eye(3)[(axis + step) % 3]
    third = np.cross(normal, aside)
    tilt, turn = np.deg2rad(tilt_deg), np.deg2rad(turn_deg)
    leaning = np.cos(tilt) * aside - np.sin(tilt) * normal
    row, column = np.cos(turn) * leaning + np.sin(turn) * third, np.cos(turn) * third - np.sin(turn) * leaning
    raw = "\\".join(f"{value:.6f}" for value in (*row, *column)).encode()
    assume(min(abs(tilt_deg - 30), abs(tilt_deg - 60)) > 0.01)
    near = axis if tilt_deg < 30 else (axis + step) % 3
    expected = "" if 30 < tilt_deg < 60 else ("sagittal", "coronal", "axial")[near]
    assert read_header(with_raw(slice_of(), {0x00200037: raw + b" " * (len(raw) % 2)}), EXPLICIT).facts.orientation == expected


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"axial ", b"1\\0\\0\\0\\1", b"1\\0\\0\\0\\1\\0\\0", b"1\\0\\0\\0\\1\\nan", b"1\\0\\0\\0\\1\\", b"1\\0\\0\\0\\1\\1e99",
        b"0\\0\\0\\0\\0\\0", b"2\\0\\0\\0\\2\\0", b"1\\0\\0\\1\\0\\0", b"1\\0\\0\\0\\1\\0\0 0", b"1\\0\\0\\0\\1\\\xb2 ", b"1" * 5000,
    ],
)  # fmt: skip
def test_a_malformed_orientation_is_none_and_never_refused(raw: bytes) -> None:
    assert read_header(with_raw(slice_of(), {0x00200037: raw}), EXPLICIT).facts.orientation == ""


@pytest.mark.parametrize(
    "raw", [b"", b"-2", b"0 ", b"thin", b"nan ", b"inf ", b"1e999 ", b"1\\2 ", b"1_0 ", b"1\0000", b"\xb2 ", b"9" * 5000]
)
def test_a_malformed_distance_of_slices_is_unknown_and_never_refused(raw: bytes) -> None:
    assert read_header(with_raw(slice_of(), {0x00180088: raw, 0x00180050: raw}), EXPLICIT).facts.slice_mm == 0


@given(st.binary(max_size=80), st.sampled_from([0x00180050, 0x00180088, 0x00200037]))
def test_no_value_of_the_geometry_escapes_as_an_error(raw: bytes, tag: int) -> None:
    header = read_header(with_raw(slice_of(), {tag: raw}), EXPLICIT)
    assert header.facts.orientation in ("", "axial", "coronal", "sagittal")
    assert 0 <= header.facts.slice_mm < float("inf")


@pytest.mark.requirement("R11")
@pytest.mark.parametrize("uid", ["", "../../x", "/etc/passwd", "1." + "2" * 63, "1.2\0.3", "1.2 .3", "1..2", ".1", "1.", "1.2\n"])
@pytest.mark.parametrize(
    ("tag", "status"),
    [(0x00080016, 0xC012), (0x00080018, 0xC012), (0x0020000D, 0xC010), (0x0020000E, 0xC011)],
    ids=["class", "sop", "study", "series"],
)
def test_what_is_not_a_uid_is_refused(tag: int, status: int, uid: str) -> None:
    assert refusal(with_raw(slice_of(), {tag: uid.encode()})).status == status


def test_uids_in_the_field_may_be_padded_or_have_leading_zeros() -> None:
    assert read_header(with_raw(slice_of(), {0x0020000D: b"1.2.03 "}), EXPLICIT).study_instance_uid == "1.2.03"
    assert is_uid("1." + "2" * 62)


@pytest.mark.requirement("R11")
@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (None, 0xC020),
        (b"", 0xC020),
        (b"  ", 0xC020),
        (b"\0\0", 0xC020),
        (b"A" * 65, 0xC021),
        (b"A\0B", 0xC021),
        (b"A\nB", 0xC021),
        (b"A" + b" " * 5000 + b"B", 0xC021),
    ],
)
def test_an_instance_without_a_usable_patient_id_is_refused(raw: bytes | None, status: int) -> None:
    data = encoded(slice_of(PatientID=None)) if raw is None else with_raw(slice_of(), {0x00100020: raw})
    assert refusal(data).status == status


def test_every_truncation_is_refused_unless_it_ends_between_two_elements() -> None:
    ds = slice_of(rows=4, ReferencedStudySequence=[slice_of(PixelData=None)])
    ds["ReferencedStudySequence"].is_undefined_length = True
    data = encoded(ds)
    boundaries, part = {0}, Dataset()
    for element in ds:
        part.add(element)
        boundaries.add(len(encoded(part)))
    assert len(data) in boundaries
    for size in set(range(len(data))) - boundaries:
        assert refusal(data[:size]).status == 0xC002, f"cut at {size}"


@pytest.mark.requirement("P2")
def test_deep_nesting_is_refused_without_recursion() -> None:
    data = encoded(slice_of(PixelData=None))
    assert read_header(data + nested(30), EXPLICIT).sop_class_uid == CT
    assert refusal(data + nested(100_000)).status == 0xC003


def test_double_and_unordered_tags_are_refused() -> None:
    """Two readers could see two patients in one data set."""
    data = encoded(slice_of(PixelData=None))
    second_id = struct.pack("<HH2sH", 0x0010, 0x0020, b"LO", 4) + b"P-18"
    assert refusal(data + second_id).status == 0xC001
    assert refusal(second_id + second_id + data).status == 0xC001


def test_another_encoding_than_agreed_is_refused() -> None:
    assert refusal(encoded(slice_of(), is_implicit=True), EXPLICIT).status == 0xC001
    assert refusal(encoded(slice_of()), IMPLICIT).status in (0xC001, 0xC002)


def test_encapsulated_frames_and_unknown_sequences_are_stepped_over() -> None:
    """UN of undefined length holds implicit VR items, whatever the transfer syntax (PS3.5 §6.2.2)."""
    inner = struct.pack("<HHL", 0x0008, 0x0060, 2) + b"MR"
    item = struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF) + inner + struct.pack("<HHL", 0xFFFE, 0xE00D, 0)
    unknown = struct.pack("<HH2sHL", 0x7001, 0x1000, b"UN", 0, 0xFFFFFFFF) + item + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    frames = b"".join(struct.pack("<HHL", 0xFFFE, 0xE000, len(f)) + f for f in (b"", b"frame1", b"frame two."))
    pixels = struct.pack("<HH2sHL", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF) + frames + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    data = encoded(slice_of(PixelData=None)) + unknown + pixels
    assert read_header(data, EXPLICIT).modality == "CT"
    assert refusal(data[:-8]).status == 0xC002


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 400), junk=st.binary(min_size=1, max_size=8), implicit=st.booleans())
def test_no_damage_escapes_as_another_error(position: int, junk: bytes, implicit: bool) -> None:
    data = bytearray(encoded(slice_of("1.2.3", rows=2, SeriesInstanceUID="1.2.4", SOPInstanceUID="1.2.5"), is_implicit=implicit))
    data[position : position + len(junk)] = junk
    try:
        header = read_header(bytes(data), IMPLICIT if implicit else EXPLICIT)
    except InstanceRefused:
        return
    assert is_uid(header.study_instance_uid)
    assert header.patient.key.patient_id


@pytest.mark.filterwarnings("ignore::UserWarning")  # of pydicom, about these files
def test_real_files_read_as_pydicom_reads_them(shared: Path) -> None:
    """Each figure of another vendor's file: our one pass against pydicom's full parse."""
    compared = 0
    folders = shared / "data" / "dicom" / "orthanc-tests", shared / "data" / "cxr-severity"
    for path in sorted(path for folder in folders for path in folder.rglob("*.dcm")):
        raw = path.read_bytes()
        if raw[128:132] != b"DICM":
            continue
        # (0002,0000) says how long the file meta is.
        offset = 144 + int.from_bytes(raw[140:144], "little")
        syntax = str(pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID", ""))
        if syntax not in TRANSFER_SYNTAXES:
            continue
        try:
            header = read_header(raw, syntax, offset=offset)
        except InstanceRefused:
            continue
        compared += 1
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        assert header.patient.key.patient_id == str(ds.PatientID).strip()
        assert header.patient.name == str(ds.get("PatientName", "")).strip()
        assert header.study_instance_uid == ds.StudyInstanceUID
        assert header.series_description == str(ds.get("SeriesDescription") or "").strip()
        assert header.facts.slice_mm == float(ds.get("SpacingBetweenSlices") or ds.get("SliceThickness") or 0)
        assert header.facts.orientation == plane_of(ds)
        assert header.view == str(ds.get("ViewPosition") or "").strip()
    assert compared > 300


def plane_of(ds: Dataset) -> str:
    """The plane by another way: the angle between the normal and each axis."""
    if not ds.get("ImageOrientationPatient"):
        return ""
    cosines = np.array(ds.ImageOrientationPatient, float).reshape(2, 3)
    degrees = np.rad2deg(np.arccos(np.clip(abs(np.cross(*cosines)), 0, 1)))
    return ("sagittal", "coronal", "axial")[int(degrees.argmin())] if degrees.min() <= 30 else ""


def test_sequences_of_defined_length_are_stepped_over() -> None:
    ds = slice_of(ReferencedStudySequence=Sequence([slice_of(PixelData=None), slice_of(PixelData=None)]))
    assert header_of(ds).study_instance_uid == ds.StudyInstanceUID


# --- what the rules on series need ---------------------------------------------------------------


def coded(value: str) -> Dataset:
    ds = Dataset()
    ds.CodeValue, ds.CodingSchemeDesignator, ds.CodeMeaning = value, "SCT", "Meaning"
    return ds


@pytest.mark.parametrize(
    ("code", "view"), [("R-10236", "LL"), ("399173006", "LL"), ("399198007", "RL"), ("R-40888", "PA"), ("R-10214", "PA"), ("9", "")]
)
def test_a_view_told_by_code_alone_is_known_when_a_series_is_chosen(code: str, view: str) -> None:
    """A lateral film not known as one would be chosen before the frontal one, and then refused."""
    assert header_of(slice_of(ViewCodeSequence=[coded(code)]), is_implicit=False).view == view


@pytest.mark.parametrize("is_implicit", [False, True])
@pytest.mark.parametrize("is_undefined", [False, True])
def test_what_an_image_says_of_itself_is_read_in_both_encodings(is_implicit: bool, is_undefined: bool) -> None:
    ds = slice_of(
        ImageType=["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SPI"], PresentationIntentType="FOR PRESENTATION", PatientAge="006M",
        ContrastBolusAgent="Iopromide", BodyPartExamined="CHEST", AnatomicRegionSequence=[coded("51185008")], ImageLaterality="L",
        Laterality="R", ConvolutionKernel="B30f", PixelSpacing=[0.7, 0.5], ImagerPixelSpacing=[9, 9], SliceThickness=2,
        ViewCodeSequence=[coded("R-10226")], NumberOfFrames=7,
    )  # fmt: skip
    for sequence in ("AnatomicRegionSequence", "ViewCodeSequence"):
        ds[sequence].is_undefined_length = ds[sequence].value[0].is_undefined_length_sequence_item = is_undefined
    header = header_of(ds, is_implicit=is_implicit)
    assert (header.view, header.number_of_frames) == ("MLO", 7)
    assert header.facts == ImageFacts(
        image_type=("ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SPI"), body_part="CHEST", region="51185008", laterality="L",
        orientation=header.facts.orientation, slice_mm=2.0, pixel_mm=(0.7, 0.5), has_contrast=True, kernel="B30F",
        intent="FOR PRESENTATION", age_years=0.5,
    )  # fmt: skip


def test_an_image_that_says_nothing_of_itself_is_known_for_that_alone() -> None:
    bare = slice_of()
    for keyword in ("ImageType", "BodyPartExamined", "SliceThickness", "SpacingBetweenSlices", "PixelSpacing", "ImageOrientationPatient"):
        if keyword in bare:
            del bare[keyword]
    assert header_of(bare).facts == ImageFacts(has_contrast=False)


@pytest.mark.requirement("P18")
@pytest.mark.parametrize(
    ("tag", "raw"),
    [
        (0x00080008, b"ORIGINAL\\" * 5000),
        (0x00080008, b"\xff" * 64),
        (0x00080008, b"DOE JOHN 19500102\\"),
        (0x00101010, b"999999"),
        (0x00101010, b"-01Y"),
        (0x00180010, b"\0" * 60_000),
        (0x00181210, b"K" * 60_000),
        (0x00200062, b"LEFT"),
        (0x00280030, b"0.5\\-1"),
        (0x00280030, b"nan\\nan "),
        (0x00280030, b"1e400\\1 "),
        (0x00082218, b"\xfe\xff\x00\xe0" + b"\xff" * 60),
        (0x00082218, b"\xfe\xff\x00\xe0\x04\x00\x00\x00\x08\x00"),
        (0x00082218, b"junk" * 1000),
    ],
)
def test_a_hostile_fact_is_not_known_and_refuses_nothing(tag: int, raw: bytes) -> None:
    for is_implicit in (False, True):
        data = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
        if is_implicit:
            data += struct.pack("<L", len(raw)) + raw
        elif tag == 0x00082218:
            data += struct.pack("<2sHL", b"SQ", 0, len(raw)) + raw
        else:
            data += struct.pack("<2sH", b"LO", len(raw)) + raw
        whole = with_element(slice_of(), tag, data, is_implicit=is_implicit)
        facts = read_header(whole, IMPLICIT if is_implicit else EXPLICIT).facts
        assert all(len(word) <= 16 for word in facts.image_type)
        assert len(facts.image_type) <= 16
        assert (facts.region, facts.laterality) == ("", "")
        assert facts.pixel_mm == () or all(0 < mm < float("inf") for mm in facts.pixel_mm)
        assert facts.age_years is None or facts.age_years >= 0
        assert len(facts.kernel) <= 64


def with_element(ds: Dataset, tag: int, element: bytes, *, is_implicit: bool) -> bytes:
    """The encoded data set with a raw element in its place."""
    if tag in ds:
        del ds[tag]
    before, after = Dataset(), Dataset()
    for one in ds:
        (before if one.tag < tag else after).add(one)
    return encoded(before, is_implicit=is_implicit) + element + encoded(after, is_implicit=is_implicit)


@pytest.mark.requirement("P18")
@given(st.binary(max_size=80), st.booleans())
def test_any_bytes_of_a_sequence_give_a_code_or_none(raw: bytes, is_implicit: bool) -> None:
    for begin in (b"", b"\xfe\xff\x00\xe0\xff\xff\xff\xff"):
        assert len(first_code(begin + raw, is_implicit=is_implicit)) <= 16


@pytest.mark.parametrize(("agent", "has"), [("Iopromide", True), ("NONE", False), ("no contrast ", False), ("", False), (None, False)])
def test_whether_an_agent_was_given_is_told_by_its_name_but_not_by_none(agent: str | None, has: bool) -> None:
    ds = slice_of() if agent is None else slice_of(ContrastBolusAgent=agent)
    assert header_of(ds).facts.has_contrast is has
    assert header_of(slice_of(ContrastBolusAgentSequence=[coded("C-B0300")])).facts.has_contrast is True


@pytest.mark.parametrize(("raw", "part"), [(b"B\xfccken", "BÜCKEN"), (b"thorax", "THORAX"), (b"CHEST\0", "CHEST"), (b"", "")])
def test_a_body_part_is_told_even_in_letters_it_may_not_have(raw: bytes, part: str) -> None:
    header = read_header(with_raw(slice_of(), {0x00180015: raw + b" " * (len(raw) % 2)}), EXPLICIT)
    assert header.facts.body_part == part
