"""The page as a browser meets it: who may see and do what, what is said and audited, and what is never said."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from httpx2 import Response
from PIL import Image
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from tests import ward
from tests.conftest import Captured
from worker.config import Config, Site, Web
from worker.ops import audit
from worker.store import accounts, reviews, worklist
from worker.store.database import Store
from worker.web import login
from worker.web.app import HEADERS, application

BASE = "http://127.0.0.1:8080"


@dataclass
class Clock:
    """Wound by hand."""

    at: datetime = ward.NOW

    def __call__(self) -> datetime:
        return self.at


@dataclass
class Browser:
    """One browser, with its cookies."""

    app: ASGIApp
    client: TestClient

    def get(self, path: str) -> Response:
        return self.client.get(path)

    def post(self, path: str, **fields: str) -> Response:
        return self.client.post(path, data=fields)

    def log_in(self, name: str, password: str = ward.PASSWORD) -> Response:
        return self.post("/login", name=name, password=password)

    def send(self, path: str, **fields: str) -> Response:
        """Send a form with the page's own CSRF token."""
        csrf = re.search(r'name="csrf" value="(\w+)"', self.get("/account").text)
        return self.post(path, csrf=csrf[1] if csrf else "", **fields)


@dataclass
class Place:
    """An installation with its studies."""

    app: ASGIApp
    store: Store
    studies: dict[str, int]
    clock: Clock
    trail: Path

    def browser(self, name: str = "", *, address: str = "127.0.0.1", headers: dict[str, str] | None = None) -> Browser:
        client = TestClient(
            self.app,
            base_url=BASE,
            client=(address, 4000),
            follow_redirects=False,
            raise_server_exceptions=False,
            headers={"sec-fetch-site": "same-origin"} if headers is None else headers,
        )
        made = Browser(self.app, client)
        if name:
            assert made.log_in(name).headers["location"] == "/"
        return made

    def audited(self) -> list[str]:
        return [re.sub(r"^\S+  ", "", line) for line in audit.told(self.trail)]


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """A database with people and studies, to be copied."""
    folder = tmp_path_factory.mktemp("ward")
    store = Store(f"sqlite:///{folder / 'synoptic.db'}")
    store.migrate()
    ward.people(store)
    found = ward.furnish(store, folder)
    store.close()
    return folder / "synoptic.db", found.studies


