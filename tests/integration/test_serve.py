"""The page as a child of `synoptic all`: over TLS, with a certificate that is renewed, and a log that names nobody."""

from __future__ import annotations

import json
import re
import signal
import ssl
import subprocess
import sys
from pathlib import Path

import httpx2
from typer.testing import CliRunner, Result

from tests import ward
from tests.installation import wait_until
from tests.peers import free_port
from tests.pki import Authority
from worker.cli import app
from worker.ops import audit
from worker.store import accounts
from worker.store.database import Store


def is_ready(log: Path, role: str) -> bool:
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines() if line.startswith("{")]
    return any(one["event"] == "role.started" and one["role"] == role for one in lines)


def synoptic(config: Path, *arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(app, [*arguments, "--config", str(config)], input=stdin)


def test_the_page_is_served_by_tls_with_a_renewed_certificate_and_its_log_names_nobody(tmp_path: Path) -> None:
    authority, port = Authority(tmp_path / "pki"), free_port()
    pair = authority.issue("synoptic")
    store = Store(f"sqlite:///{tmp_path / 'synoptic.db'}")
    store.migrate()
    studies = ward.furnish(store, tmp_path).studies
    config = tmp_path / "synoptic.toml"
    config.write_text(
        f'[site]\ndata = "."\n[receive]\nport = {free_port()}\nlow_water_mb = 1\n[records]\nenabled = false\n'
        f"[web]\nenabled = true\nport = {port}\n"
        f'tls_certificate = "{pair.certificate}"\ntls_key = "{pair.key}"\n'
    )
    (tmp_path / "spool").mkdir()

    refused = synoptic(config, "user", "add", "ada", "--role", "viewer", stdin="short\n")
    assert "12 to 256 characters; this one has 5" in str(refused.exception)
    made = synoptic(config, "user", "add", "Ada", "--role", "viewer", "--role", "operator", stdin=f"{ward.PASSWORD}\n")
    assert made.stdout.strip() == "ada may log in as operator viewer."
    with store.read() as conn:
        row = accounts.by_name(conn, "ada")
    assert row is not None
    assert row.password.startswith("scrypt$32768$8$3$")
    assert "ada" in synoptic(config, "user", "list").stdout
    assert any("User Security Attributes Changed" in line and "account:ada" in line for line in audit.told(tmp_path / "audit"))

    with (tmp_path / "serve.log").open("wb") as log:
        line = [sys.executable, "-m", "worker", "all", "--config", str(config)]
        process = subprocess.Popen(line, stdout=log, stderr=log)
    try:
        said = tmp_path / "serve.log"
        wait_until(lambda: all(is_ready(said, role) for role in ("receive", "deliver", "serve")), timeout_s=120, what="every role")
        trusted = ssl.create_default_context(cafile=str(authority.certificate))
        base = f"https://127.0.0.1:{port}"
        with httpx2.Client(base_url=base, verify=trusted, headers={"sec-fetch-site": "same-origin"}, timeout=30) as client:
            answer = client.post("/login", data={"name": "ada", "password": ward.PASSWORD})
            assert answer.headers["set-cookie"].startswith("__Host-synoptic=")
            assert "Müller, Änne" in client.get(f"/studies/{studies['delivered']}").text
            assert client.get("/ready").text == "ready\n"
            told = client.get("/metrics").text
            assert re.search(r'synoptic_certificate_days\{certificate="\[web\] tls_certificate"\} 36\d', told)
            assert {f'synoptic_role_processes{{role="{role}"}} 1.0' for role in ("receive", "deliver", "serve")} <= set(told.splitlines())
        first = ssl.get_server_certificate(("127.0.0.1", port))
        renewed = authority.issue("renewed")
        renewed.key.replace(pair.key)
        renewed.certificate.replace(pair.certificate)
        assert ssl.get_server_certificate(("127.0.0.1", port)) != first

        assert synoptic(config, "user", "remove", "ada").exit_code == 0
        with httpx2.Client(base_url=base, verify=trusted, headers={"sec-fetch-site": "same-origin"}, timeout=30) as client:
            assert client.post("/login", data={"name": "ada", "password": ward.PASSWORD}).status_code == 401
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(30)
    store.close()
    text = said.read_text("utf-8")
    assert code == 0
    assert list(tmp_path.glob("roles.*")) == []
    assert not re.search(r"Müller|Änne|4711|A-1001|GET /|uvicorn|2\.25\.", text)
    assert "There is no account of this name" in str(synoptic(config, "user", "remove", "ada").exception)
