"""Our page in Chromium, by Playwright: a failed study is found, understood, retried and seen delivered; axe-core finds nothing.

    python -m pytest tests/browser/page.py        (make page; screenshots go to var/page/, to be looked at)

The browser is Debian's chromium, started without its sandbox because CI runs as root; nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from tests import ward
from tests.installation import wait_until
from tests.peers import free_port
from worker.demo.pacs import DemoPacs
from worker.record_feeds import clock
from worker.store.database import Store

SHOTS = Path(__file__).parents[2] / "var" / "page"
CHROMIUM = "/usr/bin/chromium"
#: WCAG 2.2 A and AA, and what axe knows beyond.
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]

pytestmark = pytest.mark.timeout(300)


class Site:
    """A ward's database, `synoptic serve` and `synoptic deliver` on it, and a PACS that takes reports."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(f"sqlite:///{folder / 'synoptic.db'}")
        self.store.migrate()
        ward.people(self.store)
        self.studies = ward.furnish(self.store, folder, now=clock(), is_real=True).studies
        self.port = free_port()
        self.base = f"http://127.0.0.1:{self.port}"
        self.config = folder / "synoptic.toml"
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []

    def write(self, pacs_port: int) -> None:
        self.config.write_text(
            f'[site]\ndata = "."\ntimezone = "Europe/Berlin"\n[receive]\nlow_water_mb = 1\n[web]\nport = {self.port}\n'
            f'[[destinations]]\nname = "pacs"\nae_title = "PACS"\nhost = "127.0.0.1"\nport = {pacs_port}\ndocuments = ["sr", "summary"]\n'
        )

    def start(self, role: str) -> None:
        line = [sys.executable, "-m", "worker", role, "--config", str(self.config)]
        with (self.folder / f"{role}.log").open("wb") as log:
            self.processes.append(subprocess.Popen(line, stdout=log, stderr=log))

    def log(self, role: str) -> str:
        return (self.folder / f"{role}.log").read_text("utf-8")

    def stop(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        assert [process.wait(30) for process in self.processes] == [0] * len(self.processes)
        self.store.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("page")
    (folder / "spool").mkdir()
    made = Site(folder)
    made.write(free_port())
    made.start("serve")
    wait_until(lambda: '"role.started"' in made.log("serve") and '"serve"' in made.log("serve"), timeout_s=90, what="the page")
    yield made
    made.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        started = playwright.chromium.launch(executable_path=os.environ.get("CHROMIUM", CHROMIUM), args=arguments)
        yield started
        started.close()


def opened(browser: Browser, site: Site, name: str = "", *, scheme: str = "light", width: int = 1360, height: int = 900) -> Page:
    """A page of a browser of its own; what the console complains of is an error."""
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=scheme,
        reduced_motion="reduce",
        base_url=site.base,
    )
    page = context.new_page()

    def complain(message: ConsoleMessage) -> None:
        # A log-in that was refused and a page that is none are answered 401 and 404 on purpose.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            raise AssertionError(message.text)

    page.on("console", complain)
    page.goto("/login")
    if name:
        page.get_by_label("Name").fill(name)
        page.get_by_label("Password").fill(ward.PASSWORD)
        page.get_by_role("button", name="Log in").click()
        expect(page.get_by_role("heading", name="Worklist")).to_be_visible()
    return page


def assert_accessible(page: Page, what: str) -> None:
    found = Axe().run(page, options={"runOnly": {"type": "tag", "values": TAGS}, "resultTypes": ["violations"]}).response["violations"]
    told = [(one["id"], one["impact"], [node["html"][:200] for node in one["nodes"][:3]]) for one in found]
    assert told == [], f"{what}: {json.dumps(told, indent=1)}"


