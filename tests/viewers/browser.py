"""Debian's Chromium, and what may be asked of OHIF in it.

A question waits until the viewer has drawn and stands still: two pictures of it are the same.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Locator, Page, sync_playwright

from tests.peers import require
from tests.viewers.fetch import FOLDER
from worker.report.result import SERIES_NUMBERS

SCREENSHOTS: Final = FOLDER / "screenshots"
#: WebGL in software, and nothing that calls home (STANDARDS.md §10).
_FLAGS: Final = (
    "--no-sandbox",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
_TIMEOUT_MS: Final = 90_000
_STEP_MS: Final = 500
#: So many until it stands still; Orthanc's viewer keeps a wheel turning, and is taken as it is.
_STEPS: Final = 30
_PANE: Final = '[data-cy="viewport-pane"]'
#: By the viewer's own interface: how a person scrolls is not what is looked at.
_VIEWPORT: Final = "services.cornerstoneViewportService.getCornerstoneViewport(services.viewportGridService.getActiveViewportId())"
_IS_READY: Final = f"{_VIEWPORT}?.getImageIds().length > 0"
_GO_TO: Final = f"""number => {{
  const viewport = {_VIEWPORT};
  const at = viewport.getImageIds().findIndex(id => cornerstone.metaData.get('instance', id).InstanceNumber == number);
  return viewport.setImageIdIndex(at);
}}"""
#: RGB (rows, columns, 3).
Picture = NDArray[np.int16]


@contextlib.contextmanager
def chromium() -> Iterator[Page]:
    """Open one page of 1600 × 1000 pixels until the block ends."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=require("chromium"), args=list(_FLAGS))
        try:
            page = browser.new_page(viewport={"width": 1600, "height": 1000})
            page.set_default_timeout(_TIMEOUT_MS)
            # The tour for who comes for the first time.
            page.add_init_script("localStorage.setItem('shownTours', '[\"basicViewerTour\"]')")
            yield page
        finally:
            browser.close()


def picture(page: Page, name: str, where: Locator | None = None) -> Picture:
    """Return what is on the screen once it stands still, and keep it for a person as `name`."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    last = b""
    for _ in range(_STEPS):
        page.wait_for_timeout(_STEP_MS)
        now = (where or page).screenshot(animations="disabled")
        if now == last:
            break
        last = now
    page.screenshot(path=SCREENSHOTS / f"{name}.png")
    with Image.open(BytesIO(last)) as image:
        return np.asarray(image.convert("RGB")).astype(np.int16)


def likeness(shown: Picture, pixels: NDArray[np.uint8]) -> float:
    """Correlate a viewport with an RGB image that is fitted into it; viewers write their own words over its margins."""
    height, width = shown.shape[:2]
    scale = min(width / pixels.shape[1], height / pixels.shape[0])
    size = int(pixels.shape[1] * scale), int(pixels.shape[0] * scale)
    written = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)).astype(float)
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    inner = np.s_[int(0.15 * size[1]) : int(0.9 * size[1]), int(0.05 * size[0]) : int(0.95 * size[0])]
    return float(np.corrcoef(shown[top : top + size[1], left : left + size[0]][inner].ravel(), written[inner].ravel())[0, 1])


@dataclass(frozen=True, slots=True)
class Ohif:
    """OHIF with one study open."""

    page: Page
    origin: str
    study_instance_uid: str

    def open(self) -> None:
        """Open the study anew, and wait for its first image."""
        self.page.goto(f"{self.origin}/viewer?StudyInstanceUIDs={self.study_instance_uid}", wait_until="domcontentloaded")
        self.page.wait_for_selector(f"{_PANE} canvas")
        self.page.wait_for_function("document.querySelector('[data-cy=\"viewport-overlay-bottom-right\"]')?.innerText.includes('/')")
        self.page.wait_for_function(_IS_READY)

    def series(self) -> list[str]:
        """What the list of series says of each, in one line."""
        thumbnails = self.page.locator('[data-cy^="study-browser-thumbnail"]')
        return [" ".join(text.split()) for text in thumbnails.all_inner_texts()]

    def show(self, kind: str) -> None:
        """Open the series of one form in the viewport; of a segmentation, which it asks about, say Yes."""
        self.page.locator('[data-cy^="study-browser-thumbnail"]', has_text=f"S:{SERIES_NUMBERS[kind]}").first.dblclick()
        if kind == "seg":
            self.page.get_by_role("button", name="Yes", exact=True).first.click()
        self.page.wait_for_timeout(4 * _STEP_MS)

    @property
    def pane(self) -> Locator:
        """The viewport."""
        return self.page.locator(_PANE).first

    def text(self) -> str:
        """What can be read in the viewport."""
        return str(self.pane.inner_text())

    def drawn_text(self) -> list[str]:
        """What is written on the image beside graphics."""
        return [text for text in self.pane.locator("svg tspan").all_text_contents() if text]

    def slice(self) -> int:
        """The Instance Number of the image on the screen."""
        shown = self.page.locator('[data-cy="viewport-overlay-bottom-right"]').first.inner_text()
        found = re.search(r"I:\s*(\d+)", shown)
        return int(found[1]) if found else 1

    def go_to(self, instance_number: int) -> None:
        """Bring this image of the open series to the screen."""
        self.page.evaluate(_GO_TO, instance_number)
        self.page.wait_for_timeout(_STEP_MS)

    def open_panel(self, name: str) -> None:
        """Open a panel at the right."""
        self.page.locator(f'[data-cy="{name}-btn"]').first.click()
        self.page.wait_for_timeout(_STEP_MS)
