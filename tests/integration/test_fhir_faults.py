"""A FHIR R4 server that stumbles, lies, drips and does not know us: each fault has its verdict, and none has a word of a patient."""

from __future__ import annotations

import gzip
import json
import logging
import ssl
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from tests.fhir_records import SENTINEL, crp, fill, pull, values
from tests.fhir_server import FhirServer, Reply, date_header, outcome
from tests.peers import require
from worker.errors import PeerRefused, PeerUnavailable
from worker.intake.fhir_client import Client

Json = dict[str, Any]


# --- tokens


def test_a_secret_gets_a_token_that_is_used_until_it_expires(server: FhirServer, connect: Callable[..., Client]) -> None:
    fill(server)
    server.needs_token, server.secrets = True, {"a client": "s3cret:+ä"}
    now = [0.0]
    client = connect(token_url=server.token_url, client_id="a client", client_secret="s3cret:+ä", deadline_s=9e9, clock=lambda: now[0])
    assert values(pull(client)) == values(pull(client)) == [0.0]
    assert len(server.lines("POST /token")) == 1
    now[0] = 280.0
    pull(client)
    assert len(server.lines("POST /token")) == 2
    assert server.asked[1].headers["authorization"] == "Bearer token-1"


def test_a_token_that_is_not_accepted_any_more_is_replaced_once(server: FhirServer, connect: Callable[..., Client]) -> None:
    fill(server)
    server.needs_token, server.secrets = True, {"me": "secret"}
    client = connect(token_url=server.token_url, client_id="me", client_secret="secret")
    pull(client)
    server.tokens.clear()
    assert values(pull(client)) == [0.0]
    assert len(server.lines("POST /token")) == 2
    server.token_s = -1.0
    server.tokens.clear()
    with pytest.raises(PeerRefused, match="401"):
        pull(client)


def test_without_a_token_a_server_that_wants_one_refuses(server: FhirServer, connect: Callable[..., Client]) -> None:
    server.needs_token = True
    with pytest.raises(PeerRefused, match="401 and an OperationOutcome of severity error, code login"):
        pull(connect())


def test_a_wrong_secret_is_refused_in_words_that_hold_none_of_it(server: FhirServer, connect: Callable[..., Client]) -> None:
    server.needs_token, server.secrets = True, {"me": "secret"}
    with pytest.raises(PeerRefused, match="status 401, invalid_client") as caught:
        pull(connect(token_url=server.token_url, client_id="me", client_secret="guess-ZZ"))
    assert "ZZ" not in str(caught.value)


@pytest.mark.parametrize("kind", ["RS384", "ES384"])
@pytest.mark.parametrize("form", ["pem", "jwk"])
def test_a_private_key_gets_a_token(server: FhirServer, connect: Callable[..., Client], tmp_path: Path, kind: str, form: str) -> None:
    """SMART backend services; the server judges the signature, audience, times and that no assertion comes twice."""
    fill(server)
    algorithm: Any = {"RS384": jwt.algorithms.RSAAlgorithm, "ES384": jwt.algorithms.ECAlgorithm}[kind]
    private = rsa.generate_private_key(65537, 2048) if kind == "RS384" else ec.generate_private_key(ec.SECP384R1())
    path = tmp_path / "client.key"
    pem = private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(pem if form == "pem" else json.dumps(algorithm.to_jwk(private, as_dict=True) | {"kid": "k1"}).encode())
    server.needs_token, server.token_s = True, 300.0
    server.public_keys = {("k1", kind): private.public_key()}
    client = connect(token_url=server.token_url, client_id="me", key_file=str(path), key_id="k1")
    assert values(pull(client)) == [0.0]
    server.tokens.clear()
    assert values(pull(client)) == [0.0]
    assert len({one["jti"] for one in server.assertions}) == 2
    assert all(one["iss"] == one["sub"] == "me" and one["exp"] - time.time() <= 300 for one in server.assertions)


@pytest.mark.parametrize("content", [b"", b"{}", b"no key", b'{"kty": "oct", "k": "AAAA"}'])
def test_a_file_that_is_no_private_key_is_refused_at_the_start(connect: Callable[..., Client], tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "client.key"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="private key"):
        connect(token_url="https://a/token", client_id="me", key_file=str(path))
    with pytest.raises(ValueError, match="cannot be read"):
        connect(token_url="https://a/token", client_id="me", key_file=str(tmp_path / "none"))


# --- what goes wrong


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_server_is_asked_again_when_it_says(server: FhirServer, connect: Callable[..., Client], status: int) -> None:
    fill(server)
    slept: list[float] = []
    in_a_while = date_header(datetime.now(UTC) + timedelta(seconds=20))
    server.script("GET /fhir/Observation", Reply(status, headers={"Retry-After": "7"}), Reply(status, headers={"Retry-After": in_a_while}))
    assert values(pull(connect(sleep=slept.append))) == [0.0]
    assert slept[0] == 7.0
    assert 15.0 < slept[1] <= 20.0


