"""`synoptic doctor` asks the FHIR server what it is, within seconds, and says what to do where that fails."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import torch
from pydicom.uid import SegmentationStorage
from rich.console import Console

from tests import peers
from tests.fhir_server import FhirServer, Reply
from tests.installation import BUNDLES
from worker import doctor, doctor_peers, support
from worker.config import Config, Destination, Records, Sender, Site, Web
from worker.config import FhirServer as Settings
from worker.report import page
from worker.store import accounts, queue, schema
from worker.store.database import Store

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


@pytest.mark.parametrize("is_bare", [False, True])
def test_scripts_without_a_font_are_told_before_a_name_needs_one(is_bare: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where summary pages are wanted; without any font but ours a host has none for half of mankind."""
    if is_bare:
        monkeypatch.setattr(page, "families", lambda: ["DejaVu Sans"])
    pacs = Destination(name="pacs", ae_title="PACS", host="127.0.0.1", port=1, documents=("sr", "summary"))
    config = replace(Config(), site=Site(data=tmp_path), destinations=(pacs,))
    found, is_well = next((said, well) for what, said, well in doctor.checks(config, tmp_path / "synoptic.toml") if what == "fonts")
    if is_bare:
        assert found.startswith("no installed font shows Devanagari, Thai, Han, Kana, Hangul:")
    assert is_well == (not page.scripts_without_font())
    assert "fonts" not in [what for what, *_ in doctor.checks(replace(Config(), site=Site(data=tmp_path)), tmp_path / "synoptic.toml")]


