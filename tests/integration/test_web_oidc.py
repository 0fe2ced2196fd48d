"""Log in at another server: what is believed of an ID token, and what is not; a small issuer on loopback says everything wrong once."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm
from starlette.testclient import TestClient

from tests import ward
from worker.config import Config, ConfigError, Site, Web
from worker.config_checks import check
from worker.errors import PeerRefused
from worker.ops import audit
from worker.store import accounts
from worker.store.database import Store
from worker.web import oidc
from worker.web.app import application

BASE = "http://127.0.0.1:8080"


class Issuer(ThreadingHTTPServer):
    """OpenID Connect as far as a relying party sees it; `claims` and `sign` may be changed by a test."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.keys = {"one": rsa.generate_private_key(public_exponent=65537, key_size=2048)}
        self.signs_with, self.algorithm = "one", "RS256"
        self.more: dict[str, Any] = {}
        self.asked: dict[str, str] = {}
        self.posted: list[dict[str, str]] = []
        self.names = self.url

    def begin(self, url: str) -> str:
        """What the browser would do: remember what is asked, give a code."""
        self.asked = {key: values[0] for key, values in parse_qs(urlsplit(url).query).items()}
        return "the-code"

    def token(self) -> str:
        """The ID token."""
        now = int(time.time())
        claims = {
            "iss": self.url,
            "aud": "synoptic",
            "sub": "0815",
            "iat": now,
            "exp": now + 300,
            "nonce": self.asked["nonce"],
            "preferred_username": "Ada.Lovelace",
            "groups": ["radiology", "canteen"],
        } | self.more
        claims = {key: value for key, value in claims.items() if value is not None}
        key: Any = self.keys[self.signs_with] if self.algorithm.startswith("RS") else "x" * 64 if self.algorithm != "none" else None
        return jwt.encode(claims, key, algorithm=self.algorithm, headers={"kid": self.signs_with})