def test_a_connection_that_breaks_is_made_again(server: FhirServer, connect: Callable[..., Client]) -> None:
    fill(server)
    server.script("GET /fhir/Observation", Reply(hangs_up=True), Reply(hangs_up=True))
    assert values(pull(connect())) == [0.0]


def test_attempts_end(server: FhirServer, connect: Callable[..., Client]) -> None:
    server.script("POST", *[Reply(503)] * 9)
    with pytest.raises(PeerUnavailable, match="status 503, after 3 attempts"):
        pull(connect(attempts=3))


def test_a_server_that_asks_for_more_patience_than_there_is_time_is_not_waited_for(
    server: FhirServer, connect: Callable[..., Client]
) -> None:
    server.script("POST", Reply(503, headers={"Retry-After": "86400"}))
    with pytest.raises(PeerUnavailable, match="after 1 attempts"):
        pull(connect())


def test_nobody_there_is_unavailable(connect: Callable[..., Client]) -> None:
    with pytest.raises(PeerUnavailable, match="ConnectError"):
        pull(connect(url="http://127.0.0.1:9/fhir"))


@pytest.mark.parametrize(
    ("reply", "error", "words"),
    [
        (
            Reply(500, outcome("fatal", "exception", SENTINEL)),
            PeerUnavailable,
            "status 500 and an OperationOutcome of severity fatal",
        ),
        (Reply(500, b"<html>" + SENTINEL.encode()), PeerUnavailable, "status 500"),
        (Reply(400, outcome("error", "invalid", SENTINEL)), PeerRefused, "400 and an OperationOutcome of severity error, code invalid"),
        (Reply(400, outcome("error", SENTINEL)), PeerRefused, "400 and an OperationOutcome of severity error"),
        (Reply(403, outcome(SENTINEL)), PeerRefused, "status 403"),
        (Reply(409, outcome("error", "transient")), PeerUnavailable, "code transient"),
        (Reply(200, outcome("error", "forbidden")), PeerRefused, "code forbidden"),
        (Reply(302, headers={"Location": f"https://example.org/{SENTINEL}"}), PeerRefused, "redirect"),
        (Reply(200, b"[]"), PeerRefused, "not a JSON object"),
        (Reply(200, b'{"x": ' + b"[" * 100_000), PeerRefused, "not a JSON object"),
        (Reply(200, SENTINEL.encode()), PeerRefused, "not a JSON object"),
        (Reply(200, {"resourceType": "Patient"}), PeerRefused, "no searchset"),
        (
            Reply(200, {"resourceType": "Bundle", "type": "searchset", "entry": [{"resource": outcome("error", "incomplete", SENTINEL)}]}),
            PeerRefused,
            "in part only",
        ),
        (Reply(200, b"no gzip", headers={"Content-Encoding": "gzip"}), PeerUnavailable, "DecodingError"),
    ],
)
def test_each_wrong_answer_has_its_verdict_and_no_word_of_a_patient(
    server: FhirServer, connect: Callable[..., Client], reply: Reply, error: type[Exception], words: str
) -> None:
    fill(server)
    server.script("GET /fhir/Observation", *[reply] * 4)
    with pytest.raises(error, match=words) as caught:
        pull(connect())
    assert SENTINEL not in str(caught.value)


def test_a_warning_beside_the_answer_is_no_error(server: FhirServer, connect: Callable[..., Client]) -> None:
    fill(server)
    entries = [{"resource": crp("o1")}, {"resource": outcome("warning", "informational"), "search": {"mode": "outcome"}}]
    server.script("GET /fhir/Observation", Reply(200, {"resourceType": "Bundle", "type": "searchset", "entry": entries}))
    assert values(pull(connect())) == [3.0]


@pytest.mark.requirement("X8")
@pytest.mark.parametrize(
    "link",
    [
        "http://169.254.169.254/latest/meta-data",
        "file:///etc/passwd",
        "//example.org/fhir",
        "http://127.0.0.1:1/fhir",
        "http://[",
        "http://a@{host}/x",
    ],
)
def test_a_next_page_of_another_server_is_not_followed(server: FhirServer, connect: Callable[..., Client], link: str) -> None:
    """The token would go with it."""
    fill(server, 2)
    server.max_page, server.next_link = 1, link.format(host=server.origin.removeprefix("http://"))
    with pytest.raises(PeerRefused, match=r"another server|not a URL"):
        pull(connect())


def test_endless_pages_end(server: FhirServer, connect: Callable[..., Client]) -> None:
    fill(server)
    server.is_endless = True
    with pytest.raises(PeerRefused, match="more than 5 pages"):
        pull(connect(max_pages=5))
    assert len(server.asked) <= 9


def test_pages_in_a_circle_are_noticed(server: FhirServer, connect: Callable[..., Client]) -> None:
    fill(server)
    server.is_endless, server.next_link = True, f"{server.base}/Patient?circle=1"
    with pytest.raises(PeerRefused, match="circle"):
        pull(connect())
    assert len(server.asked) <= 4


