"""L14 and renewal: a certificate's end is told ahead, a new file counts at the next connection, a broken one does not."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from tests import peers
from tests.pki import Authority, calling, listening, served
from tests.receivers import receiving
from tests.scu import hearing
from worker import doctor, tls
from worker.config import Config, ConfigError, Destination, Receive, Records, Sender, Site, read
from worker.deliver import cstore
from worker.errors import PeerUnreachable
from worker.peers import peer_of, peers_of
from worker.tls import server_context


@pytest.fixture
def hospital(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "hospital", "hospital")


def put(source: Path, target: Path) -> None:
    """Replace a file as tools for certificates do: written beside, renamed into place."""
    beside = target.with_suffix(".new")
    beside.write_bytes(source.read_bytes())
    beside.rename(target)


# --- renewal -------------------------------------------------------------------------------------------


def test_a_renewed_certificate_of_a_listener_counts_at_the_next_connection(hospital: Authority, tmp_path: Path) -> None:
    """The new one is of another authority, so that a caller can tell; the caller before is refused from then on."""
    other = Authority(tmp_path / "other", "other")
    pair, renewed, caller = hospital.issue("worker"), other.issue("worker"), hospital.issue("modality")
    made = server_context(listening(pair, trusted=hospital), section="receive")
    with receiving(tmp_path / "spool", ssl_context=made) as receiver:
        port = receiver.scp.address[1]
        before = peer_of(calling(caller, trusted=hospital, port=port), own_ae_title="SENDER")
        after = peer_of(calling(caller, trusted=other, port=port), own_ae_title="SENDER")
        assert cstore.echo(before) > 0
        with pytest.raises(PeerUnreachable):
            cstore.echo(after)
        put(renewed.certificate, pair.certificate)
        put(renewed.key, pair.key)
        assert cstore.echo(after) > 0
        with pytest.raises(PeerUnreachable, match="certificate"):
            cstore.echo(before)
        assert receiver.heard.next("certificate.reloaded") == {"section": "receive"}


def test_an_authority_that_is_replaced_is_trusted_no_more(hospital: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other", "other")
    pair, caller = hospital.issue("worker"), hospital.issue("modality")
    made = server_context(listening(pair, trusted=hospital), section="receive")
    with receiving(tmp_path / "spool", ssl_context=made) as receiver:
        peer = peer_of(calling(caller, trusted=hospital, port=receiver.scp.address[1]), own_ae_title="SENDER")
        assert cstore.echo(peer) > 0
        put(other.certificate, hospital.certificate)
        with pytest.raises(PeerUnreachable):
            cstore.echo(peer)


@pytest.mark.parametrize("broken", ["no PEM", "empty", "of another key", "gone"])
def test_a_new_file_that_cannot_be_used_is_an_event_and_the_one_before_stays(hospital: Authority, tmp_path: Path, broken: str) -> None:
    pair = hospital.issue("worker")
    made = server_context(listening(pair, trusted=None), section="receive")
    with receiving(tmp_path / "spool", ssl_context=made) as receiver:
        peer = peer_of(calling(None, trusted=hospital, port=receiver.scp.address[1]), own_ae_title="SENDER")
        if broken == "gone":
            pair.key.unlink()
        elif broken == "of another key":
            put(hospital.issue("other").certificate, pair.certificate)
        else:
            pair.certificate.write_text("" if broken == "empty" else "-----BEGIN NONSENSE-----\n")
        for _ in range(3):
            assert cstore.echo(peer) > 0
        said = receiver.heard.next("certificate.unusable")
        assert said["section"] == "receive"
        assert str(tmp_path) not in str(said["reason"])
        assert receiver.heard.so_far("certificate.unusable") == []  # said once
        mended = hospital.issue("worker")
        os.utime(mended.certificate, ns=(1, 1))
        assert cstore.echo(peer) > 0
        assert receiver.heard.next("certificate.reloaded") == {"section": "receive"}


def test_our_own_certificate_as_a_caller_is_read_anew_too(hospital: Authority) -> None:
    pair = hospital.issue("worker", days=-1)
    context = served(hospital.issue("pacs"), trusted=hospital)
    with peers.ScriptedPacs(tls=context) as pacs:
        peer = peer_of(calling(pair, trusted=hospital, port=pacs.peer.port), own_ae_title="WORKER")
        with pytest.raises(PeerUnreachable, match="certificate"):
            cstore.echo(peer)
        hospital.issue("worker")
        assert cstore.echo(peer) > 0


# --- the end is told ahead -----------------------------------------------------------------------------


@pytest.mark.requirement("L14")
@pytest.mark.parametrize(
    ("left", "is_well", "words"),
    [
        (timedelta(days=30, seconds=1), True, "30 days"),
        (timedelta(days=30), False, "in 30 days"),
        (timedelta(hours=20), False, "in 0 days"),
        (timedelta(0), False, "expired"),
        (timedelta(days=-3), False, "expired on 2026-11-26, 3 days ago, and is refused"),
    ],
)
def test_a_certificates_end_is_told_from_thirty_days_before(left: timedelta, is_well: bool, words: str) -> None:
    now = datetime(2026, 11, 29, tzinfo=UTC)
    said, was_well = tls.lifetime(now + left, now=now)
    assert (was_well, words in said) == (is_well, True), said


@pytest.mark.requirement("L14")
def test_doctor_and_the_log_name_each_certificate_that_ends_soon_ours_and_theirs(hospital: Authority, tmp_path: Path) -> None:
    soon, long = hospital.issue("soon", days=12.5), hospital.issue("long", days=200)
    with peers.ScriptedPacs(tls=served(hospital.issue("pacs", days=5.5))) as pacs:
        destination = calling(soon, trusted=hospital, port=pacs.peer.port)
        asked = Sender(ae_title="RIS", query_port=pacs.peer.port, query_tls=True, tls_ca=str(hospital.certificate))
        records = Records(tls_certificate=str(soon.certificate), tls_key=str(soon.key))
        config = replace(
            Config(),
            site=Site(data=tmp_path),
            receive=listening(long, trusted=hospital),
            records=records,
            destinations=(destination,),
            senders=(asked,),
        )
        found = {what: (said, is_well) for what, said, is_well in doctor.checks(config, tmp_path / "synoptic.toml")}
        with hearing() as heard:
            tls.warn(config, peers_of(config), now=datetime.now(UTC))
    assert found["C-ECHO pacs"][1]
    assert "by TLS" in found["C-ECHO pacs"][0]
    assert found["C-ECHO RIS"][1]
    ended = {what: said for what, (said, is_well) in found.items() if not is_well and "expires" in said}
    assert {what: said.split(", ")[1].split(":")[0] for what, said in ended.items()} == {
        "[records] tls_certificate": "in 12 days",
        "[destinations pacs] tls_certificate": "in 12 days",
        "certificate of pacs": "in 5 days",
        "certificate of RIS": "in 5 days",
    }
    assert found["[receive] tls_certificate"][1]
    assert found["[receive] authority"][1]
    assert {str(one["certificate"]): one["days"] for one in heard.so_far("certificate.expires")} == {
        "[records] tls_certificate": 12,
        "[destinations pacs] tls_certificate": 12,
        "certificate of pacs": 5,
        "certificate of RIS": 5,
    }


@pytest.mark.requirement("X5")
def test_doctor_says_that_a_peers_certificate_expired_or_is_not_trusted(hospital: Authority, tmp_path: Path) -> None:
    with peers.ScriptedPacs(tls=served(hospital.issue("pacs", days=-1))) as pacs:
        config = replace(Config(), site=Site(data=tmp_path), destinations=(calling(None, trusted=hospital, port=pacs.peer.port),))
        found = {what: (said, is_well) for what, said, is_well in doctor.checks(config, tmp_path / "synoptic.toml")}
    assert found["C-ECHO pacs"] == (
        f"pacs cannot be reached by TLS at 127.0.0.1:{pacs.peer.port}: its certificate is refused, certificate has expired.",
        False,
    )


@pytest.mark.requirement("L14")
def test_the_last_authority_of_a_file_counts_and_of_a_chain_the_first_end(hospital: Authority, tmp_path: Path) -> None:
    old = Authority(tmp_path / "old", "old")
    ended = old.issue("ended", days=-4)
    chain, authorities = tmp_path / "chain.pem", tmp_path / "authorities.pem"
    chain.write_bytes(hospital.issue("worker").certificate.read_bytes() + ended.certificate.read_bytes())
    authorities.write_bytes(ended.certificate.read_bytes() + hospital.certificate.read_bytes())
    receive = Receive(tls_certificate=str(chain), tls_client_ca=str(authorities))
    found = {what: end_of() > datetime.now(UTC) for what, end_of in tls.ends(replace(Config(), receive=receive), [])}
    assert found == {"[receive] tls_certificate": False, "[receive] authority": True}


# --- what the configuration may not say ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ('[receive]\ntls_client_ca = "/x.pem"\n', "receive: tls_key or tls_client_ca without tls_certificate"),
        ('[records]\ntls_key = "/x.pem"\n', "records: tls_key or tls_client_ca without tls_certificate"),
        ('[[destinations]]\nname = "pacs"\nae_title = "PACS"\nhost = "h"\nport = 104\ntls_ca = "/x.pem"\n', "need tls = true"),
        (
            '[[destinations]]\nname = "pacs"\nae_title = "PACS"\nhost = "h"\nport = 104\ntls = true\ntls_key = "/x"\n',
            "without tls_certificate",
        ),
        ('[[senders]]\nae_title = "PACS"\ntls_server_name = "pacs"\n', "need query_tls = true"),
    ],
)
def test_half_a_configuration_of_tls_is_an_error_and_not_a_plain_connection(tmp_path: Path, section: str, words: str) -> None:
    (tmp_path / "synoptic.toml").write_text(section, "utf-8")
    with pytest.raises(ConfigError, match=words):
        read(tmp_path / "synoptic.toml", {})


def test_files_that_cannot_be_used_are_one_sentence_at_the_start(hospital: Authority, tmp_path: Path) -> None:
    pair = hospital.issue("worker")
    key = serialization.load_pem_private_key(pair.key.read_bytes(), None)
    locked = serialization.BestAvailableEncryption(b"secret")
    pair.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked))
    with pytest.raises(ConfigError, match=r"\[receive\] tls_certificate.* password"):  # and does not ask a terminal for the password
        server_context(listening(pair, trusted=hospital), section="receive")
    pacs = Destination(name="pacs", ae_title="PACS", host="h", port=104, tls=True, tls_ca=str(tmp_path / "none.pem"))
    with pytest.raises(ConfigError, match=r"\[destinations pacs\] .* No such file"):
        tls.check(replace(Config(), destinations=(pacs,)))