def test_an_operator_finds_a_failed_study_reads_why_retries_it_and_sees_it_delivered(site: Site, browser: Browser) -> None:
    page = opened(browser, site)
    page.get_by_label("Name").fill("a.operator")
    page.get_by_label("Password").fill("not the password")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("Name or password is wrong")
    page.screenshot(path=SHOTS / "login-wrong.png")
    page.get_by_label("Name").fill("a.operator")
    page.get_by_label("Password").fill(ward.PASSWORD)
    page.keyboard.press("Enter")
    page.get_by_role("navigation", name="Filter by state").get_by_role("link", name="Failed").click()
    expect(page.get_by_role("rowheader")).to_have_count(1)
    expect(page.get_by_role("row").nth(1)).to_contain_text(ward.WHY)
    page.screenshot(path=SHOTS / "failed.png")
    page.get_by_role("link", name="Παπαδόπουλος").click()
    expect(page.locator(".state")).to_contain_text(ward.WHY)
    page.screenshot(path=SHOTS / "failed-study.png", full_page=True)
    with DemoPacs(site.folder / "pacs", ae_title="PACS") as pacs:
        site.write(pacs.port)
        site.start("deliver")
        page.get_by_role("button", name="Retry").click()
        expect(page.get_by_role("status")).to_contain_text("2 jobs put back.")
        # Nobody clicks any more: htmx looks by itself.
        expect(page.locator(".state .badge")).to_have_text("Delivered", timeout=60_000)
        expect(page.locator("#timeline")).to_contain_text("Structured Report delivered to pacs")
        expect(page.locator("#timeline .sent .job.completed")).to_have_count(2)
        page.screenshot(path=SHOTS / "delivered-study.png", full_page=True)
        assert {one.modality for one in pacs.instances()} >= {"SR"}
    assert "Παπαδόπουλος" not in site.log("serve")


def test_a_radiologist_corrects_a_finding_by_the_keyboard_alone(site: Site, browser: Browser) -> None:
    page = opened(browser, site, "a.radiologist")
    page.goto(f"/studies/{site.studies['delivered']}")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.getAttribute('aria-label')") == "Correct Pneumonia":
            break
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.type("n")  # of positive, negative, uncertain
    page.keyboard.press("Tab")
    page.keyboard.type("Old scar, known since 2019.")
    page.keyboard.press("Tab")
    page.screenshot(path=SHOTS / "correct.png")
    page.keyboard.press("Enter")
    finding = page.locator(".finding").first
    expect(finding).to_contain_text("a.radiologist says negative")
    expect(finding).to_contain_text("Old scar, known since 2019.")
    finding.get_by_role("button", name="Agree").click()
    expect(finding).to_contain_text("a.radiologist agrees")
    page.screenshot(path=SHOTS / "reviewed.png", full_page=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_on_any_page_light_and_dark_wide_and_narrow(site: Site, browser: Browser, scheme: str) -> None:
    page = opened(browser, site, scheme=scheme)
    assert_accessible(page, "log-in")
    page.screenshot(path=SHOTS / f"login-{scheme}.png")
    visits = ["/", "/?state=failed", "/?state=lost", "/dead-letters", "/throughput", "/throughput?days=7", "/account", "/none"]
    visits += [f"/studies/{site.studies[state]}" for state in ("replaced", "failed", "held", "receiving", "unanalysable")]
    for who in ("a.radiologist", "a.admin"):
        for width in (1360, 320):
            page = opened(browser, site, who, scheme=scheme, width=width)
            for path in visits:
                page.goto(path)
                page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
                assert_accessible(page, f"{path} as {who}, {width} wide, {scheme}")
                # WCAG 1.4.10: nothing to scroll sideways but tables in a region of their own.
                assert page.evaluate("document.documentElement.scrollWidth") <= width, path
                name = path.strip("/").replace("/", "-").replace("?", "-").replace("=", "-") or "worklist"
                page.screenshot(path=SHOTS / f"{name}-{who[2:]}-{scheme}-{width}.png", full_page=True)


def test_a_list_that_is_paused_looks_no_more_and_one_that_is_not_keeps_its_focus(site: Site, browser: Browser) -> None:
    page = opened(browser, site, "a.viewer")
    link = page.locator(f"#study-{site.studies['waiting']}")
    link.focus()
    with page.expect_response(lambda answer: "/rows" in answer.url, timeout=20_000):
        pass
    expect(link).to_be_focused()
    page.get_by_role("link", name="Pause").click()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(11_000)
    assert [url for url in asked if "/rows" in url] == []
