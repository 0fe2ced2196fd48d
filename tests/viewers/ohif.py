"""What OHIF shows of our documents, as it is installed: `make viewers`. Each picture is kept in var/viewers/screenshots."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO

import numpy as np
import pytest
from numpy.typing import NDArray
from playwright.sync_api import Page
from pydicom import dcmread

from tests import peers
from tests.unit.test_keys import renewed
from tests.viewers import cases
from tests.viewers.browser import Ohif, Picture, chromium, likeness, picture
from tests.viewers.cases import Case
from tests.viewers.fetch import fetch
from tests.viewers.site import Site, site
from worker.deliver import cstore
from worker.imaging.decoding import DecoderPool
from worker.report import forms
from worker.report.result import SERIES_NUMBERS

#: A line is 1 to 2 pixels wide, and half a pixel of the image is a little more.
_WITHIN_PX = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Every case, written once."""
    with DecoderPool(processes=1) as pool:
        return {name: build(tmp_path_factory.mktemp(name), pool) for name, build in cases.CASES.items()}


@pytest.fixture(scope="module")
def archive(made: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Orthanc with all images, sent as a modality sends them, and all documents, sent by our sender; OHIF before it."""
    with site(fetch(), tmp_path_factory.mktemp("orthanc")) as running:
        peer = running.orthanc.peer()
        for case in made.values():
            call = ["-aet", "WORKER", "-aec", peer.ae_title, peer.host, str(peer.port)]
            images = peers.dcmtk("storescu", "-xv", "-R", *call, *map(str, case.files))  # JPEG 2000 as it is
            assert images.returncode == 0, images.stdout
            assert [one.sop_instance_uid for one in cstore.send(case.documents, peer=peer) if not one.delivered] == []
        yield running


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """One browser for all."""
    with chromium() as opened:
        yield opened


@pytest.fixture(params=list(cases.CASES))
def name(request: pytest.FixtureRequest) -> str:
    """Each case."""
    return str(request.param)


@pytest.fixture
def case(name: str, made: dict[str, Case]) -> Case:
    """One study and its documents."""
    return made[name]


@pytest.fixture
def ohif(case: Case, archive: Site, page: Page) -> Ohif:
    """OHIF with the study open."""
    viewer = Ohif(page, archive.origin, case.study_instance_uid)
    viewer.open()
    return viewer


def key_image(case: Case) -> int:
    """Its Instance Number."""
    uid = case.region.sop_instance_uids[case.region.key_plane]
    return int(dcmread(case.result.source.paths[uid], stop_before_pixels=True).InstanceNumber)


def placed(case: Case, pane: tuple[int, int]) -> tuple[float, float, float, float]:
    """Where the image lies in a viewport of `pane` (width, height): left, top and the size of a pixel in x and y; it is fitted into it."""
    ds = dcmread(case.files[0], stop_before_pixels=True)
    spacing = ds.get("PixelSpacing") or ds.get("ImagerPixelSpacing") or (1.0, 1.0)
    height, width = ds.Rows * float(spacing[0]), ds.Columns * float(spacing[1])
    scale = min(pane[0] / width, pane[1] / height)
    return (pane[0] - width * scale) / 2, (pane[1] - height * scale) / 2, float(spacing[1]) * scale, float(spacing[0]) * scale


def expected_box(case: Case, pane: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the region in the viewport."""
    left, top, x, y = placed(case, pane)
    i0, j0, i1, j1 = case.box
    return left + i0 * x, top + j0 * y, left + i1 * x, top + j1 * y


def changed(one: Picture, other: Picture) -> NDArray[np.bool_]:
    """(rows, columns): the pixels that a person would see to differ."""
    difference: NDArray[np.bool_] = np.abs(one - other).max(axis=2) > 12
    return difference


def without(changes: NDArray[np.bool_], boxes: list[dict[str, float]]) -> NDArray[np.bool_]:
    """`changes` but those in boxes of other things: writing, the line to it."""
    left = changes.copy()
    for box in boxes:
        x, y = max(int(box["x"]), 0), max(int(box["y"]), 0)
        left[y : int(box["y"] + box["height"]) + 1, x : int(box["x"] + box["width"]) + 1] = False
    return left


def beside_image(viewer: Ohif) -> list[dict[str, float]]:
    """Boxes in the viewport of all that is no region: text on the image, its line, circles in corners, the viewer's own controls."""
    found: list[dict[str, float]] = viewer.pane.evaluate(
        """pane => { const origin = pane.getBoundingClientRect();
          const others = pane.querySelectorAll('svg text, svg line, svg circle, button, [data-cy^="viewport-o"], .pointer-events-auto');
          const found = [...others].map(e => [e.tagName === 'text' ? 8 : 1, e.getBoundingClientRect()]);
          return found.filter(([, b]) => b.width < origin.width * 0.9).map(([margin, b]) =>
            ({ x: b.x - origin.x - margin, y: b.y - origin.y - margin, width: b.width + 2 * margin, height: b.height + 2 * margin })); }"""
    )
    return found


def test_the_study_opens_and_each_form_is_a_series(ohif: Ohif, case: Case, name: str) -> None:
    picture(ohif.page, f"{name}-study")
    listed = " ".join(ohif.series())
    assert {kind for kind, number in SERIES_NUMBERS.items() if f"S:{number}" in listed} == {one.kind for one in case.documents}


def test_the_region_of_the_report_is_drawn_on_its_slice_at_its_place(ohif: Ohif, case: Case, name: str) -> None:
    """Against the same slice without the report: what differs lies about the region, and nowhere else."""
    ohif.go_to(key_image(case))
    plain = picture(ohif.page, f"{name}-plain", ohif.pane)
    ohif.show("sr")
    drawn = picture(ohif.page, f"{name}-report", ohif.pane)
    assert ohif.slice() == key_image(case)
    assert "Probability: 73.21 %" in ohif.drawn_text()
    red, green, blue = drawn.transpose(2, 0, 1)
    is_green = green - np.maximum(red, blue) > 60  # as OHIF draws what is selected; its own buttons are blue
    rows, columns = np.nonzero(without(changed(plain, drawn) & is_green, beside_image(ohif)))
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert box == pytest.approx(expected_box(case, (plain.shape[1], plain.shape[0])), abs=_WITHIN_PX)


@pytest.mark.parametrize("name", ["phantom", "ct"])  # a radiograph has none: OHIF's page would turn black
def test_the_segmentation_covers_the_regions_pixels_and_stands_in_the_panel(ohif: Ohif, case: Case, name: str) -> None:
    ohif.go_to(key_image(case))
    plain = picture(ohif.page, f"{name}-plain", ohif.pane)
    ohif.show("seg")
    ohif.go_to(key_image(case))
    drawn = picture(ohif.page, f"{name}-segmentation", ohif.pane)
    left, top, x, y = placed(case, (plain.shape[1], plain.shape[0]))
    j, i = (np.indices(plain.shape[:2]) - np.array([top, left])[:, None, None] + 0.5) / np.array([y, x])[:, None, None]
    whole = np.zeros(case.region.shape[1:], bool)
    k, oj, oi = case.region.origin
    plane = case.region.mask[case.region.key_plane - k]
    whole[oj : oj + plane.shape[0], oi : oi + plane.shape[1]] = plane
    inside = (i >= 0) & (j >= 0) & (i < whole.shape[1]) & (j < whole.shape[0])
    expected = np.zeros(plain.shape[:2], bool)
    expected[inside] = whole[j[inside].astype(int), i[inside].astype(int)]
    seen = without(changed(plain, drawn), beside_image(ohif)) & inside
    assert (seen & expected).sum() / (seen | expected).sum() > 0.9
    ohif.open_panel("panelSegmentation")
    picture(ohif.page, f"{name}-segmentation-panel")
    assert "Pneumonia" in ohif.page.locator("body").inner_text()


def test_the_findings_are_listed_as_text(ohif: Ohif, name: str) -> None:
    """Of the report for old viewers, whose title is not that of TID 1500."""
    ohif.show("basic")
    picture(ohif.page, f"{name}-text")
    said = ohif.text()
    for words in (
        "Positive: Pneumonia (73.21 %). Negative: Pleural effusion (3.1 %).",
        "For research use only. Not for diagnosis.",
        "< 0.3 mg/L",
    ):
        assert words in said


def test_the_summary_is_on_the_screen_as_it_was_written(ohif: Ohif, case: Case, name: str) -> None:
    ohif.show("summary")
    shown = picture(ohif.page, f"{name}-summary", ohif.pane)
    [document] = case.of_kind("summary")
    assert likeness(shown, dcmread(BytesIO(document.data)).pixel_array) > 0.9


def test_the_pdf_is_handed_to_the_browser(ohif: Ohif, case: Case, name: str) -> None:
    """Whole, as a PDF; Chromium without a screen has no reader for it."""
    ohif.show("pdf")
    picture(ohif.page, f"{name}-pdf")
    got = ohif.page.evaluate(
        "async () => { const found = document.querySelector('object[type=\"application/pdf\"]');"
        " return [...new Uint8Array(await (await fetch(found.data)).arrayBuffer())] }"
    )
    [document] = case.of_kind("pdf")
    assert bytes(got).rstrip(b"\0") == bytes(dcmread(BytesIO(document.data)).EncapsulatedDocument).rstrip(b"\0")


@pytest.mark.parametrize("name", ["phantom"])
def test_of_two_versions_the_list_says_which_is_current_and_the_newer_what_it_replaces(
    ohif: Ohif, case: Case, archive: Site, name: str
) -> None:
    """By the number in the newer one's name, and in words when it is opened; last, for it changes the study."""
    newer = forms.author(renewed(case.result, case.of_kind("sr")[0]), ("basic",))
    assert all(one.delivered for one in cstore.send(newer, peer=archive.orthanc.peer()))
    ohif.open()
    texts = [one for one in ohif.series() if f"S:{SERIES_NUMBERS['basic']}" in one]
    assert sorted(" #2: " in one for one in texts) == [False, True]
    ohif.page.locator('[data-cy^="study-browser-thumbnail"]', has_text="as text #2").first.dblclick()
    picture(ohif.page, f"{name}-replacing")
    assert "Replaces the report of" in ohif.text()