@pytest.fixture
def place(furnished: tuple[Path, dict[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    whole, studies = furnished
    shutil.copy(whole, tmp_path / "synoptic.db")
    store = Store(f"sqlite:///{tmp_path / 'synoptic.db'}")
    monkeypatch.setattr(accounts, "COST", ward.CHEAP)
    (tmp_path / "spool").mkdir()
    config = Config(site=Site(data=tmp_path), web=Web())
    clock = Clock(ward.NOW + timedelta(minutes=1))
    audit.begin(config.trail, ae_title="SYNOPTIC", limit_bytes=2**24)
    yield Place(application(config, store, now=clock), store, studies, clock, config.trail)
    audit.end()
    store.close()


NAMES = [patient.name.split("^")[0] for _, patient, _, _ in ward.PATIENTS if patient.name]


def test_whoever_is_not_logged_in_sees_nobody(place: Place) -> None:
    stranger = place.browser()
    for path in ("/", "/rows", "/studies/1", "/studies/1/live", "/studies/1/documents/1.png", "/dead-letters", "/throughput", "/account"):
        answer = stranger.get(path)
        assert (answer.status_code, answer.headers["location"]) == (303, "/login"), path
    again = stranger.client.get("/rows", headers={"hx-request": "true"})
    assert again.headers["hx-redirect"] == "/login"
    for path in ("/studies/1/retry", "/studies/1/findings/1", "/logout", "/search", "/account"):
        assert stranger.post(path).headers["location"] == "/login", path
    assert not any(name in stranger.get("/login").text for name in NAMES)
    assert stranger.get("/openapi.json").status_code == 404
    assert stranger.get("/docs").status_code == 404


def test_a_log_in_fails_with_one_sentence_whatever_was_wrong_and_is_audited_without_the_password(place: Place) -> None:
    browser = place.browser()
    wrong = {browser.log_in(name, password).text for name, password in (("a.viewer", "wrong"), ("nobody", "wrong"), ("", ""))}
    assert len(wrong) == 1
    for _ in range(login.TRIES):
        browser.log_in("a.operator", "wrong")
    assert browser.log_in("a.operator").status_code == 401  # locked: the right one helps no more
    place.clock.at += timedelta(seconds=31)
    assert browser.log_in("a.operator").headers["location"] == "/"
    told = place.audited()
    assert "Login  a.viewer > SYNOPTIC  not done  name or password is wrong" in told
    assert "Login  unknown > SYNOPTIC  not done  name or password is wrong" in told
    assert "Login  a.operator > SYNOPTIC  not done  locked after too many tries" in told
    assert told[-1] == "Login  a.operator > SYNOPTIC"
    assert not any(word in line for line in told for word in ("wrong wrong", ward.PASSWORD))


def test_a_session_is_a_cookie_that_no_script_reads_and_ends_on_both_sides(place: Place) -> None:
    browser = place.browser()
    cookie = browser.log_in("a.viewer").headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    kept = browser.client.cookies["synoptic"]
    assert browser.send("/logout").headers["location"] == "/login?ended=true"
    browser.client.cookies.set("synoptic", kept)
    assert browser.get("/").headers["location"] == "/login"
    assert place.audited()[-1] == "Logout  a.viewer > SYNOPTIC"
    idle = place.browser("a.viewer")
    again = re.search(r'hx-get="(/rows[^"]*)"', idle.get("/").text)
    assert again
    seen = []
    for _ in range(4):  # a list that looks by itself keeps nobody logged in
        place.clock.at += timedelta(minutes=10)
        seen.append(idle.get(again[1]).status_code)
    assert seen == [200, 200, 303, 303]


def test_by_tls_the_cookie_is_secure_and_bound_to_the_host(place: Place, tmp_path: Path) -> None:
    web = Web(base_url="https://synoptic.test")
    app = application(Config(site=Site(data=tmp_path), web=web), place.store, now=place.clock)
    client = TestClient(app, base_url="https://synoptic.test", follow_redirects=False, headers={"sec-fetch-site": "same-origin"})
    answer = client.post("/login", data={"name": "a.viewer", "password": ward.PASSWORD})
    assert answer.headers["set-cookie"].startswith("__Host-synoptic=")
    assert "Secure" in answer.headers["set-cookie"]
    assert "max-age" in answer.headers["strict-transport-security"]
    assert client.get("/login", headers={"host": "evil.test"}).status_code == 400


def test_every_answer_has_the_headers_and_no_form_is_taken_from_elsewhere(place: Place) -> None:
    browser = place.browser("a.operator")
    for path in ("/", "/login", "/none", "/metrics", "/studies/1", "/static/style.css"):
        answered = browser.get(path).headers
        expected = HEADERS if "static" not in path else {**HEADERS, "Cache-Control": "max-age=3600"}
        assert {name: answered[name] for name in HEADERS} == dict(expected), path
    assert "unsafe" not in HEADERS["Content-Security-Policy"]
    # By "no-referrer" a browser without fetch metadata would send "Origin: null" with our own forms (Fetch, §3.2).
    assert HEADERS["Referrer-Policy"] == "same-origin"
    for headers in ({"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}, {"origin": "https://evil.test"}, {}):
        other = place.browser(headers=headers)
        assert other.log_in("a.operator").status_code == 403
    assert place.browser("a.operator", headers={"origin": BASE}).get("/").status_code == 200
    for csrf in ("", "x" * 64, place.browser("a.operator").client.cookies["synoptic"]):
        assert browser.post(f"/studies/{place.studies['failed']}/retry", csrf=csrf).status_code == 403
    for name in ("rebound.test", "127.0.0.1.rebound.test", "[", "", "user@rebound.test:8080"):
        answer = browser.client.get("/login", headers={"host": name})
        assert (answer.status_code, answer.text) == (400, "This page may not be called by this name: [web] base_url says by which it may.")
    for name in ("localhost:8080", "127.0.0.1", "[::1]:80"):
        assert browser.client.get("/login", headers={"host": name}).status_code == 200
    assert browser.post("/login", name="x" * 40_000).status_code == 413


def test_no_page_styles_or_runs_anything_inline_and_no_tab_names_a_patient(place: Place) -> None:
    browser = place.browser("a.radiologist")
    paths = ["/", "/?state=failed", "/dead-letters", "/throughput", "/throughput?days=31", "/account", "/none"]
    for path in [*paths, *(f"/studies/{number}" for number in place.studies.values())]:
        text = browser.get(path).text
        assert not re.search(r"<style|\sstyle=|<script(?! src=\"/static/)|\son\w+=|javascript:|https?://(?!www\.w3\.org)", text), path
        assert not any(name in re.search(r"<title>(.*?)</title>", text)[1] for name in NAMES), path  # type: ignore[index]
        links = re.findall(r'(?:href|action|src|hx-get)="([^"]*)"', text)
        assert not any(secret in link for link in links for _, patient, accession, _ in ward.PATIENTS for secret in
                       filter(None, (patient.key.patient_id, accession))), path  # fmt: skip


def test_the_worklist_shows_each_study_and_a_search_leads_to_rows_not_to_an_id_in_a_url(place: Place) -> None:
    browser = place.browser("a.viewer")
    text = browser.get("/").text
    for shown in ("Müller, Änne", "Wang, XiaoDong (王, 小東)", "Παπαδόπουλος, Γιώργος", ward.WHY, "Pneumonia <b>73 %</b>"):
        assert shown in text
    assert 'hx-get="/rows?seal=' in text
    assert "hx-get" not in browser.get("/?paused=true").text
    found = browser.send("/search", wanted=" 4711 ")
    assert found.headers["location"] == f"/?patient={place.studies['replaced']}"
    assert browser.get(found.headers["location"]).text.count('role="rowheader"') == 2
    assert browser.send("/search", wanted="A-1002").headers["location"] == f"/?order={place.studies['failed']}"
    assert browser.send("/search", wanted="<script>").headers["location"] == "/?none=true"
    for path in (
        "/?state=nonsense",
        "/?after=nonsense",
        "/?patient=-1",
        "/?patient=nonsense",
        "/studies/0",
        "/studies/999999",
        f"/studies/{10**30}",
    ):
        answer = browser.get(path)
        assert answer.status_code == 404, path
        assert "nonsense" not in answer.text
    assert any(line.startswith("Query  a.viewer > SYNOPTIC") for line in place.audited())


def test_a_failed_study_says_why_and_is_retried_by_an_operator_alone(place: Place) -> None:
    number = place.studies["failed"]
    viewer, radiologist, operator = (place.browser(f"a.{role}") for role in ("viewer", "radiologist", "operator"))
    assert ward.WHY in viewer.get(f"/studies/{number}").text
    for other in (viewer, radiologist):
        assert "/retry" not in other.get(f"/studies/{number}").text
        refused = other.send(f"/studies/{number}/retry")
        assert (refused.status_code, "needs the role admin or operator" in refused.text) == (403, True)
    assert ward.account_of(place.store, number) == "failed"
    done = operator.send(f"/studies/{number}/retry")
    assert done.headers["location"] == f"/studies/{number}?did=retry&jobs=2"
    shown = operator.get(done.headers["location"]).text
    assert "2 jobs put back." in shown
    assert "a.operator put jobs back: 2" in shown
    assert "hx-get" in shown
    assert ward.account_of(place.store, number) == "in flight"
    assert operator.send(f"/studies/{number}/prioritize").status_code == 303
    assert "Urgent" in operator.get(f"/studies/{number}").text
    assert operator.send(f"/studies/{number}/cancel").headers["location"].endswith("jobs=2")
    assert operator.send(f"/studies/{number}/erase").status_code == 404
    told = place.audited()
    uid, whose = f"2.25.771  {ward.PATIENTS[1][1].key.patient_id}^^^SITE", "a.operator > SYNOPTIC"
    assert f"DICOM Instances Accessed, changed  {whose}  {uid}  retry: 2 jobs put back." in told
    assert f"DICOM Instances Accessed, changed  {whose}  {uid}  cancel: 2 jobs cancelled." in told
    assert f"DICOM Instances Accessed, read  a.viewer > SYNOPTIC  {uid}" in told
    assert any(line.startswith("Use of Restricted Function  a.viewer  account:a.viewer  not done  ") for line in told)


def test_a_report_is_shown_with_its_findings_its_image_its_record_and_what_replaced_it(place: Place) -> None:
    browser = place.browser("a.viewer")
    number = place.studies["replaced"]
    with place.store.read() as conn:
        old, new = (row for row in worklist.documents_of(conn, number) if row.kind == "sr")
        picture = next(row.id for row in worklist.documents_of(conn, number) if row.kind == "summary")
    current = browser.get(f"/studies/{number}").text
    for shown in (
        *("Current report", "C reactive protein", "&lt; 0.3 mg/L", "2024-01-02 06:30", "Fibrin D-dimer", "not repeated here"),
        *("First image came from XRAY_1", "A late image opened it again", "Structured Report delivered to pacs"),
        f'href="/studies/{number}?report={old.id}"',
    ):
        assert shown in current, shown
    assert "Replaced." not in current
    earlier = browser.get(f"/studies/{number}?report={old.id}").text
    assert "Replaced." in earlier
    assert "Current report" not in earlier
    assert new.predecessor_uid == old.sop_instance_uid
    image = browser.get(f"/studies/{number}/documents/{picture}.png")
    assert (image.headers["content-type"], Image.open(io.BytesIO(image.content)).size) == ("image/png", (960, 720))
    assert browser.get(f"/studies/{number}/documents/{new.id}.png").status_code == 404
    assert browser.get(f"/studies/{place.studies['failed']}/documents/{picture}.png").status_code == 404
    assert browser.get(f"/studies/{place.studies['failed']}?report={old.id}").status_code == 404
    failed = browser.get(f"/studies/{place.studies['unanalysable']}").text
    assert "Could not be analysed: The series has no image of the view PA" in failed
    live = browser.get(f"/studies/{number}/live?had=0").text
    assert "A new report is here." in live


def test_a_radiologist_agrees_or_corrects_and_it_is_kept_with_the_result(place: Place) -> None:
    number = place.studies["delivered"]
    with place.store.read() as conn:
        report = next(row for row in worklist.documents_of(conn, number) if row.kind == "sr")
        finding = worklist.findings_of(conn, number)[report.id][0].id
    operator, radiologist = place.browser("a.operator"), place.browser("a.radiologist")
    path = f"/studies/{number}/findings/{finding}"
    assert operator.send(path, verdict="negative").status_code == 403
    assert radiologist.send(path, verdict="perhaps").status_code == 400
    assert radiologist.send(f"/studies/{place.studies['failed']}/findings/{finding}", verdict="negative").status_code == 404
    assert radiologist.send(path, verdict="negative", note="<b>old scar</b>" + "x" * 600).status_code == 303
    text = operator.get(f"/studies/{number}").text
    assert "<b>a.radiologist</b> says negative" in text
    assert "&lt;b&gt;old scar&lt;/b&gt;" in text
    assert "a.radiologist corrected “pneumonia” to negative" in text
    with place.store.read() as conn:
        assert len(reviews.of_study(conn, number)[finding][0].note) == reviews.LONGEST_NOTE
    assert any(line.endswith(f"finding {finding} corrected") for line in place.audited())
    assert not any("scar" in line for line in place.audited())


def test_a_person_changes_the_own_password_and_every_other_browser_is_logged_out(place: Place) -> None:
    here, there = place.browser("a.viewer"), place.browser("a.viewer")
    assert "old password is wrong" in here.send("/account", old="wrong", new="a new long pass phrase").text
    assert "12 to 256 characters" in here.send("/account", old=ward.PASSWORD, new="short").text
    assert here.send("/account", old=ward.PASSWORD, new="a new long pass phrase").status_code == 303
    assert here.get("/").status_code == 200
    assert there.get("/").status_code == 303
    assert place.browser().log_in("a.viewer").status_code == 401


def test_monitors_alone_read_the_numbers_and_no_number_names_anybody(place: Place) -> None:
    near, far = place.browser(), place.browser(address="10.1.2.3")
    for path in ("/metrics", "/live", "/ready"):
        assert far.get(path).status_code == 403
    assert near.get("/live").text == "alive\n"
    assert near.get("/ready").text == "ready\n"
    text = near.get("/metrics").text
    for line in (
        'synoptic_jobs{bundle="cxr-severity",destination="pacs",kind="deliver",state="discarded"} 2.0',
        "synoptic_studies_held 1.0",
        "synoptic_studies_receiving 1.0",
        "synoptic_audit_unsent_bytes 0.0",
    ):
        assert line in text
    secrets = [
        part for _, patient, accession, words in ward.PATIENTS for part in (patient.key.patient_id, accession, words, *NAMES) if part
    ]
    assert not any(secret in value for value in re.findall(r'="([^"]*)"', text) for secret in secrets)
    assert not re.search(r"2\.25\.\d", text)


def test_it_is_not_ready_without_a_database_without_room_or_without_a_role(place: Place, tmp_path: Path) -> None:
    low = Config(site=Site(data=tmp_path / "gone"), web=Web())
    client = TestClient(application(low, place.store), base_url=BASE, client=("127.0.0.1", 1))
    assert "less free space" in client.get("/ready").text
    (tmp_path / "roles.receive-run.json").write_text('{"receive": 1, "run": 0}')
    answer = place.browser().get("/ready")
    assert (answer.status_code, answer.text) == (503, "No process of role run runs.\n")
    away = Store(f"sqlite:///{tmp_path / 'away.db'}")
    client = TestClient(application(Config(site=Site(data=tmp_path)), away), base_url=BASE, client=("127.0.0.1", 1))
    assert "There is no database" in client.get("/ready").text
    assert client.get("/login").status_code == 200


def test_a_fault_of_ours_says_nothing_of_what_it_met(place: Place, captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("Müller^Änne")

    monkeypatch.setattr(worklist, "page", fail)
    answer = place.browser("a.viewer").get("/")
    assert answer.status_code == 500
    assert "A fault of ours" in answer.text
    (told,) = captured.named("page.failed")
    assert told["error"] == "KeyError"
    assert "Müller" not in str(told)
    assert answer.headers["content-security-policy"] == HEADERS["Content-Security-Policy"]
