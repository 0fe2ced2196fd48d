"""`synoptic doctor` asks the FHIR server what it is, within seconds, and says what to do where that fails."""

from __future__ import annotations

import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.fhir_server import FhirServer, Reply
from worker import doctor
from worker.config import Config, Site
from worker.config import FhirServer as Settings

STATEMENT = {"resourceType": "CapabilityStatement", "fhirVersion": "4.0.1"}


def _found(folder: Path, url: str, **settings: Any) -> tuple[str, bool]:
    config = replace(Config(), site=Site(data=folder), fhir=Settings(url=url, issuer_system="urn:ids", **settings))
    ((what, found, is_well),) = [check for check in doctor.checks(config, folder / "synoptic.toml") if check[0] == "FHIR server"]
    assert what == "FHIR server"
    return found, is_well


def test_a_server_that_is_not_configured_is_not_asked_for(tmp_path: Path) -> None:
    names = [what for what, _, _ in doctor.checks(replace(Config(), site=Site(data=tmp_path)), tmp_path / "synoptic.toml")]
    assert "FHIR server" not in names


@pytest.mark.parametrize(
    ("reply", "is_well", "words"),
    [
        (Reply(200, STATEMENT), True, "speaks FHIR 4.0.1"),
        (Reply(401), True, "token"),
        (Reply(404), False, "must be the base URL"),
        (Reply(503), False, "status 503"),
        (Reply(200, b"<html>"), False, "not a JSON object"),
        (Reply(200, {"resourceType": "Bundle"}), False, "no CapabilityStatement"),
        (Reply(200, {**STATEMENT, "fhirVersion": "3.0.2"}), False, "R4 base URL"),
    ],
)
def test_the_fhir_server_is_asked_what_it_is(tmp_path: Path, reply: Reply, is_well: bool, words: str) -> None:
    with FhirServer() as server:
        server.script("GET /fhir/metadata", reply)
        found, was_well = _found(tmp_path, server.base)
    assert (was_well, words in found) == (is_well, True), found
    assert server.lines() == ["GET /fhir/metadata"]


def test_settings_that_cannot_be_right_and_a_server_that_is_away_are_told_with_what_to_do(tmp_path: Path) -> None:
    assert _found(tmp_path, "http://fhir.example")[1] is False
    assert "https://" in _found(tmp_path, "http://fhir.example")[0]
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    found, is_well = _found(tmp_path, f"http://127.0.0.1:{port}/fhir")
    assert (is_well, "Check fhir.url" in found) == (False, True), found
    found, is_well = _found(
        tmp_path, "https://127.0.0.1/fhir", token_url="https://127.0.0.1/t", client_id="me", key_file=str(tmp_path / "none")
    )
    assert (is_well, "[fhir]" in found) == (False, True), found


def test_a_server_that_drips_is_given_up_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "FHIR_S", 0.3)
    with FhirServer() as server:
        server.script("GET /fhir/metadata", Reply(200, b"{" * 10_000, drip_s=0.05))
        started = time.monotonic()
        found, is_well = _found(tmp_path, server.base)
    assert (is_well, "too slow" in found) == (False, True), found
    assert time.monotonic() - started < 5
