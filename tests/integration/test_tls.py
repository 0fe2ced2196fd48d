"""TLS by configuration alone: the real daemon, DCMTK's sender, and nobody without a certificate."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests import factories
from tests.installation import Installation
from tests.peers import dcmtk, require

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
