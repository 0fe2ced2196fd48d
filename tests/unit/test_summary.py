"""The summary page: what a person reads on it, in any script; the right slice, marked in the right place; the same bytes twice."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import resources
from io import BytesIO
from pathlib import Path

import numpy as np
import pypdf
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.dataset import FileDataset
from scipy import ndimage

from tests import factories, peers, reports
from tests.conftest import Captured
from tests.reports import FINDINGS, INPUTS
from worker.domain import Code, Document, Finding, Region
from worker.errors import ReportInvalid
from worker.imaging import volume
from worker.imaging.decoding import DecoderPool
from worker.report import capture, forms, page
from worker.report.picture import Outline, Picture, key_picture
from worker.report.result import Result

#: Sentences, so that what a viewer searches for is found; each name as a modality of that country writes it.
NAMES = {
    "Japanese": "Yamada^Tarou=山田^太郎=やまだ^たろう",
    "Korean": "Hong^Gildong=洪^吉洞=홍^길동",
    "Arabic": "Al-Farsi^Layla=^=ليلى^الفارسي",
    "Greek": "Παπαδόπουλος^Ελένη",
    "Cyrillic": "Иванова^Анна^Петровна",
    "Devanagari": "Modi^Narendra=नरेन्द्र^मोदी",
}
GRAY = np.linspace(0, 4095, 90 * 60).reshape(90, 60).round().astype(np.uint16)


@pytest.fixture
def every_font() -> None:
    """Fonts of all scripts; absent on a laptop, never in CI."""
    if missing := page.scripts_without_font():
        peers.unavailable(f"no font for {', '.join(missing)} (apt-get install fonts-noto-core fonts-wqy-microhei)")


def region(mask: np.ndarray, datasets: Sequence[Dataset], affine: np.ndarray | None = None) -> Region:
    """Where `mask` (K, J, I) of a whole image is True."""
    inside = np.argwhere(mask)
    low, high = inside.min(axis=0), inside.max(axis=0) + 1
    cut = mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    k, j, i = (int(x) for x in low)
    uids = tuple(str(ds.SOPInstanceUID) for ds in datasets)
    return Region(cut, (k, j, i), mask.shape, affine, "image", uids, (1,) * len(uids))


def result_of(
    datasets: Sequence[FileDataset],
    folder: Path,
    pool: DecoderPool,
    *,
    findings: Sequence[Finding] = FINDINGS,
    failure: str = "",
    **changed: object,
) -> Result:
    """One analysis of one series, the rest as usual."""
    series = factories.spool(list(datasets), folder)
    inputs = replace(INPUTS, series={"image": series}, missing_causes=("nothing is known under its code",))
    sources = [one.path for one in series.instances]
    made = reports.result(sources, inputs=None if failure else inputs, findings=() if failure else findings, failure=failure)
    planes = {"image": tuple((str(ds.SOPInstanceUID), 1) for ds in datasets)}
    return replace(made, planes=planes, decoders=pool, **changed)  # type: ignore[arg-type]


def radiograph(change: Callable[[FileDataset], object] = lambda _: None) -> FileDataset:
    """A film of 90 rows and 60 columns that darkens to the bottom right."""
    ds = factories.make_radiograph(stored=GRAY)
    ds.SpecificCharacterSet, ds.PatientName, ds.PatientOrientation = "ISO_IR 192", "Doe^Jane", ["L", "F"]
    change(ds)
    return ds


def text_of(document: Document) -> str:
    """What a person reads on the PDF, in one line."""
    data = dcmread(BytesIO(document.data)).EncapsulatedDocument
    (only,) = pypdf.PdfReader(BytesIO(data)).pages
    return " ".join(only.extract_text().split())


def named(name: str) -> FileDataset:
    """A film of the patient `name`."""
    return radiograph(lambda ds: setattr(ds, "PatientName", name))


# --- the picture ---------------------------------------------------------------------------------


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_a_radiograph_is_shown_as_its_window_says_and_bright_where_a_viewer_is_bright(
    photometric: str, tmp_path: Path, pool: DecoderPool
) -> None:
    """A window from 1024 to 3071 is black below, white above; MONOCHROME1 the other way round (PS3.3 §C.7.6.3.1.2)."""

    def change(ds: Dataset) -> None:
        ds.PhotometricInterpretation, ds.WindowCenter, ds.WindowWidth = photometric, 2048, 2048
        ds.PresentationLUTShape = "INVERSE" if photometric == "MONOCHROME1" else "IDENTITY"

    picture = key_picture(result_of([radiograph(change)], tmp_path, pool))
    assert picture is not None
    assert picture.caption == "DX image, AP · window 2048, level 2048"
    gray = picture.gray.astype(int) if photometric == "MONOCHROME2" else 255 - picture.gray.astype(int)
    rows = len(gray)
    assert gray[: rows // 5].max() == 0
    assert gray[-rows // 5 :].min() == 255
    assert abs(gray[rows // 2].mean() - 127) < 4


@pytest.mark.parametrize("window", [(1e6, 10), (2048, 0), None])
def test_without_a_window_that_shows_anything_percentiles_do(window: tuple[float, float] | None, tmp_path: Path, pool: DecoderPool) -> None:
    """A black rectangle would look like an image of nothing."""

    def change(ds: Dataset) -> None:
        del ds.WindowCenter, ds.WindowWidth
        if window:
            ds.WindowCenter, ds.WindowWidth = window

    picture = key_picture(result_of([radiograph(change)], tmp_path, pool))
    assert picture is not None
    assert picture.caption == "DX image, AP"
    assert 50 < picture.gray.std() < 90


def test_the_outline_runs_along_the_edges_of_the_pixels_that_are_marked(tmp_path: Path, pool: DecoderPool) -> None:
    """Rows 30 to 39 and columns 10 to 19 of 90 and 60: the box from (10, 30) to (20, 40), counted in pixels from the corner."""
    film, mask = radiograph(), np.zeros((1, 90, 60), bool)
    mask[0, 30:40, 10:20] = True
    picture = key_picture(result_of([film], tmp_path, pool, findings=[replace(FINDINGS[0], regions=(region(mask, [film]),))]))
    assert picture is not None
    [outline] = picture.outlines
    points = np.array(outline.lines[0]) * (60, 90)
    assert outline.number == 1
    np.testing.assert_allclose([points.min(axis=0), points.max(axis=0)], [(10, 30), (20, 40)], atol=1e-3)


def test_of_a_volume_the_slice_with_most_of_the_region_is_shown_in_its_proportions(tmp_path: Path, pool: DecoderPool) -> None:
    """Six slices, the region in three and most of it in the fourth; pixels of 0.75 by 0.5 mm are not square."""
    slices, mask = factories.make_ct(slices=6), np.zeros((6, 40, 48), bool)
    mask[2:5, 10:12, 20:22] = mask[3, 8:20, 18:30] = True
    affine = factories.known_affine()
    first = replace(FINDINGS[0], regions=(region(mask, slices, affine),))
    other = replace(FINDINGS[1], regions=(region(np.roll(mask, 10, axis=2), slices, affine),))
    picture = key_picture(result_of(slices, tmp_path, pool, findings=[first, other]))
    assert picture is not None
    assert [one.number for one in picture.outlines] == [1, 2]
    assert picture.sop_instance_uid == slices[3].SOPInstanceUID
    assert picture.caption == "Slice 4 of 6 · window 400, level 40 · outlined: what the answer rests on, not the edge of a lesion"
    assert picture.letters == ("R", "L", "A", "P")
    assert abs(picture.gray.shape[0] / picture.gray.shape[1] - (40 * 0.75) / (48 * 0.5)) < 0.01


def test_without_a_region_the_middle_slice_is_shown(tmp_path: Path, pool: DecoderPool) -> None:
    """A page needs a picture, and nothing is marked on it."""
    slices = factories.make_ct(slices=5)
    picture = key_picture(result_of(slices, tmp_path, pool))
    assert picture is not None
    assert (picture.sop_instance_uid, picture.outlines) == (slices[2].SOPInstanceUID, ())


def test_in_a_gantry_that_was_put_straight_the_outline_lies_on_the_lesion_of_the_slice(tmp_path: Path, pool: DecoderPool) -> None:
    """The network saw sheared planes, the page shows the slice as it was scanned: the mark must have moved back."""
    lesion = (5.0, 10.0, 24.0)
    slices = factories.make_tilted_ct(degrees=15, lesions_mm=[lesion])
    series = factories.spool(slices, tmp_path / "seen")
    seen = volume.load(series, kind="volume", pool=pool, gantry_tilt="correct")
    by_uid = {str(ds.SOPInstanceUID): ds for ds in slices}
    in_order = [by_uid[uid] for uid in seen.sop_instance_uids]
    finding = replace(FINDINGS[0], regions=(region(seen.array > 0, in_order, seen.affine),))
    made = result_of(in_order, tmp_path / "page", pool, findings=[finding])
    picture = key_picture(made)
    assert picture is not None
    shown = by_uid[picture.sop_instance_uid]
    lit = np.argwhere(shown.pixel_array * shown.RescaleSlope + shown.RescaleIntercept > 0).mean(axis=0)  # (row, column)
    points = np.array(picture.outlines[0].lines[0][:-1]) * (shown.Columns, shown.Rows) - 0.5
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    np.testing.assert_allclose(middle[::-1], lit, atol=1.0)


def test_of_an_enhanced_object_the_frame_is_shown_and_named(tmp_path: Path, pool: DecoderPool) -> None:
    """All slices are of one instance: only the number tells which it is."""
    one = factories.make_enhanced(factories.make_ct(slices=5))
    made = replace(result_of([one], tmp_path, pool), planes={"image": tuple((str(one.SOPInstanceUID), n) for n in range(1, 6))})
    picture = key_picture(made)
    assert picture is not None
    assert picture.caption == "Slice 3 of 5"
    [source] = dcmread(BytesIO(capture.summary(made)[0].data)).SourceImageSequence
    assert (source.ReferencedSOPInstanceUID, source.ReferencedFrameNumber) == (one.SOPInstanceUID, 3)


def test_a_file_that_is_gone_costs_the_picture_not_the_page(tmp_path: Path, pool: DecoderPool) -> None:
    """What was found is worth saying without it."""
    made = result_of([radiograph()], tmp_path, pool)
    for path in made.source.paths.values():
        path.unlink()
    assert key_picture(made) is None
    assert "Pneumonia" in text_of(capture.pdf(made)[0])


# --- the page ------------------------------------------------------------------------------------


def test_the_page_says_the_answer_the_record_and_what_it_is_not(tmp_path: Path, pool: DecoderPool) -> None:
    """All that the issue asks a page to say, as a search in a viewer finds it."""
    finding = replace(FINDINGS[0], attributions={"crp": -0.31, "ldh": 0.12, "Admission note": 0.4})
    said = text_of(capture.pdf(result_of([radiograph()], tmp_path, pool, findings=[finding, FINDINGS[1]]))[0])
    for words in (
        "Doe, Jane ID F-0001 · born 1970-01-01 · O",
        "Study 2024-01-02 11:30 · CHEST AP Accession A-0002 Analysed 2026-11-21 02:02+01:00 by chest-fusion 0.1.0",
        "Positive Pneumonia (73.2 %) Negative: Pleural effusion (3.1 %).",
        "1 Pneumonia Positive 73.2 % 2 Pleural effusion Negative 3.1 %",
        "What moved “Pneumonia”",
        "Images +1.31",
        "Values of the record −0.20",
        "(text) 2024-01-02 06:30, −4 h +0.40",
        "C reactive protein < 0.3 mg/L 2024-01-02 06:30, −4 h −0.31",
        "Missing Fibrin D-dimer FEU: nothing is known under its code",
        "Not a diagnosis. For research use only.",
        "Trained on 188 radiographs of one hospital",
        "Synoptic chest-fusion 0.1.0 · bundle abababababab · input efefefefefef",
    ):
        assert words in said, said
    assert reports.SECRET not in said


def test_a_study_without_finding_says_so(tmp_path: Path, pool: DecoderPool) -> None:
    """Silence is not an answer."""
    said = text_of(capture.pdf(result_of([radiograph()], tmp_path, pool, findings=[FINDINGS[1]]))[0])
    assert "Nothing found Negative: Pleural effusion (3.1 %)." in said


def test_an_atypical_study_says_so_in_its_answer(tmp_path: Path, pool: DecoderPool) -> None:
    """Who reads no further must not miss it."""
    finding = replace(FINDINGS[0], verdict="uncertain", is_atypical=True)
    said = text_of(capture.pdf(result_of([radiograph()], tmp_path, pool, findings=[finding]))[0])
    assert "Uncertain Pneumonia (73.2 %) Unlike the studies the network learned from" in said


def test_a_failure_has_a_page_of_the_same_patient_with_the_reason(tmp_path: Path, pool: DecoderPool) -> None:
    """The radiologist must not wait for what will not come."""
    reason = "Slices 4 and 5 are 7.5 mm apart where 2.5 mm were expected."
    made = result_of([radiograph()], tmp_path, pool, failure=reason)
    assert "Could not be analysed because slices 4 and 5 are 7.5 mm apart" in text_of(capture.pdf(made)[0])
    assert "Doe, Jane" in text_of(capture.pdf(made)[0])
    assert len(capture.summary(made)) == 1


@pytest.mark.usefixtures("every_font")
@pytest.mark.parametrize("script", NAMES)
def test_a_name_of_any_script_is_on_the_page_whole(script: str, tmp_path: Path, pool: DecoderPool, captured: Captured) -> None:
    """PDF/A refuses a letter without a glyph, so what can be read out of it can be seen on it."""
    said = text_of(capture.pdf(result_of([named(NAMES[script])], tmp_path, pool))[0])
    for group in page.names(NAMES[script]):
        for word in re.split(r"[ ,]+", group):
            # pypdf gives a letter twice where several glyphs are one cluster of Devanagari.
            assert word in said or (script == "Devanagari" and set(word) <= set(said)), (word, said)
    assert page.UNSHOWN not in said
    assert not captured


def test_a_letter_that_no_font_has_is_told_and_never_an_empty_box(tmp_path: Path, pool: DecoderPool, captured: Captured) -> None:
    """On the page, and in an event that names nobody."""
    said = text_of(capture.pdf(result_of([named("Doe^J\u0378ne")], tmp_path, pool))[0])
    assert f"Doe, J{page.UNSHOWN}ne" in said
    assert "1 of the characters here have no font" in said
    assert captured == [("glyphs.missing", {"count": 1})]


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("Doe^Jane^Q^Dr^PhD", ["Doe, Jane Q Dr PhD"]),
        ("Hong^Gildong=洪^吉洞=홍^길동", ["Hong, Gildong", "洪 吉洞", "홍 길동"]),
        ("山田^太郎", ["山田 太郎"]),
        ("=山田^太郎", ["山田 太郎"]),
        ("Doe^Jane\u202e\x07=Doe^Jane", ["Doe, Jane", "Doe Jane"]),
        ("", []),
    ],
)
def test_names_are_written_as_people_write_them(name: str, written: list[str]) -> None:
    """A comma where it tells the family's name from the given; nothing that turns the words after it around."""
    assert page.names(name) == written


