"""What Orthanc's own web viewer shows of the summary image, beside OHIF's tests: `make viewers`."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from pydicom import dcmread

from tests.viewers import cases
from tests.viewers.browser import chromium, likeness, picture
from tests.viewers.fetch import fetch
from tests.viewers.site import site
from worker.deliver import cstore
from worker.imaging.decoding import DecoderPool


def test_orthancs_web_viewer_shows_the_summary_as_it_was_written(tmp_path: Path) -> None:
    """Its viewer of 2015 (plug-in 2.8), as Debian has it: in color, upright, from our RLE."""
    with DecoderPool(processes=1) as pool:
        case = cases.phantom_ct(tmp_path / "phantom", pool)
    [document] = case.of_kind("summary")
    (tmp_path / "orthanc").mkdir()
    with site(fetch(), tmp_path / "orthanc") as running, chromium() as page:
        [outcome] = cstore.send([document], peer=running.orthanc.peer())
        assert outcome.delivered, outcome.error
        [series] = running.orthanc.get("/series")
        page.goto(f"http://127.0.0.1:{running.orthanc.http_port}/web-viewer/app/viewer.html?series={series}")
        page.wait_for_selector("canvas")
        shown = picture(page, "webviewer-summary", page.locator("canvas").first)
    assert likeness(shown, dcmread(BytesIO(document.data)).pixel_array) > 0.9
