"""The page as somebody who means it ill meets it: numbers too large, forms too many, connections held, and what must be audited."""

from __future__ import annotations

import http.client
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests import ward
from tests.conftest import Captured
from tests.installation import Installation, wait_until
from tests.integration.test_web import Place, furnished, place
from worker import daemon
from worker.config import Config, Site, Web
from worker.store import accounts, history, worklist
from worker.store.database import DatabaseUnavailable, Store
from worker.store.schema import study
from worker.web import connection, login, serve
from worker.web.app import application

__all__ = ["furnished", "place"]  # fixtures

HUGE = 10**30


def test_no_number_form_or_letter_of_a_stranger_is_a_fault_of_ours(place: Place, captured: Captured) -> None:
    browser, number = place.browser("a.radiologist"), place.studies["delivered"]
    for path in (
        f"/?after=20240101T000000.000000-{HUGE}",
        f"/?after=20240101T000000.000000--{HUGE}",
        f"/?patient={HUGE}",
        "/?urgent=perhaps",
        f"/studies/{HUGE}/documents/1.png",
        f"/studies/{number}/documents/{HUGE}.png",
        "/studies/abc",
        "/login/",  # and not elsewhere by a scheme that a proxy may have forgotten to say
        "/dead-letters?before=0",
    ):
        answer = browser.get(path)
        assert (answer.status_code, answer.headers["content-type"][:9]) == (404, "text/html"), path
        assert "abc" not in answer.text
    assert browser.send(f"/studies/{number}/findings/{HUGE}", verdict="negative").status_code == 404
    assert browser.send(f"/studies/{number}/findings/-{HUGE}", verdict="negative").status_code == 404
    assert browser.send("/search", wanted="a\0b").status_code == 400
    assert browser.client.post("/login", content="&".join(["a=1"] * 30)).status_code == 400
    assert browser.client.post("/login", data={"name": "Änne\ud7ff", "password": "ü" * 300}).status_code == 401
    assert not captured.named("page.failed")


def test_a_study_of_the_end_of_the_calendar_is_shown(place: Place, tmp_path: Path) -> None:
    number = place.studies["delivered"]
    with place.store.begin() as conn:
        conn.execute(sa.update(study).where(study.c.id == number).values(study_at=datetime(9999, 12, 31, 23, 59, tzinfo=UTC)))
    east = Config(site=Site(data=tmp_path, timezone="Europe/Berlin"), web=Web())
    there = Place(application(east, place.store, now=place.clock), place.store, place.studies, place.clock, place.trail)
    assert there.browser("a.viewer").get(f"/studies/{number}").status_code == 200


def test_a_history_of_days_of_attempts_is_shown_by_its_ends(place: Place) -> None:
    number = place.studies["failed"]
    facts = {"destination": "pacs", "reason": ward.WHY}
    with place.store.begin() as conn:
        for attempt in range(1000):
            history.note(conn, number, name="deliver.retried", now=place.clock.at, attempt=attempt, **facts)
    text = place.browser("a.viewer").get(f"/studies/{number}/live").text
    assert "First image came from" in text
    assert "attempt 999" in text
    assert re.search(r"\d{3} steps in between", text)
    assert text.count("<time") == 401


def test_whatever_shows_a_patient_is_audited_or_was_shown_to_the_same_session_before(place: Place) -> None:
    browser, number = place.browser("a.viewer"), place.studies["delivered"]
    with place.store.read() as conn:
        picture = next(row.id for row in worklist.documents_of(conn, number) if row.kind == "summary")
    assert browser.get(f"/studies/{number}/documents/{picture}.png").status_code == 200
    assert place.audited()[-1] == "DICOM Instances Accessed, read  a.viewer > SYNOPTIC  2.25.770  4711^^^SITE  summary image"
    again = re.search(r'hx-get="(/rows[^"]*)"', browser.get("/").text)
    assert again
    assert "Müller, Änne" in browser.get(again[1]).text
    other = place.browser("a.viewer")
    for path in ("/rows", f"/rows?patient={number}", f"/rows?patient={number}&{again[1].partition('?')[2]}"):
        answer = browser.get(path)
        assert (answer.status_code, answer.text, answer.headers["hx-refresh"]) == (204, "", "true"), path
    assert other.get(again[1]).status_code == 204
    one = re.search(r'hx-get="(/rows[^"]*)"', browser.get(f"/?patient={number}").text)
    assert one
    assert browser.get(one[1].replace("&amp;", "&")).status_code == 200


def test_no_search_makes_an_audit_message_that_a_repository_would_refuse(place: Place) -> None:
    browser = place.browser("a.viewer")
    csrf = re.search(r'name="csrf" value="(\w+)"', browser.get("/account").text)
    assert csrf
    form = f"csrf={csrf[1]}&wanted=".encode() + b"\xff" * 16_000  # each becomes U+FFFD, three octets
    assert browser.client.post("/search", content=form).headers["location"] == "/?none=true"
    longest = max(len(line) for path in place.trail.glob("*.log") for line in path.read_bytes().splitlines())
    assert longest < 32_768  # PS3.15 §A.6


def test_a_new_password_that_is_refused_is_no_wrong_try_and_a_wrong_old_one_is_audited(place: Place) -> None:
    browser = place.browser("a.viewer")
    for _ in range(login.TRIES):
        assert "12 to 256 characters" in browser.send("/account", old=ward.PASSWORD, new="short").text
    assert place.browser().log_in("a.viewer").status_code == 303
    browser.send("/account", old="wrong", new="a new long pass phrase")
    assert place.audited()[-1] == "Login  a.viewer > SYNOPTIC  not done  name or password is wrong"