WILD = st.text(st.characters(exclude_categories=["Cs"], max_codepoint=0x2FFF), max_size=200)


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(WILD, min_size=1, max_size=20), is_failure=st.booleans())
@example(words=["much longer than any line of it " * 10] * 20, is_failure=False)
def test_whatever_it_is_to_say_there_is_one_page(words: list[str], is_failure: bool, tmp_path: Path, pool: DecoderPool) -> None:
    """What is too long is set smaller, and nothing of it is read as the language of the template."""
    codes = [Code(str(n), "99X", f"#panic() {word}") for n, word in enumerate(words)]
    findings = [Finding(f"f{code.value}", code, 0.9, 0.5, "positive", {"image": 1.0}) for code in codes]
    inputs = replace(INPUTS, missing=tuple(codes), missing_causes=tuple(words))
    made = replace(result_of([radiograph()], tmp_path, pool, findings=findings), inputs=inputs)
    made = replace(made, failure=f"No. {words}", findings=()) if is_failure else made
    assert page.render(made, None, theme="dark", form="png").startswith(b"\x89PNG")
    assert len(pypdf.PdfReader(BytesIO(page.render(made, None, theme="light", form="pdf"))).pages) == 1


def test_an_error_of_the_typesetter_quotes_nothing_of_the_page(tmp_path: Path, pool: DecoderPool) -> None:
    """Typst shows the line that it fails on; ours has the patient in it."""
    made = result_of([radiograph()], tmp_path, pool)
    broken = Picture(np.zeros((4, 4), np.uint8), (Outline(1, (((float("nan"), 0.0),),)),), ("", "", "", ""), "", "1.2", "1.3", 1)
    with pytest.raises(ReportInvalid) as raised:
        page.render(made, broken, theme="dark", form="png")
    assert str(raised.value) == "The summary page could not be set (TypstError)."
    assert raised.value.__cause__ is None