class _Answers(BaseHTTPRequestHandler):
    server: Issuer

    def do_GET(self) -> None:
        issuer = self.server
        if self.path == "/.well-known/openid-configuration":
            ends = {name: f"{issuer.url}/{name}" for name in ("authorization_endpoint", "token_endpoint", "jwks_uri")}
            self._say(200, {"issuer": issuer.names, **ends})
        else:
            keys = [RSAAlgorithm.to_jwk(key.public_key(), as_dict=True) | {"kid": kid} for kid, key in issuer.keys.items()]
            self._say(200, {"keys": keys})

    def do_POST(self) -> None:
        issuer = self.server
        form = {key: values[0] for key, values in parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode()).items()}
        issuer.posted.append(form | {"authorization": self.headers.get("Authorization", "")})
        proof = base64.urlsafe_b64encode(hashlib.sha256(form["code_verifier"].encode()).digest()).rstrip(b"=").decode()
        is_right = form["code"] == "the-code" and proof == issuer.asked["code_challenge"]
        self._say(200 if is_right else 400, {"id_token": issuer.token()} if is_right else {"error": "invalid_grant"})

    def _say(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[Issuer]:
    with Issuer() as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


@pytest.fixture
def issuer(server: Issuer) -> Issuer:
    server.more, server.algorithm, server.signs_with, server.names, server.posted = {}, "RS256", "one", server.url, []
    return server


@pytest.fixture
def browser(issuer: Issuer, tmp_path: Path) -> Iterator[TestClient]:
    store = Store(f"sqlite:///{tmp_path / 'synoptic.db'}")
    store.migrate()
    with store.begin() as conn:
        accounts.add(conn, "taken", password=accounts.hashed(ward.PASSWORD, cost=ward.CHEAP), roles=["admin"], now=ward.NOW)
    web = Web(oidc_issuer=issuer.url, oidc_client_id="synoptic", oidc_client_secret="hush & hush", oidc_roles={"radiology": "radiologist"})
    config = Config(site=Site(data=tmp_path), web=web)
    audit.begin(config.trail, ae_title="SYNOPTIC", limit_bytes=2**24)
    yield TestClient(application(config, store), base_url=BASE, follow_redirects=False, headers={"sec-fetch-site": "same-origin"})
    audit.end()
    store.close()


def come_back(browser: TestClient, issuer: Issuer, **other: str) -> Any:
    """Go there and come back; `other` replaces what the provider's redirect says."""
    code = issuer.begin(browser.get("/login/oidc").headers["location"])
    return browser.get("/login/callback", params={"state": issuer.asked["state"], "code": code} | other)


def test_who_logs_in_elsewhere_gets_a_session_with_the_roles_that_are_said_there(
    browser: TestClient, issuer: Issuer, tmp_path: Path
) -> None:
    assert "/login/oidc" in browser.get("/login").text
    answer = come_back(browser, issuer)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    shown = browser.get("/account").text
    assert "ada.lovelace" in shown
    assert "radiologist" in shown
    assert issuer.asked["redirect_uri"] == f"{BASE}/login/callback"
    assert (issuer.asked["response_type"], issuer.asked["code_challenge_method"]) == ("code", "S256")
    assert base64.b64decode(issuer.posted[0]["authorization"].split()[1]).decode() == "synoptic:hush+%26+hush"
    issuer.more = {"groups": ["canteen"]}
    assert "no role here" in come_back(browser, issuer).text
    assert browser.get("/").headers["location"] == "/login", "what was open ends, too"
    store = Store(f"sqlite:///{tmp_path / 'synoptic.db'}")
    with store.begin() as conn:
        row = accounts.by_name(conn, "ada.lovelace")
        assert row is not None
        with pytest.raises(accounts.AccountRefused, match="logs in elsewhere"):
            accounts.change(conn, row.id, password=accounts.hashed(ward.PASSWORD, cost=ward.CHEAP))
    store.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"nonce": "another"},
        {"aud": "another"},
        {"aud": ["synoptic", "another"], "azp": "another"},
        {"iss": "http://127.0.0.1:1"},
        {"exp": 1_000_000_000},
        {"iat": None},
        {"sub": None},
    ],
    ids=str,
)
def test_a_token_of_another_log_in_client_issuer_or_time_is_not_believed(
    browser: TestClient, issuer: Issuer, wrong: dict[str, Any], tmp_path: Path
) -> None:
    issuer.more = wrong
    answer = come_back(browser, issuer)
    assert answer.status_code == 403
    assert browser.get("/").headers["location"] == "/login"
    assert any("Login  unknown" in line and "not done" in line for line in audit.told(tmp_path / "audit"))


@pytest.mark.parametrize("algorithm", ["none", "HS256"])
def test_a_token_that_anybody_could_have_signed_is_not_believed(browser: TestClient, issuer: Issuer, algorithm: str) -> None:
    issuer.algorithm = algorithm
    assert come_back(browser, issuer).status_code == 403


def test_a_state_of_another_browser_a_used_one_and_a_wrong_code_are_refused(browser: TestClient, issuer: Issuer, tmp_path: Path) -> None:
    for state in ("x" * 43, "ä", *["of nobody"] * 50):
        assert "not begun here" in come_back(browser, issuer, state=state).text
    audit.end()  # which writes what was only counted
    told = [line for line in audit.told(tmp_path / "audit") if "not begun here" in line or "Login" in line]
    assert len(told) <= 2, "who has no name does not fill the trail"
    assert come_back(browser, issuer, code="another").status_code == 403
    assert come_back(browser, issuer).status_code == 303
    again = browser.get("/login/callback", params={"state": issuer.asked["state"], "code": "the-code"})
    assert again.status_code in (400, 403)
    browser.cookies.clear()
    code = issuer.begin(browser.get("/login/oidc").headers["location"])
    browser.cookies.clear()  # a link that somebody else began
    assert browser.get("/login/callback", params={"state": issuer.asked["state"], "code": code}).status_code == 400