@pytest.mark.parametrize("packed", [False, True])
def test_a_body_of_500_mb_is_not_read_to_its_end(server: FhirServer, connect: Callable[..., Client], packed: bool) -> None:
    fill(server)
    bomb = Reply(200, gzip.compress(b" " * 50 * 2**20), {"Content-Encoding": "gzip"})
    server.script("GET /fhir/Observation", bomb if packed else Reply(endless=500 * 2**20))
    began = time.monotonic()
    with pytest.raises(PeerRefused, match="larger than"):
        pull(connect(max_bytes=4 * 2**20))
    assert time.monotonic() - began < 3.0


def test_a_server_that_drips_is_left(server: FhirServer, connect: Callable[..., Client]) -> None:
    """Each byte comes in time, so that no time-out of the network ever ends it."""
    fill(server)
    server.script("GET /fhir/Observation", Reply(200, b"{" * 10_000, drip_s=0.01))
    began = time.monotonic()
    with pytest.raises(PeerUnavailable, match="too slow"):
        pull(connect(deadline_s=0.5))
    assert time.monotonic() - began < 3.0


def test_a_server_that_falls_silent_is_left(server: FhirServer, connect: Callable[..., Client]) -> None:
    fill(server)
    server.script("GET /fhir/Observation", *[Reply(200, b"{}", drip_s=5.0)] * 2)
    with pytest.raises(PeerUnavailable, match="ReadTimeout"):
        pull(connect(timeout_s=0.1, attempts=2))


@pytest.mark.requirement("X8")
@pytest.mark.parametrize("url", ["file:///etc/passwd", "http://169.254.169.254/latest", "{base}/Binary/b1"])
def test_the_url_of_an_attachment_is_never_followed(server: FhirServer, connect: Callable[..., Client], url: str) -> None:
    fill(server, 0)
    attachment = {"contentType": "text/plain", "url": url.format(base=server.base)}
    note: Json = {"resourceType": "DocumentReference", "id": "d1", "status": "current", "date": "2020-05-06T06:30:00Z"}
    note |= {"type": crp("x")["code"], "subject": {"reference": "Patient/p1"}, "content": [{"attachment": attachment}]}
    server.put(note)
    (update,) = pull(connect())
    assert update.observations == ()
    assert not [line for line in server.lines() if "Binary" in line]


@pytest.mark.requirement("X1")
def test_nothing_of_a_patient_is_logged_at_any_level(
    server: FhirServer, connect: Callable[..., Client], caplog: pytest.LogCaptureFixture
) -> None:
    """The HTTP library logs each URL, and at DEBUG each header."""
    fill(server)
    server.takes_post, server.needs_token, server.secrets = False, True, {"me": "s3cret"}
    with caplog.at_level(logging.DEBUG):
        pull(connect(token_url=server.token_url, client_id="me", client_secret="s3cret"))
    assert not [text for text in (SENTINEL, "token-1", "s3cret", "patient=") if text in caplog.text]


# --- TLS


def secured(folder: Path, name: str) -> tuple[ssl.SSLContext, Path]:
    """A server's context with a certificate of its own for `name`."""
    key, pem = folder / "server.key", folder / "server.pem"
    command = [require("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=fhir"]
    subprocess.run([*command, "-addext", f"subjectAltName={name}", "-keyout", str(key), "-out", str(pem)], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem, key)
    return context, pem


@pytest.mark.peer
@pytest.mark.requirement("X5")
def test_a_server_whose_certificate_is_trusted_is_asked_and_another_is_not(tmp_path: Path, connect: Callable[..., Client]) -> None:
    context, pem = secured(tmp_path, "IP:127.0.0.1")
    with FhirServer(context=context) as server:
        fill(server)
        with pytest.raises(PeerUnavailable, match="certificate is not trusted"):
            pull(connect(url=server.base))
        assert server.asked == []
        assert values(pull(connect(url=server.base, ca=str(pem)))) == [0.0]


@pytest.mark.peer
@pytest.mark.requirement("X5")
def test_a_certificate_of_another_host_is_not_trusted(tmp_path: Path, connect: Callable[..., Client]) -> None:
    context, pem = secured(tmp_path, "DNS:fhir.example.org")
    with FhirServer(context=context) as server:
        with pytest.raises(PeerUnavailable, match="certificate is not trusted"):
            pull(connect(url=server.base, ca=str(pem)))
        assert server.asked == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"url": "http://fhir.example.org/"}, "https"),
        ({"url": "ftp://127.0.0.1/"}, "https"),
        ({"url": "https://me:secret@fhir.example.org/"}, "client_secret"),
        ({"token_url": "http://example.org/", "client_id": "a", "client_secret": "b"}, "token server"),
        ({"token_url": "https://example.org/"}, "client_id"),
        ({"ca": "/dev/null"}, "authorities"),
        ({"ca": "/no/such.pem"}, "authorities"),
    ],
)
def test_what_cannot_be_right_is_refused_at_the_start(connect: Callable[..., Client], changes: Json, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        connect(**changes)
    assert "secret@" not in str(caught.value)