def test_what_is_broken_is_a_line_of_the_table_and_not_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL that is none, an accelerator that has no room for a network, a role that hangs: what doctor is called for."""
    none = replace(Config(), site=Site(data=tmp_path, database="garbage"))
    assert ("database", False) in [(what, is_well) for what, _, is_well in doctor.checks(none, tmp_path / "synoptic.toml")]

    def full() -> str:
        raise torch.OutOfMemoryError("The card is full.")

    assert doctor_peers.tried("bundle", full) == ("bundle", "The card is full.", False)
    monkeypatch.setattr(doctor, "READY_S", 0.01)
    (tmp_path / "synoptic.toml").write_text('[site]\ndata = "."\n')
    config = replace(Config(), site=Site(data=tmp_path))
    Store(config.database_url).migrate()
    assert list(doctor._idle(config, tmp_path / "synoptic.toml")) == [("role receive", "did not start; see its log", False)]


@pytest.mark.requirement("X4")
def test_the_address_of_a_peer_that_the_configuration_has_lost_is_masked_too() -> None:
    """A reason is kept as long as its job, and the host may have another name by then."""
    mask = support._Mask(Config(), None)
    for address in ("pacs-old.klinik.example:11112", "[fe80::7]:104", "10.1.2.3:104"):
        said = mask.sentence(f"pacs cannot be reached at {address}: Connection refused. It is left alone after 3 tries.")
        assert said == "pacs cannot be reached at [address]: Connection refused. It is left alone after 3 tries."
    assert mask.fact("document", "seg") == "seg"


@pytest.mark.requirement("X4")
def test_a_bundle_for_the_vendor_names_no_peer_and_no_host_of_a_url_and_is_made_where_doctor_finds_nothing_well(tmp_path: Path) -> None:
    config = replace(
        Config(),
        site=Site(data=tmp_path, database="garbage"),
        destinations=(
            Destination(name="klinikum-nord", ae_title="NORDPACS", host="127.0.0.1", port=1),
            Destination(name="klinikum-web", stow_url="http://localhost:1/klinik-web/studies"),
        ),
        senders=(Sender(ae_title="NORDMOD", query_port=1),),
    )
    support.write(tmp_path / "vendor.zip", config, None, log_file=None, lines=1)
    with zipfile.ZipFile(tmp_path / "vendor.zip") as made:
        told = {name: made.read(name).decode() for name in made.namelist()}
    assert "C-ECHO [destinations.0.name]" in told["doctor.json"]
    for word in ("klinikum", "NORD", "localhost", "klinik-web"):
        assert [name for name, text in told.items() if word in text] == [], word


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
    monkeypatch.setattr(doctor_peers, "FHIR_S", 0.3)
    with FhirServer() as server:
        server.script("GET /fhir/metadata", Reply(200, b"{" * 10_000, drip_s=0.05))
        started = time.monotonic()
        found, is_well = _found(tmp_path, server.base)
    assert (is_well, "too slow" in found) == (False, True), found
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("classes", "finding", "kinds", "words"),
    [
        ((peers.COMPREHENSIVE_3D_SR, SegmentationStorage), "honest", ("sr", "seg"), "it accepts sr, seg"),
        (
            (peers.COMPREHENSIVE_3D_SR,),
            "honest",
            ("sr", "seg", "pdf"),
            "it accepts no Segmentation Storage (seg), no Encapsulated PDF Storage",
        ),
        ((peers.COMPREHENSIVE_3D_SR,), "unsupported", ("sr",), "it does not accept C-FIND"),
    ],
)
def test_a_pacs_is_asked_for_every_class_that_it_will_be_sent(
    classes: tuple[str, ...], finding: peers.Finding, kinds: tuple[str, ...], words: str
) -> None:
    """Before the first report: what it does not take would be dead letters of every study."""
    with peers.ScriptedPacs(sop_classes=classes, finding=finding) as pacs:
        port = pacs.peer.port
        config = replace(
            Config(), destinations=(Destination(name="pacs", ae_title="SCRIPTED", host="127.0.0.1", port=port, documents=kinds),)
        )
        said = {what: (found, is_well) for what, found, is_well in doctor_peers._peers(config)}
    assert said["C-ECHO pacs"][1]
    found, is_well = said["documents for pacs"]
    assert (words in found, is_well) == (True, words.startswith("it accepts sr")), found


def test_a_port_that_another_program_has_is_told_before_the_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        config = replace(Config(), web=Web(enabled=True, port=other.getsockname()[1]), records=Records(enabled=False))
        config = replace(config, receive=replace(config.receive, port=peers.free_port()))
        said = {what: (found, is_well) for what, found, is_well in doctor._listeners(config, tmp_path / "synoptic.toml")}
    assert said["[receive] port"][1]
    assert "[records] port" not in said
    found, is_well = said["[web] port"]
    assert ("[web] port. Is synoptic running already?" in found, is_well) == (True, False)


def test_a_role_is_ours_however_its_configuration_is_spelled(tmp_path: Path) -> None:
    """By the file, not by its name: a synoptic.toml stands in many folders."""
    (here := tmp_path / "here").mkdir()
    (elsewhere := tmp_path / "elsewhere").mkdir()
    for folder in (here, elsewhere):
        (folder / "synoptic.toml").touch()
    line = [sys.executable, "-c", "import time; time.sleep(60)", "worker", "role", "deliver", "--config", "./synoptic.toml"]
    with subprocess.Popen(line, cwd=here) as process:
        try:
            found = [[name for name, _ in doctor._running(one / "synoptic.toml")] for one in (here, here / ".." / "here", elsewhere)]
        finally:
            process.kill()
    assert found == [["deliver"], ["deliver"], []]


def test_what_nobody_will_ever_do_or_see_is_told(tmp_path: Path) -> None:
    """Jobs of a destination that the configuration lost; a page without an account; notices of bundles that never alarm."""
    pacs = Destination(name="pacs", ae_title="PACS", host="127.0.0.1", port=1)
    config = replace(Config(), site=Site(data=tmp_path), web=Web(enabled=True), destinations=(pacs,))
    assert list(doctor._stored(config)) == [], "there is no database yet"
    store = Store(config.database_url)
    store.migrate()
    ((what, found, is_well),) = doctor._stored(config)
    assert (what, "nobody can log in" in found, is_well) == ("page", True, False)
    with store.begin() as conn:
        accounts.add(conn, "ada", password="x", roles=["admin"], now=datetime.now(UTC))
        one = {"study_instance_uid": "2.25.1", "created_at": datetime.now(UTC)}
        times = dict.fromkeys(("last_received_at", "quiet_until"), datetime.now(UTC))
        conn.execute(sa.insert(schema.study).values(**one, **times))
        queue.enqueue_infer(conn, 1, bundle="gone", input_version=1, priority=1, now=datetime.now(UTC))
    assert [(what, is_well) for what, _, is_well in doctor._stored(config)] == [("page", True), ("analyses", False)]
    hook = Destination(name="hook", webhook_url="http://127.0.0.1:1/", webhook_secret="s")
    config = replace(config, web=Web(), destinations=(hook,), run=replace(config.run, bundles=(BUNDLES / "phantom",)))
    said = {what: found for what, found, _ in doctor._stored(config)}
    assert "none will ever go" in said["notices"]
    assert "1 wait for bundles that [run] bundles does not name" in said["analyses"]
    assert "gone" not in str(said)


def test_a_port_that_hears_this_machine_alone_is_told_where_others_may_call(tmp_path: Path) -> None:
    """The default host is loopback: whoever adds a PACS of the network must change it, or nobody is heard and nothing is logged."""
    far, near = Sender(ae_title="PACS", addresses=("10.1.0.0/16",)), Sender(ae_title="LOCAL", addresses=("127.0.0.1", "::1"))
    config = replace(Config(), site=Site(data=tmp_path), senders=(near,))
    assert list(doctor._reached(config)) == []
    ((what, found, is_well),) = doctor._reached(replace(config, senders=(near, far)))
    assert (what, is_well) == ("[receive] host", False)
    assert "10.1.0.0/16 may call" in found
    assert "0.0.0.0" in found
    config = replace(config, senders=(far,), receive=replace(config.receive, host="0.0.0.0"))
    assert list(doctor._reached(config)) == []
    config = replace(config, records=replace(config.records, addresses=("10.1.2.3",)))
    assert [what for what, _, _ in doctor._reached(config)] == ["[records] host"]


def test_a_certificate_that_is_absent_is_named(tmp_path: Path) -> None:
    ca = str(tmp_path / "ca.pem")
    config = replace(Config(), destinations=(Destination(name="pacs", ae_title="PACS", host="localhost", port=1, tls=True, tls_ca=ca),))
    ((_, found, is_well),) = doctor_peers._certificates(config)
    assert (found, is_well) == (f"[destinations pacs] the authority's file {ca} cannot be used: No such file or directory.", False)


def test_a_place_for_the_vendors_bundle_that_is_none_is_told_before_the_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "checks", lambda *_: pytest.fail("the checks, which take minutes, have begun"))
    (tmp_path / "there.zip").touch()
    for path, error in ((tmp_path / "none" / "out.zip", FileNotFoundError), (tmp_path / "there.zip", FileExistsError)):
        with pytest.raises(error) as told:
            support.write(path, Config(), None, log_file=None, lines=1)
        assert told.value.filename == str(path)


def test_a_doctor_without_a_configuration_says_so_and_a_keys_name_is_no_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (name for name in os.environ if name.startswith("SYNOPTIC_")):
        monkeypatch.delenv(name)
    config = replace(Config(), site=Site(data=tmp_path), senders=(Sender(ae_title="PACS", addresses=("10.1.2.3",)),))
    out = Console(file=io.StringIO(), width=200)
    assert not doctor.report(out, config, None)
    told = out.file.getvalue()  # type: ignore[attr-defined]
    assert "none: start from deploy/synoptic.toml" in told
    assert "[receive] host" in told
    assert "running:" not in told, "a role of another configuration is not ours"