def test_a_second_log_in_of_a_browser_ends_its_first_session(place: Place) -> None:
    browser = place.browser("a.viewer")
    first = browser.client.cookies["synoptic"]
    assert browser.log_in("a.operator").status_code == 303
    other = place.browser()
    other.client.cookies.set("synoptic", first)
    assert other.get("/").headers["location"] == "/login"


def test_a_browser_is_told_nothing_of_the_databases_host_and_user(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    browser = place.browser("a.viewer")

    def away(*_: object, **__: object) -> None:
        raise DatabaseUnavailable('The database is not available: connection to "10.0.0.5" failed for user "synoptic".')

    monkeypatch.setattr(accounts, "of_session", away)
    answer = browser.get("/")
    assert answer.status_code == 503
    assert "The database is not available" in answer.text
    assert not re.search("10.0.0.5|user", answer.text)


def test_a_monitor_is_known_on_a_socket_of_both_families_too(place: Place) -> None:
    assert place.browser(address="::ffff:127.0.0.1").get("/live").status_code == 200
    assert place.browser(address="::ffff:10.0.0.1").get("/live").status_code == 403


def test_who_guesses_locks_the_own_address_out_and_not_the_accounts_owner(place: Place) -> None:
    attacker, owner = place.browser(address="10.6.6.6"), place.browser(address="10.1.2.3")
    for _ in range(login.TRIES):
        attacker.log_in("a.operator", "wrong")
        attacker.log_in("nobody", "wrong")
    assert attacker.log_in("a.operator").status_code == 401
    assert attacker.log_in("a.viewer").status_code == 303
    assert owner.log_in("a.operator").status_code == 303
    with place.store.begin() as conn:
        row = accounts.by_name(conn, "a.operator")
        assert row is not None
        assert row.failures == 0
        accounts.change(conn, row.id, password=accounts.hashed("another long pass phrase"))
    assert attacker.log_in("a.operator", "another long pass phrase").status_code == 303, "a new password ends the lock"
    for n in range(accounts.TRIES):  # from everywhere at once
        place.browser(address=f"10.7.7.{n}").log_in("a.operator", "wrong")
    assert owner.log_in("a.operator", "another long pass phrase").status_code == 401


def test_many_log_ins_at_once_do_not_take_the_pages_threads(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login, "_WAITING", threading.BoundedSemaphore(1))
    with login.turn(login._WAITING):
        answer = place.browser().log_in("a.viewer")
    assert (answer.status_code, "Too many log in at once" in answer.text) == (503, True)
    assert place.browser().log_in("a.viewer").status_code == 303


# --- connections


@pytest.fixture
def port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A page that is served, with short patience."""
    monkeypatch.setattr(connection, "REQUEST_S", 0.5)
    monkeypatch.setattr(connection, "ANSWER_S", 1.5)
    store = Store(f"sqlite:///{tmp_path / 'synoptic.db'}")
    store.migrate()
    listener, stop = socket.create_server(("127.0.0.1", 0)), threading.Event()
    number = int(listener.getsockname()[1])
    config = Config(site=Site(data=tmp_path), web=Web(port=number))
    thread = threading.Thread(target=serve, args=(config, store, listener, stop))
    thread.start()
    yield number
    stop.set()
    thread.join(20)
    assert not thread.is_alive()
    listener.close()
    store.close()


def status(port: int) -> int:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as asked:
        asked.request("GET", "/login")
        return asked.getresponse().status


def is_cut(one: socket.socket, *, within_s: float) -> bool:
    one.settimeout(within_s)
    try:
        while one.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def is_cut_while_sending(one: socket.socket, text: bytes, *, within_s: float) -> bool:
    one.settimeout(within_s)
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            one.send(text)
        except TimeoutError:
            return False
        except OSError:  # reset, or a pipe that is broken
            return True
        time.sleep(0.1)
    return False


def test_connections_that_say_nothing_or_never_end_deny_the_page_to_nobody(port: int) -> None:
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(150)]
    assert status(port) == 200  # in the place of one that says nothing
    begun = socket.create_connection(("127.0.0.1", port))
    assert is_cut_while_sending(begun, b"G", within_s=5)
    body = socket.create_connection(("127.0.0.1", port))
    body.send(b"POST /login HTTP/1.1\r\nHost: 127.0.0.1\r\nSec-Fetch-Site: same-origin\r\nContent-Length: 9\r\n\r\nname=")
    assert all(is_cut(one, within_s=5) for one in (*held, body))
    for one in (*held, begun, body):
        one.close()
    assert status(port) == 200


def test_whoever_never_reads_the_answer_is_cut(port: int) -> None:
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    one.connect(("127.0.0.1", port))
    asked = b"GET /static/htmx.min.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    assert is_cut_while_sending(one, asked * 100, within_s=15)
    one.close()
    assert status(port) == 200


def test_a_page_whose_port_is_taken_stops_no_other_role_and_comes_when_it_is_free(tmp_path: Path) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    port = int(taken.getsockname()[1])
    installation = Installation(tmp_path, bundles=(), processes=1, extra=f"[web]\nenabled = true\nport = {port}\n")
    with installation, taken:
        died = installation.wait_for_event("role.restarted", timeout_s=60)
        assert {one["role"] for one in died} == {"serve"}
        with socket.create_connection(("127.0.0.1", installation.port)):
            pass
        assert "[web] port. Is synoptic running already?" in installation.log.read_text("utf-8")
        alone = Config(site=Site(data=tmp_path), web=Web(port=port))
        with pytest.raises(OSError, match="Address already in use"):
            daemon._page(alone, None, daemon.Supervisor(), is_alone=True)
        taken.close()
        wait_until(lambda: "serve" in {one["role"] for one in installation.events("role.started")}, timeout_s=60, what="the page")
        assert status(port) == 200
