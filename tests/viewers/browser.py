"""Debian's Chromium, and what may be asked of a viewer in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from tests.peers import require
from tests.viewers.fetch import FOLDER

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


@contextlib.contextmanager
def chromium() -> Iterator[Page]:
    """Open one page of 1600 × 1000 pixels until the block ends."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=require("chromium"), args=list(_FLAGS))
        try:
            page = browser.new_page(viewport={"width": 1600, "height": 1000})
            page.set_default_timeout(_TIMEOUT_MS)
            yield page
        finally:
            browser.close()