def test_a_panic_of_the_typesetter_costs_the_page_and_not_the_worker(
    tmp_path: Path, pool: DecoderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no Exception: unseen, it would pass all that keeps one study's fault from the others, and end the process at each attempt."""

    class PanicException(BaseException):
        pass

    def panics(_source: object, **_options: object) -> object:
        raise PanicException

    made = result_of([radiograph()], tmp_path, pool)
    monkeypatch.setattr("worker.report.page.typst.compile", panics)
    assert next((one.kind, one.data) for one in forms.author(made, ["summary"])) == ("summary", b"")
    with pytest.raises(ReportInvalid, match=r"^The summary page could not be set \(PanicException\)\.$"):
        page.render(made, None, theme="light", form="pdf")


def test_every_color_of_the_page_can_be_read_on_its_ground() -> None:
    """WCAG 2.2 AA, 1.4.3: 4.5 : 1 for text, on the page and on the panel, dark and light."""
    template = resources.files("worker.report").joinpath("page.typ").read_text(encoding="utf-8")
    pairs = {name: found for name, *found in re.findall(r'(\w+)(?: =|:) pick\("(#\w{6})", "(#\w{6})"\)', template)}

    def luminance(color: str) -> float:
        parts = (int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    assert {"ink", "faint", "panel", "fill", "positive", "uncertain", "negative", "failed"} <= set(pairs)
    for theme in (0, 1):
        for ink in ("ink", "faint", "positive", "uncertain", "negative", "failed"):
            for ground in ("fill", "panel"):
                low, high = sorted((luminance(pairs[ink][theme]), luminance(pairs[ground][theme])))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (theme, ink, ground)


# --- the objects ---------------------------------------------------------------------------------


def test_the_capture_holds_the_very_pixels_of_the_page_and_the_mark_is_on_them(tmp_path: Path, pool: DecoderPool) -> None:
    """Lossless, in color, and the region in a color that no gray image has."""
    film, mask = radiograph(), np.zeros((1, 90, 60), bool)
    mask[0, 30:60, 10:40] = True
    made = result_of([film], tmp_path, pool, findings=[replace(FINDINGS[0], regions=(region(mask, [film]),))])
    ds = dcmread(BytesIO(capture.summary(made)[0].data))
    with Image.open(BytesIO(page.render(made, key_picture(made), theme="dark", form="png"))) as image:
        expected = np.asarray(image.convert("RGB"))
    pixels = ds.pixel_array
    np.testing.assert_array_equal(pixels, expected)
    assert (ds.file_meta.TransferSyntaxUID.name, pixels.shape) == ("RLE Lossless", (1191, 1684, 3))
    yellow = np.argwhere((pixels == (0xFF, 0xD2, 0x3F)).all(axis=-1))
    assert len(yellow) > 500
    assert yellow[:, 1].max() < 1684 / 2


@pytest.mark.parametrize("rows", [slice(30, 50), slice(38, 50)], ids=["above", "beside the letters"])
@pytest.mark.parametrize("columns", [slice(0, 10), slice(25, 35), slice(50, 60)], ids=["left", "middle", "right"])
def test_numbers_of_regions_that_begin_at_one_place_stand_beside_each_other(
    columns: slice, rows: slice, tmp_path: Path, pool: DecoderPool
) -> None:
    """Five findings of one place: each number is whole, under no other and under no letter."""
    film, mask = radiograph(), np.zeros((1, 90, 60), bool)
    mask[0, rows, columns] = True
    here = region(mask, [film])
    made = result_of([film], tmp_path, pool, findings=[replace(FINDINGS[0], name=f"f{n}", regions=(here,)) for n in range(5)])
    with Image.open(BytesIO(page.render(made, key_picture(made), theme="dark", form="png"))) as image:
        yellow = (np.asarray(image.convert("RGB"))[:, :570] == (0xFF, 0xD2, 0x3F)).all(axis=-1)
    _, sizes = np.unique(ndimage.label(yellow)[0], return_counts=True)
    assert np.count_nonzero((sizes > 400) & (sizes < 500)) == 5


@pytest.mark.parametrize("shape", [(2000, 10), (10, 2000)], ids=["narrow", "low"])
def test_a_film_of_any_proportions_has_its_page(shape: tuple[int, int], tmp_path: Path, pool: DecoderPool) -> None:
    """A strip has no room for a number, and costs no page; nor do more regions than the list has findings."""
    film, mask = factories.make_radiograph(stored=np.full(shape, 100, np.uint16)), np.zeros((1, *shape), bool)
    mask[0, 2:8, 2:8] = True
    findings = [replace(FINDINGS[0], name=f"f{n}", regions=(region(mask, [film]),)) for n in range(40)]
    made = result_of([film], tmp_path, pool, findings=findings)
    assert [one.kind for one in (*capture.summary(made), *capture.pdf(made))] == ["summary", "pdf"]


def test_a_destination_that_wants_the_page_gets_it_before_the_report_that_refers_to_it(tmp_path: Path, pool: DecoderPool) -> None:
    """By the kinds of the configuration; the root report is the last."""
    made = result_of([radiograph()], tmp_path, pool)
    assert [one.kind for one in forms.author(made, ["pdf", "sr", "summary"])] == ["summary", "pdf", "sr"]
    assert [one.kind for one in forms.author(made, ["sr"])] == ["sr"]


def test_the_same_result_gives_the_same_bytes_in_another_process_too(tmp_path: Path, pool: DecoderPool) -> None:
    """A job that runs twice makes the same object; what hashes decide differs from process to process."""
    first, second = (capture.summary(result_of([radiograph()], tmp_path / name, pool)) for name in ("first", "second"))
    assert first == second
    script = (
        "import hashlib, pathlib, sys; from tests import reports; from worker.report import capture;"
        "made = reports.result([reports.radiograph(pathlib.Path(sys.argv[1]))]);"
        "print(*(hashlib.sha256(build(made)[0].data).hexdigest() for build in (capture.summary, capture.pdf)))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", script, str(tmp_path)]
    there = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=Path(__file__).parents[2])
    made = reports.result([reports.radiograph(tmp_path)])
    assert there.stdout.split() == [hashlib.sha256(build(made)[0].data).hexdigest() for build in (capture.summary, capture.pdf)]


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["summary", "pdf"])
@pytest.mark.parametrize("failure", ["", "Slices are missing."])
def test_dciodvfy_and_dcentvfy_have_nothing_to_say(kind: str, failure: str, tmp_path: Path, pool: DecoderPool) -> None:
    """Of the object, and of the object beside the image that it was made of."""
    peers.require("dciodvfy")
    made = result_of([named(NAMES["Korean"])], tmp_path, pool, failure=failure)
    build: Callable[[Result], Sequence[Document]] = getattr(capture, kind)
    path, (source, *_) = tmp_path / "object.dcm", made.source.paths.values()
    path.write_bytes(build(made)[0].data)
    for command in (["dciodvfy", "-new", str(path)], ["dcentvfy", str(source), str(path)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "Error" not in done.stderr + done.stdout, done.stderr
        assert shutil.which(command[0])
