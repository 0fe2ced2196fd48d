"""TLS by configuration alone: the real daemon, DCMTK's sender, and nobody without a certificate; HL7 messages too."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import warnings
from datetime import UTC
from pathlib import Path

import pytest

from tests import factories
from tests.installation import Installation
from tests.peers import dcmtk, require
from worker.config import Records
from worker.intake.hl7 import ParsedMessage
from worker.intake.mllp import MllpServer
from worker.tls import server_context

pytestmark = [pytest.mark.peer, pytest.mark.timeout(180)]


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate and its key."""
    key, pem = folder / f"{name}.key", folder / f"{name}.pem"
    command = [require("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(pem)], check=True, capture_output=True)
    return pem, key


@pytest.mark.requirement("X5")
def test_a_receiver_with_a_certificate_takes_only_senders_of_its_authority(tmp_path: Path) -> None:
    pem, key = certificate(tmp_path, "worker")
    sender_pem, sender_key = certificate(tmp_path, "modality")
    stranger_pem, stranger_key = certificate(tmp_path, "stranger")
    image = tmp_path / "image.dcm"
    factories.write(factories.make_radiograph(), image)
    installation = Installation(tmp_path / "worker", bundles=("cxr-severity",), processes=1)
    installation.write_config()
    lines = f'[receive]\ntls_certificate = "{pem}"\ntls_key = "{key}"\ntls_client_ca = "{sender_pem}"\n'
    installation.config.write_text(installation.config.read_text("utf-8").replace("[receive]\n", lines), "utf-8")

    def send(*tls: str) -> subprocess.CompletedProcess[str]:
        to = ("-aet", "MODALITY", "-aec", "WORKER", "-to", "5", "127.0.0.1", str(installation.port))
        return dcmtk("/usr/bin/storescu", "-R", *tls, *to, str(image))

    with installation:
        assert send("+tls", str(sender_key), str(sender_pem), "+cf", str(pem)).returncode == 0
        assert send("+tls", str(stranger_key), str(stranger_pem), "+cf", str(pem)).returncode != 0
        assert send().returncode != 0
        installation.wait_for_event("association.closed", timeout_s=10)
        stored = list((installation.folder / "data" / "spool" / "instances").rglob("*.dcm"))
    assert len(stored) == 1


def test_a_certificate_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    installation = Installation(tmp_path, bundles=("cxr-severity",))
    installation.write_config()
    text = installation.config.read_text("utf-8").replace("[receive]\n", '[receive]\ntls_certificate = "/nowhere/x.pem"\n')
    installation.config.write_text(text, "utf-8")
    done = installation.cli("all")
    assert done.returncode == 78
    assert "tls_certificate" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.requirement("X5")
def test_an_hl7_listener_with_a_certificate_takes_only_senders_of_its_authority(tmp_path: Path) -> None:
    pem, key = certificate(tmp_path, "worker")
    sender_pem, sender_key = certificate(tmp_path, "his")
    kept: list[bytes] = []

    def apply(_message: ParsedMessage, raw: bytes) -> bool:
        kept.append(raw)
        return True

    settings = Records(tls_certificate=str(pem), tls_key=str(key), tls_client_ca=str(sender_pem))
    server = MllpServer(
        ("127.0.0.1", 0),
        apply=apply,
        reject=lambda _reason, _raw: None,
        zone=UTC,
        issuers={"": "SITE"},
        allowed_addresses=("127.0.0.0/8",),
        message_deadline_s=2.0,
        ssl_context=server_context(settings, section="records"),
    )
    server.start()
    try:
        theirs = ssl.create_default_context(cafile=str(pem))
        theirs.check_hostname = False

        def send(context: ssl.SSLContext | None) -> bytes:
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain:
                connection = context.wrap_socket(plain) if context else plain
                connection.sendall(b"\x0b" + MESSAGE + b"\x1c\r")
                return connection.recv(65536)

        for context in (None, theirs):  # plain, then without a certificate of the sender's
            with contextlib.suppress(OSError):
                assert b"MSA" not in send(context)
        old = ssl.create_default_context(cafile=str(pem))
        old.check_hostname = False
        old.load_cert_chain(sender_pem, sender_key)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(OSError):  # noqa: PT011  whichever way it ends, there is no connection
            send(old)
        assert kept == []
        theirs.load_cert_chain(sender_pem, sender_key)
        assert b"MSA|AA|1" in send(theirs)
        assert len(kept) == 1
    finally:
        server.stop()


MESSAGE = b"MSH|^~\\&|HIS|A|SYNOPTIC|B|20240102030405+0000||ADT^A08^ADT_A01|1|P|2.5.1\rPID|||P-1||TEST^ONLY||20000101|F\r"