def test_no_number_of_log_ins_that_are_begun_elsewhere_ends_one_and_one_that_took_too_long_is_over(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is kept of them: whoever is not logged in cannot keep others from it."""
    known = oidc.Provider(Web(oidc_issuer=issuer.url, oidc_client_id="synoptic", oidc_roles={"radiology": "radiologist"}))
    url, state = known.begin()
    code = issuer.begin(url)
    assert len({known.begin()[1] for _ in range(1100)}) == 1100
    assert known.finish(state, code)["preferred_username"] == "Ada.Lovelace"
    with pytest.raises(PeerRefused, match="too long ago"):
        known.finish(state, code)  # once is enough
    with pytest.raises(PeerRefused, match="or elsewhere"):
        known.finish(f"{state.rpartition('.')[0]}.{'A' * 43}", code)
    asked = [parse_qs(urlsplit(known.begin()[0]).query) for _ in range(2)]
    for secret in ("state", "nonce", "code_challenge"):
        assert asked[0][secret] != asked[1][secret], "what is known of one log-in says nothing of another"
    assert float(asked[0]["state"][0].partition(".")[0]) < 60, "not how long the host is up"
    url, state = known.begin()
    code = issuer.begin(url)
    monkeypatch.setattr(oidc, "WAIT_S", -1.0)  # whole seconds are kept
    with pytest.raises(PeerRefused, match="too long ago"):
        known.finish(state, code)


def test_a_new_key_is_asked_for_and_a_name_that_is_a_local_account_is_refused(
    browser: TestClient, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert come_back(browser, issuer).status_code == 303
    monkeypatch.setattr(oidc, "_AGAIN_S", 0.0)
    issuer.keys["two"] = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    issuer.signs_with = "two"
    assert come_back(browser, issuer).status_code == 303
    issuer.more = {"preferred_username": "taken", "sub": "4711"}
    assert "another account here" in come_back(browser, issuer).text


def test_an_issuer_that_is_away_or_calls_itself_otherwise_is_a_sentence(browser: TestClient, issuer: Issuer, tmp_path: Path) -> None:
    issuer.names = "https://evil.test"
    answer = browser.get("/login/oidc")
    assert (answer.status_code, "another issuer" in answer.text) == (503, True)
    store = Store(f"sqlite:///{tmp_path / 'synoptic.db'}")
    away = Config(site=Site(data=tmp_path), web=Web(oidc_issuer="http://127.0.0.1:1", oidc_client_id="synoptic"))
    client = TestClient(application(away, store), base_url=BASE, follow_redirects=False)
    assert re.search("log-in server does not answer", client.get("/login/oidc").text)


@pytest.mark.parametrize(
    ("web", "says"),
    [
        (Web(host="0.0.0.0", tls_certificate="x.pem"), "base_url is needed"),
        (Web(host="10.0.0.7"), "tls_certificate is needed"),
        (Web(host="0.0.0.0", base_url="http://synoptic.test"), "tls_certificate is needed"),
        (Web(base_url="https://synoptic.test/worklist"), "nothing behind the host"),
        (Web(base_url="synoptic.test"), "nothing behind the host"),
        (Web(host="::", tls_certificate="page.pem"), "every address"),
        (Web(tls_key="key.pem"), "without tls_certificate"),
        (Web(port=0), "no TCP port"),
        (Web(monitors=("everybody",)), "no IP address"),
        (Web(session_h=0), "more than 0"),
        (Web(oidc_issuer="https://login.test"), "belong together"),
        (Web(oidc_issuer="http://login.test", oidc_client_id="x"), "https://"),
        (Web(oidc_issuer="https://login.test", oidc_client_id="x", oidc_roles={"a": "root"}), "none of viewer"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_a_page_on_an_open_line_or_half_configured_does_not_start(web: Web, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check(Config(web=web))


def test_a_page_behind_a_proxy_or_a_published_port_of_a_container_does() -> None:
    for base in ("https://synoptic.test", "http://localhost:8080"):
        check(Config(web=Web(host="0.0.0.0", base_url=base)))
    check(Config(web=Web(host="::1")))
